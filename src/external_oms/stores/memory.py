"""The store of one process: entries in memory, gone when the process ends."""

from __future__ import annotations

import itertools
import secrets
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TypeVar

from cachetools import TTLCache

from external_oms.clock import SYSTEM_CLOCK, Clock
from external_oms.entry import Entry, Invalidated, Invalidation, Moment, Transition, invalidate
from external_oms.records import MEMBER_SECONDS, Event, Member
from external_oms.stores.base import DELIVERY_ID_SECONDS, Health

__all__ = ["MemoryStore"]

DELIVERY_IDS = 100_000
"""Delivery ids remembered at once: at the rate limit of the webhook, more than `DELIVERY_ID_SECONDS` of one tenant's
replays within the tolerance."""

MEMBERS = 10_000
"""Heartbeats remembered at once: one per tenant of this process."""

T = TypeVar("T")


class MemoryStore:
    """Entries in the memory of this process.

    Args:
        clock: Tells the time.
        history_rows: How many history rows are kept, >= 1.
        history_seconds: For how long a history row is kept, in seconds, > 0.
        entries: Entries to start from: the last known ones of a store that is unavailable.
        holder: The name of this process for leases; a random text where None.
    """

    kind: str = "memory"
    poll_seconds: float | None = None
    spread_seconds = 0.0

    def __init__(
        self,
        *,
        clock: Clock = SYSTEM_CLOCK,
        history_rows: int = 10_000,
        history_seconds: float = 30 * 86_400.0,
        entries: Mapping[str, Entry] | None = None,
        holder: str | None = None,
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._holder = secrets.token_hex(8) if holder is None else holder
        self._versions: list[int] = []
        self._index: dict[str, int] = {}
        self._entries: dict[str, Entry] = dict(entries or {})
        self._delivery_ids: TTLCache[tuple[str, str], bool] = TTLCache(
            DELIVERY_IDS, DELIVERY_ID_SECONDS, timer=clock.monotonic
        )
        self._members: TTLCache[tuple[str, str], tuple[float, Member]] = TTLCache(
            MEMBERS, MEMBER_SECONDS, timer=clock.monotonic
        )
        self._history: deque[Event] = deque(maxlen=history_rows)
        self._history_seconds = history_seconds
        self._ids = itertools.count(1)

    @property
    def holder(self) -> str:
        """The name of this process: a random text."""
        return self._holder

    def is_gone(self, holder: str) -> bool:
        """Return whether the holder is another process: the parent of this one, whose reads are not in this process."""
        return holder != self._holder

    def version_ref(self, tenant: str) -> tuple[Sequence[int], int]:
        """Return where the version word of a tenant stands."""
        index = self._index.get(tenant)
        if index is None:
            with self._lock:
                index = self._index_of(tenant)
        return self._versions, index

    def _index_of(self, tenant: str) -> int:
        index = self._index.get(tenant)
        if index is None:
            index = self._index[tenant] = len(self._versions)
            self._versions.append(0)
        return index

    def load(self, tenant: str) -> Entry:
        """Return the entry."""
        with self._lock:
            return self._entries.get(tenant, _EMPTY)

    def transact(self, tenant: str, transition: Transition[T], *, delivery_ids: Sequence[str] = ()) -> T:
        """Apply a transition under the lock of the store."""
        with self._lock:
            entry = self._entries.get(tenant, _EMPTY)
            seen = frozenset(one for one in delivery_ids if (tenant, one) in self._delivery_ids)
            change = transition(entry, Moment(self._clock.monotonic(), seen=seen))
            for claimed in change.claims:
                self._delivery_ids[tenant, claimed] = True
            for event in change.events:
                self._append(event)
            if change.entry is not entry:
                self._entries[tenant] = change.entry
                self._versions[self._index_of(tenant)] += 1
            return change.result

    def invalidate(self, tenant: str, requests: Sequence[Invalidation]) -> tuple[tuple[Invalidated, ...], bool]:
        """Invalidate, and return the results and that the store has taken the invalidation."""
        ids = [request.delivery_id for request in requests if request.delivery_id is not None]
        return self.transact(tenant, partial(invalidate, requests=requests), delivery_ids=ids), True

    def is_own(self, writer: str) -> bool:  # noqa: ARG002 - the form of `Fallback`
        """Return that this process wrote it: no other process writes here, and a forked child inherits the values."""
        return True

    def touch(self, tenant: str) -> None:
        """Change the version word."""
        with self._lock:
            self._versions[self._index_of(tenant)] += 1

    def poll(self) -> Collection[str]:
        """Return nothing: no other process changes the entries."""
        return ()

    def attach(self, wake: Callable[[], None]) -> None:
        """Do nothing: no other process changes the entries."""

    def append(self, event: Event) -> None:
        """Add a history row."""
        with self._lock:
            self._append(event)

    def _append(self, event: Event) -> None:
        self._history.append(replace(event, id=next(self._ids)))
        oldest = self._oldest()
        while self._history and self._history[0].at.timestamp() < oldest:
            self._history.popleft()

    def _oldest(self) -> float:
        return self._clock.wall() - self._history_seconds

    def history(self, *, tenant: str | None = None, limit: int = 100, before: int | None = None) -> Sequence[Event]:
        """Return rows of history, newest first."""
        with self._lock:
            oldest = self._oldest()
            rows = (
                event
                for event in reversed(self._history)
                if (tenant is None or event.tenant == tenant)
                and (before is None or event.id < before)
                and event.at.timestamp() >= oldest
            )
            return tuple(islice(rows, limit))

    def report(self, members: Sequence[Member]) -> None:
        """Store the heartbeats of this process."""
        with self._lock:
            now = self._clock.monotonic()
            for member in members:
                self._members[member.name, member.tenant] = now, member

    def members(self, tenant: str | None = None) -> Sequence[Member]:
        """Return the heartbeats of this process."""
        with self._lock:
            now = self._clock.monotonic()
            self._members.expire()
            return tuple(
                replace(member, seen_seconds=now - at)
                for at, member in self._members.values()
                if tenant is None or member.tenant == tenant
            )

    def health(self) -> Health:
        """Return that the store works."""
        return Health()

    def start(self) -> None:
        """Do nothing: the store has no threads."""

    def after_fork(self, holder: str | None = None) -> None:
        """Make a new lock and take a new name; leases of the parent's reads end with that."""
        self._lock = threading.Lock()
        self._holder = secrets.token_hex(8) if holder is None else holder
        self._members.clear()

    def close(self) -> None:
        """Do nothing: the store has no handles."""


_EMPTY = Entry()
