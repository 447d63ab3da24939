"""The store's contract: what every store promises, in words; the one set of contract tests holds each to it.

A store keeps one `Record` per tenant, shared by all who use the store. Three laws:

1. **The fence.** `generation` only rises. `put` and `fail` name the lease under which the read ran; a read that began
   under an older generation is refused, in whichever process either happens.
2. **One lease.** Per tenant at most one lease is held. It ends by `put`, `fail` or `release`, or by itself after its
   stated life when its holder dies. Each lease has a number, and numbers only rise: a higher number began later.
3. **The word.** Every change of a record changes the word that `watch` points to, *after* the change can be loaded.
   Reading the word takes no lock, no system call and no I/O, so an evaluation can afford it.

Instants (`read_at`, `invalidated_at`, `failed_at`, `not_before`) are seconds on the caller's monotonic clock; a store
that outlives a boot or spans hosts converts them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from external_oms.config import Failure, Snapshot

__all__ = ["Acquired", "Busy", "Cause", "Event", "Health", "Lease", "Member", "Metered", "Record", "Store"]


@dataclass(frozen=True, slots=True)
class Record:
    """What the store knows of a tenant at one moment.

    Attributes:
        generation: How many invalidations there were; only rises.
        invalidated_at: When the last of them happened; None where there was none.
        reads: The number of the last lease given; only rises.
        snapshot: The last stored snapshot, whatever its age.
        failure: The last failure, where the last read that ended has failed.
        foreign: Whether another process stored the snapshot.
    """

    generation: int = 0
    invalidated_at: float | None = None
    reads: int = 0
    snapshot: Snapshot | None = None
    failure: Failure | None = None
    foreign: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to read the API for a tenant, until `put`, `fail`, `release` or the end of its life.

    Attributes:
        tenant: The tenant.
        number: The number of this read; the fencing token.
        record: The record at the moment of the lease; its generation is the one the read belongs to.
    """

    tenant: str
    number: int
    record: Record


@dataclass(frozen=True, slots=True)
class Busy:
    """Another holder has the lease.

    Attributes:
        number: The number of its read.
        remaining_seconds: Seconds until its life ends by itself, >= 0.
    """

    number: int
    remaining_seconds: float


@dataclass(frozen=True, slots=True)
class Metered:
    """The bucket that meters reads caused by invalidations is empty.

    Attributes:
        wait_seconds: Seconds until it has a token again, > 0.
    """

    wait_seconds: float


Acquired = Lease | Busy | Metered


class Cause(StrEnum):
    """What a row of history is about."""

    CHANGED = "changed"
    """A read gave another value than the one before."""
    DELIVERY = "delivery"
    """A delivery arrived; `detail` says whether it was a duplicate and whether the API was read."""
    INVALIDATED = "invalidated"
    """Somebody invalidated without a delivery."""
    WRITE = "write"
    """Somebody wrote a value to the API; `detail` says with what result."""
    FAILED = "failed"
    """Reads began to fail."""
    RECOVERED = "recovered"
    """Reads work again."""
    STORE = "store"
    """The store itself was set aside, lost or found again."""


@dataclass(frozen=True, slots=True)
class Event:
    """One row of history.

    Attributes:
        at: When, on the wall clock, in UTC.
        tenant: The tenant.
        cause: What it is about.
        enabled: The value after it, where known.
        actor: Who caused it: a key's name, `webhook`, `api`; empty where nobody did.
        delivery_id: The `webhook-id`, where there was one.
        latency_seconds: How long it took, where that means something.
        detail: One sentence for people.
        id: The row's number in the store; higher is later; 0 before it is stored.
    """

    at: datetime
    tenant: str
    cause: Cause
    enabled: bool | None = None
    actor: str = ""
    delivery_id: str = ""
    latency_seconds: float | None = None
    detail: str = ""
    id: int = 0


@dataclass(frozen=True, slots=True)
class Health:
    """What the store says of itself.

    Attributes:
        ok: Whether it is shared as configured.
        problem: In one sentence what is wrong and what to do; empty where it is ok.
    """

    ok: bool = True
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """What one process serves, as it reports to the store, so that one that lags is seen.

    Attributes:
        name: `host:pid`.
        tenant: The tenant.
        generation: The generation of the value that it serves.
        enabled: That value, or None.
        freshness: `fresh`, `stale` or `expired`.
        age_seconds: Seconds since the read of that value started, at the time of the report; None without one.
        seen_seconds: Seconds since the report.
    """

    name: str
    tenant: str
    generation: int
    enabled: bool | None
    freshness: str
    age_seconds: float | None
    seen_seconds: float = field(default=0.0)


class Store(Protocol):
    """Where the records live. Every method may be called from any thread and, after a fork, from the child.

    Only `watch` and reading its word are for the hot path. `load` is for an evaluation that saw the word change:
    it may read a local file, it never touches a socket and never waits for another process.
    The rest belongs on reader threads; each ends within a bounded time.
    A store that is out of order does not raise from these methods: it works in memory, as one process, says so in
    `health`, logs it once, and heals by itself.
    """

    kind: str
    """`memory`, `sqlite` or `redis`."""

    poll_seconds: float | None
    """How often `changed` wants to be asked, in seconds; None where nobody else can change anything."""

    spread_seconds: float
    """Over how long members spread their look into what all learn at once, in seconds; 0 where they are few."""

    def watch(self, tenant: str) -> tuple[Sequence[int], int]:
        """The word that changes with the tenant's record, as a sequence and the index in it.

        A word may move, as when a damaged file is replaced. The old one is changed then, for the last time; so whoever
        sees a word change asks for its place again, and remembers what stands there, before the record is loaded.
        """
        ...

    def load(self, tenant: str) -> Record:
        """The record as it stands."""
        ...

    def invalidate(self, tenant: str) -> int:
        """Raise the generation; returns it. Durable before it returns, visible to all within the store's bound."""
        ...

    def acquire(self, tenant: str, *, seconds: float, metered: bool) -> Acquired:
        """Try to get the lease; never waits.

        Args:
            tenant: The tenant.
            seconds: The life of the lease, should its holder die.
            metered: Whether this read is caused by an invalidation and must take a token from the bucket.
        """
        ...

    def put(self, lease: Lease, snapshot: Snapshot) -> bool:
        """Store what the read gave and end the lease; clears the failure.

        Returns False, and stores nothing, where the generation has risen since the lease was given, or a later lease
        has been given meanwhile. Raises nothing.
        """
        ...

    def fail(self, lease: Lease, failure: Failure) -> bool:
        """Store that the read failed and end the lease; the snapshot stays. Refused like `put`."""
        ...

    def release(self, lease: Lease) -> None:
        """End the lease without a result."""
        ...

    def wait(self, tenant: str, word: int, seconds: float) -> None:
        """Return when the tenant's word is no longer `word`, at the latest after so many seconds."""
        ...

    def changed(self) -> Sequence[str]:
        """The tenants whose record another process changed since the last call; never waits."""
        ...

    def attach(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, from any thread, when `changed` has something new and should not wait for the poll."""
        ...

    def deliver(self, tenant: str, delivery_id: str, *, seconds: float) -> int | None:
        """Raise the generation as `invalidate` does, unless this delivery id was seen within so many seconds.

        Returns the raised generation, or None for a duplicate, which changes nothing. Both in one atomic step over
        all processes: whoever dies halfway has neither raised the generation nor remembered the id.
        """
        ...

    def append(self, event: Event) -> None:
        """Add a row to the history."""
        ...

    def history(self, *, tenant: str | None = None, limit: int = 100, before: int | None = None) -> Sequence[Event]:
        """Rows of history, newest first; `before` is the id of a row to go on from."""
        ...

    def report(self, members: Sequence[Member]) -> None:
        """Tell the others what this process serves; forgotten after a minute without a new report."""
        ...

    def members(self, tenant: str | None = None) -> Sequence[Member]:
        """What every living process serves, this one included once it has reported."""
        ...

    def health(self) -> Health:
        """What the store says of itself; never waits."""
        ...

    def after_fork(self) -> None:
        """In a forked child, before anything else: let go of every socket, lock and handle of the parent."""
        ...

    def close(self) -> None:
        """End threads and handles within a second; idempotent. The store may be used again after it."""
        ...
