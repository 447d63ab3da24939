"""Open the state file of the SQLite store: check its place, make or check its tables, set aside what cannot be used.

Nothing is ever deleted, and one process at a time decides. Beside `state.db` stand SQLite's own `-wal` and `-shm`, the
version table `-generations`, and `.lock`, which a process holds while it opens the file or sets it aside. SQLite alone
opens the database: closing any other descriptor of the file would end SQLite's locks (sqlite.org/howtocorrupt.html
section 2.2).
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from external_oms.clock import Clock
from external_oms.codec import MalformedError, decode_entry, encode_entry
from external_oms.entry import Entry, shift
from external_oms.errors import StoreBusy, StoreError
from external_oms.stores.base import DELIVERY_ID_SECONDS
from external_oms.stores.host import network_file_system
from external_oms.stores.versions import PageMismatch, VersionTable

if sys.platform != "win32":
    import fcntl

__all__ = [
    "APPLICATION_ID",
    "TABLES",
    "USER_VERSION",
    "DamagedError",
    "OpenFile",
    "check_place",
    "is_busy",
    "is_damage",
    "next_version",
    "open_file",
    "transaction",
]

APPLICATION_ID = 0x784F4D53
"""`xOMS`, in the header of every database of ours: it tells ours from another program's."""

USER_VERSION = 2
"""The version of the tables."""

_SCHEMA = """
CREATE TABLE service (id INTEGER PRIMARY KEY CHECK (id = 1), identity TEXT NOT NULL, boot TEXT NOT NULL,
    version INTEGER NOT NULL);
CREATE TABLE entries (key TEXT PRIMARY KEY, version INTEGER NOT NULL, entry TEXT NOT NULL);
CREATE TABLE delivery_ids (key TEXT, id BLOB, until REAL NOT NULL, PRIMARY KEY (key, id)) WITHOUT ROWID;
CREATE INDEX delivery_ids_until ON delivery_ids (until);
CREATE TABLE history (id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, at REAL NOT NULL, event TEXT NOT NULL);
CREATE TABLE members (name TEXT, key TEXT, at REAL NOT NULL, member TEXT NOT NULL, PRIMARY KEY (name, key))
    WITHOUT ROWID;
CREATE TABLE set_aside (key TEXT NOT NULL, at REAL NOT NULL, text BLOB)
"""

TABLES = tuple(statement.strip() for statement in _SCHEMA.split(";"))
"""The statements that make the tables. `entries.version` is the value of `service.version` at the last change."""

MAX_VERSION = 1 << 61
"""The end of the version counter: above it are the values that the version table draws."""

BUSY_SECONDS = 2.0
"""How long opening waits for transactions of other processes, which take well under 1 ms."""

LOG_PAGES = 200
"""How many pages of 4 KiB the log holds before its content goes into the database: with SQLite's own 1000 pages the log
alone fills a disk of 4 MB, and a full disk keeps the log from being emptied."""

_PARTS = ("", "-wal", "-shm", "-generations")
_VERSION_TABLE = "-generations"


class DamagedError(sqlite3.DatabaseError):
    """The tables hold what no version of this package writes."""


class _UnusableError(Exception):
    """The file cannot be used, and is to be set aside."""


class _OutdatedError(_UnusableError):
    """The file is of an earlier release: no sign of damage."""


@dataclass(slots=True, eq=False)
class OpenFile:
    """A state file that was found in order.

    Attributes:
        path: Where it is.
        inode: Device and inode of the database.
        identity: 16 bytes that tell the database from every other.
        versions: The version table.
        polled_version: The version counter up to which `poll` has looked; at first that of the opening.
        set_aside: What was set aside on the way, in sentences for people; mostly nothing.
        damaged: Whether something was set aside because of damage.
        polled: Per storage key the version that `poll` need not report any more.
    """

    path: Path
    inode: tuple[int, int] | None
    identity: bytes
    versions: VersionTable
    polled_version: int
    set_aside: tuple[str, ...] = ()
    damaged: bool = False
    polled: dict[str, int] = field(default_factory=dict)

    def connect(self, wait_seconds: float) -> sqlite3.Connection:
        """Open a connection that waits so long for locks.

        Commits reach the operating system and no further (`synchronous = NORMAL`): they survive the death of any
        process. A power cut may take those since the last checkpoint and leaves the database whole; after it no value
        is fresh.

        Raises:
            sqlite3.Error: It cannot be opened, or another file has its name.
        """
        connection = _connect(self.path, wait_seconds)
        try:
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
            # an inode is used again once the last connection to it is closed, so its number is not enough
            if not self.has_its_name() or _service(connection)[0] != self.identity:
                raise sqlite3.OperationalError("another file has its name")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def has_its_name(self) -> bool:
        """Return whether the database still is the file at its path."""
        return _inode(self.path) == self.inode

    def is_in_place(self) -> bool:
        """Return whether the database and its version table still are the files at their paths."""
        return self.has_its_name() and self.versions.is_in_place(_beside(self.path, _VERSION_TABLE))


def _connect(path: Path, wait_seconds: float) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=rw", uri=True, timeout=wait_seconds, isolation_level=None, check_same_thread=False
    )
    connection.text_factory = bytes  # a text that is no UTF-8 is an error of the decoder, not of the module
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Begin a transaction that writes; commit it at the end, roll it back on any exception."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # the connection may be lost; the first exception says why
            if connection.in_transaction:  # some errors end the transaction by themselves
                connection.execute("ROLLBACK")
        raise


def next_version(connection: sqlite3.Connection) -> int:
    """Count the version up, inside a transaction, and return it.

    Raises:
        DamagedError: The counter is not a number in range.
    """
    count = "UPDATE service SET version = version + 1 WHERE typeof(version) = 'integer' AND version BETWEEN 0 AND ?"
    if connection.execute(count, (MAX_VERSION - 2,)).rowcount != 1:
        raise DamagedError("the version counter is missing or out of range")
    version: int = connection.execute("SELECT version FROM service").fetchone()[0]
    return version


def _counter(connection: sqlite3.Connection) -> int:
    row = connection.execute("SELECT version FROM service").fetchone()
    if row is None or type(row[0]) is not int or not 0 <= row[0] < MAX_VERSION:
        raise DamagedError("the version counter is missing or out of range")
    return row[0]


def is_busy(error: sqlite3.Error) -> bool:
    """Return whether another connection holds a lock; no reason to give up the file."""
    return _code(error) in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def is_damage(error: sqlite3.Error) -> bool:
    """Return whether an error means that the file is damaged or not ours, which no waiting mends."""
    # SQLITE_ERROR: a table or column of ours is missing
    damage = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}
    return isinstance(error, DamagedError) or _code(error) in damage


def _code(error: sqlite3.Error) -> int | None:
    code = getattr(error, "sqlite_errorcode", None)  # errors of the Python module itself have none
    return None if code is None else code & 0xFF


# -- the place --------------------------------------------------------------------------------------------------------


def check_place(path: Path, mountinfo: str) -> None:
    """Refuse a place in which the store could not keep its promises; make its directory where it is missing.

    The directory must be writable by its owner alone. The sticky bit is not enough, because other users could still
    put a file of one of our names there first. Groups are refused too: no program can tell who all is in a group.

    Args:
        path: Where the state file is, or is to be.
        mountinfo: The text of `/proc/self/mountinfo`; empty where there is none.

    Raises:
        StoreError: The place or a file in it is not acceptable.
        OSError: The place cannot be looked at, or the directory cannot be made.
    """
    if sys.platform == "win32":
        raise StoreError("the sqlite store needs a POSIX system; use redis:// or memory:// here")
    if not path.is_absolute():
        raise StoreError(f"{path} is not an absolute path; name the file as sqlite:////var/lib/external-oms/state.db")
    directory = Path(os.path.realpath(path.parent))
    kind = network_file_system(directory, mountinfo)
    if kind is not None:
        raise StoreError(
            f"{path} is on a network file system ({kind}): memory and locks are not shared between hosts there, so "
            "invalidations would go unseen; name a local directory, or use redis:// for several hosts"
        )
    with suppress(FileExistsError):
        try:
            directory.mkdir(mode=0o700)
        except (FileNotFoundError, NotADirectoryError) as error:  # one level is made: more of them is a mistyped path
            raise StoreError(
                f"{directory.parent} is missing or not a directory; create it, or correct the path of the store"
            ) from error
    found = directory.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise StoreError(f"{directory} is not a directory; correct the path of the store")
    if found.st_uid != os.geteuid():
        raise StoreError(f"{directory} belongs to another user; name a directory of the user that runs the service")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StoreError(f"{directory} can be written by other users; run `chmod go-w {directory}`, or name another")
    for part in (*_PARTS, ".lock"):
        _check_file(_beside(path, part))


def _check_file(path: Path) -> None:
    """Refuse something that is not a file of this user alone.

    Raises:
        StoreError: There is such a thing.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode):
        what = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "not a regular file"
        raise StoreError(f"{path} is {what}; name the file itself, or remove it")
    if found.st_uid != os.geteuid():
        raise StoreError(f"{path} belongs to another user; name a file of the user that runs the service")
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):  # also to read: an open descriptor is enough to hold a lock
        raise StoreError(f"{path} is open to other users; find out why, then run `chmod 600 {path}`")


def _beside(path: Path, part: str) -> Path:
    return path.with_name(f"{path.name}{part}")


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if found.st_size else None  # a database that was cut to nothing is gone


# -- opening ----------------------------------------------------------------------------------------------------------


def open_file(path: Path, *, boot: str, clock: Clock, mountinfo: str, wait_seconds: float) -> OpenFile:
    """Open the state file, make it where it is missing, set a damaged or foreign one aside for a new one.

    Args:
        path: Where it is.
        boot: The present boot.
        clock: Tells the time.
        mountinfo: The text of `/proc/self/mountinfo`; empty where there is none.
        wait_seconds: How long to wait for another process that opens the file, >= 0.

    Raises:
        StoreBusy: The other process did not finish in time.
        StoreError: The file is of a later version, or its place is not acceptable.
        OSError: A file cannot be made, renamed or mapped.
        sqlite3.Error: The database cannot be read or written.
    """
    check_place(path, mountinfo)
    with _alone(path, wait_seconds):
        set_aside: list[str] = []
        damaged = _inode(path) is None and any(os.path.lexists(_beside(path, part)) for part in _PARTS[1:])
        if damaged:  # SQLite would delete the log of a database that is gone
            set_aside.append(_set_aside(path, f"{path} is missing or empty, and its other files are left", clock))
        try:
            identity, version = _open_database(path, boot, clock)
        except _UnusableError as reason:
            damaged = damaged or not isinstance(reason, _OutdatedError)
            set_aside.append(str(reason))
            identity, version = _open_database(path, boot, clock)
        table = _beside(path, _VERSION_TABLE)
        try:
            versions = VersionTable.open(table, identity)
        except FileNotFoundError:
            versions = VersionTable.create(table, identity)
        except PageMismatch as reason:
            damaged = True
            set_aside.append(_set_aside(path, f"{table} cannot be used: {reason}", clock, (_VERSION_TABLE,)))
            versions = VersionTable.create(table, identity)
        return OpenFile(path, _inode(path), identity, versions, version, tuple(set_aside), damaged)


@contextmanager
def _alone(path: Path, wait_seconds: float) -> Iterator[None]:
    lock = os.open(_beside(path, ".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        until = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    raise StoreBusy(f"another process is opening {path} and has not finished") from error
                time.sleep(0.005)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # to close it is not enough: a child that was forked meanwhile has it too
    finally:
        os.close(lock)


def _open_database(path: Path, boot: str, clock: Clock) -> tuple[bytes, int]:
    """Return the identity and the version counter of the database, which is made where it is missing.

    Raises:
        _UnusableError: It could not be used and was set aside; the text says so.
    """
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    # It is set aside before the connection is closed, which would write the log into the database and delete the log.
    with closing(_connect(path, BUSY_SECONDS)) as connection:
        try:
            return _bring_up(connection, boot, clock)
        except _UnusableError as reason:
            raise type(reason)(_set_aside(path, f"{path} {reason}", clock)) from reason
        except sqlite3.DatabaseError as error:
            if not is_damage(error):
                raise
            sentence = _set_aside(path, f"{path} is damaged, or not a database of this service", clock)
            raise _UnusableError(sentence) from error


def _bring_up(connection: sqlite3.Connection, boot: str, clock: Clock) -> tuple[bytes, int]:
    """Make a database ready for use, and return its identity and its version counter.

    Raises:
        _UnusableError: It is damaged, another program's, or of an earlier release.
        StoreError: It is of a later version, or on a file system without shared memory.
        sqlite3.Error: It cannot be read or written; or it is damaged, which `is_damage` tells.
    """
    ours = _pragma(connection, "application_id") == APPLICATION_ID
    present = {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master").fetchall()}
    version = int(_pragma(connection, "user_version"))
    if not ours and present:
        raise _UnusableError("is the database of another program")
    if present and version < USER_VERSION:
        raise (_OutdatedError if version else _UnusableError)(f"has tables of version {version}, of an earlier release")
    if version > USER_VERSION:
        raise StoreError(
            f"its tables are of version {version}, and this release knows version {USER_VERSION}: "
            "run the release that wrote it or a later one, or name another file"
        )
    if _pragma(connection, "journal_mode = WAL") != b"wal":
        raise StoreError("its file system has no shared memory for a write-ahead log; name a local directory")
    if not present:
        with transaction(connection):
            _make_tables(connection)
    # from here on nothing is written where nothing is to be changed: opening does not queue behind writers
    elif not present.issuperset(statement.encode() for statement in TABLES):
        raise _UnusableError("lacks tables of this service")
    if _pragma(connection, "quick_check(1)") != b"ok":
        raise _UnusableError("is damaged: its pages contradict each other")
    identity, boot_of_file = _service(connection)
    if boot_of_file != boot.encode():
        with transaction(connection):
            _rebase_after_boot(connection, boot, clock)
    return identity, _counter(connection)


def _pragma(connection: sqlite3.Connection, pragma: str) -> bytes | int:
    found: bytes | int = connection.execute(f"PRAGMA {pragma}").fetchone()[0]
    return found


def _make_tables(connection: sqlite3.Connection) -> None:
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {USER_VERSION}")
    for statement in TABLES:
        connection.execute(statement)
    # versions begin where no earlier file at this place can have got to: version words are never repeated
    first = secrets.randbits(28) << 32
    connection.execute("INSERT INTO service VALUES (1, ?, '', ?)", (secrets.token_hex(16), first))


def _service(connection: sqlite3.Connection) -> tuple[bytes, object]:
    """Return the identity of the database and the boot of its instants.

    Raises:
        sqlite3.Error: They cannot be read.
    """
    rows = connection.execute("SELECT identity, boot FROM service").fetchall()
    try:
        ((text, boot),) = rows
        identity = bytes.fromhex(text.decode())
    except (ValueError, AttributeError) as error:
        raise DamagedError("the identity is missing or malformed") from error
    if len(identity) != 16:  # noqa: PLR2004 - as the header of the version table has it
        raise DamagedError("the identity is malformed")
    return identity, boot


def _rebase_after_boot(connection: sqlite3.Connection, boot: str, clock: Clock) -> None:
    """Convert what the monotonic clock of another boot told. Rows that cannot be decoded stay as they are.

    A delivery id is remembered for its whole time once more: nobody knows how long the host was down.
    """
    now, wall = clock.monotonic(), clock.wall()
    for key, text in connection.execute("SELECT key, entry FROM entries").fetchall():
        with suppress(MalformedError):
            rebased = encode_entry(_after_boot(decode_entry(text), now, wall))
            connection.execute(
                "UPDATE entries SET version = ?, entry = ? WHERE key = CAST(? AS TEXT)",
                (next_version(connection), rebased, key),
            )
    connection.execute("UPDATE delivery_ids SET until = ?", (now + DELIVERY_ID_SECONDS,))
    connection.execute("DELETE FROM members")
    connection.execute("UPDATE service SET boot = ?", (boot,))


def _after_boot(entry: Entry, now: float, wall: float) -> Entry:
    """Return an entry of another boot, invalidated once, without lease and back-off.

    The value is stale from now at the latest: a power cut may have taken invalidations, and wall clocks are set.
    """
    if entry.snapshot is not None:
        age_seconds = max(0.0, wall - entry.snapshot.fetched_at.timestamp())
        entry = shift(entry, now - age_seconds - entry.snapshot.read_at)
    else:
        entry = replace(entry, stale_since=None)
    failure = entry.failure
    return replace(
        entry,
        generation=entry.generation + 1,
        invalidated_at=now,
        stale_since=now if entry.stale_since is None else min(now, entry.stale_since),
        paced_until=0.0,
        failure=failure and replace(failure, failed_at=now, retry_at=now, server_retry_at=None),
        lease=None,
    )


def _set_aside(path: Path, reason: str, clock: Clock, parts: tuple[str, ...] = _PARTS) -> str:
    """Rename files that cannot be used; return the sentence that says so.

    The database goes first: SQLite removes a log by its name when its last connection closes, but not once the
    database has another name. So the log of the new file is safe from processes that have the old one open.
    """
    stamp = datetime.fromtimestamp(clock.wall(), UTC).strftime("%Y%m%dT%H%M%SZ")
    aside = path.with_name(f"{path.name}.set-aside-{stamp}")
    number = 1
    while any(os.path.lexists(_beside(aside, part)) for part in parts):
        number += 1
        aside = path.with_name(f"{path.name}.set-aside-{stamp}-{number}")
    for part in parts:
        with suppress(FileNotFoundError):
            _beside(path, part).rename(_beside(aside, part))
    return f"{reason}; it was set aside as {aside.name}{parts[0]}"
