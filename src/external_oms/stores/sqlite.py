"""The store of one host: an invalidation in one process is seen by the next evaluation in every other.

Three parts. The *page* holds one word per tenant in shared memory: all that an evaluation reads. The *state file* holds
everything else, in SQLite. Where the file cannot be used, *memory* takes over with what was last known, and hands back
what it learned once the file can be used again.

What may be lost: nothing that was answered, by the death of any process at any moment. A power cut may take the last
moments (see `sqlite_file.connect`); values are never fresh after a boot, so a lost invalidation cannot be overlooked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from external_oms.clock import SYSTEM_CLOCK, Clock
from external_oms.config import Failure, Snapshot
from external_oms.stores import sqlite_journal, sqlite_rows
from external_oms.stores.base import Acquired, Event, Health, Lease, Member, Record
from external_oms.stores.host import boot_id, own_mountinfo
from external_oms.stores.memory import MemoryStore
from external_oms.stores.sqlite_backing import Backing
from external_oms.stores.sqlite_file import Connect, connect
from external_oms.stores.sqlite_journal import Caps

__all__ = ["SqliteStore"]

FIRST_PAUSE_SECONDS = 0.002
"""How soon `wait` looks at the word again: a read takes tens of milliseconds at least."""

LAST_PAUSE_SECONDS = 0.010
"""How often it looks once it has looked a few times."""


class SqliteStore:
    """Records in a file that all processes of this host share; no server, nothing to set up.

    Args:
        path: The state file, absolute; made with mode 0600, its directory with 0700, where they are missing.
        clock: What tells the time; its monotonic clock must be the host's.
        history_rows: How many rows of history are kept, >= 1.
        history_seconds: And for how long, in seconds, > 0.
        boot: A text that is another one after each boot; the host's own where None.
        mountinfo: The text of `/proc/self/mountinfo`; the host's own where None.
        connect: Opens connections to the database.
        sleep: Waits, given seconds.

    Raises:
        StoreError: The place is on a network file system, or belongs to somebody else, or is no place for a file.
    """

    kind: str = "sqlite"
    poll_seconds: float | None = 0.025
    """25 ms: a value that changed elsewhere is announced before a person could notice; a poll takes microseconds."""

    spread_seconds = 0.0
    """The processes of one host are few, and one that finds the lease taken waits on the page: nothing to spread."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Clock = SYSTEM_CLOCK,
        history_rows: int = 10_000,
        history_seconds: float = 30 * 86_400.0,
        boot: str | None = None,
        mountinfo: str | None = None,
        connect: Connect = connect,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._clock = clock
        self._caps = Caps(history_rows, history_seconds)
        self._sleep = sleep
        self._backing = Backing(
            path,
            clock=clock,
            caps=self._caps,
            boot=boot_id() if boot is None else boot,
            mountinfo=own_mountinfo() if mountinfo is None else mountinfo,
            connect=connect,
        )

    def watch(self, tenant: str) -> tuple[Sequence[int], int]:
        """The tenant's word, in shared memory."""
        page = self._backing.page
        return page.words, page.slot(tenant)

    def load(self, tenant: str) -> Record:
        """The record as it stands; where it cannot be read at this moment, the last known one, fresh no more."""
        return self._backing.load(tenant)

    def invalidate(self, tenant: str) -> int:
        """Raise the generation; returns it."""
        return self._backing.change(
            tenant,
            lambda on: sqlite_rows.invalidate(on, tenant, self._backing.writer),
            lambda memory: memory.invalidate(tenant),
        )

    def deliver(self, tenant: str, delivery_id: str, *, seconds: float) -> int | None:
        """Raise the generation, unless this delivery id was seen within so many seconds."""
        return self._backing.change(
            tenant,
            lambda on: sqlite_rows.deliver(on, tenant, delivery_id, seconds, self._backing.writer),
            lambda memory: memory.deliver(tenant, delivery_id, seconds=seconds),
        )

    def acquire(self, tenant: str, *, seconds: float, metered: bool) -> Acquired:
        """Try to get the lease; one whose process has died is free at once."""
        return self._backing.change(
            tenant,
            lambda on: sqlite_rows.acquire(on, tenant, seconds, metered, self._backing.writer),
            lambda memory: memory.acquire(tenant, seconds=seconds, metered=metered),
        )

    def put(self, lease: Lease, snapshot: Snapshot) -> bool:
        """Store what the read gave and end the lease, unless it is fenced off."""
        return self._backing.change(
            lease.tenant,
            lambda on: sqlite_rows.end(on, lease, snapshot, self._backing.writer),
            lambda memory: memory.put(lease, snapshot),
        )

    def fail(self, lease: Lease, failure: Failure) -> bool:
        """Store that the read failed and end the lease, unless it is fenced off."""
        return self._backing.change(
            lease.tenant,
            lambda on: sqlite_rows.end(on, lease, failure, self._backing.writer),
            lambda memory: memory.fail(lease, failure),
        )

    def release(self, lease: Lease) -> None:
        """End the lease without a result."""

        def in_memory(memory: MemoryStore) -> bool:
            memory.release(lease)
            return False

        self._backing.change(lease.tenant, lambda on: sqlite_rows.end(on, lease, None, self._backing.writer), in_memory)

    def wait(self, tenant: str, word: int, seconds: float) -> None:
        """Return when the tenant's word has changed, or after so many seconds."""
        words, slot = self.watch(tenant)
        pause, left = FIRST_PAUSE_SECONDS, seconds
        while words[slot] == word and left > 0:
            self._sleep(min(pause, left))
            left -= pause
            pause = min(2 * pause, LAST_PAUSE_SECONDS)

    def changed(self) -> Sequence[str]:
        """The tenants that another process changed since the last call; also looks after the file."""
        return self._backing.changed()

    def attach(self, wake: Callable[[], None]) -> None:
        """Nothing to do: the poll is as quick as a wake would be."""

    def append(self, event: Event) -> None:
        """Add a row to the history."""
        wall = self._clock.wall()
        self._backing.write(
            lambda on: sqlite_journal.append(on, event, self._caps, wall), lambda memory: memory.append(event)
        )

    def history(self, *, tenant: str | None = None, limit: int = 100, before: int | None = None) -> Sequence[Event]:
        """Rows of history, newest first."""
        wall = self._clock.wall()
        return self._backing.read(
            lambda on: sqlite_journal.history(on, self._caps, wall, tenant, limit, before),
            lambda memory: memory.history(tenant=tenant, limit=limit, before=before),
        )

    def report(self, members: Sequence[Member]) -> None:
        """Tell the others what this process serves."""
        now = self._clock.monotonic()
        self._backing.write(lambda on: sqlite_journal.report(on, members, now), lambda memory: memory.report(members))

    def members(self, tenant: str | None = None) -> Sequence[Member]:
        """What every living process of the host serves."""
        now = self._clock.monotonic()
        return self._backing.read(
            lambda on: sqlite_journal.members(on, tenant, now), lambda memory: memory.members(tenant)
        )

    def health(self) -> Health:
        """Whether the file is in use."""
        return self._backing.health

    def after_fork(self) -> None:
        """Begin anew in a child; where Python made the fork, this has been done."""
        self._backing.after_fork()

    def close(self) -> None:
        """Close every connection."""
        self._backing.close()
