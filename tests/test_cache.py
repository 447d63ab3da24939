"""The heart under threads and tasks, with a source that does as told: one read, the fence, nobody waits in vain."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest

from external_oms.cache import Cache, Change, ChangeKind
from external_oms.config import Document, Reading, parse_instant
from external_oms.errors import NothingToServe, RateLimited, ReadError, TenantError, Unavailable
from external_oms.flights import ReadEnd
from external_oms.freshness import BUCKET_BURST, BUCKET_RATE_PER_SECOND, Freshness, Windows
from external_oms.judgement import Answer, last_number
from external_oms.judgement import Source as Origin
from external_oms.stores.base import Acquired, Record
from external_oms.stores.memory import MemoryStore
from tests.support.clock import FakeClock, SkipClock
from tests.support.scripted import SOON, TENANT, WINDOWS, Hand, Source, make_cache
from tests.support.waiting import wait_until

CROWD = 50


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
    ) -> Cache:
        cache = make_cache(
            self.source,
            self.clock,
            tenants=tenants,
            windows=windows,
            timeout_seconds=timeout_seconds,
            background=background,
            store=store,
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
        self.cache.changes.listen(self.changes.append)


@pytest.fixture
def timed(clock: FakeClock) -> Timed:
    return Timed(clock)


def value(answer: Answer) -> bool | None:
    return answer.servable.enabled if answer.servable is not None else None


# -- one read ------------------------------------------------------------------------------------------------------


class Crowd:
    """Fifty threads and fifty tasks that ask at once, and what they were told."""

    def __init__(self, cache: Cache) -> None:
        self.answers: list[Answer] = []
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

    def _tell(self, answer: Answer) -> None:
        with self._lock:
            self.answers.append(answer)

    def wait(self, seconds: float = SOON) -> list[Answer]:
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        assert len(self.answers) == 2 * CROWD, "somebody was left waiting"
        return self.answers


def test_a_crowd_on_a_cold_cache_causes_one_read_and_all_get_its_value(threaded: Threaded) -> None:
    threaded.hold()
    crowd = Crowd(threaded.make())
    threaded.source.held().answer(True)
    answers = crowd.wait()
    assert [value(answer) for answer in answers] == [True] * 2 * CROWD
    assert {answer.freshness for answer in answers} == {Freshness.FRESH}
    assert len(threaded.source.reads) == 1


def test_a_crowd_shares_one_failure(threaded: Threaded) -> None:
    cache = threaded.make()
    threaded.hold()
    crowd = Crowd(cache)
    threaded.source.held().answer(Unavailable("500", status=500))
    answers = crowd.wait()
    assert [value(answer) for answer in answers] == [None] * 2 * CROWD
    assert len(threaded.source.reads) == 1
    failure = cache.failure(answers[0])
    assert isinstance(failure, NothingToServe)
    assert isinstance(failure.failure, Unavailable)
    assert failure.failure.status == 500


def test_a_crowd_before_a_read_that_hangs_is_let_go_at_its_deadline(threaded: Threaded) -> None:
    cache = threaded.make(timeout_seconds=0.2)
    threaded.hold()
    began = time.monotonic()
    answers = Crowd(cache).wait(3.0)
    assert time.monotonic() - began < 2.0
    assert [value(answer) for answer in answers] == [None] * 2 * CROWD
    assert len(threaded.source.reads) == 1
    assert cache.failure(answers[0]).failure is None, "no read has ended: there is no failure to name"


def test_who_waits_in_vain_is_served_what_may_be_served_while_reads_fail(threaded: Threaded) -> None:
    cache = threaded.make(timeout_seconds=0.1)
    cache.lookup(TENANT)
    threaded.hold()
    threaded.clock.skip(100.0)
    answer = cache.lookup(TENANT)
    assert (value(answer), answer.freshness) == (True, Freshness.STALE)
    answer = asyncio.run(cache.lookup_async(TENANT))
    assert (value(answer), answer.freshness) == (True, Freshness.STALE)
    threaded.clock.skip(3600.0)
    assert value(cache.lookup(TENANT)) is None
    assert value(asyncio.run(cache.lookup_async(TENANT))) is None
    assert len(threaded.source.reads) == 2


def test_whoever_read_gets_the_value_as_read_for_this_very_call_and_the_next_as_remembered(threaded: Threaded) -> None:
    cache = threaded.make()
    first, second = cache.lookup(TENANT), cache.lookup(TENANT)
    assert (first.source, second.source) == (Origin.API, Origin.MEMORY)
    cache.invalidate(TENANT)
    threaded.clock.skip(31.0)
    assert asyncio.run(cache.lookup_async(TENANT)).source is Origin.API


def test_a_defect_of_the_store_ends_the_flight_for_all_who_wait_and_the_next_one_flies(
    threaded: Threaded, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(MemoryStore):
        broken = True

        def acquire(self, tenant: str, *, seconds: float, metered: bool) -> Acquired:
            if self.broken:
                raise ZeroDivisionError
            return super().acquire(tenant, seconds=seconds, metered=metered)

    store = Failing(clock=threaded.clock)
    cache = threaded.make(store=store)
    began = time.monotonic()
    assert value(cache.lookup(TENANT)) is None
    with pytest.raises(Unavailable, match="defect"):
        cache.refresh(TENANT)
    assert time.monotonic() - began < 3.0
    assert "ZeroDivisionError" in caplog.text
    store.broken = False
    assert value(cache.lookup(TENANT)) is True


# -- nothing blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.0, 31.0])
def test_with_a_servable_value_nobody_waits_for_the_read(threaded: Threaded, seconds: float) -> None:
    cache = threaded.make()
    cache.lookup(TENANT)
    threaded.clock.skip(seconds)
    cache.invalidate(TENANT)
    threaded.hold()
    answers = [cache.lookup(TENANT) for _ in range(200)]
    held = threaded.source.held()  # all came back before it was answered
    assert {(value(answer), answer.freshness) for answer in answers} == {(True, Freshness.STALE)}
    assert len(threaded.source.reads) == 2
    held.answer(False)
    wait_until(lambda: value(cache.lookup(TENANT)) is False)


def test_an_async_evaluation_that_waits_leaves_the_loop_to_others(threaded: Threaded) -> None:
    """The loop itself lets the read end: were it held, nobody ever would."""
    cache = threaded.make()
    threaded.hold()

    async def story() -> None:
        waiting = asyncio.create_task(cache.lookup_async(TENANT))
        loop = asyncio.get_running_loop()
        held = await loop.run_in_executor(None, threaded.source.held)
        lags = []
        for _ in range(50):
            before = loop.time()
            await asyncio.sleep(0)
            lags.append(loop.time() - before)
        assert not waiting.done()
        held.answer(True)
        assert value(await waiting) is True
        assert sorted(lags)[len(lags) // 2] < 0.05

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
            assert [value(answer) for answer in await asyncio.gather(tasks[0], tasks[2])] == [True, True]

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
    cache = threaded.make(tenants=(*dead, "alive"))
    threaded.hold(*dead)
    with ThreadPoolExecutor(len(dead)) as pool:
        waiting = [pool.submit(cache.lookup, tenant) for tenant in dead]
        held = [threaded.source.held(tenant) for tenant in dead]
        began = time.monotonic()
        assert value(cache.lookup("alive")) is True
        assert value(cache.refresh("alive")) is True
        assert time.monotonic() - began < 2.0
        assert not any(future.done() for future in waiting)
        for read in held:
            read.answer(Unavailable("down"))
        assert [value(future.result(SOON)) for future in waiting] == [None] * len(dead)
    assert value(cache.lookup("alive")) is True
    assert cache.state("alive").failures == 0


def test_who_must_not_read_yet_is_answered_at_once_though_every_reader_hangs(threaded: Threaded) -> None:
    dead = tuple(f"dead-{number}" for number in range(16))
    cache = threaded.make(tenants=(*dead, "limited"))
    threaded.source.says = RateLimited("429", status=429, retry_after_seconds=60.0)
    assert value(cache.lookup("limited")) is None
    threaded.hold(*dead)
    with ThreadPoolExecutor(len(dead)) as pool:
        waiting = [pool.submit(cache.lookup, tenant) for tenant in dead]
        held = [threaded.source.held(tenant) for tenant in dead]
        began = time.monotonic()
        assert value(cache.lookup("limited")) is None
        assert value(asyncio.run(cache.lookup_async("limited"))) is None
        assert time.monotonic() - began < 2.0
        for read in held:
            read.answer(True)
        assert [value(future.result(SOON)) for future in waiting] == [True] * len(dead)


# -- the fence -----------------------------------------------------------------------------------------------------


def test_a_read_that_answers_the_old_value_after_an_invalidation_is_read_again_and_never_served_fresh(
    threaded: Threaded,
) -> None:
    cache = threaded.make()
    fresh: list[bool | None] = []
    cache.changes.listen(
        lambda change: fresh.append(value(change.answer)) if change.answer.freshness is Freshness.FRESH else None
    )
    threaded.hold()
    with ThreadPoolExecutor(2) as pool:
        before = pool.submit(cache.lookup, TENANT)
        old = threaded.source.held()
        cache.invalidate(TENANT)
        after = pool.submit(cache.lookup, TENANT)
        old.answer(False)
        threaded.source.held().answer(True)
        assert value(after.result(SOON)) is True
        assert value(before.result(SOON)) is True
    assert False not in fresh
    assert cache.peek(TENANT).record.snapshot is not None
    assert len(threaded.source.reads) == 2


def test_a_stale_value_is_never_called_fresh_between_an_invalidation_and_its_read(threaded: Threaded) -> None:
    cache = threaded.make()
    cache.lookup(TENANT)
    for flip in (False, True) * 3:
        threaded.hold()
        generation = cache.invalidate(TENANT)
        answer = cache.lookup(TENANT)
        assert answer.freshness is Freshness.STALE
        threaded.source.held().answer(flip)
        wait_until(lambda: cache.lookup(TENANT).freshness is Freshness.FRESH)
        answer = cache.lookup(TENANT)
        assert value(answer) is flip
        assert answer.record.generation == generation
        threaded.clock.skip(2.0)


def test_a_forced_refresh_never_joins_an_older_read(threaded: Threaded) -> None:
    cache = threaded.make()
    threaded.hold()
    with ThreadPoolExecutor(3) as pool:
        waiting = pool.submit(cache.lookup, TENANT)
        older = threaded.source.held()
        forced = [pool.submit(cache.refresh, TENANT) for _ in range(2)]
        lane = cache._flights._lanes[TENANT]
        wait_until(lambda: lane.following is not None)
        older.answer(False)
        assert value(waiting.result(SOON)) is False
        assert not forced[0].done()
        threaded.source.held().answer(True)
        answers = [future.result(SOON) for future in forced]
    assert [value(answer) for answer in answers] == [True, True]
    assert {answer.source for answer in answers} == {Origin.API}


def test_a_refresh_that_fails_says_so_and_leaves_what_is_served_as_it_was(threaded: Threaded) -> None:
    cache = threaded.make()
    cache.lookup(TENANT)
    threaded.source.says = Unavailable("down", status=502)
    with pytest.raises(Unavailable, match="down"):
        cache.refresh(TENANT)
    answer = cache.lookup(TENANT)
    assert (value(answer), answer.freshness) == (True, Freshness.FRESH)
    assert cache.state(TENANT).last_error == "down"


def test_a_refresh_of_a_read_that_hangs_ends_at_its_deadline(threaded: Threaded) -> None:
    cache = threaded.make(timeout_seconds=0.1)
    threaded.hold()
    began = time.monotonic()
    with pytest.raises(Unavailable, match="deadline"):
        cache.refresh(TENANT)
    assert time.monotonic() - began < 2.0


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
        record = change.answer.record
        told.append((record.generation, record.snapshot.read_number if record.snapshot else 0))

    def evaluate() -> None:
        while not stop.is_set():
            least = announced[0]
            answer = cache.lookup(TENANT)
            etag = answer.record.snapshot.etag if answer.record.snapshot is not None else None
            if answer.freshness is Freshness.FRESH and etag is not None and int(etag.strip('"')) < least:
                wrong.append(f"{etag} was called fresh after {least} had been announced")

    def announce() -> None:
        while not stop.is_set():
            truth[0] += 1
            cache.invalidate(TENANT)
            announced[0] = truth[0]
            threaded.clock.skip(1.0)

    cache._flights._source = count
    cache.changes.listen(listen)
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
        assert timed.cache.deliver(TENANT, f"delivery-{number}", seconds=60.0) == number + 1
        assert timed.cache.lookup(TENANT).freshness is not Freshness.EXPIRED
        timed.hand.advance(0.01)
    assert len(timed.source.reads) - before <= BUCKET_BURST + BUCKET_RATE_PER_SECOND * seconds + 1
    timed.source.says = False
    timed.cache.deliver(TENANT, "the last", seconds=60.0)
    timed.hand.advance(1.1)
    answer = timed.cache.lookup(TENANT)
    assert (value(answer), answer.freshness) == (False, Freshness.FRESH)
    assert answer.record.snapshot is not None
    assert answer.record.snapshot.generation == seconds * 100 + 1


def test_a_delivery_that_comes_twice_counts_once(timed: Timed) -> None:
    assert timed.cache.deliver(TENANT, "one", seconds=60.0) == 1
    reads = len(timed.source.reads)
    assert timed.cache.deliver(TENANT, "one", seconds=60.0) is None
    timed.hand.advance(0.5)
    assert timed.cache.peek(TENANT).record.generation == 1
    assert len(timed.source.reads) <= reads + 1


def test_while_a_value_settles_looks_are_short_and_grow(timed: Timed) -> None:
    timed.cache.start()
    timed.hand.advance(10.0)
    timed.source.at.clear()
    timed.cache.invalidate(TENANT)
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
    assert len(timed.hand.due) <= 2, "due times pile up"


def test_without_a_background_only_evaluations_cause_reads(clock: FakeClock) -> None:
    timed = Timed(clock, background=False)
    timed.cache.start()
    timed.cache.invalidate(TENANT)
    timed.hand.advance(100.0)
    assert timed.source.reads == []
    timed.cache.lookup(TENANT)
    timed.hand.advance(1000.0)
    assert len(timed.source.reads) == 1
    assert timed.hand.due == []


def test_a_wait_that_the_api_asks_for_is_obeyed_by_everybody_and_slept_on_by_nobody(timed: Timed) -> None:
    timed.cache.start()
    timed.source.says = RateLimited("429", status=429, retry_after_seconds=60.0)
    timed.hand.advance(5.0)
    reads = len(timed.source.reads)
    began = time.monotonic()
    for _ in range(50):
        timed.hand.advance(1.0)
        timed.cache.lookup(TENANT)
        asyncio.run(timed.cache.lookup_async(TENANT))
        generation = timed.cache.invalidate(TENANT)
        assert timed.cache.validate(TENANT, generation) is None
        with pytest.raises(RateLimited) as raised:
            timed.cache.refresh(TENANT)
        assert raised.value.retry_after_seconds is not None
    assert time.monotonic() - began < 3.0
    assert len(timed.source.reads) == reads
    timed.source.says = False
    timed.hand.advance(15.0)
    assert len(timed.source.reads) > reads, "it is tried again by itself"
    assert value(timed.cache.lookup(TENANT)) is False


def test_a_wait_that_the_api_asks_of_a_read_that_was_overtaken_is_obeyed_too(threaded: Threaded) -> None:
    cache = threaded.make()
    cache.lookup(TENANT)
    threaded.hold()
    cache.invalidate(TENANT)
    cache.lookup(TENANT)
    overtaken = threaded.source.held()
    cache.invalidate(TENANT)
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
    answer = timed.cache.lookup(TENANT)
    assert (value(answer), answer.freshness, answer.record.failure) == (False, Freshness.FRESH, None)


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


def test_after_a_bucket_is_empty_one_caller_waits_for_the_read_and_the_others_come_back_at_once(
    threaded: Threaded,
) -> None:
    cache = threaded.make()
    cache.lookup(TENANT)
    for _ in range(BUCKET_BURST):
        generation = cache.invalidate(TENANT)
        assert cache.validate(TENANT, generation) is not None
    generation = cache.invalidate(TENANT)
    began = time.monotonic()
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: cache.validate(TENANT, generation), range(10)))
    assert time.monotonic() - began < 3.0
    patient = [answer for answer in answers if answer is not None]
    assert len(patient) <= 1
    wait_until(lambda: cache.peek(TENANT).freshness is Freshness.FRESH, message="the read follows by itself")


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
    assert value(timed.changes[-1].answer) is True


def test_listeners_hear_when_age_alone_makes_a_value_worth_less_and_once_each(clock: FakeClock) -> None:
    timed = Timed(clock, background=False)
    timed.cache.lookup(TENANT)
    timed.changes.clear()
    for _ in range(100):
        timed.hand.advance(1.0)
        timed.cache.peek(TENANT)
        timed.cache.peek(TENANT)
    assert [change.answer.freshness for change in timed.changes] == [Freshness.STALE, Freshness.EXPIRED]


def test_a_listener_may_ask_and_change_what_it_is_told_of(timed: Timed) -> None:
    depth: list[Freshness] = []

    def listener(change: Change) -> None:
        depth.append(timed.cache.lookup(change.tenant).freshness)
        if len(depth) == 1:
            timed.cache.invalidate(change.tenant)

    timed.cache.changes.listen(listener)
    timed.cache.start()
    timed.hand.advance(5.0)
    assert timed.cache.peek(TENANT).freshness is Freshness.FRESH
    assert timed.cache.peek(TENANT).record.generation == 1


def test_a_thread_that_loaded_earlier_and_comes_back_later_turns_nothing_back(threaded: Threaded) -> None:
    class Slow(MemoryStore):
        slow: threading.Thread | None = None
        loaded, go_on = threading.Event(), threading.Event()

        def load(self, tenant: str) -> Record:
            record = super().load(tenant)
            if threading.current_thread() is self.slow:
                self.loaded.set()
                assert self.go_on.wait(SOON)
            return record

    store = Slow(clock=threaded.clock)
    cache = threaded.make(store=store)
    cache.lookup(TENANT)
    told: list[tuple[int, bool | None]] = []
    cache.changes.listen(lambda change: told.append((last_number(change.answer.record), value(change.answer))))
    store.slow = threading.Thread(target=cache.peek, args=(TENANT,), daemon=True)
    store.invalidate(TENANT)
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
    """As with a shared store: it says who changed when asked, and wakes whoever attached."""

    class Shared(MemoryStore):
        def __init__(self) -> None:
            super().__init__(clock=clock)
            self.news: list[str] = []

        def changed(self) -> list[str]:
            news, self.news = self.news, []
            return news

    store, hand, source = Shared(), Hand(clock), Source(clock)
    polls: list[Callable[[], None]] = []

    cache = Cache(
        tenants=[TENANT],
        store=store,
        source=source,
        windows=WINDOWS,
        timeout_seconds=5.0,
        clock=clock,
        random=lambda: 0.5,
        background=True,
        runner=lambda poll, _seconds: (polls.append(poll), hand)[1],  # type: ignore[func-returns-value]  # both in one
    )
    cache.start()
    hand.advance(1.0)
    told: list[Change] = []
    cache.changes.listen(told.append)
    store.invalidate(TENANT)
    store.news = ["somebody else's", TENANT]
    polls[0]()
    assert [change.answer.freshness for change in told] == [Freshness.STALE]
    source.says = False
    hand.advance(0.0)
    assert value(cache.peek(TENANT)) is False


# -- beginning and end ---------------------------------------------------------------------------------------------


def test_warming_reads_every_tenant_once_and_waits_no_longer_than_one_read(threaded: Threaded) -> None:
    cache = threaded.make(tenants=("dead", "alive", "failing"), timeout_seconds=0.3)
    threaded.hold("dead", "failing")
    threading.Thread(target=lambda: threaded.source.held("failing").answer(Unavailable("down")), daemon=True).start()
    began = time.monotonic()
    answers = cache.warm()
    assert time.monotonic() - began < 2.0
    assert [value(answer) for answer in answers] == [None, True, None]
    assert sorted(threaded.source.reads) == ["alive", "dead", "failing"]
    assert [value(answer) for answer in cache.warm()] == [None, True, None]
    assert threaded.source.reads.count("alive") == 1


def test_closing_lets_every_waiter_go_at_once_and_leaves_no_thread(threaded: Threaded) -> None:
    cache = threaded.make(timeout_seconds=60.0, windows=replace(WINDOWS, ttl_seconds=60.0))
    threaded.hold()
    crowd = Crowd(cache)
    held = threaded.source.held()
    began = time.monotonic()
    cache.close(1.0, abort=lambda: held.answer(Unavailable("broken off")))
    answers = crowd.wait(5.0)
    assert time.monotonic() - began < 3.0
    assert {value(answer) for answer in answers} == {None}
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
    cache = threaded.make()
    cache.close()
    began = time.monotonic()
    assert value(cache.lookup(TENANT)) is None
    assert value(asyncio.run(cache.lookup_async(TENANT))) is None
    with pytest.raises(Unavailable, match="shut down"):
        cache.refresh(TENANT)
    assert cache.validate(TENANT, 1) is None
    cache.invalidate(TENANT)
    cache.close()
    assert time.monotonic() - began < 2.0
    assert threaded.source.reads == []


def test_a_flight_that_waits_for_another_process_begins_no_read_after_the_end(threaded: Threaded) -> None:
    store = MemoryStore(clock=threaded.clock)
    cache = threaded.make(store=store)
    lease = store.acquire(TENANT, seconds=60.0, metered=False)
    waiting = threading.Thread(target=cache.lookup, args=(TENANT,), daemon=True)
    waiting.start()
    flight = cache._flights._lanes[TENANT]
    wait_until(lambda: flight.flight is not None and flight.flight.denied_at is not None)
    cache.close(5.0)
    waiting.join(SOON)
    store.release(lease)  # type: ignore[arg-type]  # nobody else asked for it
    wait_until(lambda: not [thread for thread in newcomers() if thread.name == "external-oms-read"])
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
    wait_until(lambda: not [thread for thread in newcomers() if thread.name == "external-oms-read"])
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
    cache = threaded.make(background=True)
    cache.lookup(TENANT)
    threaded.hold()
    cache.invalidate(TENANT)
    cache.lookup(TENANT)
    held = threaded.source.held()  # a read of the parent is under way
    locks = [cache._seats._seats[TENANT].lock, cache._planning, cache._flights._lanes[TENANT].lock]
    for lock in locks:
        lock.acquire()  # as if other threads held them at the instant of the fork
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        code = 1
        try:
            threaded.source = Source(threaded.clock)
            threaded.source.says = False
            cache._flights._source = threaded.source
            cache.after_fork()
            began = time.monotonic()
            warm = cache.lookup(TENANT)
            quick = time.monotonic() - began < 1.0
            wait_until(lambda: value(cache.lookup(TENANT)) is False)
            cache.invalidate(TENANT)
            heard = cache.lookup(TENANT).freshness is Freshness.STALE
            again = value(cache.refresh(TENANT)) is False
            code = 0 if (value(warm) is True and quick and heard and again) else 2
        finally:
            os._exit(code)
    for lock in locks:
        lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    held.answer(True)
    wait_until(lambda: cache.lookup(TENANT).freshness is Freshness.FRESH)


def test_a_job_may_be_run_on_a_reader(threaded: Threaded) -> None:
    cache, done = threaded.make(), threading.Event()
    cache.run(done.set)
    assert done.wait(SOON)
    done.clear()
    cache.after(0.001, done.set)
    assert done.wait(SOON)


def test_reads_by_this_process_are_told_of_with_their_outcome(timed: Timed) -> None:
    ended: list[ReadEnd] = []
    timed.cache.reads.listen(ended.append)
    timed.cache.lookup(TENANT)
    timed.source.says = Unavailable("down")
    with pytest.raises(ReadError):
        timed.cache.refresh(TENANT)
    assert [type(end.outcome).__name__ for end in ended] == ["Snapshot", "Failure"]
    assert [end.lease.number for end in ended] == [1, 2]


def test_nothing_of_all_this_is_logged_by_the_heart_itself(timed: Timed, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="external_oms"):
        timed.cache.start()
        timed.source.says = Unavailable("down")
        timed.hand.advance(3600.0)
    assert caplog.records == []
