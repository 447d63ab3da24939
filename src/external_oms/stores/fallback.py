"""Degraded operation: while the shared store fails, a store in memory serves this process alone.

What must survive an outage of the store is the invalidations. So an invalidation that the shared store could not take
is *owed*: it takes effect in this process at once, and is repeated to the shared store when that works again. Nothing
is merged: values that were read alone are read once more.

A shared store may also lose data: a Redis that restarted without persistence, a file that was replaced. A process that
finds a lower generation than it knows owes the store an invalidation, which raises the generation again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

from external_oms.clock import Clock
from external_oms.entry import Change, Entry, Invalidated, Invalidation, Moment, Transition, invalidate
from external_oms.errors import ExternalOMSError, StoreBusy, StoreError
from external_oms.records import Cause, Event, Member
from external_oms.stores.base import Health, Store
from external_oms.stores.memory import MemoryStore

__all__ = ["Fallback"]

logger = logging.getLogger("external_oms")

FIRST_RETRY_SECONDS = 0.2
"""The wait before the first try to use a failed store again: most failures last for a moment."""

LAST_RETRY_SECONDS = 1.0
"""The longest wait between two tries, before jitter: how long a recovered store stays unused."""

LOST_SECONDS = 2.0
"""By how many seconds the value in the store must be older than the one that this process knows to count as lost: more
than the clocks of two hosts differ by."""

T = TypeVar("T")


class Fallback:
    """A shared store that keeps working, as one process, while the shared store fails.

    `load`, `transact`, `touch`, `poll`, `append`, `history`, `report` and `members` raise no `StoreError`, except that
    `transact` raises `StoreBusy` where the store works and others use it for too long.

    Args:
        shared: The shared store.
        clock: Tells the time.
        random: Returns numbers in [0, 1): spreads the retries of a fleet.
        history_rows: How many history rows the local store keeps, >= 1.
        owned: Whether `close` closes the shared store; not one that the caller made.
    """

    def __init__(
        self,
        shared: Store,
        *,
        clock: Clock,
        random: Callable[[], float],
        history_rows: int = 10_000,
        owned: bool = True,
    ) -> None:
        self.kind = shared.kind
        self.poll_seconds = shared.poll_seconds
        self.spread_seconds = shared.spread_seconds
        self._shared = shared
        self._clock = clock
        self._random = random
        self._history_rows = history_rows
        self._owned = owned
        self._lock = threading.Lock()  # guards the four below
        self._local: MemoryStore | None = None
        self._known: dict[str, Entry] = {}
        self._owed: dict[str, int] = {}
        self._words: dict[str, int] = {}  # of the shared store, as `_follow_others` saw them last
        self._is_readable = True
        self._problem = ""
        self._retry_at = 0.0
        self._retries = 0

    @property
    def holder(self) -> str:
        """The name of this process in the shared store; in the local store it has a suffix."""
        local = self._local
        return self._shared.holder if local is None else local.holder

    def is_gone(self, holder: str) -> bool:
        """Return whether the process of that name is known to have ended."""
        local = self._local
        return (self._shared if local is None else local).is_gone(holder)

    def is_own(self, writer: str) -> bool:
        """Return whether this process wrote under that name, to either store."""
        return writer.startswith(self._shared.holder)

    # -- entries ----------------------------------------------------------------------------------------------------

    def version_ref(self, tenant: str) -> tuple[Sequence[int], int]:
        """Return where the version word of a tenant stands."""
        try:
            return self._call(lambda store: store.version_ref(tenant))
        except StoreBusy:  # a place of its own, so that the next look asks again
            return [0], 0

    def load(self, tenant: str) -> Entry:
        """Return the entry; not verified where the shared store does not have what this process knows.

        A value that the store has lost is kept as stale, since it is better than none while the API is down.
        """
        local = self._local
        if local is not None:
            self._known.setdefault(tenant, Entry())
            return local.load(tenant)
        try:
            entry = self._shared.load(tenant)
            known = self._known.get(tenant)
            if known is not None and known.generation > entry.generation:
                entry = self._shared.load(tenant)  # another thread may have loaded a later one in between
        except StoreBusy:
            last = self._known.get(tenant, Entry())
            return replace(last, generation=max(last.generation, self._owed.get(tenant, 0)), verified=False)
        except Exception as error:  # noqa: BLE001 - a store must not fail an evaluation, whatever it raises
            self._known.setdefault(tenant, Entry())
            return self._degrade(error).load(tenant)
        owed = self._owed.get(tenant, 0)
        if known is not None and known.generation > max(entry.generation, owed):
            logger.warning("tenant %s: the store has lost generation %d; raising it again", tenant, known.generation)
            with self._lock:
                owed = self._owed[tenant] = max(self._owed.get(tenant, 0), known.generation)
        if known is not None and _has_lost_value(entry, known):
            # perhaps an invalidation is lost with the value: it is stale, and better than an older one or none
            entry = replace(entry, snapshot=known.snapshot, verified=False)
        if tenant in self._owed:
            entry = replace(entry, generation=max(entry.generation, owed), verified=False)
        with self._lock:
            latest = self._known.get(tenant)
            if latest is not None and latest.generation > entry.generation:  # an invalidation came in between
                entry = replace(entry, generation=latest.generation, verified=False)
            self._known[tenant] = entry
        return entry

    def transact(self, tenant: str, transition: Transition[T], *, delivery_ids: Sequence[str] = ()) -> T:
        """Apply a transition, in the shared store or in the local one."""
        return self._call(lambda store: store.transact(tenant, transition, delivery_ids=delivery_ids))

    def invalidate(self, tenant: str, requests: Sequence[Invalidation]) -> tuple[tuple[Invalidated, ...], bool]:
        """Invalidate, and return the results and whether the shared store has taken the invalidation.

        Where it has not, this process serves nothing read before as fresh all the same, and repeats the invalidation
        to the shared store. Delivery ids are not remembered then, so that a sender that repeats is heard.
        """
        ids = [request.delivery_id for request in requests if request.delivery_id is not None]
        if self._local is None:
            known = self._known.get(tenant, Entry())
            transition = partial(invalidate, requests=requests, at_least=known.generation + 1)
            try:
                results = self._shared.transact(tenant, transition, delivery_ids=ids)
            except StoreBusy:
                return self._owe(tenant, len(requests)), False
            except Exception as error:  # noqa: BLE001 - as in `load`
                self._degrade(error)
            else:
                self._follow(tenant, results[-1].generation)
                return results, True
        unnamed = [replace(request, delivery_id=None) for request in requests]
        with self._lock:
            self._owed.setdefault(tenant, 0)  # before the local change, so that a recovery cannot overlook it
        try:
            results = self._call(lambda store: store.transact(tenant, partial(invalidate, requests=unnamed)))
        except StoreBusy:  # the shared store works again, and others use it
            return self._owe(tenant, len(requests)), False
        with self._lock:
            if tenant in self._owed:
                self._owed[tenant] = max(self._owed[tenant], results[-1].generation)
        return results, False

    def _follow(self, tenant: str, generation: int) -> None:
        """Have the local store follow an invalidation that the shared store took, where this process has left it."""
        with self._lock:
            known = self._known.get(tenant, Entry())
            if known.generation < generation:  # a local store that is made from now on begins with it
                self._known[tenant] = replace(known, generation=generation)
            local = self._local
        if local is not None:
            local.transact(tenant, partial(invalidate, requests=[Invalidation()], at_least=generation))

    def _owe(self, tenant: str, count: int) -> tuple[Invalidated, ...]:
        known = self._known.get(tenant, Entry())
        with self._lock:
            generation = max(self._owed.get(tenant, 0), known.generation) + count
            self._owed[tenant] = generation
        self.touch(tenant)
        return tuple(Invalidated(generation) for _ in range(count))

    def touch(self, tenant: str) -> None:
        """Change the version word."""
        self._call(lambda store: store.touch(tenant))

    # -- failure and recovery ---------------------------------------------------------------------------------------

    def _call(self, use: Callable[[Store], T]) -> T:
        local = self._local
        if local is None:
            try:
                return use(self._shared)
            except StoreBusy:
                raise
            except StoreError as error:
                local = self._degrade(error)
            except ExternalOMSError:  # the transition refused, as it may
                raise
            except Exception as error:  # noqa: BLE001 - as in `load`
                local = self._degrade(error)
        return use(local)

    def _degrade(self, error: Exception) -> MemoryStore:
        """Switch to the local store, with what is known; return it."""
        with self._lock:
            if self._local is not None:
                return self._local
            self._retries, self._words, self._is_readable = 0, {}, True
            self._retry_at = self._clock.monotonic() + FIRST_RETRY_SECONDS * (1 + self._random())
            self._problem = str(error) if isinstance(error, StoreError) else f"unexpected {type(error).__name__}"
            entries = {
                tenant: replace(entry, lease=None, generation=max(entry.generation, self._owed.get(tenant, 0)))
                for tenant, entry in self._known.copy().items()
            }
            local = self._local = MemoryStore(
                clock=self._clock,
                history_rows=self._history_rows,
                entries=entries,
                holder=f"{self._shared.holder}/local",
            )
        logger.warning(
            "the shared store cannot be used; this process works alone until it can: %s",
            self._problem,
            exc_info=None if isinstance(error, StoreError) else error,
        )
        self._touch_all(self._shared)
        return local

    def _touch_all(self, store: Store) -> None:
        for tenant in self._known.copy():
            try:
                store.touch(tenant)
            except Exception:  # noqa: BLE001 - nobody can read its version words either
                return

    def poll(self) -> Collection[str]:
        """Return the tenants that changed; tries a failed store again, and repeats what is owed."""
        local = self._local
        if local is not None:
            now = self._clock.monotonic()
            is_due = now >= self._retry_at
            followed = self._follow_others(local) if is_due or self._is_readable else ()
            if not is_due:
                return followed
            try:
                self._shared.poll()
                self._probe()
            except Exception:  # noqa: BLE001 - as in `load`
                self._retries += 1
                pause = min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2.0 ** min(self._retries, 10))
                self._retry_at = now + pause * (1 + self._random())
                return followed
            self._recover(local)
            return tuple(self._known)
        try:
            changed = self._shared.poll()
        except StoreBusy:
            changed = ()
        except Exception as error:  # noqa: BLE001 - as in `load`
            self._degrade(error)
            return tuple(self._known)
        return (*changed, *self._repay()) if self._owed else changed

    def _follow_others(self, local: MemoryStore) -> Collection[str]:
        """Take over the invalidations of other processes while this one works alone; return the tenants concerned.

        A store that this process cannot write, as when the disk is full, may still be read, and written by others.
        """
        followed: list[str] = []
        for tenant, known in self._known.copy().items():
            try:
                versions, place = self._shared.version_ref(tenant)
                word = versions[place]
                if self._words.get(tenant) == word:
                    continue
                generation = self._shared.load(tenant).generation
            except Exception:  # noqa: BLE001 - as in `load`
                self._is_readable = False  # until the store is tried again
                return followed
            self._words[tenant] = word
            if generation > known.generation and self._local is local:
                self._follow(tenant, generation)
                followed.append(tenant)
        self._is_readable = True
        return followed

    def _probe(self) -> None:
        """Write an entry as it is: a store that can be read may refuse to be written, as when its disk is full.

        Without that, such a store would be taken back into use and given up again all the time.
        """
        for tenant in tuple(self._known)[:1]:
            self._shared.transact(tenant, _rewrite)

    def _recover(self, local: MemoryStore) -> None:
        """Return to the shared store. Until what is owed is repaid, `load` verifies nothing of those tenants."""
        with self._lock:
            for tenant, generation in self._owed.items():  # an invalidation may be about to say what it has raised
                self._owed[tenant] = max(generation, local.load(tenant).generation)
            self._local, problem, self._problem = None, self._problem, ""
        for store in (local, self._shared):
            self._touch_all(store)
        self._repay()
        for event in reversed(local.history(limit=self._history_rows)):
            self.append(event)
        if self._problem:  # it failed again meanwhile
            return
        logger.warning("the shared store works again; it failed with: %s", problem)

    def _repay(self) -> Collection[str]:
        """Repeat the owed invalidations to the shared store; return the tenants whose invalidation it took."""
        repaid = []
        for tenant, generation in self._owed.copy().items():
            event = Event(
                at=datetime.fromtimestamp(self._clock.wall(), UTC),
                tenant=tenant,
                cause=Cause.INVALIDATED,
                detail="repeated: the store had not taken it, or had lost it",
            )
            repeat = partial(invalidate, requests=[Invalidation(event)], at_least=generation + 1)
            try:
                self._shared.transact(tenant, repeat)
            except StoreBusy:  # the next poll tries again
                break
            except Exception as error:  # noqa: BLE001 - as in `load`
                self._degrade(error)
                break
            with self._lock:
                if self._owed.get(tenant) == generation:
                    del self._owed[tenant]
            self.touch(tenant)
            repaid.append(tenant)
        return repaid

    def attach(self, wake: Callable[[], None]) -> None:
        """Have `wake` called when `poll` has something before its time."""
        self._shared.attach(wake)

    # -- for people -------------------------------------------------------------------------------------------------

    def append(self, event: Event) -> None:
        """Add a history row."""
        self._unless_busy(lambda store: store.append(event), None)

    def history(self, *, tenant: str | None = None, limit: int = 100, before: int | None = None) -> Sequence[Event]:
        """Return rows of history; while the shared store fails, those that this process wrote since."""
        empty: Sequence[Event] = ()
        return self._unless_busy(lambda store: store.history(tenant=tenant, limit=limit, before=before), empty)

    def report(self, members: Sequence[Member]) -> None:
        """Store the heartbeats of this process."""
        self._unless_busy(lambda store: store.report(members), None)

    def members(self, tenant: str | None = None) -> Sequence[Member]:
        """Return the heartbeats of all processes; while the shared store fails, those of this process."""
        nobody: Sequence[Member] = ()
        return self._unless_busy(lambda store: store.members(tenant), nobody)

    def _unless_busy(self, use: Callable[[Store], T], otherwise: T) -> T:
        try:
            return self._call(use)
        except StoreBusy as error:
            logger.warning("the store is in use by others for too long; a history row or heartbeat is lost: %s", error)
            return otherwise

    def health(self) -> Health:
        """Return whether the shared store is in use."""
        problem = self._problem
        if problem:
            return Health(ok=False, problem=f"this process works alone, because the shared store fails: {problem}")
        return self._shared.health()

    # -- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads of the shared store."""
        self._shared.start()

    def after_fork(self) -> None:
        """Make a new lock in a forked child. It owes what the parent owes: a repetition more does no harm."""
        self._lock = threading.Lock()
        self._shared.after_fork()
        if self._local is not None:
            self._local.after_fork(f"{self._shared.holder}/local")

    def close(self) -> None:
        """End the threads and handles of the shared store."""
        if self._owned:
            self._shared.close()


def _has_lost_value(entry: Entry, known: Entry) -> bool:
    """Return whether the store holds no value, or one that was read before the one that this process knows."""
    if known.snapshot is None or entry.snapshot is None:
        return known.snapshot is not None
    return entry.snapshot.read_at + LOST_SECONDS < known.snapshot.read_at


def _rewrite(entry: Entry, moment: Moment) -> Change[None]:  # noqa: ARG001 - the form of a transition
    return Change(replace(entry), None)  # another object, so that it is stored
