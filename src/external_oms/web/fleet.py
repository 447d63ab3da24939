"""What the page knows beyond a state: who of the fleet serves what and lags, and how this process's last reads went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from external_oms.cache import Cache, Change
from external_oms.clock import Clock
from external_oms.entry import last_token
from external_oms.heartbeat import MemberStatus, member_status
from external_oms.records import Member
from external_oms.singleflight import ReadEnd
from external_oms.stores.base import Store

__all__ = ["Fleet", "Shown"]

KEEP_SECONDS = 0.5
"""How long an answer of the store is used again: fifty pages that look at once are one question."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A member as it is shown.

    Attributes:
        member: What it reported.
        status: Whether it is current, lags or is silent.
        age_seconds: The age of its value now, >= 0; None without one.
    """

    member: Member
    status: MemberStatus
    age_seconds: float | None


class Fleet:
    """The members, as one process sees them.

    Args:
        cache: The cache of this process.
        store: Where members report.
        clock: What tells the time.
    """

    def __init__(self, cache: Cache, store: Store, clock: Clock) -> None:
        self._cache = cache
        self._tenants = frozenset(cache.tenants)
        self._store = store
        self._clock = clock
        self._since: dict[str, tuple[int, float]] = {}
        self._reads: dict[str, ReadEnd] = {}
        self._kept: dict[str | None, tuple[float, Sequence[Member]]] = {}
        cache.changes.subscribe(self._changed)
        cache.reads.subscribe(self._read_ended)

    def last_read(self, tenant: str) -> ReadEnd | None:
        """The last read of the tenant, where this process made it; None where another did, or nobody."""
        end, entry = self._reads.get(tenant), self._cache.peek(tenant).entry
        return end if end is not None and end.outcome.token == last_token(entry) else None

    def members(self, tenant: str | None = None) -> list[Shown]:
        """Every living member and what it serves, of one tenant or of all, in the order of their names."""
        now = self._clock.monotonic()
        kept = self._kept.get(tenant)
        if kept is None or now - kept[0] >= KEEP_SECONDS:
            kept = self._kept[tenant] = (now, self._store.members(tenant))
        found = sorted(kept[1], key=lambda member: (member.name, member.tenant))
        return [self._shown(member, now) for member in found if member.tenant in self._tenants]

    def _shown(self, member: Member, now: float) -> Shown:
        generation, since = self._since.get(member.tenant, (0, now))
        status = member_status(member, generation=generation, since_seconds=now - since)
        age = None if member.age_seconds is None else member.age_seconds + member.seen_seconds
        return Shown(member, status, age)

    def _changed(self, change: Change) -> None:
        snapshot = change.evaluation.entry.snapshot
        if snapshot is not None and snapshot.generation > self._since.get(change.tenant, (-1, 0.0))[0]:
            self._since[change.tenant] = (snapshot.generation, self._clock.monotonic())

    def _read_ended(self, end: ReadEnd) -> None:
        self._reads[end.tenant] = end
