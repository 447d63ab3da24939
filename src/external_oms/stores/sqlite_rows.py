"""What the file keeps of a tenant, and every step that changes it: one function, one transaction, one outcome.

All instants are seconds on the monotonic clock of the present boot; whoever opens the file first after a boot converts
them. Delivery ids count on the wall clock, as the deliveries' own timestamps do.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, astuple, dataclass, fields, replace
from datetime import datetime
from typing import Generic, TypeVar

from external_oms.clock import Clock
from external_oms.config import Failure, Snapshot
from external_oms.freshness import BUCKET_BURST, bucket_take
from external_oms.stores.base import Acquired, Busy, Lease, Metered, Record
from external_oms.stores.host import is_gone

__all__ = [
    "MalformedRow",
    "Outcome",
    "Writer",
    "acquire",
    "adopt",
    "check",
    "deliver",
    "end",
    "invalidate",
    "load",
    "merge",
    "revisions",
]

T = TypeVar("T")


class MalformedRow(Exception):
    """A row is not as this package writes it."""


@dataclass(frozen=True, slots=True)
class Writer:
    """Who changes the tables.

    Attributes:
        name: One handle on the store; a snapshot that another one stored is foreign.
        process: The process, as `host.this_process` names it.
        clock: What tells it the time.
    """

    name: str
    process: str
    clock: Clock


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What a transaction gave.

    Attributes:
        result: What the caller wants.
        record: The tenant's record after it.
        before: The record's revision before it.
        after: And after it: the same where nothing was changed that others must load.
    """

    result: T
    record: Record
    before: int
    after: int


@dataclass(slots=True)
class _Row:
    """A row of `tenants`; the order of the fields is that of the columns."""

    tenant: str
    revision: int = 0
    generation: int = 0
    invalidated_at: float | None = None
    reads: int = 0
    snapshot: str | None = None
    writer: str = ""
    failure: str | None = None
    lease_number: int | None = None
    lease_until: float = 0.0
    lease_process: str = ""
    bucket_level: float = float(BUCKET_BURST)
    bucket_at: float = 0.0

    def record(self, reader: str) -> Record:
        return Record(
            generation=self.generation,
            invalidated_at=self.invalidated_at,
            reads=self.reads,
            snapshot=None if self.snapshot is None else _parse_snapshot(self.snapshot),
            failure=None if self.failure is None else _parse_failure(self.failure),
            foreign=self.snapshot is not None and self.writer != reader,
        )


_COLUMNS = ", ".join(column.name for column in fields(_Row))
_MARKS = ", ".join("?" for _ in fields(_Row))


def _text(value: Snapshot | Failure) -> str:
    return json.dumps({name: _plain(part) for name, part in asdict(value).items()})


def _plain(part: object) -> object:
    return part.isoformat() if isinstance(part, datetime) else part


def _parse_snapshot(text: str) -> Snapshot:
    try:
        parts = json.loads(text)
        updated_at = parts.pop("updated_at")
        return Snapshot(
            **parts | {"fetched_at": datetime.fromisoformat(parts["fetched_at"])},
            updated_at=None if updated_at is None else datetime.fromisoformat(updated_at),
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise MalformedRow from error


def _parse_failure(text: str) -> Failure:
    try:
        parts = json.loads(text)
        return Failure(**parts | {"since": datetime.fromisoformat(parts["since"])})
    except (ValueError, LookupError, TypeError) as error:
        raise MalformedRow from error


def _rows(connection: sqlite3.Connection) -> list[_Row]:
    return [_Row(*row) for row in connection.execute(f"SELECT {_COLUMNS} FROM tenants")]  # noqa: S608 - names of ours


def _row(connection: sqlite3.Connection, tenant: str) -> _Row:
    found = connection.execute(
        f"SELECT {_COLUMNS} FROM tenants WHERE tenant = ?",  # noqa: S608 - names of ours
        (tenant,),
    ).fetchone()
    return _Row(tenant) if found is None else _Row(*found)


def _save(connection: sqlite3.Connection, row: _Row) -> None:
    connection.execute(f"REPLACE INTO tenants ({_COLUMNS}) VALUES ({_MARKS})", astuple(row))  # noqa: S608 - names of ours


def _change(connection: sqlite3.Connection, row: _Row) -> None:
    """Save the row under a revision that no row ever had: the words of all tenants may share places."""
    connection.execute("UPDATE service SET revision = revision + 1")
    row.revision = connection.execute("SELECT revision FROM service").fetchone()[0]
    _save(connection, row)


def load(connection: sqlite3.Connection, tenant: str, reader: str) -> tuple[int, Record]:
    """A tenant's revision and record."""
    row = _row(connection, tenant)
    return row.revision, row.record(reader)


def revisions(connection: sqlite3.Connection) -> dict[str, int]:
    """Every tenant's revision."""
    return dict(connection.execute("SELECT tenant, revision FROM tenants").fetchall())


def check(connection: sqlite3.Connection) -> None:
    """Read every tenant's record.

    Raises:
        MalformedRow: One is not as this package writes it.
    """
    for row in _rows(connection):
        row.record("")


def adopt(connection: sqlite3.Connection, clock: Clock) -> None:
    """Convert every instant that another boot's clock told.

    A value counts as older than its freshness lifetime, whatever the wall clock says: a power cut may have lost
    invalidations, and wall clocks are set. Leases, back-off and buckets of another boot are void.
    """
    now, wall = clock.monotonic(), clock.wall()
    for row in _rows(connection):
        if row.snapshot is not None:
            snapshot = _parse_snapshot(row.snapshot)
            # the millisecond keeps the rounding of a subtraction from making it fresh at its very edge
            age = max(wall - snapshot.fetched_at.timestamp(), snapshot.lifetime_seconds + 1e-3)
            row.snapshot = _text(replace(snapshot, read_at=now - age))
        if row.failure is not None:
            row.failure = _text(replace(_parse_failure(row.failure), failed_at=now, not_before=now, obliged=False))
        row.invalidated_at = None if row.invalidated_at is None else now
        row.lease_number, row.bucket_level, row.bucket_at = None, float(BUCKET_BURST), now
        _change(connection, row)


# -- what changes a tenant's record; each is called inside a transaction -----------------------------------------------


def invalidate(connection: sqlite3.Connection, tenant: str, writer: Writer) -> Outcome[int]:
    """Raise the generation."""
    row = _row(connection, tenant)
    before = row.revision
    row.generation += 1
    row.invalidated_at = writer.clock.monotonic()
    _change(connection, row)
    return Outcome(row.generation, row.record(writer.name), before, row.revision)


def deliver(
    connection: sqlite3.Connection, tenant: str, delivery_id: str, seconds: float, writer: Writer
) -> Outcome[int | None]:
    """Raise the generation, unless the id is remembered."""
    wall = writer.clock.wall()
    connection.execute("DELETE FROM deliveries WHERE until <= ?", (wall,))
    told = connection.execute(
        "INSERT OR IGNORE INTO deliveries VALUES (?, ?, ?)", (tenant, delivery_id, wall + seconds)
    )
    if not told.rowcount:
        row = _row(connection, tenant)
        return Outcome(None, row.record(writer.name), row.revision, row.revision)
    raised = invalidate(connection, tenant, writer)
    return Outcome(raised.result, raised.record, raised.before, raised.after)


def acquire(
    connection: sqlite3.Connection, tenant: str, seconds: float, metered: bool, writer: Writer
) -> Outcome[Acquired]:
    """Give the lease, unless a living process holds it or the bucket is empty; others need not load anew for that."""
    row = _row(connection, tenant)
    now = writer.clock.monotonic()

    def outcome(result: Acquired) -> Outcome[Acquired]:
        return Outcome(result, row.record(writer.name), row.revision, row.revision)

    if row.lease_number is not None and now < row.lease_until and not is_gone(row.lease_process):
        return outcome(Busy(row.lease_number, row.lease_until - now))
    if metered:
        level, wait_seconds = bucket_take(row.bucket_level, now - row.bucket_at)
        if wait_seconds > 0:
            return outcome(Metered(wait_seconds))
        row.bucket_level, row.bucket_at = level, now
    row.reads += 1
    row.lease_number, row.lease_until, row.lease_process = row.reads, now + seconds, writer.process
    _save(connection, row)
    return outcome(Lease(tenant, row.reads, row.record(writer.name)))


def end(
    connection: sqlite3.Connection, lease: Lease, result: Snapshot | Failure | None, writer: Writer
) -> Outcome[bool]:
    """End the lease, and store the result where nothing fenced it off; True where it was stored."""
    row = _row(connection, lease.tenant)
    before = row.revision
    if row.reads != lease.number:  # a later lease was given, or this one's record went down with its file
        return Outcome(False, row.record(writer.name), before, before)
    row.lease_number = None
    accepted = result is not None and row.generation == lease.record.generation
    if accepted and isinstance(result, Snapshot):
        row.snapshot, row.writer, row.failure = _text(result), writer.name, None
    elif accepted and isinstance(result, Failure):
        row.failure = _text(result)
    _change(connection, row)  # also where nothing was stored: whoever waits for the lease looks again
    return Outcome(accepted, row.record(writer.name), before, row.revision)


def merge(
    connection: sqlite3.Connection, tenant: str, mine: Record, *, raised: bool, lost: bool, writer: Writer
) -> Outcome[None]:
    """Bring in what one process knows that was cut off from the file, so that nothing newer is overwritten.

    Where either side may not have seen an invalidation of the other, the generation rises above both, and what either
    has read is fresh no more.

    Args:
        connection: The connection.
        tenant: The tenant.
        mine: What the process knows.
        raised: Whether the process raised the generation while it was cut off.
        lost: Whether the file is another one than before, and lacks what was not brought in.
        writer: Who brings it in.
    """
    row = _row(connection, tenant)
    before, theirs = row.revision, row.record(writer.name)
    if raised or row.generation < mine.generation + lost:
        row.generation = max(row.generation, mine.generation) + 1
        row.invalidated_at = writer.clock.monotonic()
    row.reads = max(row.reads, mine.reads) + 1  # and no lease given on either side is valid any more
    row.lease_number = None
    if mine.snapshot is not None and (theirs.snapshot is None or theirs.snapshot.read_at < mine.snapshot.read_at):
        row.snapshot = _text(replace(mine.snapshot, read_number=row.reads))
        row.writer = "" if mine.foreign else writer.name
    if _last_end(mine) > _last_end(theirs):
        row.failure = None if mine.failure is None else _text(mine.failure)
    _change(connection, row)
    return Outcome(None, row.record(writer.name), before, row.revision)


def _last_end(record: Record) -> float:
    """When the last read ended, or for one that succeeded, began."""
    ends = [float("-inf")]
    if record.snapshot is not None:
        ends.append(record.snapshot.read_at)
    if record.failure is not None:
        ends.append(record.failure.failed_at)
    return max(ends)
