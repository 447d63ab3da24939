"""The tables, their version, and whether a file is one of ours and sound."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from external_oms.clock import Clock
from external_oms.errors import StoreError
from external_oms.stores import sqlite_rows

__all__ = ["APPLICATION_ID", "MIGRATIONS", "Unusable", "bring_up", "identity", "is_damage", "migrate", "transaction"]

APPLICATION_ID = 0x784F4D53
"""`xOMS`, in the header of every database of ours: it tells ours from another program's."""

Migration = Callable[[sqlite3.Connection], None]


class Unusable(Exception):
    """The file is damaged or not ours: to be set aside, never trusted."""


_TABLES = """
CREATE TABLE service (
    one INTEGER PRIMARY KEY CHECK (one = 1), identity TEXT NOT NULL, boot TEXT NOT NULL, revision INTEGER NOT NULL
);
CREATE TABLE tenants (
    tenant TEXT PRIMARY KEY, revision INTEGER NOT NULL, generation INTEGER NOT NULL, invalidated_at REAL,
    reads INTEGER NOT NULL, snapshot TEXT, writer TEXT NOT NULL, failure TEXT,
    lease_number INTEGER, lease_until REAL NOT NULL, lease_process TEXT NOT NULL,
    bucket_level REAL NOT NULL, bucket_at REAL NOT NULL
);
CREATE TABLE deliveries (tenant TEXT, id TEXT, until REAL NOT NULL, PRIMARY KEY (tenant, id)) WITHOUT ROWID;
CREATE INDEX deliveries_until ON deliveries (until);
CREATE TABLE history (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, tenant TEXT NOT NULL, cause TEXT NOT NULL,
    enabled INTEGER, actor TEXT NOT NULL, delivery_id TEXT NOT NULL, latency_seconds REAL, detail TEXT NOT NULL
);
CREATE INDEX history_tenant ON history (tenant, id);
CREATE INDEX history_at ON history (at);
CREATE TABLE members (
    name TEXT, tenant TEXT, generation INTEGER NOT NULL, enabled INTEGER, freshness TEXT NOT NULL, age_seconds REAL,
    seen_at REAL NOT NULL, PRIMARY KEY (name, tenant)
) WITHOUT ROWID
"""


def _version_1(connection: sqlite3.Connection) -> None:
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    for statement in _TABLES.split(";"):
        connection.execute(statement)
    # revisions begin where no earlier file at this place can have got to: words are never repeated
    connection.execute("INSERT INTO service VALUES (1, ?, '', ?)", (secrets.token_hex(16), secrets.randbits(28) << 32))


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_version_1,)
"""The n-th makes version n of the tables out of version n - 1; each runs inside a transaction."""


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """A short transaction that writes: committed at its end, rolled back where it fails."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # some failures end it by themselves
            connection.execute("ROLLBACK")
        raise


def migrate(connection: sqlite3.Connection, migrations: Sequence[Migration]) -> None:
    """Bring the tables to the present version, inside a transaction.

    Raises:
        StoreError: They are of a later version than this program knows.
    """
    version = _number(connection, "PRAGMA user_version")
    if version > len(migrations):
        raise StoreError(
            f"its tables are of version {version} and this program knows version {len(migrations)}: "
            "run the version that wrote it, or a later one, or name another file"
        )
    for number in range(version, len(migrations)):
        migrations[number](connection)
        connection.execute(f"PRAGMA user_version = {number + 1}")


def bring_up(
    connection: sqlite3.Connection, *, boot: str, clock: Clock, migrations: Sequence[Migration] = MIGRATIONS
) -> bytes:
    """Make the database ready for use: ours, sound, of the present version and boot.

    Returns:
        The 16 bytes that tell it from every other.

    Raises:
        Unusable: It is damaged, or another program's.
        StoreError: It is of a later version, or on a file system without shared memory.
        sqlite3.Error: It cannot be read or written now; or it is damaged, which `is_damage` tells.
    """
    try:
        _refuse_foreign(connection)
        if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise StoreError("its file system has no shared memory for a write-ahead log; name a local directory")
        # nothing is written where nothing is to be changed: opening does not queue behind a storm of writers
        if _number(connection, "PRAGMA user_version") != len(migrations):
            with transaction(connection):
                migrate(connection, migrations)
        if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise Unusable("its pages contradict each other")
        sqlite_rows.check(connection)
        if connection.execute("SELECT boot FROM service").fetchone() != (boot,):
            with transaction(connection):
                sqlite_rows.adopt(connection, clock)
                connection.execute("DELETE FROM members")
                connection.execute("UPDATE service SET boot = ?", (boot,))
        return identity(connection)
    except sqlite_rows.MalformedRow as error:
        raise Unusable("a row in it is not one of ours") from error


def _refuse_foreign(connection: sqlite3.Connection) -> None:
    ours = _number(connection, "PRAGMA application_id") == APPLICATION_ID
    if not ours and _number(connection, "SELECT count(*) FROM sqlite_master"):
        raise Unusable("it is another program's database")


def is_damage(error: sqlite3.Error) -> bool:
    """Whether an error of SQLite tells of a damaged or foreign file, which no waiting mends."""
    code = getattr(error, "sqlite_errorcode", None)  # errors of the module itself have none
    # ERROR: a table or a column of ours is missing
    return code is not None and code & 0xFF in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}


def identity(connection: sqlite3.Connection) -> bytes:
    """The 16 bytes that tell this database from every other."""
    found = connection.execute("SELECT identity FROM service").fetchone()
    if found is None:
        raise Unusable("it has lost its identity")
    return bytes.fromhex(found[0])


def _number(connection: sqlite3.Connection, statement: str) -> int:
    (number,) = connection.execute(statement).fetchone()
    return int(number)
