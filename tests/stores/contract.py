"""The store's contract as tests: whatever store is given must pass all of them.

A test module for a store subclasses `StoreContract` (any store) or `SharedStoreContract` (one that several processes
share) and gives the fixtures that are missing here: `make_store`, and for shared stores `make_elsewhere`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import ClassVar, Protocol

import pytest
from external_oms.freshness import BUCKET_BURST

from external_oms.config import Failure, Snapshot
from external_oms.stores.base import Busy, Cause, Event, Lease, Member, Metered, Record, Store
from tests.support.clock import FakeClock

__all__ = [
    "TENANT",
    "MakeElsewhere",
    "MakeStore",
    "SharedStoreContract",
    "StoreContract",
    "event",
    "failed",
    "leased",
    "seen",
    "word",
]

TENANT = "acme-staging"
SPAWN = multiprocessing.get_context("spawn")
DEADLINE_SECONDS = 20.0
"""When a test that waits for another process gives up; none comes near it."""


class MakeStore(Protocol):
    """Another handle on the same shared state, on the test's clock; for a store of one process the same object."""

    def __call__(self, *, history_rows: int = 10_000, history_seconds: float = 30 * 86_400.0) -> Store: ...


MakeElsewhere = Callable[[], Store]
"""Can be pickled; makes a handle on the same shared state in another process, on the machine's clock."""


def word(store: Store, tenant: str = TENANT) -> int:
    """The tenant's word as an evaluation reads it."""
    words, index = store.watch(tenant)
    return words[index]


def seen(lease: Lease, clock: FakeClock, *, enabled: bool = True) -> Snapshot:
    """What a read under this lease gave, starting now."""
    return Snapshot(
        enabled=enabled,
        updated_at=datetime(2026, 3, 1, 12, 30, 15, 250_000, tzinfo=UTC),
        etag='W/"é-1"',
        generation=lease.record.generation,
        read_number=lease.number,
        read_at=clock.monotonic(),
        fetched_at=datetime.fromtimestamp(clock.wall(), UTC),
        lifetime_seconds=30.0,
    )


def failed(lease: Lease, clock: FakeClock, *, count: int = 1) -> Failure:
    """How a read under this lease failed, ending now."""
    return Failure(
        kind="unavailable",
        message="the config API did not answer in time",
        status=503,
        count=count,
        read_number=lease.number,
        generation=lease.record.generation,
        failed_at=clock.monotonic(),
        since=datetime.fromtimestamp(clock.wall(), UTC),
        not_before=clock.monotonic() + 4.5,
        obliged=True,
    )


def leased(store: Store, tenant: str = TENANT, *, seconds: float = 7.0, metered: bool = False) -> Lease:
    """A lease, where the test knows that there is one to be had."""
    acquired = store.acquire(tenant, seconds=seconds, metered=metered)
    assert isinstance(acquired, Lease), acquired
    return acquired


def event(clock: FakeClock, tenant: str = TENANT, **more: object) -> Event:
    """A row of history, now."""
    row = Event(at=datetime.fromtimestamp(clock.wall(), UTC), tenant=tenant, cause=Cause.CHANGED)
    return replace(row, **more)  # type: ignore[arg-type]  # each test names fields of an Event


def invalidated(store: Store, lease: Lease, clock: FakeClock) -> None:
    store.invalidate(lease.tenant)


def stored(store: Store, lease: Lease, clock: FakeClock) -> None:
    assert store.put(lease, seen(lease, clock))


def failure_stored(store: Store, lease: Lease, clock: FakeClock) -> None:
    assert store.fail(lease, failed(lease, clock))


def released(store: Store, lease: Lease, clock: FakeClock) -> None:
    store.release(lease)


def delivered(store: Store, lease: Lease, clock: FakeClock) -> None:
    assert store.deliver(lease.tenant, "msg_1", seconds=600.0) is not None


def without_instants(record: Record) -> Record:
    """The rest of a record: what every handle knows alike."""
    snapshot, failure = record.snapshot, record.failure
    return replace(
        record,
        invalidated_at=None,
        snapshot=replace(snapshot, read_at=0.0) if snapshot else None,
        failure=replace(failure, failed_at=0.0, not_before=0.0) if failure else None,
        foreign=False,
    )


def instants(record: Record) -> list[float | None]:
    """Every instant in a record, on the monotonic clock."""
    snapshot, failure = record.snapshot, record.failure
    return [
        record.invalidated_at,
        snapshot.read_at if snapshot else None,
        failure.failed_at if failure else None,
        failure.not_before if failure else None,
    ]


CHANGES = [invalidated, delivered, stored, failure_stored, released]


class StoreContract:
    """What every store promises."""

    instant_tolerance_seconds: ClassVar[float] = 1e-6
    """How far an instant may move in the store: one that converts between clocks moves it a little."""

    @pytest.fixture
    def store(self, make_store: MakeStore) -> Store:
        return make_store()

    @pytest.fixture
    def advance(self, clock: FakeClock) -> Callable[[float], None]:
        """Let time pass; a store with a clock of its own overrides it."""
        return clock.advance

    def same_instant(self, one: float | None, other: float | None) -> bool:
        if one is None or other is None:
            return one is other
        return abs(one - other) <= self.instant_tolerance_seconds

    def same_record(self, one: Record, other: Record) -> bool:
        """Whether two handles know the same, whoever stored it; instants may have moved a little on the way."""
        return without_instants(one) == without_instants(other) and all(
            self.same_instant(left, right) for left, right in zip(instants(one), instants(other), strict=True)
        )

    # -- the fence ------------------------------------------------------------------------------------------------

    def test_a_tenant_never_heard_of_has_an_empty_record(self, store: Store) -> None:
        assert store.load(TENANT) == Record()

    def test_an_invalidation_raises_the_generation_by_one_and_says_when(
        self, store: Store, clock: FakeClock, advance: Callable[[float], None]
    ) -> None:
        assert store.invalidate(TENANT) == 1
        assert self.same_instant(store.load(TENANT).invalidated_at, clock.monotonic())
        advance(2.5)
        assert store.invalidate(TENANT) == 2
        record = store.load(TENANT)
        assert record.generation == 2
        assert self.same_instant(record.invalidated_at, clock.monotonic())

    def test_tenants_know_nothing_of_each_other(self, store: Store, clock: FakeClock) -> None:
        store.invalidate(TENANT)
        lease = leased(store, "other-tenant")
        assert lease.record.generation == 0
        assert store.put(lease, seen(lease, clock))
        assert store.load(TENANT).snapshot is None
        assert store.load("other-tenant").generation == 0
        leased(store)

    def test_a_read_that_began_before_an_invalidation_is_never_stored(
        self, store: Store, make_store: MakeStore, clock: FakeClock
    ) -> None:
        lease = leased(store)
        make_store().invalidate(TENANT)
        assert store.put(lease, seen(lease, clock)) is False
        record = store.load(TENANT)
        assert record.snapshot is None
        assert record.generation == 1

    def test_a_failure_that_began_before_an_invalidation_is_never_stored(
        self, store: Store, make_store: MakeStore, clock: FakeClock
    ) -> None:
        lease = leased(store)
        make_store().invalidate(TENANT)
        assert store.fail(lease, failed(lease, clock)) is False
        assert store.load(TENANT).failure is None

    @pytest.mark.parametrize("outcome", ["put", "fail"])
    def test_a_read_that_is_refused_ends_its_lease_all_the_same(
        self, store: Store, clock: FakeClock, outcome: str
    ) -> None:
        lease = leased(store)
        store.invalidate(TENANT)
        if outcome == "put":
            store.put(lease, seen(lease, clock))
        else:
            store.fail(lease, failed(lease, clock))
        assert leased(store).record.generation == 1

    # -- the record -----------------------------------------------------------------------------------------------

    def test_a_stored_snapshot_comes_back_as_it_was(self, store: Store, clock: FakeClock) -> None:
        lease = leased(store)
        snapshot = seen(lease, clock)
        assert store.put(lease, snapshot) is True
        loaded = store.load(TENANT).snapshot
        assert loaded is not None
        assert self.same_instant(loaded.read_at, snapshot.read_at)
        assert replace(loaded, read_at=snapshot.read_at) == snapshot
        assert store.load(TENANT).foreign is False

    def test_a_snapshot_without_its_optional_parts_comes_back_as_it_was(self, store: Store, clock: FakeClock) -> None:
        lease = leased(store)
        snapshot = replace(seen(lease, clock, enabled=False), updated_at=None, etag=None)
        store.put(lease, snapshot)
        loaded = store.load(TENANT).snapshot
        assert loaded is not None
        assert (loaded.enabled, loaded.updated_at, loaded.etag) == (False, None, None)

    def test_a_stored_failure_comes_back_as_it_was(self, store: Store, clock: FakeClock) -> None:
        lease = leased(store)
        failure = failed(lease, clock, count=3)
        assert store.fail(lease, failure) is True
        loaded = store.load(TENANT).failure
        assert loaded is not None
        assert self.same_instant(loaded.failed_at, failure.failed_at)
        assert self.same_instant(loaded.not_before, failure.not_before)
        assert replace(loaded, failed_at=failure.failed_at, not_before=failure.not_before) == failure

    def test_a_failure_keeps_the_snapshot_and_a_success_clears_the_failure(
        self, store: Store, clock: FakeClock
    ) -> None:
        lease = leased(store)
        store.put(lease, seen(lease, clock))
        lease = leased(store)
        store.fail(lease, replace(failed(lease, clock), status=None, obliged=False))
        record = store.load(TENANT)
        assert record.snapshot is not None
        assert record.failure is not None
        assert (record.failure.status, record.failure.obliged) == (None, False)
        lease = leased(store)
        store.put(lease, seen(lease, clock, enabled=False))
        record = store.load(TENANT)
        assert record.failure is None
        assert record.snapshot is not None
        assert record.snapshot.enabled is False

    # -- the word -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("change", CHANGES)
    def test_the_word_changes_with_every_change(
        self, store: Store, clock: FakeClock, change: Callable[[Store, Lease, FakeClock], None]
    ) -> None:
        lease = leased(store)
        before = word(store)
        change(store, lease, clock)
        assert word(store) != before

    def test_the_word_of_one_tenant_stands_still_while_another_changes(self, store: Store) -> None:
        word(store)
        before = word(store, "other-tenant")
        store.invalidate(TENANT)
        assert word(store, "other-tenant") == before

    def test_a_change_can_be_loaded_once_the_word_has_changed(self, store: Store) -> None:
        """A thread invalidates; a reader that follows the words alone ends at the last generation."""
        rounds = 200
        writer = threading.Thread(target=lambda: [store.invalidate(TENANT) for _ in range(rounds)])
        words, index = store.watch(TENANT)
        remembered, generation, until = words[index], 0, time.monotonic() + DEADLINE_SECONDS
        writer.start()
        while generation < rounds and time.monotonic() < until:
            store.wait(TENANT, remembered, 0.05)
            present = words[index]
            if present != remembered:
                remembered = present
                generation = store.load(TENANT).generation
        writer.join()
        assert generation == rounds

    # -- waiting --------------------------------------------------------------------------------------------------

    def test_wait_returns_at_once_where_the_word_has_changed_already(self, store: Store) -> None:
        before = word(store)
        store.invalidate(TENANT)
        store.wait(TENANT, before, DEADLINE_SECONDS)
        assert word(store) != before

    def test_wait_ends_after_its_seconds(self, store: Store) -> None:
        before = word(store)
        store.wait(TENANT, before, 0.01)
        assert word(store) == before

    def test_wait_is_ended_by_a_change(self, store: Store) -> None:
        before = word(store)
        ended = threading.Event()

        def follow() -> None:
            store.wait(TENANT, before, DEADLINE_SECONDS)
            ended.set()

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        store.invalidate(TENANT)
        assert ended.wait(DEADLINE_SECONDS / 2)
        follower.join()

    # -- the lease ------------------------------------------------------------------------------------------------

    def test_one_lease_at_a_time(self, store: Store, make_store: MakeStore) -> None:
        lease = leased(store, seconds=7.0)
        refused = make_store().acquire(TENANT, seconds=7.0, metered=False)
        assert isinstance(refused, Busy)
        assert refused.number == lease.number
        assert 0 < refused.remaining_seconds <= 7.0

    @pytest.mark.parametrize("end", [stored, failure_stored, released])
    def test_a_lease_ends_and_the_next_has_a_higher_number(
        self, store: Store, clock: FakeClock, end: Callable[[Store, Lease, FakeClock], None]
    ) -> None:
        first = leased(store)
        end(store, first, clock)
        second = leased(store)
        assert second.number > first.number
        assert second.record.reads == second.number == store.load(TENANT).reads

    def test_a_lease_is_given_with_the_record_of_that_moment(self, store: Store, clock: FakeClock) -> None:
        store.invalidate(TENANT)
        lease = leased(store)
        store.put(lease, seen(lease, clock))
        store.invalidate(TENANT)
        lease = leased(store)
        assert lease.tenant == TENANT
        assert lease.record.generation == 2
        assert lease.record.snapshot is not None
        assert lease.record.snapshot.generation == 1

    def test_a_lease_ends_by_itself_after_its_life(
        self, store: Store, make_store: MakeStore, advance: Callable[[float], None]
    ) -> None:
        first = leased(store, seconds=7.0)
        other = make_store()
        advance(6.5)
        assert isinstance(other.acquire(TENANT, seconds=7.0, metered=False), Busy)
        advance(0.75)
        assert leased(other).number > first.number

    @pytest.mark.parametrize("outcome", ["put", "fail", "release"])
    def test_a_lease_that_was_outlived_is_fenced_off_by_the_later_one(
        self, store: Store, clock: FakeClock, advance: Callable[[float], None], outcome: str
    ) -> None:
        late = leased(store, seconds=1.0)
        advance(1.5)
        present = leased(store, seconds=7.0)
        before = store.load(TENANT)
        if outcome == "put":
            assert store.put(late, seen(late, clock)) is False
        elif outcome == "fail":
            assert store.fail(late, failed(late, clock)) is False
        else:
            store.release(late)
        assert store.load(TENANT) == before
        assert isinstance(store.acquire(TENANT, seconds=1.0, metered=False), Busy)
        assert store.put(present, seen(present, clock)) is True

    def test_a_lease_that_nobody_followed_may_still_be_put_after_its_life(
        self, store: Store, clock: FakeClock, advance: Callable[[float], None]
    ) -> None:
        lease = leased(store, seconds=1.0)
        advance(1.5)
        assert store.put(lease, seen(lease, clock)) is True

    def test_of_many_threads_one_gets_the_lease(self, store: Store) -> None:
        start = threading.Barrier(8)
        acquired: list[object] = []

        def try_it() -> None:
            start.wait()
            acquired.append(store.acquire(TENANT, seconds=7.0, metered=False))

        threads = [threading.Thread(target=try_it) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(type(one).__name__ for one in acquired) == ["Busy"] * 7 + ["Lease"]

    # -- the meter ------------------------------------------------------------------------------------------------

    def test_reads_caused_by_invalidations_are_metered_beyond_a_burst(
        self, store: Store, make_store: MakeStore, advance: Callable[[float], None]
    ) -> None:
        for _ in range(BUCKET_BURST):
            store.release(leased(store, metered=True))
        refused = make_store().acquire(TENANT, seconds=7.0, metered=True)
        assert isinstance(refused, Metered)
        assert 0 < refused.wait_seconds <= 1.0
        advance(refused.wait_seconds / 2)
        nearer = store.acquire(TENANT, seconds=7.0, metered=True)
        assert isinstance(nearer, Metered)
        assert nearer.wait_seconds < refused.wait_seconds
        advance(nearer.wait_seconds + 0.01)
        store.release(leased(store, metered=True))
        assert isinstance(store.acquire(TENANT, seconds=7.0, metered=True), Metered)

    def test_an_unmetered_read_and_a_refused_one_take_no_token(self, store: Store) -> None:
        for _ in range(2 * BUCKET_BURST):
            store.release(leased(store, metered=False))
        held = leased(store, metered=False)
        for _ in range(2 * BUCKET_BURST):
            assert isinstance(store.acquire(TENANT, seconds=7.0, metered=True), Busy)
        store.release(held)
        for _ in range(BUCKET_BURST):
            store.release(leased(store, metered=True))

    def test_an_empty_bucket_of_one_tenant_leaves_the_others_alone(self, store: Store) -> None:
        for _ in range(BUCKET_BURST):
            store.release(leased(store, metered=True))
        leased(store, "other-tenant", metered=True)

    # -- deliveries -----------------------------------------------------------------------------------------------

    def test_a_delivery_raises_the_generation_once(
        self, store: Store, make_store: MakeStore, advance: Callable[[float], None]
    ) -> None:
        assert store.deliver(TENANT, "msg_1", seconds=600.0) == 1
        record = store.load(TENANT)
        assert record.invalidated_at is not None
        advance(599.0)
        assert make_store().deliver(TENANT, "msg_1", seconds=600.0) is None
        assert store.load(TENANT) == record
        assert store.deliver(TENANT, "msg_2", seconds=600.0) == 2

    def test_a_delivery_id_is_forgotten_after_its_seconds(self, store: Store, advance: Callable[[float], None]) -> None:
        assert store.deliver(TENANT, "msg_1", seconds=600.0) == 1
        advance(600.5)
        assert store.deliver(TENANT, "msg_1", seconds=600.0) == 2

    def test_two_tenants_may_have_deliveries_of_one_id(self, store: Store) -> None:
        assert store.deliver(TENANT, "msg_1", seconds=600.0) == 1
        assert store.deliver("other-tenant", "msg_1", seconds=600.0) == 1

    def test_of_many_threads_with_one_delivery_one_carries_it_out(self, store: Store) -> None:
        start = threading.Barrier(8)
        answers: list[int | None] = []

        def try_it() -> None:
            start.wait()
            answers.append(store.deliver(TENANT, "msg_1", seconds=600.0))

        threads = [threading.Thread(target=try_it) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answers, key=str) == [1, *[None] * 7]
        assert store.load(TENANT).generation == 1

    # -- history --------------------------------------------------------------------------------------------------

    def test_a_row_of_history_comes_back_with_its_number(self, store: Store, clock: FakeClock) -> None:
        row = event(
            clock,
            cause=Cause.DELIVERY,
            enabled=False,
            actor="webhook",
            delivery_id="msg_1",
            latency_seconds=0.125,
            detail="duplicate: “é”, nothing done",
        )
        store.append(row)
        store.append(event(clock, enabled=None, latency_seconds=None))
        latest, first = store.history()
        assert replace(first, id=0) == row
        assert (latest.enabled, latest.latency_seconds) == (None, None)
        assert latest.id > first.id > 0

    def test_history_is_newest_first_by_tenant_and_in_pages(
        self, store: Store, make_store: MakeStore, clock: FakeClock
    ) -> None:
        other = make_store()
        for number in range(10):
            (store if number % 2 else other).append(
                event(clock, TENANT if number < 8 else "other-tenant", detail=str(number))
            )
        assert [row.detail for row in store.history(limit=3)] == ["9", "8", "7"]
        first = other.history(tenant=TENANT, limit=3)
        assert [row.detail for row in first] == ["7", "6", "5"]
        rest = store.history(tenant=TENANT, before=first[-1].id)
        assert [row.detail for row in rest] == ["4", "3", "2", "1", "0"]
        assert store.history(before=rest[-1].id) == ()

    def test_history_is_capped_by_rows(self, make_store: MakeStore, clock: FakeClock) -> None:
        store = make_store(history_rows=10)
        for number in range(35):
            store.append(event(clock, detail=str(number)))
        assert [row.detail for row in store.history(limit=100)] == [str(number) for number in range(34, 24, -1)]

    def test_history_is_capped_by_age(
        self, make_store: MakeStore, clock: FakeClock, advance: Callable[[float], None]
    ) -> None:
        store = make_store(history_seconds=3600.0)
        store.append(event(clock, detail="old"))
        advance(3000.0)
        store.append(event(clock, detail="young"))
        advance(1000.0)
        store.append(event(clock, detail="new"))
        assert [row.detail for row in store.history()] == ["new", "young"]

    # -- members --------------------------------------------------------------------------------------------------

    def test_members_say_what_they_serve_until_they_are_silent_for_a_minute(
        self, store: Store, make_store: MakeStore, advance: Callable[[float], None]
    ) -> None:
        other = make_store()
        store.report(
            [
                Member("host:1", TENANT, 3, True, "fresh", 1.5),
                Member("host:1", "other-tenant", 0, None, "expired", None),
            ]
        )
        advance(20.0)
        other.report([Member("host:2", TENANT, 2, False, "stale", 40.0)])
        told = {member.name: member for member in store.members(TENANT)}
        assert set(told) == {"host:1", "host:2"}
        assert abs(told["host:1"].seen_seconds - 20.0) <= self.instant_tolerance_seconds
        assert replace(told["host:1"], seen_seconds=0.0) == Member("host:1", TENANT, 3, True, "fresh", 1.5)
        assert len(other.members()) == 3
        advance(45.0)
        assert [member.name for member in store.members()] == ["host:2"]

    def test_a_new_report_takes_the_place_of_the_old_one(self, store: Store) -> None:
        store.report([Member("host:1", TENANT, 3, True, "fresh", 1.5)])
        store.report([Member("host:1", TENANT, 4, None, "expired", None)])
        (member,) = store.members(TENANT)
        assert (member.generation, member.enabled, member.age_seconds) == (4, None, None)

    # -- the rest -------------------------------------------------------------------------------------------------

    def test_a_store_in_order_says_so(self, store: Store) -> None:
        assert store.health().ok
        assert store.health().problem == ""

    def test_nothing_is_told_where_nothing_changed(self, store: Store) -> None:
        store.watch(TENANT)
        store.changed()
        assert tuple(store.changed()) == ()

    def test_a_store_may_be_used_again_after_it_was_closed(self, store: Store) -> None:
        store.invalidate(TENANT)
        store.close()
        store.close()
        assert store.load(TENANT).generation == 1
        assert store.invalidate(TENANT) == 2

    def test_a_forked_child_loads_and_invalidates(self, store: Store) -> None:
        store.invalidate(TENANT)

        def child() -> bool:
            store.after_fork()
            return store.load(TENANT).generation == 1 and store.invalidate(TENANT) == 2

        assert in_a_fork(child)


def in_a_fork(work: Callable[[], bool]) -> bool:
    """Whether the work was done and true in a forked child; a child that hangs is killed."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(int(DEADLINE_SECONDS))
        how = signal.SIGUSR2
        try:
            how = signal.SIGUSR1 if work() else signal.SIGUSR2
        finally:
            # by a signal: what measures coverage saves at an exit, and has locks of its own that a busy parent may hold
            os.kill(os.getpid(), how)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGUSR1


# What other processes do. Each says that it is ready and begins when told, so that they run against each other.


def _invalidate_many(make: MakeElsewhere, tell: Connection, times: int) -> None:
    store = make()
    tell.send("ready")
    tell.recv()
    tell.send([store.invalidate(TENANT) for _ in range(times)])


def _deliver_many(make: MakeElsewhere, tell: Connection, times: int) -> None:
    store = make()
    tell.send("ready")
    tell.recv()
    tell.send([store.deliver(TENANT, f"msg_{number}", seconds=600.0) for number in range(times)])


def _lease_many(make: MakeElsewhere, tell: Connection, times: int) -> None:
    store = make()
    tell.send("ready")
    tell.recv()
    numbers: list[int] = []
    until = time.monotonic() + DEADLINE_SECONDS
    while len(numbers) < times and time.monotonic() < until:
        acquired = store.acquire(TENANT, seconds=30.0, metered=False)
        if isinstance(acquired, Lease):
            numbers.append(acquired.number)
            store.release(acquired)
    tell.send(numbers)


def _hold_a_lease(make: MakeElsewhere, tell: Connection, seconds: float) -> None:
    tell.send(leased(make(), seconds=seconds).number)
    signal.pause()


@contextmanager
def _elsewhere(work: Callable[..., None], *given: object) -> Iterator[tuple[SpawnProcess, Connection]]:
    """Work in a process of its own, killed at the end whatever happens."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=work, args=(given[0], theirs, *given[1:]), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.join(DEADLINE_SECONDS / 4)  # one that has done its work ends by itself
        process.kill()
        process.join()
        process.close()
        ours.close()


class SharedStoreContract(StoreContract):
    """What a store promises beyond that when several processes share it."""

    visible_within_seconds: ClassVar[float] = 0.0
    """How soon another handle's change is seen by its word; 0 means at once."""

    def eventually(self, condition: Callable[[], bool]) -> bool:
        """Whether it comes true within the store's bound."""
        until = time.monotonic() + self.visible_within_seconds
        while not condition():
            if time.monotonic() >= until:
                return False
            time.sleep(0.005)
        return True

    @pytest.fixture
    def other(self, store: Store, make_store: MakeStore) -> Store:
        other = make_store()
        assert other is not store
        return other

    @pytest.mark.parametrize("change", CHANGES)
    def test_another_handles_change_is_seen_by_the_word_and_told(
        self, store: Store, other: Store, clock: FakeClock, change: Callable[[Store, Lease, FakeClock], None]
    ) -> None:
        lease = leased(other)
        before = word(store)
        store.changed()
        change(other, lease, clock)
        assert self.eventually(lambda: word(store) != before)
        told: set[str] = set()

        def is_told() -> bool:
            told.update(store.changed())
            return bool(told)

        assert self.eventually(is_told)
        assert told == {TENANT}
        assert self.eventually(lambda: self.same_record(store.load(TENANT), other.load(TENANT)))

    def test_a_value_that_another_handle_stored_is_foreign(self, store: Store, other: Store, clock: FakeClock) -> None:
        lease = leased(other)
        other.put(lease, seen(lease, clock))
        assert self.eventually(lambda: store.load(TENANT).foreign)
        assert other.load(TENANT).foreign is False
        assert leased(store).record.foreign is True

    def test_everything_outlives_the_handles(
        self, store: Store, make_store: MakeStore, clock: FakeClock, advance: Callable[[float], None]
    ) -> None:
        store.deliver(TENANT, "msg_1", seconds=600.0)
        lease = leased(store)
        store.put(lease, seen(lease, clock))
        store.append(event(clock, detail="kept"))
        store.close()
        advance(5.0)
        later = make_store()
        record = later.load(TENANT)
        assert record.generation == 1
        assert record.reads == lease.number
        assert record.foreign is True
        assert record.snapshot is not None
        assert self.same_instant(record.snapshot.read_at, clock.monotonic() - 5.0)
        assert [row.detail for row in later.history()] == ["kept"]
        assert later.deliver(TENANT, "msg_1", seconds=600.0) is None

    def test_invalidations_of_two_processes_are_all_counted(self, make_elsewhere: MakeElsewhere) -> None:
        times = 150
        with (
            _elsewhere(_invalidate_many, make_elsewhere, times) as (_, one),
            _elsewhere(_invalidate_many, make_elsewhere, times) as (_, two),
        ):
            raised = self._race(one, two)
        assert set(raised) == set(range(1, 2 * times + 1))
        assert make_elsewhere().load(TENANT).generation == 2 * times

    def test_one_delivery_that_lands_in_two_processes_is_carried_out_once(self, make_elsewhere: MakeElsewhere) -> None:
        times = 100
        with (
            _elsewhere(_deliver_many, make_elsewhere, times) as (_, one),
            _elsewhere(_deliver_many, make_elsewhere, times) as (_, two),
        ):
            answers = self._race(one, two)
        assert sorted(number for number in answers if number is not None) == list(range(1, times + 1))
        assert answers.count(None) == times

    def test_two_processes_never_hold_leases_of_one_number(self, make_elsewhere: MakeElsewhere) -> None:
        times = 50
        with (
            _elsewhere(_lease_many, make_elsewhere, times) as (_, one),
            _elsewhere(_lease_many, make_elsewhere, times) as (_, two),
        ):
            numbers = self._race(one, two)
        assert len(numbers) == len(set(numbers)) == 2 * times

    @staticmethod
    def _race(one: Connection, two: Connection) -> list[int | None]:
        for tell in (one, two):
            assert tell.poll(DEADLINE_SECONDS)
            assert tell.recv() == "ready"
        for tell in (one, two):
            tell.send("go")
        results: list[int | None] = []
        for tell in (one, two):
            assert tell.poll(DEADLINE_SECONDS)
            results += tell.recv()
        return results

    def test_the_lease_of_a_killed_process_ends_within_its_life(self, make_elsewhere: MakeElsewhere) -> None:
        life_seconds = 1.0
        store = make_elsewhere()
        with _elsewhere(_hold_a_lease, make_elsewhere, life_seconds) as (process, tell):
            assert tell.poll(DEADLINE_SECONDS)
            number = tell.recv()
            process.kill()
            process.join()
        until = time.monotonic() + life_seconds + 0.5
        acquired = store.acquire(TENANT, seconds=1.0, metered=False)
        while not isinstance(acquired, Lease):
            assert isinstance(acquired, Busy)
            assert time.monotonic() < until, "the lease outlived its stated life"
            store.wait(TENANT, word(store), min(0.05, acquired.remaining_seconds))
            acquired = store.acquire(TENANT, seconds=1.0, metered=False)
        assert acquired.number > number
