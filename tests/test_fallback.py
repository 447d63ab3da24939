"""Degraded operation: what a process does while the shared store fails, and what survives of that."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import count, pairwise

import pytest

from external_oms.codec import MAX_COUNTER
from external_oms.config import Document, Reading
from external_oms.entry import Change, Entry, Granted, Invalidated, Invalidation, begin_read, commit, is_current
from external_oms.errors import LaggingAnswer, StoreBusy, StoreError
from external_oms.policy import Freshness, Windows, evaluate
from external_oms.policy import Source as ValueSource
from external_oms.records import Cause, Event, Member
from external_oms.stores.fallback import Fallback
from external_oms.stores.memory import MemoryStore
from tests.support.clock import FakeClock
from tests.support.scripted import TENANT, Hand, Source, make_cache
from tests.support.stores import FaultyStore

DOWN = StoreError("connection refused")
FAULTS = [DOWN, ValueError("a row that nobody can read"), OSError("disk")]
EPOCH = datetime(2026, 5, 28, 20, tzinfo=UTC)


class Process:
    """A member of a fleet: a fallback over its view of the shared store."""

    def __init__(self, clock: FakeClock, *, data: MemoryStore | None = None, holder: str = "us") -> None:
        self.clock = clock
        self.shared = FaultyStore(clock, data=data, holder=holder)
        self.store = Fallback(self.shared, clock=clock, random=lambda: 0.5)

    def invalidate(self, delivery_id: str | None = None, event: Event | None = None) -> tuple[Invalidated, bool]:
        results, shared = self.store.invalidate(TENANT, [Invalidation(event, delivery_id)])
        return results[0], shared

    def read(self, enabled: bool = True) -> None:
        """Read and store a value in whichever store serves."""
        now = self.clock.monotonic()
        begin = partial(begin_read, holder=self.store.holder, lease_seconds=7.0, newer_than=10**6, forced=True)
        outcome = self.store.transact(TENANT, begin)
        assert isinstance(outcome, Granted)
        self.store.transact(
            TENANT,
            partial(
                commit,
                lease=outcome.lease,
                reading=Reading(Document(enabled)),
                read_at=now,
                fetched_at=EPOCH,
                ttl_seconds=30.0,
                hard_limit_seconds=3630.0,
                tenant=TENANT,
                latency_seconds=0.0,
            ),
        )

    def fail(self, fault: Exception = DOWN) -> None:
        """The store fails, and this process notices."""
        self.shared.fault = fault
        self.store.load(TENANT)

    def recover(self) -> None:
        """The store works again, and this process notices."""
        self.shared.fault = None
        self.clock.advance(3.0)
        self.store.poll()


@pytest.fixture
def process(clock: FakeClock) -> Process:
    made = Process(clock)
    made.store.load(TENANT)
    return made


# -- while the store fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_store_that_fails_is_replaced_by_what_is_known_and_this_process_works_alone(
    process: Process, fault: Exception
) -> None:
    process.read()
    known = process.store.load(TENANT)
    process.fail(fault)
    assert process.store.load(TENANT) == known
    process.read(enabled=False)
    snapshot = process.store.load(TENANT).snapshot
    assert snapshot is not None
    assert (snapshot.enabled, process.store.is_own(snapshot.writer)) == (False, True)
    kept = process.shared.data.load(TENANT).snapshot
    assert kept is not None
    assert kept.enabled is True, "nothing of that is merged into the shared store"


@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.load(TENANT),
        lambda store: store.transact(TENANT, partial(begin_read, holder="us", lease_seconds=7.0, newer_than=0)),
        lambda store: store.invalidate(TENANT, [Invalidation()]),
        lambda store: store.append(Event(EPOCH, TENANT, Cause.CHANGED)),
        lambda store: store.history(),
        lambda store: store.report([Member("us", TENANT, 0, True, "fresh", 1.0)]),
        lambda store: store.members(),
        lambda store: store.poll(),
    ],
    ids=["load", "transact", "invalidate", "append", "history", "report", "members", "poll"],
)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_no_use_of_a_store_that_fails_raises_and_each_one_degrades(
    process: Process, use: Callable[[Fallback], object], fault: Exception
) -> None:
    process.shared.fault = fault
    use(process.store)
    health = process.store.health()
    assert not health.ok
    assert "works alone" in health.problem
    assert "a row that nobody can read" not in health.problem, "an unexpected error is not quoted"


def test_the_whole_outage_is_two_lines_of_log(process: Process, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="external_oms"):
        process.fail()
        for _ in range(100):
            process.clock.advance(1.0)
            process.store.poll()
            process.store.load(TENANT)
            process.invalidate()
        process.recover()
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "connection refused" in caplog.records[0].getMessage()
    assert "works again" in caplog.records[1].getMessage()
    assert process.store.health().ok


def test_a_failed_store_is_tried_again_after_pauses_that_grow_to_a_second_and_jitter(process: Process) -> None:
    process.fail()
    process.shared.calls.clear()
    tries = []
    for _ in range(1000):
        process.clock.advance(0.01)
        before = len(process.shared.calls)
        process.store.poll()
        if len(process.shared.calls) > before:
            tries.append(process.clock.monotonic())
    gaps = [later - earlier for earlier, later in pairwise(tries)]
    assert gaps == sorted(gaps)
    assert max(gaps) <= 2.0
    assert len(tries) <= 10


def test_where_the_store_can_be_read_and_not_written_it_is_not_taken_back(
    process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that is full, a Redis that is out of memory: a poll succeeds and proves nothing."""
    process.fail()
    process.shared.fault = None
    caplog.clear()
    transact = process.shared.transact

    def refuses(*given: object, **more: object) -> object:
        raise StoreError("read only")

    process.shared.transact = refuses  # type: ignore[method-assign, assignment]  # it can be read only
    with caplog.at_level(logging.INFO, logger="external_oms"):
        for _ in range(20):
            process.clock.advance(3.0)
            process.store.poll()
            process.store.report([])
    assert caplog.records == []
    assert not process.store.health().ok
    process.shared.transact = transact  # type: ignore[method-assign]  # it can be written again
    process.recover()
    assert process.store.health().ok


def test_an_invalidation_by_another_process_reaches_one_that_cannot_write_the_store_at_its_next_poll(
    process: Process, clock: FakeClock
) -> None:
    """A full disk refuses the writes of one process and takes those of another a moment later."""
    other = Process(clock, data=process.shared.data, holder="other")
    process.read()
    process.store.load(TENANT)
    process.store.version_ref(TENANT)  # as a cache does
    process.fail()
    process.shared.fault = None
    process.store.poll()
    assert is_current(process.store.load(TENANT))
    result, shared = other.invalidate()
    assert shared
    assert process.store.poll() == [TENANT]
    assert not process.store.health().ok, "it still works alone"
    entry = process.store.load(TENANT)
    assert not is_current(entry)
    assert entry.generation >= result.generation
    assert process.store.poll() == [], "once"


def test_a_transition_that_refuses_is_no_failure_of_the_store(process: Process) -> None:
    def refuses(entry: Entry, moment: object) -> object:
        raise LaggingAnswer("older than before")

    with pytest.raises(LaggingAnswer):
        process.store.transact(TENANT, refuses)  # type: ignore[arg-type]  # it never returns
    assert process.store.health().ok


def test_a_lease_of_the_shared_store_does_not_bind_a_process_that_works_alone(process: Process) -> None:
    begin = partial(begin_read, lease_seconds=7.0, newer_than=0)
    process.shared.data.transact(TENANT, partial(begin, holder="them"))
    process.store.load(TENANT)
    process.fail()
    assert isinstance(process.store.transact(TENANT, partial(begin, holder=process.store.holder)), Granted)


def test_in_the_local_store_the_process_has_a_name_of_its_own_and_still_knows_what_it_wrote(process: Process) -> None:
    shared_name = process.store.holder
    process.fail()
    assert process.store.holder != shared_name
    assert process.store.is_own(shared_name)
    assert process.store.is_own(process.store.holder)
    assert not process.store.is_own("them")


def test_tenants_that_are_first_used_while_the_store_fails_or_recovers_disturb_neither(process: Process) -> None:
    touch, number = process.shared.touch, count()

    def touch_while_another_tenant_comes(tenant: str) -> None:
        touch(tenant)
        process.store.load(f"new-{next(number)}")

    process.shared.touch = touch_while_another_tenant_comes  # type: ignore[method-assign]  # what another thread does
    process.read()
    process.fail()
    process.invalidate()
    process.recover()
    assert process.store.health().ok
    assert process.shared.data.load(TENANT).generation > 0


# -- busy ------------------------------------------------------------------------------------------------------------


def test_a_store_that_others_use_is_not_given_up(process: Process, caplog: pytest.LogCaptureFixture) -> None:
    process.read()
    known = process.store.load(TENANT)
    process.shared.fault = StoreBusy("in use")
    entry = process.store.load(TENANT)
    assert (entry.snapshot, entry.verified) == (known.snapshot, False), "served as stale: it may have changed"
    with pytest.raises(StoreBusy):
        process.store.transact(TENANT, partial(begin_read, holder="us", lease_seconds=7.0, newer_than=0))
    assert process.store.poll() == ()
    assert (process.store.history(), process.store.members()) == ((), ())
    process.store.append(Event(EPOCH, TENANT, Cause.CHANGED))
    assert "lost" in caplog.text, "a row that could not be written is not lost silently"
    assert process.store.health().ok
    process.shared.fault = None
    assert process.store.load(TENANT) == known


def test_an_invalidation_that_a_busy_store_did_not_take_holds_here_and_is_repeated(process: Process) -> None:
    process.read()
    process.store.load(TENANT)
    versions, place = process.store.version_ref(TENANT)
    before = versions[place]
    process.shared.fault = StoreBusy("in use")
    result, shared = process.invalidate("id")
    assert (result, shared) == (Invalidated(1), False)
    assert versions[place] != before, "whoever remembers the value looks again"
    process.shared.fault = None
    entry = process.store.load(TENANT)
    assert (entry.generation, entry.verified, is_current(entry)) == (1, False, False)
    assert set(process.store.poll()) == {TENANT}
    assert process.shared.data.load(TENANT).generation > 1
    assert process.store.load(TENANT).verified
    assert process.invalidate("id")[0].duplicate is False, "a sender that repeats is heard"


# -- what must survive: the invalidations ----------------------------------------------------------------------------


def test_an_invalidation_holds_at_once_in_this_process_and_is_repeated_when_the_store_works_again(
    process: Process, clock: FakeClock
) -> None:
    other = Process(clock, data=process.shared.data, holder="them")
    process.read()
    process.store.load(TENANT)
    other.store.load(TENANT)
    process.fail()
    result, shared = process.invalidate("id", Event(EPOCH, TENANT, Cause.DELIVERY, delivery_id="id"))
    assert not shared
    assert process.store.load(TENANT).generation == result.generation == 1
    assert not is_current(process.store.load(TENANT))
    assert is_current(other.store.load(TENANT)), "nobody else can know"
    process.recover()
    assert not is_current(other.store.load(TENANT))
    assert process.store.load(TENANT).verified
    rows = process.store.history(tenant=TENANT)
    assert {row.cause for row in rows} >= {Cause.DELIVERY, Cause.INVALIDATED}, "the rows of the outage are kept"
    assert "repeated" in next(row.detail for row in rows if row.cause is Cause.INVALIDATED)


def test_between_the_recovery_and_the_repetition_nothing_old_is_verified(process: Process) -> None:
    process.read()
    process.store.load(TENANT)
    process.fail()
    process.invalidate()
    process.shared.fault = None
    seen: list[tuple[bool, bool]] = []
    transact = process.shared.transact

    def looks(*given: object, **more: object) -> object:
        entry = process.store.load(TENANT)
        seen.append((entry.verified, is_current(entry)))
        return transact(*given, **more)  # type: ignore[arg-type]  # handed on as it came

    process.shared.transact = looks  # type: ignore[method-assign, assignment]  # to look in between
    process.clock.advance(3.0)
    process.store.poll()
    assert seen
    assert all(not current for _, current in seen)
    assert seen[-1] == (False, False)
    process.shared.transact = transact  # type: ignore[method-assign]  # as it was
    assert process.store.load(TENANT).verified


def test_what_is_owed_by_an_invalidation_during_the_repetition_is_repeated_too(process: Process) -> None:
    process.fail()
    process.invalidate()
    transact = process.shared.transact
    late: list[Invalidated] = []

    def meanwhile(*given: object, **more: object) -> object:
        if process.store.health().ok and not late:  # the repetition, after the probe
            process.shared.transact = transact  # type: ignore[method-assign]  # as it was
            process.shared.fault = StoreBusy("in use")
            late.append(process.invalidate()[0])
            process.shared.fault = None
        return transact(*given, **more)  # type: ignore[arg-type]  # handed on as it came

    process.shared.transact = meanwhile  # type: ignore[method-assign, assignment]  # to come in between
    process.recover()
    assert late
    assert not process.store.load(TENANT).verified
    process.store.poll()
    assert process.store.load(TENANT).verified
    assert process.shared.data.load(TENANT).generation > late[0].generation


def test_a_value_that_could_not_be_verified_is_stale_for_a_process_that_works_alone_until_it_reads(
    process: Process, clock: FakeClock
) -> None:
    process.read()
    process.store.load(TENANT)
    load = process.shared.load
    process.shared.load = lambda tenant: replace(load(tenant), verified=False)  # type: ignore[method-assign]  # a fork
    process.store.load(TENANT)
    process.fail()
    clock.advance(0.1)

    def freshness() -> Freshness:
        entry, windows = process.store.load(TENANT), Windows(30.0, 30.0, 3600.0)
        return evaluate(TENANT, entry, now=clock.monotonic(), windows=windows, source=ValueSource.MEMORY).freshness

    assert freshness() is Freshness.STALE
    process.read()
    assert freshness() is Freshness.FRESH


def test_delivery_ids_are_not_remembered_by_a_process_that_works_alone(process: Process) -> None:
    process.fail()
    assert [process.invalidate("id")[0].duplicate for _ in range(3)] == [False] * 3
    process.recover()
    assert not process.invalidate("id")[0].duplicate
    assert process.invalidate("id") == (Invalidated(process.store.load(TENANT).generation, duplicate=True), True)


def test_a_store_that_lost_its_data_gets_a_generation_above_the_one_that_was_known(
    process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    """A Redis that restarted without persistence, a file that was put back from a backup."""
    for _ in range(5):
        process.invalidate()
    process.read()
    assert is_current(process.store.load(TENANT))
    process.shared.data._entries.clear()
    entry = process.store.load(TENANT)
    assert (entry.generation, entry.verified) == (5, False)
    assert "has lost data of tenant" in caplog.text
    process.store.poll()
    assert process.shared.data.load(TENANT).generation == 6
    kept = process.store.load(TENANT)
    assert kept.generation == 6
    assert kept.snapshot == entry.snapshot, "the value that the store lost is better than none"
    assert not is_current(kept)


def test_what_a_store_has_lost_is_repaired_by_the_first_process_and_the_others_find_it_done(
    process: Process, clock: FakeClock
) -> None:
    other = Process(clock, data=process.shared.data, holder="other")
    process.read()
    value = process.store.load(TENANT).snapshot
    assert other.store.load(TENANT).snapshot == value
    process.shared.data._entries.clear()
    for one in (process, other):
        lost = one.store.load(TENANT)
        assert (lost.snapshot, lost.verified) == (value, False)
    process.store.poll()
    repaired = process.shared.data.load(TENANT)
    assert (repaired.generation, repaired.snapshot) == (1, value)
    other.store.poll()
    assert process.shared.data.load(TENANT) == repaired
    assert process.store.load(TENANT) == other.store.load(TENANT) == repaired
    assert [row.cause for row in process.store.history()].count(Cause.STORE) == 1


def test_a_value_that_was_read_since_the_loss_is_kept_though_its_numbers_began_again(
    process: Process, clock: FakeClock
) -> None:
    newcomer = Process(clock, data=process.shared.data, holder="newcomer")
    for _ in range(3):
        process.read(enabled=True)
    process.store.load(TENANT)
    process.shared.data._entries.clear()
    clock.advance(1.0)
    newcomer.read(enabled=False)
    assert newcomer.store.load(TENANT).token == 1
    entry = process.store.load(TENANT)
    assert entry.snapshot is not None
    assert (entry.snapshot.enabled, entry.verified) == (False, False)
    process.store.poll()
    entry = process.store.load(TENANT)
    assert entry.snapshot is not None
    assert (entry.snapshot.enabled, entry.verified, is_current(entry)) == (False, True, False)
    assert newcomer.store.load(TENANT) == entry
    assert process.store.poll() == () or not process.store._known.owed, "it is no loss any more"


def test_a_forged_generation_at_its_end_is_given_up(process: Process) -> None:
    forge = partial(replace, generation=MAX_COUNTER - 1)
    process.shared.data.transact(TENANT, lambda entry, _: Change(forge(entry), None))
    assert process.store.load(TENANT).generation == MAX_COUNTER - 1
    process.shared.data._entries.clear()  # as a store refuses what is above that
    assert process.invalidate() == (Invalidated(1), True)
    assert process.store.load(TENANT).generation == 1
    assert process.store.load(TENANT).verified


def test_an_unexpected_error_of_the_repetition_ends_no_poll_and_is_tried_again(
    process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    process.shared.fault = StoreBusy("in use")
    process.invalidate()
    process.shared.fault = None
    transact = process.shared.transact

    def breaks(*given: object, **more: object) -> object:
        raise ZeroDivisionError

    process.shared.transact = breaks  # type: ignore[method-assign, assignment]  # a bug in the store
    for _ in range(10):
        process.clock.advance(3.0)
        process.store.poll()
    assert len(caplog.records) == 1
    process.shared.transact = transact  # type: ignore[method-assign]  # as it was
    process.recover()
    assert process.shared.data.load(TENANT).generation > 0


# -- the cache over it -----------------------------------------------------------------------------------------------


def test_an_evaluation_neither_raises_nor_waits_whatever_the_store_raises(clock: FakeClock) -> None:
    shared, source, hand = FaultyStore(clock), Source(clock), Hand(clock)
    store = Fallback(shared, clock=clock, random=lambda: 0.5)
    cache = make_cache(source, clock, runner=hand, store=store)
    cache.start()
    cache.lookup(TENANT)
    for fault in FAULTS:
        shared.fault = fault
        shared.data.touch(TENANT)
        began = clock.monotonic()
        evaluation = cache.lookup(TENANT)
        assert evaluation.freshness is Freshness.FRESH
        assert clock.monotonic() == began
        calls = len(shared.calls)
        for _ in range(1000):
            cache.lookup(TENANT)
        assert len(shared.calls) == calls, "a row that cannot be read is not read at each evaluation"
        shared.fault = None
        hand.advance(3.0)
        hand.wake()
        assert store.health().ok


def test_a_reader_that_learned_the_old_place_during_the_recovery_does_not_keep_it(clock: FakeClock) -> None:
    """Its word has changed for the last time: a reader that remembered it would never look again."""
    shared, source, hand = FaultyStore(clock), Source(clock), Hand(clock)
    store = Fallback(shared, clock=clock, random=lambda: 0.5)
    cache = make_cache(source, clock, runner=hand, store=store)
    cache.lookup(TENANT)
    shared.fault = DOWN
    shared.data.touch(TENANT)
    cache.lookup(TENANT)
    shared.fault = None
    clock.advance(3.0)
    version_ref = store.version_ref
    store.touch(TENANT)

    def recovers_meanwhile(tenant: str) -> object:
        place = version_ref(tenant)
        store.version_ref = version_ref  # type: ignore[method-assign]  # once
        store.poll()
        return place

    store.version_ref = recovers_meanwhile  # type: ignore[method-assign, assignment]  # to come in between
    cache.peek(TENANT)
    assert store.health().ok
    shared.data.invalidate(TENANT, [Invalidation()])
    assert cache.peek(TENANT).freshness is Freshness.STALE


# -- life ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owned", [True, False])
def test_closing_closes_the_shared_store_unless_the_caller_made_it(clock: FakeClock, owned: bool) -> None:
    shared = FaultyStore(clock)
    Fallback(shared, clock=clock, random=lambda: 0.5, owned=owned).close()
    assert shared.closed is owned


@pytest.mark.parametrize("degraded", [False, True])
def test_a_forked_child_works_on_and_owes_what_the_parent_owes(process: Process, degraded: bool) -> None:
    process.read()
    process.store.load(TENANT)
    if degraded:
        process.fail()
        process.invalidate()
    process.store._lock.acquire()  # as another thread of the parent held it
    name = process.store.holder
    process.store.after_fork()
    assert process.store.holder != name
    assert is_current(process.store.load(TENANT)) is not degraded
    process.recover()
    assert (process.shared.data.load(TENANT).generation > 0) is degraded


def test_waking_and_the_interval_of_the_poll_are_those_of_the_shared_store(process: Process) -> None:
    store = process.store
    assert (store.kind, store.poll_seconds, store.spread_seconds) == ("faulty", 0.01, 0.0)
    process.shared.ended.add("them")
    assert store.is_gone("them")
    assert not store.is_gone("us")
