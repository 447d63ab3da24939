"""What people and deliveries do to a tenant, and the rows of history that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

import pytest

from external_oms import operations
from external_oms.cache import CacheStore
from external_oms.config import Document, Reading
from external_oms.entry import PACE_BURST, PACE_SECONDS
from external_oms.errors import (
    RateLimited,
    ReadError,
    StoreBusy,
    StoreError,
    TokenError,
    Unauthorized,
    Unavailable,
    WriteConflict,
    WriteError,
    WriteOutcomeUnknown,
)
from external_oms.operations import READ_BACK_PAUSES_SECONDS, READ_BACK_SECONDS, DeliveryResult, HistoryPage, Operations
from external_oms.policy import Freshness
from external_oms.records import Cause, Event
from external_oms.stores.fallback import Fallback
from external_oms.stores.memory import MemoryStore
from tests.support.clock import FakeClock
from tests.support.scripted import TENANT, Hand, Source, make_cache
from tests.support.stores import FaultyStore

OTHER = "zulu"


@dataclass
class Writer:
    """Takes a value as the test says, and has the API show it after so many reads more."""

    source: Source
    error: WriteError | ReadError | None = None
    takes: bool = True
    written: list[bool] = field(default_factory=list)

    def write(self, enabled: bool) -> Document | None:
        self.written.append(enabled)
        if self.takes:
            self.source.says = enabled
        if self.error is not None:
            raise self.error
        return Document(enabled)


class Desk:
    """Operations over a cache on a clock that stands still until told; pauses let the clock go on."""

    def __init__(self, clock: FakeClock, *, store: CacheStore | None = None, max_waiters: int = 16) -> None:
        self.clock = clock
        self.source = Source(clock)
        self.store = MemoryStore(clock=clock) if store is None else store
        self.hand = Hand(clock)
        self.cache = make_cache(
            self.source,
            clock,
            runner=self.hand,
            store=self.store,
            tenants=(TENANT, OTHER),
            max_waiters=max_waiters,
        )
        self.writer = Writer(self.source)
        self.pauses: list[float] = []
        self.after_pause: Callable[[], None] = lambda: None
        self.operations = Operations(
            cache=self.cache,
            store=self.store,
            writers={TENANT: self.writer, OTHER: Writer(self.source)},
            clock=clock,
            pause=self._pause,
        )

    def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.hand.advance(seconds)
        self.after_pause()

    def rows(self, cause: Cause | None = None) -> list[Event]:
        """The history, oldest first."""
        rows = reversed(self.operations.history())
        return [row for row in rows if cause is None or row.cause is cause]

    def deliver(self, delivery_id: str | None = None) -> DeliveryResult:
        return self.operations.deliver(TENANT, delivery_id=delivery_id, actor="webhook")


@pytest.fixture
def desk(clock: FakeClock) -> Desk:
    return Desk(clock)


# -- deliveries ----------------------------------------------------------------------------------------------------


def test_a_delivery_invalidates_and_the_api_is_read_before_it_is_answered(desk: Desk) -> None:
    desk.cache.lookup(TENANT)
    desk.source.says = False
    assert desk.deliver("one") == DeliveryResult(TENANT, generation=1, duplicate=False, refreshed=True, enabled=False)
    assert desk.cache.peek(TENANT).freshness is Freshness.FRESH
    (row,) = desk.rows(Cause.DELIVERY)
    assert (row.tenant, row.enabled, row.actor, row.delivery_id) == (TENANT, None, "webhook", "one")
    assert (row.detail, row.latency_seconds) == ("generation 1", None)
    assert row.at.timestamp() == desk.clock.wall()
    assert [row.cause for row in desk.rows()] == [Cause.CHANGED, Cause.DELIVERY, Cause.CHANGED]


def test_a_delivery_that_comes_twice_does_nothing_the_second_time(desk: Desk) -> None:
    desk.deliver("one")
    desk.source.says = False
    reads, rows = len(desk.source.reads), desk.rows()
    versions, index = desk.store.version_ref(TENANT)
    version = versions[index]
    assert desk.deliver("one") == DeliveryResult(TENANT, generation=1, duplicate=True, refreshed=False, enabled=True)
    assert len(desk.source.reads) == reads
    assert desk.rows() == rows, "no row of history"
    assert versions[index] == version, "no process has anything to load"
    assert desk.deliver("two").generation == 2


def test_the_same_id_for_another_tenant_is_another_delivery(desk: Desk) -> None:
    desk.deliver("one")
    assert not desk.operations.deliver(OTHER, delivery_id="one", actor="webhook").duplicate


def test_deliveries_without_an_id_all_count(desk: Desk) -> None:
    assert [desk.deliver().generation for _ in range(3)] == [1, 2, 3]
    assert [row.delivery_id for row in desk.rows(Cause.DELIVERY)] == ["", "", ""]


@pytest.mark.parametrize(
    "error", [Unavailable("down", status=500), RateLimited("429", status=429, retry_after_seconds=60.0)]
)
def test_where_the_api_cannot_be_read_the_delivery_is_taken_and_a_read_follows(desk: Desk, error: ReadError) -> None:
    desk.cache.lookup(TENANT)
    desk.source.says = error
    assert desk.deliver("one") == DeliveryResult(TENANT, generation=1, duplicate=False, refreshed=False, enabled=True)
    assert desk.cache.peek(TENANT).freshness is Freshness.STALE
    assert desk.rows()[-1].cause is Cause.FAILED
    desk.source.says = False
    desk.hand.advance(70.0)
    assert desk.cache.state(TENANT).enabled is False
    assert desk.deliver("one").duplicate, "it was taken: the sender need not send it again"


def test_a_delivery_before_anything_was_ever_read_and_with_a_dead_api_is_taken_too(desk: Desk) -> None:
    desk.source.says = Unavailable("down")
    assert desk.deliver("one") == DeliveryResult(TENANT, generation=1, duplicate=False, refreshed=False, enabled=None)


def test_a_delivery_in_a_storm_waits_for_the_read_that_the_pace_allows(desk: Desk) -> None:
    desk.cache.lookup(TENANT)
    began = desk.clock.monotonic()
    assert [desk.deliver(str(number)).refreshed for number in range(PACE_BURST)] == [True] * PACE_BURST
    assert desk.clock.monotonic() == began
    assert desk.deliver("one more").refreshed
    assert desk.clock.monotonic() == began + PACE_SECONDS


def test_a_storm_of_deliveries_is_answered_at_once_where_as_many_wait_as_may(clock: FakeClock) -> None:
    desk = Desk(clock, max_waiters=0)
    desk.cache.lookup(TENANT)
    for number in range(PACE_BURST):  # their reads begin at once, so nobody has to wait
        desk.deliver(str(number))
    began = clock.monotonic()
    for number in range(20):
        delivered = desk.deliver(f"more {number}")
        assert (delivered.refreshed, delivered.generation) == (False, PACE_BURST + number + 1)
    assert clock.monotonic() == began
    desk.source.says = False
    desk.hand.advance(1.1)
    state = desk.cache.state(TENANT)
    assert (state.enabled, state.freshness, state.generation) == (False, Freshness.FRESH, PACE_BURST + 20)


@pytest.mark.parametrize("error", [StoreError("connection refused"), StoreBusy("in use")])
def test_a_delivery_that_the_shared_store_cannot_take_is_an_error_and_holds_in_this_process(
    clock: FakeClock, error: StoreError
) -> None:
    shared = FaultyStore(clock)
    desk = Desk(clock, store=Fallback(shared, clock=clock, random=lambda: 0.5))
    told: list[DeliveryResult] = []
    desk.operations.deliveries.subscribe(told.append)
    desk.cache.lookup(TENANT)
    desk.source.says = Unavailable("down")
    shared.fault = error
    with pytest.raises(StoreError, match="send it again"):
        desk.deliver("one")
    assert told == []
    assert desk.cache.peek(TENANT).freshness is Freshness.STALE
    shared.fault = None
    clock.advance(3.0)
    desk.hand.wake()
    assert shared.data.load(TENANT).generation > 0, "it was repeated to the store"
    assert not desk.deliver("one").duplicate, "the id was not remembered: the sender that repeats is heard"


# -- by hand -------------------------------------------------------------------------------------------------------


def test_invalidating_by_hand_says_who_did(desk: Desk) -> None:
    desk.cache.lookup(TENANT)
    desk.source.says = False
    assert desk.operations.invalidate(TENANT, actor="ops") == 1
    (row,) = desk.rows(Cause.INVALIDATED)
    assert (row.actor, row.detail, row.enabled) == ("ops", "generation 1", None)
    state = desk.cache.state(TENANT)
    assert (state.enabled, state.freshness) == (False, Freshness.FRESH), "a read follows by itself"


def test_a_refresh_gives_the_state_as_read_for_this_very_call_or_raises(desk: Desk) -> None:
    state = desk.operations.refresh(TENANT)
    assert (state.enabled, state.source, state.age_seconds) == (True, "api", 0.0)
    desk.source.says = Unauthorized("403", status=403)
    with pytest.raises(Unauthorized):
        desk.operations.refresh(TENANT)
    assert desk.cache.state(TENANT).enabled is True


# -- writing -------------------------------------------------------------------------------------------------------


def test_a_value_is_written_everybody_is_made_to_read_and_it_is_read_back(desk: Desk) -> None:
    desk.cache.lookup(TENANT)
    state = desk.operations.set_enabled(TENANT, enabled=False, actor="ada", reason="moving to the new OMS")
    assert desk.writer.written == [False]
    assert (state.enabled, state.freshness, state.generation) == (False, Freshness.FRESH, 1)
    (row,) = desk.rows(Cause.WRITE)
    assert (row.actor, row.enabled) == ("ada", False)
    assert row.detail == "written and read back; reason: moving to the new OMS"
    assert row.latency_seconds == 0.0
    assert desk.pauses == []


def test_a_replica_that_lags_is_asked_again_after_a_pause(desk: Desk) -> None:
    desk.cache.lookup(TENANT)
    desk.writer.takes = False
    desk.after_pause = lambda: setattr(desk.source, "says", False)
    state = desk.operations.set_enabled(TENANT, enabled=False, actor="ada")
    assert state.enabled is False
    assert desk.pauses == [0.5]
    assert desk.rows(Cause.WRITE)[-1].detail == "written and read back"


def test_an_api_that_goes_on_answering_the_old_value_is_told_as_it_is(desk: Desk) -> None:
    desk.cache.lookup(TENANT)
    desk.writer.takes = False
    state = desk.operations.set_enabled(TENANT, enabled=False, actor="ada")
    assert state.enabled is True
    assert desk.pauses == [seconds for seconds in READ_BACK_PAUSES_SECONDS if seconds]
    (row,) = desk.rows(Cause.WRITE)
    assert (row.enabled, row.detail) == (False, "written; the API still answers the old value")


def test_a_value_that_cannot_be_read_back_is_told_as_it_is(desk: Desk) -> None:
    desk.cache.lookup(TENANT)
    desk.writer.takes = False
    desk.source.says = Unavailable("down")
    state = desk.operations.set_enabled(TENANT, enabled=False, actor="ada")
    assert (state.enabled, state.freshness, state.last_error) == (True, Freshness.STALE, "down")
    (row,) = desk.rows(Cause.WRITE)
    assert (row.enabled, row.detail) == (False, "written; it could not be read back yet")


def test_a_write_without_an_answer_that_reads_back_was_taken(desk: Desk) -> None:
    desk.writer.error = WriteOutcomeUnknown("no answer")
    assert desk.operations.set_enabled(TENANT, enabled=False, actor="ada").enabled is False
    assert desk.rows(Cause.WRITE)[-1].detail == "written and read back"


@pytest.mark.parametrize("says", [True, Unavailable("down")])
def test_a_write_without_an_answer_that_does_not_read_back_stays_unknown(desk: Desk, says: bool | Exception) -> None:
    desk.cache.lookup(TENANT)
    desk.writer.error = unknown = WriteOutcomeUnknown("no answer")
    desk.writer.takes = False
    desk.source.says = says
    with pytest.raises(WriteOutcomeUnknown) as raised:
        desk.operations.set_enabled(TENANT, enabled=False, actor="ada", reason="why")
    assert raised.value is unknown
    (row,) = desk.rows(Cause.WRITE)
    assert row.enabled is None, "nobody knows the value after it"
    assert row.detail == "whether off was written is unknown: no answer came; reason: why"
    assert desk.cache.state(TENANT).generation == 1, "whoever serves must look again"


def test_a_write_without_an_answer_is_looked_for_longer_and_not_for_ever(desk: Desk) -> None:
    desk.cache.lookup(TENANT)
    desk.writer.error, desk.writer.takes = WriteOutcomeUnknown("no answer"), False
    for slow_seconds, pauses in ((0.0, [0.5, 1.0, 2.0]), (READ_BACK_SECONDS, [0.5])):
        desk.pauses.clear()
        desk.after_pause = partial(desk.hand.advance, slow_seconds)
        with pytest.raises(WriteOutcomeUnknown):
            desk.operations.set_enabled(TENANT, enabled=False, actor="ada", reason="why")
        assert desk.pauses == pauses


@pytest.mark.parametrize(
    "error",
    [
        WriteConflict("409", status=409),
        WriteError("400", status=400),
        TokenError("no token"),
        Unauthorized("403", status=403),
        RateLimited("429", status=429, retry_after_seconds=9.0),
        Unavailable("no connection"),
    ],
)
def test_a_write_that_was_refused_or_not_sent_changes_nothing_and_leaves_a_row(
    desk: Desk, error: WriteError | ReadError
) -> None:
    desk.cache.lookup(TENANT)
    desk.writer.error, desk.writer.takes = error, False
    with pytest.raises(type(error)) as raised:
        desk.operations.set_enabled(TENANT, enabled=False, actor="ada", reason="why")
    assert raised.value is error
    assert desk.cache.peek(TENANT).freshness is Freshness.FRESH
    assert desk.cache.state(TENANT).generation == 0
    (row,) = desk.rows(Cause.WRITE)
    assert (row.enabled, row.detail) == (None, f"off was not written: {error}; reason: why")


# -- history -------------------------------------------------------------------------------------------------------


def test_reads_leave_a_row_for_a_first_value_a_change_a_beginning_and_an_end_of_trouble(desk: Desk) -> None:
    desk.cache.start()
    desk.hand.advance(100.0)
    desk.source.says = False
    desk.hand.advance(31.0)
    for failures in (1, 20):
        desk.source.says = Unavailable("down", status=502)
        for _ in range(failures):
            with pytest.raises(Unavailable):
                desk.operations.refresh(TENANT)
        desk.source.says = False
        desk.operations.refresh(TENANT)
    desk.source.says = True
    desk.operations.refresh(TENANT)
    rows = [row for row in desk.rows() if row.tenant == TENANT]
    assert [(str(row.cause), row.enabled, row.detail) for row in rows] == [
        ("changed", True, "first value"),
        ("changed", False, "the value changed"),
        ("failed", None, "down"),
        ("recovered", False, "after 1 failed read"),
        ("failed", None, "down"),
        ("recovered", False, "after 20 failed reads"),
        ("changed", True, "the value changed"),
    ]
    assert all(row.latency_seconds == 0.0 for row in rows)
    assert [row.id for row in desk.rows()] == sorted(row.id for row in desk.rows())


def test_a_recovery_with_another_value_is_both(desk: Desk) -> None:
    desk.cache.lookup(TENANT)
    desk.source.says = Unavailable("down")
    with pytest.raises(Unavailable):
        desk.operations.refresh(TENANT)
    desk.source.says = False
    desk.operations.refresh(TENANT)
    assert [row.cause for row in desk.rows()] == [Cause.CHANGED, Cause.FAILED, Cause.RECOVERED, Cause.CHANGED]


def test_the_history_is_newest_first_of_one_tenant_or_all_and_goes_on_from_a_row(desk: Desk) -> None:
    for tenant in (TENANT, OTHER, TENANT):
        desk.operations.invalidate(tenant, actor="ops")
    every = desk.operations.history()
    assert [row.tenant for row in every if row.cause is Cause.INVALIDATED] == [TENANT, OTHER, TENANT]
    assert {row.tenant for row in desk.operations.history(tenant=OTHER)} == {OTHER}
    assert desk.operations.history(limit=1) == every[:1]
    assert desk.operations.history(before=every[0].id) == every[1:]


def test_the_history_is_filtered_and_goes_on_where_a_page_ended(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    search = desk.operations.search_history
    for number in range(1, 41):
        cause = Cause.DELIVERY if number % 2 else Cause.WRITE
        desk.store.append(Event(datetime.now(UTC), TENANT, cause, actor=f"Ada {number % 4}"))
    assert [event.id for event in search(limit=2).events] == [40, 39]
    found = search(cause=Cause.WRITE, actor="ADA 2", limit=4)
    assert ([event.id for event in found.events], found.next) == ([38, 34, 30, 26], 26)
    rest = search(cause=Cause.WRITE, actor="ada 2", limit=100, before=found.next)
    assert ([event.id for event in rest.events][:2], len(rest.events), rest.next) == ([22, 18], 6, None)
    assert search(cause=Cause.STORE) == HistoryPage([], None)

    monkeypatch.setattr(operations, "SCAN_ROWS", 5)
    monkeypatch.setattr(operations, "MAX_SCANNED_ROWS", 10)
    assert search(cause=Cause.STORE) == HistoryPage([], 31), "a request looks through so many rows"


def test_the_value_that_a_lagging_replica_answers_after_a_write_is_not_kept_for_long(desk: Desk) -> None:
    """It is looked at again within seconds, whatever the whole lifetime is."""
    desk.source.says = Reading(Document(True))
    desk.cache.start()
    desk.hand.advance(100.0)
    desk.writer.takes = False
    desk.operations.set_enabled(TENANT, enabled=False, actor="ada")
    desk.source.says = False
    desk.hand.advance(2.5)
    assert desk.cache.state(TENANT).enabled is False


def test_every_delivery_is_told_with_what_came_of_it(desk: Desk) -> None:
    told: list[DeliveryResult] = []
    desk.operations.deliveries.subscribe(told.append)
    given = [desk.deliver("one"), desk.deliver("one"), desk.deliver()]
    assert told == given
