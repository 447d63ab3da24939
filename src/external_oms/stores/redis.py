"""The store of a fleet: Redis (or Valkey) decides, a mirror in the process answers, and neither waits for the other.

Scripts make every change atomic (`redis_scripts`), the mirror holds what this process knows (`redis_mirror`), two
threads keep it in step (`redis_follow`), and all of it goes over one line that closes while Redis is away
(`redis_link`). Here these parts are put together to the store's contract.

Keys, all with a life, those of a tenant under one hash tag so that a cluster keeps them on one node::

    {prefix}:{<tenant>}:record      hash: generation, snapshot, failure, bucket     30 days since the last use
    {prefix}:{<tenant>}:lease       number and word of its holder                   the lease's own life
    {prefix}:{<tenant>}:seen:<sha>  a delivery id                                   as the caller says
    {prefix}:{_history}:rows        capped stream of rows                           the history's own life
    {prefix}:{_members}:index       sorted set: member by when it reported          a minute
    {prefix}:{_members}:<name>      what that member serves                         a minute
    {prefix}:changes                the channel on which changes are told

An ACL user needs `~{prefix}:*`, `&{prefix}:changes`, and the commands `eval`, `evalsha`, `hmget`, `mget`, `subscribe`,
`ping`, and those that the scripts call: `time`, `hset`, `hmget`, `get`, `set`, `del`, `exists`,
`pexpire`, `pttl`, `publish`, `xadd`, `xtrim`, `xrevrange`, `zadd`, `zrangebyscore`, `zremrangebyscore`.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from random import Random

from external_oms.clock import SYSTEM_CLOCK, Clock
from external_oms.config import Failure, Snapshot
from external_oms.freshness import BUCKET_BURST, BUCKET_RATE_PER_SECOND
from external_oms.stores import redis_scripts as scripts
from external_oms.stores.base import Acquired, Busy, Event, Health, Lease, Member, Metered, Record
from external_oms.stores.redis_client import Client, connect
from external_oms.stores.redis_exchange import Exchange, milliseconds
from external_oms.stores.redis_follow import Follower, timeout_of
from external_oms.stores.redis_ledger import Ledger
from external_oms.stores.redis_link import Away, Link, Refused
from external_oms.stores.redis_mirror import Mirror, Verdict
from external_oms.stores.redis_wire import Remote, Reply

__all__ = ["RedisStore"]

HISTORY_SECONDS = 30 * 86_400.0
"""How long rows of history are kept unless told otherwise: a month's questions."""

WAIT_SECONDS = (0.01, 0.1)
"""How soon a waiter asks Redis itself where nothing is heard, growing from the first to the second: a deaf
subscription then costs latency, and not the read of another member."""

CLOSE_SECONDS = 0.8
"""The longest that `close` waits for its threads; with the connections it ends within a second."""


class RedisStore:
    """Records in Redis, shared by a fleet.

    Args:
        url: Where Redis is; see `redis_client.connect` for the forms, Sentinel and Cluster included.
        client: A ready client of redis-py instead of a URL; its timeouts and retries are its own, and it is not closed.
        prefix: What every key begins with.
        tenants: The tenants to follow from the start; others are followed from their first use.
        bound_seconds: The longest that a lost message stays unnoticed, > 0. 5: a fleet of a hundred members then asks
            for its stamps about thirty times a second.
        clock: What tells the time.
        history_rows: How many rows of history are kept, >= 1.
        history_seconds: And for how long, in seconds, > 0.
        random: What spreads the members of a fleet.
    """

    kind = "redis"
    poll_seconds: float | None = 1.0
    spread_seconds = 1.0
    """One second: whoever invalidates reads at once, so that the others need to look only where it died meanwhile; of a
    hundred thousand members that have to, a handful then ask for the lease before the first has an answer."""

    def __init__(  # noqa: PLR0913 - one more than elsewhere: a ready client stands beside the url
        self,
        url: str | None = None,
        *,
        client: Client | None = None,
        prefix: str = "external_oms",
        tenants: Iterable[str] = (),
        bound_seconds: float = 5.0,
        clock: Clock = SYSTEM_CLOCK,
        history_rows: int = 10_000,
        history_seconds: float = HISTORY_SECONDS,
        random: Random | None = None,
    ) -> None:
        if (url is None) == (client is None):
            raise TypeError("give RedisStore a url or a client, not both and not neither")
        self.prefix = prefix
        timeout_seconds = timeout_of(bound_seconds)
        self._link = Link(
            (lambda: client) if client is not None else (lambda: connect(url or "", timeout_seconds=timeout_seconds)),
            owned=client is None,
            clock=clock,
            failed=self._wake,
        )
        self._mirror = Mirror(tuple(tenants), bound_seconds=bound_seconds, clock=clock, history_seconds=history_seconds)
        self._exchange = Exchange(link=self._link, mirror=self._mirror, prefix=prefix, clock=clock, wake=self._wake)
        self._ledger = Ledger(
            link=self._link, prefix=prefix, clock=clock, history_rows=history_rows, history_seconds=history_seconds
        )
        self._follower = Follower(
            link=self._link,
            channel=self._exchange.channel,
            hear=self._exchange.hear,
            look=self._look,
            gave_up=self._mirror.trust,
            bound_seconds=bound_seconds,
            clock=clock,
            chance=random or Random(),  # noqa: S311 - it spreads load; nobody hides behind it
        )

    # -- reading: the mirror alone --------------------------------------------------------------------------------

    def watch(self, tenant: str) -> tuple[Sequence[int], int]:
        """The tenant's word, in the mirror."""
        self._follower.start()
        return self._mirror.watch(tenant)

    def load(self, tenant: str) -> Record:
        """The record, from the mirror; touches no socket."""
        self._follower.start()
        return self._mirror.load(tenant)

    def changed(self) -> Sequence[str]:
        """The tenants whose record another process changed since the last call."""
        return self._mirror.changed()

    def attach(self, wake: Callable[[], None]) -> None:
        """Have `wake` called when a message or a look brought something new."""
        self._mirror.attach(wake)

    def wait(self, tenant: str, word: int, seconds: float) -> None:
        """Return when the tenant's word has changed; asks Redis itself where the fleet is not heard, and only there."""
        self._follower.start()
        words, slot = self._mirror.watch(tenant)
        until = time.monotonic() + seconds  # as the mirror's condition waits, whatever clock ages are counted on
        first, most = WAIT_SECONDS
        pause = seconds if self._follower.is_hearing else first
        while words[slot] == word and (left := until - time.monotonic()) > 0:
            self._mirror.wait(tenant, word, min(pause, left))
            if words[slot] == word and pause < left and self._link.is_up:
                try:
                    self._ask(scripts.TOUCH, tenant)
                except Away:
                    continue
                pause = min(2 * pause, most)

    def health(self) -> Health:
        """Whether Redis answers."""
        return self._link.health()

    @property
    def is_hearing(self) -> bool:
        """Whether the fleet's messages arrive, as far as the last PING has told."""
        return self._follower.is_hearing

    @property
    def verified_until(self) -> float:
        """Until when, on the monotonic clock, the mirror counts as verified: the last look at Redis and the bound."""
        return self._mirror.verified_until

    # -- changing: a script decides, or the mirror alone ----------------------------------------------------------

    def invalidate(self, tenant: str) -> int:
        """Raise the generation in Redis; while it is away here at once, and there when it is back."""
        try:
            remote, verdict, _ = self._ask(scripts.INVALIDATE, tenant)
        except Away:
            return self._mirror.invalidate(tenant)
        return self._raised(tenant, remote, verdict)

    def deliver(self, tenant: str, delivery_id: str, *, seconds: float) -> int | None:
        """As `invalidate`, once per delivery id over all members; while Redis is away, once per process."""
        name = hashlib.sha256(delivery_id.encode(errors="surrogatepass")).hexdigest()
        try:
            remote, verdict, outcome = self._ask(
                scripts.DELIVER, tenant, milliseconds(seconds), keys=[self._exchange.key(tenant, f"seen:{name}")]
            )
        except Away:
            return self._mirror.deliver(tenant, delivery_id, seconds=seconds)
        return self._raised(tenant, remote, verdict) if outcome == ["1"] else None

    def _raised(self, tenant: str, remote: Remote, verdict: Verdict) -> int:
        if verdict in {Verdict.ADOPTED, Verdict.SAME}:
            return remote.stamp.generation
        # Redis forgot the record between this answer and another thread's: raise once more rather than one time less
        return self._mirror.invalidate(tenant)

    def acquire(self, tenant: str, *, seconds: float, metered: bool) -> Acquired:
        """Try to get the lease of the fleet; while Redis is away, that of this process."""
        arguments = (
            milliseconds(seconds),
            secrets.token_hex(8),
            "1" if metered else "0",
            str(BUCKET_BURST),
            repr(BUCKET_RATE_PER_SECOND),
        )
        try:
            if self.verified_until == float("-inf") and not self._mirror.debt(tenant).stamp.epoch:
                # before this process's first look: a lease taken only to find that others have read is told to them all
                remote, _, _ = self._ask(scripts.TOUCH, tenant)
                if remote.record.snapshot is not None:
                    return Busy(remote.record.reads, 0.0)
            remote, _, outcome = self._ask(scripts.ACQUIRE, tenant, *arguments)
        except Away:
            acquired = self._mirror.acquire(tenant, seconds=seconds, metered=metered)
            if isinstance(acquired, Lease):
                self._mirror.hold(acquired)
            return acquired
        match outcome:
            case ["lease", str(number)]:
                record = self._mirror.record(tenant)
                if record.generation < remote.stamp.generation:  # it could not be adopted at once
                    record = remote.record
                return Lease(tenant, int(number), record)
            case ["busy", str(number), str(left)]:
                return Busy(int(number), int(left) / 1000)
            case ["metered", str(wait)]:
                return Metered(float(wait))
            case _:
                raise AssertionError(outcome)

    def put(self, lease: Lease, snapshot: Snapshot) -> bool:
        """Store a snapshot in Redis; while it is away here, and there when it is back and has nothing newer."""
        text = self._exchange.encode(lease.tenant, snapshot)
        if self._mirror.let_go(lease) or text is None:
            return self._put_alone(lease, snapshot)
        try:
            _, _, outcome = self._ask(scripts.PUT, lease.tenant, *_fence(lease), text, own=snapshot)
        except Away:
            return self._put_alone(lease, snapshot)
        return outcome == ["1"]

    def _put_alone(self, lease: Lease, snapshot: Snapshot) -> bool:
        stored = self._mirror.put(lease, snapshot)
        if stored:
            self._follower.wake()
        return stored

    def fail(self, lease: Lease, failure: Failure) -> bool:
        """Store a failure in Redis; while it is away here alone."""
        text = self._exchange.encode(lease.tenant, failure)
        if self._mirror.let_go(lease) or text is None:
            return self._mirror.fail(lease, failure)
        try:
            _, _, outcome = self._ask(scripts.FAIL, lease.tenant, *_fence(lease), text, own=failure)
        except Away:
            return self._mirror.fail(lease, failure)
        return outcome == ["1"]

    def release(self, lease: Lease) -> None:
        """End the lease without a result."""
        if self._mirror.let_go(lease):
            self._mirror.release(lease)
            return
        try:
            self._ask(scripts.RELEASE, lease.tenant, str(lease.number))
        except Away:
            self._mirror.release(lease)

    # -- people ---------------------------------------------------------------------------------------------------

    def append(self, event: Event) -> None:
        """Add a row to the history; while Redis is away it is kept here and added later."""
        self._follower.start()
        self._mirror.append(event)
        self._ledger.append(event)

    def history(self, *, tenant: str | None = None, limit: int = 100, before: int | None = None) -> Sequence[Event]:
        """Rows of history, newest first; while Redis is away, those that this process wrote."""
        try:
            return self._ledger.history(tenant=tenant, limit=limit, before=before)
        except Away:
            return self._mirror.history(tenant=tenant, limit=limit, before=before)

    def report(self, members: Sequence[Member]) -> None:
        """Tell the fleet what this process serves."""
        self._mirror.report(members)
        try:
            self._ledger.report(members)
        except Away:
            return

    def members(self, tenant: str | None = None) -> Sequence[Member]:
        """What every living member serves; while Redis is away, what this process serves."""
        try:
            told = self._ledger.members()
        except Away:
            return self._mirror.members(tenant)
        return tuple(member for member in told if tenant is None or member.tenant == tenant)

    # -- the process ----------------------------------------------------------------------------------------------

    def _ask(
        self,
        script: scripts.Script,
        tenant: str,
        *arguments: str,
        keys: Sequence[str] = (),
        own: Snapshot | Failure | None = None,
    ) -> tuple[Remote, Verdict, Reply]:
        self._follower.start()
        return self._exchange.ask(script, tenant, *arguments, keys=keys, own=own)

    def _wake(self) -> None:
        self._follower.wake()

    def _look(self) -> None:
        self._exchange.look()
        self._mirror.verify()
        with suppress(Refused):  # history waits; what is served does not rest on it
            self._ledger.send()

    def after_fork(self) -> None:
        """Let go of the parent's sockets, locks and threads; the warm records stay, unverified once they are old."""
        self._mirror.after_fork()
        self._link.after_fork()
        self._exchange.after_fork()
        self._ledger.after_fork()
        self._follower.after_fork()

    def close(self) -> None:
        """End both threads and the connections within a second; a later use begins again."""
        self._follower.close(CLOSE_SECONDS)
        self._link.close()


def _fence(lease: Lease) -> tuple[str, str]:
    """What Redis compares before it believes a read: the number of its lease and the generation it began under."""
    return str(lease.number), str(lease.record.generation)
