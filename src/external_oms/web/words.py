"""How the page puts it: spans, instants, and what a state and a row of history mean to a person. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from external_oms.policy import Freshness, Source, State
from external_oms.records import Cause, Event
from external_oms.settings import Settings

__all__ = [
    "Flag",
    "flag_of",
    "freshness_words",
    "generation_of",
    "instant",
    "is_unasked",
    "latency",
    "meaning",
    "source_of",
    "span",
    "title_of",
    "tone_of",
    "word_of",
]

LONG_GENERATION = 10**9
"""From here on a generation is shortened."""

Flag = Literal["on", "off", "none"]
"""What evaluations get: a value, or none, so that each caller's own default holds."""


def span(seconds: float | None) -> str:
    """A span of time in its two largest units: `12 s`, `3 min 05 s`, `2 h 14 min`, `3 d 4 h`; a dash for None."""
    if seconds is None:
        return "—"
    whole = max(0, int(seconds))
    if whole < 60:  # noqa: PLR2004 - seconds of a minute
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:  # noqa: PLR2004 - minutes of an hour
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"  # noqa: PLR2004 - hours of a day


def latency(seconds: float | None) -> str:
    """How long something took: `23 ms`, `1.4 s`; empty for None."""
    if seconds is None:
        return ""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def instant(moment: datetime | None) -> str:
    """An instant to the second, in UTC, as the foot of the page says; a dash for None."""
    return "—" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def generation_of(generation: int) -> str:
    """A generation as the page writes it: of one with more than nine digits the last six, as in `…000123`.

    A generation in Redis is a time in milliseconds: the last six digits tell the generations of a quarter of an hour
    apart, and thirteen digits do not fit the columns.
    """
    return str(generation) if generation < LONG_GENERATION else f"…{generation % 1_000_000:06d}"


def flag_of(state: State, settings: Settings) -> Flag:
    """What evaluations of the tenant get now."""
    if state.freshness is not Freshness.EXPIRED or settings.when_expired == "last" or is_unasked(state, settings):
        return "none" if state.enabled is None else "on" if state.enabled else "off"
    return "none" if settings.when_expired == "default" else settings.when_expired


def is_unasked(state: State, settings: Settings) -> bool:
    """Whether a value is too old only because nobody asks: the next evaluation reads it first."""
    asleep = settings.refresh == "lazy" and not state.failures
    return asleep and state.freshness is Freshness.EXPIRED and state.enabled is not None


def meaning(state: State, settings: Settings) -> str:
    """What that means for the orders, in one sentence."""
    match flag_of(state, settings):
        case "on":
            owner = "The external OMS owns the orders"
        case "off":
            owner = "The tenant's own order management owns the orders"
        case _:
            owner = "Each caller's own default decides"
    if state.freshness is not Freshness.EXPIRED:
        return f"{owner}."
    if is_unasked(state, settings):
        return f"{owner}, as far as is known. Nobody has asked for a while; the next evaluation reads it first."
    last = "No value was ever read" if state.enabled is None else f"The last known value was {word_of(state.enabled)}"
    return f"{owner}, by when_expired = {settings.when_expired}. {last}."


def word_of(enabled: bool | None) -> str:
    """A value as the page writes it."""
    return "unknown" if enabled is None else "ON" if enabled else "OFF"


def source_of(state: State) -> str:
    """Who read the value; a dash where there is none."""
    if state.enabled is None:
        return "—"
    return {Source.MEMORY: "this process", Source.STORE: "another process", Source.API: "the API"}[state.source]


def tone_of(state: State, settings: Settings) -> Literal["good", "warn", "bad"]:
    """How much a state needs somebody: not at all, soon, now."""
    if state.freshness is Freshness.EXPIRED and not is_unasked(state, settings):
        return "bad"
    return "warn" if state.failures or state.last_error else "good"


def freshness_words(state: State, settings: Settings) -> str:
    """What the value is worth, and until when, in a few words."""
    fresh = state.fresh_seconds
    if fresh is None:
        return "No value yet" if not state.failures else "No value: every read so far has failed"
    if state.freshness is Freshness.FRESH:
        return f"Fresh for another {span(fresh)}"
    if state.freshness is Freshness.EXPIRED:
        return f"Expired: not fresh for {span(-fresh)}, too old to serve"
    if not state.failures:
        return f"Stale for {span(-fresh)}; a read is due"
    windows = settings.windows
    left = max(windows.stale_if_error_seconds, windows.stale_while_revalidate_seconds) + fresh
    return f"Stale for {span(-fresh)}; served for another {span(left)} while reads fail"


def title_of(event: Event) -> str:
    """What happened, in a few words."""
    value = "" if event.enabled is None else f" {word_of(event.enabled)}"
    return {
        Cause.CHANGED: f"now{value}",
        Cause.DELIVERY: "delivery",
        Cause.INVALIDATED: "invalidated",
        Cause.WRITE: f"switch{value}",
        Cause.FAILED: "reads fail",
        Cause.RECOVERED: "reads work again",
        Cause.STORE: "store",
    }[event.cause]
