"""A record and a moment in, an answer out: what may be served now, what a read makes of a record. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum

from external_oms.config import Failure, Reading, Snapshot
from external_oms.errors import READ_ERRORS, LaggingAnswer, MalformedAnswer, ReadError
from external_oms.freshness import (
    Freshness,
    Windows,
    backoff_seconds,
    early_seconds,
    freshness_of,
    settling_lifetime,
    spread_delay_seconds,
)
from external_oms.stores.base import Lease, Record

__all__ = [
    "Answer",
    "Source",
    "State",
    "blocked_until",
    "due_at",
    "error_of",
    "failure_after",
    "is_metered",
    "judge",
    "last_number",
    "parting_seconds",
    "snapshot_after",
    "stale_at",
    "state_of",
    "verdict",
]

SHORT_SECONDS = 20.0
"""From which lifetime on any number of members can draw who reads next: `early_seconds` then spreads them by a tenth
of a second each, which is what a read takes."""


class Source(StrEnum):
    """Where a value came from, for this process."""

    API = "api"
    """Read from the config API for this very call."""
    STORE = "store"
    """Another process read it; this one took it from the shared store."""
    MEMORY = "memory"
    """This process read it earlier."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What may be said of a tenant at one moment.

    Attributes:
        tenant: The tenant.
        record: The record it was judged by.
        freshness: What the snapshot is worth; EXPIRED also where there is none.
        fresh_until: Seconds on the monotonic clock until which FRESH holds, if the record does not change.
        source: Where the snapshot came from.
    """

    tenant: str
    record: Record
    freshness: Freshness
    fresh_until: float
    source: Source

    @property
    def servable(self) -> Snapshot | None:
        """The snapshot to serve, or None where there is nothing that may be served."""
        return None if self.freshness is Freshness.EXPIRED else self.record.snapshot


@dataclass(frozen=True, slots=True)
class State:
    """What is known of a tenant's flag, for people and monitors.

    Attributes:
        tenant: The tenant.
        enabled: The last known value, whatever its age; None where none was ever read.
        freshness: `fresh`, `stale` or `expired`.
        age_seconds: Seconds since the read of the value started; None without a value.
        generation: How many invalidations there were.
        fetched_at: When the read of the value started, in UTC.
        updated_at: When it was changed upstream, where the API says so.
        source: `memory` or `store`; `api` from `refresh()`.
        last_error: Why the last read failed, in words; None where it did not.
        fresh_seconds: Seconds until the value stops being fresh; negative since then; None without a value.
        failing_since: When reads began to fail; None where they do not.
        failures: Failed reads in a row.
        retry_seconds: Seconds until a failed read may be tried again; None where nothing stands in the way.
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


def stale_at(record: Record) -> float | None:
    """When, on the monotonic clock, the record's snapshot stops or stopped being fresh; None without one.

    By age, or by the first invalidation that came after its read started, whichever is earlier: the stale windows
    are counted from there, so no invalidation ever lengthens the time that an old value may be served. Of several,
    only the last has its instant here; the first may have come right after the read started.
    """
    snapshot = record.snapshot
    if snapshot is None:
        return None
    by_age = snapshot.read_at + snapshot.lifetime_seconds
    if snapshot.generation >= record.generation:
        return by_age
    if record.invalidated_at is None or record.generation > snapshot.generation + 1:
        return min(by_age, snapshot.read_at)
    return min(by_age, record.invalidated_at)


def judge(tenant: str, record: Record, *, now: float, windows: Windows, failing: bool = False) -> Answer:
    """What may be served of a record now.

    Args:
        tenant: The tenant.
        record: Its record.
        now: The present moment, seconds on the monotonic clock.
        windows: The windows in force.
        failing: Whether to take reads for failing though the record does not say so: the caller waited in vain.
    """
    source = Source.STORE if record.foreign else Source.MEMORY
    ends = stale_at(record)
    if ends is None or record.snapshot is None:
        return Answer(tenant, record, Freshness.EXPIRED, now, source)
    if record.snapshot.generation < record.generation:
        ends = min(ends, now)  # never fresh, though another host's clock has put the invalidation into our future
    freshness = freshness_of(now - ends, failing=failing or record.failure is not None, windows=windows)
    return Answer(tenant, record, freshness, ends, source)


def state_of(answer: Answer, *, now: float) -> State:
    """The answer as people and monitors want it."""
    record, snapshot, failure = answer.record, answer.record.snapshot, answer.record.failure
    retry = blocked_until(record) - now
    return State(
        tenant=answer.tenant,
        enabled=snapshot.enabled if snapshot else None,
        freshness=answer.freshness,
        age_seconds=max(0.0, now - snapshot.read_at) if snapshot else None,
        generation=record.generation,
        fetched_at=snapshot.fetched_at if snapshot else None,
        updated_at=snapshot.updated_at if snapshot else None,
        source=answer.source,
        last_error=failure.message if failure else None,
        fresh_seconds=answer.fresh_until - now if snapshot else None,
        failing_since=failure.since if failure else None,
        failures=failure.count if failure else 0,
        retry_seconds=retry if retry > 0 else None,
    )


def last_number(record: Record) -> int:
    """The number of the last read whose result or failure the record holds; 0 where there was none."""
    numbers = [part.read_number for part in (record.snapshot, record.failure) if part is not None]
    return max(numbers, default=0)


def blocked_until(record: Record) -> float:
    """Before when, on the monotonic clock, no read is to be tried; minus infinity where nothing stands in the way.

    An invalidation ends our own patience, for something may have changed; not a wait that the API asked for.
    """
    failure = record.failure
    if failure is None or (failure.generation < record.generation and not failure.obliged):
        return float("-inf")
    return failure.not_before


def verdict(record: Record, *, newer_than: int, forced: bool, now: float) -> tuple[bool, ReadError | None]:
    """Whether the record makes a read needless or forbids it, and with which error.

    Args:
        record: The tenant's record.
        newer_than: The number that the read must exceed.
        forced: Whether our own patience does not bind; a wait that the API asked for always does.
        now: The present moment, seconds on the monotonic clock.
    """
    snapshot, failure = record.snapshot, record.failure
    if failure is not None:
        answers = failure.read_number > newer_than and failure.generation >= record.generation
        forbids = blocked_until(record) > now and (failure.obliged or not forced)
        if answers or forbids:
            return True, error_of(failure, now=now)
    ends = stale_at(record)
    if snapshot is None or ends is None:
        return False, None
    return snapshot.read_number > newer_than and snapshot.generation >= record.generation and now < ends, None


def is_metered(record: Record) -> bool:
    """Whether the next read is caused by an invalidation, and so takes a token from the bucket."""
    known = [part.generation for part in (record.snapshot, record.failure) if part is not None]
    return record.reads > 0 and record.generation > max(known, default=0)


def due_at(record: Record, *, now: float, random: float, spread_seconds: float = 0.0) -> float:
    """When, on the monotonic clock, the background should read next.

    In a fleet, whoever made the last of the short looks makes the next one; the others follow where it did not.

    Args:
        record: The tenant's record.
        now: The present moment.
        random: A number in [0, 1): spreads the members of a fleet, so that a few of them are first.
        spread_seconds: Over how long to spread what all members learn at once: an invalidation, a failure.
    """
    ends = stale_at(record)
    if ends is None or record.snapshot is None or record.failure is not None or ends <= now:
        return max(now, blocked_until(record)) + spread_delay_seconds(spread_seconds, random)
    if record.foreign and spread_seconds > 0 and record.snapshot.lifetime_seconds < SHORT_SECONDS:
        # the early draws of so short a lifetime lie closer together than a read takes: all would be first
        return ends + spread_delay_seconds(spread_seconds, random)
    return max(now, ends - early_seconds(record.snapshot.lifetime_seconds, random))


def parting_seconds(record: Record, *, random: float, windows: Windows) -> float:
    """How much longer a process waits whose read is due and whose store is away, so that it has to read by itself.

    All who share the store hold the same snapshot, and cannot see any more that others read it. Spread over a lifetime
    they ask no more often than so many single processes, now and, as each goes on from its own read, ever after;
    meanwhile the value is served as stale, for as long as it may be. What an invalidation made stale is not put off.

    Args:
        record: The record that is due.
        random: A number in [0, 1).
        windows: The windows in force.
    """
    if record.snapshot is None or not record.foreign or record.snapshot.generation < record.generation:
        return 0.0
    return random * min(record.snapshot.lifetime_seconds, windows.stale_while_revalidate_seconds)


def snapshot_after(
    lease: Lease, reading: Reading, *, read_at: float, fetched_at_wall: float, ttl_seconds: float
) -> Snapshot:
    """The snapshot that a successful read under a lease makes.

    Args:
        lease: The lease under which the read ran.
        reading: What it gave.
        read_at: When it started, on the monotonic clock.
        fetched_at_wall: The same moment, seconds since the Unix epoch.
        ttl_seconds: The whole freshness lifetime.

    Raises:
        LaggingAnswer: The answer is older than the stored one, and that one is too old to go on with.
        MalformedAnswer: The API validated a snapshot that nobody has.
    """
    record, known = lease.record, lease.record.snapshot
    since = None if record.invalidated_at is None else max(0.0, read_at - record.invalidated_at)
    lifetime_seconds = settling_lifetime(ttl_seconds, since)
    fetched_at = datetime.fromtimestamp(fetched_at_wall, UTC)
    if reading.document is None:
        if known is None:
            raise MalformedAnswer("the config API answered 304 to a request that asked for no validation")
        return replace(
            known,
            etag=reading.etag or known.etag,
            generation=record.generation,
            read_number=lease.number,
            read_at=read_at,
            fetched_at=fetched_at,
            lifetime_seconds=lifetime_seconds,
        )
    said, had = reading.document.updated_at, known.updated_at if known else None
    if known is not None and said is not None and had is not None and said < had:
        return _outlasting(known, lease, read_at=read_at, lifetime_seconds=lifetime_seconds, ttl_seconds=ttl_seconds)
    return Snapshot(
        enabled=reading.document.enabled,
        updated_at=said,
        etag=reading.etag,
        generation=record.generation,
        read_number=lease.number,
        read_at=read_at,
        fetched_at=fetched_at,
        lifetime_seconds=lifetime_seconds,
    )


def _outlasting(
    known: Snapshot, lease: Lease, *, read_at: float, lifetime_seconds: float, ttl_seconds: float
) -> Snapshot:
    """The newer snapshot that a lagging answer does not replace: kept, looked at again soon, never past its ttl."""
    extended = min(ttl_seconds, read_at - known.read_at + lifetime_seconds)
    ends = known.read_at + extended
    # the background looks a little early: what is kept for less than that would be looked at again at once
    if known.generation < lease.record.generation or ends - read_at <= 2 * early_seconds(extended, 0.0):
        raise LaggingAnswer(
            "the config API answers with an older updated_at than before; a replica lags, or its data was restored"
        )
    return replace(known, read_number=lease.number, lifetime_seconds=extended)


def failure_after(
    lease: Lease, error: ReadError, *, now: float, now_wall: float, cap_seconds: float, random: float
) -> Failure:
    """The failure that an unsuccessful read under a lease makes.

    Args:
        lease: The lease under which the read ran.
        error: Why it failed.
        now: When it failed, on the monotonic clock.
        now_wall: The same moment, seconds since the Unix epoch.
        cap_seconds: The largest span of the jitter.
        random: A number in [0, 1).
    """
    before = lease.record.failure
    count = before.count + 1 if before else 1
    asked = error.retry_after_seconds
    own = backoff_seconds(count, cap_seconds, random)
    return Failure(
        kind=error.kind,
        message=str(error),
        status=error.status,
        count=count,
        read_number=lease.number,
        generation=lease.record.generation,
        failed_at=now,
        since=before.since if before else datetime.fromtimestamp(now_wall, UTC),
        not_before=now + max(own, asked or 0.0),
        obliged=asked is not None,
    )


def error_of(failure: Failure, *, now: float) -> ReadError:
    """The failure as an error again, also in a process that did not see it happen."""
    wait = failure.not_before - now
    return READ_ERRORS.get(failure.kind, ReadError)(
        failure.message, status=failure.status, retry_after_seconds=wait if failure.obliged and wait > 0 else None
    )
