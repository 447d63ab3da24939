"""A fleet whose Redis is away: each member reads by itself, and offers what it has read when Redis is back.

Members do not meet meanwhile, so each is followed on its own; the rules are the product's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from random import Random

from external_oms.config import Document, Reading, Snapshot
from external_oms.freshness import Windows
from external_oms.judgement import due_at, parting_seconds, snapshot_after
from external_oms.stores.base import Lease, Record
from external_oms.stores.redis import RedisStore
from external_oms.stores.redis_follow import AGAIN
from external_oms.stores.redis_mirror import supersedes
from tests.simulation.fleet import TENANT, WALL
from tests.support.scripted import WINDOWS

__all__ = ["Outage", "outage"]


@dataclass(frozen=True, slots=True)
class Outage:
    """What members did while Redis was away.

    Attributes:
        reads: When each read began, in order.
        accepted: Offers that Redis took when it was back; each is told to everybody.
        rejoined: When each member was back.
    """

    reads: list[float]
    accepted: int
    rejoined: list[float]

    @property
    def most_in_a_second(self) -> int:
        """Reads in the busiest second."""
        return max(Counter(int(read) for read in self.reads).values(), default=0)


def outage(
    members: int,
    *,
    seed: int,
    away_at: float = 12.0,
    back_at: float = 312.0,
    windows: Windows = WINDOWS,
    bound_seconds: float = 5.0,
    parting: bool = True,
) -> Outage:
    """Members that have all just heard of one value; Redis goes away before it is due.

    Args:
        members: How many.
        seed: What chance begins with.
        away_at: When Redis goes away, in seconds since the value was read; before anybody is due.
        back_at: When it answers again.
        windows: The windows in force.
        bound_seconds: The store's bound.
        parting: Whether members part, as they do; False shows what would happen else.
    """
    chance = Random(seed).random
    shared = _read(Record(reads=1), 0.0, windows)
    reads: list[float] = []
    offers: list[tuple[float, Snapshot]] = []
    for _ in range(members):
        rejoins = back_at + chance() * bound_seconds * (AGAIN[0] + (AGAIN[1] - AGAIN[0]) * chance())
        record = replace(shared, foreign=True)
        due = due_at(record, now=away_at, random=chance(), spread_seconds=RedisStore.spread_seconds)
        if parting:
            due += parting_seconds(record, random=chance(), windows=windows)
        while due < rejoins:
            reads.append(due)
            record = _read(record, due, windows)
            due = due_at(record, now=due, random=chance(), spread_seconds=RedisStore.spread_seconds)
        if record.snapshot is not None:
            offers.append((rejoins, record.snapshot))
    reads.sort()
    offers.sort(key=lambda offer: offer[0])
    return Outage(reads, _accepted(offers, shared.snapshot), [rejoins for rejoins, _ in offers])


def _read(record: Record, now: float, windows: Windows) -> Record:
    lease = Lease(TENANT, record.reads, record)
    snapshot = snapshot_after(
        lease,
        Reading(Document(enabled=True), None),
        read_at=now,
        fetched_at_wall=WALL + now,
        ttl_seconds=windows.ttl_seconds,
    )
    return replace(record, snapshot=snapshot, foreign=False)


def _accepted(offers: list[tuple[float, Snapshot]], kept: Snapshot | None) -> int:
    accepted = 0
    for _, offer in offers:
        if supersedes(offer, kept):
            kept = offer
            accepted += 1
    return accepted
