"""Every interleaving of two processes over one store: reads that begin, are answered and end in any order,
invalidations between all of these, failures, processes that die, and a clock that only moves when told.

What must hold is checked after every step; without the fence in the store, the same machine finds the wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from external_oms.cache import Cache
from external_oms.config import Document, Failure, Reading, Snapshot
from external_oms.errors import ReadError, Unavailable
from external_oms.flights import Flight, Flights, Pause
from external_oms.freshness import Freshness, Windows
from external_oms.stores.base import Lease
from external_oms.stores.memory import MemoryStore

TENANT = "acme"
WINDOWS = Windows(ttl_seconds=30.0, stale_while_revalidate_seconds=20.0, stale_if_error_seconds=600.0)
TIMEOUT_SECONDS = 5.0
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class StillClock:
    """A clock that stands still until told."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return EPOCH.timestamp() + self.now


@dataclass
class HandRunner:
    """A runner whose jobs run when the test says so."""

    clock: StillClock
    flights: list[Flight] = field(default_factory=list)
    due: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def submit(self, job: Callable[[], None]) -> None:
        assert isinstance(job, partial)
        self.flights.append(job.args[0])

    def at(self, when: float, job: Callable[[], None]) -> None:
        self.due.append((when, job))

    def run_due(self) -> None:
        ready = [entry for entry in self.due if entry[0] <= self.clock.now]
        self.due = [entry for entry in self.due if entry[0] > self.clock.now]
        for _, job in ready:
            job()

    def wake(self) -> None: ...

    def start(self) -> None: ...

    def after_fork(self) -> None: ...

    def reopen(self) -> None: ...

    def close(self, seconds: float) -> None: ...


@dataclass
class OpenRead:
    """A read under way: begun at one step of the story, answered by the API at a later one, ended at a third."""

    process: Process
    flight: Flight
    lease: Lease
    began_at: float
    began_step: int
    answer: Reading | None = None


class Process:
    """A cache with threads that the test moves by hand."""

    def __init__(self, store: MemoryStore, clock: StillClock) -> None:
        self.runner = HandRunner(clock)
        self.cache = Cache(
            tenants=[TENANT],
            store=store,
            source=self._never,
            windows=WINDOWS,
            timeout_seconds=TIMEOUT_SECONDS,
            clock=clock,
            random=lambda: 0.5,
            background=True,
            runner=lambda _poll, _seconds: self.runner,
        )
        self.flights: Flights = self.cache._flights  # the test takes the place of its threads

    @staticmethod
    def _never(tenant: str, etag: str | None) -> Reading:
        raise AssertionError("the test reads by hand")


class TwoProcesses(RuleBasedStateMachine):
    """Two processes, one store, one tenant, one API."""

    store_class: type[MemoryStore] = MemoryStore

    def __init__(self) -> None:
        super().__init__()
        self.clock = StillClock()
        self.store = self.store_class(clock=self.clock)
        self.processes = [Process(self.store, self.clock) for _ in range(2)]
        self.step = 0
        self.truth = Document(enabled=False, updated_at=EPOCH)
        self.truths = [self.truth]
        self.open: list[OpenRead] = []
        self.began: dict[int, int] = {}
        self.said: dict[int, Document] = {}
        self.invalidated_step = 0
        self.newest_seen: datetime | None = None
        for process in self.processes:
            process.cache.start()

    def _next(self) -> int:
        self.step += 1
        return self.step

    @rule(seconds=st.sampled_from([0.001, 0.5, 1.0, 3.0, 10.0, 29.0, 31.0, 60.0, 700.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        for process in self.processes:
            process.runner.run_due()

    @rule()
    def the_api_changes(self) -> None:
        self._next()
        later = (self.truth.updated_at or EPOCH) + timedelta(seconds=1)
        self.truth = Document(enabled=not self.truth.enabled, updated_at=later)
        self.truths.append(self.truth)

    @rule(which=st.integers(0, 1))
    def somebody_invalidates(self, which: int) -> None:
        self.invalidated_step = self._next()
        self.processes[which].cache.invalidate(TENANT)

    @rule(which=st.integers(0, 1), name=st.sampled_from(["a", "b", "c"]))
    def a_delivery_arrives(self, which: int, name: str) -> None:
        step = self._next()
        if self.processes[which].cache.deliver(TENANT, name, seconds=60.0) is not None:
            self.invalidated_step = step

    @rule(which=st.integers(0, 1), forced=st.booleans())
    def somebody_asks_for_a_read(self, which: int, forced: bool) -> None:
        process = self.processes[which]
        record = self.store.load(TENANT)
        numbers = [part.read_number for part in (record.snapshot, record.failure) if part is not None]
        newer_than = record.reads if forced else max(numbers, default=0)
        process.flights.join(TENANT, generation=record.generation, newer_than=newer_than, forced=forced)

    @precondition(lambda self: any(process.runner.flights for process in self.processes))
    @rule(which=st.integers(0, 1))
    def a_flight_tries_to_begin(self, which: int) -> None:
        process = self.processes[which]
        if not process.runner.flights:
            return
        flight = process.runner.flights.pop(0)
        flight.until = self.clock.now + 2 * TIMEOUT_SECONDS
        began = process.flights.begin(flight)
        if isinstance(began, Pause):
            process.runner.flights.append(flight)
        elif began is not None:
            step = self._next()
            self.began[began.number] = step
            self.open.append(OpenRead(process, flight, began, self.clock.now, step))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def the_api_answers(self, data: st.DataObject) -> None:
        """From here on the answer is on its way, whatever happens to the truth."""
        read = data.draw(st.sampled_from(self.open))
        if read.answer is None:
            read.answer = Reading(self.truth)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def a_lagging_replica_answers(self, data: st.DataObject) -> None:
        read = data.draw(st.sampled_from(self.open))
        if read.answer is None:
            read.answer = Reading(data.draw(st.sampled_from(self.truths)))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def a_read_ends(self, data: st.DataObject) -> None:
        read = data.draw(st.sampled_from(self.open))
        reading = read.answer or Reading(self.truth)
        assert reading.document is not None
        self.said[read.lease.number] = reading.document
        self._complete(read, reading)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), retry_after=st.sampled_from([None, 2.0]))
    def a_read_fails(self, data: st.DataObject, retry_after: float | None) -> None:
        read = data.draw(st.sampled_from(self.open))
        self._complete(read, Unavailable("no answer", retry_after_seconds=retry_after))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def a_reader_dies(self, data: st.DataObject) -> None:
        """Its lease stays until its life ends; its process starts anew."""
        read = data.draw(st.sampled_from(self.open))
        self.open = [other for other in self.open if other.process is not read.process]
        place = self.processes.index(read.process)
        self.processes[place] = Process(self.store, self.clock)
        self.processes[place].cache.start()

    def _complete(self, read: OpenRead, outcome: Reading | ReadError) -> None:
        self._next()
        self.open.remove(read)
        ended = read.process.flights.complete(
            read.flight, read.lease, outcome, read_at=read.began_at, read_at_wall=self.clock.wall()
        )
        if not ended:
            read.process.runner.flights.append(read.flight)

    @invariant()
    def no_value_read_before_an_invalidation_is_fresh(self) -> None:
        for process in self.processes:
            answer = process.cache.peek(TENANT)
            snapshot = answer.record.snapshot
            if answer.freshness is Freshness.FRESH:
                assert snapshot is not None
                assert snapshot.generation == self.store.load(TENANT).generation
                # the read that gave it began after the last invalidation; one outlasting a lagging answer began earlier
                # than its number says, and still after it
                assert self.began[snapshot.read_number] > self.invalidated_step

    @invariant()
    def no_value_outlives_its_windows(self) -> None:
        for process in self.processes:
            answer = process.cache.peek(TENANT)
            snapshot = answer.servable
            if snapshot is None:
                continue
            age = self.clock.now - snapshot.read_at
            if answer.freshness is Freshness.FRESH:
                assert age < WINDOWS.ttl_seconds
            elif answer.record.failure is None:
                assert age < WINDOWS.ttl_seconds + WINDOWS.stale_while_revalidate_seconds
            else:
                assert age < WINDOWS.ttl_seconds + WINDOWS.stale_if_error_seconds

    @invariant()
    def what_is_stored_is_what_the_api_said_and_never_goes_back(self) -> None:
        snapshot = self.store.load(TENANT).snapshot
        if snapshot is None:
            return
        assert snapshot.updated_at is not None
        assert snapshot.enabled == any(
            document.enabled for document in self.said.values() if document.updated_at == snapshot.updated_at
        )
        assert self.newest_seen is None or snapshot.updated_at >= self.newest_seen
        self.newest_seen = snapshot.updated_at

    @invariant()
    def one_read_is_in_flight(self) -> None:
        life = TIMEOUT_SECONDS + 2.0
        alive = [read for read in self.open if self.clock.now < read.began_at + life]
        assert len(alive) <= 1

    def teardown(self) -> None:
        """However the story went: once the API answers and time passes, both processes serve the truth, fresh."""
        for read in tuple(self.open):  # every read of a living process ends, by its deadline if by nothing else
            self._complete(read, Unavailable("no answer in time"))
        for _ in range(40):
            self.clock.now += 20.0
            for process in self.processes:
                process.runner.run_due()
                for flight in [process.runner.flights.pop(0) for _ in process.runner.flights]:
                    flight.until = self.clock.now + 2 * TIMEOUT_SECONDS
                    began = process.flights.begin(flight)
                    if isinstance(began, Pause):
                        process.runner.flights.append(flight)
                    elif began is not None:
                        read = OpenRead(process, flight, began, self.clock.now, self._next(), Reading(self.truth))
                        self.open.append(read)
                        self._complete(read, Reading(self.truth))
        for process in self.processes:
            answer = process.cache.peek(TENANT)
            assert answer.freshness is Freshness.FRESH
            assert answer.record.snapshot is not None
            assert answer.record.snapshot.enabled is self.truth.enabled


class WithoutFence(MemoryStore):
    """A store that takes every result, whatever was invalidated meanwhile: the fence taken out."""

    def put(self, lease: Lease, snapshot: Snapshot) -> bool:
        record = self.load(lease.tenant)
        unfenced = replace(snapshot, generation=record.generation)
        return super().put(Lease(lease.tenant, lease.number, record), unfenced)

    def fail(self, lease: Lease, failure: Failure) -> bool:
        return super().fail(Lease(lease.tenant, lease.number, self.load(lease.tenant)), failure)


STORY = settings(max_examples=250, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_at_every_interleaving_the_fence_holds() -> None:
    run_state_machine_as_test(TwoProcesses, settings=STORY)


def test_without_the_fence_the_same_machine_finds_a_resurrected_value() -> None:
    class Broken(TwoProcesses):
        store_class = WithoutFence

    with pytest.raises(AssertionError):
        run_state_machine_as_test(Broken, settings=settings(STORY, max_examples=2000, print_blob=False))
