"""The transitions of an entry: the fence, settling, lagging answers, the pace, the lease, and laws of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from external_oms.config import Document, Reading
from external_oms.entry import (
    LEASE_LIFE_FACTOR,
    PACE_BURST,
    PACE_SECONDS,
    SETTLING_FLOOR_SECONDS,
    BackedOff,
    Busy,
    Change,
    Entry,
    Failure,
    Granted,
    Invalidated,
    Invalidation,
    Lease,
    Moment,
    Paced,
    ReadOutcome,
    Satisfied,
    Snapshot,
    begin_read,
    commit,
    fail,
    invalidate,
    is_current,
    last_token,
    release,
    retry_at,
    settling_lifetime,
    shift,
    stale_at,
)
from external_oms.errors import LaggingAnswer, MalformedAnswer
from external_oms.policy import Freshness, Source, Windows, evaluate, refresh_at
from external_oms.records import Cause, Event

TENANT = "acme"
READ_AT = 1000.0
TTL = 30.0
HARD_LIMIT = 630.0
LEASE_SECONDS = 7.0
EPOCH = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
NEVER = float("-inf")
WINDOWS = Windows(TTL, 20.0, 600.0)


def snapshot(
    *,
    enabled: bool = True,
    generation: int = 0,
    token: int = 1,
    read_at: float = READ_AT,
    lifetime_seconds: float = TTL,
    updated_at: datetime | None = None,
) -> Snapshot:
    return Snapshot(enabled, updated_at, '"v1"', generation, token, read_at, EPOCH, lifetime_seconds, "us")


def failure(
    *,
    token: int = 2,
    generation: int = 0,
    count: int = 1,
    retry_at: float = READ_AT + 35.0,
    server_retry_at: float | None = None,
) -> Failure:
    return Failure(
        "unavailable", "no answer", 503, count, generation, token, READ_AT + 31.0, EPOCH, retry_at, server_retry_at
    )


def begin(
    entry: Entry,
    *,
    now: float = READ_AT,
    holder: str = "us",
    newer_than: int | None = None,
    forced: bool = False,
    dead_holder: str | None = None,
    floor: int = 0,
) -> Change[ReadOutcome]:
    return begin_read(
        entry,
        Moment(now, floor),
        holder=holder,
        lease_seconds=LEASE_SECONDS,
        newer_than=last_token(entry) if newer_than is None else newer_than,
        forced=forced,
        dead_holder=dead_holder,
    )


def granted(entry: Entry, **more: Any) -> Granted:  # noqa: ANN401 - as `begin` takes them
    outcome = begin(entry, **more).result
    assert isinstance(outcome, Granted)
    return outcome


def wall(now: float) -> datetime:
    """The wall clock at an instant of the monotonic clock."""
    return EPOCH + timedelta(seconds=now - READ_AT)


def committed(
    entry: Entry,
    lease: Lease,
    reading: Reading,
    *,
    read_at: float = READ_AT,
    now: float | None = None,
    ttl_seconds: float = TTL,
    hard_limit_seconds: float = HARD_LIMIT,
) -> Change[Snapshot | None]:
    now = read_at if now is None else now
    return commit(
        entry,
        Moment(now),
        lease=lease,
        reading=reading,
        read_at=read_at,
        fetched_at=wall(read_at),
        ttl_seconds=ttl_seconds,
        hard_limit_seconds=hard_limit_seconds,
        tenant=TENANT,
        latency_seconds=now - read_at,
    )


def failed(
    entry: Entry, lease: Lease, *, now: float = READ_AT, server_wait_seconds: float | None = None
) -> Change[Failure | None]:
    return fail(
        entry,
        Moment(now),
        lease=lease,
        kind="unavailable",
        message="no answer",
        status=503,
        backoff_seconds=2.0,
        server_wait_seconds=server_wait_seconds,
        wall=wall(now).timestamp(),
        tenant=TENANT,
        latency_seconds=0.5,
    )


def read(entry: Entry, reading: Reading, *, read_at: float = READ_AT, **more: Any) -> Change[Snapshot | None]:  # noqa: ANN401 - as `committed` takes them
    """Begin a read and commit its result, with nothing in between."""
    outcome = granted(entry, now=read_at, forced=True)
    return committed(outcome.entry, outcome.lease, reading, read_at=read_at, **more)


def invalidated(entry: Entry, *, at: float = READ_AT, ids: Sequence[str | None] = (None,)) -> Change[Any]:
    return invalidate(entry, Moment(at), [Invalidation(delivery_id=one) for one in ids])


ON, OFF = Reading(Document(enabled=True)), Reading(Document(enabled=False))


# -- invalidate ----------------------------------------------------------------------------------------------------


def test_an_invalidation_raises_the_generation_and_ends_freshness_from_now_on() -> None:
    entry = Entry(token=1, snapshot=snapshot())
    change = invalidated(entry, at=READ_AT + 5.0)
    assert change.result == (Invalidated(1),)
    assert (change.entry.generation, change.entry.invalidated_at, change.entry.stale_since) == (
        1,
        READ_AT + 5.0,
        READ_AT + 5.0,
    )
    assert change.entry.snapshot == entry.snapshot
    assert not is_current(change.entry)
    assert stale_at(change.entry) == READ_AT + 5.0


def test_a_second_invalidation_leaves_the_instant_from_which_the_windows_count() -> None:
    entry = invalidated(Entry(token=1, snapshot=snapshot()), at=READ_AT + 5.0).entry
    entry = invalidated(entry, at=READ_AT + 24.0).entry
    assert (entry.generation, entry.invalidated_at, entry.stale_since) == (2, READ_AT + 24.0, READ_AT + 5.0)
    assert stale_at(entry) == READ_AT + 5.0


def test_a_batch_gets_the_last_generation_and_each_repeated_id_in_it_counts_for_nothing() -> None:
    change = invalidate(
        Entry(generation=4),
        Moment(READ_AT, seen=frozenset({"old"})),
        [Invalidation(delivery_id=one) for one in ("old", "new", "new", None, None)],
    )
    assert change.result == (
        Invalidated(7, duplicate=True),
        Invalidated(7),
        Invalidated(7, duplicate=True),
        Invalidated(7),
        Invalidated(7),
    )
    assert change.claims == ("new",)


def test_a_batch_of_duplicates_changes_nothing_at_all() -> None:
    entry = Entry(generation=4, token=1, snapshot=snapshot(generation=4))
    event = Event(EPOCH, TENANT, Cause.DELIVERY)
    moment = Moment(READ_AT, floor=10**12, seen=frozenset({"old"}))
    change = invalidate(entry, moment, [Invalidation(event, "old"), Invalidation(event, "old")])
    assert change.entry is entry, "so the store writes nothing, and the version word stays"
    assert change.result == (Invalidated(4, duplicate=True),) * 2
    assert (change.events, change.claims) == ((), ())


def test_a_history_row_says_the_generation_and_a_detail_of_the_caller_is_kept() -> None:
    event = Event(EPOCH, TENANT, Cause.DELIVERY)
    own = replace(event, cause=Cause.INVALIDATED, detail="repeated")
    change = invalidate(Entry(), Moment(READ_AT), [Invalidation(event, "a"), Invalidation(own), Invalidation()])
    assert [(row.cause, row.detail) for row in change.events] == [
        (Cause.DELIVERY, "generation 3"),
        (Cause.INVALIDATED, "repeated"),
    ]


@pytest.mark.parametrize(("floor", "at_least", "generation"), [(0, 0, 5), (0, 9, 9), (1000, 9, 1000), (2, 3, 5)])
def test_a_generation_rises_above_all_that_is_known(floor: int, at_least: int, generation: int) -> None:
    change = invalidate(Entry(generation=4), Moment(READ_AT, floor), [Invalidation()], at_least=at_least)
    assert change.entry.generation == generation


# -- the fence -----------------------------------------------------------------------------------------------------


def test_a_read_that_an_invalidation_overtook_is_stored_as_stale_with_its_old_generation() -> None:
    outcome = granted(Entry())
    overtaken = invalidated(invalidated(outcome.entry, at=READ_AT + 1.0).entry, at=READ_AT + 2.0).entry
    change = committed(overtaken, outcome.lease, ON, now=READ_AT + 3.0)
    assert change.result is not None
    assert change.result.generation == 0
    assert (change.entry.generation, change.entry.stale_since) == (2, READ_AT + 1.0), "since the first of the two"
    assert not is_current(change.entry)
    evaluation = evaluate(TENANT, change.entry, now=READ_AT + 3.0, windows=WINDOWS, source=Source.MEMORY)
    assert evaluation.freshness is Freshness.STALE


def test_a_storm_that_overtakes_every_read_still_moves_the_value_forward() -> None:
    entry, now = Entry(), READ_AT
    for number in range(20):
        outcome = granted(entry, now=now, forced=True)
        entry = invalidated(outcome.entry, at=now + 0.1).entry
        reading = Reading(Document(enabled=number % 2 == 0))
        entry = committed(entry, outcome.lease, reading, read_at=now, now=now + 0.2).entry
        assert entry.snapshot is not None
        assert entry.snapshot.enabled is (number % 2 == 0)
        assert not is_current(entry)
        assert stale_at(entry) == now + 0.1, "its windows begin anew with each value"
        now += 5.0


def test_a_read_that_nothing_overtook_ends_the_staleness() -> None:
    entry = invalidated(Entry(token=1, snapshot=snapshot()), at=READ_AT + 5.0).entry
    stored = read(entry, OFF, read_at=READ_AT + 6.0).entry
    assert stored.snapshot is not None
    assert (stored.snapshot.enabled, stored.snapshot.generation, stored.stale_since) == (False, 1, None)
    assert is_current(stored)


def test_a_read_ends_the_doubt_about_a_value_that_could_not_be_verified() -> None:
    stored = read(Entry(token=1, snapshot=snapshot(), verified=False), OFF, read_at=READ_AT + 6.0).entry
    assert (stored.verified, is_current(stored), stored.snapshot and stored.snapshot.enabled) == (True, True, False)


def test_a_lease_that_a_later_one_replaced_stores_nothing() -> None:
    first = granted(Entry())
    second = granted(first.entry, holder="them", now=READ_AT + LEASE_SECONDS)
    for change in (committed(second.entry, first.lease, ON), failed(second.entry, first.lease)):
        assert (change.entry, change.result, change.events) == (second.entry, None, ())
    assert release(second.entry, Moment(READ_AT), lease=first.lease).entry is second.entry
    stored = committed(second.entry, second.lease, ON).result
    assert stored is not None
    assert stored.token == second.lease.token


def test_a_result_is_stored_once() -> None:
    outcome = granted(Entry())
    stored = committed(outcome.entry, outcome.lease, ON).entry
    assert committed(stored, outcome.lease, OFF).result is None
    assert failed(stored, outcome.lease).result is None


def test_a_lease_of_the_same_number_and_another_holder_is_another_lease() -> None:
    """A store that was emptied counts from the beginning again."""
    mine, theirs = granted(Entry(), holder="us"), granted(Entry(), holder="them")
    assert mine.lease.token == theirs.lease.token
    assert committed(theirs.entry, mine.lease, ON).result is None


def test_a_released_lease_leaves_nothing_and_the_next_is_granted_at_once() -> None:
    outcome = granted(Entry())
    freed = release(outcome.entry, Moment(READ_AT), lease=outcome.lease).entry
    assert freed.lease is None
    assert granted(freed, holder="them").lease.token == outcome.lease.token + 1


# -- what a read makes of an entry ---------------------------------------------------------------------------------


def test_a_read_makes_a_snapshot_of_its_lease_and_of_its_start() -> None:
    entry = Entry(generation=3, token=6)
    change = read(entry, Reading(Document(enabled=True, updated_at=EPOCH), '"v2"'))
    assert change.result == Snapshot(True, EPOCH, '"v2"', 3, 7, READ_AT, EPOCH, TTL, "us")
    assert change.entry == replace(entry, token=7, snapshot=change.result)


@pytest.mark.parametrize(
    ("since", "lifetime"), [(None, 30), (0, 1), (0.9, 1), (1, 1), (2, 2), (16, 16), (30, 30), (3600, 30)]
)
def test_lifetimes_after_an_invalidation_are_short_at_first_and_grow(since: float | None, lifetime: float) -> None:
    assert settling_lifetime(30, since) == lifetime


@given(ttl=st.floats(1e-3, 1e9), since=st.floats(0, 1e9), later=st.floats(0, 1e9))
def test_a_settling_lifetime_grows_with_time_and_never_passes_the_ttl(ttl: float, since: float, later: float) -> None:
    assert 0 < settling_lifetime(ttl, since) <= settling_lifetime(ttl, since + later) <= ttl


def test_reads_while_a_value_settles_come_after_1_1_2_4_seconds_and_so_on() -> None:
    entry, read_at, lifetimes = invalidated(Entry()).entry, READ_AT, []
    for _ in range(8):
        change = read(entry, ON, read_at=read_at)
        assert change.result is not None
        lifetimes.append(change.result.lifetime_seconds)
        entry, read_at = change.entry, read_at + change.result.lifetime_seconds
    assert lifetimes == [1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_read_that_began_before_the_invalidation_it_belongs_to_settles_too() -> None:
    """Between two hosts the instants may cross by the error of their clocks."""
    entry = invalidated(Entry(), at=READ_AT + 3.0).entry
    stored = read(entry, ON).result
    assert stored is not None
    assert stored.lifetime_seconds == SETTLING_FLOOR_SECONDS


def test_a_validated_snapshot_is_as_good_as_read_anew() -> None:
    known = snapshot(updated_at=EPOCH)
    entry = invalidated(Entry(token=1, snapshot=known), at=READ_AT + 40.0).entry
    stored = read(entry, Reading(None, '"v2"'), read_at=READ_AT + 40.0).result
    assert stored == replace(
        known,
        etag='"v2"',
        generation=1,
        token=2,
        read_at=READ_AT + 40.0,
        fetched_at=wall(READ_AT + 40.0),
        lifetime_seconds=1.0,
    )
    again = read(entry, Reading(None, None), read_at=READ_AT + 40.0).result
    assert again is not None
    assert again.etag == '"v1"'


def test_an_api_that_validates_what_nobody_has_is_malformed() -> None:
    with pytest.raises(MalformedAnswer, match="304"):
        read(Entry(), Reading(None, '"v1"'))


# -- updated_at ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("had", "said"),
    [(None, None), (None, EPOCH), (EPOCH, None), (EPOCH, EPOCH), (EPOCH, EPOCH + timedelta(microseconds=1))],
)
def test_an_answer_that_is_not_older_replaces_the_snapshot(had: datetime | None, said: datetime | None) -> None:
    entry = Entry(token=1, snapshot=snapshot(enabled=True, updated_at=had))
    stored = read(entry, Reading(Document(enabled=False, updated_at=said)), read_at=READ_AT + 40.0).result
    assert stored is not None
    assert (stored.enabled, stored.updated_at, stored.read_at) == (False, said, READ_AT + 40.0)


OLDER = Reading(Document(enabled=False, updated_at=EPOCH - timedelta(seconds=1)))


def test_a_lagging_answer_does_not_replace_a_newer_one_which_is_read_again_soon() -> None:
    entry = read(invalidated(Entry()).entry, Reading(Document(enabled=True, updated_at=EPOCH), '"v1"')).entry
    known = entry.snapshot
    assert known is not None
    stored = read(entry, OLDER, read_at=READ_AT + 1.0)
    assert stored.result == replace(known, token=2, lifetime_seconds=2.0), "its age goes on"
    assert is_current(stored.entry)


def test_a_lagging_answer_after_an_invalidation_is_a_failure() -> None:
    """The newer value was read before the invalidation: it cannot be called fresh on the word of an older one."""
    entry = invalidated(Entry(token=1, snapshot=snapshot(updated_at=EPOCH)), at=READ_AT + 5.0).entry
    with pytest.raises(LaggingAnswer, match="updated_at"):
        read(entry, OLDER, read_at=READ_AT + 5.0)


def test_answers_that_lag_for_a_whole_lifetime_are_a_failure() -> None:
    with pytest.raises(LaggingAnswer):
        read(Entry(token=1, snapshot=snapshot(updated_at=EPOCH)), OLDER, read_at=READ_AT + 30.0)


@pytest.mark.parametrize("age", [HARD_LIMIT, HARD_LIMIT + 1.0])
def test_a_value_that_is_too_old_to_serve_is_replaced_even_by_a_lagging_answer(age: float) -> None:
    """The origin was restored from a backup: nothing newer will ever come."""
    entry = Entry(token=1, snapshot=snapshot(updated_at=EPOCH))
    stored = read(entry, OLDER, read_at=READ_AT + age).result
    assert stored is not None
    assert stored.enabled is False


def test_an_updated_at_far_in_the_future_is_ignored_and_blocks_nothing() -> None:
    absurd = Reading(Document(enabled=True, updated_at=datetime(2999, 1, 1, tzinfo=UTC)))
    entry = read(Entry(), absurd).entry
    assert entry.snapshot is not None
    assert entry.snapshot.updated_at is None
    honest = Reading(Document(enabled=False, updated_at=EPOCH))
    stored = read(entry, honest, read_at=READ_AT + 30.0).result
    assert stored is not None
    assert (stored.enabled, stored.updated_at) == (False, EPOCH)


@pytest.mark.parametrize(("ahead", "kept"), [(299.0, True), (300.0, True), (301.0, False)])
def test_an_updated_at_may_be_five_minutes_ahead_of_our_clock(ahead: float, kept: bool) -> None:
    said = EPOCH + timedelta(seconds=ahead)
    stored = read(Entry(), Reading(Document(enabled=True, updated_at=said))).result
    assert stored is not None
    assert stored.updated_at == (said if kept else None)


def test_a_lagging_answer_just_before_the_end_of_a_lifetime_does_not_cause_read_upon_read() -> None:
    """The background reads a little before the end: what is kept must leave room until the next read."""
    entry = Entry(token=1, snapshot=snapshot(updated_at=EPOCH))
    read_at = refresh_at(entry, now=READ_AT, random=0.0)
    with pytest.raises(LaggingAnswer):  # a failure, and so a wait
        read(entry, OLDER, read_at=read_at)


@given(
    generation=st.integers(0, 3),
    older=st.integers(0, 3),
    fraction=st.floats(0.001, 1.0),
    seconds=st.integers(-5, 5),
    later=st.floats(0.0, 100.0),
    ttl_seconds=st.floats(0.001, 1e6),
)
def test_an_older_updated_at_never_replaces_a_newer_one(
    generation: int, older: int, fraction: float, seconds: int, later: float, ttl_seconds: float
) -> None:
    known = snapshot(
        updated_at=EPOCH, generation=min(older, generation), lifetime_seconds=max(1e-6, ttl_seconds * fraction)
    )
    stale = known.generation < generation
    entry = Entry(generation, READ_AT if generation else None, READ_AT if stale else None, 1, snapshot=known)
    said = EPOCH + timedelta(seconds=seconds)
    reading = Reading(Document(not known.enabled, said))
    try:
        change = read(entry, reading, read_at=READ_AT + later, ttl_seconds=ttl_seconds, hard_limit_seconds=1e9)
    except LaggingAnswer:
        assert said < EPOCH
        return
    made = change.result
    assert made is not None
    assert made.updated_at is not None
    assert made.updated_at >= EPOCH
    assert made.enabled is (known.enabled if said < EPOCH else not known.enabled)
    assert made.lifetime_seconds <= ttl_seconds
    assert made.token == 2
    if said < EPOCH:
        assert made.read_at == known.read_at, "its age goes on"
        assert made.generation == known.generation == generation


# -- history -------------------------------------------------------------------------------------------------------


def test_reads_leave_a_row_for_a_first_value_a_change_a_beginning_and_an_end_of_trouble() -> None:
    entry, now = Entry(), READ_AT
    rows: list[Event] = []
    story: list[Reading | None] = [ON, ON, OFF, None, None, OFF, None, ON]
    for reading in story:
        now += 100.0
        outcome = granted(entry, now=now, forced=True)
        change: Change[Any] = (
            failed(outcome.entry, outcome.lease, now=now)
            if reading is None
            else committed(outcome.entry, outcome.lease, reading, read_at=now, now=now + 0.5)
        )
        entry = change.entry
        rows += change.events
    assert [(row.cause, row.enabled, row.detail) for row in rows] == [
        (Cause.CHANGED, True, "first value"),
        (Cause.CHANGED, False, "the value changed"),
        (Cause.FAILED, None, "no answer"),
        (Cause.RECOVERED, False, "after 2 failed reads"),
        (Cause.FAILED, None, "no answer"),
        (Cause.RECOVERED, True, "after 1 failed read"),
        (Cause.CHANGED, True, "the value changed"),
    ]
    assert all(row.latency_seconds == 0.5 and row.tenant == TENANT for row in rows)
    assert rows[0].at == wall(READ_AT + 100.5), "when the read ended"


# -- failures ------------------------------------------------------------------------------------------------------


def test_a_first_failure_begins_a_row_and_the_next_goes_on_with_it() -> None:
    outcome = granted(Entry(generation=2, token=6))
    first = failed(outcome.entry, outcome.lease)
    assert first.result == Failure("unavailable", "no answer", 503, 1, 2, 7, READ_AT, EPOCH, READ_AT + 2.0, None)
    assert first.entry.lease is None
    again = granted(first.entry, now=READ_AT + 60.0)
    second = failed(again.entry, again.lease, now=READ_AT + 60.0)
    assert second.result is not None
    assert (second.result.count, second.result.since) == (2, EPOCH)
    assert second.events == (), "one row for the beginning"


def test_a_failure_keeps_the_value_and_a_value_ends_the_failures() -> None:
    entry = Entry(token=1, snapshot=snapshot())
    outcome = granted(entry, now=READ_AT + 30.0)
    broken = failed(outcome.entry, outcome.lease, now=READ_AT + 30.0).entry
    assert broken.snapshot == entry.snapshot
    assert read(broken, ON, read_at=READ_AT + 40.0).entry.failure is None


def test_the_wait_of_the_api_and_our_own_back_off_are_two_instants() -> None:
    outcome = granted(Entry())
    made = failed(outcome.entry, outcome.lease, server_wait_seconds=1.0).result
    assert made is not None
    assert (made.retry_at, made.server_retry_at) == (READ_AT + 2.0, READ_AT + 1.0)


@pytest.mark.parametrize(
    ("failed_generation", "generation", "server_retry_at", "until"),
    [
        (None, 0, None, NEVER),
        (0, 0, None, READ_AT + 35.0),
        (0, 0, READ_AT + 60.0, READ_AT + 60.0),
        (0, 0, READ_AT + 1.0, READ_AT + 35.0),
        (0, 1, None, NEVER),
        (0, 1, READ_AT + 60.0, READ_AT + 60.0),
        (0, 1, READ_AT + 1.0, READ_AT + 1.0),  # `Retry-After: 1` binds for a second, and our 35 are ended
    ],
)
def test_an_invalidation_ends_our_own_back_off_and_not_a_wait_that_the_api_asked_for(
    failed_generation: int | None, generation: int, server_retry_at: float | None, until: float
) -> None:
    known = None if failed_generation is None else failure(generation=0, server_retry_at=server_retry_at)
    assert retry_at(Entry(generation=generation, failure=known)) == until


# -- whether a read is needless or forbidden -----------------------------------------------------------------------

NOW = READ_AT + 5.0
FUTURE, PAST = NOW + 1.0, NOW - 1.0


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    ("known", "generation", "newer_than", "needless"),
    [
        (None, 0, 0, False),
        (snapshot(token=3), 0, 2, True),
        (snapshot(token=3), 0, 3, False),  # the caller knows it already
        (snapshot(token=3), 1, 2, False),  # read before the invalidation
        (snapshot(token=3, generation=1), 1, 2, True),
        (snapshot(token=3, lifetime_seconds=5.0), 0, 2, False),  # no longer fresh
    ],
)
def test_a_newer_fresh_snapshot_of_this_generation_makes_a_read_needless(
    known: Snapshot | None, generation: int, newer_than: int, needless: bool, forced: bool
) -> None:
    stale_since = None if known is None or known.generation == generation else READ_AT
    entry = Entry(generation, READ_AT if generation else None, stale_since, 9, snapshot=known)
    change = begin(entry, now=NOW, newer_than=newer_than, forced=forced)
    if forced:  # any later result will do, whatever has happened since
        needless = known is not None and known.token > newer_than
    assert isinstance(change.result, Satisfied if needless else Granted)
    assert (change.entry is entry) is needless


@pytest.mark.parametrize(
    ("failed_as", "generation", "newer_than", "forced", "kind"),
    [
        # a failure that began after what the caller knows is an answer, forced or not
        (failure(token=3, retry_at=PAST), 0, 2, False, Satisfied),
        (failure(token=3, retry_at=PAST), 0, 2, True, Satisfied),
        (failure(token=3, retry_at=PAST), 0, 3, False, Granted),
        (failure(token=3, retry_at=PAST), 1, 2, False, Granted),
        (failure(token=3, retry_at=PAST), 1, 2, True, Satisfied),
        # our own back-off binds those who force nothing, the API's wait everybody, an invalidation ends only ours
        (failure(token=3, retry_at=FUTURE), 0, 3, False, BackedOff),
        (failure(token=3, retry_at=FUTURE), 0, 3, True, Granted),
        (failure(token=3, retry_at=FUTURE), 1, 3, False, Granted),
        (failure(token=3, retry_at=PAST, server_retry_at=FUTURE), 0, 3, True, BackedOff),
        (failure(token=3, retry_at=PAST, server_retry_at=FUTURE), 1, 3, True, BackedOff),
        (failure(token=3, retry_at=FUTURE, server_retry_at=PAST), 1, 3, False, Granted),
        (failure(token=3, retry_at=PAST, server_retry_at=PAST), 0, 3, True, Granted),
    ],
)
def test_a_failure_answers_or_forbids_a_read(
    failed_as: Failure, generation: int, newer_than: int, forced: bool, kind: type[ReadOutcome]
) -> None:
    entry = Entry(generation, READ_AT if generation else None, token=9, failure=failed_as)
    outcome = begin(entry, now=NOW, newer_than=newer_than, forced=forced).result
    assert type(outcome) is kind
    if isinstance(outcome, Satisfied | BackedOff):
        assert outcome.failure is failed_as


# -- the lease -----------------------------------------------------------------------------------------------------


def test_a_lease_carries_the_generation_under_which_the_read_begins() -> None:
    outcome = granted(Entry(generation=4, token=8))
    assert outcome.lease == Lease(9, "us", 4, READ_AT + LEASE_SECONDS)
    assert outcome.entry.lease == outcome.lease
    assert outcome.entry.token == 9


def test_while_another_holds_the_lease_a_reader_is_told_who_and_how_long() -> None:
    held = granted(Entry(), holder="them").entry
    assert begin(held, now=READ_AT + 2.0).result == Busy(1, "them", LEASE_SECONDS - 2.0)
    assert isinstance(begin(held, now=READ_AT + LEASE_SECONDS).result, Granted), "its holder died"


def test_the_lease_of_a_holder_that_is_known_to_have_ended_is_void() -> None:
    held = granted(Entry(), holder="them").entry
    assert isinstance(begin(held, dead_holder="somebody else").result, Busy)
    assert granted(held, dead_holder="them").lease.token == 2


def test_a_lease_of_its_own_keeps_no_process_from_reading() -> None:
    held = granted(Entry()).entry
    assert granted(held, now=READ_AT + 1.0).lease.token == 2


@pytest.mark.parametrize("expires_in", [LEASE_LIFE_FACTOR * LEASE_SECONDS + 0.1, 1e9, float("inf")])
def test_a_lease_that_lives_absurdly_long_is_damaged_and_has_ended(expires_in: float) -> None:
    damaged = Entry(token=1, lease=Lease(1, "them", 0, READ_AT + expires_in))
    assert isinstance(begin(damaged).result, Granted)


def test_a_token_rises_above_the_floor_of_a_store_that_may_lose_its_data() -> None:
    assert granted(Entry(token=5), floor=1000).lease.token == 1000
    assert granted(Entry(token=5), floor=3).lease.token == 6


@pytest.mark.parametrize(
    ("known", "failed_as", "token"), [(None, None, 0), (3, None, 3), (None, 4, 4), (3, 4, 4), (5, 4, 5)]
)
def test_the_last_token_is_that_of_the_last_read_that_left_something(
    known: int | None, failed_as: int | None, token: int
) -> None:
    entry = Entry(
        token=9,
        snapshot=None if known is None else snapshot(token=known),
        failure=None if failed_as is None else failure(token=failed_as),
    )
    assert last_token(entry) == token


# -- the pace ------------------------------------------------------------------------------------------------------


def storm(entry: Entry, at: float) -> tuple[Entry, float | None]:
    """Invalidate and read; return the entry and the wait where the read is paced."""
    entry = invalidated(entry, at=at).entry
    change = begin(entry, now=at)
    if isinstance(change.result, Paced):
        return entry, change.result.wait_seconds
    assert isinstance(change.result, Granted)
    return committed(change.entry, change.result.lease, ON, read_at=at).entry, None


def test_invalidations_cause_three_reads_at_once_and_then_one_a_second() -> None:
    entry = read(Entry(), ON).entry
    waits = []
    for _ in range(PACE_BURST + 2):
        entry, wait = storm(entry, READ_AT)
        waits.append(wait)
    assert waits == [None] * PACE_BURST + [PACE_SECONDS] * 2
    entry, wait = storm(entry, READ_AT + 0.25)
    assert wait == 0.75
    entry, wait = storm(entry, READ_AT + 1.0)
    assert wait is None
    entry, wait = storm(entry, READ_AT + 1.0)
    assert wait == PACE_SECONDS


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=60))
def test_no_pattern_of_invalidations_causes_more_than_the_burst_and_one_read_a_second(pauses: list[float]) -> None:
    entry, at, reads = read(Entry(), ON).entry, READ_AT, []
    for pause in pauses:
        at += pause
        entry, wait = storm(entry, at)
        if wait is None:
            reads.append(at)
        else:
            assert 0 < wait <= PACE_SECONDS + 1e-6
    for first in range(len(reads)):
        for last in range(first, len(reads)):
            assert last - first + 1 <= PACE_BURST + (reads[last] - reads[first]) / PACE_SECONDS + 1e-6


def test_the_read_that_the_pace_put_off_is_granted_when_its_wait_is_over() -> None:
    entry = read(Entry(), ON).entry
    for _ in range(PACE_BURST):
        entry, _ = storm(entry, READ_AT)
    entry, wait = storm(entry, READ_AT)
    assert wait is not None
    assert isinstance(begin(entry, now=READ_AT + wait).result, Granted)


@pytest.mark.parametrize(
    ("entry", "paced"),
    [
        (Entry(), False),
        (Entry(generation=1), False),  # nobody has read yet: this is a first read
        (Entry(1, token=1, snapshot=snapshot(generation=1), stale_since=READ_AT), False),
        (Entry(1, token=1, snapshot=snapshot(generation=0), stale_since=READ_AT), True),
        (Entry(1, token=2, snapshot=snapshot(), failure=failure(generation=1, retry_at=PAST)), False),
        (Entry(2, token=2, snapshot=snapshot(), failure=failure(generation=1, retry_at=PAST)), True),
    ],
)
def test_only_a_read_that_an_invalidation_causes_is_paced(entry: Entry, paced: bool) -> None:
    entry = replace(entry, paced_until=NOW + 10.0)
    assert isinstance(begin(entry, now=NOW).result, Paced) is paced
    assert isinstance(begin(entry, now=NOW, forced=True).result, Granted), "a forced read is not put off"


@pytest.mark.parametrize("outcome", ["value", "failure"])
def test_a_forced_read_takes_a_result_that_is_newer_than_its_call_though_an_invalidation_followed(outcome: str) -> None:
    entry = Entry(2, token=3, stale_since=READ_AT, snapshot=snapshot(token=3, generation=1))
    if outcome == "failure":
        entry = Entry(2, token=3, failure=failure(token=3, generation=1, retry_at=PAST))
    assert isinstance(begin(entry, now=NOW, newer_than=2, forced=True).result, Satisfied)
    assert isinstance(begin(entry, now=NOW, newer_than=3, forced=True).result, Granted)
    assert isinstance(begin(entry, now=NOW, newer_than=2).result, Granted), "others want a value of the last generation"


def test_a_damaged_pace_holds_nobody_for_long() -> None:
    entry = Entry(1, token=1, snapshot=snapshot(), paced_until=1e11)
    outcome = begin(entry, now=NOW).result
    assert isinstance(outcome, Paced)
    assert outcome.wait_seconds <= PACE_SECONDS
    assert isinstance(begin(replace(entry, paced_until=-1e11), now=NOW).result, Granted)


# -- clocks --------------------------------------------------------------------------------------------------------

FULL = Entry(
    4,
    READ_AT - 1.0,
    READ_AT - 2.0,
    9,
    READ_AT + 3.0,
    snapshot(generation=3, token=7, updated_at=EPOCH),
    failure(token=8, server_retry_at=READ_AT + 60.0),
    Lease(9, "us", 3, READ_AT + LEASE_SECONDS, READ_AT - 1.0),
)

INSTANTS = {
    "invalidated_at",
    "stale_since",
    "paced_until",
    "read_at",
    "failed_at",
    "retry_at",
    "server_retry_at",
    "expires_at",
    "overtaken_at",
}


def flat(value: Any, place: str = "") -> dict[str, Any]:  # noqa: ANN401 - a dataclass or a field of one
    if not is_dataclass(value):
        return {place: value}
    found: dict[str, Any] = {}
    for field in fields(value):
        found |= flat(getattr(value, field.name), f"{place}.{field.name}")
    return found


def test_a_shift_moves_every_instant_and_nothing_else() -> None:
    before, after = flat(FULL), flat(shift(FULL, 100.0))
    moved = {place.rpartition(".")[2] for place in before if after[place] != before[place]}
    assert moved == INSTANTS
    assert all(after[place] == before[place] + 100.0 for place in before if place.rpartition(".")[2] in INSTANTS)


@pytest.mark.parametrize("entry", [Entry(), FULL, replace(FULL, lease=None), replace(FULL, failure=failure())])
def test_a_shift_and_back_is_nothing(entry: Entry) -> None:
    assert shift(shift(entry, 1024.0), -1024.0) == entry


# -- every order of steps ------------------------------------------------------------------------------------------


class OneEntry(RuleBasedStateMachine):
    """Three readers over one entry: leases, results, failures, deaths and invalidations in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = Entry()
        self.now = READ_AT
        self.open: list[tuple[Lease, float, int]] = []
        self.step = 0
        self.invalidated_step = 0
        self.first_unanswered: float | None = None
        self.read_steps: dict[int, int] = {}

    def next_step(self) -> int:
        self.step += 1
        return self.step

    @rule(seconds=st.sampled_from([0.001, 0.5, 1.0, 3.0, 8.0, 29.0, 31.0, 700.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(delivery_id=st.sampled_from([None, "a", "b"]))
    def somebody_invalidates(self, delivery_id: str | None) -> None:
        before = self.entry.generation
        seen = frozenset({"a"}) if before else frozenset[str]()
        change = invalidate(self.entry, Moment(self.now, seen=seen), [Invalidation(delivery_id=delivery_id)])
        self.entry = change.entry
        if not change.result[0].duplicate:
            assert self.entry.generation > before
            self.invalidated_step = self.next_step()

    @rule(holder=st.sampled_from(["a", "b", "c"]), forced=st.booleans())
    def somebody_begins(self, holder: str, forced: bool) -> None:
        change = begin(self.entry, now=self.now, holder=holder, forced=forced)
        self.entry = change.entry
        if isinstance(change.result, Granted):
            step = self.next_step()
            self.read_steps[change.result.lease.token] = step
            self.open.append((change.result.lease, self.now, step))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), reading=st.sampled_from([ON, OFF]))
    def a_read_ends(self, data: st.DataObject, reading: Reading) -> None:
        lease, read_at, _ = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.entry = committed(self.entry, lease, reading, read_at=read_at, now=self.now).entry

    @precondition(lambda self: self.open)
    @rule(data=st.data(), wait=st.sampled_from([None, 2.0]))
    def a_read_fails(self, data: st.DataObject, wait: float | None) -> None:
        lease, _, _ = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.entry = failed(self.entry, lease, now=self.now, server_wait_seconds=wait).entry

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def a_reader_dies(self, data: st.DataObject) -> None:
        self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))

    @invariant()
    def what_is_fresh_was_read_after_the_last_invalidation(self) -> None:
        evaluation = evaluate(TENANT, self.entry, now=self.now, windows=WINDOWS, source=Source.MEMORY)
        if evaluation.freshness is Freshness.FRESH:
            assert self.entry.snapshot is not None
            assert self.read_steps[self.entry.snapshot.token] > self.invalidated_step

    @invariant()
    def one_reader_holds_the_lease(self) -> None:
        holding = [
            lease
            for lease, _, _ in self.open
            if self.entry.lease is not None
            and (lease.token, lease.holder) == (self.entry.lease.token, self.entry.lease.holder)
        ]
        assert len(holding) <= 1

    @invariant()
    def numbers_never_exceed_those_of_the_entry(self) -> None:
        for part in (self.entry.snapshot, self.entry.failure, self.entry.lease):
            if part is not None:
                assert part.generation <= self.entry.generation
                assert part.token <= self.entry.token

    @invariant()
    def staleness_has_an_instant_where_the_value_is_not_current(self) -> None:
        if self.entry.snapshot is not None and not is_current(self.entry):
            assert self.entry.stale_since is not None
            assert self.entry.stale_since <= self.now


def test_in_every_order_of_steps_the_fence_holds() -> None:
    run_state_machine_as_test(OneEntry, settings=settings(max_examples=200, stateful_step_count=50))


def test_without_the_fence_the_same_machine_finds_a_resurrected_value(monkeypatch: pytest.MonkeyPatch) -> None:
    fenced = commit

    def unfenced(entry: Entry, moment: Moment, *, lease: Lease, **given: Any) -> Change[Snapshot | None]:  # noqa: ANN401 - as `commit` takes them
        held = None if entry.lease is None else replace(entry.lease, overtaken_at=None)
        unfenced_lease = replace(lease, generation=entry.generation)
        return fenced(replace(entry, lease=held), moment, lease=unfenced_lease, **given)

    monkeypatch.setitem(globals(), "commit", unfenced)
    found_is_enough = settings(
        max_examples=2000,
        stateful_step_count=50,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        print_blob=False,
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(OneEntry, settings=found_is_enough)
