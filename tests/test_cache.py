"""The cache under threads and tasks, with a source that does as told: one read, the fence, no needless wait."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from typing import TypeVar

import pytest

from external_oms.cache import Cache, Change, ChangeKind
from external_oms.config import Document, Reading, parse_instant
from external_oms.entry import (
    PACE_BURST,
    PACE_SECONDS,
    Entry,
    Granted,
    Invalidated,
    Invalidation,
    Transition,
    begin_read,
    commit,
    last_token,
    release,
)
from external_oms.errors import NothingToServe, RateLimited, ReadError, StoreError, TenantError, Unavailable
from external_oms.policy import Evaluation, Freshness, Windows
from external_oms.policy import Source as Origin
from external_oms.singleflight import ReadEnd
from external_oms.stores.fallback import Fallback
from external_oms.stores.memory import MemoryStore
from tests.support.clock import FakeClock, SkipClock
from tests.support.scripted import SOON, TENANT, WINDOWS, Hand, Source, make_cache
from tests.support.stores import FaultyStore
from tests.support.waiting import wait_until

CROWD = 50

NEVER = 600.0
"""The timeout in seconds where a test must not wait for it: longer than a test may last."""

T = TypeVar("T")


class Threaded:
    """A cache with real threads on a clock that can skip, and the source under it."""

    def __init__(self) -> None:
        self.clock = SkipClock()
        self.source = Source(self.clock)
        self.made: list[Cache] = []

    def make(
        self,
        *,
        tenants: tuple[str, ...] = (TENANT,),
        windows: Windows = WINDOWS,
        timeout_seconds: float = 5.0,
        background: bool = False,
        store: MemoryStore | None = None,
        max_waiters: int = 16,
    ) -> Cache:
        cache = make_cache(
            self.source,
            self.clock,
            tenants=tenants,
            windows=windows,
            timeout_seconds=timeout_seconds,
            background=background,
            store=store,
            max_waiters=max_waiters,
        )
        self.made.append(cache)
        return cache

    def hold(self, *tenants: str) -> None:
        self.source.holding |= set(tenants or (TENANT,))


STRANGERS: set[threading.Thread] = set()
"""Threads that were there before the test: of whatever an earlier test of this process has not put away."""


def newcomers() -> set[threading.Thread]:
    return set(threading.enumerate()) - STRANGERS


@pytest.fixture
def threaded() -> Iterator[Threaded]:
    before = set(threading.enumerate())
    STRANGERS.clear()
    STRANGERS.update(before)
    made = Threaded()
    yield made
    made.source.release()
    for cache in made.made:
        cache.close(SOON)
    assert [thread.name for thread in set(threading.enumerate()) - before if "external-oms" in thread.name] == []


class Timed:
    """A cache on a clock that stands still until told, with its jobs run by hand; every change is kept."""

    def __init__(self, clock: FakeClock, *, background: bool = True, windows: Windows = WINDOWS) -> None:
        self.clock = clock
        self.source = Source(clock)
        self.hand = Hand(clock)
        self.store = MemoryStore(clock=clock)
        self.cache = make_cache(
            self.source, clock, runner=self.hand, store=self.store, background=background, windows=windows
        )
        self.changes: list[Change] = []
        self.cache.changes.subscribe(self.changes.append)


@pytest.fixture
def timed(clock: FakeClock) -> Timed:
    return Timed(clock)


def invalidate(cache: Cache, delivery_id: str | None = None) -> int:
    result, shared = cache.invalidate(TENANT, Invalidation(delivery_id=delivery_id))
    assert shared
    return result.generation


def value(evaluation: Evaluation) -> bool | None:
    return evaluation.servable.enabled if evaluation.servable is not None else None


# -- one read ------------------------------------------------------------------------------------------------------


class Crowd:
    """Fifty threads and fifty tasks that ask at once, and what they were told."""

    def __init__(self, cache: Cache) -> None:
        self.evaluations: list[Evaluation] = []
        self._cache = cache
        self._ready = threading.Barrier(CROWD + 2)
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(CROWD)]
        self._threads.append(threading.Thread(target=self._loop, daemon=True))
        for thread in self._threads:
            thread.start()
        self._ready.wait(SOON)

    def _ask(self) -> None:
        self._ready.wait(SOON)
        self._tell(self._cache.lookup(TENANT))

    def _loop(self) -> None:
        async def ask() -> None:
            self._tell(await self._cache.lookup_async(TENANT))

        async def everybody() -> None:
            tasks = [asyncio.create_task(ask()) for _ in range(CROWD)]
            await asyncio.sleep(0)
            self._ready.wait(SOON)
            await asyncio.gather(*tasks)

        asyncio.run(everybody())

    def _tell(self, evaluation: Evaluation) -> None:
        with self._lock:
            self.evaluations.append(evaluation)

    def wait(self) -> list[Evaluation]:
        until = time.monotonic() + SOON
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        assert len(self.evaluations) == 2 * CROWD, "somebody was left waiting"
        return self.evaluations


def test_a_crowd_on_a_cold_cache_causes_one_read_and_all_get_its_value(threaded: Threaded) -> None:
    threaded.hold()
    crowd = Crowd(threaded.make())
    threaded.source.held().answer(True)
    evaluations = crowd.wait()
    assert [value(evaluation) for evaluation in evaluations] == [True] * 2 * CROWD
    assert {evaluation.freshness for evaluation in evaluations} == {Freshness.FRESH}
    assert len(threaded.source.reads) == 1


def test_a_crowd_shares_one_failure(threaded: Threaded) -> None:
    cache = threaded.make()
    threaded.hold()
    crowd = Crowd(cache)
    threaded.source.held().answer(Unavailable("500", status=500))
    evaluations = crowd.wait()
    assert [value(evaluation) for evaluation in evaluations] == [None] * 2 * CROWD
    assert len(threaded.source.reads) == 1
    failure = cache.failure(evaluations[0])
    assert isinstance(failure, NothingToServe)
    assert isinstance(failure.failure, Unavailable)
    assert failure.failure.status == 500


def test_a_crowd_before_a_read_that_hangs_is_let_go_at_its_deadline(threaded: Threaded) -> None:
    cache = threaded.make(timeout_seconds=0.2)
    threaded.hold()
    evaluations = Crowd(cache).wait()
    assert [value(evaluation) for evaluation in evaluations] == [None] * 2 * CROWD
    assert len(threaded.source.reads) == 1
    assert cache.failure(evaluations[0]).failure is None, "no read has ended: there is no failure to name"


def test_an_evaluation_waits_no_longer_than_one_read(timed: Timed) -> None:
    timed.store.is_gone = lambda holder: False  # type: ignore[method-assign]  # the other one lives
    timed.store.transact(TENANT, partial(begin_read, holder="another", lease_seconds=60.0, newer_than=0))
    began = timed.clock.monotonic()
    assert value(timed.cache.lookup(TENANT)) is None
    assert 5.0 <= timed.clock.monotonic() - began <= 6.0


def test_who_waits_in_vain_is_served_what_may_be_served_while_reads_fail(threaded: Threaded) -> None:
    cache = threaded.make(timeout_seconds=0.1)
    cache.lookup(TENANT)
    threaded.hold()
    threaded.clock.skip(100.0)
    evaluation = cache.lookup(TENANT)
    assert (value(evaluation), evaluation.freshness) == (True, Freshness.STALE)
    evaluation = asyncio.run(cache.lookup_async(TENANT))
    assert (value(evaluation), evaluation.freshness) == (True, Freshness.STALE)
    threaded.clock.skip(3600.0)
    assert value(cache.lookup(TENANT)) is None
    assert value(asyncio.run(cache.lookup_async(TENANT))) is None
    assert len(threaded.source.reads) == 2


def test_whoever_read_gets_the_value_as_read_for_this_very_call_and_the_next_as_remembered(threaded: Threaded) -> None:
    cache = threaded.make()
    first, second = cache.lookup(TENANT), cache.lookup(TENANT)
    assert (first.source, second.source) == (Origin.API, Origin.MEMORY)
    invalidate(cache)
    threaded.clock.skip(31.0)
    assert asyncio.run(cache.lookup_async(TENANT)).source is Origin.API


def test_a_defect_of_the_store_ends_the_flight_for_all_who_wait_and_the_next_one_flies(
    threaded: Threaded, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(MemoryStore):
        broken = True

        def transact(self, tenant: str, transition: Transition[T], *, delivery_ids: Sequence[str] = ()) -> T:
            if self.broken:
                raise ZeroDivisionError
            return super().transact(tenant, transition, delivery_ids=delivery_ids)

    store = Failing(clock=threaded.clock)
    cache = threaded.make(store=store, timeout_seconds=NEVER)
    assert value(cache.lookup(TENANT)) is None
    with pytest.raises(Unavailable, match="bug"):
        cache.refresh(TENANT)
    assert "ZeroDivisionError" in caplog.text
    store.broken = False
    assert value(cache.lookup(TENANT)) is True


# -- nothing blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.0, 31.0])
def test_with_a_servable_value_nobody_waits_for_the_read(threaded: Threaded, seconds: float) -> None:
    cache = threaded.make()
    cache.lookup(TENANT)
    threaded.clock.skip(seconds)
    invalidate(cache)
    threaded.hold()
    evaluations = [cache.lookup(TENANT) for _ in range(200)]
    held = threaded.source.held()  # all came back before it was answered
    assert {(value(evaluation), evaluation.freshness) for evaluation in evaluations} == {(True, Freshness.STALE)}
    assert len(threaded.source.reads) == 2
    held.answer(False)
    wait_until(lambda: value(cache.lookup(TENANT)) is False)


def test_an_evaluation_that_waits_is_served_an_overtaken_value_and_not_kept_for_the_next_read(
    threaded: Threaded,
) -> None:
    cache = threaded.make(timeout_seconds=NEVER)
    slot = cache._states[TENANT]
    threaded.hold()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.lookup, TENANT)
        held = threaded.source.held()
        invalidate(cache)
        second = pool.submit(asyncio.run, cache.lookup_async(TENANT))
        wait_until(lambda: slot.next_flight is not None)
        third = threading.Thread(target=cache.refresh, args=(TENANT,), daemon=True)
        third.start()
        held.answer(True)
        following = threaded.source.held()
        for future in (first, second):
            assert (value(future.result(SOON)), future.result().freshness) == (True, Freshness.STALE)
        assert third.is_alive(), "a refresh waits for its own read"
        following.answer(False)
        third.join(SOON)
    assert value(cache.lookup(TENANT)) is False


@pytest.mark.parametrize("background", [True, False])
def test_an_evaluation_that_waits_for_the_lease_of_another_process_is_served_what_that_one_stores(
    clock: FakeClock, background: bool
) -> None:
    """The other process reads again at once, because an invalidation overtook its read, and that read hangs."""
    timed = Timed(clock, background=background)
    timed.store.is_gone = lambda holder: False  # type: ignore[method-assign]  # the other one lives
    begin = partial(begin_read, holder="another", lease_seconds=7.0, newer_than=0)
    granted = timed.store.transact(TENANT, begin)
    assert isinstance(granted, Granted)
    timed.store.invalidate(TENANT, [Invalidation()])

    def store() -> None:
        timed.store.transact(
            TENANT,
            partial(
                commit,
                lease=granted.lease,
                reading=Reading(Document(True)),
                read_at=clock.monotonic(),
                fetched_at=datetime.fromtimestamp(clock.wall(), UTC),
                ttl_seconds=30.0,
                hard_limit_seconds=3600.0,
                tenant=TENANT,
                latency_seconds=0.3,
            ),
        )
        assert isinstance(timed.store.transact(TENANT, begin), Granted)

    timed.hand.at("another", clock.monotonic() + 0.3, store)
    began = clock.monotonic()
    evaluation = timed.cache.lookup(TENANT)
    assert (value(evaluation), evaluation.freshness) == (True, Freshness.STALE)
    assert clock.monotonic() - began < 1.0
    timed.hand.advance(20.0)
    assert timed.source.reads, "the lease of the other process ends, and this one reads"


def test_an_async_evaluation_that_waits_leaves_the_loop_to_others(threaded: Threaded) -> None:
    """The loop itself lets the read end: were it held, nobody ever would."""
    cache = threaded.make(timeout_seconds=NEVER)
    threaded.hold()

    async def story() -> None:
        waiting = asyncio.create_task(cache.lookup_async(TENANT))
        held = await asyncio.get_running_loop().run_in_executor(None, threaded.source.held)
        assert not waiting.done()
        held.answer(True)
        assert value(await waiting) is True

    asyncio.run(story())


def test_a_cancelled_waiter_cancels_nobody_else(threaded: Threaded) -> None:
    cache = threaded.make()
    threaded.hold()
    with ThreadPoolExecutor(1) as pool:
        in_thread = pool.submit(cache.lookup, TENANT)

        async def story() -> None:
            tasks = [asyncio.create_task(cache.lookup_async(TENANT)) for _ in range(3)]
            await asyncio.sleep(0)
            tasks[1].cancel()
            with pytest.raises(asyncio.CancelledError):
                await tasks[1]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(cache.lookup_async(TENANT), 0.01)
            threaded.source.held().answer(True)
            assert [value(evaluation) for evaluation in await asyncio.gather(tasks[0], tasks[2])] == [True, True]

        asyncio.run(story())
        assert value(in_thread.result(SOON)) is True
    assert len(threaded.source.reads) == 1


def test_a_read_that_outlasts_the_loop_of_its_waiter_ends_quietly(
    threaded: Threaded, caplog: pytest.LogCaptureFixture
) -> None:
    cache = threaded.make()
    threaded.hold()

    async def gives_up() -> None:
        await asyncio.wait_for(cache.lookup_async(TENANT), 0.01)

    with pytest.raises(TimeoutError):
        asyncio.run(gives_up())
    threaded.source.held().answer(True)
    wait_until(lambda: value(cache.peek(TENANT)) is True)
    gc.collect()
    assert caplog.records == []


def test_a_tenant_that_hangs_does_not_slow_another(threaded: Threaded) -> None:
    dead = tuple(f"dead-{number}" for number in range(10))
    cache = threaded.make(tenants=(*dead, "alive"), timeout_seconds=NEVER)
    threaded.hold(*dead)
    with ThreadPoolExecutor(len(dead)) as pool:
        waiting = [pool.submit(cache.lookup, tenant) for tenant in dead]
        held = [threaded.source.held(tenant) for tenant in dead]
        assert value(cache.lookup("alive")) is True
        assert value(cache.refresh("alive")) is True
        assert not any(future.done() for future in waiting)
        for read in held:
            read.answer(Unavailable("down"))
        assert [value(future.result(SOON)) for future in waiting] == [None] * len(dead)
    assert value(cache.lookup("alive")) is True
    assert cache.state("alive").failures == 0


def test_who_must_not_read_yet_is_answered_at_once_though_every_reader_hangs(threaded: Threaded) -> None:
    dead = tuple(f"dead-{number}" for number in range(16))
    cache = threaded.make(tenants=(*dead, "limited"), timeout_seconds=NEVER)
    threaded.source.says = RateLimited("429", status=429, retry_after_seconds=60.0)
    assert value(cache.lookup("limited")) is None
    threaded.hold(*dead)
    with ThreadPoolExecutor(len(dead)) as pool:
        waiting = [pool.submit(cache.lookup, tenant) for tenant in dead]
        held = [threaded.source.held(tenant) for tenant in dead]
        assert value(cache.lookup("limited")) is None
        assert value(asyncio.run(cache.lookup_async("limited"))) is None
        for read in held:
            read.answer(True)
        assert [value(future.result(SOON)) for future in waiting] == [True] * len(dead)


# -- the fence -----------------------------------------------------------------------------------------------------


def test_a_read_that_answers_the_old_value_after_an_invalidation_is_read_again_and_never_served_fresh(
    threaded: Threaded,
) -> None:
    cache = threaded.make()
    fresh: list[bool | None] = []
    cache.changes.subscribe(
        lambda change: (
            fresh.append(value(change.evaluation)) if change.evaluation.freshness is Freshness.FRESH else None
        )
    )
    threaded.hold()
    with ThreadPoolExecutor(2) as pool:
        before = pool.submit(cache.lookup, TENANT)
        old = threaded.source.held()
        invalidate(cache)
        after = pool.submit(cache.lookup, TENANT)
        slot = cache._states[TENANT]
        wait_until(lambda: slot.next_flight is not None)
        old.answer(False)
        threaded.source.held().answer(True)
        for future in (before, after):
            evaluation = future.result(SOON)
            assert (value(evaluation), evaluation.freshness) in {(False, Freshness.STALE), (True, Freshness.FRESH)}
    wait_until(lambda: value(cache.lookup(TENANT)) is True)
    assert False not in fresh
    assert cache.peek(TENANT).entry.snapshot is not None
    assert len(threaded.source.reads) == 2


def test_a_stale_value_is_never_called_fresh_between_an_invalidation_and_its_read(threaded: Threaded) -> None:
    cache = threaded.make()
    cache.lookup(TENANT)
    for flip in (False, True) * 3:
        threaded.hold()
        generation = invalidate(cache)
        evaluation = cache.lookup(TENANT)
        assert evaluation.freshness is Freshness.STALE
        threaded.source.held().answer(flip)
        wait_until(lambda: cache.lookup(TENANT).freshness is Freshness.FRESH)
        evaluation = cache.lookup(TENANT)
        assert value(evaluation) is flip
        assert evaluation.entry.generation == generation
        threaded.clock.skip(2.0)


def test_a_forced_refresh_never_joins_an_older_read(threaded: Threaded) -> None:
    cache = threaded.make()
    threaded.hold()
    with ThreadPoolExecutor(3) as pool:
        waiting = pool.submit(cache.lookup, TENANT)
        older = threaded.source.held()
        forced = [pool.submit(cache.refresh, TENANT) for _ in range(2)]
        slot = cache._states[TENANT]
        wait_until(lambda: slot.next_flight is not None)
        older.answer(False)
        assert value(waiting.result(SOON)) is False
        assert not forced[0].done()
        threaded.source.held().answer(True)
        evaluations = [future.result(SOON) for future in forced]
    assert [value(evaluation) for evaluation in evaluations] == [True, True]
    assert {evaluation.source for evaluation in evaluations} == {Origin.API}


def test_a_refresh_that_fails_says_so_and_leaves_what_is_served_as_it_was(threaded: Threaded) -> None:
    cache = threaded.make()
    cache.lookup(TENANT)
    threaded.source.says = Unavailable("down", status=502)
    with pytest.raises(Unavailable, match="down"):
        cache.refresh(TENANT)
    evaluation = cache.lookup(TENANT)
    assert (value(evaluation), evaluation.freshness) == (True, Freshness.FRESH)
    assert cache.state(TENANT).last_error == "down"


def test_a_refresh_of_a_read_that_hangs_ends_at_its_deadline(threaded: Threaded) -> None:
    cache = threaded.make(timeout_seconds=0.1)
    threaded.hold()
    with pytest.raises(Unavailable, match="deadline"):
        cache.refresh(TENANT)


def test_threads_that_evaluate_while_others_announce_never_see_a_value_go_back_nor_changes_out_of_order(
    threaded: Threaded,
) -> None:
    """The API counts up; once a count has been announced, no lower one is called fresh by a look that begins then."""
    cache = threaded.make(windows=replace(WINDOWS, stale_while_revalidate_seconds=0.0))
    truth, announced = [0], [0]
    wrong: list[str] = []
    told: list[tuple[int, int]] = []
    stop = threading.Event()

    def count(tenant: str, etag: str | None) -> Reading:
        return Reading(Document(enabled=True), f'"{truth[0]}"')

    def listen(change: Change) -> None:
        entry = change.evaluation.entry
        told.append((entry.generation, entry.snapshot.token if entry.snapshot else 0))

    def evaluate() -> None:
        while not stop.is_set():
            least = announced[0]
            evaluation = cache.lookup(TENANT)
            etag = evaluation.entry.snapshot.etag if evaluation.entry.snapshot is not None else None
            if evaluation.freshness is Freshness.FRESH and etag is not None and int(etag.strip('"')) < least:
                wrong.append(f"{etag} was called fresh after {least} had been announced")

    def announce() -> None:
        while not stop.is_set():
            truth[0] += 1
            invalidate(cache)
            announced[0] = truth[0]
            threaded.clock.skip(1.0)

    cache._reader._source = count
    cache.changes.subscribe(listen)
    threads = [threading.Thread(target=job, daemon=True) for job in (evaluate, evaluate, evaluate, announce)]
    for thread in threads:
        thread.start()
    wait_until(lambda: announced[0] >= 300 or bool(wrong))
    stop.set()
    for thread in threads:
        thread.join(SOON)
    assert wrong == []
    assert told == sorted(told)


# -- storms and back-off, on a clock that stands still until told ----------------------------------------------------


def test_a_storm_of_deliveries_costs_a_burst_and_then_a_read_a_second_and_none_is_lost(timed: Timed) -> None:
    timed.cache.start()
    timed.hand.advance(10.0)
    before = len(timed.source.reads)
    seconds = 20
    for number in range(seconds * 100):
        assert invalidate(timed.cache, f"delivery-{number}") == number + 1
        assert timed.cache.lookup(TENANT).freshness is not Freshness.EXPIRED
        timed.hand.advance(0.01)
    assert len(timed.source.reads) - before <= PACE_BURST + seconds / PACE_SECONDS + 1
    timed.source.says = False
    invalidate(timed.cache, "the last")
    timed.hand.advance(1.1)
    evaluation = timed.cache.lookup(TENANT)
    assert (value(evaluation), evaluation.freshness) == (False, Freshness.FRESH)
    assert evaluation.entry.snapshot is not None
    assert evaluation.entry.snapshot.generation == seconds * 100 + 1


def test_a_storm_in_which_every_read_is_overtaken_moves_the_value_forward_and_blocks_no_evaluation(
    threaded: Threaded,
) -> None:
    cache = threaded.make(background=True, windows=replace(WINDOWS, stale_while_revalidate_seconds=5.0))
    cache.lookup(TENANT)
    threaded.hold()
    for number in range(12):
        invalidate(cache)
        read = threaded.source.held()
        threaded.clock.skip(1.0)
        invalidate(cache)  # it overtakes the read that is under way
        read.answer(number % 2 == 0)
        wait_until(lambda: value(cache.lookup(TENANT)) is (number % 2 == 0))  # noqa: B023 - called at once
        assert cache.lookup(TENANT).freshness is Freshness.STALE
        threaded.source.held().answer(number % 2 == 0)
        threaded.clock.skip(1.0)


def test_two_invalidations_before_a_read_leave_the_value_servable(timed: Timed) -> None:
    timed.cache.start()
    timed.hand.advance(1.0)
    timed.hand.advance(24.0)
    timed.source.says = Unavailable("down")
    for _ in range(2):
        invalidate(timed.cache)
        timed.hand.advance(0.5)
        assert timed.cache.lookup(TENANT).freshness is Freshness.STALE


def test_a_delivery_that_comes_twice_counts_once(timed: Timed) -> None:
    timed.cache.lookup(TENANT)
    assert timed.cache.invalidate(TENANT, Invalidation(delivery_id="one")) == (Invalidated(1), True)
    reads, changes = len(timed.source.reads), len(timed.changes)
    assert timed.cache.invalidate(TENANT, Invalidation(delivery_id="one")) == (Invalidated(1, duplicate=True), True)
    assert timed.cache.peek(TENANT).entry.generation == 1
    assert (len(timed.source.reads), len(timed.changes)) == (reads, changes)


def test_invalidations_that_arrive_while_one_is_under_way_become_one_transition(threaded: Threaded) -> None:
    class Slow(MemoryStore):
        begun, go_on = threading.Event(), threading.Event()
        batches: list[int] = []  # noqa: RUF012 - of this test alone

        def invalidate(self, tenant: str, requests: Sequence[Invalidation]) -> tuple[tuple[Invalidated, ...], bool]:
            self.batches.append(len(requests))
            self.begun.set()
            assert self.go_on.wait(SOON)
            return super().invalidate(tenant, requests)

    store = Slow(clock=threaded.clock)
    cache = threaded.make(store=store)
    with ThreadPoolExecutor(21) as pool:
        first = pool.submit(invalidate, cache, "first")
        assert store.begun.wait(SOON)
        others = [pool.submit(invalidate, cache, f"id-{number % 10}") for number in range(20)]
        state = cache._states[TENANT]
        wait_until(lambda: state.next_batch is not None and len(state.next_batch.requests) == 20)
        store.go_on.set()
        assert first.result(SOON) == 1
        assert {future.result(SOON) for future in others} == {11}, "ten of them came twice"
    assert store.batches == [1, 20]


def test_an_invalidation_that_fails_is_raised_to_all_of_its_batch_and_the_next_one_works(threaded: Threaded) -> None:
    class Failing(MemoryStore):
        fault: Exception | None = StoreError("down")

        def invalidate(self, tenant: str, requests: Sequence[Invalidation]) -> tuple[tuple[Invalidated, ...], bool]:
            if self.fault is not None:
                raise self.fault
            return super().invalidate(tenant, requests)

    store = Failing(clock=threaded.clock)
    cache = threaded.make(store=store)
    for _ in range(2):
        with pytest.raises(StoreError, match="down"):
            invalidate(cache)
    store.fault = None
    assert invalidate(cache) == 1


def test_while_a_value_settles_looks_are_short_and_grow(timed: Timed) -> None:
    timed.cache.start()
    timed.hand.advance(10.0)
    timed.source.at.clear()
    invalidate(timed.cache)
    began = timed.clock.monotonic()
    timed.hand.advance(120.0)
    looks = [at - began for at in timed.source.at]
    gaps = [later - earlier for earlier, later in pairwise(looks)]
    assert looks[0] == 0.0
    assert gaps[:6] == pytest.approx([1.0, 1.0, 2.0, 4.0, 8.0, 16.0], rel=0.1)
    assert gaps[6:] == pytest.approx([30.0] * len(gaps[6:]), abs=2.0)


def test_a_steady_service_never_serves_a_stale_value_and_reads_once_a_lifetime(timed: Timed) -> None:
    timed.cache.start()
    for _ in range(600):
        timed.hand.advance(1.0)
        assert timed.cache.lookup(TENANT).freshness is Freshness.FRESH
    assert len(timed.source.reads) <= 600 / 29 + 1
    assert len(timed.hand._due) <= 2, "due times pile up"


def test_without_a_background_only_evaluations_cause_reads(clock: FakeClock) -> None:
    timed = Timed(clock, background=False)
    timed.cache.start()
    invalidate(timed.cache)
    timed.hand.advance(100.0)
    assert timed.source.reads == []
    timed.cache.lookup(TENANT)
    timed.hand.advance(1000.0)
    assert len(timed.source.reads) == 1
    assert not timed.hand._due


def test_a_wait_that_the_api_asks_for_is_obeyed_by_everybody_and_slept_on_by_nobody(timed: Timed) -> None:
    timed.cache.start()
    timed.source.says = RateLimited("429", status=429, retry_after_seconds=60.0)
    timed.hand.advance(5.0)
    reads, began = len(timed.source.reads), timed.clock.monotonic()
    for _ in range(50):
        timed.hand.advance(1.0)
        timed.cache.lookup(TENANT)
        asyncio.run(timed.cache.lookup_async(TENANT))
        generation = invalidate(timed.cache)
        assert timed.cache.wait_for_generation(TENANT, generation) is None
        with pytest.raises(RateLimited) as raised:
            timed.cache.refresh(TENANT)
        assert raised.value.retry_after_seconds is not None
    assert timed.clock.monotonic() - began == pytest.approx(50.0)
    assert len(timed.source.reads) == reads
    timed.source.says = False
    timed.hand.advance(15.0)
    assert len(timed.source.reads) > reads, "it is tried again by itself"
    assert value(timed.cache.lookup(TENANT)) is False


def test_a_wait_that_the_api_asks_of_a_read_that_was_overtaken_is_obeyed_too(threaded: Threaded) -> None:
    cache = threaded.make()
    cache.lookup(TENANT)
    threaded.hold()
    invalidate(cache)
    cache.lookup(TENANT)
    overtaken = threaded.source.held()
    invalidate(cache)
    overtaken.answer(RateLimited("429", status=429, retry_after_seconds=60.0))
    wait_until(lambda: cache.state(TENANT).failures == 1)
    for _ in range(10):
        cache.lookup(TENANT)
        with pytest.raises(RateLimited):
            cache.refresh(TENANT)
    assert len(threaded.source.reads) == 2


def test_failures_back_off_and_a_dead_api_is_not_asked_more_than_a_living_one(timed: Timed) -> None:
    timed.cache.start()
    timed.hand.advance(10.0)
    timed.source.says = Unavailable("down")
    timed.source.at.clear()
    for _ in range(3600):
        timed.hand.advance(1.0)
        timed.cache.lookup(TENANT)
    gaps = [later - earlier for earlier, later in pairwise(timed.source.at)]
    assert min(gaps) >= 1.0
    assert gaps[0] < gaps[2] < gaps[4]
    assert len(timed.source.at) <= 3600 / 15 + 10
    timed.source.says = False
    timed.hand.advance(31.0)
    evaluation = timed.cache.lookup(TENANT)
    assert (value(evaluation), evaluation.freshness, evaluation.entry.failure) == (False, Freshness.FRESH, None)


def test_replicas_that_lag_at_the_end_of_a_lifetime_are_not_asked_read_upon_read(timed: Timed) -> None:
    new = Document(True, updated_at=parse_instant("2026-03-02T00:00:00Z"))
    old = Document(False, updated_at=parse_instant("2026-03-01T00:00:00Z"))
    timed.source.says = Reading(new)
    timed.cache.start()
    timed.hand.advance(1.0)
    timed.source.says = Reading(old)
    for _ in range(600):
        timed.hand.advance(1.0)
        assert value(timed.cache.lookup(TENANT)) is True
    gaps = [later - earlier for earlier, later in pairwise(timed.source.at)]
    assert min(gaps) >= 1.0
    assert timed.cache.state(TENANT).last_error is not None


def test_of_many_who_wait_for_a_generation_as_many_wait_as_may_and_the_others_come_back_at_once(
    threaded: Threaded,
) -> None:
    cache = threaded.make(max_waiters=2)
    cache.lookup(TENANT)
    threaded.hold()
    generation = invalidate(cache)
    with ThreadPoolExecutor(10) as pool:
        futures = [pool.submit(cache.wait_for_generation, TENANT, generation) for _ in range(10)]
        held = threaded.source.held()
        wait_until(lambda: sum(future.done() for future in futures) == 8)
        assert {future.result(SOON) for future in futures if future.done()} == {None}
        held.answer(False)
        waited = [evaluation for future in futures if (evaluation := future.result(SOON)) is not None]
    assert [value(evaluation) for evaluation in waited] == [False, False]
    assert len(threaded.source.reads) == 2
    assert cache._states[TENANT].waiters == 0


def test_a_generation_that_is_not_reached_is_waited_for_no_longer_than_one_read(timed: Timed) -> None:
    timed.cache.lookup(TENANT)
    began = timed.clock.monotonic()
    timed.store.transact(TENANT, partial(begin_read, holder="another", lease_seconds=7.0, newer_than=1, forced=True))
    timed.store.is_gone = lambda holder: False  # type: ignore[method-assign]  # the other one lives
    generation = invalidate(timed.cache)
    assert timed.cache.wait_for_generation(TENANT, generation) is None
    assert 5.0 <= timed.clock.monotonic() - began <= 6.0


# -- who is told ---------------------------------------------------------------------------------------------------


def test_listeners_hear_of_a_value_only_where_it_changed(timed: Timed) -> None:
    timed.cache.start()
    timed.hand.advance(300.0)
    assert timed.changes
    assert {change.kind for change in timed.changes} == {ChangeKind.STATE}, "a first value is no change of value"
    timed.source.says = False
    timed.hand.advance(31.0)
    assert [change.kind for change in timed.changes].count(ChangeKind.VALUE) == 1
    timed.source.says = Unavailable("down")
    timed.hand.advance(8000.0)
    timed.source.says = False
    timed.hand.advance(60.0)
    assert [change.kind for change in timed.changes].count(ChangeKind.VALUE) == 1, "an outage changes no value"
    timed.source.says = True
    timed.cache.refresh(TENANT)
    assert timed.changes[-1].kind is ChangeKind.VALUE
    assert value(timed.changes[-1].evaluation) is True


def test_listeners_hear_when_age_alone_makes_a_value_worth_less_and_once_each(clock: FakeClock) -> None:
    timed = Timed(clock, background=False)
    timed.cache.lookup(TENANT)
    timed.changes.clear()
    for _ in range(100):
        timed.hand.advance(1.0)
        timed.cache.peek(TENANT)
        timed.cache.peek(TENANT)
    assert [change.evaluation.freshness for change in timed.changes] == [Freshness.STALE, Freshness.EXPIRED]


def test_a_listener_may_ask_and_change_what_it_is_told_of(timed: Timed) -> None:
    depth: list[Freshness] = []

    def listener(change: Change) -> None:
        depth.append(timed.cache.lookup(change.tenant).freshness)
        if len(depth) == 1:
            invalidate(timed.cache)

    timed.cache.changes.subscribe(listener)
    timed.cache.start()
    timed.hand.advance(5.0)
    assert timed.cache.peek(TENANT).freshness is Freshness.FRESH
    assert timed.cache.peek(TENANT).entry.generation == 1


def test_a_thread_that_loaded_earlier_and_comes_back_later_turns_nothing_back(threaded: Threaded) -> None:
    class Slow(MemoryStore):
        slow: threading.Thread | None = None
        loaded, go_on = threading.Event(), threading.Event()

        def load(self, tenant: str) -> Entry:
            entry = super().load(tenant)
            if threading.current_thread() is self.slow:
                self.loaded.set()
                assert self.go_on.wait(SOON)
            return entry

    store = Slow(clock=threaded.clock)
    cache = threaded.make(store=store)
    cache.lookup(TENANT)
    told: list[tuple[int, bool | None]] = []
    cache.changes.subscribe(lambda change: told.append((last_token(change.evaluation.entry), value(change.evaluation))))
    store.slow = threading.Thread(target=cache.peek, args=(TENANT,), daemon=True)
    store.invalidate(TENANT, [Invalidation()])
    store.slow.start()
    assert store.loaded.wait(SOON)
    threaded.source.says = False
    cache.refresh(TENANT)
    wait_until(lambda: bool(told) and told[-1] == (2, False))
    before = list(told)
    store.go_on.set()
    store.slow.join(SOON)
    assert told == before
    assert value(cache.peek(TENANT)) is False


# -- names and states ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "other", 7, True, b"acme", ("acme",), ["acme"], {"a": 1}, object(), "x" * 5000])
def test_a_name_that_is_no_tenant_is_refused_whatever_it_is(timed: Timed, name: object) -> None:
    with pytest.raises(TenantError) as raised:
        timed.cache.tenant_of(name)
    assert len(str(raised.value)) < 200


def test_no_name_means_the_one_tenant_and_nobody_where_there_are_several(clock: FakeClock) -> None:
    assert make_cache(Source(clock), clock, runner=Hand(clock)).tenant_of(None) == TENANT
    several = make_cache(Source(clock), clock, runner=Hand(clock), tenants=("a", "b"))
    assert several.tenant_of("b") == "b"
    with pytest.raises(TenantError, match="several"):
        several.tenant_of(None)


def test_the_state_never_waits_and_starts_no_read(timed: Timed) -> None:
    state = timed.cache.state(TENANT)
    assert (state.enabled, state.freshness) == (None, Freshness.EXPIRED)
    assert timed.source.reads == []


def test_a_change_by_another_process_is_heard_by_the_poll(clock: FakeClock) -> None:
    shared, hand, source = FaultyStore(clock), Hand(clock), Source(clock)
    cache = make_cache(source, clock, runner=hand, store=Fallback(shared, clock=clock, random=lambda: 0.5))
    cache.start()
    hand.advance(1.0)
    hand.wake()
    told: list[Change] = []
    cache.changes.subscribe(told.append)
    shared.data.invalidate(TENANT, [Invalidation()])
    shared.data.invalidate("somebody else's", [Invalidation()])
    hand.wake()
    assert [change.evaluation.freshness for change in told] == [Freshness.STALE]
    source.says = False
    hand.advance(0.0)
    assert value(cache.peek(TENANT)) is False


def test_a_value_that_another_process_read_comes_from_the_store(clock: FakeClock) -> None:
    shared, source = FaultyStore(clock), Source(clock)
    other = make_cache(
        source,
        clock,
        runner=Hand(clock),
        store=Fallback(FaultyStore(clock, data=shared.data, holder="them"), clock=clock, random=lambda: 0.5),
    )
    cache = make_cache(source, clock, runner=Hand(clock), store=Fallback(shared, clock=clock, random=lambda: 0.5))
    assert other.lookup(TENANT).source is Origin.API
    assert cache.lookup(TENANT).source is Origin.STORE
    assert other.lookup(TENANT).source is Origin.MEMORY
    assert len(source.reads) == 1


def test_a_flight_that_waits_for_the_lease_of_another_process_goes_on_when_the_poll_hears_of_its_end(
    clock: FakeClock,
) -> None:
    shared, hand, source = FaultyStore(clock), Hand(clock), Source(clock)
    cache = make_cache(source, clock, runner=hand, store=Fallback(shared, clock=clock, random=lambda: 0.5))
    begin = partial(begin_read, holder="them", lease_seconds=7.0, newer_than=0)
    outcome = shared.data.transact(TENANT, begin)
    assert isinstance(outcome, Granted)
    cache.start()
    hand.advance(1.0)
    assert source.reads == []
    shared.data.transact(TENANT, partial(release, lease=outcome.lease))
    hand.wake()
    assert source.reads == [TENANT], "at once, and not after the pause"


# -- when reads fail and an answer is configured ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("background", "waits_after_failure", "waits"),
    [(True, False, False), (False, False, False), (False, True, True)],
    ids=["background", "lazy, with an answer for it", "lazy, without one"],
)
def test_with_nothing_to_serve_and_a_known_failure_only_a_lazy_cache_without_an_answer_waits(
    clock: FakeClock, background: bool, waits_after_failure: bool, waits: bool
) -> None:
    source, hand = Source(clock), Hand(clock)
    cache = make_cache(source, clock, runner=hand, background=background, waits_after_failure=waits_after_failure)
    source.says = Unavailable("down")
    assert value(cache.lookup(TENANT)) is None
    source.says = True
    clock.advance(60.0)  # the back-off is over, and no thread has run
    assert value(cache.lookup(TENANT)) is (True if waits else None)


def test_an_outage_with_nothing_to_serve_blocks_no_evaluation_after_the_first(threaded: Threaded) -> None:
    cache = threaded.make(background=True)
    threaded.source.says = Unavailable("down")
    cache.lookup(TENANT)
    threaded.hold()
    for _ in range(20):
        threaded.clock.skip(2.0)
        for _ in range(20):
            evaluation = cache.lookup(TENANT)
            assert evaluation.servable is None
            assert evaluation.entry.failure is not None


# -- beginning and end ---------------------------------------------------------------------------------------------


def test_warming_reads_every_tenant_once_and_waits_no_longer_than_one_read(threaded: Threaded) -> None:
    cache = threaded.make(tenants=("dead", "alive", "failing"), timeout_seconds=0.3)
    threaded.hold("dead", "failing")
    threading.Thread(target=lambda: threaded.source.held("failing").answer(Unavailable("down")), daemon=True).start()
    evaluations = cache.warm()
    assert [value(evaluation) for evaluation in evaluations] == [None, True, None]
    assert sorted(threaded.source.reads) == ["alive", "dead", "failing"]
    assert [value(evaluation) for evaluation in cache.warm()] == [None, True, None]
    assert threaded.source.reads.count("alive") == 1


def test_closing_lets_every_waiter_go_at_once_and_leaves_no_thread(threaded: Threaded) -> None:
    cache = threaded.make(timeout_seconds=NEVER, windows=replace(WINDOWS, ttl_seconds=NEVER))
    threaded.hold()
    crowd = Crowd(cache)
    held = threaded.source.held()
    cache.close(SOON, abort=lambda: held.answer(Unavailable("broken off")))
    evaluations = crowd.wait()
    assert {value(evaluation) for evaluation in evaluations} == {None}
    assert not [thread for thread in newcomers() if thread.name.startswith("external-oms")]


def test_a_read_broken_off_by_a_shutdown_is_no_failure_of_the_api(threaded: Threaded) -> None:
    store = MemoryStore(clock=threaded.clock)
    cache, neighbour = threaded.make(store=store), threaded.make(store=store)
    threaded.hold()
    threading.Thread(target=cache.lookup, args=(TENANT,), daemon=True).start()
    held = threaded.source.held()
    cache.close(5.0, abort=lambda: held.answer(Unavailable("broken off")))
    assert store.load(TENANT).failure is None
    threaded.source.holding.clear()
    assert value(neighbour.lookup(TENANT)) is True, "the lease was given back"


def test_after_the_end_whoever_asks_is_answered_at_once_and_no_read_begins(threaded: Threaded) -> None:
    cache = threaded.make(timeout_seconds=NEVER)
    cache.close()
    assert value(cache.lookup(TENANT)) is None
    assert value(asyncio.run(cache.lookup_async(TENANT))) is None
    with pytest.raises(Unavailable, match="shut down"):
        cache.refresh(TENANT)
    assert cache.wait_for_generation(TENANT, 1) is None
    invalidate(cache)
    cache.close()
    assert threaded.source.reads == []


def test_a_flight_that_waits_for_another_process_begins_no_read_after_the_end(threaded: Threaded) -> None:
    class Shared(MemoryStore):
        def is_gone(self, holder: str) -> bool:
            return False

    store = Shared(clock=threaded.clock)
    cache = threaded.make(store=store)
    outcome = store.transact(TENANT, partial(begin_read, holder="them", lease_seconds=60.0, newer_than=0))
    assert isinstance(outcome, Granted)
    waiting = threading.Thread(target=cache.lookup, args=(TENANT,), daemon=True)
    waiting.start()
    slot = cache._states[TENANT]
    wait_until(lambda: slot.flight is not None and slot.flight.parked)
    cache.close(5.0)
    waiting.join(SOON)
    store.transact(TENANT, partial(release, lease=outcome.lease))
    wait_until(lambda: not [thread for thread in newcomers() if thread.name == "external-oms-worker"])
    assert threaded.source.reads == []


def test_reopened_it_works_as_at_first_whatever_happened_at_the_end(threaded: Threaded) -> None:
    """A read that outlasts the end lands when all is closed: what it asks for then must not stand in the way later."""
    cache = threaded.make(background=True)
    threaded.hold()
    cache.start()
    late = threaded.source.held()
    cache.close(0.05)
    cache.lookup(TENANT)
    late.answer(Unavailable("late"))
    wait_until(lambda: not [thread for thread in newcomers() if thread.name == "external-oms-worker"])
    threaded.source.holding.clear()
    cache.reopen()
    cache.start()
    wait_until(lambda: value(cache.peek(TENANT)) is True, message="the background reads again")
    assert value(cache.lookup(TENANT)) is True
    cache.close()
    cache.reopen()
    threaded.source.says = False
    assert value(cache.refresh(TENANT)) is False


def test_a_value_read_as_the_end_came_is_kept(threaded: Threaded) -> None:
    store = MemoryStore(clock=threaded.clock)
    cache = threaded.make(store=store)
    threaded.hold()
    threading.Thread(target=cache.lookup, args=(TENANT,), daemon=True).start()
    held = threaded.source.held()
    cache.close(0.05)
    held.answer(True)
    wait_until(lambda: store.load(TENANT).snapshot is not None)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # newer Pythons warn of what is tested here
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_answers_at_once_refreshes_and_hears_invalidations(threaded: Threaded) -> None:
    cache = threaded.make(background=True, timeout_seconds=NEVER)
    cache.lookup(TENANT)
    threaded.hold()
    invalidate(cache)
    cache.lookup(TENANT)
    held = threaded.source.held()  # a read of the parent is under way
    lock = cache._states[TENANT].lock
    lock.acquire()  # as if another thread held it at the instant of the fork
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        code = 1
        try:
            threaded.source = Source(threaded.clock)
            threaded.source.says = False
            cache._reader._source = threaded.source
            cache.after_fork()
            warm = cache.lookup(TENANT)
            wait_until(lambda: value(cache.lookup(TENANT)) is False)
            threaded.hold()
            invalidate(cache)
            heard = cache.lookup(TENANT).freshness is Freshness.STALE
            threaded.source.held().answer(False)
            threaded.source.holding.clear()
            again = value(cache.refresh(TENANT)) is False
            code = 0 if (value(warm) is True and heard and again) else 2
        finally:
            os._exit(code)
    lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    held.answer(True)
    wait_until(lambda: cache.lookup(TENANT).freshness is Freshness.FRESH)


@pytest.mark.parametrize("background", [True, False])
def test_a_forked_child_that_is_idle_follows_the_store(clock: FakeClock, background: bool) -> None:
    """It must not answer minutes later with a value that was invalidated meanwhile, nor report nothing till then."""
    shared, hand, source = FaultyStore(clock), Hand(clock), Source(clock)
    store = Fallback(shared, clock=clock, random=lambda: 0.5)
    cache = make_cache(source, clock, runner=hand, store=store, background=background)
    cache.lookup(TENANT)
    told: list[Change] = []
    cache.changes.subscribe(told.append)
    cache.after_fork()
    hand.advance(0.1)
    assert [change.evaluation.freshness for change in told] == [Freshness.FRESH]
    source.says = False
    shared.data.invalidate(TENANT, [Invalidation()])
    hand.wake()
    assert told[1].evaluation.freshness is Freshness.STALE
    hand.advance(0.1)
    assert value(cache.peek(TENANT)) is (not background)


def test_a_child_of_a_process_that_never_evaluated_starts_no_thread(clock: FakeClock) -> None:
    hand = Hand(clock)
    cache = make_cache(Source(clock), clock, runner=hand)
    cache.after_fork()
    assert not hand._due


def test_reads_by_this_process_are_told_of_with_their_outcome(timed: Timed) -> None:
    ended: list[ReadEnd] = []
    timed.cache.reads.subscribe(ended.append)
    timed.cache.lookup(TENANT)
    timed.source.says = Unavailable("down")
    with pytest.raises(ReadError):
        timed.cache.refresh(TENANT)
    assert [type(end.outcome).__name__ for end in ended] == ["Snapshot", "Failure"]
    assert [end.outcome.token for end in ended] == [1, 2]


def test_the_cache_itself_logs_nothing_of_all_this(timed: Timed, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="external_oms"):
        timed.cache.start()
        timed.source.says = Unavailable("down")
        timed.hand.advance(3600.0)
    assert caplog.records == []
