"""What a cache entry means at one moment: fresh, stale or expired, and when to read it again. Pure functions.

Sources: RFC 9111 section 4.2 (freshness) and 4.4 (invalidation); RFC 5861 section 3 (stale-while-revalidate) and 4
(stale-if-error); XFetch: Vattani, Chierichetti, Lowenstein, "Optimal Probabilistic Cache Stampede Prevention", VLDB
2015.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from external_oms.entry import Entry, Failure, Snapshot, is_current, retry_at, stale_at
from external_oms.errors import READ_ERRORS, ReadError

__all__ = [
    "Evaluation",
    "Freshness",
    "Source",
    "State",
    "Windows",
    "backoff_seconds",
    "degraded_jitter_seconds",
    "early_refresh_seconds",
    "error_of",
    "evaluate",
    "herd_jitter_seconds",
    "lease_poll_seconds",
    "refresh_at",
    "state_of",
]

BACKOFF_FLOOR_SECONDS = 1.0
"""The least wait after a failed read: callers that arrive one after the other share the failure too."""

LEASE_POLL_SECONDS = 0.05
"""The first wait before a process asks again for a lease that another one holds: half of what a usual read takes."""

SHORT_LIFETIME_SECONDS = 20.0
"""Below this lifetime the jitter of the early refresh is shorter than a read takes (0.1 s), so that it does not keep
the members of a fleet from reading at the same time."""


class Freshness(StrEnum):
    """The freshness of a stored value at one moment."""

    FRESH = "fresh"
    """Within its freshness lifetime, and no invalidation came after its read began."""
    STALE = "stale"
    """No longer fresh; may be served while a read runs, or because reads fail."""
    EXPIRED = "expired"
    """Outside every window, or there is no value: `when_expired` decides."""


class Source(StrEnum):
    """Where a value comes from, as seen by this process."""

    API = "api"
    """This call read it from the config API."""
    STORE = "store"
    """Another process read it; this one took it from the shared store."""
    MEMORY = "memory"
    """This process read it earlier."""


@dataclass(frozen=True, slots=True)
class Windows:
    """How long a value may be served, in float seconds.

    Attributes:
        ttl_seconds: The freshness lifetime, > 0.
        stale_while_revalidate_seconds: How long after it the value may be served while a read runs, >= 0.
        stale_if_error_seconds: How long after it the value may be served while reads fail, >= 0.
    """

    ttl_seconds: float
    stale_while_revalidate_seconds: float
    stale_if_error_seconds: float

    @property
    def hard_limit_seconds(self) -> float:
        """The age from which a value is expired whatever happens."""
        return self.ttl_seconds + max(self.stale_while_revalidate_seconds, self.stale_if_error_seconds)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What may be served for a tenant at one moment.

    Attributes:
        tenant: The tenant.
        entry: The entry that was evaluated.
        freshness: The freshness of its snapshot; EXPIRED also where there is none.
        fresh_until: The instant until which FRESH holds if the entry does not change.
        source: Where the snapshot comes from.
    """

    tenant: str
    entry: Entry
    freshness: Freshness
    fresh_until: float
    source: Source

    @property
    def servable(self) -> Snapshot | None:
        """The snapshot, or None where it may not be served."""
        return None if self.freshness is Freshness.EXPIRED else self.entry.snapshot


@dataclass(frozen=True, slots=True)
class State:
    """What is known of a tenant's flag, for people and monitors.

    Attributes:
        tenant: The tenant.
        enabled: The last known value, whatever its age; None where none was ever read.
        freshness: `fresh`, `stale` or `expired`.
        age_seconds: Seconds since the read of the value started, >= 0; None without a value.
        generation: The generation of the tenant; rises with every invalidation.
        fetched_at: When the read of the value started, in UTC.
        updated_at: When the value was changed at the origin, where the API says so.
        source: `memory` or `store`; `api` from `refresh()`.
        last_error: Why the last read failed; None where it did not fail.
        fresh_seconds: Seconds until the value stops being fresh; negative since then; None without a value.
        failing_since: When reads began to fail; None where they do not fail.
        failures: Failed reads in a row.
        retry_seconds: Seconds until a failed read may be tried again, > 0; None where nothing stands in the way.
    """

    tenant: str
    enabled: bool | None
    freshness: Freshness
    age_seconds: float | None
    generation: int
    fetched_at: datetime | None
    updated_at: datetime | None
    source: Source
    last_error: str | None
    fresh_seconds: float | None = None
    failing_since: datetime | None = None
    failures: int = 0
    retry_seconds: float | None = None


def freshness_of(stale_for_seconds: float, *, failing: bool, windows: Windows) -> Freshness:
    """Return the freshness of a value that stopped being fresh some time ago.

    Args:
        stale_for_seconds: Seconds since then; negative while the value is fresh.
        failing: Whether the last read failed, which is the condition of stale-if-error.
        windows: The windows in force.
    """
    if stale_for_seconds < 0:
        return Freshness.FRESH
    if stale_for_seconds < windows.stale_while_revalidate_seconds:
        return Freshness.STALE
    if failing and stale_for_seconds < windows.stale_if_error_seconds:
        return Freshness.STALE
    return Freshness.EXPIRED


def evaluate(
    tenant: str, entry: Entry, *, now: float, windows: Windows, source: Source, failing: bool = False
) -> Evaluation:
    """Evaluate an entry.

    Args:
        tenant: The tenant.
        entry: Its entry.
        now: The present instant.
        windows: The windows in force.
        source: Where the snapshot of the entry comes from.
        failing: Whether reads count as failing although the entry does not say so: the caller waited for a read that
            did not end.
    """
    ends = stale_at(entry)
    if ends is None:
        return Evaluation(tenant, entry, Freshness.EXPIRED, now, source)
    if not is_current(entry) or not entry.verified:
        ends = min(ends, now)  # the clock of another host may have put the invalidation into our future
    freshness = freshness_of(now - ends, failing=failing or entry.failure is not None, windows=windows)
    return Evaluation(tenant, entry, freshness, ends, source)


def state_of(evaluation: Evaluation, *, now: float) -> State:
    """Return an evaluation in the form for people and monitors."""
    entry, snapshot, failure = evaluation.entry, evaluation.entry.snapshot, evaluation.entry.failure
    retry_seconds = retry_at(entry) - now
    return State(
        tenant=evaluation.tenant,
        enabled=snapshot.enabled if snapshot else None,
        freshness=evaluation.freshness,
        age_seconds=max(0.0, now - snapshot.read_at) if snapshot else None,
        generation=entry.generation,
        fetched_at=snapshot.fetched_at if snapshot else None,
        updated_at=snapshot.updated_at if snapshot else None,
        source=evaluation.source,
        last_error=failure.message if failure else None,
        fresh_seconds=evaluation.fresh_until - now if snapshot else None,
        failing_since=failure.since if failure else None,
        failures=failure.count if failure else 0,
        retry_seconds=retry_seconds if retry_seconds > 0 else None,
    )


def error_of(failure: Failure, *, now: float) -> ReadError:
    """Return a stored failure as an error, also in a process that did not see it happen."""
    wait = None if failure.server_retry_at is None else failure.server_retry_at - now
    return READ_ERRORS.get(failure.kind, ReadError)(
        failure.message, status=failure.status, retry_after_seconds=wait if wait is not None and wait > 0 else None
    )


# -- when to read ---------------------------------------------------------------------------------------------------


def refresh_at(entry: Entry, *, now: float, random: float, spread_seconds: float = 0.0, foreign: bool = False) -> float:
    """Return the instant at which the background reads a tenant next.

    Args:
        entry: The tenant's entry.
        now: The present instant.
        random: A number in [0, 1): spreads the members of a fleet, so that few of them come first.
        spread_seconds: Over how many seconds to spread the members after an event that all of them see: an
            invalidation by another process, a failure.
        foreign: Whether another process read the snapshot. The process that read it reads it again first.
    """
    ends = stale_at(entry)
    is_lost = not entry.verified and is_current(
        entry
    )  # the store does not have the value, so no other process refreshes it
    if ends is None or entry.snapshot is None or entry.failure is not None or ends <= now or is_lost:
        return max(now, retry_at(entry)) + herd_jitter_seconds(spread_seconds, random)
    lifetime_seconds = max(0.0, ends - entry.snapshot.read_at)
    if foreign and spread_seconds > 0 and lifetime_seconds < SHORT_LIFETIME_SECONDS:
        return ends + herd_jitter_seconds(spread_seconds, random)
    return max(now, ends - early_refresh_seconds(lifetime_seconds, random))


def early_refresh_seconds(lifetime_seconds: float, random: float) -> float:
    """Return how many seconds before the end of its lifetime a value is read again in the background.

    At least a fortieth of the lifetime and at most half a second: long enough for a read, so that a steady service
    never serves a stale value, and short enough that the API sees one read per lifetime. An exponential draw comes on
    top (XFetch): of many members a few are first, and the others find the new value.

    Args:
        lifetime_seconds: The freshness lifetime, > 0.
        random: A number in [0, 1).
    """
    return min(1.0, lifetime_seconds / 20) * (0.5 - 0.1 * math.log1p(-random))


def herd_jitter_seconds(spread_seconds: float, random: float) -> float:
    """Return how many seconds a member waits before it acts on an event that all members see.

    The draw of `early_refresh_seconds` reversed: few members act early and most act late, so that the late ones find
    what the early ones did.

    Args:
        spread_seconds: The longest wait, >= 0; 0 where there are no other members.
        random: A number in [0, 1).
    """
    return spread_seconds * max(0.0, 1.0 + math.log1p(-random) / math.log(100_000))


def degraded_jitter_seconds(entry: Entry, *, random: float, windows: Windows, foreign: bool) -> float:
    """Return how many seconds longer a due read waits while the shared store is unavailable.

    Every member then holds the same snapshot and reads for itself. Spread over one lifetime, the members of a fleet
    ask the API no more often than so many single processes. A read that follows an invalidation does not wait.

    Args:
        entry: The entry that is due.
        random: A number in [0, 1).
        windows: The windows in force; the value is served as stale meanwhile.
        foreign: Whether another process read the snapshot.
    """
    if entry.snapshot is None or not foreign or not is_current(entry):
        return 0.0
    return random * min(entry.snapshot.lifetime_seconds, windows.stale_while_revalidate_seconds)


def lease_poll_seconds(waited_seconds: float, remaining_seconds: float, spread_seconds: float, random: float) -> float:
    """Return how many seconds to wait before asking again for a lease that another process holds.

    As long as the process waited already: a lease whose holder died is found after twice its time at most, and a
    fleet that waits for an API that hangs asks a few times per member. After the end of the lease the members ask one
    after the other.

    Args:
        waited_seconds: Seconds since the process asked first, >= 0.
        remaining_seconds: Seconds until the lease ends by itself, >= 0.
        spread_seconds: Over how many seconds to spread the members of a fleet after that, >= 0.
        random: A number in [0, 1).
    """
    latest_seconds = remaining_seconds + herd_jitter_seconds(spread_seconds, random)
    return min(max(LEASE_POLL_SECONDS, waited_seconds), latest_seconds)


def backoff_seconds(failures: int, cap_seconds: float, random: float) -> float:
    """Return how many seconds to wait after the n-th failure in a row: exponential with full jitter, over a floor.

    Args:
        failures: Failed reads in a row, >= 1.
        cap_seconds: The largest span of the jitter; the ttl, so that a failing API is asked as often as a working one.
        random: A number in [0, 1).

    Source: AWS Architecture Blog, "Exponential Backoff And Jitter".
    """
    return BACKOFF_FLOOR_SECONDS + random * min(cap_seconds, 2.0 ** min(failures - 1, 30))
