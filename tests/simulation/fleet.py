"""One tenant's members over one Redis, event by event: every rule is the product's own, only time is made up.

What a record is worth, when it is due, whether a read is needed, how a failure backs off and what the bucket grants
comes from `external_oms`; the record in Redis is a `MemoryStore`. The model adds what lies between: a server that does
one thing at a time, the way there and back, copies that leave the server one after the other, an API that takes time.

It leaves out messages that get lost, and members whose own processors are busy.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random

from external_oms.config import Document, Failure, Reading, Snapshot
from external_oms.errors import ReadError
from external_oms.flights import LEASE_GRACE_SECONDS
from external_oms.freshness import follow_seconds
from external_oms.judgement import due_at, failure_after, is_metered, last_number, snapshot_after, verdict
from external_oms.stores.base import Acquired, Busy, Lease, Metered, Record
from external_oms.stores.memory import MemoryStore
from external_oms.stores.redis import RedisStore
from tests.simulation.costs import MEASURED, Costs

__all__ = ["Api", "Delivered", "Fleet", "Server", "answering", "hanging", "refusing"]

TENANT = "acme"
WALL = 1_780_000_000.0

Api = Callable[[float, float], tuple[float, ReadError | None]]
"""What the API does with a read that begins now, by chance: the seconds until it answers, and the error if it fails."""


def answering(_now: float, chance: float) -> tuple[float, ReadError | None]:
    """It answers within 50 to 150 ms."""
    return 0.05 + 0.1 * chance, None


def refusing(_now: float, _chance: float) -> tuple[float, ReadError | None]:
    """It is down, and says so at once."""
    return 0.01, ReadError("refused")


def hanging(_now: float, _chance: float) -> tuple[float, ReadError | None]:
    """It takes the request and never answers: the default timeout ends the read."""
    return 5.0, ReadError("timeout")


class Server:
    """One Redis: one thing at a time, in the order in which it came.

    Args:
        costs: What each thing takes.
        share: The part of its time that other tenants' work takes, 0 to below 1: it makes everything slower.
    """

    def __init__(self, costs: Costs, share: float) -> None:
        self.costs = costs
        self.longest_queue_seconds = 0.0
        self._slower = 1.0 / (1.0 - share)
        self._free_at = 0.0

    def begin(self, came: float) -> float:
        """When it turns to something that came then."""
        began = max(came, self._free_at)
        self.longest_queue_seconds = max(self.longest_queue_seconds, began - came)
        return began

    def end(self, began: float, seconds: float, copies: int = 0) -> tuple[float, float]:
        """When the answer leaves, and how long after each other the copies do."""
        answered = began + (seconds + copies * self.costs.copy_inside_seconds) * self._slower
        step = (self.costs.copy_seconds - self.costs.copy_inside_seconds) * self._slower
        self._free_at = answered + copies * step
        return answered, step


@dataclass(slots=True)
class _Version:
    """A state of the record and when each member hears of it: one after the other."""

    record: Record
    first: float
    step: float

    def heard(self, member: int) -> float:
        return self.first + self.step * member


@dataclass(slots=True)
class _Run:
    """What every member planned by one version, soonest first."""

    version: int
    plans: list[tuple[float, int]]
    at: int = 0


@dataclass(slots=True)
class _Flight:
    newer_than: int
    until: float
    denied_at: float | None = None
    ticket: int = 0


@dataclass(slots=True)
class Delivered:
    """A delivery: when it came, its generation, when it was answered, when each member had the value read after it."""

    came: float
    generation: int = 0
    answered: float | None = None
    served: list[float] = field(default_factory=list)


class _ServerClock:
    """The clock that the record in Redis goes by."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return WALL + self.now


class Fleet:
    """A tenant whose value has just been read, and its members.

    Args:
        members: How many.
        seed: What chance begins with.
        api: What the config API does.
        costs: What each step takes the server.
        share: The part of the server's time that everything else takes.
        ttl_seconds: The freshness lifetime.
        timeout_seconds: The longest that a read lasts.
        trip_seconds: There and back between a member and Redis.
        follow: How long who finds the lease busy waits before asking again.
    """

    def __init__(
        self,
        members: int,
        *,
        seed: int,
        api: Api = answering,
        costs: Costs = MEASURED,
        share: float = 0.0,
        ttl_seconds: float = 30.0,
        timeout_seconds: float = 5.0,
        trip_seconds: float = 0.0005,
        follow: Callable[[float, float, float, float], float] = follow_seconds,
    ) -> None:
        self.members = members
        self.api = api
        self.server = Server(costs, share)
        self.reads: list[float] = []
        self.counts: Counter[str] = Counter()
        self.asked_at: list[float] = []
        self.deliveries: list[Delivered] = []
        self._chance = Random(seed).random
        self._ttl_seconds = ttl_seconds
        self._timeout_seconds = timeout_seconds
        self._half_trip = trip_seconds / 2
        self._follow = follow
        self._clock = _ServerClock()
        self._store = MemoryStore(clock=self._clock)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._versions: list[_Version] = []
        self._runs: list[_Run] = []
        self._adopted: dict[int, int] = {}
        self._flights: dict[int, _Flight] = {}
        self._waiting: set[int] = set()
        self._spent: dict[int, int] = {}
        self._reader = 0
        self._begin_with_a_value()

    def _begin_with_a_value(self) -> None:
        lease = self._store.acquire(TENANT, seconds=1.0, metered=False)
        assert isinstance(lease, Lease)
        reading = Reading(Document(enabled=True), None)
        self._store.put(
            lease, snapshot_after(lease, reading, read_at=0.0, fetched_at_wall=WALL, ttl_seconds=self._ttl_seconds)
        )
        self._tell(0.0, 0.0)

    # -- time -----------------------------------------------------------------------------------------------------

    def run(self, until: float) -> None:
        """Let everything happen that happens until then."""
        while True:
            run = min((one for one in self._runs), key=_head, default=None)
            planned = _head(run) if run is not None else float("inf")
            happens = self._events[0][0] if self._events else float("inf")
            if min(planned, happens) > until:
                return
            if happens <= planned:
                when, _, what = heapq.heappop(self._events)
                what(when)
            elif run is not None:
                when, member = run.plans[run.at]
                run.at += 1
                if run.at == len(run.plans) or self._is_over(run, when):
                    self._runs.remove(run)
                self._fall_due(member, run.version, when)

    def _is_over(self, run: _Run, now: float) -> bool:
        """Whether everybody has heard of something newer."""
        return run.version < len(self._versions) - 1 and self._versions[run.version + 1].heard(self.members - 1) < now

    def _at(self, when: float, what: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    # -- what members know ----------------------------------------------------------------------------------------

    def _known(self, member: int, now: float) -> int:
        """The latest version that a member has heard of or was answered with."""
        least = self._adopted.get(member, 0)
        for number in range(len(self._versions) - 1, least, -1):
            if self._versions[number].heard(member) <= now:
                return number
        return least

    def _tell(self, answered: float, step: float) -> None:
        """The record has changed: everybody hears of it, one after the other, and plans by it."""
        version = _Version(self._store.load(TENANT), answered + self._half_trip, step)
        self._versions.append(version)
        number, foreign = len(self._versions) - 1, replace(version.record, foreign=True)
        plans = []
        for member in range(self.members):
            record = version.record if member == self._reader else foreign
            plans.append((self._due(record, version.heard(member)), member))
        plans.sort()
        self._runs.append(_Run(number, plans))
        self.counts["copies"] += self.members
        for member in self._waiting:
            self._at(version.heard(member), partial(self._wake, member, self._flights[member].ticket))
        self._note_served(version)

    def _due(self, record: Record, now: float) -> float:
        return due_at(record, now=now, random=self._chance(), spread_seconds=RedisStore.spread_seconds)

    def _note_served(self, version: _Version) -> None:
        snapshot = version.record.snapshot
        for delivery in self.deliveries:
            if not delivery.served and snapshot and delivery.generation and snapshot.generation >= delivery.generation:
                delivery.served = [version.heard(member) for member in range(self.members)]

    # -- a member falls due and flies -----------------------------------------------------------------------------

    def _fall_due(self, member: int, version: int, now: float) -> None:
        if self._known(member, now) != version:
            return
        self._spent[member] = version
        if member not in self._flights:
            self._join(member, now)

    def _join(self, member: int, now: float) -> None:
        record = self._versions[self._known(member, now)].record
        self._flights[member] = _Flight(last_number(record), now + 2 * self._timeout_seconds)
        self._begin(member, now)

    def _begin(self, member: int, now: float) -> None:
        flight, record = self._flights[member], self._versions[self._known(member, now)].record
        if verdict(record, newer_than=flight.newer_than, forced=False, now=now)[0] or now >= flight.until:
            self._end(member, now)
            return
        self._at(now + self._half_trip, partial(self._acquire, member, is_metered(record)))

    def _acquire(self, member: int, metered: bool, now: float) -> None:
        self.counts["asks"] += 1
        self.asked_at.append(now)
        self._clock.now = began = self.server.begin(now)
        life = self._timeout_seconds + LEASE_GRACE_SECONDS
        acquired = self._store.acquire(TENANT, seconds=life, metered=metered)
        costs = self.server.costs
        takes = costs.script_seconds if isinstance(acquired, Lease) else costs.refused_seconds
        answered, _ = self.server.end(began, takes)
        answer = partial(self._answered, member, acquired, len(self._versions) - 1)
        self._at(answered + self._half_trip, answer)

    def _answered(self, member: int, acquired: Acquired, version: int, now: float) -> None:
        self._adopted[member] = max(version, self._adopted.get(member, 0))
        flight = self._flights[member]
        if isinstance(acquired, Lease):
            if verdict(acquired.record, newer_than=flight.newer_than, forced=False, now=now)[0]:
                self._at(now + self._half_trip, partial(self._release, acquired))
                self._end(member, now)
                return
            self.reads.append(now)
            seconds, error = self.api(now, self._chance())
            self._at(now + seconds, partial(self._read, member, acquired, error, now))
        elif isinstance(acquired, Metered):
            self._at(now + acquired.wait_seconds, partial(self._begin, member))
        else:
            self._wait(member, flight, acquired, now)

    def _wait(self, member: int, flight: _Flight, busy: Busy, now: float) -> None:
        """Until something is heard, or it is time to ask again."""
        since = flight.denied_at = now if flight.denied_at is None else flight.denied_at
        pause = self._follow(now - since, busy.remaining_seconds, RedisStore.spread_seconds, self._chance())
        flight.ticket += 1
        self._waiting.add(member)
        self._at(now + pause, partial(self._wake, member, flight.ticket))
        hears = self._versions[-1].heard(member)
        if hears > now:
            self._at(hears, partial(self._wake, member, flight.ticket))

    def _wake(self, member: int, ticket: int, now: float) -> None:
        flight = self._flights.get(member)
        if flight is not None and flight.ticket == ticket and member in self._waiting:
            self._waiting.discard(member)
            self._begin(member, now)

    def _release(self, lease: Lease, now: float) -> None:
        self.counts["releases"] += 1
        self._clock.now = began = self.server.begin(now)
        self._store.release(lease)
        self._tell(*self.server.end(began, self.server.costs.script_seconds, self.members))

    def _read(self, member: int, lease: Lease, error: ReadError | None, read_at: float, now: float) -> None:
        outcome: Snapshot | Failure
        if error is None:
            reading = Reading(Document(enabled=True), None)
            outcome = snapshot_after(
                lease, reading, read_at=read_at, fetched_at_wall=WALL + read_at, ttl_seconds=self._ttl_seconds
            )
        else:
            outcome = failure_after(
                lease, error, now=now, now_wall=WALL + now, cap_seconds=self._ttl_seconds, random=self._chance()
            )
        self._at(now + self._half_trip, partial(self._store_outcome, member, lease, outcome))

    def _store_outcome(self, member: int, lease: Lease, outcome: Snapshot | Failure, now: float) -> None:
        self.counts["stores"] += 1
        self._clock.now = began = self.server.begin(now)
        if isinstance(outcome, Snapshot):
            kept = self._store.put(lease, outcome)
            self._reader = member if kept else self._reader
        else:
            kept = self._store.fail(lease, outcome)
        answered, step = self.server.end(began, self.server.costs.script_seconds, self.members if kept else 0)
        if kept:
            self._tell(answered, step)
        version = len(self._versions) - 1
        self._at(answered + self._half_trip, partial(self._stored, member, kept, version))

    def _stored(self, member: int, kept: bool, version: int, now: float) -> None:
        self._adopted[member] = version
        if kept:
            self._end(member, now)
        else:
            self._begin(member, now)

    def _end(self, member: int, now: float) -> None:
        """The flight is over; who has nothing planned by what is known now plans anew."""
        del self._flights[member]
        self._waiting.discard(member)
        version = self._known(member, now)
        record = self._versions[version].record
        for delivery in self.deliveries:
            has = record.snapshot is not None and record.snapshot.generation >= delivery.generation
            if delivery.generation and delivery.answered is None and has:
                delivery.answered = now
        if self._spent.get(member) == version:
            due = self._due(replace(record, foreign=member != self._reader), now)
            self._at(due, partial(self._fall_due, member, version))

    # -- what is done to it ---------------------------------------------------------------------------------------

    def deliver(self, when: float, member: int) -> Delivered:
        """A delivery reaches a member then: it invalidates, and reads at once."""
        delivery = Delivered(when)
        self.deliveries.append(delivery)
        self._at(when + self._half_trip, partial(self._invalidate, member, delivery))
        return delivery

    def _invalidate(self, member: int, delivery: Delivered, now: float) -> None:
        self.counts["invalidations"] += 1
        self._clock.now = began = self.server.begin(now)
        delivery.generation = self._store.invalidate(TENANT)
        answered, step = self.server.end(began, self.server.costs.script_seconds, self.members)
        self._tell(answered, step)
        self._at(answered + self._half_trip, partial(self._validate, member, len(self._versions) - 1))

    def _validate(self, member: int, version: int, now: float) -> None:
        self._adopted[member] = max(version, self._adopted.get(member, 0))
        if member not in self._flights:
            self._join(member, now)


def _head(run: _Run) -> float:
    return run.plans[run.at][0]
