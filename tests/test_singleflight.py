"""One read at a time, by hand: who joins which flight, what ends one without a read, what makes it wait."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

import pytest

from external_oms.config import Document, Reading
from external_oms.entry import (
    PACE_BURST,
    Failure,
    Granted,
    Invalidation,
    Lease,
    Snapshot,
    begin_read,
    invalidate,
    last_token,
    release,
)
from external_oms.errors import (
    LaggingAnswer,
    MalformedAnswer,
    RateLimited,
    StoreBusy,
    StoreError,
    Unavailable,
)
from external_oms.singleflight import (
    LEASE_GRACE_SECONDS,
    LOST_LEASE_SECONDS,
    NO_STORED_RESULT,
    Flight,
    ReadEnd,
    Reader,
    Slot,
    join,
)
from external_oms.stores.memory import MemoryStore
from tests.support.clock import FakeClock
from tests.support.scripted import TENANT, WINDOWS
from tests.support.stores import FaultyStore

TIMEOUT_SECONDS = 5.0
LEASE_SECONDS = TIMEOUT_SECONDS + LEASE_GRACE_SECONDS
ON = Reading(Document(enabled=True))
OFF = Reading(Document(enabled=False))


class Process:
    """A reader, its slot, and a source that does as the test says."""

    def __init__(self, clock: FakeClock, *, data: MemoryStore | None = None, holder: str = "us") -> None:
        self.clock = clock
        self.store = FaultyStore(clock, data=data, holder=holder)
        self.slot = Slot(TENANT)
        self.source: Callable[[], Reading] = lambda: ON
        self.etags: list[str | None] = []
        self.ended: list[ReadEnd] = []
        self.lease_waits: list[str] = []
        self.reader = Reader(
            store=self.store,
            source=self._read,
            clock=clock,
            random=lambda: 0.0,
            windows=WINDOWS,
            timeout_seconds=TIMEOUT_SECONDS,
        )
        self.reader.ended.subscribe(self.ended.append)
        self.reader.lease_waits.subscribe(self.lease_waits.append)

    def _read(self, tenant: str, etag: str | None) -> Reading:
        assert tenant == TENANT
        self.etags.append(etag)
        return self.source()

    def fail_with(self, error: Exception) -> None:
        def raises() -> Reading:
            raise error

        self.source = raises

    def join(self, *, forced: bool = False, newer_than: int | None = None) -> Flight:
        """Join the flight as a caller does that knows what the store holds."""
        entry = self.store.data.load(TENANT)
        until = self.clock.monotonic() + 2 * TIMEOUT_SECONDS
        if newer_than is None:
            newer_than = entry.token if forced else last_token(entry)
        with self.slot.lock:
            return join(self.slot, generation=entry.generation, newer_than=newer_than, forced=forced, until=until)[0]

    def attempt(self, flight: Flight) -> float | None:
        return self.reader.attempt(self.slot, flight)

    def fly(self, *, forced: bool = False, newer_than: int | None = None) -> Flight:
        """A whole flight, from joining to its removal."""
        flight = self.join(forced=forced, newer_than=newer_than)
        assert self.attempt(flight) is None
        self.slot.detach(flight)
        return flight

    def invalidate(self) -> None:
        self.store.data.transact(TENANT, partial(invalidate, requests=[Invalidation()]))

    def lease_of(self, holder: str) -> Lease:
        """A read by another process, which has just begun."""
        begin = partial(
            begin_read,
            holder=holder,
            lease_seconds=LEASE_SECONDS,
            newer_than=last_token(self.store.data.load(TENANT)),
            forced=True,
        )
        outcome = self.store.data.transact(TENANT, begin)
        assert isinstance(outcome, Granted)
        return outcome.lease


@pytest.fixture
def process(clock: FakeClock) -> Process:
    return Process(clock)


# -- who joins which flight ------------------------------------------------------------------------------------------


def test_all_who_come_before_the_read_begins_share_one_flight_and_the_first_starts_it(process: Process) -> None:
    flight, starts = join(process.slot, generation=0, newer_than=0, forced=False, until=1.0)
    assert starts
    for forced, newer_than, until in ((False, 0, 1.0), (True, 4, 3.0), (False, 2, 2.0)):
        again = join(process.slot, generation=0, newer_than=newer_than, forced=forced, until=until)
        assert again == (flight, False)
    assert (flight.forced, flight.until) == (True, 3.0), "it meets the requirements of all"
    assert flight.newer_than == NO_STORED_RESULT, "a forced read takes no result that is stored already"


def test_a_caller_that_joins_during_the_look_at_the_store_is_heard(process: Process) -> None:
    """The store answered that nothing need be read; meanwhile somebody came who forces a read."""
    process.fly()
    flight = process.join(newer_than=0)
    transact = process.store.transact

    def joined_meanwhile(*given: object, **more: object) -> object:
        outcome: object = transact(*given, **more)  # type: ignore[arg-type]  # handed on as it came
        process.store.transact = transact  # type: ignore[method-assign]  # once
        assert process.join(forced=True) is flight
        return outcome

    process.store.transact = joined_meanwhile  # type: ignore[method-assign, assignment]  # to come in between
    assert process.attempt(flight) is None
    assert len(process.etags) == 2
    assert flight.token == 2


def test_a_forced_refresh_never_joins_a_read_that_has_begun(process: Process) -> None:
    first = process.join()
    seen: list[Flight] = []

    def during() -> Reading:
        assert process.join() is first, "who forces nothing shares it"
        seen.extend(process.join(forced=True) for _ in range(2))
        return ON

    process.source = during
    process.attempt(first)
    assert seen[0] is not first
    assert seen == [seen[0]] * 2


def test_a_caller_that_knows_a_newer_generation_does_not_join_an_older_read(process: Process) -> None:
    first = process.join()

    def during() -> Reading:
        process.invalidate()
        assert process.join() is not first
        return ON

    process.source = during
    process.attempt(first)


def test_the_next_flight_starts_when_the_first_is_removed_and_only_once(process: Process) -> None:
    first = process.join()
    process.source = lambda: (process.join(forced=True), ON)[1]
    process.attempt(first)
    second = process.slot.detach(first)
    assert second is not None
    assert process.slot.detach(first) is None
    process.source = lambda: ON
    assert process.attempt(second) is None
    assert second.token == 2


@pytest.mark.parametrize("satisfied", [False, True], ids=["after a read", "without one"])
def test_nobody_joins_a_flight_that_has_ended_and_is_not_removed_yet(process: Process, satisfied: bool) -> None:
    if satisfied:
        process.fly()
    first = process.join(newer_than=0)
    process.attempt(first)
    assert first.done.done()
    second = process.join(forced=True)
    assert second is not first
    assert process.join() is second
    assert process.slot.detach(first) is second, "it starts when the first is removed"
    process.attempt(second)
    assert second.token is not None, "a forced flight reads"


# -- what ends a flight ----------------------------------------------------------------------------------------------


def test_a_flight_reads_stores_and_tells_what_it_stored(process: Process, clock: FakeClock) -> None:
    def takes_a_while() -> Reading:
        clock.advance(0.25)
        return ON

    process.source = takes_a_while
    flight = process.fly()
    assert flight.done.result(0) is None
    (end,) = process.ended
    assert isinstance(end.outcome, Snapshot)
    assert process.store.data.load(TENANT).snapshot == end.outcome
    assert (end.tenant, end.latency_seconds, end.outcome.token, flight.token) == (TENANT, 0.25, 1, 1)
    assert end.outcome.read_at == clock.monotonic() - 0.25, "the age counts from the start of the read"
    assert end.before.snapshot is None


def test_a_read_that_fails_is_stored_told_and_raised_to_all_who_wait(process: Process) -> None:
    process.fail_with(Unavailable("down", status=500))
    error = process.fly().done.result(0)
    assert isinstance(error, Unavailable)
    assert (str(error), error.status) == ("down", 500)
    (end,) = process.ended
    assert isinstance(end.outcome, Failure)
    assert process.store.data.load(TENANT).failure == end.outcome


def test_an_invalidation_during_the_read_leaves_its_value_stale_and_the_flight_ends(process: Process) -> None:
    """Its callers came before the invalidation; those who came after it share the next flight."""
    flight = process.join()

    def overtaken() -> Reading:
        process.invalidate()
        return ON

    process.source = overtaken
    assert process.attempt(flight) is None
    assert flight.done.result(0) is None
    entry = process.store.data.load(TENANT)
    assert entry.snapshot is not None
    assert (entry.snapshot.generation, entry.generation) == (0, 1)


def test_a_failure_of_the_present_generation_that_is_newer_than_the_caller_knows_is_shared(process: Process) -> None:
    process.fail_with(MalformedAnswer("not JSON", status=200))
    process.fly()
    error = process.fly(newer_than=0).done.result(0)
    assert isinstance(error, MalformedAnswer)
    assert error.status == 200
    assert len(process.etags) == 1


def test_during_back_off_a_flight_shares_the_failure_and_a_forced_one_reads(process: Process) -> None:
    process.fail_with(Unavailable("down"))
    process.fly()
    assert isinstance(process.fly().done.result(0), Unavailable)
    assert len(process.etags) == 1
    process.fly(forced=True)
    assert len(process.etags) == 2


def test_a_wait_that_the_api_asked_for_binds_a_forced_flight_too(process: Process) -> None:
    process.fail_with(RateLimited("429", status=429, retry_after_seconds=60.0))
    process.fly()
    error = process.fly(forced=True).done.result(0)
    assert isinstance(error, RateLimited)
    assert error.retry_after_seconds == pytest.approx(60.0)
    assert len(process.etags) == 1


def test_a_lagging_answer_is_a_failure_that_is_stored(process: Process, clock: FakeClock) -> None:
    new, old = (datetime(2026, 1, day, tzinfo=UTC) for day in (2, 1))
    process.source = lambda: Reading(Document(True, new))
    process.fly()
    clock.advance(40.0)
    process.source = lambda: Reading(Document(False, old))
    assert isinstance(process.fly().done.result(0), LaggingAnswer)
    entry = process.store.data.load(TENANT)
    assert entry.failure is not None
    assert entry.failure.kind == "lagging"
    assert entry.snapshot is not None
    assert entry.snapshot.enabled is True


def test_the_validator_of_the_stored_value_is_sent_and_304_makes_it_fresh_again(
    process: Process, clock: FakeClock
) -> None:
    process.source = lambda: Reading(Document(enabled=True), '"v1"')
    process.fly()
    clock.advance(40.0)
    process.source = lambda: Reading(None, None)
    process.fly()
    assert process.etags == [None, '"v1"']
    snapshot = process.store.data.load(TENANT).snapshot
    assert snapshot is not None
    assert (snapshot.enabled, snapshot.etag, snapshot.read_at) == (True, '"v1"', clock.monotonic())


def test_a_bug_in_the_source_counts_as_a_failure_is_logged_and_tells_no_secret(
    process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    process.fail_with(ZeroDivisionError("a secret may stand here"))
    error = process.fly().done.result(0)
    assert isinstance(error, Unavailable)
    assert "secret" not in str(error)
    assert "bug" in caplog.text
    assert process.store.data.load(TENANT).failure is not None, "so it backs off"


def test_a_bug_in_the_store_ends_the_flight_for_all_who_wait(
    process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    process.store.fault = ZeroDivisionError()
    flight = process.join()
    with caplog.at_level(logging.ERROR, logger="external_oms"):
        assert process.attempt(flight) is None
    assert isinstance(flight.done.result(0), Unavailable)
    assert "ZeroDivisionError" in caplog.text


def test_a_flight_that_ended_meanwhile_is_not_attempted_again(process: Process) -> None:
    flight = process.join()
    flight.end(Unavailable("shut down"))
    flight.end(None)
    assert process.attempt(flight) is None
    assert isinstance(flight.done.result(0), Unavailable), "the first end counts"
    assert process.etags == []


def test_a_read_that_a_shutdown_broke_off_is_no_failure_and_gives_the_lease_back(process: Process) -> None:
    flight = process.join()

    def broken_off() -> Reading:
        flight.end(Unavailable("shut down"))
        raise Unavailable("broken off")

    process.source = broken_off
    process.attempt(flight)
    entry = process.store.data.load(TENANT)
    assert (entry.failure, entry.lease) == (None, None)
    assert process.ended == []


def test_a_value_that_came_as_the_shutdown_began_is_kept(process: Process) -> None:
    flight = process.join()

    def late() -> Reading:
        flight.end(Unavailable("shut down"))
        return ON

    process.source = late
    process.attempt(flight)
    assert process.store.data.load(TENANT).snapshot is not None


# -- between processes -----------------------------------------------------------------------------------------------


def test_while_another_process_reads_the_flight_waits_and_takes_its_result_without_a_read(
    process: Process, clock: FakeClock
) -> None:
    other = Process(clock, data=process.store.data, holder="them")
    flight = process.join()

    def during() -> Reading:
        pause = process.attempt(flight)
        assert pause is not None
        assert 0 < pause < LEASE_SECONDS
        return OFF

    other.source = during
    other.fly()
    assert process.attempt(flight) is None
    assert (flight.done.result(0), flight.token) == (None, None)
    assert process.etags == []
    assert process.lease_waits == [TENANT]


def test_a_forced_flight_does_not_take_the_result_of_a_read_that_it_found_under_way(
    process: Process, clock: FakeClock
) -> None:
    """It began before the flight, as far as can be told: over a network news take a moment."""
    other = Process(clock, data=process.store.data, holder="them")
    flight = process.join(forced=True)
    other.source = lambda: (process.attempt(flight), OFF)[1]
    other.fly()
    assert process.attempt(flight) is None
    assert len(process.etags) == 1
    assert flight.token == 2


def test_the_failure_of_another_process_serves_here_too(process: Process, clock: FakeClock) -> None:
    other = Process(clock, data=process.store.data, holder="them")
    flight = process.join()

    def during() -> Reading:
        process.attempt(flight)
        raise MalformedAnswer("not JSON", status=200)

    other.source = during
    other.fly()
    assert process.attempt(flight) is None
    assert isinstance(flight.done.result(0), MalformedAnswer)
    assert process.etags == []


def test_a_lease_that_is_held_is_told_of_once_per_flight(process: Process) -> None:
    lease = process.lease_of("them")
    flight = process.join()
    assert [process.attempt(flight) is not None for _ in range(3)] == [True] * 3
    assert process.lease_waits == [TENANT]
    process.store.data.transact(TENANT, partial(release, lease=lease))
    assert process.attempt(flight) is None
    assert process.lease_waits == [TENANT]


def test_the_pauses_before_a_held_lease_grow(process: Process, clock: FakeClock) -> None:
    process.lease_of("them")
    flight, pauses = process.join(), []
    for _ in range(4):
        pause = process.attempt(flight)
        assert pause is not None
        pauses.append(pause)
        clock.advance(pause)
    assert pauses == pytest.approx([0.05, 0.05, 0.1, 0.2])


def test_a_holder_that_is_silent_frees_the_read_when_its_lease_ends(process: Process, clock: FakeClock) -> None:
    process.lease_of("them")
    flight = process.join()
    assert process.attempt(flight) is not None
    clock.advance(LEASE_SECONDS)
    assert process.attempt(flight) is None
    assert flight.token == 2


def test_a_holder_that_is_known_to_have_ended_frees_the_read_at_once(process: Process) -> None:
    process.lease_of("them")
    process.store.ended.add("them")
    flight = process.join()
    assert process.attempt(flight) is None
    assert flight.token == 2
    assert process.lease_waits == []


def test_a_flight_that_waits_too_long_for_another_process_ends_with_an_error(
    process: Process, clock: FakeClock
) -> None:
    flight = process.join()
    clock.advance(2 * TIMEOUT_SECONDS)
    process.lease_of("them")
    assert process.attempt(flight) is None
    error = flight.done.result(0)
    assert isinstance(error, Unavailable)
    assert "another process holds the lease" in str(error)


def test_invalidations_beyond_the_pace_put_the_read_off_and_it_follows(process: Process, clock: FakeClock) -> None:
    process.fly()
    for _ in range(PACE_BURST):
        process.invalidate()
        process.fly()
    assert len(process.etags) == PACE_BURST + 1
    process.invalidate()
    flight = process.join()
    pause = process.attempt(flight)
    assert pause == pytest.approx(1.0)
    assert not flight.done.done()
    clock.advance(1.0)
    assert process.attempt(flight) is None
    assert len(process.etags) == PACE_BURST + 2


# -- a store that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [StoreBusy("in use"), StoreError("down")])
def test_a_store_that_cannot_grant_the_lease_is_asked_again_after_a_pause_and_not_for_ever(
    process: Process, clock: FakeClock, fault: StoreError
) -> None:
    process.store.fault = fault
    flight = process.join()
    pause = process.attempt(flight)
    assert pause is not None
    assert pause >= 0.001
    clock.advance(2 * TIMEOUT_SECONDS)
    assert process.attempt(flight) is None
    error = flight.done.result(0)
    assert isinstance(error, Unavailable)
    assert str(fault) in str(error)


def test_a_result_that_the_store_cannot_take_is_read_again_after_a_pause(process: Process) -> None:
    def breaks() -> Reading:
        process.store.fault = StoreError("down")
        return ON

    process.source = breaks
    flight = process.join()
    assert process.attempt(flight) == LOST_LEASE_SECONDS
    assert flight.generation is None, "it is open to newcomers again"
    process.store.fault, process.source = None, lambda: OFF
    assert process.attempt(flight) is None
    snapshot = process.store.data.load(TENANT).snapshot
    assert snapshot is not None
    assert snapshot.enabled is False


def test_a_lease_that_the_store_lost_costs_a_read_a_second_at_most(process: Process) -> None:
    def loses() -> Reading:
        process.store.data._entries.clear()
        return ON

    process.source = loses
    flight = process.join()
    assert process.attempt(flight) == LOST_LEASE_SECONDS
    assert process.ended == []
    assert not flight.done.done()
