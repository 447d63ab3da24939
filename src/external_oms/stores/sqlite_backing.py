"""What stands behind the store of a host: the state file, or memory while it cannot be used, and the way from each.

The way there: what this process knows goes on in memory, so that its evaluations, its invalidations and its reads do.
The way back: what happened in memory is brought into the file, and generations rise where either side may have missed
an invalidation, so that nothing newer is overwritten and nothing older is fresh.
"""

from __future__ import annotations

import logging
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from external_oms.clock import Clock
from external_oms.errors import StoreError
from external_oms.stores import sqlite_journal, sqlite_rows
from external_oms.stores.base import Cause, Event, Health, Record
from external_oms.stores.gate import Gate, keep_from_forks
from external_oms.stores.host import this_process
from external_oms.stores.memory import MemoryStore
from external_oms.stores.page import Page
from external_oms.stores.sqlite_file import BeingOpened, Connect, StateFile, check_place, open_state
from external_oms.stores.sqlite_journal import Caps
from external_oms.stores.sqlite_rows import MalformedRow, Outcome, Writer
from external_oms.stores.sqlite_schema import is_damage

__all__ = ["Backing"]

logger = logging.getLogger("external_oms")

ATTEMPTS = 3
"""How often an operation is tried on a file that turns out to be moved or damaged: as it is, anew, and once more."""

RETRY_SECONDS = 1.0
"""The least time between two looks at a file that could not be used."""

OPENING_SECONDS = 2.0
"""How long a reader thread waits for another process that opens the file; that takes milliseconds."""

LOADING_SECONDS = 0.01
"""How long an evaluation waits for a thread of its own process that opens the file."""

T = TypeVar("T")


class Backing:
    """The file, or memory in its place.

    Args:
        path: The state file.
        clock: What tells the time.
        caps: How much history is kept.
        boot: The present boot.
        mountinfo: The text of `/proc/self/mountinfo`.
        connect: Opens connections to the database.

    Attributes:
        page: The words that evaluations look at now.
        health: Whether the file is in use.
        writer: Who this process is to the others.

    Raises:
        StoreError: The place will not do.
    """

    def __init__(self, path: Path, *, clock: Clock, caps: Caps, boot: str, mountinfo: str, connect: Connect) -> None:
        self._path = path
        self._clock = clock
        self._caps = caps
        self._boot = boot
        self._mountinfo = mountinfo
        self._connect = connect
        self.page = Page.private()
        self.health = Health()
        self._file: StateFile | None = None
        self._memory: MemoryStore | None = None
        self._known: dict[str, tuple[int, Record]] = {}
        self._cut_off: dict[str, Record] = {}
        self._identity: bytes | None = None
        self._retry_at = 0.0
        self._told: dict[str, int] = {}
        self._untold: set[str] = set()
        self._begin()
        with suppress(OSError):  # where the directory cannot be made now, memory waits for it
            check_place(path, mountinfo)
        keep_from_forks(self)
        with self._gate.passed():
            self._ready(OPENING_SECONDS)

    def _begin(self) -> None:
        """What belongs to one process: made anew in a child."""
        self._process = os.getpid()
        self._gate = Gate()
        self._lock = threading.Lock()
        self._polling = threading.Lock()
        self.writer = Writer(secrets.token_hex(8), this_process(), self._clock)

    # -- what the store asks for ------------------------------------------------------------------------------------

    def load(self, tenant: str) -> Record:
        """The record as it stands; where it cannot be read at this moment, the last known one, fresh no more."""
        with self._gate.passed():
            memory = self._memory
            if memory is not None:
                return memory.load(tenant)
            file = self._ready(0.0)
            if file is not None:
                try:
                    revision, record = file.read(partial(sqlite_rows.load, tenant=tenant, reader=self.writer.name))
                except (sqlite3.Error, MalformedRow) as error:
                    logger.debug("%s could not be read at this moment: %s", self._path, type(error).__name__)
                else:
                    self._note(tenant, revision, record)
                    return record
            memory = self._memory
            if memory is not None:
                return memory.load(tenant)
            known = self._known.get(tenant, (0, Record()))[1]
            self.page.touch(tenant)  # the next evaluation tries again
            return replace(known, generation=known.generation + 1, invalidated_at=self._clock.monotonic())

    def _note(self, tenant: str, revision: int, record: Record) -> None:
        """Remember the record for a time without the file.

        Two threads may do this in the wrong order; then the word is not the revision, which `_degrade` sees.
        """
        known = self._known.get(tenant)
        if known is None or known[0] <= revision:
            self._known[tenant] = (revision, record)

    def change(
        self,
        tenant: str,
        work: Callable[[sqlite3.Connection], Outcome[T]],
        in_memory: Callable[[MemoryStore], T],
    ) -> T:
        """Change a tenant's record in one transaction, or in memory, and say so by its word."""

        def on_file(file: StateFile) -> T:
            outcome = file.write(work)
            if outcome.after != outcome.before:
                file.page.announce(tenant, outcome.after)
            elif outcome.result is None:  # a duplicate: whoever carried it out may have died before it was announced
                file.page.touch(tenant)
            self._note(tenant, outcome.after, outcome.record)
            if self._told.get(tenant) == outcome.before:  # nobody else came between: nothing to be told
                self._told[tenant] = outcome.after
            return outcome.result

        def meanwhile(memory: MemoryStore) -> T:
            self._cut_off.setdefault(tenant, Record())
            result = in_memory(memory)
            self.page.touch(tenant)
            return result

        return self._do(on_file, meanwhile)

    def write(self, work: Callable[[sqlite3.Connection], T], in_memory: Callable[[MemoryStore], T]) -> T:
        """Write something else."""
        return self._do(lambda file: file.write(work), in_memory)

    def read(self, work: Callable[[sqlite3.Connection], T], in_memory: Callable[[MemoryStore], T]) -> T:
        """Read something else."""
        return self._do(lambda file: file.read(work), in_memory)

    def changed(self) -> Sequence[str]:
        """The tenants that another process changed since the last call; also looks after the file. Never waits."""
        if not self._polling.acquire(blocking=False):
            return ()
        try:
            with self._gate.passed():
                self._poll()
                told, self._untold = self._untold, set()
                return tuple(told)
        finally:
            self._polling.release()

    # -- the way there and back -------------------------------------------------------------------------------------

    def _poll(self) -> None:
        file = self._ready(0.0)
        if file is None:
            return
        try:
            revisions = file.poll(sqlite_rows.revisions) or {}
        except sqlite3.Error as error:
            self._mishap(file, error)
            return
        for tenant, revision in revisions.items():
            if self._told.get(tenant) == revision:
                continue
            self._told[tenant] = revision
            self._untold.add(tenant)
            if file.page.word(tenant) != revision:  # whoever committed it has died since, or is about to write it
                file.page.touch(tenant)

    def _do(self, on_file: Callable[[StateFile], T], in_memory: Callable[[MemoryStore], T]) -> T:
        with self._gate.passed():
            for _ in range(ATTEMPTS):
                file = self._ready(OPENING_SECONDS)
                if file is None:
                    with self._lock:  # so that nothing is done in memory that the return to the file would not see
                        if self._memory is not None:
                            return in_memory(self._memory)
                    continue
                try:
                    result = on_file(file)
                except (sqlite3.Error, MalformedRow) as error:
                    self._mishap(file, error)
                    continue
                if not file.moved():
                    return result
                self._lose(file)  # what was done went down with the old file: do it again
            with self._lock:
                return in_memory(self._memory or self._degrade("it stays damaged, or is replaced again and again"))

    def _mishap(self, file: StateFile, error: Exception) -> None:
        """An operation failed: open the file anew where that may help, work in memory where it will not."""
        if not isinstance(error, sqlite3.Error) or is_damage(error) or file.moved():
            self._lose(file)
            return
        with self._lock:
            if self._file is file:
                self._degrade(_problem(error))

    def _lose(self, file: StateFile) -> None:
        with self._lock:
            if self._file is file:
                self._file = None
        file.close()

    def _ready(self, wait_seconds: float) -> StateFile | None:
        """The file, opened where it is not open, retried where that is due; None where it cannot be used now."""
        file = self._file
        if file is not None and not file.moved():
            return file
        if self._memory is not None and self._clock.monotonic() < self._retry_at:
            return None
        if not self._lock.acquire(timeout=max(wait_seconds, LOADING_SECONDS)):
            return None
        try:
            if self._file is not None and self._file.moved():
                self._file.close()
                self._file = None
            if self._file is None:
                self._open(wait_seconds)
            return self._file
        finally:
            self._lock.release()

    def _open(self, wait_seconds: float) -> None:
        """Open the file and bring in what only this process knows. Under the lock, the one that is held across I/O.

        It is held while the file cannot be used anyway, and what is done in memory meanwhile must not be left behind.
        """
        try:
            check_place(self._path, self._mountinfo)
            opened = open_state(
                self._path, boot=self._boot, clock=self._clock, wait_seconds=wait_seconds, connect=self._connect
            )
        except BeingOpened as error:
            if wait_seconds and self._memory is None:
                self._degrade(str(error))
        except (StoreError, OSError, sqlite3.Error) as error:
            self._degrade(_problem(error))
        else:
            try:
                self._take_over(opened.file, opened.set_aside)
            except sqlite3.Error as error:
                opened.file.close()
                self._degrade(_problem(error))

    def _take_over(self, file: StateFile, set_aside: tuple[str, ...]) -> None:
        memory = self._memory
        merged = file.write(lambda on: self._bring_in(on, set_aside, lost=self._identity not in {None, file.identity}))
        former, self.page = self.page, file.page
        self._file, self._memory, self._identity, self._cut_off = file, None, file.identity, {}
        self.health = Health()
        for tenant, outcome in merged:
            self._note(tenant, outcome.after, outcome.record)
            file.page.announce(tenant, outcome.after)
        self._told.clear()
        self._untold.update(self._known)
        former.touch_all()  # whoever looks at the former page, in whichever process, asks for the place of its word
        for sentence in set_aside:
            logger.error("%s", sentence)
        if memory is not None:
            logger.info("%s can be used again; what happened meanwhile was brought in", self._path)

    def _bring_in(
        self, on: sqlite3.Connection, set_aside: tuple[str, ...], *, lost: bool
    ) -> list[tuple[str, Outcome[None]]]:
        """Write into the file what only this process knows. Always writes something after a time in memory: a probe."""
        memory, wall = self._memory, self._clock.wall()
        sentences = list(set_aside)
        if memory is not None:
            sentences.append("the state file can be used again")
            for event in reversed(memory.history(limit=self._caps.rows)):
                sqlite_journal.append(on, event, self._caps, wall)
        for sentence in sentences:
            row = Event(at=datetime.fromtimestamp(wall, UTC), tenant="", cause=Cause.STORE, detail=sentence)
            sqlite_journal.append(on, row, self._caps, wall)
        if memory is not None:
            mine = {tenant: memory.load(tenant) for tenant in self._cut_off}
            was = self._cut_off
        else:
            mine = was = {tenant: record for tenant, (_, record) in self._known.items()}
        return [
            (
                tenant,
                sqlite_rows.merge(
                    on,
                    tenant,
                    record,
                    raised=record.generation != was[tenant].generation,
                    lost=lost,
                    writer=self.writer,
                ),
            )
            for tenant, record in mine.items()
            if lost or record != was[tenant]
        ]

    def _degrade(self, reason: str) -> MemoryStore:
        """Work in memory from here on, with what is known. Under the lock."""
        self._retry_at = self._clock.monotonic() + RETRY_SECONDS
        self.health = Health(ok=False, problem=f"{self._path} cannot be used and nothing is shared: {reason}")
        if self._memory is not None:
            return self._memory
        certain = self._file is not None and self._read_once_more(self._file)
        if self._file is not None:
            self._file.close()
        self._file = None
        memory = MemoryStore(
            clock=self._clock,
            history_rows=self._caps.rows,
            history_seconds=self._caps.seconds,
            records=((tenant, record) for tenant, (_, record) in self._known.items()),
        )
        self._cut_off = {tenant: record for tenant, (_, record) in self._known.items()}
        for tenant, (revision, _) in self._known.items():
            if not certain and self.page.word(tenant) != revision:  # somebody changed it, nobody knows how
                memory.invalidate(tenant)
            self.page.touch(tenant)
        self._untold.update(self._known)
        self._memory = memory
        logger.warning("%s cannot be used, working in memory until it can: %s", self._path, reason)
        return memory

    def _read_once_more(self, file: StateFile) -> bool:
        """Whether the file could still be read, as a full or read-only disk can: what others did last is known then."""
        try:
            for tenant in file.read(sqlite_rows.revisions):
                self._note(tenant, *file.read(partial(sqlite_rows.load, tenant=tenant, reader=self.writer.name)))
        except (sqlite3.Error, MalformedRow):
            return False
        return True

    # -- forks and the end ------------------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """Have no connection open at the fork."""
        if self._gate.shut() and self._file is not None:
            self._file.close()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._gate.open()

    def after_fork(self) -> None:
        """Begin anew in a child: own locks, own name, own connections; the page and what is known stay."""
        if self._process == os.getpid():
            return
        self._begin()
        if self._file is not None:
            self._file.after_fork()
        if self._memory is not None:
            self._memory.after_fork()

    def close(self) -> None:
        """Close every connection."""
        with self._gate.passed():
            if self._file is not None:
                self._file.close()


def _problem(error: Exception) -> str:
    """What went wrong, in words that hold no path twice and nothing of what is stored."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error)
