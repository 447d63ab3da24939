"""The arithmetic of ages: every rule for every number."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from email.utils import format_datetime
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_oms.freshness import (
    BACKOFF_FLOOR_SECONDS,
    BUCKET_BURST,
    Freshness,
    Windows,
    backoff_seconds,
    bucket_take,
    early_seconds,
    follow_seconds,
    freshness_of,
    parse_retry_after,
    settling_lifetime,
    spread_delay_seconds,
)

NOW = 1_780_000_000.0
WINDOWS = Windows(ttl_seconds=30, stale_while_revalidate_seconds=30, stale_if_error_seconds=3600)

seconds = st.floats(min_value=0, max_value=1e9)
positive = st.floats(min_value=1e-3, max_value=1e9)


@pytest.mark.parametrize(
    ("since", "lifetime"), [(None, 30), (0, 1), (0.9, 1), (1, 1), (2, 2), (16, 16), (30, 30), (3600, 30)]
)
def test_looks_after_an_invalidation_are_short_at_first_and_grow(since: float | None, lifetime: float) -> None:
    assert settling_lifetime(30, since) == lifetime


@given(ttl=positive, since=seconds, later=seconds)
def test_a_settling_lifetime_grows_with_time_and_never_passes_the_ttl(ttl: float, since: float, later: float) -> None:
    assert 0 < settling_lifetime(ttl, since) <= settling_lifetime(ttl, since + later) <= ttl


@pytest.mark.parametrize(
    ("stale_for", "failing", "expected"),
    [
        (-0.001, False, Freshness.FRESH),
        (-0.001, True, Freshness.FRESH),
        (0, False, Freshness.STALE),
        (29.999, False, Freshness.STALE),
        (30, False, Freshness.EXPIRED),
        (30, True, Freshness.STALE),
        (3599.999, True, Freshness.STALE),
        (3600, True, Freshness.EXPIRED),
    ],
)
def test_each_window_ends_at_its_very_bound(stale_for: float, failing: bool, expected: Freshness) -> None:
    assert freshness_of(stale_for, failing=failing, windows=WINDOWS) is expected


@given(swr=seconds, sie=seconds, stale_for=st.floats(-1e9, 1e9), later=seconds, failing=st.booleans())
def test_nothing_grows_fresher_with_time_and_failing_reads_only_lengthen_the_service(
    swr: float, sie: float, stale_for: float, later: float, failing: bool
) -> None:
    order = list(Freshness)
    windows = Windows(30, swr, sie)
    now = order.index(freshness_of(stale_for, failing=failing, windows=windows))
    assert now <= order.index(freshness_of(stale_for + later, failing=failing, windows=windows))
    assert order.index(freshness_of(stale_for, failing=True, windows=windows)) <= order.index(
        freshness_of(stale_for, failing=False, windows=windows)
    )


chances = st.floats(0.0, 1.0, exclude_max=True)


@given(lifetime=positive, random=chances)
def test_the_early_read_leaves_a_fortieth_for_the_read_and_never_comes_before_the_value(
    lifetime: float, random: float
) -> None:
    assert min(1, lifetime / 20) / 2 <= early_seconds(lifetime, random) < lifetime / 4


@given(spread=st.floats(0.0, 10.0), random=chances)
def test_a_spread_look_comes_within_the_spread(spread: float, random: float) -> None:
    assert 0.0 <= spread_delay_seconds(spread, random) <= spread


def test_of_a_hundred_thousand_members_a_few_look_first() -> None:
    dice = Random(1)
    delays = sorted(spread_delay_seconds(1.0, dice.random()) for _ in range(100_000))
    assert delays[0] < 0.1
    assert sum(delay < delays[0] + 0.2 for delay in delays) < 100
    assert delays[50_000] > 0.9


@given(failures=st.integers(1, 10_000), cap=positive, random=st.floats(0, 1, exclude_max=True))
def test_a_backoff_lies_between_its_floor_and_floor_plus_cap(failures: int, cap: float, random: float) -> None:
    assert BACKOFF_FLOOR_SECONDS <= backoff_seconds(failures, cap, random) <= BACKOFF_FLOOR_SECONDS + cap


@given(failures=st.integers(1, 100), cap=positive, random=st.floats(0, 1, exclude_max=True))
def test_a_backoff_never_shrinks_with_another_failure(failures: int, cap: float, random: float) -> None:
    assert backoff_seconds(failures, cap, random) <= backoff_seconds(failures + 1, cap, random)


@given(pauses=st.lists(st.floats(-5, 10), max_size=60))
def test_a_bucket_never_grants_more_than_its_burst_and_one_a_second(pauses: list[float]) -> None:
    level, granted, elapsed = float(BUCKET_BURST), 0, 0.0
    for pause in pauses:
        elapsed += max(0.0, pause)
        level, wait = bucket_take(level, pause)
        assert 0 <= level <= BUCKET_BURST
        assert 0 <= wait <= 1
        granted += wait == 0
    assert granted <= BUCKET_BURST + elapsed + 1e-6


def test_who_waits_as_long_as_an_empty_bucket_says_is_granted() -> None:
    level, wait = bucket_take(0.25, 0)
    assert (level, wait) == (0.25, 0.75)
    assert bucket_take(level, wait) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("0", 0.0),
        ("-5", 0.0),
        (" 7 ", 7.0),
        ("1.5", 1.5),
        ("1e400", 300.0),
        ("inf", 300.0),
        ("99999999", 300.0),
        (format_datetime(datetime.fromtimestamp(NOW + 20, UTC), usegmt=True), 20.0),
        (format_datetime(datetime.fromtimestamp(NOW - 20, UTC), usegmt=True), 0.0),
        ("Wed, 21 Oct 2099 07:28:00 GMT", 300.0),
        ("Thu, 28 May 2026 20:26:50 -0000", 10.0),  # no zone known: read as UTC
        ("Wed, 21 Oct 99999 07:28:00 GMT", None),
    ],
)
def test_a_retry_after_is_seconds_or_a_date_and_is_capped(header: str | None, expected: float | None) -> None:
    assert parse_retry_after(header, now_wall=NOW, cap_seconds=300) == expected


@given(header=st.text(), now=st.floats(-1e11, 1e11), cap=positive)
def test_no_retry_after_raises_or_leaves_its_bounds(header: str, now: float, cap: float) -> None:
    wait = parse_retry_after(header, now_wall=now, cap_seconds=cap)
    assert wait is None or (0 <= wait <= cap and not math.isnan(wait))


@pytest.mark.parametrize(
    ("waited", "remaining", "wait"), [(0.0, 7.0, 0.05), (0.05, 6.95, 0.05), (0.4, 6.6, 0.4), (3.2, 3.8, 3.2)]
)
def test_whoever_waits_for_another_asks_again_after_as_long_as_it_has_waited(
    waited: float, remaining: float, wait: float
) -> None:
    assert follow_seconds(waited, remaining, 0.0, 0.5) == wait


def test_a_lease_whose_life_ends_sooner_is_asked_for_then_and_by_a_fleet_one_after_the_other() -> None:
    assert follow_seconds(6.4, 0.6, 0.0, 0.5) == 0.6
    waits = [follow_seconds(6.4, 0.6, 1.0, Random(seed).random()) for seed in range(1000)]
    assert min(waits) >= 0.6
    assert max(waits) <= 1.6
    assert sum(wait < 1.0 for wait in waits) <= 20, "hardly anybody is first"
