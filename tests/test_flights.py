"""Flights by hand: who joins which, what ends one without a read, what begins it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest

from external_oms.config import Document, Reading
from external_oms.errors import MalformedAnswer, RateLimited, ReadError, Unavailable
from external_oms.flights import Flight, Flights, Pause, ReadEnd
from external_oms.stores.base import Lease
from external_oms.stores.memory import MemoryStore
from tests.support.clock import FakeClock

TENANT = "acme"
ON = Reading(Document(enabled=True))


@dataclass
class HandRunner:
    """Keeps jobs for the test to run."""

    jobs: list[Callable[[], None]] = field(default_factory=list)
    due: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def submit(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)

    def at(self, when: float, job: Callable[[], None]) -> None:
        self.due.append((when, job))

    def wake(self) -> None: ...

    def start(self) -> None: ...

    def after_fork(self) -> None: ...

    def reopen(self) -> None: ...

    def close(self, seconds: float) -> None: ...


class Airport:
    """Flights over a memory store, a source that the test scripts, and a runner that the test moves."""

    def __init__(self, clock: FakeClock, store: MemoryStore | None = None) -> None:
        self.clock = clock
        self.store = store or MemoryStore(clock=clock)
        self.runner = HandRunner()
        self.outcome: Callable[[], Reading] = lambda: ON
        self.etags: list[str | None] = []
        self.landed: list[str] = []
        self.ended: list[ReadEnd] = []
        self.flights = Flights(
            tenants=[TENANT],
            store=self.store,
            source=self._source,
            runner=self.runner,
            clock=clock,
            random=lambda: 0.0,
            ttl_seconds=30.0,
            timeout_seconds=5.0,
            landed=self.landed.append,
        )
        self.flights.ended.listen(self.ended.append)

    def _source(self, tenant: str, etag: str | None) -> Reading:
        assert tenant == TENANT
        self.etags.append(etag)
        return self.outcome()

    def fail_with(self, error: Exception) -> None:
        def raises() -> Reading:
            raise error

        self.outcome = raises

    def join(self, *, forced: bool = False, newer_than: int = 0) -> Flight:
        record = self.store.load(TENANT)
        return self.flights.join(TENANT, generation=record.generation, newer_than=newer_than, forced=forced)

    def begun(self, flight: Flight) -> Lease:
        flight.until = self.clock.monotonic() + 10.0
        lease = self.flights.begin(flight)
        assert isinstance(lease, Lease)
        return lease

    def complete(self, flight: Flight, lease: Lease, outcome: Reading | ReadError = ON) -> bool:
        now, wall = self.clock.monotonic(), self.clock.wall()
        return self.flights.complete(flight, lease, outcome, read_at=now, read_at_wall=wall)


@pytest.fixture
def airport(clock: FakeClock) -> Airport:
    return Airport(clock)


def test_all_who_come_before_the_read_begins_share_one_flight(airport: Airport) -> None:
    first = airport.join()
    assert airport.join() is first
    assert airport.join(forced=True) is first
    assert len(airport.runner.jobs) == 1


def test_a_forced_refresh_never_joins_a_read_that_has_begun(airport: Airport) -> None:
    first = airport.join()
    airport.begun(first)
    assert airport.join() is first
    second = airport.join(forced=True)
    assert second is not first
    assert airport.join(forced=True) is second


def test_who_knows_a_newer_generation_does_not_join_an_older_read(airport: Airport) -> None:
    first = airport.join()
    airport.begun(first)
    airport.store.invalidate(TENANT)
    assert airport.join() is not first


def test_the_flight_that_follows_starts_when_the_first_has_ended_and_only_once(airport: Airport) -> None:
    first = airport.join()
    lease = airport.begun(first)
    second = airport.join(forced=True, newer_than=lease.number)
    assert len(airport.runner.jobs) == 1
    assert airport.complete(first, lease)
    assert first.done.result(0) is None
    assert len(airport.runner.jobs) == 2
    assert not second.done.done()
    airport.runner.jobs[1]()
    assert second.done.result(0) is None
    assert second.read_number == lease.number + 1


def test_a_read_that_an_invalidation_overtook_begins_again_and_is_not_stored(airport: Airport) -> None:
    flight = airport.join()
    lease = airport.begun(flight)
    airport.store.invalidate(TENANT)
    assert not airport.complete(flight, lease)
    assert airport.store.load(TENANT).snapshot is None
    assert airport.ended == []
    assert airport.join() is flight, "it is open to newcomers again"
    assert airport.complete(flight, airport.begun(flight))
    snapshot = airport.store.load(TENANT).snapshot
    assert snapshot is not None
    assert snapshot.generation == 1


def test_a_read_that_invalidations_overtake_for_ever_ends_with_an_error(airport: Airport, clock: FakeClock) -> None:
    flight = airport.join()
    lease = airport.begun(flight)
    airport.store.invalidate(TENANT)
    clock.advance(11.0)
    assert airport.complete(flight, lease)
    assert isinstance(flight.done.result(0), Unavailable)


def test_another_holder_makes_the_flight_wait_and_its_result_ends_it_without_a_read(airport: Airport) -> None:
    other = airport.store.acquire(TENANT, seconds=7.0, metered=False)
    assert isinstance(other, Lease)
    flight = airport.join()
    flight.until = airport.clock.monotonic() + 10.0
    pause = airport.flights.begin(flight)
    assert isinstance(pause, Pause)
    assert not pause.metered
    twin = Airport(airport.clock, airport.store)
    twin.complete(twin.join(), other)
    assert airport.flights.begin(flight) is None
    assert flight.done.result(0) is None
    assert flight.read_number is None
    assert airport.etags == []


def test_a_forced_flight_does_not_take_the_result_of_the_read_it_found_under_way(airport: Airport) -> None:
    other = airport.store.acquire(TENANT, seconds=7.0, metered=False)
    assert isinstance(other, Lease)
    flight = airport.join(forced=True)  # its caller knows of no read: as over a network, where news take a moment
    flight.until = airport.clock.monotonic() + 10.0
    assert isinstance(airport.flights.begin(flight), Pause)
    twin = Airport(airport.clock, airport.store)
    twin.complete(twin.join(), other)
    assert isinstance(airport.flights.begin(flight), Lease)


def test_the_failure_of_another_process_serves_here_too(airport: Airport) -> None:
    other = airport.store.acquire(TENANT, seconds=7.0, metered=False)
    assert isinstance(other, Lease)
    flight = airport.join()
    flight.until = airport.clock.monotonic() + 10.0
    assert isinstance(airport.flights.begin(flight), Pause)
    twin = Airport(airport.clock, airport.store)
    twin.complete(twin.join(), other, MalformedAnswer("not JSON", status=200))
    assert airport.flights.begin(flight) is None
    error = flight.done.result(0)
    assert isinstance(error, MalformedAnswer)
    assert error.status == 200


def test_a_holder_that_dies_frees_the_read_when_its_lease_ends(airport: Airport, clock: FakeClock) -> None:
    assert isinstance(airport.store.acquire(TENANT, seconds=7.0, metered=False), Lease)
    flight = airport.join()
    flight.until = clock.monotonic() + 10.0
    pause = airport.flights.begin(flight)
    assert isinstance(pause, Pause)
    clock.advance(7.0)
    assert isinstance(airport.flights.begin(flight), Lease)


def test_a_flight_that_waits_too_long_for_another_holder_ends_with_an_error(airport: Airport, clock: FakeClock) -> None:
    airport.store.acquire(TENANT, seconds=70.0, metered=False)
    flight = airport.join()
    flight.until = clock.monotonic() + 10.0
    clock.advance(10.0)
    assert airport.flights.begin(flight) is None
    assert isinstance(flight.done.result(0), Unavailable)


def test_during_back_off_a_flight_shares_the_failure_and_a_forced_one_tries(airport: Airport) -> None:
    airport.fail_with(Unavailable("down"))
    flight = airport.join()
    airport.flights.fly(flight)
    assert isinstance(flight.done.result(0), Unavailable)
    again = airport.join(newer_than=1)
    airport.flights.fly(again)
    assert isinstance(again.done.result(0), Unavailable)
    assert len(airport.etags) == 1
    forced = airport.join(forced=True, newer_than=1)
    airport.flights.fly(forced)
    assert len(airport.etags) == 2


def test_a_wait_that_the_api_asked_for_binds_a_forced_flight_too(airport: Airport) -> None:
    airport.fail_with(RateLimited("429", status=429, retry_after_seconds=60.0))
    airport.flights.fly(airport.join())
    forced = airport.join(forced=True, newer_than=1)
    airport.flights.fly(forced)
    error = forced.done.result(0)
    assert isinstance(error, RateLimited)
    assert error.retry_after_seconds == pytest.approx(60.0)
    assert len(airport.etags) == 1


def test_an_empty_bucket_puts_the_read_off_and_it_follows_by_itself(airport: Airport, clock: FakeClock) -> None:
    airport.flights.fly(airport.join())
    for _ in range(5):
        airport.store.invalidate(TENANT)
        airport.flights.fly(airport.join(newer_than=100))
    assert len(airport.etags) == 6
    airport.store.invalidate(TENANT)
    flight = airport.join(newer_than=6)
    airport.flights.fly(flight)
    assert flight.heard.result(0) is False
    assert not flight.done.done()
    when, job = airport.runner.due[-1]
    assert when == pytest.approx(clock.monotonic() + 1.0)
    clock.advance(1.0)
    airport.runner.jobs.clear()
    job()
    airport.runner.jobs[0]()
    assert flight.done.result(0) is None
    assert len(airport.etags) == 7


def test_a_defect_in_the_source_ends_the_flight_and_is_logged(
    airport: Airport, caplog: pytest.LogCaptureFixture
) -> None:
    airport.fail_with(ZeroDivisionError("a secret may stand here"))
    flight = airport.join()
    airport.flights.fly(flight)
    error = flight.done.result(0)
    assert isinstance(error, Unavailable)
    assert "secret" not in str(error)
    assert "defect" in caplog.text


def test_the_validator_of_the_stored_snapshot_is_sent_and_304_makes_it_fresh_again(
    airport: Airport, clock: FakeClock
) -> None:
    airport.outcome = lambda: Reading(Document(enabled=True), '"v1"')
    airport.flights.fly(airport.join())
    clock.advance(40.0)
    airport.outcome = lambda: Reading(None, None)
    airport.flights.fly(airport.join(newer_than=1))
    assert airport.etags == [None, '"v1"']
    snapshot = airport.store.load(TENANT).snapshot
    assert snapshot is not None
    assert snapshot.enabled
    assert snapshot.etag == '"v1"'
    assert snapshot.read_at == clock.monotonic()


def test_closing_wakes_whoever_waits(airport: Airport) -> None:
    first = airport.join()
    lease = airport.begun(first)
    second = airport.join(forced=True)
    airport.flights.close()
    assert isinstance(first.done.result(0), Unavailable)
    assert isinstance(second.done.result(0), Unavailable)
    assert second.heard.result(0) is False
    assert airport.complete(first, lease), "what was under way ends unheard"


def test_a_forked_child_knows_no_flight_of_the_parent(airport: Airport) -> None:
    parents = airport.join()
    airport.flights.after_fork()
    assert airport.join() is not parents


def test_a_job_submitted_is_the_flight_itself(airport: Airport) -> None:
    flight = airport.join()
    (job,) = airport.runner.jobs
    assert isinstance(job, partial)
    job()
    assert flight.done.result(0) is None
    assert airport.landed == [TENANT]
    assert [end.lease.number for end in airport.ended] == [1]


def test_a_flight_that_finds_the_lease_taken_says_so_once(airport: Airport) -> None:
    told: list[str] = []
    airport.flights.waits.listen(told.append)
    other = airport.store.acquire(TENANT, seconds=7.0, metered=False)
    assert isinstance(other, Lease)
    flight = airport.join()
    flight.until = airport.clock.monotonic() + 10.0
    for _ in range(3):
        assert isinstance(airport.flights.begin(flight), Pause)
    assert told == [TENANT]
    airport.store.release(other)
    assert isinstance(airport.flights.begin(flight), Lease)
    assert told == [TENANT]
