"""What the file keeps beside the tenants' records: history, capped by rows and age, and who serves what."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from external_oms.stores.base import Cause, Event, Member

__all__ = ["Caps", "append", "history", "members", "report"]

MEMBER_SECONDS = 60.0
"""How long a member is remembered without a new report."""

PRUNE_EVERY = 64
"""History is pruned on every so many rows; readers do not see what is due to go."""


@dataclass(frozen=True, slots=True)
class Caps:
    """How much history is kept: rows, >= 1, and seconds, > 0."""

    rows: int
    seconds: float


def history(
    connection: sqlite3.Connection, caps: Caps, wall: float, tenant: str | None, limit: int, before: int | None
) -> tuple[Event, ...]:
    """Rows of history, newest first, and none that the caps exclude."""
    last = connection.execute("SELECT max(id) FROM history").fetchone()[0] or 0
    rows = connection.execute(
        "SELECT at, tenant, cause, enabled, actor, delivery_id, latency_seconds, detail, id FROM history"
        " WHERE id > ? AND id < ? AND at >= ? AND (? IS NULL OR tenant = ?) ORDER BY id DESC LIMIT ?",
        (last - caps.rows, last + 1 if before is None else before, wall - caps.seconds, tenant, tenant, limit),
    )
    return tuple(
        Event(datetime.fromtimestamp(at, UTC), of, Cause(cause), None if enabled is None else bool(enabled), *rest)
        for at, of, cause, enabled, *rest in rows
    )


def members(connection: sqlite3.Connection, tenant: str | None, now: float) -> tuple[Member, ...]:
    """Who reported within the last minute."""
    rows = connection.execute(
        "SELECT name, tenant, generation, enabled, freshness, age_seconds, seen_at FROM members"
        " WHERE seen_at > ? AND (? IS NULL OR tenant = ?) ORDER BY name, tenant",
        (now - MEMBER_SECONDS, tenant, tenant),
    )
    return tuple(
        Member(name, of, generation, None if enabled is None else bool(enabled), fresh, age, now - seen_at)
        for name, of, generation, enabled, fresh, age, seen_at in rows
    )


def append(connection: sqlite3.Connection, event: Event, caps: Caps, wall: float) -> None:
    """Add a row of history."""
    added = connection.execute(
        "INSERT INTO history (at, tenant, cause, enabled, actor, delivery_id, latency_seconds, detail)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            event.at.timestamp(),
            event.tenant,
            event.cause.value,
            event.enabled,
            event.actor,
            event.delivery_id,
            event.latency_seconds,
            event.detail,
        ),
    )
    last = added.lastrowid or 0
    if last % PRUNE_EVERY == 0:
        connection.execute("DELETE FROM history WHERE id <= ? OR at < ?", (last - caps.rows, wall - caps.seconds))


def report(connection: sqlite3.Connection, members: Sequence[Member], now: float) -> None:
    """Say what a process serves; forget those that have been silent."""
    connection.execute("DELETE FROM members WHERE seen_at <= ?", (now - MEMBER_SECONDS,))
    connection.executemany(
        "REPLACE INTO members VALUES (?, ?, ?, ?, ?, ?, ?)",
        [(one.name, one.tenant, one.generation, one.enabled, one.freshness, one.age_seconds, now) for one in members],
    )
