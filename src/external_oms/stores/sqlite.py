"""The store of one host: entries in an SQLite file that all processes of the host share.

Three parts. The *version table* holds one word per storage key in shared memory; the word is all that an evaluation
looks at while its entry is unchanged. The *state file* holds everything else. The *fork guard* closes the connections
before a fork and opens them again after it.

A change is one transaction, and then the version word: nothing that was answered is lost by the death of any process at
any moment. Where a process dies between the two, the next `poll` of any other process changes the word.

There is no degraded operation here: where the file cannot be used, a method raises `StoreError`, and `fallback` decides
what follows. Writers of other processes are no such reason: they raise `StoreBusy` at most, and keep the file in use.
"""

from __future__ import annotations

import json
import logging
import os
import random
import secrets
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from external_oms.clock import SYSTEM_CLOCK, Clock
from external_oms.codec import (
    MalformedError,
    decode_entry,
    decode_event,
    decode_member,
    encode_entry,
    encode_event,
    encode_member,
)
from external_oms.entry import Entry, Moment, Transition
from external_oms.errors import StoreBusy, StoreError
from external_oms.records import MEMBER_SECONDS, Cause, Event, Member
from external_oms.stores.base import DELIVERY_ID_SECONDS, Health
from external_oms.stores.host import boot_id, is_gone, own_mountinfo, process_identity
from external_oms.stores.sqlite_file import (
    OpenFile,
    check_place,
    is_busy,
    is_damage,
    next_version,
    open_file,
    transaction,
)
from external_oms.stores.versions import VersionTable

__all__ = ["SqliteStore"]

logger = logging.getLogger("external_oms")

QUEUE_SECONDS = 5.0
"""The longest that a writer waits in all: hundreds of transactions of well under 1 ms may be ahead of it."""

BUSY_SECONDS = 2.0
"""How long the writer whose turn it is waits for other processes; a transaction that lasts so long is stuck."""

RETRY_SECONDS = (0.0005, 0.004)
"""The range of the pauses between two tries to begin a transaction. SQLite's own waiting sleeps up to 100 ms, and
starves where others write all the time; the jitter keeps processes from trying in step."""

READ_SECONDS = 0.1
"""How long a reader waits for other processes, which lock readers out for a moment when they open or close the database
(SQLite) or make it."""

TURN_SECONDS = 1.0
"""How long a reader waits for the other threads of its process. Each reads for 30 us; fifty of them on a machine with
too much to do, or a fork, take some 100 ms."""

INSPECTION_SECONDS = 1.0
"""How often the file and its version table are looked at, and the least time between two tries to open them."""

FORK_SECONDS = 2.5
"""How long a fork waits for the present user of a connection: longer than a writer waits for other processes."""

ATTEMPTS = 2
"""How often a transaction is tried on a file that turns out to be damaged or replaced: as it is, and opened anew."""

PRUNE_EVERY = 64
"""History is pruned at every so many rows; `history` leaves out what is due to go."""

MAX_ID = (1 << 63) - 1
"""The largest number of a row."""

NOTICE_SECONDS = 60.0
"""How long `health` reports that something was set aside: several scrapes of a monitoring system."""

OCCUPIED = "other threads of this process keep the state file busy; try again"

T = TypeVar("T")

_EMPTY = Entry()

_HISTORY = """
SELECT id, event FROM history
WHERE id > (SELECT coalesce(max(id), 0) FROM history) - ? AND id < ? AND at >= ?
    AND (? IS NULL OR key IN (SELECT value FROM json_each(?)))
ORDER BY id DESC LIMIT ?
"""
_MEMBERS = """
SELECT at, member FROM members
WHERE at > ? AND at < ? AND (? IS NULL OR key IN (SELECT value FROM json_each(?)))
ORDER BY name, key
"""


class FairLock:
    """A lock that serves threads in the order of their arrival.

    Attributes:
        owner: The thread that has the lock; None where it is free.
    """

    def __init__(self) -> None:
        self._mutex = threading.RLock()  # re-entrant: a signal handler that forks may interrupt a thread that holds it
        self._waiting: deque[tuple[int, threading.Lock]] = deque()
        self.owner: int | None = None

    def acquire(self, timeout_seconds: float, *, first: bool = False) -> bool:
        """Return whether the lock was acquired in time; `first` goes before all who wait."""
        with self._mutex:
            if self.owner is None:
                self.owner = threading.get_ident()
                return True
            turn = threading.Lock()
            turn.acquire()
            waiter = (threading.get_ident(), turn)
            (self._waiting.appendleft if first else self._waiting.append)(waiter)
        try:
            if turn.acquire(timeout=timeout_seconds):
                return True
        except BaseException:  # of a signal handler; a turn must not go to a thread that has left
            if self._leave(waiter):
                self.release()
            raise
        return self._leave(waiter)

    def _leave(self, waiter: tuple[int, threading.Lock]) -> bool:
        """Stop waiting; return whether the turn came all the same."""
        with self._mutex:
            if waiter not in self._waiting:
                return True
            self._waiting.remove(waiter)
            return False

    def release(self) -> None:
        """Hand the lock to the thread that has waited longest."""
        with self._mutex:
            if self._waiting:
                self.owner, turn = self._waiting.popleft()
                turn.release()
            else:
                self.owner = None


class _Channel(FairLock):
    """A connection to the file, with the lock that its users hold.

    Args:
        wait_seconds: How long SQLite itself waits for locks.

    Attributes:
        data_version: The last `PRAGMA data_version` that `poll` saw on this connection; None where it has seen none.
    """

    def __init__(self, wait_seconds: float) -> None:
        super().__init__()
        self.data_version: int | None = None
        self._wait_seconds = wait_seconds
        self._file: OpenFile | None = None
        self._connection: sqlite3.Connection | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a connection."""
        return self._connection is not None

    @contextmanager
    def use(self, timeout_seconds: float) -> Iterator[None]:
        """Hold the lock.

        Raises:
            StoreBusy: Other threads of this process did not finish in time.
        """
        if not self.acquire(timeout_seconds):
            raise StoreBusy(OCCUPIED)
        try:
            yield
        finally:
            self.release()

    def connection(self, file: OpenFile) -> sqlite3.Connection:
        """Return the connection to this file, opened where it is not. Under the lock.

        Raises:
            sqlite3.Error: The file cannot be opened.
        """
        if self._file is not file or self._connection is None:
            self.close()
            self._connection = file.connect(self._wait_seconds)
            self._file = file
        return self._connection

    def close(self) -> None:
        """Close the connection; the next use opens another. Under the lock."""
        connection, self._connection, self.data_version = self._connection, None, None
        if connection is not None:
            connection.close()


class _Keys(dict[str, str]):
    """The storage keys by tenant; that of a tenant without one is its name.

    Attributes:
        tenants: The tenants by storage key.
    """

    def __init__(self, keys: Mapping[str, str]) -> None:
        super().__init__(keys)
        self.tenants = {key: tenant for tenant, key in keys.items()}

    def __missing__(self, tenant: str) -> str:
        self[tenant] = tenant
        self.tenants.setdefault(tenant, tenant)
        return tenant


@dataclass(frozen=True, slots=True)
class _Outcome(Generic[T]):
    """What a transaction did: the result for the caller, and the version of the entry before and after."""

    result: T
    before: int = 0
    after: int = 0


class SqliteStore:
    """Entries in a file that all processes of this host share; needs no server.

    The constructor opens nothing. A missing file is made with mode 0600, a missing directory, one level of it, with
    0700.

    Args:
        path: The state file, absolute.
        keys: The storage key of each tenant: the tenant and the address of its config API, so that two environments
            with one file never share a value. Without it, and for other tenants, the key is the name of the tenant.
        clock: Tells the time; its monotonic clock must be the same for all processes of the host.
        history_rows: How many history rows are kept, >= 1.
        history_seconds: For how long a history row is kept, in seconds, > 0.
        boot: A text that changes with each boot; the host's own where None.
        mountinfo: The text of `/proc/self/mountinfo`; the host's own where None.

    Raises:
        StoreError: The place of the file is not acceptable.
    """

    kind: str = "sqlite"
    poll_seconds: float | None = 0.025
    """25 ms: a change by another process is announced before a person could notice; a poll takes microseconds."""

    spread_seconds = 0.0
    """The processes of one host are few, and one lease among them suffices."""

    def __init__(
        self,
        path: Path,
        *,
        keys: Mapping[str, str] | None = None,
        clock: Clock = SYSTEM_CLOCK,
        history_rows: int = 10_000,
        history_seconds: float = 30 * 86_400.0,
        boot: str | None = None,
        mountinfo: str | None = None,
    ) -> None:
        self._path = path
        self._keys = _Keys(keys or {})
        self._own_keys = None if keys is None else ["", *keys.values()]  # "": rows about the store itself
        self._clock = clock
        self._history_rows = history_rows
        self._history_seconds = history_seconds
        self._boot = boot_id() if boot is None else boot
        self._mountinfo = own_mountinfo() if mountinfo is None else mountinfo
        self._file: OpenFile | None = None
        self._versions = VersionTable.anonymous()
        self._suspect = False  # whether an operation failed in a way that opening the file anew may mend
        self._reopened = False  # whether `poll` has yet to report every tenant, because the file is another one
        self._open_at = float("-inf")
        self._inspect_at = float("-inf")
        self._problems: dict[str, str] = {}
        self._malformed: dict[str, object] = {}  # per storage key the version of a row that could not be decoded
        self._decoded: dict[str, tuple[tuple[object, object], Entry]] = {}  # per storage key the last row, decoded
        self._notice = ("", float("-inf"))
        self._begin()
        with suppress(OSError):  # where it cannot be looked at now, the first use says so
            check_place(path, self._mountinfo)
        _stores.add(self)

    def _begin(self) -> None:
        """Make what belongs to one process: a child makes its own."""
        self._pid = os.getpid()
        self._holder = f"{process_identity()}/{secrets.token_hex(4)}"
        self._writer = _Channel(0.0)
        self._reader = _Channel(READ_SECONDS)
        self._polling = threading.Lock()

    @property
    def holder(self) -> str:
        """The name of this process for leases: namespace, PID, start time and a random text per handle."""
        return self._holder

    def is_gone(self, holder: str) -> bool:
        """Return whether the process of that name is known to have ended."""
        return is_gone(holder.rpartition("/")[0])

    # -- version words ----------------------------------------------------------------------------------------------

    def version_ref(self, tenant: str) -> tuple[Sequence[int], int]:
        """Return where the version word of a tenant stands: in shared memory."""
        if self._file is None:
            with suppress(StoreError):
                self._open_for_reading()
        versions = self._versions
        return versions.words, versions.index(self._keys[tenant])

    def touch(self, tenant: str) -> None:
        """Change the version word, for every process."""
        self._versions.invalidate(self._versions.index(self._keys[tenant]))

    # -- the file ---------------------------------------------------------------------------------------------------

    def _opened(self, wait_seconds: float = BUSY_SECONDS) -> OpenFile:
        """Return the file, opened where it is not or is suspect. Under the lock of the writer.

        Raises:
            StoreError: It cannot be opened.
        """
        file, now = self._file, self._clock.monotonic()
        if file is not None and (not self._suspect or (now < self._open_at and file.is_in_place())):
            return file
        if file is None and now < self._open_at:
            raise StoreError(self._problems.get("open", f"{self._path} could not be opened a moment ago"))
        try:
            opened = open_file(
                self._path, boot=self._boot, clock=self._clock, mountinfo=self._mountinfo, wait_seconds=wait_seconds
            )
        except StoreBusy:
            raise
        except (StoreError, OSError, sqlite3.Error) as error:
            failure = self._failure(error, "open")
            if not isinstance(failure, StoreBusy):
                self._open_at = now + INSPECTION_SECONDS
            raise failure from error
        self._record_set_aside(opened)
        self._suspect = False
        self._problems.pop("open", None)
        if file is not None and opened.inode == file.inode and file.is_in_place():
            self._open_at = now + INSPECTION_SECONDS  # it was in order, so to open it again at once cannot help
            self._writer.close()
            return file
        former, self._versions, self._file = self._versions, opened.versions, opened
        self._malformed.clear()
        self._reopened = file is not None
        former.invalidate_all()  # readers of the former table, in every process, ask for the place of the word again
        return opened

    def _record_set_aside(self, opened: OpenFile) -> None:
        for sentence in opened.set_aside:
            logger.warning("%s", sentence)
            row = Event(at=self._at(), tenant="", cause=Cause.STORE, detail=sentence)
            with suppress(sqlite3.Error):  # the log has it
                self._transacted(opened, partial(self._insert, event=row), time.monotonic() + BUSY_SECONDS)
        if opened.damaged:
            self._notice = (opened.set_aside[-1], self._clock.monotonic() + NOTICE_SECONDS)

    def _open_for_reading(self) -> OpenFile:
        with self._writer.use(TURN_SECONDS):
            return self._opened(READ_SECONDS)

    def _failure(self, error: Exception, doing: str) -> StoreError:
        """Return the error to raise, and remember what is wrong."""
        if isinstance(error, sqlite3.ProgrammingError):
            return StoreBusy("a signal handler forked in the middle of an operation of the store; try again")
        if isinstance(error, sqlite3.Error) and is_busy(error):
            return StoreBusy(f"other processes keep {self._path} locked; try again")
        self._suspect = True
        text = (isinstance(error, OSError) and error.strerror) or str(error)
        problem = text if str(self._path) in text else f"{self._path} cannot be used: {text}"
        self._problems[doing] = problem
        return StoreError(problem)

    def _read(self, work: Callable[[sqlite3.Connection], T], file: OpenFile | None = None) -> T:
        """Read with the one connection for reading.

        Raises:
            StoreError: It cannot be read.
        """
        file = file or self._file or self._open_for_reading()
        reader = self._reader
        if not reader.acquire(TURN_SECONDS):  # not `use`, which costs every load two calls
            raise StoreBusy(OCCUPIED)
        try:
            result = work(reader.connection(file))
        except sqlite3.Error as error:
            if not file.is_in_place():
                self._suspect = True
                raise StoreBusy(f"{self._path} was replaced, and is opened anew at the next poll") from error
            raise self._failure(error, "read") from error
        finally:
            reader.release()
        if self._problems:
            self._problems.pop("read", None)
        return result

    def _write(self, work: Callable[[sqlite3.Connection], _Outcome[T]], key: str | None = None) -> T:
        """Run one transaction with the one connection for writing, in the order of arrival.

        Args:
            work: What to do in the transaction; it may be run more than once.
            key: The storage key whose version word to publish afterwards.

        Raises:
            StoreError: Nothing was stored, as far as can be told.
        """
        until = time.monotonic() + QUEUE_SECONDS
        with self._writer.use(QUEUE_SECONDS):
            for attempt in range(1, ATTEMPTS + 1):
                file = self._opened()
                try:
                    outcome = self._transacted(file, work, until)
                except sqlite3.Error as error:
                    failure = self._failure(error, "write")
                    is_lost = is_damage(error) or not file.is_in_place()
                    if isinstance(failure, StoreBusy) or not is_lost or attempt == ATTEMPTS:
                        raise failure from error
                    continue
                if key is not None and outcome.after != outcome.before:
                    file.versions.publish(key, outcome.after)
                    if file.polled.get(key, 0) == outcome.before:  # no other process came between
                        file.polled[key] = outcome.after
                if file.has_its_name():
                    self._problems.pop("write", None)
                    return outcome.result
                self._suspect = True  # the change went down with the old file: make it in the new one
            raise self._failure(StoreError("it is replaced again and again"), "write")

    def _transacted(self, file: OpenFile, work: Callable[[sqlite3.Connection], T], until: float) -> T:
        """Run one transaction, and try again while other processes write. Under the lock of the writer."""
        until = min(until, time.monotonic() + BUSY_SECONDS)  # not by the injected clock: these are real locks
        while True:
            begun = False
            try:
                connection = self._writer.connection(file)
                with transaction(connection):
                    begun = True
                    return work(connection)
            except sqlite3.OperationalError as error:
                if begun or not is_busy(error) or time.monotonic() >= until:
                    raise
            time.sleep(random.uniform(*RETRY_SECONDS))  # noqa: S311 - jitter, no secret

    # -- entries ----------------------------------------------------------------------------------------------------

    def load(self, tenant: str) -> Entry:
        """Return the entry from the file."""
        key = self._keys[tenant]
        return self._entry(key, self._read(lambda connection: _row(connection, key)))[1]

    def transact(self, tenant: str, transition: Transition[T], *, delivery_ids: Sequence[str] = ()) -> T:
        """Apply a transition in one transaction, and then publish the version word."""
        key = self._keys[tenant]

        def apply(connection: sqlite3.Connection) -> _Outcome[T]:
            now = self._clock.monotonic()
            version, entry, is_sound = self._entry(key, _row(connection, key))
            seen = frozenset(one for one in delivery_ids if _is_known(connection, key, one, now))
            change = transition(entry, Moment(now, seen=seen))
            events, after = change.events, version
            if change.entry is not entry:
                after, text = next_version(connection), encode_entry(change.entry)
                if not is_sound:
                    events = (*events, self._set_row_aside(connection, key, tenant))
                connection.execute(
                    "INSERT INTO entries VALUES (?, ?, ?)"
                    " ON CONFLICT (key) DO UPDATE SET version = excluded.version, entry = excluded.entry",
                    (key, after, text),
                )
                self._decoded[key] = (after, text.encode()), change.entry  # of no use where the commit fails
            if change.claims:
                connection.execute("DELETE FROM delivery_ids WHERE until <= ?", (now,))
                connection.executemany(
                    "REPLACE INTO delivery_ids VALUES (?, ?, ?)",
                    [(key, _id(one), now + DELIVERY_ID_SECONDS) for one in change.claims],
                )
            for event in events:
                self._insert(connection, event)
            return _Outcome(change.result, version, after)

        return self._write(apply, key)

    def _entry(self, key: str, row: tuple[object, object] | None) -> tuple[int, Entry, bool]:
        """Return version and entry of a row, and whether the row could be decoded; one that could not counts as empty.

        The row is reported once and stays until a transaction replaces it. Nothing is written and no word is changed
        here, so that no reader loads in a loop.
        """
        if row is None:
            return 0, _EMPTY, True
        version, text = row
        decoded = self._decoded.get(key)
        if decoded is not None and decoded[0] == row:
            return version, decoded[1], True  # type: ignore[return-value]  # it was checked when it was decoded
        try:
            if type(version) is not int or not isinstance(text, bytes):
                raise MalformedError("a column has another type")  # noqa: TRY301 - one way for every malformed row
            entry = decode_entry(text)
        except MalformedError as error:
            if self._malformed.get(key) != version:
                self._malformed[key] = version
                logger.warning("the stored entry of %r cannot be decoded and counts as empty: %s", key, error)
            return 0, _EMPTY, False
        if self._malformed:
            self._malformed.pop(key, None)
        self._decoded[key] = row, entry
        return version, entry, True

    def _set_row_aside(self, connection: sqlite3.Connection, key: str, tenant: str) -> Event:
        sentence = "the stored entry could not be decoded and was set aside"
        connection.execute(
            "INSERT INTO set_aside SELECT key, ?, entry FROM entries WHERE key = ?", (self._clock.wall(), key)
        )
        self._notice = (f"{sentence}: {key}", self._clock.monotonic() + NOTICE_SECONDS)
        return Event(at=self._at(), tenant=tenant, cause=Cause.STORE, detail=sentence)

    # -- what other processes do ------------------------------------------------------------------------------------

    def poll(self) -> Collection[str]:
        """Return the tenants that other processes changed; look after the file and after words never published."""
        if not self._polling.acquire(blocking=False):
            return ()
        try:
            self._inspect()
            file = self._file
            return () if file is None else self._changes(file)
        finally:
            self._polling.release()

    def _inspect(self) -> None:
        """Open the file anew where it was damaged, removed or replaced."""
        file, now = self._file, self._clock.monotonic()
        if file is not None and not self._suspect:
            if now < self._inspect_at:
                return
            self._inspect_at = now + INSPECTION_SECONDS
            if file.is_in_place():
                return
            self._suspect = True
        with suppress(StoreBusy), self._writer.use(READ_SECONDS):  # the writers that are ahead open it themselves
            self._opened(READ_SECONDS)

    def _changes(self, file: OpenFile) -> Collection[str]:
        changed: set[str] = set()
        if self._reopened:
            self._reopened = False
            changed.update(self._keys.tenants.copy().values())
        reader = self._reader
        rows = self._read(lambda connection: _changed_rows(connection, reader, file.polled_version), file)
        latest: dict[int, int] = {}
        for name, version in rows:
            if type(version) is not int or not isinstance(name, bytes):
                continue  # `load` reports it
            key = name.decode(errors="replace")
            index = file.versions.index(key)
            latest[index] = max(version, latest.get(index, 0))
            if version > file.polled.get(key, 0):
                file.polled[key] = version
                tenant = self._keys.tenants.get(key, key if self._own_keys is None else None)
                if tenant is not None:
                    changed.add(tenant)
        for index, version in latest.items():
            file.polled_version = max(file.polled_version, version)
            if file.versions.words[index] != version:  # the process that committed it has died, or is about to publish
                file.versions.invalidate(index)
        return changed

    def attach(self, wake: Callable[[], None]) -> None:
        """Do nothing: the poll is as quick as a wake would be."""

    # -- history and members ----------------------------------------------------------------------------------------

    def _at(self) -> datetime:
        return datetime.fromtimestamp(self._clock.wall(), UTC)

    def append(self, event: Event) -> None:
        """Add a history row."""
        self._write(lambda connection: self._insert(connection, event))

    def _insert(self, connection: sqlite3.Connection, event: Event) -> _Outcome[None]:
        key = self._keys[event.tenant] if event.tenant else ""
        row = (key, event.at.timestamp(), encode_event(event))
        last = connection.execute("INSERT INTO history (key, at, event) VALUES (?, ?, ?)", row).lastrowid or 0
        if last % PRUNE_EVERY == 0:
            oldest = self._clock.wall() - self._history_seconds
            connection.execute("DELETE FROM history WHERE id <= ? OR at < ?", (last - self._history_rows, oldest))
        return _Outcome(None)

    def history(self, *, tenant: str | None = None, limit: int = 100, before: int | None = None) -> Sequence[Event]:
        """Return rows of history, newest first; rows that cannot be decoded are left out."""
        oldest = self._clock.wall() - self._history_seconds
        end = MAX_ID if before is None else min(max(before, 0), MAX_ID)
        given = (self._history_rows, end, oldest, *self._keys_of(tenant), min(limit, MAX_ID))
        rows = self._read(lambda connection: connection.execute(_HISTORY, given).fetchall())
        events: list[Event] = []
        for number, text in rows:
            with suppress(MalformedError):
                events.append(decode_event(text, number=number))
        return tuple(events)

    def _keys_of(self, tenant: str | None) -> tuple[str | None, str | None]:
        """Return the keys that a statement lists, for its two marks: of one tenant, of this store, or None for all."""
        keys = self._own_keys if tenant is None else [self._keys[tenant]]
        text = None if keys is None else json.dumps(keys)
        return text, text

    def report(self, members: Sequence[Member]) -> None:
        """Store the heartbeats of this process, and forget those of members that are silent."""
        now = self._clock.monotonic()
        rows = [(one.name, self._keys[one.tenant], now, encode_member(one)) for one in members]

        def replace_rows(connection: sqlite3.Connection) -> _Outcome[None]:
            connection.execute("DELETE FROM members WHERE at <= ?", (now - MEMBER_SECONDS,))
            connection.executemany("REPLACE INTO members VALUES (?, ?, ?, ?)", rows)
            return _Outcome(None)

        self._write(replace_rows)

    def members(self, tenant: str | None = None) -> Sequence[Member]:
        """Return the heartbeats of all processes of the host; rows that cannot be decoded are left out."""
        now = self._clock.monotonic()
        given = (now - MEMBER_SECONDS, now + MEMBER_SECONDS, *self._keys_of(tenant))
        rows = self._read(lambda connection: connection.execute(_MEMBERS, given).fetchall())
        members: list[Member] = []
        for at, text in rows:
            with suppress(MalformedError):
                members.append(decode_member(text, seen_seconds=max(0.0, now - at)))
        return tuple(members)

    # -- life -------------------------------------------------------------------------------------------------------

    def health(self) -> Health:
        """Return whether the file is in use and in order."""
        problem = next(iter(self._problems.copy().values()), "")
        malformed = sorted(self._malformed.copy())
        notice, until = self._notice
        if not problem and malformed:
            problem = f"stored entries cannot be decoded and count as empty until the next change: {malformed}"
        elif not problem and self._clock.monotonic() < until:
            problem = notice
        return Health(ok=not problem, problem=problem)

    def start(self) -> None:
        """Do nothing: the store has no threads."""

    def after_fork(self) -> None:
        """Begin anew in a forked child; where Python made the fork, this has been done.

        An inherited connection was idle where the fork was not made by Python (uWSGI), and can be closed: POSIX locks
        are not inherited, so nothing of the parent's is released. A connection in use at the fork must neither be
        closed nor used, and as long as it lingers SQLite believes that this process has its locks: the store refuses to
        open the file there.
        """
        if self._pid == os.getpid():
            return
        for channel in (self._writer, self._reader):
            if channel.is_open and channel.owner is not None:
                _abandoned.append(channel)
                self._file, self._open_at = None, float("inf")
                self._problems["open"] = (
                    "this process was forked while another thread used the state file, and cannot use it safely; "
                    "fork earlier, or start a new process"
                )
            else:
                channel.close()
        self._begin()

    def close(self) -> None:
        """Close the connections."""
        for channel in (self._writer, self._reader):
            with suppress(StoreBusy), channel.use(0.4):
                channel.close()

    # -- the fork guard ---------------------------------------------------------------------------------------------

    def close_for_fork(self) -> Iterator[FairLock]:
        """Close the connections, and yield the locks that are held for the fork."""
        for channel in (self._writer, self._reader):
            if channel.owner == threading.get_ident():  # in a signal handler, which interrupted this very thread
                channel.close()
            elif channel.acquire(FORK_SECONDS, first=True):
                channel.close()
                yield channel


def _row(connection: sqlite3.Connection, key: str) -> tuple[object, object] | None:
    row: tuple[object, object] | None = connection.execute(
        "SELECT version, entry FROM entries WHERE key = ?", (key,)
    ).fetchone()
    return row


def _id(delivery_id: str) -> bytes:
    return delivery_id.encode("utf-8", "surrogatepass")  # a sender may send anything


def _is_known(connection: sqlite3.Connection, key: str, delivery_id: str, now: float) -> bool:
    statement = "SELECT 1 FROM delivery_ids WHERE key = ? AND id = ? AND until > ?"
    return connection.execute(statement, (key, _id(delivery_id), now)).fetchone() is not None


def _changed_rows(connection: sqlite3.Connection, reader: _Channel, since: int) -> Sequence[tuple[object, object]]:
    """Return keys and versions of the entries changed since that version; looks only where something was committed."""
    (data_version,) = connection.execute("PRAGMA data_version").fetchone()
    if data_version == reader.data_version:
        return ()
    rows = connection.execute("SELECT key, version FROM entries WHERE version > ?", (since,)).fetchall()
    reader.data_version = data_version
    return rows


# -- forks ------------------------------------------------------------------------------------------------------------
#
# SQLite counts the locks of a process in the process itself. A child that inherits an open connection inherits the
# count and not the locks: connections that it opens later believe that they have locks and have none, and another
# process that closes the database as the last one removes the log under them (sqlite.org/howtocorrupt.html section
# 2.7). So every connection is closed before a fork, and its lock is held until the fork is done.

_stores: weakref.WeakSet[SqliteStore] = weakref.WeakSet()
_abandoned: list[_Channel] = []
_forks = threading.local()


def _before_fork() -> None:
    if not hasattr(_forks, "held"):
        _forks.held = []
    held: list[FairLock] = []
    _forks.held.append(held)  # a list of lists: a signal handler may fork while this thread forks
    for store in list(_stores):
        held.extend(store.close_for_fork())


def _after_fork_in_parent() -> None:
    for lock in _forks.held.pop():
        lock.release()


def _after_fork_in_child() -> None:
    _forks.held = []
    for store in list(_stores):
        store.after_fork()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
