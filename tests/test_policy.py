"""What an entry means at one moment: the whole table, and the laws that hold for every entry."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_oms.entry import Entry, Failure, Invalidation, Moment, Snapshot, invalidate, retry_at, stale_at
from external_oms.errors import READ_ERRORS, ReadError
from external_oms.policy import (
    BACKOFF_FLOOR_SECONDS,
    Evaluation,
    Freshness,
    Source,
    Windows,
    backoff_seconds,
    degraded_jitter_seconds,
    early_refresh_seconds,
    error_of,
    evaluate,
    freshness_of,
    herd_jitter_seconds,
    lease_poll_seconds,
    refresh_at,
    state_of,
)

TENANT = "acme"
READ_AT = 1000.0
WINDOWS = Windows(ttl_seconds=30.0, stale_while_revalidate_seconds=20.0, stale_if_error_seconds=600.0)
EPOCH = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
ORDER = (Freshness.FRESH, Freshness.STALE, Freshness.EXPIRED)


def snapshot(
    *,
    enabled: bool = True,
    generation: int = 0,
    token: int = 1,
    read_at: float = READ_AT,
    lifetime_seconds: float = 30.0,
    updated_at: datetime | None = None,
) -> Snapshot:
    return Snapshot(enabled, updated_at, '"v1"', generation, token, read_at, EPOCH, lifetime_seconds, "reader")


def failure(
    *,
    kind: str = "unavailable",
    count: int = 1,
    token: int = 2,
    generation: int = 0,
    failed_at: float = READ_AT + 31.0,
    retry_at: float = READ_AT + 35.0,
    server_retry_at: float | None = None,
) -> Failure:
    return Failure(
        kind=kind,
        message="no answer",
        status=503,
        count=count,
        generation=generation,
        token=token,
        failed_at=failed_at,
        since=EPOCH,
        retry_at=retry_at,
        server_retry_at=server_retry_at,
    )


def judge(entry: Entry, now: float, *, windows: Windows = WINDOWS, failing: bool = False) -> Evaluation:
    return evaluate(TENANT, entry, now=now, windows=windows, source=Source.MEMORY, failing=failing)


# -- what may be served: every age, with and without a failure, fresh or invalidated -------------------------------


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
@pytest.mark.parametrize("known_by", ["entry", "caller"])
def test_the_table_of_ages_and_errors(age: float, failing: bool, freshness: Freshness, known_by: str) -> None:
    entry = Entry(token=2, snapshot=snapshot(), failure=failure() if failing and known_by == "entry" else None)
    evaluation = judge(entry, READ_AT + age, failing=failing and known_by == "caller")
    assert evaluation.freshness is freshness
    assert evaluation.fresh_until == READ_AT + 30.0
    assert evaluation.servable is (None if freshness is Freshness.EXPIRED else entry.snapshot)


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
def test_the_stale_windows_count_from_the_first_invalidation_that_no_read_followed(
    since_invalidation: float, failing: bool, freshness: Freshness
) -> None:
    first = READ_AT + 10.0
    failed = failure(generation=2) if failing else None
    entry = Entry(2, first + 5.0, first, 2, snapshot=snapshot(), failure=failed)
    assert judge(entry, first + since_invalidation).freshness is freshness


def test_without_a_snapshot_nothing_is_servable_and_nothing_is_ever_fresh() -> None:
    evaluation = judge(Entry(), READ_AT, failing=True)
    assert (evaluation.freshness, evaluation.servable, evaluation.fresh_until) == (Freshness.EXPIRED, None, READ_AT)
    assert stale_at(Entry()) is None


def test_an_entry_that_could_not_be_verified_is_stale_from_now_on() -> None:
    entry = Entry(token=1, snapshot=snapshot(), verified=False)
    evaluation = judge(entry, READ_AT + 5.0)
    assert (evaluation.freshness, evaluation.fresh_until) == (Freshness.STALE, READ_AT + 5.0)
    assert judge(entry, READ_AT + 50.0).freshness is Freshness.EXPIRED, "its windows count from the end of its lifetime"


def test_a_value_that_the_store_has_lost_is_read_again_at_once() -> None:
    entry = Entry(token=1, snapshot=snapshot(), verified=False)
    assert refresh_at(entry, now=READ_AT + 5.0, random=0.5) == READ_AT + 5.0
    owed = replace(entry, generation=1)  # what is owed is repeated to the store first, and the read follows that
    assert refresh_at(owed, now=READ_AT + 5.0, random=0.5) > READ_AT + 20.0


@pytest.mark.parametrize("age", [-0.2, 0.0, 10.0])
def test_clocks_of_two_hosts_that_differ_never_make_an_invalidated_value_fresh(age: float) -> None:
    entry = Entry(1, READ_AT + 10.3, READ_AT + 10.3, 1, snapshot=snapshot())
    evaluation = judge(entry, READ_AT + age)
    assert evaluation.freshness is Freshness.STALE
    assert evaluation.fresh_until <= READ_AT + age


@pytest.mark.parametrize(
    ("stale_for", "failing", "expected"),
    [
        (-0.001, False, Freshness.FRESH),
        (-0.001, True, Freshness.FRESH),
        (0, False, Freshness.STALE),
        (19.999, False, Freshness.STALE),
        (20, False, Freshness.EXPIRED),
        (20, True, Freshness.STALE),
        (599.999, True, Freshness.STALE),
        (600, True, Freshness.EXPIRED),
    ],
)
def test_each_window_ends_at_its_very_bound(stale_for: float, failing: bool, expected: Freshness) -> None:
    assert freshness_of(stale_for, failing=failing, windows=WINDOWS) is expected


@pytest.mark.parametrize(("revalidate", "error", "limit"), [(20.0, 600.0, 630.0), (700.0, 600.0, 730.0)])
def test_the_hard_limit_is_the_end_of_the_longest_window(revalidate: float, error: float, limit: float) -> None:
    assert Windows(30.0, revalidate, error).hard_limit_seconds == limit


# -- laws of every entry -------------------------------------------------------------------------------------------

durations = st.floats(min_value=0.0, max_value=1e6)
lifetimes = st.floats(min_value=0.001, max_value=1e6)
instants = st.floats(min_value=-1e6, max_value=1e6)
chances = st.floats(0.0, 1.0, exclude_max=True)
windows_ = st.builds(Windows, lifetimes, durations, durations)
snapshots = st.builds(snapshot, enabled=st.booleans(), token=st.integers(1, 9), read_at=instants)
failures = st.builds(
    failure, token=st.integers(1, 9), failed_at=instants, retry_at=instants, server_retry_at=st.none() | instants
)


@st.composite
def entries(draw: st.DrawFn, ttl_seconds: float = 1e6, *, known: bool = False) -> Entry:
    """Any entry that a store can hold: a snapshot of this generation or an older one, a failure or none."""
    generation = draw(st.integers(0, 4))
    stored = draw(snapshots if known else st.none() | snapshots)
    failed = draw(st.none() | failures)
    stale_since = None
    if stored is not None:
        older = draw(st.integers(0, generation))
        fraction = draw(st.floats(min_value=0.001, max_value=1.0))
        stored = replace(stored, generation=older, lifetime_seconds=ttl_seconds * fraction)
        stale_since = None if older == generation else draw(instants)
    if failed is not None:
        failed = replace(failed, generation=draw(st.integers(0, generation)))
    invalidated_at = draw(instants) if generation else None
    verified = draw(st.booleans())
    return Entry(
        generation,
        invalidated_at,
        stale_since,
        draw(st.integers(0, 9)),
        snapshot=stored,
        failure=failed,
        verified=verified,
    )


@given(st.data(), windows_, instants, st.booleans())
def test_nothing_is_fresh_past_its_lifetime_nor_served_past_every_window(
    data: st.DataObject, windows: Windows, now: float, failing: bool
) -> None:
    entry = data.draw(entries(windows.ttl_seconds))
    evaluation = judge(entry, now, windows=windows, failing=failing)
    known = entry.snapshot
    if known is None:
        assert evaluation.servable is None
        return
    ends = known.read_at + known.lifetime_seconds
    if evaluation.freshness is Freshness.FRESH:
        assert now < ends
        assert known.generation == entry.generation
        assert entry.verified
    if evaluation.servable is not None:
        reads_fail = failing or entry.failure is not None
        longest = max(windows.stale_while_revalidate_seconds, windows.stale_if_error_seconds if reads_fail else 0.0)
        assert now < ends or now - ends < longest


@given(st.data(), windows_, instants, durations, st.booleans())
def test_an_invalidation_ends_freshness_and_never_lengthens_any_window(
    data: st.DataObject, windows: Windows, at: float, later: float, failing: bool
) -> None:
    """Not the first, nor any after it: what may not be served before one may not be served after it."""
    entry = data.draw(entries(windows.ttl_seconds, known=True))
    now = at + later
    raised = invalidate(entry, Moment(at), [Invalidation()]).entry
    before = judge(entry, now, windows=windows, failing=failing)
    after = judge(raised, now, windows=windows, failing=failing)
    assert after.freshness is not Freshness.FRESH
    assert ORDER.index(after.freshness) >= ORDER.index(before.freshness)
    assert after.fresh_until <= before.fresh_until


@given(st.data(), windows_, instants, st.lists(durations, min_size=1, max_size=5), durations, st.booleans())
def test_a_further_invalidation_never_makes_a_value_worse(
    data: st.DataObject, windows: Windows, at: float, gaps: list[float], later: float, failing: bool
) -> None:
    entry = data.draw(entries(windows.ttl_seconds, known=True))
    once = many = invalidate(entry, Moment(at), [Invalidation()]).entry
    for gap in gaps:
        at += gap
        many = invalidate(many, Moment(at), [Invalidation()]).entry
    now = at + later
    first, last = (judge(one, now, windows=windows, failing=failing) for one in (once, many))
    assert (first.freshness, first.fresh_until) == (last.freshness, last.fresh_until)


@given(st.data(), windows_, instants, durations, st.booleans())
def test_by_age_alone_freshness_only_falls(
    data: st.DataObject, windows: Windows, now: float, later: float, failing: bool
) -> None:
    entry = data.draw(entries(windows.ttl_seconds))
    if not entry.verified:
        entry = replace(entry, verified=True)  # another look may find what could not be verified
    first, second = (judge(entry, at, windows=windows, failing=failing) for at in (now, now + later))
    assert ORDER.index(second.freshness) >= ORDER.index(first.freshness)


@given(
    swr=st.floats(0, 1e9), sie=st.floats(0, 1e9), stale_for=st.floats(-1e9, 1e9), later=st.floats(0, 1e9), failing=...
)
def test_no_value_grows_fresher_with_time_and_failing_reads_only_lengthen_the_service(
    swr: float, sie: float, stale_for: float, later: float, failing: bool
) -> None:
    windows = Windows(30, swr, sie)
    now = ORDER.index(freshness_of(stale_for, failing=failing, windows=windows))
    assert now <= ORDER.index(freshness_of(stale_for + later, failing=failing, windows=windows))
    failing_now = ORDER.index(freshness_of(stale_for, failing=True, windows=windows))
    assert failing_now <= ORDER.index(freshness_of(stale_for, failing=False, windows=windows))


# -- when to read again --------------------------------------------------------------------------------------------


@given(entries(), instants, chances)
def test_a_refresh_is_never_planned_in_the_past_nor_before_a_wait_has_ended(
    entry: Entry, now: float, random: float
) -> None:
    when = refresh_at(entry, now=now, random=random)
    assert when >= now
    if entry.failure is not None:
        assert when >= retry_at(entry)
    ends = stale_at(entry)
    if entry.snapshot is not None and entry.failure is None and ends is not None:
        assert when <= max(now, ends), "a steady service never serves a stale value"


@pytest.mark.parametrize(("random", "when"), [(0.0, 29.5), (0.5, 29.43), (0.99999, 28.35)])
def test_a_value_is_read_again_a_little_before_it_grows_stale(random: float, when: float) -> None:
    entry = Entry(token=1, snapshot=snapshot())
    assert refresh_at(entry, now=READ_AT, random=random) == pytest.approx(READ_AT + when, abs=0.01)


@pytest.mark.parametrize(
    ("entry", "when"),
    [
        (Entry(), 5.0),
        (Entry(token=2, snapshot=snapshot(), failure=failure()), 35.0),
        (Entry(token=2, failure=failure(retry_at=READ_AT + 2.0)), 5.0),
        (Entry(1, READ_AT + 4.0, READ_AT + 4.0, 1, snapshot=snapshot()), 5.0),
        (Entry(token=2, failure=failure(retry_at=READ_AT + 6.0, server_retry_at=READ_AT + 60.0)), 60.0),
    ],
)
def test_what_is_missing_failed_or_invalidated_is_read_as_soon_as_it_may_be(entry: Entry, when: float) -> None:
    assert refresh_at(entry, now=READ_AT + 5.0, random=0.0) == READ_AT + when


@pytest.mark.parametrize(
    ("foreign", "lifetime_seconds", "spread_seconds", "spreads"),
    [(True, 1.0, 2.0, True), (False, 1.0, 2.0, False), (True, 30.0, 2.0, False), (True, 1.0, 0.0, False)],
)
def test_a_short_lived_value_that_another_process_read_is_read_again_by_few_and_after_its_end(
    foreign: bool, lifetime_seconds: float, spread_seconds: float, spreads: bool
) -> None:
    entry = Entry(token=1, snapshot=snapshot(lifetime_seconds=lifetime_seconds))
    ends = READ_AT + lifetime_seconds
    for random in (0.0, 0.3, 0.9):
        when = refresh_at(entry, now=READ_AT, random=random, spread_seconds=spread_seconds, foreign=foreign)
        assert ends <= when <= ends + spread_seconds if spreads else when < ends


@given(lifetime=st.floats(1e-3, 1e9), random=chances)
def test_the_early_refresh_leaves_a_fortieth_for_the_read_and_never_comes_before_the_value(
    lifetime: float, random: float
) -> None:
    assert min(1, lifetime / 20) / 2 <= early_refresh_seconds(lifetime, random) < lifetime / 4


@given(spread=st.floats(0.0, 10.0), random=chances)
def test_the_jitter_of_a_herd_stays_within_the_spread(spread: float, random: float) -> None:
    assert 0.0 <= herd_jitter_seconds(spread, random) <= spread


def test_of_a_hundred_thousand_members_a_few_act_first() -> None:
    dice = Random(1)
    delays = sorted(herd_jitter_seconds(1.0, dice.random()) for _ in range(100_000))
    assert delays[0] < 0.1
    assert sum(delay < delays[0] + 0.2 for delay in delays) < 100
    assert delays[50_000] > 0.9


@pytest.mark.parametrize(
    ("entry", "foreign", "most"),
    [
        (Entry(token=1, snapshot=snapshot()), True, 20.0),  # as long as it may be served as stale
        (Entry(token=1, snapshot=snapshot(lifetime_seconds=8.0)), True, 8.0),
        (Entry(token=1, snapshot=snapshot()), False, 0.0),
        (Entry(1, READ_AT, READ_AT, 1, snapshot=snapshot()), True, 0.0),
        (Entry(), True, 0.0),
    ],
)
def test_while_the_store_is_away_a_member_waits_no_longer_than_the_value_may_be_served(
    entry: Entry, foreign: bool, most: float
) -> None:
    assert degraded_jitter_seconds(entry, random=0.0, windows=WINDOWS, foreign=foreign) == 0.0
    assert degraded_jitter_seconds(entry, random=0.5, windows=WINDOWS, foreign=foreign) == most / 2


@given(failures=st.integers(1, 10_000), cap=st.floats(1e-3, 1e9), random=chances)
def test_a_backoff_lies_between_its_floor_and_floor_plus_cap(failures: int, cap: float, random: float) -> None:
    assert BACKOFF_FLOOR_SECONDS <= backoff_seconds(failures, cap, random) <= BACKOFF_FLOOR_SECONDS + cap


@given(failures=st.integers(1, 100), cap=st.floats(1e-3, 1e9), random=chances)
def test_a_backoff_never_shrinks_with_another_failure(failures: int, cap: float, random: float) -> None:
    assert backoff_seconds(failures, cap, random) <= backoff_seconds(failures + 1, cap, random)


@pytest.mark.parametrize(
    ("failures", "random", "wait"),
    [(1, 0.0, 1.0), (1, 0.5, 1.5), (4, 0.5, 5.0), (10, 0.5, 16.0), (10_000, 0.5, 16.0)],
)
def test_failures_back_off_with_jitter_up_to_the_cap(failures: int, random: float, wait: float) -> None:
    assert backoff_seconds(failures, 30.0, random) == wait


@pytest.mark.parametrize(
    ("waited", "remaining", "wait"), [(0.0, 7.0, 0.05), (0.05, 6.95, 0.05), (0.4, 6.6, 0.4), (3.2, 3.8, 3.2)]
)
def test_a_process_that_waits_for_a_lease_asks_again_after_as_long_as_it_has_waited(
    waited: float, remaining: float, wait: float
) -> None:
    assert lease_poll_seconds(waited, remaining, 0.0, 0.5) == wait


def test_a_lease_that_ends_sooner_is_asked_for_then_and_by_a_fleet_one_after_the_other() -> None:
    assert lease_poll_seconds(6.4, 0.6, 0.0, 0.5) == 0.6
    waits = [lease_poll_seconds(6.4, 0.6, 1.0, Random(seed).random()) for seed in range(1000)]
    assert min(waits) >= 0.6
    assert max(waits) <= 1.6
    assert sum(wait < 1.0 for wait in waits) <= 20, "hardly anybody is first"


# -- errors and states ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", READ_ERRORS)
def test_a_failure_becomes_the_same_error_again_in_another_process(kind: str) -> None:
    error = error_of(failure(kind=kind, server_retry_at=READ_AT + 9.0), now=READ_AT)
    assert type(error) is READ_ERRORS[kind]
    assert (str(error), error.status, error.retry_after_seconds) == ("no answer", 503, 9.0)


@pytest.mark.parametrize("now", [READ_AT + 9.0, READ_AT + 10.0])
def test_a_wait_that_is_over_is_not_told(now: float) -> None:
    assert error_of(failure(server_retry_at=READ_AT + 9.0), now=now).retry_after_seconds is None


def test_our_own_back_off_is_not_told_as_a_wait_of_the_api() -> None:
    assert error_of(failure(retry_at=READ_AT + 9.0), now=READ_AT).retry_after_seconds is None


def test_a_kind_from_a_later_version_is_a_read_error_all_the_same() -> None:
    assert type(error_of(failure(kind="from the future"), now=READ_AT)) is ReadError


def test_the_state_of_a_value_says_everything_about_it() -> None:
    entry = Entry(
        2, READ_AT, None, 3, snapshot=snapshot(generation=2, updated_at=EPOCH), failure=failure(count=3, generation=2)
    )
    now = READ_AT + 32.0
    state = state_of(judge(entry, now), now=now)
    assert state.tenant == TENANT
    assert (state.enabled, state.freshness, state.source) == (True, Freshness.STALE, Source.MEMORY)
    assert (state.age_seconds, state.fresh_seconds, state.generation) == (32.0, -2.0, 2)
    assert (state.fetched_at, state.updated_at) == (EPOCH, EPOCH)
    assert (state.last_error, state.failing_since, state.failures) == ("no answer", EPOCH, 3)
    assert state.retry_seconds == 3.0


def test_the_state_of_nothing_says_nothing_that_is_not_so() -> None:
    state = state_of(judge(Entry(), READ_AT), now=READ_AT)
    assert state.freshness is Freshness.EXPIRED
    assert (state.enabled, state.age_seconds, state.fetched_at, state.updated_at) == (None, None, None, None)
    assert (state.last_error, state.fresh_seconds, state.failing_since) == (None, None, None)
    assert (state.failures, state.retry_seconds) == (0, None)


def test_an_age_is_never_negative_though_the_clocks_of_two_hosts_differ() -> None:
    entry = Entry(token=1, snapshot=snapshot(read_at=READ_AT + 0.2))
    assert state_of(judge(entry, READ_AT), now=READ_AT).age_seconds == 0.0


@pytest.mark.parametrize("source", Source)
def test_the_source_of_an_evaluation_is_the_one_that_was_given(source: Source) -> None:
    evaluation = evaluate(TENANT, Entry(token=1, snapshot=snapshot()), now=READ_AT, windows=WINDOWS, source=source)
    assert (evaluation.source, state_of(evaluation, now=READ_AT).source) == (source, source)
