"""The store of one process: the contract in its plainest form, gone when the process ends."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from cachetools import TTLCache

from external_oms.clock import SYSTEM_CLOCK, Clock
from external_oms.config import Failure, Snapshot
from external_oms.freshness import BUCKET_BURST, bucket_take
from external_oms.stores.base import Acquired, Busy, Event, Health, Lease, Member, Metered, Record

__all__ = ["MemoryStore"]

DELIVERY_IDS = 100_000
"""Delivery ids remembered at once: at the webhook's metered pace, far more than a tolerance holds."""

MEMBER_SECONDS = 60.0
"""How long a member that reports no more is remembered, as the contract has it."""


@dataclass(slots=True)
class _Cell:
    """What is kept of one tenant; changed only under the store's lock."""

    slot: int
    record: Record = field(default_factory=Record)
    lease_number: int | None = None
    lease_until: float = 0.0
    bucket_level: float = float(BUCKET_BURST)
    bucket_at: float = 0.0


class MemoryStore:
    """Records in this process's memory.

    Args:
        clock: What tells the time.
        history_rows: How many rows of history are kept, >= 1.
        history_seconds: And for how long, in seconds, > 0.
        records: Records to start from: what was last known of a store that is out of order.
    """

    kind = "memory"
    poll_seconds: float | None = None
    spread_seconds = 0.0

    def __init__(
        self,
        *,
        clock: Clock = SYSTEM_CLOCK,
        history_rows: int = 10_000,
        history_seconds: float = 30 * 86_400.0,
        records: Iterable[tuple[str, Record]] = (),
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._words: list[int] = []
        self._cells: dict[str, _Cell] = {}
        self._seen: TTLCache[tuple[str, str], float] = TTLCache(DELIVERY_IDS, history_seconds, timer=clock.monotonic)
        self._history: deque[Event] = deque(maxlen=history_rows)
        self._history_seconds = history_seconds
        self._last_id = 0
        self._members: dict[tuple[str, str], tuple[float, Member]] = {}
        for tenant, record in records:
            self._cell(tenant).record = record

    def _cell(self, tenant: str) -> _Cell:
        cell = self._cells.get(tenant)
        if cell is None:
            cell = self._cells[tenant] = _Cell(slot=len(self._words))
            self._words.append(0)
        return cell

    def _change(self, cell: _Cell, record: Record) -> None:
        cell.record = record
        self._words[cell.slot] += 1
        self._changed.notify_all()

    def watch(self, tenant: str) -> tuple[Sequence[int], int]:
        """The tenant's word."""
        with self._lock:
            return self._words, self._cell(tenant).slot

    def load(self, tenant: str) -> Record:
        """The record as it stands."""
        with self._lock:
            return self._cell(tenant).record

    def invalidate(self, tenant: str) -> int:
        """Raise the generation; returns it."""
        with self._lock:
            return self._raise(self._cell(tenant))

    def _raise(self, cell: _Cell) -> int:
        raised = cell.record.generation + 1
        self._change(cell, replace(cell.record, generation=raised, invalidated_at=self._clock.monotonic()))
        return raised

    def deliver(self, tenant: str, delivery_id: str, *, seconds: float) -> int | None:
        """Raise the generation, unless this delivery id was seen within so many seconds."""
        with self._lock:
            now = self._clock.monotonic()
            until = self._seen.get((tenant, delivery_id))
            if until is not None and now < until:
                return None
            self._seen[tenant, delivery_id] = now + seconds
            return self._raise(self._cell(tenant))

    def acquire(self, tenant: str, *, seconds: float, metered: bool) -> Acquired:
        """Try to get the lease; never waits."""
        with self._lock:
            now = self._clock.monotonic()
            cell = self._cell(tenant)
            if cell.lease_number is not None and now < cell.lease_until:
                return Busy(cell.lease_number, cell.lease_until - now)
            if metered:
                cell.bucket_level, wait_seconds = bucket_take(cell.bucket_level, now - cell.bucket_at)
                cell.bucket_at = now
                if wait_seconds > 0:
                    return Metered(wait_seconds)
            number = cell.record.reads + 1
            cell.record = replace(cell.record, reads=number)
            cell.lease_number, cell.lease_until = number, now + seconds
            return Lease(tenant, number, cell.record)

    def put(self, lease: Lease, snapshot: Snapshot) -> bool:
        """Store what the read gave and end the lease, unless it is fenced off."""
        with self._lock:
            cell = self._ended(lease)
            if cell is None or cell.record.generation != lease.record.generation:
                return False
            self._change(cell, replace(cell.record, snapshot=snapshot, failure=None))
            return True

    def fail(self, lease: Lease, failure: Failure) -> bool:
        """Store that the read failed and end the lease, unless it is fenced off."""
        with self._lock:
            cell = self._ended(lease)
            if cell is None or cell.record.generation != lease.record.generation:
                return False
            self._change(cell, replace(cell.record, failure=failure))
            return True

    def release(self, lease: Lease) -> None:
        """End the lease without a result."""
        with self._lock:
            cell = self._ended(lease)
            if cell is not None:
                self._change(cell, cell.record)  # whoever waits for the lease looks again

    def _ended(self, lease: Lease) -> _Cell | None:
        """The lease's cell with the lease ended; None where a later lease was given meanwhile."""
        cell = self._cell(lease.tenant)
        if cell.record.reads != lease.number:
            return None
        cell.lease_number = None
        return cell

    def wait(self, tenant: str, word: int, seconds: float) -> None:
        """Return when the tenant's word has changed, or after so many seconds."""
        with self._changed:
            slot = self._cell(tenant).slot
            self._changed.wait_for(lambda: self._words[slot] != word, seconds)

    def changed(self) -> Sequence[str]:
        """Nothing: nobody else can change anything."""
        return ()

    def attach(self, wake: Callable[[], None]) -> None:
        """Nothing to do: nobody else can change anything."""

    def append(self, event: Event) -> None:
        """Add a row to the history."""
        with self._lock:
            self._last_id += 1
            self._history.append(replace(event, id=self._last_id))
            oldest = self._clock.wall() - self._history_seconds
            while self._history and self._history[0].at.timestamp() < oldest:
                self._history.popleft()

    def history(self, *, tenant: str | None = None, limit: int = 100, before: int | None = None) -> Sequence[Event]:
        """Rows of history, newest first."""
        with self._lock:
            rows = (
                event
                for event in reversed(self._history)
                if (tenant is None or event.tenant == tenant) and (before is None or event.id < before)
            )
            return tuple(islice(rows, limit))

    def report(self, members: Sequence[Member]) -> None:
        """Remember what this process serves."""
        with self._lock:
            now = self._clock.monotonic()
            for member in members:
                self._members[member.name, member.tenant] = (now, member)

    def members(self, tenant: str | None = None) -> Sequence[Member]:
        """What this process serves."""
        with self._lock:
            now = self._clock.monotonic()
            return tuple(
                replace(member, seen_seconds=now - at)
                for at, member in self._members.values()
                if (tenant is None or member.tenant == tenant) and now - at < MEMBER_SECONDS
            )

    def health(self) -> Health:
        """Always in order."""
        return Health()

    def after_fork(self) -> None:
        """New locks; leases of the parent's reads are not the child's."""
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._members.clear()
        for cell in self._cells.values():
            cell.lease_number = None

    def close(self) -> None:
        """Nothing to end."""
