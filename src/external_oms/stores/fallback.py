"""Degraded operation: while the shared store fails, a store in memory serves this process alone.

What must survive an outage of the store is the invalidations. So an invalidation that the shared store could not take
is *owed*: it takes effect in this process at once, and is repeated to the shared store when that works again. Nothing
is merged: values that were read alone are read once more.

A shared store may also lose data: a Redis that restarted without persistence, a file that was replaced. A process that
knows better raises the generation again, because an invalidation may be lost too, and stores the value that it knows
as a stale one, because that is better than none while the API is down.
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
from external_oms.codec import MAX_COUNTER
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

LOG_SECONDS = 60.0
"""The least time between two log lines about lost entries: a flush loses those of all tenants."""

T = TypeVar("T")

_EMPTY = Entry()


class _Known:
    """What this process knows of each tenant, and what it owes to the shared store.

    Attributes:
        entries: The last entry that the shared store returned. Its generation and its token never fall.
        owed: The generation above which the store is to be raised; 0 where the store has lost data and nothing else
            is owed: then it is raised only if no other process has done that before. As long as a tenant is in here,
            every entry of the store counts as unverified.
    """

    def __init__(self) -> None:
        self.after_fork()
        self.entries: dict[str, Entry] = {}
        self.owed: dict[str, int] = {}

    def after_fork(self) -> None:
        """Make a new lock."""
        self._lock = threading.Lock()

    def get(self, tenant: str) -> Entry:
        """Return the last entry."""
        return self.entries.get(tenant, _EMPTY)

    def owe(self, tenant: str, generation: int) -> None:
        """Owe a generation that this process serves and the store does not have."""
        with self._lock:
            self.owed[tenant] = max(self.owed.get(tenant, 0), generation)

    def owe_next(self, tenant: str, count: int) -> int:
        """Owe so many generations more than this process knows; return the last one."""
        with self._lock:
            owed = self.owed[tenant] = max(self.owed.get(tenant, 0), self.get(tenant).generation) + count
            return owed

    def settle(self, tenant: str, owed: int) -> None:
        """Owe no more what the store has taken, unless more is owed by now."""
        with self._lock:
            if self.owed.get(tenant) == owed:
                del self.owed[tenant]

    def raise_to(self, tenant: str, generation: int) -> bool:
        """Note a generation that the shared store has; return whether this process did not know it."""
        with self._lock:
            known = self.get(tenant)
            if generation > known.generation:
                self.entries[tenant] = replace(known, generation=generation)
            return generation > known.generation

    def take(self, tenant: str, entry: Entry, seen: Entry) -> tuple[Entry, bool]:
        """Note an entry of the shared store; return the entry to serve, and whether the store has lost data since.

        Args:
            tenant: The tenant.
            entry: The entry.
            seen: What was known before the entry was loaded: only a store that lost data returns less than that.
        """
        with self._lock:
            known = self.get(tenant)
            is_lost = _is_behind(entry, seen)
            is_news = is_lost and tenant not in self.owed
            if is_lost:
                self.owed.setdefault(tenant, 0)
            elif known is not seen and _is_behind(entry, known):  # another thread has loaded a later one
                return known, False
            if tenant in self.owed:
                generation = max(entry.generation, known.generation, self.owed[tenant])
                entry = replace(_completed(entry, known), generation=generation, verified=False)
            self.entries[tenant] = entry
            return entry, is_news

    def unverified(self, tenant: str) -> Entry:
        """Return the last entry, for a store that cannot be asked for a moment."""
        known = self.get(tenant)
        return replace(known, generation=max(known.generation, self.owed.get(tenant, 0)), verified=False)


def _is_behind(entry: Entry, known: Entry) -> bool:
    """Return whether an entry has a lower number than one that was known before, which only a loss explains.

    Numbers that were forged and come to their end are given up: the store will refuse them, and they begin again.
    """
    if max(known.generation, known.token) >= MAX_COUNTER - 1:
        return False
    value, known_value = entry.snapshot, known.snapshot
    return (
        entry.generation < known.generation
        or entry.token < known.token
        or (known_value is not None and (value is None or value.token < known_value.token))
    )


def _completed(entry: Entry, known: Entry) -> Entry:
    """Return an entry with the known value where that is later: a process that knows less changes nothing.

    Where the known token is higher, it fences the lease that was granted since the loss.
    """
    completed = replace(entry, token=known.token, lease=None) if known.token > entry.token else entry
    stored, better, failure = entry.snapshot, known.snapshot, known.failure
    if better is None or (stored is not None and stored.token >= better.token):
        return completed
    if stored is not None and stored.read_at >= better.read_at:  # the tokens began again
        return replace(completed, snapshot=replace(stored, token=better.token))
    if entry.failure is not None or (failure is not None and failure.token < entry.token):
        failure = entry.failure
    stale_since = known.stale_since
    if stale_since is None and entry.stale_since is not None and entry.stale_since > better.read_at:
        stale_since = entry.stale_since
    return replace(completed, snapshot=better, failure=failure, stale_since=stale_since)


def _repair(entry: Entry, moment: Moment, *, known: Entry, owed: int, event: Event) -> Change[int]:
    """Raise the generation above everything that is known and owed; return what it is now."""
    if not owed and not _is_behind(entry, known):  # another process has raised it
        return Change(entry, entry.generation)
    at_least = max(owed, known.generation) + 1
    raised = invalidate(_completed(entry, known), moment, [Invalidation(event)], at_least=at_least)
    return Change(raised.entry, raised.entry.generation, raised.events)


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
        self._known = _Known()
        self._lock = threading.Lock()  # guards the change from one store to the other
        self._local: MemoryStore | None = None
        self._problem = ""
        self._is_readable = True
        self._retry_at = 0.0
        self._retries = 0
        self._loss_logged_at = float("-inf")
        self._wake: Callable[[], None] = lambda: None

    @property
    def holder(self) -> str:
        """The name of this process in the shared store; in the local store it has a suffix."""
        return (self._local or self._shared).holder

    def is_gone(self, holder: str) -> bool:
        """Return whether the process of that name is known to have ended."""
        return (self._local or self._shared).is_gone(holder)

    def is_own(self, writer: str) -> bool:
        """Return whether this process wrote under that name, to either store."""
        return writer.startswith(self._shared.holder)

    # -- entries ----------------------------------------------------------------------------------------------------

    def version_ref(self, tenant: str) -> tuple[Sequence[int], int]:
        """Return where the version word of a tenant stands."""
        try:
            return (self._local or self._shared).version_ref(tenant)
        except StoreBusy:  # a place of its own, so that the next look asks again
            return [0], 0
        except Exception as error:  # noqa: BLE001 - a store must not fail an evaluation, whatever it raises
            return self._degrade(error).version_ref(tenant)

    def load(self, tenant: str) -> Entry:
        """Return the entry; not verified where the shared store does not have what this process knows."""
        local = self._local
        if local is not None:
            self._known.entries.setdefault(tenant, _EMPTY)
            return local.load(tenant)
        seen = self._known.get(tenant)
        try:
            entry, is_lost = self._known.take(tenant, self._shared.load(tenant), seen)
        except StoreBusy:
            return self._known.unverified(tenant)
        except Exception as error:  # noqa: BLE001 - as in `version_ref`
            self._known.entries.setdefault(tenant, _EMPTY)
            return self._degrade(error).load(tenant)
        if is_lost:
            self._report_loss(tenant)
        return entry

    def transact(self, tenant: str, transition: Transition[T], *, delivery_ids: Sequence[str] = ()) -> T:
        """Apply a transition, in the shared store or in the local one."""
        return self._call(lambda store: store.transact(tenant, transition, delivery_ids=delivery_ids))

    def invalidate(self, tenant: str, requests: Sequence[Invalidation]) -> tuple[tuple[Invalidated, ...], bool]:
        """Invalidate, and return the results and whether the shared store has taken the invalidation.

        Where it has not, this process serves nothing read before as fresh all the same, and repeats the invalidation
        to the shared store. Delivery ids are not remembered then, so that a sender that repeats is heard.
        """
        local = self._local
        if local is None:
            ids = [request.delivery_id for request in requests if request.delivery_id is not None]
            known = self._known.get(tenant).generation
            transition = partial(invalidate, requests=requests, at_least=known + 1 if known < MAX_COUNTER - 1 else 0)
            try:
                results = self._shared.transact(tenant, transition, delivery_ids=ids)
            except StoreBusy:
                results = (Invalidated(self._known.owe_next(tenant, len(requests))),) * len(requests)
                self.touch(tenant)
                return results, False
            except Exception as error:  # noqa: BLE001 - as in `version_ref`
                local = self._degrade(error)
            else:
                generation = results[-1].generation
                self._known.raise_to(tenant, generation)  # a local store that is made from now on begins with it
                if self._local is not None:
                    self._invalidate_alone(self._local, tenant, [Invalidation()], shared=generation)
                return results, True

        unnamed = [replace(request, delivery_id=None) for request in requests]
        results = self._invalidate_alone(local, tenant, unnamed)
        self.touch(tenant)  # the shared store may serve again by now
        return results, False

    def _invalidate_alone(
        self, local: MemoryStore, tenant: str, requests: Sequence[Invalidation], *, shared: int | None = None
    ) -> tuple[Invalidated, ...]:
        """Invalidate in the local store, and owe what the shared store does not have.

        Args:
            local: The local store; it may have been given up a moment ago.
            tenant: The tenant.
            requests: What is asked for.
            shared: The generation that the shared store has given the invalidation; None where it has not taken it.
        """

        def owing(entry: Entry, moment: Moment) -> Change[tuple[Invalidated, ...]]:
            at_least = self._known.get(tenant).generation + 1 if shared is None else shared
            change = invalidate(entry, moment, requests, at_least=at_least)
            if shared is None or change.entry.generation > shared:
                # before it can be loaded: then `load` verifies no older value, whichever store serves next
                self._known.owe(tenant, change.entry.generation)
            return change

        return local.transact(tenant, owing)

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
            except Exception as error:  # noqa: BLE001 - as in `version_ref`
                local = self._degrade(error)
        return use(local)

    def _degrade(self, error: Exception) -> MemoryStore:
        """Switch to the local store, with what is known; return it."""
        with self._lock:
            if self._local is not None:
                return self._local
            self._retries, self._is_readable = 0, True
            self._retry_at = self._clock.monotonic() + FIRST_RETRY_SECONDS * (1 + self._random())
            self._problem = str(error) if isinstance(error, StoreError) else f"unexpected {type(error).__name__}"
            local = self._local = MemoryStore(
                clock=self._clock,
                history_rows=self._history_rows,
                entries={tenant: self._alone(tenant) for tenant in self._known.entries.copy()},
                holder=f"{self._shared.holder}/local",
            )
        logger.warning(
            "the shared store cannot be used; this process works alone until it can: %s",
            self._problem,
            exc_info=None if isinstance(error, StoreError) else error,
        )
        self._touch_all(self._shared)
        return local

    def _alone(self, tenant: str) -> Entry:
        """Return what a local store begins with: no lease of others, and no value as fresh that was not verified."""
        is_verified = self._known.get(tenant).verified
        entry = replace(self._known.unverified(tenant), lease=None, verified=True)
        if is_verified or entry.snapshot is None:
            return entry
        age_seconds = max(self._clock.monotonic() - entry.snapshot.read_at, 0.001)
        lifetime_seconds = min(entry.snapshot.lifetime_seconds, age_seconds)
        return replace(entry, snapshot=replace(entry.snapshot, lifetime_seconds=lifetime_seconds))

    def _touch_all(self, store: Store) -> None:
        for tenant in self._known.entries.copy():
            try:
                store.touch(tenant)
            except Exception:  # noqa: BLE001 - then its version words cannot be read either
                return

    def poll(self) -> Collection[str]:
        """Return the tenants that changed; tries a failed store again, and repeats what is owed."""
        if self._local is not None:
            return self._poll_alone(self._local)
        try:
            changed = self._shared.poll()
        except StoreBusy:
            changed = ()
        except Exception as error:  # noqa: BLE001 - as in `version_ref`
            self._degrade(error)
            return tuple(self._known.entries)
        return (*changed, *self._repay()) if self._known.owed else changed

    def _poll_alone(self, local: MemoryStore) -> Collection[str]:
        is_due = self._clock.monotonic() >= self._retry_at
        followed = self._follow_others(local) if is_due or self._is_readable else []
        if not is_due:
            return followed
        try:
            self._probe()
        except Exception:  # noqa: BLE001 - as in `version_ref`
            self._retries += 1
            pause = min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2.0 ** min(self._retries, 10))
            self._retry_at = self._clock.monotonic() + pause * (1 + self._random())
            return followed
        self._recover(local)
        return tuple(self._known.entries)

    def _follow_others(self, local: MemoryStore) -> list[str]:
        """Take over the invalidations of other processes while this one works alone; return the tenants concerned.

        A store that this process cannot write, as when the disk is full, may still be read, and written by others.
        """
        followed: list[str] = []
        try:
            changed = self._shared.poll()
            tenants = changed if self._is_readable else tuple(self._known.entries)
            for tenant in tenants:
                generation = self._shared.load(tenant).generation
                if self._known.raise_to(tenant, generation):
                    self._invalidate_alone(local, tenant, [Invalidation()], shared=generation)
                    followed.append(tenant)
        except Exception:  # noqa: BLE001 - as in `version_ref`
            self._is_readable = False  # until the store is tried again
        else:
            self._is_readable = True
        return followed

    def _probe(self) -> None:
        """Write an entry as it is: a store that can be read may refuse to be written, as when its disk is full.

        Without that, such a store would be taken back into use and given up again all the time.

        Raises:
            Exception: The store cannot be used.
        """
        if not self._is_readable:
            raise StoreError("the shared store cannot be read")
        for tenant in tuple(self._known.entries)[:1]:
            self._shared.transact(tenant, _rewrite)

    def _recover(self, local: MemoryStore) -> None:
        """Use the shared store again. Until `_repay`, `load` verifies no entry whose invalidation is owed."""
        with self._lock:
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
        """Repeat to the shared store what is owed; return the tenants whose invalidation it took."""
        repaid = []
        for tenant, owed in self._known.owed.copy().items():
            event = Event(
                at=datetime.fromtimestamp(self._clock.wall(), UTC),
                tenant=tenant,
                cause=Cause.INVALIDATED if owed else Cause.STORE,
                detail="repeated: the store had not taken it" if owed else "the store has lost data; invalidated again",
            )
            repair = partial(_repair, known=self._known.get(tenant), owed=owed, event=event)
            try:
                generation = self._shared.transact(tenant, repair)
            except StoreBusy:  # the next poll tries again
                break
            except Exception as error:  # noqa: BLE001 - as in `version_ref`
                self._degrade(error)
                break
            self._known.raise_to(tenant, generation)
            self._known.settle(tenant, owed)
            self.touch(tenant)
            repaid.append(tenant)
        return repaid

    def _report_loss(self, tenant: str) -> None:
        now = self._clock.monotonic()
        if now - self._loss_logged_at > LOG_SECONDS:
            self._loss_logged_at = now
            logger.warning(
                "the shared store has lost data of tenant %s, and perhaps of others: it was flushed, restored or "
                "restarted without its data; the tenants concerned count as invalidated",
                tenant,
            )
        self._wake()  # the poll repairs it

    def attach(self, wake: Callable[[], None]) -> None:
        """Have `wake` called when `poll` has something before its time."""
        self._wake = wake
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
        none: Sequence[Member] = ()
        return self._unless_busy(lambda store: store.members(tenant), none)

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
        self._known.after_fork()
        self._shared.after_fork()
        if self._local is not None:
            self._local.after_fork(f"{self._shared.holder}/local")

    def close(self) -> None:
        """End the threads and handles of the shared store."""
        if self._owned:
            self._shared.close()


def _rewrite(entry: Entry, moment: Moment) -> Change[None]:  # noqa: ARG001 - the form of a transition
    return Change(replace(entry), None)  # another object, so that it is stored
