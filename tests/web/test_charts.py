"""Charts: a timeline covers the day without gaps, agrees with the state, and reads without colour or script."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_oms.policy import Freshness, Source, State, Windows
from external_oms.records import FIRST_VALUE, Cause, Event
from external_oms.web.charts import (
    DAY,
    Bar,
    Kind,
    Segment,
    bar_chart,
    describe_timeline,
    latency_bars,
    timeline,
    timeline_svg,
)

NOW = datetime(2026, 7, 1, 15, 0, tzinfo=UTC)
START = NOW - DAY
WINDOWS = Windows(30.0, 30.0, 3600.0)


def at(hours: float) -> datetime:
    """So many hours after the start of the day."""
    return START + timedelta(hours=hours)


def row(hours: float, cause: Cause, enabled: bool | None = None, detail: str = "the value changed") -> Event:
    return Event(at(hours), "acme", cause, enabled=enabled, detail=detail)


def state(
    enabled: bool | None = True,
    freshness: Freshness = Freshness.FRESH,
    fresh_seconds: float | None = 20.0,
    failing_since: datetime | None = None,
) -> State:
    return State(
        tenant="acme",
        enabled=enabled,
        freshness=freshness,
        age_seconds=None if enabled is None else 10.0,
        generation=1,
        fetched_at=None if enabled is None else NOW - timedelta(seconds=10),
        updated_at=None,
        source=Source.MEMORY,
        last_error="answered 503" if failing_since else None,
        fresh_seconds=None if enabled is None else fresh_seconds,
        failing_since=failing_since,
        failures=1 if failing_since else 0,
    )


def drawn(
    *rows: Event, now: State | None = None, since: datetime = START, when_expired: str = "default", lazy: bool = False
) -> list[tuple[float, float, str]]:
    """The segments as hours from the start of the day."""
    found = timeline(rows, now or state(), now=NOW, since=since, windows=WINDOWS, when_expired=when_expired, lazy=lazy)
    return [
        (round((one.start - START) / timedelta(hours=1), 2), round((one.end - START) / timedelta(hours=1), 2), one.kind)
        for one in found
    ]


def test_a_day_without_rows_has_the_present_value() -> None:
    assert drawn() == [(0, 24, "on")]


def test_changes_divide_the_day_and_the_first_one_tells_what_was_before() -> None:
    rows = (row(6, Cause.CHANGED, False), row(18, Cause.CHANGED, True))
    assert drawn(*rows) == [(0, 6, "on"), (6, 18, "off"), (18, 24, "on")]
    assert drawn(*reversed(rows)) == drawn(*rows), "the order of the rows does not matter"


def test_what_is_not_recorded_is_drawn_as_unknown() -> None:
    assert drawn(since=at(10)) == [(0, 10, "unknown"), (10, 24, "on")]
    assert drawn(row(10, Cause.CHANGED, True, FIRST_VALUE), since=at(9)) == [(0, 10, "unknown"), (10, 24, "on")]
    assert drawn(now=state(None, Freshness.EXPIRED), since=datetime.max.replace(tzinfo=UTC)) == [(0, 24, "unknown")]


def test_a_failing_period_is_stale_and_then_without_a_value() -> None:
    rows = (row(6, Cause.FAILED), row(9, Cause.RECOVERED, True))
    assert drawn(*rows) == [(0, 6, "on"), (6, 7, "stale-on"), (7, 9, "none"), (9, 24, "on")]
    assert drawn(row(9, Cause.RECOVERED, True)) == [(0, 1, "stale-on"), (1, 9, "none"), (9, 24, "on")]
    assert drawn(row(6, Cause.FAILED), row(6.5, Cause.RECOVERED, False), now=state(False)) == [
        (0, 6, "off"),
        (6, 6.5, "stale-off"),
        (6.5, 24, "off"),
    ]


@pytest.mark.parametrize(("when_expired", "kind"), [("on", "stale-on"), ("off", "stale-off"), ("last", "stale-on")])
def test_past_the_windows_the_policy_is_drawn(when_expired: str, kind: str) -> None:
    segments = drawn(row(6, Cause.FAILED), row(9, Cause.RECOVERED, True), when_expired=when_expired)
    assert segments[-2][2] == kind
    assert segments[-2][1] == 9


def test_the_end_agrees_with_the_state() -> None:
    stale = state(True, Freshness.STALE, -1800.0, failing_since=at(23))
    assert drawn(row(23, Cause.FAILED), now=stale) == [(0, 23.5, "on"), (23.5, 24, "stale-on")], "fresh until its end"
    expired = state(True, Freshness.EXPIRED, -7200.0, failing_since=at(22))
    assert drawn(row(22, Cause.FAILED), now=expired) == [(0, 22, "on"), (22, 23, "stale-on"), (23, 24, "none")]
    never = state(None, Freshness.EXPIRED, failing_since=at(20))
    assert drawn(row(20, Cause.FAILED), now=never) == [(0, 20, "unknown"), (20, 24, "none")]
    assert drawn(row(20, Cause.FAILED), now=never, when_expired="on") == [(0, 20, "unknown"), (20, 24, "stale-on")]


def test_a_value_that_nobody_asks_for_is_old_and_no_outage() -> None:
    asleep = state(True, Freshness.EXPIRED, -7200.0)
    assert drawn(now=asleep, lazy=True) == [(0, 22, "on"), (22, 24, "stale-on")]
    assert drawn(now=asleep)[-1][2] == "none"


def test_a_window_of_thirty_years_is_drawn_too() -> None:
    windows = Windows(30.0, 1e9, 1e9)
    segments = timeline(
        [row(6, Cause.FAILED)],
        state(True, Freshness.STALE, -60.0, failing_since=at(6)),
        now=datetime.max.replace(tzinfo=UTC) - timedelta(hours=1),
        since=START,
        windows=windows,
        when_expired="default",
        lazy=False,
    )
    assert segments[-1].kind is Kind.STALE_ON


ROWS = st.lists(
    st.builds(
        row,
        st.floats(-30, 30),
        st.sampled_from(list(Cause)),
        st.sampled_from([True, False, None]),
        st.sampled_from([FIRST_VALUE, "the value changed"]),
    ),
    max_size=12,
)
STATES = st.builds(
    state,
    st.sampled_from([True, False, None]),
    st.sampled_from(list(Freshness)),
    st.floats(-1e6, 1e6),
    st.one_of(st.none(), st.floats(-30, 24).map(at)),
)


@given(
    ROWS,
    STATES,
    st.floats(-30, 30),
    st.sampled_from(["default", "on", "off", "last"]),
    st.booleans(),
)
def test_segments_cover_the_day_in_order_without_overlap(
    rows: list[Event], now: State, since: float, when_expired: str, lazy: bool
) -> None:
    segments = timeline(rows, now, now=NOW, since=at(since), windows=WINDOWS, when_expired=when_expired, lazy=lazy)
    assert (segments[0].start, segments[-1].end) == (START, NOW)
    assert all(one.start < one.end for one in segments)
    assert all(one.end == two.start and one.kind is not two.kind for one, two in pairwise(segments))
    picture = ET.fromstring(str(timeline_svg(segments, name="acme")))  # noqa: S314 - made here
    boxes = picture.findall("rect")
    assert len(boxes) == sum(one.kind is not Kind.UNKNOWN for one in segments)
    for box in boxes:
        left, width = float(box.attrib["x"].rstrip("%")), float(box.attrib["width"].rstrip("%"))
        assert 0 <= left <= left + width <= 100.01
    assert describe_timeline(segments).endswith(".")


def test_a_timeline_is_an_image_with_a_title_and_a_text() -> None:
    segments = (Segment(START, at(22), Kind.ON), Segment(at(22), NOW, Kind.STALE_ON))
    picture = ET.fromstring(str(timeline_svg(segments, name="acme")))  # noqa: S314 - made here
    assert picture.attrib["role"] == "img"
    assert picture.attrib["aria-labelledby"] == "timeline-acme-title timeline-acme-text"
    assert picture.findtext("title") == "The last 24 hours of acme"
    assert picture.findtext("desc") == (
        "ON, not fresh for 2 h 00 min, since 13:00. In the last 24 hours: ON 22 h 00 min; ON, not fresh 2 h 00 min."
    )
    assert [text.text for text in picture.findall("text")] == ["18:00", "00:00", "06:00", "12:00"]
    assert not [key for part in picture.iter() for key in part.attrib if key == "style" or key.startswith("on")]
    assert describe_timeline(segments[:1]) == "ON for the whole day."


def test_bars_have_their_labels_and_counts_and_what_is_named_is_escaped() -> None:
    picture = ET.fromstring(str(bar_chart([Bar("ON <b>", 1234, "on"), Bar("OFF", 0)], name="x", title="Evaluations")))  # noqa: S314
    assert [text.text for text in picture.findall("text")] == ["ON <b>", "1,234", "OFF", "0"]
    assert picture.findtext("desc") == "ON <b>: 1,234; OFF: 0."
    widths = [box.attrib["width"] for box in picture.findall("rect") if box.attrib["class"] != "track"]
    assert widths == ["62.000%", "0.000%"]


def test_a_histogram_of_latencies_is_counted_per_bucket() -> None:
    counts = {0.025: 3.0, 0.1: 10.0, 1.0: 11.0, float("inf"): 12.0}
    assert latency_bars(counts, 2.0, shown=(0.025, 0.1, 1.0)) == [
        Bar("≤ 25 ms", 3),
        Bar("≤ 100 ms", 7),
        Bar("≤ 1 s", 1),
        Bar("slower", 1),
        Bar("failed", 2, "none"),
    ]
