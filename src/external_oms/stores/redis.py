"""The store of a fleet: entries in Redis or Valkey, changed by compare-and-set, and a replica of them in each process.

A transition runs in this process: read the entry, apply the pure function, store the result if nobody stored another
one meanwhile, else try again over what the others stored. Evaluations load from the replica, which `redis_sync` keeps
up to date, and touch no socket. Where Redis does not answer, the store raises `StoreError` and does nothing else.

Keys and channel. `<key>` is the storage key of a tenant, whose keys lie on one node of a cluster. All keys have a
life::

    {prefix}:2:{<key>}:entry          version and entry                30 days since the last change
    {prefix}:2:{<key>}:id:<sha256>    a delivery id                    DELIVERY_ID_SECONDS
    {prefix}:2:{<key>}:history        stream of history rows           history_seconds
    {prefix}:2:{<key>}:set-aside:…    what could not be read           30 days
    {prefix}:2:{members}              stream of heartbeats             MEMBER_SECONDS
    {prefix}:2:changes                channel: version and key of an entry that changed

The rights that a user of Redis needs are listed in docs/stores.md.

*Versions.* A version is the time of the server in microseconds, or higher where changes come faster than that. So
versions rise even in a Redis that lost its data, and a process that finds an older version or an older value than it
has seen knows that Redis lost changes, perhaps invalidations among them. It then raises the generation above every one
that it knows, and stores its own value again, as a stale one, where Redis has an older one or none.

*Clocks.* Redis holds instants on the clock of its server. A process converts them by the time of the server that every
reply carries. Between request and reply it cannot know when the server read its clock, so a converted instant is wrong
by at most one round trip, and always to the older side: no value seems younger than it is. In a cluster, and across a
failover, this supposes that the clocks of the servers agree.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from operator import lt
from random import Random
from typing import Any, TypeVar

from redis import Redis

from external_oms.clock import SYSTEM_CLOCK, Clock
from external_oms.codec import (
    MalformedError,
    decode_event,
    decode_member,
    encode_entry,
    encode_event,
    encode_member,
)
from external_oms.entry import Change, Entry, Invalidation, Moment, Transition, invalidate, shift
from external_oms.errors import StoreBusy, StoreError
from external_oms.records import MEMBER_SECONDS, Cause, Event, Member
from external_oms.stores.base import DELIVERY_ID_SECONDS, Health
from external_oms.stores.redis_client import Client, client_factory, node_of, store_errors, subscription_of
from external_oms.stores.redis_scripts import (
    COMPARE_AND_SET,
    MEMBERS,
    NO_VERSION,
    READ,
    REPORT,
    Found,
    as_bytes,
    decode_found,
)
from external_oms.stores.redis_sync import Sync, timeout_of

__all__ = ["RedisStore"]

logger = logging.getLogger("external_oms")

ENTRY_SECONDS = 30 * 86_400.0
"""How long an entry outlives its last change: longer than any outage, so that the last known value is there after it,
and a tenant that is no longer configured leaves nothing behind."""

BUSY_SECONDS = 2.0
"""How long a transition is tried again while other processes change the same entry."""

PAUSE_SECONDS = 0.001
"""The longest pause after a conflict, about two transitions of other processes. It does not grow: with growing pauses,
few processes keep an entry to themselves. After the first conflict the transition is tried again at once, over the
entry that came with the refusal."""

FIRST_PULL_SECONDS = 0.1
"""How long `load` waits in a forked child for the first pull, once: the one wait that an evaluation is allowed."""

PULL_AT_ONCE = 500
"""Entries pulled by one pipeline: enough to hide the round trip, few enough that Redis serves others in between."""

LOG_SECONDS = 60.0
"""The least time between two log lines that say that Redis lost entries: a flush loses those of all tenants."""

T = TypeVar("T")

Arguments = Sequence[str | bytes | int]


@dataclass(frozen=True, slots=True)
class _State:
    """What this process knows of a tenant's entry.

    Attributes:
        version: The version of the entry; 0 where there is none.
        entry: The entry, its instants on the clock of this process.
        order: A number between those of the requests before and after the entry was learned. The reply to a request
            with a lower number may be older than the entry.
    """

    version: int = 0
    entry: Entry = Entry()  # noqa: RUF009 - it is frozen
    order: int = 0


class _Replica:
    """The keys of one tenant in Redis, and what this process knows of its entry."""

    __slots__ = ("_base", "index", "keys", "state", "storage_key", "tenant", "writing")

    def __init__(self, tenant: str, storage_key: str, prefix: str, index: int) -> None:
        self._base = f"{prefix}:2:{{{storage_key}}}:"
        self.tenant = tenant
        self.storage_key = storage_key
        self.keys = [f"{self._base}{name}" for name in ("entry", "history", "set-aside:entry", "set-aside:history")]
        self.index = index
        self.state = _State()
        self.writing: set[int] = set()  # the versions that this process stores at this moment

    def id_key(self, delivery_id: str) -> str:
        """Return the key of a delivery id: its hash, because senders choose what an id holds."""
        return f"{self._base}id:{hashlib.sha256(delivery_id.encode(errors='surrogatepass')).hexdigest()}"


class RedisStore:
    """Entries in Redis, shared by a fleet.

    Args:
        url: Where Redis is; see `redis_client.client_factory` for the forms, Sentinel and Cluster included.
        client: A ready client of redis-py instead of a URL; its timeouts and retries are its own, and it is not closed.
        keys: The tenants to follow from the start, each with its storage key, which names the tenant and the address of
            its config API: two environments in one Redis then never share a value. Another tenant is followed from its
            first use, and its storage key is its name.
        prefix: The beginning of every key.
        bound_seconds: The longest that a change whose message was lost stays unseen, in seconds, > 0. With 5 a fleet of
            a hundred members pulls about thirty times a second.
        clock: Tells the time.
        history_rows: How many history rows are kept per tenant, >= 1.
        history_seconds: For how long a history row is kept, in seconds, > 0.
        random: Spreads the members of a fleet.

    Raises:
        SettingsError: The URL cannot be used.
    """

    kind: str = "redis"
    poll_seconds: float | None = 1.0
    spread_seconds = 1.0
    """Of a hundred thousand members that find a stale value at the same moment, a handful then ask for the lease before
    the first has read."""

    def __init__(  # noqa: PLR0913 - one more than elsewhere: a ready client stands beside the URL
        self,
        url: str | None = None,
        *,
        client: Client | None = None,
        keys: Mapping[str, str] | None = None,
        prefix: str = "external_oms",
        bound_seconds: float = 5.0,
        clock: Clock = SYSTEM_CLOCK,
        history_rows: int = 10_000,
        history_seconds: float = 30 * 86_400.0,
        random: Random | None = None,
    ) -> None:
        if (url is None) == (client is None):
            raise TypeError("give RedisStore a url or a client, not both and not neither")
        self._given = client
        self._make = client_factory(url, timeout_seconds=timeout_of(bound_seconds)) if url is not None else None
        self._prefix = prefix
        self._channel = f"{prefix}:2:changes"
        self._members_key = f"{prefix}:2:{{members}}"
        self._keys = dict(keys or {})
        self._clock = clock
        self._history_rows = history_rows
        self._history_seconds = history_seconds
        self._random = random or Random()  # noqa: S311 - it spreads load; nothing is secret about it
        self._orders = itertools.count(1)
        self._versions: list[int] = []
        self._replicas: dict[str, _Replica] = {}
        self._by_storage_key: dict[bytes, _Replica] = {}
        self._heard: set[_Replica] = set()
        self._loss_logged_at = float("-inf")
        self._sync = Sync(
            subscribe=lambda: subscription_of(self._connected(), self._channel),
            hear=self._hear,
            pull=self._pull,
            bound_seconds=bound_seconds,
            random=self._random,
        )
        self._begin()
        for tenant in self._keys:
            self._replica(tenant)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._client_lock = threading.Lock()
        self._client: Client | None = None
        self._changed: set[str] = set()
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"

    # -- threads and forks --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread that follows Redis."""
        self._sync.start()

    def after_fork(self) -> None:
        """Take a new name, a new client and new locks; no entry is verified before the first pull."""
        self._begin()
        self._sync.after_fork()
        for replica in self._replicas.values():
            replica.state = replace(replica.state, entry=replace(replica.state.entry, verified=False))
            self._versions[replica.index] += 1

    def close(self) -> None:
        """End the thread and close the client; a client that was given stays open."""
        self._sync.close()
        with self._client_lock:
            client, self._client = self._client, None
        if client is not None:
            with suppress(StoreError), store_errors():
                client.close()

    def _connected(self) -> Client:
        """Return the client, made on first use: that of a cluster asks for the slots when it is made."""
        if self._given is not None:
            return self._given
        with self._client_lock:
            if self._client is None and self._make is not None:
                with store_errors():
                    self._client = self._make()
            return self._client  # type: ignore[return-value]

    def health(self) -> Health:
        """Return whether Redis answered the last time that the thread asked."""
        return Health(ok=not self._sync.problem, problem=self._sync.problem)

    # -- replica ------------------------------------------------------------------------------------------------------

    @property
    def holder(self) -> str:
        """The name of this process: host, process id and a random text."""
        return self._holder

    def is_gone(self, holder: str) -> bool:  # noqa: ARG002 - the form of the protocol
        """Return False: nobody can look at a process of another host. The lease of one that died ends by its life."""
        return False

    def _storage_key(self, tenant: str) -> str:
        return self._keys.get(tenant, tenant)

    def _replica(self, tenant: str) -> _Replica:
        replica = self._replicas.get(tenant)
        if replica is None:
            with self._lock:
                replica = self._replicas.get(tenant)
                if replica is None:
                    replica = _Replica(tenant, self._storage_key(tenant), self._prefix, len(self._versions))
                    self._versions.append(0)
                    self._replicas = {**self._replicas, tenant: replica}  # others may iterate over the old one
                    self._by_storage_key[replica.storage_key.encode()] = replica
        return replica

    def version_ref(self, tenant: str) -> tuple[Sequence[int], int]:
        """Return where the version word of a tenant stands: in the replica."""
        return self._versions, self._replica(tenant).index

    def load(self, tenant: str) -> Entry:
        """Return the entry of the replica. In a forked child it waits for the first pull, for 100 ms at most, once."""
        replica = self._replica(tenant)
        if not replica.state.entry.verified and not self._sync.first_pull.is_set():
            self._sync.first_pull.wait(FIRST_PULL_SECONDS)
            self._sync.first_pull.set()
        return replica.state.entry

    def touch(self, tenant: str) -> None:
        """Change the version word."""
        replica = self._replica(tenant)
        with self._lock:
            self._versions[replica.index] += 1

    def attach(self, wake: Callable[[], None]) -> None:
        """Have `wake` called when another process changed an entry, or when Redis stops or begins to answer."""
        self._sync.wake = wake

    def poll(self) -> Collection[str]:
        """Return the tenants whose entry another process changed since the last call.

        Raises:
            StoreError: The thread could not pull the last time that it tried.
        """
        self._sync.keep_running()
        if self._sync.problem:
            raise StoreError(self._sync.problem)
        with self._lock:
            changed, self._changed = self._changed, set()
        return changed

    def _adopt(self, replica: _Replica, found: Found) -> bool:
        """Take what a reply holds into the replica; return False where Redis lost changes that this process knows."""
        known = replica.state
        here, there = (known.version, *_marks(known.entry)), (found.version, *_marks(found.entry))
        if found.is_refused or any(map(lt, there, here)):
            return found.order < known.order  # a request from before this process knew better proves nothing
        if found.version > known.version or not known.entry.verified:
            self._apply(replica, found.version, shift(found.entry, found.early_offset))
        return True

    def _apply(self, replica: _Replica, version: int, entry: Entry) -> None:
        """Take an entry into the replica, unless a later version is there."""
        with self._lock:
            known = replica.state
            if version < known.version or (version == known.version and known.entry.verified):
                return
            replica.state = _State(version, entry, next(self._orders))
            self._versions[replica.index] += 1
            is_own = version in replica.writing
            if not is_own:
                self._changed.add(replica.tenant)
        if not is_own:
            self._sync.wake()

    def _hear(self, message: bytes | str) -> bool:
        """Take a message from the channel; return whether it names an entry of another version than the known one."""
        version, _, storage_key = as_bytes(message).partition(b" ")
        replica = self._by_storage_key.get(storage_key)
        if replica is None or version == _encode_version(replica.state.version):
            return False
        self._heard.add(replica)
        return True

    def _pull(self, everything: bool) -> None:
        replicas = list(self._replicas.values() if everything else self._heard)
        self._heard.clear()
        for start in range(0, len(replicas), PULL_AT_ONCE):
            for replica, version, found in self._read_all(replicas[start : start + PULL_AT_ONCE]):
                if found is None:
                    self._apply(replica, version, replace(replica.state.entry, verified=True))
                elif not self._adopt(replica, found):
                    self.transact(replica.tenant, _change_nothing)  # stores again what Redis lost

    def _read_all(self, replicas: Sequence[_Replica]) -> Iterator[tuple[_Replica, int, Found | None]]:
        """Read entries in one round trip per server; yield each with the version that was known before.

        A cluster's pipeline takes no scripts, so each server of it gets a pipeline of its own. An entry that answers
        with an error is read alone, which loads the script into a new server, follows a slot that has moved, or raises.
        """
        pending = list(replicas)
        while pending:
            with store_errors():
                replies, pending = self._read_by_server(self._connected(), pending)
            yield from replies
            if pending:
                replica = pending.pop()
                version = replica.state.version
                yield replica, version, self._run(READ, replica.keys[:1], [_encode_version(version)])

    def _read_by_server(
        self, client: Client, replicas: Sequence[_Replica]
    ) -> tuple[list[tuple[_Replica, int, Found | None]], list[_Replica]]:
        replies: list[tuple[_Replica, int, Found | None]] = []
        failed: list[_Replica] = []
        sha = client.register_script(READ).sha
        servers: dict[Redis, list[tuple[_Replica, int]]] = {}
        for replica in replicas:
            servers.setdefault(node_of(client, replica.keys[0]), []).append((replica, replica.state.version))
        for server, group in servers.items():
            order, sent = next(self._orders), self._clock.monotonic()
            pipeline = server.pipeline(transaction=False)
            for replica, version in group:
                pipeline.evalsha(sha, 1, replica.keys[0], _encode_version(version))
            answers = pipeline.execute(raise_on_error=False)
            received = self._clock.monotonic()
            for (replica, version), answer in zip(group, answers, strict=True):
                if isinstance(answer, Exception):
                    failed.append(replica)
                else:
                    found = decode_found(answer, sent=sent, received=received, order=order)
                    replies.append((replica, version, found))
        return replies, failed

    # -- transitions --------------------------------------------------------------------------------------------------

    def transact(self, tenant: str, transition: Transition[T], *, delivery_ids: Sequence[str] = ()) -> T:
        """Apply a transition by compare-and-set: one round trip where it changes nothing, two where it does.

        Raises:
            StoreBusy: Other processes changed the entry again and again, for two seconds.
            StoreError: Redis did not do it, or did not answer; then it may have been done.
        """
        replica = self._replica(tenant)
        ids = tuple(dict.fromkeys(delivery_ids))
        keys = [*replica.keys, *map(replica.id_key, ids)]
        give_up_at = time.monotonic() + BUSY_SECONDS
        conflicts = 0
        found = self._run(READ, keys, [NO_VERSION], ids)
        while found is not None:
            before = shift(found.entry, found.late_offset)
            moment = Moment(found.received, found.server_us // 1000, found.seen)
            is_lost = not self._adopt(replica, found)
            restored = self._restore(replica, found, before, moment) if is_lost else Change(before, None)
            change = transition(restored.entry, moment)
            events = restored.events + change.events
            if change.entry is before and not events and not change.claims:
                return change.result
            version = max(found.version + 1 + len(events), found.server_us)
            arguments = self._arguments(replica, found, version, change, events, ids)
            replica.writing.add(version)
            try:
                conflict = self._run(COMPARE_AND_SET, keys, arguments, ids)
                if conflict is None:
                    self._apply(replica, version, shift(change.entry, found.early_offset - found.late_offset))
            finally:
                replica.writing.discard(version)
            if conflict is None:
                if is_lost:
                    self._log_loss(found)
                return change.result
            if time.monotonic() > give_up_at:
                break
            found = conflict
            conflicts += 1
            if conflicts > 1:
                time.sleep(self._random.uniform(0.0, PAUSE_SECONDS))
                found = self._run(READ, keys, [NO_VERSION], ids)
        raise StoreBusy(f"other processes change tenant {tenant!r} in Redis again and again; try again")

    def _arguments(
        self,
        replica: _Replica,
        found: Found,
        version: int,
        change: Change[object],
        events: Sequence[Event],
        ids: Sequence[str],
    ) -> Arguments:
        arguments: list[str | bytes | int] = [
            found.expected,
            self._channel,
            f"{version} {replica.storage_key}",
            int(found.is_refused),
            f"{version}\n{encode_entry(shift(change.entry, -found.late_offset))}",
            _milliseconds(ENTRY_SECONDS),
            "".join("01"[one in change.claims] for one in ids),
            _milliseconds(DELIVERY_ID_SECONDS),
            self._history_rows,
            _milliseconds(self._history_seconds),
            max(0, version - round(self._history_seconds * 1e6)),
        ]
        for number, event in enumerate(events, version - len(events) + 1):
            arguments += [number, encode_event(event)]
        return arguments

    def _run(self, script: str, keys: Sequence[str], arguments: Arguments, ids: Sequence[str] = ()) -> Found | None:
        order, sent = next(self._orders), self._clock.monotonic()
        reply = self._eval(script, keys, arguments)
        if reply is None:
            return None
        return decode_found(reply, sent=sent, received=self._clock.monotonic(), order=order, delivery_ids=ids)

    def _eval(self, script: str, keys: Sequence[str], arguments: Arguments) -> Any:  # noqa: ANN401 - as redis-py
        client = self._connected()
        with store_errors():
            return client.register_script(script)(keys, arguments)

    def _restore(self, replica: _Replica, found: Found, entry: Entry, moment: Moment) -> Change[object]:
        """Return what becomes of an entry that lost changes: a higher generation than any that this process knows.

        The later of the two values stays, as a stale one: a process that knows less cannot take the others back.
        """
        known = replica.state.entry
        if _marks(known)[1] > _marks(entry)[1]:
            entry = replace(
                entry,
                snapshot=known.snapshot,
                failure=entry.failure or known.failure,
                stale_since=entry.stale_since if known.stale_since is None else known.stale_since,
                token=max(entry.token, known.token),
            )
        event = Event(
            at=datetime.fromtimestamp(self._clock.wall(), UTC),
            tenant=replica.tenant,
            cause=Cause.STORE,
            detail=_loss(found),
        )
        return invalidate(entry, moment, [Invalidation(event)], at_least=known.generation + 1)

    def _log_loss(self, found: Found) -> None:
        now = time.monotonic()
        if now - self._loss_logged_at > LOG_SECONDS:
            self._loss_logged_at = now
            logger.warning("%s; the tenants concerned count as invalidated", _loss(found))

    # -- history and members ------------------------------------------------------------------------------------------

    def append(self, event: Event) -> None:
        """Add a history row that belongs to no transition."""
        self.transact(event.tenant, lambda entry, _: Change(entry, None, (event,)))

    def history(self, *, tenant: str | None = None, limit: int = 100, before: int | None = None) -> Sequence[Event]:
        """Return rows of history, newest first; the rows of several tenants are merged by their ids."""
        replicas = list(self._replicas.values()) if tenant is None else [self._replica(tenant)]
        newest = "+" if before is None else str(max(0, before - 1))
        client = self._connected()
        with store_errors():
            pipeline = client.pipeline(transaction=False)
            for replica in replicas:
                pipeline.xrevrange(replica.keys[1], newest, "-", count=limit)
            replies = pipeline.execute(raise_on_error=False)
            for reply in replies:  # what is no stream has no rows, and is set aside when the next one is added
                if isinstance(reply, Exception) and "WRONGTYPE" not in str(reply):
                    raise reply
        oldest = self._clock.wall() - self._history_seconds
        rows = (list(_events(reply)) for reply in replies if not isinstance(reply, Exception))
        merged = heapq.merge(*rows, key=lambda row: row.id, reverse=True)
        return tuple(islice((row for row in merged if row.at.timestamp() >= oldest), limit))

    def report(self, members: Sequence[Member]) -> None:
        """Store the heartbeats of this process."""
        arguments: list[str | bytes | int] = [_milliseconds(MEMBER_SECONDS), _milliseconds(ENTRY_SECONDS)]
        for member in members:
            arguments += [self._storage_key(member.tenant), encode_member(member)]
        self._eval(REPORT, [self._members_key, f"{self._members_key}:set-aside"], arguments)

    def members(self, tenant: str | None = None) -> Sequence[Member]:
        """Return the last heartbeat of each process and tenant."""
        reply = self._eval(MEMBERS, [self._members_key], [_milliseconds(MEMBER_SECONDS)])
        found: dict[tuple[str, str], Member] = {}
        for number, fields in reply[1] if reply else ():
            row = dict(zip(map(as_bytes, fields[::2]), map(as_bytes, fields[1::2]), strict=False))
            with suppress(MalformedError):
                seen_seconds = max(0.0, (int(reply[0]) - _decode_id(number)) / 1000)
                member = decode_member(row.get(b"member", b""), seen_seconds=seen_seconds)
                # another environment in the same Redis may have a tenant of the same name
                is_ours = row.get(b"key") == self._storage_key(member.tenant).encode()
                if is_ours and tenant in {None, member.tenant}:
                    found.setdefault((member.name, member.tenant), member)
        return tuple(found.values())


def _change_nothing(entry: Entry, moment: Moment) -> Change[None]:  # noqa: ARG001 - the form of a transition
    return Change(entry, None)


def _marks(entry: Entry) -> tuple[int, int]:
    """Return the numbers of an entry that never fall unless data is lost: generation, and token of the value."""
    return entry.generation, entry.snapshot.token if entry.snapshot else 0


def _loss(found: Found) -> str:
    if found.is_refused:
        return "Redis held an entry that cannot be read; it was set aside"
    return "Redis lost changes; it was flushed, restarted without its data, or has removed keys"


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _encode_version(version: int) -> bytes:
    return b"%d" % version if version else b""


def _decode_id(stream_id: str | bytes) -> int:
    return int(as_bytes(stream_id).partition(b"-")[0])


def _events(reply: Iterable[tuple[bytes | str, Mapping[Any, Any] | None]]) -> Iterator[Event]:
    for stream_id, fields in reply:
        row = fields or {}
        with suppress(MalformedError):
            yield decode_event(row.get(b"event") or row.get("event") or b"", number=_decode_id(stream_id))
