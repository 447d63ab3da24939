"""The contract of the stores as tests: every store passes all of them.

A test module for a store subclasses `StoreContract` (any store) or `SharedStoreContract` (a store that several
processes share) and provides the fixtures that are missing here: `make_store`, and for shared stores `make_elsewhere`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import ClassVar, Protocol

import pytest

from external_oms.config import Document, Reading
from external_oms.entry import (
    Busy,
    Change,
    Entry,
    Failure,
    Granted,
    Invalidated,
    Invalidation,
    Lease,
    Moment,
    ReadOutcome,
    Snapshot,
    begin_read,
    commit,
    fail,
    invalidate,
    release,
)
from external_oms.records import MEMBER_SECONDS, Cause, Event, Member
from external_oms.stores.base import DELIVERY_ID_SECONDS, Store
from tests.support.clock import FakeClock
from tests.support.waiting import wait_until

__all__ = [
    "DEADLINE_SECONDS",
    "TENANT",
    "MakeElsewhere",
    "MakeStore",
    "SharedStoreContract",
    "StoreContract",
    "committed",
    "complete",
    "delivered",
    "elsewhere",
    "event",
    "failed",
    "in_a_fork",
    "invalidated",
    "leased",
    "race",
    "released",
    "try_lease",
    "word",
]

TENANT = "acme-staging"
OTHER = "other-tenant"
SPAWN = multiprocessing.get_context("spawn")
DEADLINE_SECONDS = 20.0
"""When a test that waits for another process gives up; none comes near it."""


class MakeStore(Protocol):
    """Another handle on the same shared state, on the test's clock; for a store of one process the same object.

    `keys` is given to shared stores alone.
    """

    def __call__(
        self,
        *,
        history_rows: int = 10_000,
        history_seconds: float = 30 * 86_400.0,
        keys: Mapping[str, str] | None = None,
    ) -> Store: ...


MakeElsewhere = Callable[[], Store]
"""Can be pickled; makes a handle on the same shared state in another process, on the machine's clock."""


# -- what tests do with a store ---------------------------------------------------------------------------------------


def word(store: Store, tenant: str = TENANT) -> int:
    """Return the version word of the tenant as an evaluation reads it."""
    words, index = store.version_ref(tenant)
    return words[index]


def event(clock: FakeClock, tenant: str = TENANT, cause: Cause = Cause.INVALIDATED, **more: object) -> Event:
    """Return a history row of the present moment."""
    row = Event(at=datetime.fromtimestamp(clock.wall(), UTC), tenant=tenant, cause=cause)
    return replace(row, **more)  # type: ignore[arg-type]  # each test names fields of an Event


def invalidated(store: Store, tenant: str = TENANT, *, row: Event | None = None) -> int:
    """Invalidate and return the new generation."""
    requests = [Invalidation(row)]
    (result,) = store.transact(tenant, partial(invalidate, requests=requests))
    assert not result.duplicate
    return result.generation


def delivered(store: Store, delivery_id: str, tenant: str = TENANT, *, row: Event | None = None) -> Invalidated:
    """Invalidate as a delivery with this id does."""
    requests = [Invalidation(row, delivery_id)]
    (result,) = store.transact(tenant, partial(invalidate, requests=requests), delivery_ids=[delivery_id])
    return result


def try_lease(
    store: Store, tenant: str = TENANT, *, seconds: float = 7.0, dead_holder: str | None = None
) -> ReadOutcome:
    """Ask for the lease of a forced read."""
    begin = partial(
        begin_read,
        holder=store.holder,
        lease_seconds=seconds,
        newer_than=1 << 60,
        forced=True,
        dead_holder=dead_holder,
    )
    return store.transact(tenant, begin)


def leased(store: Store, tenant: str = TENANT, *, seconds: float = 7.0) -> Lease:
    """Return the lease, where the test knows that it is free."""
    outcome = try_lease(store, tenant, seconds=seconds)
    assert isinstance(outcome, Granted), outcome
    return outcome.lease


def committed(
    store: Store, lease: Lease, clock: FakeClock, tenant: str = TENANT, *, enabled: bool = True
) -> Snapshot | None:
    """Store what a read under this lease returned that started now."""
    wall = datetime.fromtimestamp(clock.wall(), UTC)
    return store.transact(
        tenant,
        partial(
            commit,
            lease=lease,
            reading=Reading(Document(enabled, wall - timedelta(hours=1)), 'W/"v1"'),
            read_at=clock.monotonic(),
            fetched_at=wall,
            ttl_seconds=30.0,
            hard_limit_seconds=3600.0,
            tenant=tenant,
            latency_seconds=0.05,
        ),
    )


def failed(store: Store, lease: Lease, clock: FakeClock, tenant: str = TENANT) -> Failure | None:
    """Store that a read under this lease failed now."""
    return store.transact(
        tenant,
        partial(
            fail,
            lease=lease,
            kind="unavailable",
            message="the config API did not answer in time",
            status=503,
            backoff_seconds=4.5,
            server_wait_seconds=60.0,
            wall=clock.wall(),
            tenant=tenant,
            latency_seconds=5.0,
        ),
    )


def released(store: Store, lease: Lease, tenant: str = TENANT) -> None:
    """End a lease without a result."""
    store.transact(tenant, partial(release, lease=lease))


def complete(clock: FakeClock) -> Entry:
    """Return an entry in which no field has its default, as of now."""
    now, wall = clock.monotonic(), datetime.fromtimestamp(clock.wall(), UTC)
    return Entry(
        generation=1 << 50,
        invalidated_at=now - 1.5,
        stale_since=now - 2.5,
        token=(1 << 50) + 3,
        paced_until=now + 1.25,
        snapshot=Snapshot(
            enabled=False,
            updated_at=datetime(2026, 3, 1, 12, 30, 15, 250_000, tzinfo=UTC),
            etag='W/"v-1"',
            generation=(1 << 50) - 1,
            token=(1 << 50) + 1,
            read_at=now - 12.5,
            fetched_at=wall - timedelta(seconds=12.5),
            lifetime_seconds=30.0,
            writer="host:1",
        ),
        failure=Failure(
            kind="rate_limited",
            message="the config API answered 429; “später”",
            status=429,
            count=3,
            generation=1 << 50,
            token=(1 << 50) + 2,
            failed_at=now - 0.5,
            since=wall - timedelta(seconds=20),
            retry_at=now + 4.5,
            server_retry_at=now + 60.0,
        ),
        lease=Lease(
            token=(1 << 50) + 3, holder="host:2", generation=1 << 50, expires_at=now + 7.0, overtaken_at=now - 0.25
        ),
    )


def stored(store: Store, entry: Entry, tenant: str = TENANT) -> None:
    """Store an entry as it is."""
    store.transact(tenant, lambda _entry, _moment: Change(entry, None))


def without_instants(entry: Entry) -> Entry:
    """Return the parts of an entry that do not depend on a clock."""
    snapshot, failure, lease = entry.snapshot, entry.failure, entry.lease
    return replace(
        entry,
        invalidated_at=None,
        stale_since=None,
        paced_until=0.0,
        snapshot=snapshot and replace(snapshot, read_at=0.0),
        failure=failure and replace(failure, failed_at=0.0, retry_at=0.0, server_retry_at=None),
        lease=lease and replace(lease, expires_at=0.0, overtaken_at=None),
    )


def instants(entry: Entry) -> list[float | None]:
    """Return every instant in an entry."""
    snapshot, failure, lease = entry.snapshot, entry.failure, entry.lease
    return [
        entry.invalidated_at,
        entry.stale_since,
        entry.paced_until or None,
        snapshot.read_at if snapshot else None,
        failure.failed_at if failure else None,
        failure.retry_at if failure else None,
        failure.server_retry_at if failure else None,
        lease.expires_at if lease else None,
        lease.overtaken_at if lease else None,
    ]


def at_once(count: int, work: Callable[[int], object]) -> list[object]:
    """Run the work in so many threads at once and return the results."""
    start = threading.Barrier(count)
    results: list[object] = []

    def run(number: int) -> None:
        start.wait()
        results.append(work(number))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# -- every store ------------------------------------------------------------------------------------------------------


class StoreContract:
    """What every store promises."""

    instant_tolerance_seconds: ClassVar[float] = 1e-6
    """How far an instant may move in the store: a store that converts between clocks moves it a little."""

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

    def same_entry(self, one: Entry, other: Entry) -> bool:
        """Return whether two entries are equal; instants may have moved a little on the way."""
        return without_instants(one) == without_instants(other) and all(
            self.same_instant(left, right) for left, right in zip(instants(one), instants(other), strict=True)
        )

    # -- entries --------------------------------------------------------------------------------------------------

    def test_an_unknown_tenant_has_the_empty_entry(self, store: Store) -> None:
        assert store.load(TENANT) == Entry()

    def test_an_entry_is_loaded_as_it_was_stored(self, store: Store, clock: FakeClock) -> None:
        entry = complete(clock)
        stored(store, entry)
        assert self.same_entry(store.load(TENANT), entry)

    def test_a_transition_gets_the_stored_entry(self, store: Store, clock: FakeClock) -> None:
        entry = complete(clock)
        stored(store, entry)
        given: list[Entry] = []

        def look(entry: Entry, _moment: Moment) -> Change[None]:
            given.append(entry)
            return Change(entry, None)

        store.transact(TENANT, look)
        assert self.same_entry(given[-1], entry)

    def test_the_result_of_the_transition_is_returned(self, store: Store) -> None:
        assert store.transact(TENANT, lambda entry, _: Change(entry, "the result")) == "the result"

    def test_the_moment_is_the_present_on_the_clock_of_the_process(
        self, store: Store, clock: FakeClock, advance: Callable[[float], None]
    ) -> None:
        def now(entry: Entry, moment: Moment) -> Change[float]:
            return Change(entry, moment.now)

        assert self.same_instant(store.transact(TENANT, now), clock.monotonic())
        advance(2.5)
        assert self.same_instant(store.transact(TENANT, now), clock.monotonic())

    def test_an_invalidation_raises_the_generation(self, store: Store, clock: FakeClock) -> None:
        first = invalidated(store)
        assert first >= 1
        second = invalidated(store)
        assert second > first
        entry = store.load(TENANT)
        assert entry.generation == second
        assert self.same_instant(entry.invalidated_at, clock.monotonic())

    def test_tenants_are_separate(self, store: Store, clock: FakeClock) -> None:
        generation = invalidated(store)
        lease = leased(store, OTHER)
        assert lease.generation == 0
        assert committed(store, lease, clock, OTHER) is not None
        assert store.load(TENANT).generation == generation
        assert store.load(TENANT).snapshot is None
        assert store.load(OTHER).generation == 0
        leased(store)

    def test_what_a_transition_raises_passes_through_and_nothing_is_stored(
        self, store: Store, clock: FakeClock
    ) -> None:
        invalidated(store)
        entry, before = store.load(TENANT), word(store)

        class RefusedError(Exception):
            pass

        def refuse(_entry: Entry, _moment: Moment) -> Change[None]:
            raise RefusedError

        with pytest.raises(RefusedError):
            store.transact(TENANT, refuse, delivery_ids=["msg_1"])
        assert store.load(TENANT) == entry
        assert word(store) == before
        assert store.history() == ()
        assert not delivered(store, "msg_1").duplicate, "the store works on, and no id was remembered"

    def test_a_transition_that_returns_the_same_entry_changes_nothing(self, store: Store, clock: FakeClock) -> None:
        stored(store, complete(clock))
        before = word(store)
        store.transact(TENANT, lambda entry, _: Change(entry, None))
        assert word(store) == before
        assert store.history() == ()

    # -- leases and the fence -------------------------------------------------------------------------------------

    def test_a_read_is_committed_under_its_lease(self, store: Store, clock: FakeClock) -> None:
        lease = leased(store)
        snapshot = committed(store, lease, clock)
        entry = store.load(TENANT)
        assert snapshot is not None
        assert entry.snapshot is not None
        assert self.same_instant(entry.snapshot.read_at, clock.monotonic())
        assert replace(entry.snapshot, read_at=0.0) == replace(snapshot, read_at=0.0)
        assert entry.snapshot.writer == store.holder
        assert entry.lease is None

    def test_a_read_that_an_invalidation_overtook_is_stored_as_stale(
        self, store: Store, make_store: MakeStore, clock: FakeClock
    ) -> None:
        lease = leased(store)
        generation = invalidated(make_store())
        assert committed(store, lease, clock) is not None
        entry = store.load(TENANT)
        assert entry.generation == generation
        assert entry.snapshot is not None
        assert entry.snapshot.generation < generation
        assert self.same_instant(entry.stale_since, clock.monotonic())

    def test_a_failure_is_stored_and_the_snapshot_stays(self, store: Store, clock: FakeClock) -> None:
        committed(store, leased(store), clock)
        failure = failed(store, leased(store), clock)
        entry = store.load(TENANT)
        assert failure is not None
        assert entry.snapshot is not None
        assert entry.failure is not None
        assert (entry.failure.kind, entry.failure.status, entry.failure.count) == ("unavailable", 503, 1)
        assert self.same_instant(entry.failure.retry_at, clock.monotonic() + 4.5)
        assert self.same_instant(entry.failure.server_retry_at, clock.monotonic() + 60.0)

    def test_a_lease_has_a_holder_and_the_next_one_a_higher_token(self, store: Store) -> None:
        first = leased(store)
        assert first.holder == store.holder
        released(store, first)
        assert leased(store).token > first.token

    def test_a_lease_that_a_later_one_replaced_commits_nothing(
        self, store: Store, clock: FakeClock, advance: Callable[[float], None]
    ) -> None:
        late = leased(store, seconds=1.0)
        advance(1.5)
        present = leased(store)
        before = store.load(TENANT)
        assert committed(store, late, clock) is None
        assert failed(store, late, clock) is None
        released(store, late)
        assert store.load(TENANT) == before
        assert committed(store, present, clock) is not None

    def test_the_own_process_is_not_gone(self, store: Store) -> None:
        assert store.holder
        assert not store.is_gone(store.holder)

    @pytest.mark.parametrize("holder", ["", "1:1:1", "a:b:c/d", "4026531836:x:1/0", "\x00", "1" * 5000])
    def test_a_holder_of_any_form_raises_no_error(self, store: Store, holder: str) -> None:
        assert store.is_gone(holder) in {True, False}

    # -- threads --------------------------------------------------------------------------------------------------

    def test_no_invalidation_of_many_threads_is_lost(self, store: Store, clock: FakeClock) -> None:
        results = at_once(8, lambda number: [invalidated(store, row=event(clock, actor=f"{number}")) for _ in range(5)])
        generations = [one for some in results for one in some]  # type: ignore[attr-defined]  # lists of integers
        assert len(set(generations)) == 40
        assert store.load(TENANT).generation == max(generations)
        assert len(store.history()) == 40

    def test_of_many_threads_with_one_delivery_one_carries_it_out(self, store: Store, clock: FakeClock) -> None:
        results = at_once(8, lambda _: delivered(store, "msg_1", row=event(clock)).duplicate)
        assert sorted(map(bool, results)) == [False] + [True] * 7
        assert len(store.history()) == 1

    # -- version words --------------------------------------------------------------------------------------------

    def test_the_word_changes_with_every_change(self, store: Store, clock: FakeClock) -> None:
        seen = [word(store)]
        invalidated(store)
        seen.append(word(store))
        lease = leased(store)
        seen.append(word(store))
        committed(store, lease, clock)
        seen.append(word(store))
        released(store, leased(store))
        seen.append(word(store))
        delivered(store, "msg_1")
        seen.append(word(store))
        failed(store, leased(store), clock)
        seen.append(word(store))
        store.touch(TENANT)
        seen.append(word(store))
        store.touch(TENANT)
        seen.append(word(store))
        assert len(set(seen)) == len(seen), "no word is repeated"

    def test_the_word_of_one_tenant_stays_while_another_changes(self, store: Store) -> None:
        word(store)
        before = word(store, OTHER)
        invalidated(store)
        store.touch(TENANT)
        assert word(store, OTHER) == before

    def test_a_change_can_be_loaded_once_the_word_has_changed(self, store: Store) -> None:
        """A thread invalidates; a reader that follows the words alone ends at the last generation."""
        done = threading.Event()
        last: list[int] = []

        def write() -> None:
            last.append([invalidated(store) for _ in range(100)][-1])
            done.set()

        writer = threading.Thread(target=write)
        words, index = store.version_ref(TENANT)
        remembered, generation, until = words[index], 0, time.monotonic() + DEADLINE_SECONDS
        writer.start()
        while not (done.is_set() and generation == last[0]) and time.monotonic() < until:
            words, index = store.version_ref(TENANT)
            present = words[index]
            if present != remembered:
                remembered = present
                generation = store.load(TENANT).generation
            time.sleep(0)
        writer.join()
        assert generation == last[0]

    def test_a_change_by_the_own_handle_can_be_loaded_at_once(self, store: Store) -> None:
        for _ in range(20):
            generation = invalidated(store)
            assert store.load(TENANT).generation == generation

    # -- deliveries -----------------------------------------------------------------------------------------------

    def test_a_repeated_delivery_changes_nothing_at_all(
        self, store: Store, make_store: MakeStore, clock: FakeClock
    ) -> None:
        first = delivered(store, "msg_1", row=event(clock))
        entry, before, rows = store.load(TENANT), word(store), store.history()
        assert delivered(make_store(), "msg_1", row=event(clock)) == Invalidated(first.generation, duplicate=True)
        assert store.load(TENANT) == entry
        assert word(store) == before
        assert store.history() == rows

    def test_a_delivery_id_is_forgotten_after_its_time(
        self, store: Store, make_store: MakeStore, advance: Callable[[float], None]
    ) -> None:
        delivered(store, "msg_1")
        advance(DELIVERY_ID_SECONDS - 5.0)
        assert delivered(make_store(), "msg_1").duplicate
        advance(10.0)
        assert not delivered(store, "msg_1").duplicate
        assert delivered(store, "msg_1").duplicate

    def test_a_short_history_does_not_shorten_the_memory_of_delivery_ids(
        self, make_store: MakeStore, clock: FakeClock, advance: Callable[[float], None]
    ) -> None:
        store = make_store(history_seconds=60.0, history_rows=1)
        delivered(store, "msg_1", row=event(clock))
        delivered(store, "msg_2", row=event(clock))
        advance(590.0)
        assert delivered(store, "msg_1").duplicate
        assert delivered(store, "msg_2").duplicate

    def test_two_tenants_may_have_deliveries_of_one_id(self, store: Store) -> None:
        assert not delivered(store, "msg_1").duplicate
        assert not delivered(store, "msg_1", OTHER).duplicate

    def test_the_transition_sees_which_ids_are_known(self, store: Store) -> None:
        delivered(store, "msg_1")

        def seen(entry: Entry, moment: Moment) -> Change[frozenset[str]]:
            return Change(entry, moment.seen)

        assert store.transact(TENANT, seen, delivery_ids=["msg_2", "msg_1", "msg_3"]) == {"msg_1"}
        assert store.transact(TENANT, seen) == frozenset()
        assert not delivered(store, "msg_2").duplicate, "to ask for an id does not store it"

    @pytest.mark.parametrize("delivery_id", ["a" * 256, "msg:1}{*", "é\n\x00", "' OR 1=1 --"])
    def test_a_delivery_id_may_hold_any_characters(self, store: Store, delivery_id: str) -> None:
        assert not delivered(store, delivery_id).duplicate
        assert delivered(store, delivery_id).duplicate

    # -- history --------------------------------------------------------------------------------------------------

    def test_a_history_row_is_loaded_as_it_was_added(self, store: Store, clock: FakeClock) -> None:
        row = event(
            clock,
            cause=Cause.DELIVERY,
            enabled=False,
            actor="webhook",
            delivery_id="msg_1",
            latency_seconds=0.125,
            detail="generation 1 “é”",
        )
        store.append(row)
        store.append(event(clock))
        latest, first = store.history()
        assert replace(first, id=0) == row
        assert (latest.enabled, latest.latency_seconds) == (None, None)
        assert latest.id > first.id > 0

    def test_the_events_of_a_transition_are_stored_with_it(self, store: Store, clock: FakeClock) -> None:
        committed(store, leased(store), clock)
        delivered(store, "msg_1", row=event(clock, cause=Cause.DELIVERY, delivery_id="msg_1"))
        assert [(row.cause, row.delivery_id) for row in store.history()] == [
            (Cause.DELIVERY, "msg_1"),
            (Cause.CHANGED, ""),
        ]

    def test_events_are_stored_where_the_entry_stays(self, store: Store, clock: FakeClock) -> None:
        row = event(clock, detail="nothing else")
        store.transact(TENANT, lambda entry, _: Change(entry, None, events=(row,)))
        assert [replace(found, id=0) for found in store.history()] == [row]

    def test_history_is_newest_first_by_tenant_and_in_pages(
        self, store: Store, make_store: MakeStore, clock: FakeClock
    ) -> None:
        other = make_store()
        for number in range(10):
            (store if number % 2 else other).append(event(clock, TENANT if number < 8 else OTHER, detail=str(number)))
        assert [row.detail for row in store.history(limit=3)] == ["9", "8", "7"]
        first = other.history(tenant=TENANT, limit=3)
        assert [row.detail for row in first] == ["7", "6", "5"]
        rest = store.history(tenant=TENANT, before=first[-1].id)
        assert [row.detail for row in rest] == ["4", "3", "2", "1", "0"]
        assert store.history(tenant=TENANT, before=rest[-1].id) == ()

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
        assert [row.detail for row in store.history()] == ["young"]
        store.append(event(clock, detail="new"))
        assert [row.detail for row in store.history()] == ["new", "young"]

    # -- members --------------------------------------------------------------------------------------------------

    def test_members_are_listed_until_they_are_silent_for_too_long(
        self, store: Store, make_store: MakeStore, advance: Callable[[float], None]
    ) -> None:
        other = make_store()
        store.report(
            [
                Member("host:1", TENANT, 3, True, "fresh", 1.5),
                Member("host:1", OTHER, 0, None, "expired", None),
            ]
        )
        advance(MEMBER_SECONDS / 3)
        other.report([Member("host:2", TENANT, 2, False, "stale", 40.0)])
        listed = {member.name: member for member in store.members(TENANT)}
        assert set(listed) == {"host:1", "host:2"}
        assert abs(listed["host:1"].seen_seconds - MEMBER_SECONDS / 3) <= self.instant_tolerance_seconds
        assert replace(listed["host:1"], seen_seconds=0.0) == Member("host:1", TENANT, 3, True, "fresh", 1.5)
        assert len(other.members()) == 3
        advance(MEMBER_SECONDS * 3 / 4)
        assert [member.name for member in store.members()] == ["host:2"]

    def test_a_new_report_replaces_the_old_one(self, store: Store) -> None:
        store.report([Member("host:1", TENANT, 3, True, "fresh", 1.5)])
        store.report([Member("host:1", TENANT, 4, None, "expired", None)])
        (member,) = store.members(TENANT)
        assert (member.generation, member.enabled, member.age_seconds) == (4, None, None)

    # -- the rest -------------------------------------------------------------------------------------------------

    def test_a_store_that_works_is_healthy(self, store: Store) -> None:
        store.load(TENANT)
        assert store.health().ok
        assert store.health().problem == ""

    def test_a_poll_returns_nothing_where_nothing_changed(self, store: Store) -> None:
        store.load(TENANT)
        store.poll()
        assert tuple(store.poll()) == ()

    def test_a_store_can_be_used_again_after_close(self, store: Store) -> None:
        store.start()
        store.start()
        first = invalidated(store)
        store.close()
        store.close()
        assert store.load(TENANT).generation == first
        assert invalidated(store) > first

    def test_a_forked_child_loads_and_invalidates_under_a_name_of_its_own(self, store: Store) -> None:
        first = invalidated(store)
        parent = store.holder

        def child() -> bool:
            store.after_fork()
            store.after_fork()
            return (
                store.load(TENANT).generation == first
                and invalidated(store) > first
                and store.holder != parent
                and not store.is_gone(store.holder)
            )

        assert in_a_fork(child)
        assert store.holder == parent


def in_a_fork(work: Callable[[], bool]) -> bool:
    """Return whether the work was done and true in a forked child; a child that hangs is killed."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(int(DEADLINE_SECONDS))
        how = signal.SIGUSR2
        try:
            how = signal.SIGUSR1 if work() else signal.SIGUSR2
        finally:
            # by a signal: coverage saves its data at an exit, and has locks of its own that a busy parent may hold
            os.kill(os.getpid(), how)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGUSR1


# -- other processes. Each reports that it is ready and begins on command, so that they run against each other. ------


def _invalidate_many(make: MakeElsewhere, pipe: Connection, times: int) -> None:
    store = make()
    pipe.send("ready")
    pipe.recv()
    pipe.send([invalidated(store) for _ in range(times)])


def _deliver_many(make: MakeElsewhere, pipe: Connection, times: int) -> None:
    store = make()
    pipe.send("ready")
    pipe.recv()
    pipe.send([delivered(store, f"msg_{number}").duplicate for number in range(times)])


def _lease_many(make: MakeElsewhere, pipe: Connection, times: int) -> None:
    store = make()
    pipe.send("ready")
    pipe.recv()
    tokens: list[int] = []
    until = time.monotonic() + DEADLINE_SECONDS
    while len(tokens) < times and time.monotonic() < until:
        outcome = try_lease(store, seconds=30.0)
        if isinstance(outcome, Granted):
            tokens.append(outcome.lease.token)
            released(store, outcome.lease)
    pipe.send(tokens)


def _hold_a_lease(make: MakeElsewhere, pipe: Connection, seconds: float) -> None:
    pipe.send(leased(make(), seconds=seconds).token)
    signal.pause()


@contextmanager
def elsewhere(
    work: Callable[..., None], make: MakeElsewhere, *given: object
) -> Iterator[tuple[SpawnProcess, Connection]]:
    """Run the work in a process of its own, which is killed at the end whatever happens."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=work, args=(make, theirs, *given), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours
    finally:
        process.join(DEADLINE_SECONDS / 4)  # a process that has done its work ends by itself
        process.kill()
        process.join()
        process.close()
        ours.close()


def race(*pipes: Connection) -> list[int]:
    """Start the processes at the same moment and return the results of all of them."""
    for pipe in pipes:
        assert pipe.poll(DEADLINE_SECONDS)
        assert pipe.recv() == "ready"
    for pipe in pipes:
        pipe.send("go")
    results: list[int] = []
    for pipe in pipes:
        assert pipe.poll(DEADLINE_SECONDS)
        results += pipe.recv()
    return results


# -- stores that several processes share ------------------------------------------------------------------------------


def change_by_invalidation(store: Store, lease: Lease, clock: FakeClock) -> None:
    invalidated(store)


def change_by_delivery(store: Store, lease: Lease, clock: FakeClock) -> None:
    delivered(store, "msg_1")


def change_by_commit(store: Store, lease: Lease, clock: FakeClock) -> None:
    assert committed(store, lease, clock) is not None


def change_by_failure(store: Store, lease: Lease, clock: FakeClock) -> None:
    assert failed(store, lease, clock) is not None


def change_by_release(store: Store, lease: Lease, clock: FakeClock) -> None:
    released(store, lease)


CHANGES = [change_by_invalidation, change_by_delivery, change_by_commit, change_by_failure, change_by_release]


class SharedStoreContract(StoreContract):
    """What a store promises beyond that when several processes share it."""

    visible_within_seconds: ClassVar[float] = 0.0
    """How soon the change of another handle is seen by the version word; 0 means at once."""

    def eventually(self, condition: Callable[[], bool]) -> bool:
        """Return whether the condition comes true within the bound of the store."""
        try:
            return wait_until(condition, seconds=self.visible_within_seconds)
        except AssertionError:
            return False

    @pytest.fixture
    def other(self, store: Store, make_store: MakeStore) -> Store:
        other = make_store()
        assert other is not store
        return other

    def test_handles_have_different_names(self, store: Store, other: Store) -> None:
        assert store.holder != other.holder
        assert not store.is_gone(other.holder)

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_change_by_another_handle_changes_the_word_and_is_polled(
        self, store: Store, other: Store, clock: FakeClock, change: Callable[[Store, Lease, FakeClock], None]
    ) -> None:
        lease = leased(other)
        assert self.eventually(lambda: store.load(TENANT).token == lease.token)
        before = word(store)
        store.poll()
        change(other, lease, clock)
        assert self.eventually(lambda: word(store) != before)
        assert self.eventually(lambda: self.same_entry(store.load(TENANT), other.load(TENANT)))
        polled: set[str] = set()

        def is_polled() -> bool:
            polled.update(store.poll())
            return TENANT in polled

        assert self.eventually(is_polled)
        assert polled == {TENANT}

    def test_one_lease_at_a_time(self, store: Store, other: Store) -> None:
        lease = leased(store, seconds=7.0)
        outcome = try_lease(other, seconds=7.0)
        assert isinstance(outcome, Busy)
        assert (outcome.token, outcome.holder) == (lease.token, store.holder)
        assert 0 < outcome.remaining_seconds <= 7.0 + self.instant_tolerance_seconds
        released(store, lease)
        assert leased(other).token > lease.token

    def test_of_many_threads_on_two_handles_one_handle_gets_the_lease(self, store: Store, other: Store) -> None:
        outcomes = at_once(8, lambda number: type(try_lease((store, other)[number % 2])).__name__)
        assert outcomes.count("Busy") == 4

    def test_everything_survives_the_handles(
        self, store: Store, make_store: MakeStore, clock: FakeClock, advance: Callable[[float], None]
    ) -> None:
        generation = delivered(store, "msg_1").generation
        lease = leased(store)
        committed(store, lease, clock)
        store.append(event(clock, detail="kept"))
        store.close()
        advance(5.0)
        later = make_store()
        assert self.eventually(lambda: later.load(TENANT).snapshot is not None)
        entry = later.load(TENANT)
        assert (entry.generation, entry.token) == (generation, lease.token)
        assert entry.snapshot is not None
        assert self.same_instant(entry.snapshot.read_at, clock.monotonic() - 5.0)
        assert later.history()[0].detail == "kept"
        assert delivered(later, "msg_1").duplicate

    # -- storage keys ---------------------------------------------------------------------------------------------

    def test_two_environments_with_the_same_tenant_share_nothing(self, make_store: MakeStore, clock: FakeClock) -> None:
        one = make_store(keys={TENANT: f"{TENANT}@one.example"})
        two = make_store(keys={TENANT: f"{TENANT}@two.example", OTHER: f"{OTHER}@two.example"})
        before = word(two)
        delivered(one, "msg_1", row=event(clock, detail="one"))
        committed(one, leased(one), clock)
        one.report([Member("host:1", TENANT, 1, True, "fresh", 1.0)])
        assert two.load(TENANT) == Entry()
        assert word(two) == before
        assert TENANT not in two.poll()
        assert not delivered(two, "msg_1", row=event(clock, detail="two")).duplicate
        two.report([Member("host:2", TENANT, 1, True, "fresh", 1.0), Member("host:2", OTHER, 1, True, "fresh", 1.0)])
        assert [row.detail for row in two.history()] == ["two"]
        assert [row.detail for row in two.history(tenant=TENANT)] == ["two"]
        assert sorted(row.detail for row in one.history()) == ["first value", "one"]
        assert [member.name for member in two.members(TENANT)] == ["host:2"]
        assert [member.name for member in two.members()] == ["host:2", "host:2"]
        assert [member.name for member in one.members()] == ["host:1"]

    def test_a_change_under_the_same_key_is_polled_by_the_name_of_the_tenant(self, make_store: MakeStore) -> None:
        keys = {TENANT: f"{TENANT}@one.example"}
        one, two = make_store(keys=keys), make_store(keys=keys)
        assert two.load(TENANT) == Entry()
        two.poll()
        generation = invalidated(one)
        assert self.eventually(lambda: two.load(TENANT).generation == generation)
        polled: set[str] = set()

        def is_polled() -> bool:
            polled.update(two.poll())
            return TENANT in polled

        assert self.eventually(is_polled)
        assert polled == {TENANT}

    # -- other processes ------------------------------------------------------------------------------------------

    def test_no_invalidation_of_two_processes_is_lost(self, make_elsewhere: MakeElsewhere) -> None:
        times = 150
        with (
            elsewhere(_invalidate_many, make_elsewhere, times) as (_, one),
            elsewhere(_invalidate_many, make_elsewhere, times) as (_, two),
        ):
            generations = race(one, two)
        assert len(set(generations)) == 2 * times
        store = make_elsewhere()
        assert self.eventually(lambda: store.load(TENANT).generation == max(generations))
        store.close()

    def test_one_delivery_that_arrives_in_two_processes_is_carried_out_once(
        self, make_elsewhere: MakeElsewhere
    ) -> None:
        times = 100
        with (
            elsewhere(_deliver_many, make_elsewhere, times) as (_, one),
            elsewhere(_deliver_many, make_elsewhere, times) as (_, two),
        ):
            duplicates = race(one, two)
        assert duplicates.count(False) == duplicates.count(True) == times

    def test_two_processes_never_hold_leases_with_the_same_token(self, make_elsewhere: MakeElsewhere) -> None:
        times = 50
        with (
            elsewhere(_lease_many, make_elsewhere, times) as (_, one),
            elsewhere(_lease_many, make_elsewhere, times) as (_, two),
        ):
            tokens = race(one, two)
        assert len(tokens) == len(set(tokens)) == 2 * times

    def test_the_lease_of_a_killed_process_ends_within_its_life(self, make_elsewhere: MakeElsewhere) -> None:
        life_seconds = 1.0
        store = make_elsewhere()
        with elsewhere(_hold_a_lease, make_elsewhere, life_seconds) as (process, pipe):
            assert pipe.poll(DEADLINE_SECONDS)
            token = pipe.recv()
            process.kill()
            process.join()
        outcome = try_lease(store)
        while not isinstance(outcome, Granted):
            assert isinstance(outcome, Busy)
            assert outcome.remaining_seconds < life_seconds + 0.5, "the lease outlives its stated life"
            time.sleep(min(0.05, outcome.remaining_seconds))
            outcome = try_lease(store)
        assert outcome.lease.token > token
        store.close()
