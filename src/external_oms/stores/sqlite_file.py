"""One state file and its page, found sound or set aside: nothing is ever deleted, and one process at a time decides.

Beside `state.db` stand SQLite's own `-wal` and `-shm`, the page `-generations`, and `.lock`, held by whoever opens the
file or sets it aside. SQLite alone opens the database: closing any other descriptor of it would drop SQLite's locks.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from external_oms.clock import Clock
from external_oms.errors import StoreError
from external_oms.stores.host import network_file_system
from external_oms.stores.page import ForeignPage, Page
from external_oms.stores.sqlite_schema import Unusable, bring_up, is_damage, transaction

if sys.platform != "win32":
    import fcntl

__all__ = ["BeingOpened", "Connect", "Opened", "StateFile", "check_place", "connect", "open_state"]

BUSY_SECONDS = 2.0
"""How long a writer waits for other processes' transactions: one takes well under 1 ms, so one is stuck by then."""

FIRST_PAUSE_SECONDS = 0.0005
LAST_PAUSE_SECONDS = 0.004
"""How often a writer tries: SQLite's own waiting sleeps up to 100 ms, and starves where others write all the time."""

IDLE_CONNECTIONS = 8
"""Connections kept open between operations, of readers and of writers; what a burst needs beyond is closed after it."""

T = TypeVar("T")
Connect = Callable[[Path, float], sqlite3.Connection]
"""Opens the database, given how long to wait for locks, in seconds."""

_leaked: list[object] = []


class BeingOpened(StoreError):
    """Another process is opening the file, or setting it aside, and has not finished."""


def connect(path: Path, wait_seconds: float) -> sqlite3.Connection:
    """A connection to a database that exists.

    Commits reach the operating system and no further (`synchronous = NORMAL`): they survive the death of any process;
    a power cut may take those since the last checkpoint, and leaves the database whole.
    """
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=rw", uri=True, timeout=wait_seconds, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute("PRAGMA synchronous = NORMAL")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


class _Pool:
    """Connections, lent to one operation at a time, so that no thread waits for another's."""

    def __init__(self, make: Callable[[], sqlite3.Connection]) -> None:
        self._make = make
        self._idle: list[sqlite3.Connection] = []
        self._lent: dict[int, sqlite3.Connection] = {}
        self._age = 0

    @contextmanager
    def lend(self) -> Iterator[sqlite3.Connection]:
        age = self._age
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._make()
        self._lent[id(connection)] = connection
        try:
            yield connection
        finally:
            del self._lent[id(connection)]
            if age == self._age and len(self._idle) < IDLE_CONNECTIONS:
                self._idle.append(connection)
            else:
                connection.close()

    def close(self) -> None:
        """Close what is idle now, and what is lent when it comes back; new ones are made on demand."""
        self._age += 1
        while self._idle:
            with suppress(IndexError):
                self._idle.pop().close()

    def leak(self) -> None:
        """Keep everything open and unused for ever: what a forked child must do with its parent's connections."""
        _leaked.append((list(self._idle), dict(self._lent)))
        self._idle, self._lent = [], {}


class StateFile:
    """A file that was opened: its connections and its page.

    Attributes:
        identity: 16 bytes that tell its database from every other.
        page: The words.
    """

    def __init__(self, path: Path, identity: bytes, page: Page, connect: Connect) -> None:
        self._path = path
        self._file = _inode(path)
        self.identity = identity
        self.page = page
        self._readers = _Pool(lambda: connect(path, 0.0))
        self._writers = _Pool(lambda: connect(path, 0.0))
        self._poller = _Pool(lambda: connect(path, 0.0))
        self._version: tuple[int, int] | None = None

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Read without waiting for anybody.

        Raises:
            sqlite3.Error: It cannot be read now.
        """
        with self._readers.lend() as connection:
            return work(connection)

    def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do it in one transaction; when this returns it is committed.

        Raises:
            sqlite3.Error: It was rolled back; others kept it waiting for `BUSY_SECONDS`, at most.
        """
        until, pause = time.monotonic() + BUSY_SECONDS, FIRST_PAUSE_SECONDS
        while True:
            try:
                with self._writers.lend() as connection, transaction(connection):
                    return work(connection)
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= until:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_SECONDS)

    def poll(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """Read, but only where anything was committed since the last call; by one thread at a time.

        Raises:
            sqlite3.Error: It cannot be read now.
        """
        with self._poller.lend() as connection:  # a version means something on the connection that told it alone
            version = (id(connection), int(connection.execute("PRAGMA data_version").fetchone()[0]))
            if version == self._version:
                return None
            result = work(connection)
            self._version = version
            return result

    def moved(self) -> bool:
        """Whether another file, or none, stands where this one or its page stood."""
        return _inode(self._path) != self._file or self.page.moved(_page_path(self._path))

    def close(self) -> None:
        """Close every connection; the next operation opens what it needs."""
        self._version = None
        for pool in (self._readers, self._writers, self._poller):
            pool.close()

    def after_fork(self) -> None:
        """Never touch again what was open when the process was forked."""
        self._version = None
        for pool in (self._readers, self._writers, self._poller):
            pool.leak()


@dataclass(frozen=True, slots=True)
class Opened:
    """What opening gave.

    Attributes:
        file: The file, ready for use.
        set_aside: What was set aside on the way, in sentences for people; mostly nothing.
    """

    file: StateFile
    set_aside: tuple[str, ...]


def check_place(path: Path, mountinfo: str) -> None:
    """Refuse a place where the store could not keep its promises.

    Args:
        path: Where the state file is to be.
        mountinfo: The text of `/proc/self/mountinfo`; empty where there is none.

    Raises:
        StoreError: The place is on a network file system, in a directory of somebody else, or no place for a file.
        OSError: It cannot be looked at, or the directory cannot be made.
    """
    if sys.platform == "win32":
        raise StoreError("the file store needs a POSIX system; use redis:// or memory:// here")
    if not path.is_absolute():
        raise StoreError(f"{path} is not an absolute path; name the file as sqlite:////var/lib/external-oms/state.db")
    real = Path(os.path.realpath(path.parent))
    kind = network_file_system(real, mountinfo)
    if kind is not None:
        raise StoreError(
            f"{path} is on a network file system ({kind}): memory and locks are not shared between hosts there, so "
            "invalidations would go unseen; name a local directory, or use redis:// for several hosts"
        )
    _make_directory(real)
    found = real.stat()
    if found.st_uid != os.geteuid():
        raise StoreError(f"{real} belongs to another user; name a directory of the user that runs the service")
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise StoreError(f"{real} can be written by every user of the host; chmod o-w it, or name another")
    _check_file(path)


def _make_directory(directory: Path) -> None:
    for missing in reversed([one for one in (directory, *directory.parents) if not one.exists()]):
        with suppress(FileExistsError):  # another process was faster
            missing.mkdir(mode=0o700)


def _check_file(path: Path) -> bool:
    """Whether there is a file.

    Raises:
        StoreError: What is there is no file of this user.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    except NotADirectoryError as error:
        raise StoreError(f"{path.parent} is not a directory") from error
    if not stat.S_ISREG(found.st_mode):
        what = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "not a regular file"
        raise StoreError(f"{path} is {what}; name the file itself")
    if found.st_uid != os.geteuid():
        raise StoreError(f"{path} belongs to another user; name a file of the user that runs the service")
    return True


def open_state(path: Path, *, boot: str, clock: Clock, wait_seconds: float, connect: Connect = connect) -> Opened:
    """Open the file, new where there is none; a damaged or foreign one is set aside for a new one.

    Args:
        path: Where it is.
        boot: The present boot.
        clock: What tells the time.
        wait_seconds: How long to wait for another process that is doing the same.
        connect: Opens connections.

    Raises:
        BeingOpened: The other process did not finish in time.
        StoreError: The file is of a later version, or the place will not do.
        OSError: A file cannot be made, renamed or mapped now.
        sqlite3.Error: The database cannot be read or written now.
    """
    with _alone(path, wait_seconds):
        asides = []
        try:
            identity = _open_database(path, boot, clock, connect)
        except Unusable as reason:
            asides.append(_set_aside(path, f"{path}: {reason}", clock, ("", "-wal", "-shm", "-generations")))
            identity = _open_database(path, boot, clock, connect)
        try:
            page = Page.open(_page_path(path), identity)
        except FileNotFoundError:
            page = Page.create(_page_path(path), identity)
        except ForeignPage as reason:
            asides.append(_set_aside(path, f"{_page_path(path)}: {reason}", clock, ("-generations",)))
            page = Page.create(_page_path(path), identity)
        return Opened(StateFile(path, identity, page, connect), tuple(asides))


@contextmanager
def _alone(path: Path, wait_seconds: float) -> Iterator[None]:
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        until = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    raise BeingOpened(f"{path} is being opened by another process, which does not finish") from error
                time.sleep(0.005)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # by closing alone it would stay with a child that was forked meanwhile
    finally:
        os.close(lock)


def _open_database(path: Path, boot: str, clock: Clock, connect: Connect) -> bytes:
    if not _check_file(path):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    try:
        with closing(connect(path, BUSY_SECONDS)) as connection:
            return bring_up(connection, boot=boot, clock=clock)
    except sqlite3.DatabaseError as error:
        if is_damage(error):
            raise Unusable("it is damaged, or no database of ours") from error
        raise


def _set_aside(path: Path, reason: str, clock: Clock, parts: tuple[str, ...]) -> str:
    """Rename what is unusable; returns the sentence that says so.

    The database goes first: SQLite removes a log by its name when its last connection closes, but not once the
    database has moved, so the new file's log is safe from processes that still have the old one open.
    """
    stamp = datetime.fromtimestamp(clock.wall(), UTC).strftime("%Y%m%dT%H%M%SZ")
    aside = path.with_name(f"{path.name}.set-aside-{stamp}")
    number = 1
    while any(os.path.lexists(f"{aside}{part}") for part in parts):
        number += 1
        aside = path.with_name(f"{path.name}.set-aside-{stamp}-{number}")
    for part in parts:
        with suppress(FileNotFoundError):
            Path(f"{path}{part}").rename(f"{aside}{part}")
    return f"{reason}; set aside as {aside.name}{parts[0]}"


def _page_path(path: Path) -> Path:
    return path.with_name(f"{path.name}-generations")


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
