"""Charts of the dashboard as SVG, rendered by the server. Pure: rows, counts and the present moment are arguments.

A chart needs no script and no style attribute, so the content security policy can forbid both. Every chart has a title
and a description in words for screen readers, and its shapes differ in form as well as in colour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import pairwise

from markupsafe import Markup

from external_oms.policy import Freshness, State, Windows
from external_oms.records import FIRST_VALUE, Cause, Event
from external_oms.web.dashboard_context import TIMELINE_CAUSES, format_duration, is_unasked

__all__ = [
    "DAY",
    "Bar",
    "Kind",
    "Segment",
    "bar_chart",
    "describe_timeline",
    "latency_bars",
    "timeline",
    "timeline_svg",
    "totals",
]

DAY = timedelta(hours=24)
"""The period that a timeline covers."""


class Kind(StrEnum):
    """What evaluations of a tenant got during a segment."""

    ON = "on"
    OFF = "off"
    STALE_ON = "stale-on"
    """On, while the value was not fresh."""
    STALE_OFF = "stale-off"
    """Off, while the value was not fresh."""
    NONE = "none"
    """No value: each caller's own default."""
    UNKNOWN = "unknown"
    """The history does not say."""

    @property
    def label(self) -> str:
        """The kind in words."""
        return _LABELS[self]

    @property
    def swatch(self) -> Markup:
        """A small picture of the kind for a legend."""
        top, height = (part / 2 for part in _BOXES.get(self, (2, 24)))
        return Markup(
            '<svg class="chart" width="12" height="14" aria-hidden="true">'
            '<rect class="{}" y="{:g}" width="12" height="{:g}"/></svg>'
        ).format(self.value, top, height)


_LABELS = {
    Kind.ON: "ON",
    Kind.OFF: "OFF",
    Kind.STALE_ON: "ON, not fresh",
    Kind.STALE_OFF: "OFF, not fresh",
    Kind.NONE: "no value",
    Kind.UNKNOWN: "not recorded",
}


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a timeline in which evaluations got the same.

    Attributes:
        start: Its first instant.
        end: The first instant after it, > start.
        kind: What evaluations got.
    """

    start: datetime
    end: datetime
    kind: Kind

    @property
    def seconds(self) -> float:
        """How long it lasts, in seconds, > 0."""
        return (self.end - self.start).total_seconds()


class _Sweep:
    """Appends segments from the start of the period to its end; what does not lie ahead is left out."""

    def __init__(self, start: datetime) -> None:
        self.cursor = start
        self.segments: list[Segment] = []

    def to(self, end: datetime, kind: Kind) -> None:
        """Fill up to an instant."""
        if end <= self.cursor:
            return
        last = self.segments[-1] if self.segments else None
        if last is not None and last.kind is kind:
            self.segments[-1] = Segment(last.start, end, kind)
        else:
            self.segments.append(Segment(self.cursor, end, kind))
        self.cursor = end


def timeline(
    rows: Iterable[Event],
    state: State,
    *,
    now: datetime,
    since: datetime,
    windows: Windows,
    when_expired: str,
    lazy: bool,
) -> tuple[Segment, ...]:
    """Return what evaluations of a tenant got in the 24 hours before `now`.

    Between the rows nothing is recorded, so a failing period counts as not fresh from its first failed read on.

    Args:
        rows: The tenant's history rows in any order; only those of `TIMELINE_CAUSES` count.
        state: The state of the tenant now.
        now: The end of the period.
        since: From when on the rows are complete; what lies before it is `UNKNOWN`.
        windows: How long a value may be served.
        when_expired: The setting.
        lazy: Whether only evaluations cause reads, so that an old value is normal.

    Returns:
        Segments that follow each other without a gap, from `now - DAY` to `now`; neighbours differ in kind.
    """
    sweep = _Sweep(now - DAY)
    sweep.to(min(since, now), Kind.UNKNOWN)
    found = sorted((row for row in rows if row.cause in TIMELINE_CAUSES), key=lambda row: (row.at, row.id))
    enabled, stale_from = _at_start(found, state, start=now - DAY)
    fresh_for_error = max(windows.stale_while_revalidate_seconds, windows.stale_if_error_seconds)

    def fill(end: datetime, window_seconds: float | None) -> None:
        end = min(end, now)
        if stale_from is not None:
            sweep.to(min(stale_from, end), _fresh(enabled))
            if window_seconds is not None:
                if enabled is not None:
                    sweep.to(min(_later(stale_from, window_seconds, end), end), _stale(enabled))
                sweep.to(end, _expired(enabled, when_expired))
            sweep.to(end, _stale(enabled))
        sweep.to(end, _fresh(enabled))

    for row in found:
        fill(row.at, fresh_for_error)
        match row.cause:
            case Cause.CHANGED:
                enabled = row.enabled
            case Cause.FAILED:
                stale_from = row.at
            case _:
                enabled, stale_from = enabled if row.enabled is None else row.enabled, None
    enabled, stale_from = state.enabled, _stale_since(state, now)
    expires = state.freshness is Freshness.EXPIRED and not is_unasked(state, lazy=lazy)
    fill(now, (fresh_for_error if state.failures else windows.stale_while_revalidate_seconds) if expires else None)
    return tuple(sweep.segments)


def _at_start(rows: Sequence[Event], state: State, *, start: datetime) -> tuple[bool | None, datetime | None]:
    """Return the value before the first row, and since when it was not fresh (None: it was).

    The value is a boolean, so the first row that says "changed" tells what was before it.
    """
    first = next((row for row in rows if row.cause is Cause.CHANGED), None)
    if first is None:
        enabled = state.enabled
    else:
        enabled = None if first.detail == FIRST_VALUE or first.enabled is None else not first.enabled
    turn = next((row for row in rows if row.cause in {Cause.FAILED, Cause.RECOVERED}), None)
    if turn is None:
        return enabled, state.failing_since
    return enabled, start if turn.cause is Cause.RECOVERED else None


def _stale_since(state: State, now: datetime) -> datetime | None:
    """Return since when the present value is not fresh; since when reads fail where there is no value."""
    if state.fresh_seconds is None:
        return state.failing_since
    return None if state.freshness is Freshness.FRESH else _later(now, min(0.0, state.fresh_seconds), now)


def _later(moment: datetime, seconds: float, otherwise: datetime) -> datetime:
    try:
        return moment + timedelta(seconds=seconds)
    except OverflowError:  # a window of thirty years
        return otherwise


def _fresh(enabled: bool | None) -> Kind:
    return Kind.UNKNOWN if enabled is None else Kind.ON if enabled else Kind.OFF


def _stale(enabled: bool | None) -> Kind:
    return Kind.NONE if enabled is None else Kind.STALE_ON if enabled else Kind.STALE_OFF


def _expired(enabled: bool | None, when_expired: str) -> Kind:
    served = {"on": True, "off": False, "last": enabled}.get(when_expired)
    return _stale(served)


def totals(segments: Sequence[Segment]) -> list[tuple[Kind, float]]:
    """Return for how many seconds each kind lasted, without those that did not occur."""
    found = [(kind, sum(one.seconds for one in segments if one.kind is kind)) for kind in Kind]
    return [(kind, seconds) for kind, seconds in found if seconds]


def describe_timeline(segments: Sequence[Segment]) -> str:
    """Return a timeline in one or two sentences."""
    last = segments[-1]
    if len(segments) == 1:
        return f"{_capital(last.kind.label)} for the whole day."
    spent = "; ".join(f"{kind.label} {format_duration(seconds)}" for kind, seconds in totals(segments))
    since = f"{_capital(last.kind.label)} for {format_duration(last.seconds)}, since {last.start:%H:%M}."
    return f"{since} In the last 24 hours: {spent}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# -- drawing ---------------------------------------------------------------------------------------------------------

_HEIGHT = 44
_TRACK = 28
_LEAST_PERCENT = 0.4
"""The least width of what is drawn: an outage of a minute must be seen."""

_BOXES = {  # top and height, so that the kinds differ in form too
    Kind.ON: (2, 24),
    Kind.OFF: (16, 10),
    Kind.STALE_ON: (2, 24),
    Kind.STALE_OFF: (16, 10),
    Kind.NONE: (9, 10),
}


def timeline_svg(segments: Sequence[Segment], *, name: str) -> Markup:
    """Return a timeline as SVG; its width follows the page.

    Args:
        segments: The segments.
        name: Makes the ids in the page unique: letters, digits and hyphens.
    """
    start, end = segments[0].start, segments[-1].end
    whole = (end - start).total_seconds()
    shapes = [Markup('<line class="track" x1="0" x2="100%" y1="{0}" y2="{0}"/>').format(_TRACK - 2)]
    for one in sorted(segments, key=lambda segment: -segment.seconds):  # what is short is drawn on top
        if one.kind in _BOXES:
            top, height = _BOXES[one.kind]
            left, width = 100 * (one.start - start).total_seconds() / whole, 100 * one.seconds / whole
            shown = max(width, _LEAST_PERCENT)
            shapes.append(
                Markup(
                    '<rect class="{}" x="{:.3f}%" y="{}" width="{:.3f}%" height="{}">'
                    "<title>{}: {:%H:%M} to {:%H:%M}, {}</title></rect>"
                ).format(
                    one.kind.value, min(left, 100 - shown), top, shown, height,
                    _capital(one.kind.label), one.start, one.end, format_duration(one.seconds),
                )
            )  # fmt: skip
    shapes += [_hour(100 * (moment - start) / (end - start), f"{moment:%H:%M}") for moment in _hours(start, end)]
    text = describe_timeline(segments)
    return _figure(f"timeline-{name}", f"The last 24 hours of {name}", text, shapes, height=_HEIGHT)


def _hours(start: datetime, end: datetime) -> Iterable[datetime]:
    """Return every sixth hour, on the clock."""
    moment = start.replace(hour=0, minute=0, second=0, microsecond=0)
    while (moment := moment + timedelta(hours=6)) <= end:
        if moment > start:
            yield moment


def _hour(percent: float, text: str) -> Markup:
    anchor = "start" if percent < 6 else "end" if percent > 94 else "middle"  # noqa: PLR2004 - half a label
    return Markup(
        '<line class="tick" x1="{0:.3f}%" x2="{0:.3f}%" y1="{1}" y2="{2}"/>'
        '<text x="{0:.3f}%" y="{3}" text-anchor="{4}">{5}</text>'
    ).format(percent, _TRACK - 2, _TRACK + 2, _HEIGHT - 2, anchor, text)


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a bar chart.

    Attributes:
        label: What is counted.
        count: How often, >= 0.
        kind: The class of the shape.
    """

    label: str
    count: float
    kind: str = "plain"


def bar_chart(bars: Sequence[Bar], *, name: str, title: str) -> Markup:
    """Return horizontal bars as SVG, with their labels and counts.

    Args:
        bars: From top to bottom, at least one.
        name: Makes the ids in the page unique.
        title: What is counted, for screen readers.
    """
    most = max(1.0, *(bar.count for bar in bars))
    shapes = []
    for number, bar in enumerate(bars):
        top = 22 * number
        shapes.append(
            Markup(
                '<text x="0" y="{}">{}</text><rect class="track" x="24%" y="{}" width="62%" height="12"/>'
                '<rect class="{}" x="24%" y="{}" width="{:.3f}%" height="12"/>'
                '<text class="count" x="100%" y="{}" text-anchor="end">{:,.0f}</text>'
            ).format(
                top + 14, bar.label, top + 4,
                bar.kind, top + 4, max(62 * bar.count / most, 0.6 if bar.count else 0.0),
                top + 14, bar.count,
            )
        )  # fmt: skip
    text = "; ".join(f"{bar.label}: {bar.count:,.0f}" for bar in bars) + "."
    return _figure(name, title, text, shapes, height=22 * len(bars))


def latency_bars(cumulative: Mapping[float, float], failed: float, *, shown: Sequence[float]) -> list[Bar]:
    """Return the bars of a histogram of read latencies.

    Args:
        cumulative: How many reads took at most so many seconds, `inf` included, as Prometheus counts them.
        failed: How many reads failed.
        shown: The upper bounds in seconds that have a bar, rising.
    """
    at_most = [cumulative.get(bound, 0.0) for bound in shown]
    names = [f"≤ {bound * 1000:.0f} ms" if bound < 1 else f"≤ {bound:g} s" for bound in shown]
    counts = [at_most[0], *(high - low for low, high in pairwise(at_most))]
    bars = [Bar(name, max(0.0, count)) for name, count in zip(names, counts, strict=True)]
    slower = max(0.0, cumulative.get(float("inf"), 0.0) - at_most[-1])
    return [*bars, Bar("slower", slower), Bar("failed", failed, "none")]


def _figure(name: str, title: str, text: str, shapes: Iterable[Markup], *, height: int) -> Markup:
    return Markup(
        '<svg class="chart" role="img" aria-labelledby="{0}-title {0}-text" width="100%" height="{1}">'
        '<title id="{0}-title">{2}</title><desc id="{0}-text">{3}</desc>{4}</svg>'
    ).format(name, height, title, text, Markup("").join(shapes))
