"""The cache entry of one tenant and its transitions, as pure functions `(entry, moment) -> Change`.

A store holds one `Entry` per tenant. Every change of an entry is one of the transitions below, and every store runs
them in one atomic step: under a lock (memory), inside a transaction (SQLite) or by compare-and-set (Redis). The rules
of the cache therefore exist once.

::

    invalidate   raises the generation: no value read before it is fresh any more
    begin_read   grants the lease for one read of the config API, or says why not
    commit       stores the value that the read returned, and ends the lease
    fail         stores why the read failed, and ends the lease
    release      ends the lease without a result

Two rules hold in every transition:

*Fencing.* A lease carries the generation under which its read began. `commit` stores a value of an older generation
with that older generation, so that the value is stale from the start; it can never be fresh again. A lease that was
replaced by a later one commits nothing (Kleppmann, "How to do distributed locking", 2016; memcache leases: Nishtala et
al., NSDI 2013, section 3.2.1).

*Age.* The age of a value counts from the start of its read, because the origin may have produced the answer at any
moment after that (RFC 9111 section 4.2.3).

All instants are seconds on the clock of the process that runs the transition; a store that is shared by several hosts
converts them with `shift`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Generic, Protocol, TypeVar

from external_oms.config import Reading
from external_oms.errors import LaggingAnswer, MalformedAnswer
from external_oms.records import FIRST_VALUE, Cause, Event

__all__ = [
    "BackedOff",
    "Busy",
    "Change",
    "Entry",
    "Failure",
    "Granted",
    "Invalidated",
    "Invalidation",
    "Lease",
    "Moment",
    "Paced",
    "ReadOutcome",
    "Satisfied",
    "Snapshot",
    "Transition",
    "begin_read",
    "commit",
    "fail",
    "invalidate",
    "last_token",
    "release",
    "retry_at",
    "settling_lifetime",
    "shift",
    "stale_at",
]

SETTLING_FLOOR_SECONDS = 1.0
"""The shortest freshness lifetime after an invalidation: some endpoints of the API allow one request a second."""

PACE_SECONDS = 1.0
"""The least time between the starts of two reads that invalidations cause: the same limit of one request a second."""

PACE_BURST = 3
"""Reads that invalidations cause at once before `PACE_SECONDS` applies: a change is often announced two or three times
within a moment, and the last announcement should not wait."""

UPDATED_AT_TOLERANCE = timedelta(minutes=5)
"""How far ahead of our clock an `updated_at` may be. One that is further ahead is a mistake, and believing it would
make every later answer look older."""

LEASE_LIFE_FACTOR = 10.0
"""A stored lease that lives longer than this many times the caller's own lease is damaged and counts as ended."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A value of the flag, with everything that is needed to tell its age.

    Attributes:
        enabled: The value.
        updated_at: When the value was changed at the origin, where the API says so; in UTC.
        etag: The validator for a conditional read, where the API sent one.
        generation: The generation of the tenant when the read started.
        token: The fencing token of the read; a later read has a higher one.
        read_at: When the read started.
        fetched_at: The same moment on the wall clock, in UTC, for people.
        lifetime_seconds: The freshness lifetime, counted from `read_at`; > 0.
        writer: The process that read it, as the store names processes.
    """

    enabled: bool
    updated_at: datetime | None
    etag: str | None
    generation: int
    token: int
    read_at: float
    fetched_at: datetime
    lifetime_seconds: float
    writer: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """The last of a row of failed reads.

    Attributes:
        kind: The `kind` of the read error.
        message: The text of the read error.
        status: The HTTP status, where there was one.
        count: Failed reads in a row, >= 1.
        generation: The generation of the tenant when the read started.
        token: The fencing token of the read.
        failed_at: When the read failed.
        since: When the first read of the row failed, on the wall clock, in UTC.
        retry_at: The end of our own back-off. An invalidation ends it early.
        server_retry_at: The end of the wait that the API asked for with Retry-After; None where it did not ask. Nothing
            ends it early.
    """

    kind: str
    message: str
    status: int | None
    count: int
    generation: int
    token: int
    failed_at: float
    since: datetime
    retry_at: float
    server_retry_at: float | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to read the API for a tenant.

    Attributes:
        token: The fencing token: rises with every lease of the tenant.
        holder: The process that holds it, as the store names processes.
        generation: The generation of the tenant when the lease was granted.
        expires_at: When the lease ends by itself, because its holder died.
        overtaken_at: When the first invalidation since the grant happened; None without one.
    """

    token: int
    holder: str
    generation: int
    expires_at: float
    overtaken_at: float | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """Everything that a store knows about a tenant at one moment.

    Attributes:
        generation: Rises with every invalidation.
        invalidated_at: When the last invalidation happened; None without one.
        stale_since: When the first invalidation happened that the read of `snapshot` did not follow; None without one.
            The stale windows count from here, so a second invalidation never makes a value worse.
        token: The fencing token of the last lease.
        paced_until: The theoretical arrival time of the next read that an invalidation causes (GCRA).
        snapshot: The last stored value, whatever its age.
        failure: The last failure, where the last read failed.
        lease: The last lease that was granted, until its result is stored.
        verified: Whether the entry is known to be the one in the shared store. A process that could not check, for
            example after a fork, serves the value as stale until it is read. Never stored.
    """

    generation: int = 0
    invalidated_at: float | None = None
    stale_since: float | None = None
    token: int = 0
    paced_until: float = 0.0
    snapshot: Snapshot | None = None
    failure: Failure | None = None
    lease: Lease | None = None
    verified: bool = True


@dataclass(frozen=True, slots=True)
class Moment:
    """The circumstances of a transition, provided by the store that runs it.

    Attributes:
        now: The present instant, on the clock of the instants of the entry.
        floor: The least number for a new generation or token. A store that may lose its data passes its own time in
            milliseconds, so that numbers keep rising; 0 elsewhere.
        seen: Which of the delivery ids that were given with the transition the store already holds.
    """

    now: float
    floor: int = 0
    seen: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Change(Generic[T_co]):
    """What a transition makes of an entry.

    Attributes:
        entry: The new entry; the same object where nothing changes, and then the store writes nothing.
        result: What the caller gets.
        events: History rows, stored in the same atomic step.
        claims: Delivery ids to remember, stored in the same atomic step.
    """

    entry: Entry
    result: T_co
    events: tuple[Event, ...] = ()
    claims: tuple[str, ...] = ()


class Transition(Protocol[T_co]):
    """A pure function over an entry. A store may call it more than once, and applies its last result."""

    def __call__(self, entry: Entry, moment: Moment, /) -> Change[T_co]:
        """Return what becomes of the entry."""
        ...


# -- what an entry says ---------------------------------------------------------------------------------------------


def stale_at(entry: Entry) -> float | None:
    """Return the instant at which the snapshot stops, or stopped, being fresh; None without a snapshot.

    It is the end of the freshness lifetime, or the first invalidation that the read did not follow, whichever is
    earlier.
    """
    snapshot = entry.snapshot
    if snapshot is None:
        return None
    by_age = snapshot.read_at + snapshot.lifetime_seconds
    return by_age if entry.stale_since is None else min(by_age, entry.stale_since)


def is_current(entry: Entry) -> bool:
    """Return whether the snapshot exists and no invalidation came after its read began."""
    return entry.snapshot is not None and entry.snapshot.generation >= entry.generation


def retry_at(entry: Entry) -> float:
    """Return the instant before which no read is tried; minus infinity where nothing stands in the way.

    An invalidation ends our own back-off, since something may have changed at the origin. It does not end a wait that
    the API asked for.
    """
    failure = entry.failure
    if failure is None:
        return float("-inf")
    own = failure.retry_at if failure.generation >= entry.generation else float("-inf")
    return own if failure.server_retry_at is None else max(own, failure.server_retry_at)


def last_token(entry: Entry) -> int:
    """Return the token of the last read whose result or failure the entry holds; 0 without one."""
    return max((part.token for part in (entry.snapshot, entry.failure) if part is not None), default=0)


def settling_lifetime(ttl_seconds: float, since_invalidation_seconds: float | None) -> float:
    """Return the freshness lifetime in seconds of a value that was read some time after an invalidation.

    The API may answer with the old value for a moment after a change was announced. So the value is read again after
    1 s, 1 s, 2 s, 4 s and so on, until the whole lifetime applies.

    Args:
        ttl_seconds: The whole freshness lifetime, > 0.
        since_invalidation_seconds: Seconds from the last invalidation to the start of the read, >= 0; None without one.
    """
    if since_invalidation_seconds is None:
        return ttl_seconds
    return min(ttl_seconds, max(SETTLING_FLOOR_SECONDS, since_invalidation_seconds))


# -- invalidate -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Invalidation:
    """One request to invalidate.

    Attributes:
        event: The history row that records it; None where the caller records it otherwise.
        delivery_id: The id that makes a repetition a duplicate; None where every call counts.
    """

    event: Event | None = None
    delivery_id: str | None = None


@dataclass(frozen=True, slots=True)
class Invalidated:
    """The result of an invalidation.

    Attributes:
        generation: The generation of the tenant afterwards.
        duplicate: Whether the delivery id was seen before; then the request changed nothing.
    """

    generation: int
    duplicate: bool = False


def invalidate(
    entry: Entry, moment: Moment, requests: Sequence[Invalidation], *, at_least: int = 0
) -> Change[tuple[Invalidated, ...]]:
    """Raise the generation by a batch of requests, of which repeated deliveries change nothing.

    Args:
        entry: The entry.
        moment: The circumstances; `seen` holds the delivery ids of the batch that the store knows.
        requests: What is asked for, >= 1 request; all of them get the generation after the last one.
        at_least: The least new generation, for a process that knows a higher one than the store.

    Returns:
        One `Invalidated` per request, in order.
    """
    claimed: list[str] = []
    duplicates: list[bool] = []
    for request in requests:
        duplicate = request.delivery_id is not None and (
            request.delivery_id in moment.seen or request.delivery_id in claimed
        )
        duplicates.append(duplicate)
        if request.delivery_id is not None and not duplicate:
            claimed.append(request.delivery_id)
    if all(duplicates):
        return Change(entry, tuple(Invalidated(entry.generation, duplicate=True) for _ in requests))
    generation = max(entry.generation + duplicates.count(False), moment.floor, at_least)
    lease = entry.lease
    if lease is not None and lease.overtaken_at is None:
        lease = replace(lease, overtaken_at=moment.now)
    raised = replace(
        entry,
        generation=generation,
        invalidated_at=moment.now,
        stale_since=moment.now if entry.stale_since is None else entry.stale_since,
        lease=lease,
    )
    return Change(
        raised,
        tuple(Invalidated(generation, duplicate) for duplicate in duplicates),
        tuple(
            replace(request.event, detail=request.event.detail or f"generation {generation}")
            for request, duplicate in zip(requests, duplicates, strict=True)
            if request.event is not None and not duplicate
        ),
        tuple(claimed),
    )


# -- read -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Granted:
    """The lease was granted: read the API, then `commit`, `fail` or `release`.

    Attributes:
        lease: The lease.
        entry: The entry under which the read runs; its snapshot has the validator for a conditional read.
    """

    lease: Lease
    entry: Entry


@dataclass(frozen=True, slots=True)
class Busy:
    """Another holder has the lease.

    Attributes:
        token: The fencing token of its read.
        holder: The holder.
        remaining_seconds: Seconds until the lease ends by itself, > 0.
    """

    token: int
    holder: str
    remaining_seconds: float


@dataclass(frozen=True, slots=True)
class Paced:
    """Invalidations already caused as many reads as they may; the next one may start later.

    Attributes:
        wait_seconds: Seconds until then, > 0.
    """

    wait_seconds: float


@dataclass(frozen=True, slots=True)
class BackedOff:
    """A failed read keeps reads from being tried for now.

    Attributes:
        failure: The failure.
    """

    failure: Failure


@dataclass(frozen=True, slots=True)
class Satisfied:
    """The entry already holds the result that the caller wants.

    Attributes:
        failure: The failure, where that is the result; None where a value is.
    """

    failure: Failure | None = None


ReadOutcome = Granted | Busy | Paced | BackedOff | Satisfied


def begin_read(
    entry: Entry,
    moment: Moment,
    *,
    holder: str,
    lease_seconds: float,
    newer_than: int,
    forced: bool = False,
    dead_holder: str | None = None,
) -> Change[ReadOutcome]:
    """Grant the lease for a read, unless the entry makes the read needless or forbids it.

    Args:
        entry: The entry.
        moment: The circumstances.
        holder: The process that asks.
        lease_seconds: The life of the lease, > 0: the longest that a read lasts, and time to store its result.
        newer_than: The fencing token that a stored result must exceed to make the read needless.
        forced: Whether to read although our own back-off or the pace forbids it. A wait that the API asked for always
            holds.
        dead_holder: A holder that is known to have ended; its lease is void.
    """
    now, snapshot, failure = moment.now, entry.snapshot, entry.failure
    if failure is not None:
        if failure.token > newer_than and (forced or failure.generation >= entry.generation):
            return Change(entry, Satisfied(failure))
        asked = failure.server_retry_at if forced else retry_at(entry)
        if asked is not None and asked > now:
            return Change(entry, BackedOff(failure))
    # a forced read wants a result that is newer than the call, also where an invalidation has followed
    if snapshot is not None and snapshot.token > newer_than and (forced or _is_fresh(entry, now)):
        return Change(entry, Satisfied())
    held = entry.lease
    if held is not None and held.holder not in {holder, dead_holder}:  # one process has one read per tenant at most
        remaining = held.expires_at - now
        if 0 < remaining <= LEASE_LIFE_FACTOR * lease_seconds:
            return Change(entry, Busy(held.token, held.holder, remaining))
    paced_until = entry.paced_until
    if _is_caused_by_invalidation(entry) and not forced:
        # GCRA: a read is allowed where the theoretical arrival time is at most the burst ahead
        earliest = min(
            max(paced_until, now), now + PACE_BURST * PACE_SECONDS
        )  # a damaged value delays no read for long
        wait_seconds = earliest - now - (PACE_BURST - 1) * PACE_SECONDS
        if wait_seconds > 0:
            return Change(entry, Paced(wait_seconds))
        paced_until = earliest + PACE_SECONDS
    token = max(entry.token + 1, moment.floor)
    lease = Lease(token, holder, entry.generation, now + lease_seconds)
    leased = replace(entry, token=token, lease=lease, paced_until=paced_until)
    return Change(leased, Granted(lease, leased))


def _is_fresh(entry: Entry, now: float) -> bool:
    ends = stale_at(entry)
    return ends is not None and is_current(entry) and now < ends


def _is_caused_by_invalidation(entry: Entry) -> bool:
    known = [part.generation for part in (entry.snapshot, entry.failure) if part is not None]
    return bool(known) and entry.generation > max(known)


def commit(  # noqa: PLR0913 - what a read leaves, each part by its name
    entry: Entry,
    moment: Moment,
    *,
    lease: Lease,
    reading: Reading,
    read_at: float,
    fetched_at: datetime,
    ttl_seconds: float,
    hard_limit_seconds: float,
    tenant: str,
    latency_seconds: float,
) -> Change[Snapshot | None]:
    """Store the value that a read returned and end its lease.

    An invalidation that came during the read leaves the value stale, with the generation under which its read began:
    a series of deliveries then still moves the served value forward, and none of these values is ever fresh.

    Args:
        entry: The entry.
        moment: The circumstances.
        lease: The lease under which the read ran.
        reading: What the API answered.
        read_at: When the read started.
        fetched_at: The same moment on the wall clock, in UTC.
        ttl_seconds: The whole freshness lifetime, > 0.
        hard_limit_seconds: The age from which a value is expired whatever happens, > 0: a value as old as that is
            replaced even by an answer with an older `updated_at`.
        tenant: The tenant, for the history.
        latency_seconds: How long the read took, >= 0, for the history.

    Returns:
        The snapshot that the entry now holds; None where a later lease replaced this one, and nothing was stored.

    Raises:
        LaggingAnswer: The answer is older than the stored value, which is too old to go on with.
        MalformedAnswer: The API answered 304, and there is no value that it could confirm.
    """
    if not _holds(entry, lease):
        return Change(entry, None)
    known = entry.snapshot
    overtaken_at = entry.lease.overtaken_at if entry.lease is not None else None
    since = None if entry.invalidated_at is None else max(0.0, read_at - entry.invalidated_at)
    lifetime_seconds = settling_lifetime(ttl_seconds, since)
    if reading.document is None:
        if known is None:
            raise MalformedAnswer("the config API answered 304 to a request without a validator")
        enabled, updated_at, etag = known.enabled, known.updated_at, reading.etag or known.etag
    else:
        enabled, updated_at, etag = reading.document.enabled, reading.document.updated_at, reading.etag
    if updated_at is not None and updated_at > fetched_at + UPDATED_AT_TOLERANCE:
        updated_at = None
    snapshot = Snapshot(
        enabled, updated_at, etag, lease.generation, lease.token, read_at, fetched_at, lifetime_seconds, lease.holder
    )
    if known is not None and _is_older(snapshot, known) and moment.now - known.read_at < hard_limit_seconds:
        snapshot = _extend(known, entry, lease, read_at=read_at, lifetime_seconds=lifetime_seconds, ttl=ttl_seconds)
        overtaken_at = entry.stale_since
    stored = replace(entry, snapshot=snapshot, failure=None, lease=None, stale_since=overtaken_at, verified=True)
    ended_at = fetched_at + timedelta(seconds=latency_seconds)
    return Change(stored, snapshot, _read_events(entry, snapshot, tenant, ended_at, latency_seconds))


def _holds(entry: Entry, lease: Lease) -> bool:
    """Return whether the lease is the last one that was granted and its result is not yet stored."""
    return entry.lease is not None and (entry.lease.token, entry.lease.holder) == (lease.token, lease.holder)


def _is_older(snapshot: Snapshot, known: Snapshot) -> bool:
    return snapshot.updated_at is not None and known.updated_at is not None and snapshot.updated_at < known.updated_at


def _extend(
    known: Snapshot, entry: Entry, lease: Lease, *, read_at: float, lifetime_seconds: float, ttl: float
) -> Snapshot:
    """Return the known, newer value with its lifetime extended by one more short period, at most to its ttl.

    Raises:
        LaggingAnswer: The known value is of an older generation, or at the end of its ttl.
    """
    extended = min(ttl, read_at - known.read_at + lifetime_seconds)
    ends = known.read_at + extended
    # a value that ends sooner than the background reads ahead would be read again at once
    if known.generation < entry.generation or ends - read_at < min(SETTLING_FLOOR_SECONDS, ttl / 2):
        raise LaggingAnswer(
            "the config API answers with an older updated_at than before; a replica lags, or its data was restored"
        )
    return replace(known, token=lease.token, lifetime_seconds=extended)


def _read_events(
    entry: Entry, snapshot: Snapshot, tenant: str, at: datetime, latency_seconds: float
) -> tuple[Event, ...]:
    events = []
    if entry.failure is not None:
        count = entry.failure.count
        events.append(
            Event(
                at=at,
                tenant=tenant,
                cause=Cause.RECOVERED,
                enabled=snapshot.enabled,
                latency_seconds=latency_seconds,
                detail=f"after {count} failed read{'' if count == 1 else 's'}",
            )
        )
    if entry.snapshot is None or entry.snapshot.enabled is not snapshot.enabled:
        events.append(
            Event(
                at=at,
                tenant=tenant,
                cause=Cause.CHANGED,
                enabled=snapshot.enabled,
                latency_seconds=latency_seconds,
                detail=FIRST_VALUE if entry.snapshot is None else "the value changed",
            )
        )
    return tuple(events)


def fail(  # noqa: PLR0913 - as `commit`
    entry: Entry,
    moment: Moment,
    *,
    lease: Lease,
    kind: str,
    message: str,
    status: int | None,
    backoff_seconds: float,
    server_wait_seconds: float | None,
    wall: float,
    tenant: str,
    latency_seconds: float,
) -> Change[Failure | None]:
    """Store that a read failed and end its lease; the snapshot stays.

    Args:
        entry: The entry.
        moment: The circumstances.
        lease: The lease under which the read ran.
        kind: The `kind` of the read error.
        message: The text of the read error.
        status: The HTTP status, where there was one.
        backoff_seconds: Our own wait before the next try, >= 0.
        server_wait_seconds: The wait that the API asked for, >= 0; None where it did not ask.
        wall: The present moment in seconds since the Unix epoch.
        tenant: The tenant, for the history.
        latency_seconds: How long the read took, >= 0, for the history.

    Returns:
        The stored failure; None where a later lease replaced this one, and nothing was stored.
    """
    if not _holds(entry, lease):
        return Change(entry, None)
    before = entry.failure
    at = datetime.fromtimestamp(wall, UTC)
    failure = Failure(
        kind=kind,
        message=message,
        status=status,
        count=before.count + 1 if before else 1,
        generation=lease.generation,
        token=lease.token,
        failed_at=moment.now,
        since=before.since if before else at,
        retry_at=moment.now + backoff_seconds,
        server_retry_at=None if server_wait_seconds is None else moment.now + server_wait_seconds,
    )
    events: tuple[Event, ...] = ()
    if before is None:
        events = (
            Event(at=at, tenant=tenant, cause=Cause.FAILED, latency_seconds=latency_seconds, detail=failure.message),
        )
    return Change(replace(entry, failure=failure, lease=None), failure, events)


def release(entry: Entry, moment: Moment, *, lease: Lease) -> Change[None]:  # noqa: ARG001 - the form of a transition
    """End a lease without a result."""
    return Change(replace(entry, lease=None) if _holds(entry, lease) else entry, None)


# -- clocks ---------------------------------------------------------------------------------------------------------


def shift(entry: Entry, seconds: float) -> Entry:
    """Return the entry with every instant moved by so many seconds: from one clock to another."""
    snapshot, failure, lease = entry.snapshot, entry.failure, entry.lease
    return replace(
        entry,
        invalidated_at=_moved(entry.invalidated_at, seconds),
        stale_since=_moved(entry.stale_since, seconds),
        paced_until=entry.paced_until + seconds,
        snapshot=snapshot and replace(snapshot, read_at=snapshot.read_at + seconds),
        failure=failure
        and replace(
            failure,
            failed_at=failure.failed_at + seconds,
            retry_at=failure.retry_at + seconds,
            server_retry_at=_moved(failure.server_retry_at, seconds),
        ),
        lease=lease
        and replace(lease, expires_at=lease.expires_at + seconds, overtaken_at=_moved(lease.overtaken_at, seconds)),
    )


def _moved(instant: float | None, seconds: float) -> float | None:
    return None if instant is None else instant + seconds
