"""RFC 9111 and RFC 5861 arithmetic: ages in, a state out; no clock, no I/O, nothing of ours imported.

Source: RFC 9111 §4.2 (freshness), §4.4 (invalidation); RFC 5861 §3 (stale-while-revalidate), §4 (stale-if-error);
RFC 9110 §10.2.3 (Retry-After).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import StrEnum

__all__ = [
    "Freshness",
    "Windows",
    "backoff_seconds",
    "bucket_take",
    "early_seconds",
    "follow_seconds",
    "freshness_of",
    "parse_retry_after",
    "settling_lifetime",
    "spread_delay_seconds",
]

SETTLING_FLOOR_SECONDS = 1.0
"""The shortest look after an invalidation: some of the API's endpoints allow one request a second."""

BUCKET_BURST = 5
"""Reads that a storm of invalidations may cause at once, per tenant."""

BUCKET_RATE_PER_SECOND = 1.0
"""Reads a second that it may cause beyond the burst, per tenant."""

BACKOFF_FLOOR_SECONDS = 1.0
"""The least wait after a failed read, so that callers arriving one by one share the failure too."""

FOLLOW_SECONDS = 0.05
"""The first wait for another process's result before asking again: half of what a usual read takes."""


class Freshness(StrEnum):
    """What a stored snapshot is worth at one moment."""

    FRESH = "fresh"
    """Within its freshness lifetime and of the present generation: serve it."""
    STALE = "stale"
    """Older, and still servable while a read runs, or because reads fail: serve it and say so."""
    EXPIRED = "expired"
    """Older than every window that applies: not to be served without a successful read."""


@dataclass(frozen=True, slots=True)
class Windows:
    """How long a value lives, in float seconds.

    Attributes:
        ttl_seconds: The freshness lifetime, > 0.
        stale_while_revalidate_seconds: How long after it an old value may be served while a read runs, >= 0.
        stale_if_error_seconds: How long after it an old value may be served while reads fail, >= 0.
    """

    ttl_seconds: float
    stale_while_revalidate_seconds: float
    stale_if_error_seconds: float


def settling_lifetime(ttl_seconds: float, since_invalidation_seconds: float | None) -> float:
    """The freshness lifetime, in seconds, of a value whose read started so long after an invalidation.

    The API may answer with the old value for a moment after it announced a change, so looks are short at first
    and grow: 1 s, 1 s, 2 s, 4 s, … up to the whole lifetime.

    Args:
        ttl_seconds: The whole freshness lifetime, > 0.
        since_invalidation_seconds: Seconds from the invalidation to the start of the read; None without one.
    """
    if since_invalidation_seconds is None:
        return ttl_seconds
    return min(ttl_seconds, max(SETTLING_FLOOR_SECONDS, since_invalidation_seconds))


def freshness_of(stale_for_seconds: float, *, failing: bool, windows: Windows) -> Freshness:
    """What a value is worth that stopped being fresh so long ago.

    Args:
        stale_for_seconds: Seconds since its freshness ended, by age or by an invalidation; < 0 while it is fresh.
        failing: Whether the last read failed: only then does stale-if-error apply.
        windows: The windows in force.
    """
    if stale_for_seconds < 0:
        return Freshness.FRESH
    if stale_for_seconds < windows.stale_while_revalidate_seconds:
        return Freshness.STALE
    if failing and stale_for_seconds < windows.stale_if_error_seconds:
        return Freshness.STALE
    return Freshness.EXPIRED


def early_seconds(lifetime_seconds: float, random: float) -> float:
    """How many seconds before the end of its lifetime one member of a fleet reads a value again in the background.

    A fortieth at least, half a second at the most: long enough for a read, so that a steady service never serves a
    stale value, short enough that the API sees one read per lifetime. Beyond that an exponential draw: of any number of
    members a few are first, and the others are still waiting when the value is there.

    Args:
        lifetime_seconds: The freshness lifetime, > 0.
        random: A number in [0, 1).

    Source: the draw is that of XFetch: Vattani, Chierichetti, Lowenstein, "Optimal Probabilistic Cache Stampede
    Prevention", VLDB 2015.
    """
    return min(1.0, lifetime_seconds / 20) * (0.5 - 0.1 * math.log1p(-random))


def spread_delay_seconds(spread_seconds: float, random: float) -> float:
    """How many seconds one member waits before it looks into what all have just been told.

    The draw of `early_seconds` turned round: hardly anybody is at the beginning and most are at the end, so that of
    any number up to a hundred thousand a few are first.

    Args:
        spread_seconds: The longest wait, >= 0; 0 where no others are told.
        random: A number in [0, 1).
    """
    return spread_seconds * max(0.0, 1.0 + math.log1p(-random) / math.log(100_000))


def follow_seconds(waited_seconds: float, remaining_seconds: float, spread_seconds: float, random: float) -> float:
    """How many seconds to wait for another process's result before asking again whether its lease is still held.

    As long as was waited already: a lease that ends early, for its holder died, is found in twice the time at the most;
    and of a fleet that waits for an API that hangs, each member asks eight times in five seconds and not a hundred. At
    the end of the lease's life those who still wait come one after the other.

    Args:
        waited_seconds: Seconds since it was first asked for, >= 0.
        remaining_seconds: Seconds until the lease ends by itself, >= 0.
        spread_seconds: Over how long to spread the members of a fleet after that, >= 0.
        random: A number in [0, 1).
    """
    latest_seconds = remaining_seconds + spread_delay_seconds(spread_seconds, random)
    return min(max(FOLLOW_SECONDS, waited_seconds), latest_seconds)


def backoff_seconds(failures: int, cap_seconds: float, random: float) -> float:
    """How many seconds to wait after the n-th failure in a row: exponential, with full jitter over a floor.

    Args:
        failures: Failed reads in a row, >= 1.
        cap_seconds: The largest span of the jitter, in seconds; the ttl, so that a dead API is asked as often as a
            living one.
        random: A number in [0, 1).

    Source: full jitter as in the AWS Architecture Blog, "Exponential Backoff And Jitter".
    """
    return BACKOFF_FLOOR_SECONDS + random * min(cap_seconds, 2.0 ** min(failures - 1, 30))


def bucket_take(level: float, elapsed_seconds: float) -> tuple[float, float]:
    """Take one token from the bucket that meters the reads which invalidations cause.

    Args:
        level: Tokens left when it was last touched, 0 to the burst.
        elapsed_seconds: Seconds since then, >= 0.

    Returns:
        The new level and the seconds to wait: 0 where the token was granted.
    """
    filled = min(float(BUCKET_BURST), level + max(0.0, elapsed_seconds) * BUCKET_RATE_PER_SECOND)
    if filled >= 1.0:
        return filled - 1.0, 0.0
    return filled, (1.0 - filled) / BUCKET_RATE_PER_SECOND


def parse_retry_after(header: str | None, *, now_wall: float, cap_seconds: float) -> float | None:
    """The seconds that a Retry-After header asks for, between 0 and the cap; None where it says nothing usable.

    Args:
        header: The header's text: whole seconds or an HTTP date (RFC 9110 §10.2.3).
        now_wall: The present moment, seconds since the Unix epoch.
        cap_seconds: The most that is believed, in seconds.
    """
    if header is None:
        return None
    text = header.strip()
    try:
        asked = float(text)
    except ValueError:
        try:
            moment = parsedate_to_datetime(text)
        except (ValueError, TypeError, OverflowError):
            return None
        asked = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now_wall
    if math.isnan(asked):
        return None
    return min(max(asked, 0.0), cap_seconds)
