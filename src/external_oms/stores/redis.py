"""The store of a fleet: entries in Redis or Valkey, changed by compare-and-set, and a replica of them in each process.

A transition runs in this process: read the entry, apply the pure function, store the result if nobody stored another
one meanwhile, else try again over what the others stored. Evaluations load from the replica, which `redis_sync` keeps
up to date, and touch no socket. Where Redis does not answer, the store raises `StoreError` and does nothing else.

Keys and channel, each with its life; `<key>` is the storage key of a tenant, whose keys lie on one node of a cluster::

    {prefix}:2:{<key>}:entry          version and entry                30 days since the last change
    {prefix}:2:{<key>}:id:<sha256>    a delivery id                    DELIVERY_ID_SECONDS
    {prefix}:2:{<key>}:history        stream of history rows           history_seconds
    {prefix}:2:{<key>}:set-aside:…    what could not be read           30 days
    {prefix}:2:{members}              stream of heartbeats             MEMBER_SECONDS
    {prefix}:2:changes                channel: version and key of an entry that changed

The rights that a user of Redis needs are listed in docs/stores.md.

*Versions.* A version is the time of the server in microseconds, or higher where changes come faster than that; a new
generation and a new fencing token are at least its time in milliseconds. So they rise even in a Redis that lost its
data.

*Clocks.* Redis holds instants on the clock of its server. A process converts them by the time of the server that every
reply carries. Between request and reply it cannot know when the server read its clock, so a converted instant is wrong
by at most one round trip, and always to the older side: no value seems younger than it is. In a cluster, and across a
failover, this supposes that the clocks of the servers agree.
"""

from __future__ import annotations

import heapq
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from random import Random
from typing import Any, TypeVar

from external_oms.clock import SYSTEM_CLOCK, Clock
from external_oms.codec import MalformedError, decode_event, decode_member, encode_entry, encode_event, encode_member
from external_oms.entry import Change, Entry, Moment, Transition, shift
from external_oms.errors import StoreBusy, StoreError
from external_oms.records import MEMBER_SECONDS, Cause, Event, Member
from external_oms.stores.base import DELIVERY_ID_SECONDS, Health
from external_oms.stores.redis_client import Client, client_factory, store_errors, subscription_of
from external_oms.stores.redis_replica import Replica, Tenant
from external_oms.stores.redis_scripts import COMPARE_AND_SET, MEMBERS, REPORT, Found, Scripts, decode_rows
from external_oms.stores.redis_sync import Sync, timeout_of

__all__ = ["RedisStore"]

logger = logging.getLogger("external_oms")

ENTRY_MS = 30 * 86_400_000
"""How long an entry outlives its last change, in milliseconds: longer than any outage, so that the last known value is
there after it, and a tenant that is no longer configured leaves nothing behind."""

BUSY_SECONDS = 2.0
"""How long a transition is tried again while other processes change the same entry."""

PAUSE_SECONDS = 0.001
"""The longest pause after a conflict, about two transitions of other processes. It does not grow: with growing pauses,
few processes keep an entry to themselves. After the first conflict the transition is tried again at once, over the
entry that came with the refusal."""

FIRST_PULL_SECONDS = 0.1
"""How long `load` waits in a forked child for the first pull, once: the one wait that an evaluation is allowed."""

DELIVERY_ID_MS = round(DELIVERY_ID_SECONDS * 1000)
MEMBER_MS = round(MEMBER_SECONDS * 1000)

T = TypeVar("T")


class RedisStore:
    """Entries in Redis, shared by a fleet.

    Args:
        url: Where Redis is; see `redis_client.client_factory` for the forms, Sentinel and Cluster included.
        client: A ready client of redis-py instead of a URL; its timeouts and retries are its own, and it is not closed.
        keys: The tenants to follow from the start, each with its storage key, which names the tenant and the address of
            its config API. Another tenant is followed from its first use, and its storage key is its name.
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
        self._make: Callable[[], Client]
        if url is not None and client is None:
            self._make = client_factory(url, timeout_seconds=timeout_of(bound_seconds))
        elif client is not None and url is None:
            self._make = lambda: client
        else:
            raise TypeError("give RedisStore a url or a client, not both and not neither")
        self._owns_client = client is None
        self._channel = f"{prefix}:2:changes"
        self._members_key = f"{prefix}:2:{{members}}"
        self._clock = clock
        self._history_rows = history_rows
        self._history_seconds = history_seconds
        self._history_ms = max(1, round(history_seconds * 1000))
        self._random = random or Random()  # noqa: S311 - it spreads load; nothing is secret about it
        self._heard: set[Tenant] = set()
        self._sync = Sync(
            subscribe=lambda: subscription_of(self._connected(), self._channel),
            hear=self._hear,
            pull=self._pull,
            bound_seconds=bound_seconds,
            random=self._random,
        )
        self._scripts = Scripts(self._connected, clock=clock)
        self._replica = Replica(keys or {}, prefix=prefix, orders=self._scripts.orders, changed=self._sync.call_wake)
        self._begin()

    def _begin(self) -> None:
        self._client_lock = threading.Lock()
        self._client: Client | None = None
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"

    # -- threads and forks --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread that follows Redis."""
        self._sync.start()

    def after_fork(self) -> None:
        """Take a new name, a new client and new locks; no entry is verified before the first pull."""
        self._begin()
        self._sync.after_fork()
        self._replica.after_fork()

    def close(self) -> None:
        """End the thread and close the client; a client that was given stays open."""
        self._sync.close()
        with self._client_lock:
            client, self._client = self._client, None
        if client is not None and self._owns_client:
            with suppress(StoreError), store_errors():
                client.close()

    def _connected(self) -> Client:
        """Return the client, made on first use: that of a cluster asks for the slots when it is made."""
        client = self._client
        if client is None:
            with self._client_lock, store_errors():
                client = self._client = self._client or self._make()
        return client

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

    def version_ref(self, tenant: str) -> tuple[Sequence[int], int]:
        """Return where the version word of a tenant stands: in the replica."""
        return self._replica.versions, self._replica.tenant(tenant).index

    def load(self, tenant: str) -> Entry:
        """Return the entry of the replica. In a forked child it waits for the first pull, for 100 ms at most, once."""
        known = self._replica.tenant(tenant)
        if not known.state.entry.verified and not self._sync.first_pull.is_set():
            self._sync.first_pull.wait(FIRST_PULL_SECONDS)
            self._sync.first_pull.set()
        return known.state.entry

    def touch(self, tenant: str) -> None:
        """Change the version word."""
        self._replica.touch(self._replica.tenant(tenant))

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
        return self._replica.take_changed()

    def _hear(self, message: bytes | str) -> bool:
        tenant = self._replica.named_in(message)
        if tenant is not None:
            self._heard.add(tenant)
        return tenant is not None

    def _pull(self, everything: bool) -> None:
        tenants = list(self._replica.tenants() if everything else self._heard)
        self._heard.clear()
        by_key = {tenant.keys[0]: tenant for tenant in tenants}
        for key, found in self._scripts.read_all({key: tenant.state.found for key, tenant in by_key.items()}):
            self._replica.adopt(by_key[key], found)

    # -- transitions --------------------------------------------------------------------------------------------------

    def transact(self, tenant: str, transition: Transition[T], *, delivery_ids: Sequence[str] = ()) -> T:
        """Apply a transition by compare-and-set: one round trip where it changes nothing, two where it does.

        Raises:
            StoreBusy: Other processes changed the entry again and again, for two seconds.
            StoreError: Redis did not do it, or did not answer; then it may have been done.
        """
        known = self._replica.tenant(tenant)
        ids = tuple(dict.fromkeys(delivery_ids))
        keys = [*known.keys, *map(known.id_key, ids)]
        give_up_at = time.monotonic() + BUSY_SECONDS
        conflicts = 0
        found = self._scripts.read(keys, ids, known.state.found)
        while True:
            self._replica.adopt(known, found)
            before = shift(found.entry, found.late_offset)
            change = transition(before, Moment(found.received, found.server_us // 1000, found.seen))
            if change.entry is before and not change.events and not change.claims:
                return change.result
            if found.is_refused:
                change = replace(change, events=(self._set_aside(tenant), *change.events))
            conflict = self._store(known, keys, found, change, ids)
            if conflict is None:
                return change.result
            if time.monotonic() > give_up_at:
                raise StoreBusy(f"other processes change tenant {tenant!r} in Redis again and again; try again")
            found = conflict
            conflicts += 1
            if conflicts > 1:
                time.sleep(self._random.uniform(0.0, PAUSE_SECONDS))
                found = self._scripts.read(keys, ids, known.state.found)

    def _set_aside(self, tenant: str) -> Event:
        sentence = "Redis held an entry that cannot be read; it was set aside"
        logger.warning("tenant %s: %s", tenant, sentence)
        return Event(datetime.fromtimestamp(self._clock.wall(), UTC), tenant, Cause.STORE, detail=sentence)

    def _store(
        self, tenant: Tenant, keys: Sequence[str], found: Found, change: Change[object], ids: Sequence[str]
    ) -> Found | None:
        """Store a change unless the entry has changed since; return the entry that was stored meanwhile."""
        version = max(found.version + 1 + len(change.events), found.server_us)
        stored = shift(change.entry, -found.late_offset)
        arguments: list[str | bytes | int] = [
            found.expected,
            self._channel,
            f"{version} {tenant.storage_key}",
            int(found.is_refused),
            f"{version}\n{encode_entry(stored)}",
            ENTRY_MS,
            "".join("01"[one in change.claims] for one in ids),
            DELIVERY_ID_MS,
            self._history_rows,
            self._history_ms,
            max(0, version - round(self._history_seconds * 1e6)),
        ]
        for number, event in enumerate(change.events, version - len(change.events) + 1):
            arguments += [number, encode_event(event)]
        written = replace(found, entry=stored, version=version, expected=b"%d" % version, is_refused=False)
        tenant.writing.add(written.expected)
        try:
            conflict = self._scripts.find(COMPARE_AND_SET, keys, arguments, ids)
            if conflict is None:
                self._replica.adopt(tenant, written, shift(stored, found.early_offset))
        finally:
            tenant.writing.discard(written.expected)
        return conflict

    # -- history and members ------------------------------------------------------------------------------------------

    def append(self, event: Event) -> None:
        """Add a history row that belongs to no transition."""
        self.transact(event.tenant, lambda entry, _: Change(entry, None, (event,)))

    def history(self, *, tenant: str | None = None, limit: int = 100, before: int | None = None) -> Sequence[Event]:
        """Return rows of history, newest first; the rows of several tenants are merged by their ids."""
        tenants = self._replica.tenants() if tenant is None else [self._replica.tenant(tenant)]
        newest = "+" if before is None else str(max(0, before - 1))
        client = self._connected()
        with store_errors():
            pipeline = client.pipeline(transaction=False)
            for one in tenants:
                pipeline.xrevrange(one.keys[1], newest, "-", count=limit)
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
        arguments: list[str | bytes | int] = [MEMBER_MS, ENTRY_MS]
        for member in members:
            arguments += [self._replica.storage_key(member.tenant), encode_member(member)]
        self._scripts.run(REPORT, [self._members_key, f"{self._members_key}:set-aside"], arguments)

    def members(self, tenant: str | None = None) -> Sequence[Member]:
        """Return the last heartbeat of each process and tenant."""
        reply = self._scripts.run(MEMBERS, [self._members_key], [MEMBER_MS])
        found: dict[tuple[str, str], Member] = {}
        for milliseconds, row in decode_rows(reply[1]) if reply else ():
            with suppress(MalformedError):
                seen_seconds = max(0.0, (int(reply[0]) - milliseconds) / 1000)
                member = decode_member(row.get(b"member", b""), seen_seconds=seen_seconds)
                # another environment in the same Redis may have a tenant of the same name
                is_ours = row.get(b"key") == self._replica.storage_key(member.tenant).encode()
                if is_ours and tenant in {None, member.tenant}:
                    found.setdefault((member.name, member.tenant), member)
        return tuple(found.values())


def _events(reply: Iterable[Any]) -> Iterator[Event]:
    for number, row in decode_rows(reply):
        with suppress(MalformedError):
            yield decode_event(row.get(b"event", b""), number=number)
