"""A record and a moment in, an answer out: the whole table, and the laws that hold for every record."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from external_oms.config import Document, Failure, Reading, Snapshot
from external_oms.errors import (
    READ_ERRORS,
    LaggingAnswer,
    MalformedAnswer,
    RateLimited,
    ReadError,
    TokenError,
    Unauthorized,
    Unavailable,
)
from external_oms.freshness import Freshness, Windows, early_seconds
from external_oms.judgement import (
    Source,
    blocked_until,
    due_at,
    error_of,
    failure_after,
    is_metered,
    judge,
    last_number,
    parting_seconds,
    snapshot_after,
    stale_at,
    state_of,
    verdict,
)
from external_oms.stores.base import Lease, Record

TENANT = "acme"
READ_AT = 1000.0
WINDOWS = Windows(ttl_seconds=30.0, stale_while_revalidate_seconds=20.0, stale_if_error_seconds=600.0)
EPOCH = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
NEVER = float("-inf")


def snapshot(
    *,
    enabled: bool = True,
    generation: int = 0,
    read_number: int = 1,
    read_at: float = READ_AT,
    lifetime_seconds: float = 30.0,
    updated_at: datetime | None = None,
) -> Snapshot:
    return Snapshot(enabled, updated_at, '"v1"', generation, read_number, read_at, EPOCH, lifetime_seconds)


def failure(
    *,
    kind: str = "unavailable",
    count: int = 1,
    read_number: int = 2,
    generation: int = 0,
    not_before: float = READ_AT + 35.0,
    obliged: bool = False,
) -> Failure:
    return Failure(
        kind=kind,
        message="no answer",
        status=503,
        count=count,
        read_number=read_number,
        generation=generation,
        failed_at=READ_AT + 31.0,
        since=EPOCH,
        not_before=not_before,
        obliged=obliged,
    )


def lease(record: Record | None = None, number: int = 7) -> Lease:
    return Lease(TENANT, number, record if record is not None else Record(reads=number))


# -- what may be served: every age, with and without a failure, fresh or invalidated ------------------------------


@pytest.mark.parametrize(
    ("age", "failing", "freshness"),
    [
        (0.0, False, Freshness.FRESH),
        (29.999, False, Freshness.FRESH),
        (29.999, True, Freshness.FRESH),
        (30.0, False, Freshness.STALE),
        (49.999, False, Freshness.STALE),
        (50.0, False, Freshness.EXPIRED),
        (50.0, True, Freshness.STALE),
        (629.999, True, Freshness.STALE),
        (630.0, True, Freshness.EXPIRED),
        (629.999, False, Freshness.EXPIRED),
    ],
)
@pytest.mark.parametrize("known_by", ["record", "caller"])
def test_the_table_of_ages_and_errors(age: float, failing: bool, freshness: Freshness, known_by: str) -> None:
    record = Record(reads=2, snapshot=snapshot(), failure=failure() if failing and known_by == "record" else None)
    answer = judge(TENANT, record, now=READ_AT + age, windows=WINDOWS, failing=failing and known_by == "caller")
    assert answer.freshness is freshness
    assert answer.fresh_until == READ_AT + 30.0
    assert answer.servable is (None if freshness is Freshness.EXPIRED else record.snapshot)


@pytest.mark.parametrize(
    ("since_invalidation", "failing", "freshness"),
    [
        (0.0, False, Freshness.STALE),
        (19.999, False, Freshness.STALE),
        (20.0, False, Freshness.EXPIRED),
        (20.0, True, Freshness.STALE),
        (599.999, True, Freshness.STALE),
        (600.0, True, Freshness.EXPIRED),
    ],
)
def test_after_an_invalidation_the_stale_windows_are_counted_from_it(
    since_invalidation: float, failing: bool, freshness: Freshness
) -> None:
    invalidated_at = READ_AT + 10.0
    record = Record(1, invalidated_at, 2, snapshot(), failure(generation=1) if failing else None)
    assert judge(TENANT, record, now=invalidated_at + since_invalidation, windows=WINDOWS).freshness is freshness


def test_an_invalidation_without_an_instant_counts_from_the_start_of_the_read() -> None:
    record = Record(generation=1, invalidated_at=None, reads=1, snapshot=snapshot())
    assert stale_at(record) == READ_AT
    assert judge(TENANT, record, now=READ_AT + 19.0, windows=WINDOWS).freshness is Freshness.STALE
    assert judge(TENANT, record, now=READ_AT + 20.0, windows=WINDOWS).freshness is Freshness.EXPIRED


def test_of_two_invalidations_the_first_counts_and_since_its_instant_is_unknown_the_start_of_the_read() -> None:
    first = Record(generation=1, invalidated_at=READ_AT + 5.0, reads=1, snapshot=snapshot())
    second = replace(first, generation=2, invalidated_at=READ_AT + 24.0)
    assert judge(TENANT, first, now=READ_AT + 25.0, windows=WINDOWS).freshness is Freshness.EXPIRED
    assert judge(TENANT, second, now=READ_AT + 25.0, windows=WINDOWS).freshness is Freshness.EXPIRED


def test_without_a_snapshot_nothing_is_servable_and_nothing_is_ever_fresh() -> None:
    answer = judge(TENANT, Record(), now=READ_AT, windows=WINDOWS, failing=True)
    assert (answer.freshness, answer.servable, answer.fresh_until) == (Freshness.EXPIRED, None, READ_AT)
    assert stale_at(Record()) is None


@pytest.mark.parametrize(("foreign", "source"), [(False, Source.MEMORY), (True, Source.STORE)])
def test_the_source_says_whether_another_process_read_it(foreign: bool, source: Source) -> None:
    for known in (None, snapshot()):
        record = Record(reads=1, snapshot=known, foreign=foreign)
        assert judge(TENANT, record, now=READ_AT, windows=WINDOWS).source is source


@pytest.mark.parametrize("invalidated_at", [READ_AT + 10.3, None])
@pytest.mark.parametrize("age", [-0.2, 0.0, 10.0])
def test_clocks_of_two_hosts_that_differ_never_make_an_invalidated_value_fresh(
    invalidated_at: float | None, age: float
) -> None:
    record = Record(1, invalidated_at, 1, snapshot(), foreign=True)
    answer = judge(TENANT, record, now=READ_AT + age, windows=WINDOWS)
    assert answer.freshness is Freshness.STALE
    assert answer.fresh_until <= READ_AT + age


# -- laws of every record -----------------------------------------------------------------------------------------

durations = st.floats(min_value=0.0, max_value=1e6)
lifetimes = st.floats(min_value=0.001, max_value=1e6)
instants = st.floats(min_value=-1e6, max_value=1e6)
windows_ = st.builds(Windows, lifetimes, durations, durations)


fractions = st.floats(min_value=0.001, max_value=1.0)
snapshots = st.builds(snapshot, enabled=st.booleans(), read_number=st.integers(1, 9), read_at=instants)
failures = st.builds(failure, read_number=st.integers(1, 9), not_before=instants, obliged=st.booleans())


@st.composite
def records(draw: st.DrawFn, ttl_seconds: float = 1e6, *, known: bool = False) -> Record:
    """Any record that a store can hold: a snapshot of this generation or an older one, a failure or none."""
    generation = draw(st.integers(0, 4))
    stored = draw(snapshots if known else st.none() | snapshots)
    failed = draw(st.none() | failures)
    if stored is not None:
        older = draw(st.integers(0, generation))
        stored = replace(stored, generation=older, lifetime_seconds=ttl_seconds * draw(fractions))
    if failed is not None:
        failed = replace(failed, generation=draw(st.integers(0, generation)))
    invalidated_at = draw(st.none() | instants) if generation else None
    return Record(generation, invalidated_at, draw(st.integers(0, 9)), stored, failed, draw(st.booleans()))


ANY_PACE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A property is no benchmark: other tests run beside it."""


@ANY_PACE
@given(st.data(), windows_, instants, st.booleans())
def test_nothing_is_fresh_past_its_lifetime_nor_served_past_every_window(
    data: st.DataObject, windows: Windows, now: float, failing: bool
) -> None:
    record = data.draw(records(windows.ttl_seconds))
    answer = judge(TENANT, record, now=now, windows=windows, failing=failing)
    known = record.snapshot
    if known is None:
        assert answer.servable is None
        return
    ends = known.read_at + known.lifetime_seconds
    if answer.freshness is Freshness.FRESH:
        assert now < ends
        assert known.generation == record.generation
    if answer.servable is not None:
        reads_fail = failing or record.failure is not None
        longest = max(windows.stale_while_revalidate_seconds, windows.stale_if_error_seconds if reads_fail else 0.0)
        assert now < ends or now - ends < longest


@ANY_PACE
@given(st.data(), windows_, instants, instants, st.booleans())
def test_an_invalidation_never_lengthens_any_window(
    data: st.DataObject, windows: Windows, invalidated_at: float, now: float, failing: bool
) -> None:
    """Not the first, nor any after it: whatever may not be served before one may not be served after it."""
    record = data.draw(records(windows.ttl_seconds, known=True))
    assert record.snapshot is not None
    instants_told = [at for at in (record.snapshot.read_at, record.invalidated_at) if at is not None]
    record = replace(record, invalidated_at=max(instants_told) if record.generation else None)
    invalidated_at = max(*instants_told, invalidated_at)
    now = max(now, invalidated_at)
    raised = replace(record, generation=record.generation + 1, invalidated_at=invalidated_at)
    before = judge(TENANT, record, now=now, windows=windows, failing=failing)
    after = judge(TENANT, raised, now=now, windows=windows, failing=failing)
    worth = (Freshness.FRESH, Freshness.STALE, Freshness.EXPIRED)
    assert after.freshness is not Freshness.FRESH
    assert worth.index(after.freshness) >= worth.index(before.freshness)
    assert after.fresh_until <= before.fresh_until


@ANY_PACE
@given(st.data(), windows_, instants, durations, st.booleans())
def test_by_age_alone_worth_only_falls(
    data: st.DataObject, windows: Windows, now: float, later: float, failing: bool
) -> None:
    record = data.draw(records(windows.ttl_seconds))
    worth = (Freshness.FRESH, Freshness.STALE, Freshness.EXPIRED)
    first = judge(TENANT, record, now=now, windows=windows, failing=failing)
    second = judge(TENANT, record, now=now + later, windows=windows, failing=failing)
    assert worth.index(second.freshness) >= worth.index(first.freshness)


@ANY_PACE
@given(records(), instants, st.floats(0.0, 1.0, exclude_max=True))
def test_what_is_due_is_never_due_in_the_past_nor_before_a_wait_has_ended(
    record: Record, now: float, random: float
) -> None:
    when = due_at(record, now=now, random=random)
    assert when >= now
    if record.failure is not None:
        assert when >= blocked_until(record)
    ends = stale_at(record)
    if record.snapshot is not None and record.failure is None and ends is not None:
        assert when <= max(now, ends), "a steady service never serves a stale value"


# -- what a read makes of a record --------------------------------------------------------------------------------


def after(
    record: Record, reading: Reading, *, read_at: float = READ_AT, ttl_seconds: float = 30.0, number: int = 7
) -> Snapshot:
    return snapshot_after(
        lease(record, number), reading, read_at=read_at, fetched_at_wall=EPOCH.timestamp(), ttl_seconds=ttl_seconds
    )


def test_a_read_makes_a_snapshot_of_the_lease_and_of_the_start_of_the_read() -> None:
    made = after(Record(generation=3, reads=7), Reading(Document(enabled=True, updated_at=EPOCH), '"v2"'))
    assert made == Snapshot(True, EPOCH, '"v2"', 3, 7, READ_AT, EPOCH, 30.0)
    assert made.fetched_at.tzinfo is UTC


def test_settling_looks_are_short_and_grow() -> None:
    """1, 1, 2, 4, … seconds after an invalidation, each look at the end of the last, up to the whole lifetime."""
    record = Record(generation=1, invalidated_at=READ_AT, reads=7)
    read_at, lifetimes_seen = READ_AT, []
    for _ in range(8):
        made = after(record, Reading(Document(enabled=True)), read_at=read_at)
        lifetimes_seen.append(made.lifetime_seconds)
        record, read_at = replace(record, snapshot=made), read_at + made.lifetime_seconds
    assert lifetimes_seen == [1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_read_that_began_before_the_invalidation_it_belongs_to_settles_too() -> None:
    """Between two hosts the instants may cross by the error of their clocks."""
    record = Record(generation=1, invalidated_at=READ_AT + 3.0, reads=7)
    assert after(record, Reading(Document(enabled=True))).lifetime_seconds == 1.0


def test_a_validated_snapshot_is_as_good_as_read_anew() -> None:
    known = snapshot(updated_at=EPOCH, read_number=3)
    record = Record(generation=2, invalidated_at=READ_AT + 40.0, reads=7, snapshot=known)
    made = after(record, Reading(None, '"v2"'), read_at=READ_AT + 40.0)
    assert made == replace(
        known, etag='"v2"', generation=2, read_number=7, read_at=READ_AT + 40.0, lifetime_seconds=1.0
    )
    assert after(record, Reading(None, None), read_at=READ_AT + 40.0).etag == '"v1"'


def test_an_api_that_validates_what_nobody_has_is_malformed() -> None:
    with pytest.raises(MalformedAnswer, match="304"):
        after(Record(reads=7), Reading(None, '"v1"'))


@pytest.mark.parametrize(
    ("had", "said"),
    [(None, None), (None, EPOCH), (EPOCH, None), (EPOCH, EPOCH), (EPOCH, EPOCH + timedelta(microseconds=1))],
)
def test_an_answer_that_is_not_older_replaces_the_snapshot(had: datetime | None, said: datetime | None) -> None:
    record = Record(reads=7, snapshot=snapshot(enabled=True, updated_at=had))
    made = after(record, Reading(Document(enabled=False, updated_at=said)), read_at=READ_AT + 40.0)
    assert (made.enabled, made.updated_at, made.read_at) == (False, said, READ_AT + 40.0)


def test_a_lagging_answer_does_not_replace_a_newer_one_which_is_looked_at_again_soon() -> None:
    known = snapshot(enabled=True, updated_at=EPOCH, lifetime_seconds=1.0, generation=1, read_number=6)
    record = Record(generation=1, invalidated_at=READ_AT, reads=7, snapshot=known)
    older = Reading(Document(enabled=False, updated_at=EPOCH - timedelta(seconds=1)))
    made = after(record, older, read_at=READ_AT + 1.0)
    assert made == replace(known, read_number=7, lifetime_seconds=2.0)


def test_a_lagging_answer_after_an_invalidation_is_a_failure() -> None:
    """The newer snapshot was read before the invalidation: it cannot be called fresh on the word of an older one."""
    record = Record(1, READ_AT + 5.0, 7, snapshot(updated_at=EPOCH))
    with pytest.raises(LaggingAnswer, match="updated_at"):
        after(record, Reading(Document(enabled=False, updated_at=EPOCH - timedelta(seconds=1))), read_at=READ_AT + 5.0)


def test_answers_that_lag_for_a_whole_lifetime_are_a_failure() -> None:
    record = Record(reads=7, snapshot=snapshot(updated_at=EPOCH))
    with pytest.raises(LaggingAnswer):
        after(record, Reading(Document(enabled=False, updated_at=EPOCH - timedelta(seconds=1))), read_at=READ_AT + 30.0)


def test_a_lagging_answer_just_before_the_end_of_a_lifetime_does_not_cause_read_upon_read() -> None:
    """The background looks a little before the end: what would be kept must leave room until the next look."""
    record = Record(reads=7, snapshot=snapshot(updated_at=EPOCH))
    older = Reading(Document(enabled=False, updated_at=EPOCH - timedelta(seconds=1)))
    read_at = due_at(record, now=READ_AT, random=0.0)
    try:
        kept = after(record, older, read_at=read_at)
    except LaggingAnswer:
        return  # a failure, and so a wait
    again = due_at(replace(record, snapshot=kept), now=read_at, random=0.0)
    assert again - read_at >= early_seconds(30.0, 0.0)


@ANY_PACE
@given(st.data(), st.integers(-5, 5), st.floats(0.0, 100.0), lifetimes)
def test_an_older_updated_at_never_replaces_a_newer_one(
    data: st.DataObject, seconds: int, later: float, ttl_seconds: float
) -> None:
    record = data.draw(records(ttl_seconds, known=True))
    known = record.snapshot
    assert known is not None
    known = replace(known, updated_at=EPOCH)
    record = replace(record, snapshot=known)
    said = EPOCH + timedelta(seconds=seconds)
    read_at = known.read_at + later
    try:
        made = after(record, Reading(Document(not known.enabled, said)), read_at=read_at, ttl_seconds=ttl_seconds)
    except LaggingAnswer:
        assert said < EPOCH
        return
    assert made.updated_at is not None
    assert made.updated_at >= EPOCH
    assert made.enabled is (known.enabled if said < EPOCH else not known.enabled)
    assert made.lifetime_seconds <= ttl_seconds
    assert made.read_number == 7
    if said < EPOCH:
        assert made.read_at == known.read_at, "its age goes on"
        assert made.generation == known.generation == record.generation


# -- failures -----------------------------------------------------------------------------------------------------


def failed(record: Record, error: ReadError, *, random: float = 0.0, now: float = READ_AT) -> Failure:
    wall = EPOCH.timestamp()
    return failure_after(lease(record), error, now=now, now_wall=wall, cap_seconds=30.0, random=random)


def test_a_first_failure_begins_a_row_and_the_next_goes_on_with_it() -> None:
    first = failed(Record(generation=2, reads=7), Unavailable("503", status=503))
    assert first == Failure("unavailable", "503", 503, 1, 7, 2, READ_AT, EPOCH, READ_AT + 1.0, obliged=False)
    earlier = replace(first, since=EPOCH - timedelta(hours=1), count=4)
    second = failed(Record(generation=2, reads=7, failure=earlier), Unavailable("500", status=500))
    assert (second.count, second.since, second.status) == (5, EPOCH - timedelta(hours=1), 500)


@pytest.mark.parametrize(
    ("count_before", "random", "wait"),
    [(0, 0.0, 1.0), (0, 0.5, 1.5), (3, 0.5, 5.0), (9, 0.5, 16.0), (10_000, 0.5, 16.0)],
)
def test_failures_back_off_with_jitter_up_to_the_cap(count_before: int, random: float, wait: float) -> None:
    record = Record(reads=7, failure=failure(count=count_before) if count_before else None)
    assert failed(record, Unavailable("down"), random=random).not_before == READ_AT + wait


@pytest.mark.parametrize(
    ("asked", "wait", "obliged"), [(None, 1.0, False), (0.0, 1.0, True), (0.5, 1.0, True), (120.0, 120.0, True)]
)
def test_what_the_api_asks_for_is_obeyed_where_it_is_longer_than_our_own_patience(
    asked: float | None, wait: float, obliged: bool
) -> None:
    made = failed(Record(reads=7), RateLimited("429", status=429, retry_after_seconds=asked))
    assert (made.not_before, made.obliged) == (READ_AT + wait, obliged)


@pytest.mark.parametrize(
    ("failed_generation", "generation", "obliged", "until"),
    [
        (None, 0, False, NEVER),
        (0, 0, False, READ_AT + 35.0),
        (0, 0, True, READ_AT + 35.0),
        (0, 1, False, NEVER),
        (0, 1, True, READ_AT + 35.0),
    ],
)
def test_an_invalidation_ends_our_own_patience_and_not_a_wait_that_the_api_asked_for(
    failed_generation: int | None, generation: int, obliged: bool, until: float
) -> None:
    known = None if failed_generation is None else failure(generation=failed_generation, obliged=obliged)
    assert blocked_until(Record(generation=generation, failure=known)) == until


@pytest.mark.parametrize("kind", READ_ERRORS)
def test_a_failure_becomes_the_same_error_again_in_another_process(kind: str) -> None:
    error = error_of(failure(kind=kind, not_before=READ_AT + 9.0, obliged=True), now=READ_AT)
    assert type(error) is READ_ERRORS[kind]
    assert (str(error), error.status, error.retry_after_seconds) == ("no answer", 503, 9.0)


@pytest.mark.parametrize(("obliged", "now"), [(False, READ_AT), (True, READ_AT + 9.0), (True, READ_AT + 10.0)])
def test_a_wait_that_is_over_or_was_never_asked_for_is_not_told(obliged: bool, now: float) -> None:
    assert error_of(failure(not_before=READ_AT + 9.0, obliged=obliged), now=now).retry_after_seconds is None


def test_a_kind_from_a_later_version_is_a_read_error_all_the_same() -> None:
    assert type(error_of(failure(kind="from the future"), now=READ_AT)) is ReadError


@pytest.mark.parametrize("error", [TokenError, Unauthorized, RateLimited, Unavailable, MalformedAnswer, LaggingAnswer])
def test_every_error_survives_the_store(error: type[ReadError]) -> None:
    kept = failed(Record(reads=7), error("why", status=418, retry_after_seconds=2.0))
    again = error_of(kept, now=READ_AT)
    assert (type(again), str(again), again.status, again.retry_after_seconds) == (error, "why", 418, 2.0)


# -- whether a read is needless or forbidden -----------------------------------------------------------------------

NOW = READ_AT + 5.0
FUTURE, PAST = NOW + 1.0, NOW - 1.0


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(
    ("known", "generation", "newer_than", "needless"),
    [
        (None, 0, 0, False),
        (snapshot(read_number=3), 0, 2, True),
        (snapshot(read_number=3), 0, 3, False),  # the caller knows it already
        (snapshot(read_number=3), 1, 2, False),  # read before the invalidation
        (snapshot(read_number=3, generation=1), 1, 2, True),
        (snapshot(read_number=3, lifetime_seconds=5.0), 0, 2, False),  # no longer fresh
    ],
)
def test_a_newer_fresh_snapshot_of_this_generation_makes_a_read_needless(
    known: Snapshot | None, generation: int, newer_than: int, needless: bool, forced: bool
) -> None:
    record = Record(generation=generation, invalidated_at=READ_AT, reads=9, snapshot=known)
    assert verdict(record, newer_than=newer_than, forced=forced, now=NOW) == (needless, None)


@pytest.mark.parametrize(
    ("failed_as", "generation", "newer_than", "forced", "ends"),
    [
        # a failure that began after what the caller knows is an answer, forced or not
        (failure(read_number=3, not_before=PAST), 0, 2, False, True),
        (failure(read_number=3, not_before=PAST), 0, 2, True, True),
        (failure(read_number=3, not_before=PAST), 0, 3, False, False),
        (failure(read_number=3, not_before=PAST), 1, 2, True, False),
        # our own patience binds who forces nothing, the API's binds everybody, an invalidation ends only ours
        (failure(read_number=3, not_before=FUTURE), 0, 3, False, True),
        (failure(read_number=3, not_before=FUTURE), 0, 3, True, False),
        (failure(read_number=3, not_before=FUTURE), 1, 3, False, False),
        (failure(read_number=3, not_before=FUTURE, obliged=True), 0, 3, True, True),
        (failure(read_number=3, not_before=FUTURE, obliged=True), 1, 3, True, True),
        (failure(read_number=3, not_before=PAST, obliged=True), 0, 3, True, False),
    ],
)
def test_a_failure_answers_or_forbids_a_read(
    failed_as: Failure, generation: int, newer_than: int, forced: bool, ends: bool
) -> None:
    record = Record(generation=generation, invalidated_at=READ_AT, reads=9, failure=failed_as)
    ended, error = verdict(record, newer_than=newer_than, forced=forced, now=NOW)
    assert ended is ends
    assert (error is not None) is ends
    assert error is None or str(error) == "no answer"


# -- the rest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("known", "failed_as", "number"),
    [(None, None, 0), (3, None, 3), (None, 4, 4), (3, 4, 4), (5, 4, 5)],
)
def test_the_last_number_is_that_of_the_last_read_that_left_something(
    known: int | None, failed_as: int | None, number: int
) -> None:
    record = Record(
        reads=9,
        snapshot=None if known is None else snapshot(read_number=known),
        failure=None if failed_as is None else failure(read_number=failed_as),
    )
    assert last_number(record) == number


@pytest.mark.parametrize(
    ("record", "metered"),
    [
        (Record(), False),
        (Record(generation=1), False),  # nobody has read yet: this is a first read
        (Record(generation=1, reads=1), True),
        (Record(generation=1, reads=1, snapshot=snapshot(generation=1)), False),
        (Record(generation=1, reads=1, snapshot=snapshot(generation=0)), True),
        (Record(generation=1, reads=2, snapshot=snapshot(generation=0), failure=failure(generation=1)), False),
        (Record(generation=2, reads=2, snapshot=snapshot(generation=0), failure=failure(generation=1)), True),
    ],
)
def test_a_read_that_an_invalidation_causes_is_metered(record: Record, metered: bool) -> None:
    assert is_metered(record) is metered


@pytest.mark.parametrize(("random", "when"), [(0.0, 29.5), (0.5, 29.43), (0.99999, 28.35)])
def test_a_value_is_read_again_a_little_before_it_grows_stale(random: float, when: float) -> None:
    record = Record(reads=1, snapshot=snapshot())
    assert due_at(record, now=READ_AT, random=random) == pytest.approx(READ_AT + when, abs=0.01)


@pytest.mark.parametrize(
    ("record", "when"),
    [
        (Record(), 5.0),
        (Record(reads=2, snapshot=snapshot(), failure=failure()), 35.0),
        (Record(reads=2, failure=failure(not_before=READ_AT + 2.0)), 5.0),
        (Record(1, READ_AT + 4.0, 1, snapshot()), 5.0),
    ],
)
def test_what_is_missing_failed_or_invalidated_is_due_as_soon_as_it_may_be(record: Record, when: float) -> None:
    assert due_at(record, now=READ_AT + 5.0, random=0.0) == READ_AT + when


@pytest.mark.parametrize(
    ("foreign", "lifetime_seconds", "spread_seconds", "spreads"),
    [(True, 1.0, 2.0, True), (False, 1.0, 2.0, False), (True, 30.0, 2.0, False), (True, 1.0, 0.0, False)],
)
def test_a_short_lived_value_that_another_process_read_is_read_again_by_few_and_after_its_end(
    foreign: bool, lifetime_seconds: float, spread_seconds: float, spreads: bool
) -> None:
    record = Record(reads=1, snapshot=snapshot(lifetime_seconds=lifetime_seconds), foreign=foreign)
    ends = READ_AT + lifetime_seconds
    for random in (0.0, 0.3, 0.9):
        when = due_at(record, now=READ_AT, random=random, spread_seconds=spread_seconds)
        assert ends <= when <= ends + spread_seconds if spreads else when < ends


@pytest.mark.parametrize(
    ("record", "most"),
    [
        (Record(reads=1, snapshot=snapshot(), foreign=True), 20.0),  # as long as it may be served as stale
        (Record(reads=1, snapshot=snapshot(lifetime_seconds=8.0), foreign=True), 8.0),
        (Record(reads=1, snapshot=snapshot(), foreign=False), 0.0),
        (Record(1, READ_AT, 1, snapshot(), foreign=True), 0.0),
        (Record(foreign=True), 0.0),
    ],
)
def test_who_parts_from_a_store_that_is_away_waits_no_longer_than_the_value_may_be_served(
    record: Record, most: float
) -> None:
    assert parting_seconds(record, random=0.0, windows=WINDOWS) == 0.0
    assert parting_seconds(record, random=0.5, windows=WINDOWS) == most / 2


def test_the_state_of_a_value_says_everything_about_it() -> None:
    record = Record(2, READ_AT, 3, snapshot(generation=2, updated_at=EPOCH), failure(count=3, generation=2))
    now = READ_AT + 32.0
    state = state_of(judge(TENANT, record, now=now, windows=WINDOWS), now=now)
    assert state.tenant == TENANT
    assert (state.enabled, state.freshness, state.source) == (True, Freshness.STALE, Source.MEMORY)
    assert (state.age_seconds, state.fresh_seconds, state.generation) == (32.0, -2.0, 2)
    assert (state.fetched_at, state.updated_at) == (EPOCH, EPOCH)
    assert (state.last_error, state.failing_since, state.failures) == ("no answer", EPOCH, 3)
    assert state.retry_seconds == 3.0


def test_the_state_of_nothing_says_nothing_that_is_not_so() -> None:
    state = state_of(judge(TENANT, Record(), now=READ_AT, windows=WINDOWS), now=READ_AT)
    assert state.freshness is Freshness.EXPIRED
    assert (state.enabled, state.age_seconds, state.fetched_at, state.updated_at) == (None, None, None, None)
    assert (state.last_error, state.fresh_seconds, state.failing_since) == (None, None, None)
    assert (state.failures, state.retry_seconds) == (0, None)


def test_an_age_is_never_negative_though_the_clocks_of_two_hosts_differ() -> None:
    record = Record(reads=1, snapshot=snapshot(read_at=READ_AT + 0.2), foreign=True)
    assert state_of(judge(TENANT, record, now=READ_AT, windows=WINDOWS), now=READ_AT).age_seconds == 0.0
