"""The scripts that Redis runs, and what their replies hold.

An entry is stored in two lines, its version and its JSON. The scripts know the version alone; the rules of the cache
are in `entry`. Each script is atomic, and its keys lie under one hash tag, as a cluster demands. What a script finds
under a key of ours and cannot use is renamed, never deleted.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, TypeAlias

from external_oms.clock import Clock
from external_oms.codec import MAX_NUMBER, decode_entry
from external_oms.entry import Entry
from external_oms.stores.redis_client import Client, Server, server_of, store_errors

__all__ = [
    "COMPARE_AND_SET",
    "MEMBERS",
    "NOTHING",
    "REPORT",
    "Arguments",
    "Found",
    "Scripts",
    "as_bytes",
    "decode_rows",
]

Arguments: TypeAlias = Sequence[str | bytes | int]

PULL_AT_ONCE = 500
"""Entries read by one pipeline: enough to hide the round trip, few enough that Redis serves others in between."""

NO_VERSION = b"-"
"""The known version for READ that no entry has, so that READ returns the text, whatever it is."""

_READ = """
local kind = redis.call('TYPE', KEYS[1]).ok
local text = kind == 'none' and '' or '?'
if kind == 'string' then text = redis.call('GETRANGE', KEYS[1], 0, 1048575) end
local version = string.match(text, '^(%d+)\\n') or ''
local function found()
  local time = redis.call('TIME')
  local reply = {version ~= ARGV[1] and text, time[1] .. string.format('%06d', time[2])}
  for i = 5, #KEYS do reply[i - 2] = redis.call('EXISTS', KEYS[i]) end
  return reply
end
"""

READ = _READ + "return found()"
"""Return the text of an entry unless its version is the one that the caller knows, the time of the server in
microseconds, and which delivery ids exist.

KEYS: entry, history, entry set aside, history set aside, delivery ids; a pull gives the first alone.
ARGV[1]: the known version."""

COMPARE_AND_SET = (
    _READ
    + """
if version ~= ARGV[1] then return found() end
local function set_aside(from, to)
  if redis.call('EXISTS', KEYS[from]) == 0 then return end
  redis.call('RENAME', KEYS[from], KEYS[to])
  redis.call('PEXPIRE', KEYS[to], ARGV[6])
end
redis.call('PUBLISH', ARGV[2], ARGV[3])
if ARGV[4] == '1' then set_aside(1, 3) end
if #ARGV > 11 and redis.call('TYPE', KEYS[2]).ok ~= 'stream' then set_aside(2, 4) end
for i = 12, #ARGV, 2 do
  local added = redis.pcall('XADD', KEYS[2], 'MAXLEN', ARGV[9], ARGV[i], 'event', ARGV[i + 1])
  if added.err then
    if not string.find(added.err, ' ID', 1, true) then return added end
    set_aside(2, 4)
    redis.call('XADD', KEYS[2], ARGV[i], 'event', ARGV[i + 1])
  end
  redis.call('XTRIM', KEYS[2], 'MINID', ARGV[11])
  redis.call('PEXPIRE', KEYS[2], ARGV[10])
end
redis.call('SET', KEYS[1], ARGV[5], 'PX', ARGV[6])
for i = 5, #KEYS do
  if string.sub(ARGV[7], i - 4, i - 4) == '1' then redis.call('SET', KEYS[i], '', 'PX', ARGV[8]) end
end
"""
)
"""Store an entry, its events and its claimed delivery ids if the entry has the version that the caller knows; else
answer as READ does.

KEYS: as READ. ARGV: known version, channel, message, whether to set the old entry aside, text, life of an entry; a 1
for each delivery id to claim and a 0 for each other, life of a delivery id; most history rows, life of the history,
least id of a history row, then id and text of each event. Lives are in milliseconds."""

REPORT = """
if redis.call('TYPE', KEYS[1]).ok ~= 'stream' and redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('RENAME', KEYS[1], KEYS[2])
  redis.call('PEXPIRE', KEYS[2], ARGV[2])
end
local oldest = string.format('%.0f', redis.call('TIME')[1] * 1000 - ARGV[1])
for i = 3, #ARGV, 2 do
  redis.call('XADD', KEYS[1], 'MINID', '~', oldest, '*', 'key', ARGV[i], 'member', ARGV[i + 1])
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""
"""Add heartbeats. KEYS: heartbeats, those set aside. ARGV: life of a heartbeat, life of what is set aside, then storage
key and text of each."""

MEMBERS = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if redis.call('TYPE', KEYS[1]).ok ~= 'stream' then return {} end
return {string.format('%.0f', now), redis.call('XREVRANGE', KEYS[1], '+', string.format('%.0f', now - ARGV[1]))}
"""
"""Return the time of the server in milliseconds and the heartbeats that live, newest first. ARGV[1]: their life."""

_VERSION = re.compile(rb"([0-9]+)\n")
_VERSION_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Found:
    """The entry of a tenant as a reply of READ holds it.

    Attributes:
        entry: The entry, its instants on the clock of the server; empty where there is none that can be read.
        version: Its version; 0 where there is none.
        expected: What the scripts take for its version.
        is_refused: Whether something is there that is no entry of ours.
        server_us: The time of the server, in microseconds since the epoch.
        seen: Which of the delivery ids exist.
        received: When the reply came, on the clock of this process.
        early_offset: Seconds from the clock of the server to that of this process, too low by less than the round trip.
        late_offset: The same, too high by less than the round trip.
        order: The number of the request; a later request has a higher one.
    """

    entry: Entry = Entry()  # noqa: RUF009 - it is frozen
    version: int = 0
    expected: bytes = b""
    is_refused: bool = False
    server_us: int = 0
    seen: frozenset[str] = frozenset()
    received: float = 0.0
    early_offset: float = 0.0
    late_offset: float = 0.0
    order: int = 0


NOTHING = Found()
"""What a process knows of an entry at first."""


def decode_found(
    reply: Sequence[Any],
    known: Found,
    *,
    sent: float,
    received: float,
    order: int,
    delivery_ids: Sequence[str] = (),
) -> Found:
    """Return what a reply of READ holds.

    Args:
        reply: The reply, as bytes or as text.
        known: The entry whose version was given to the script: the reply leaves out the text where it is the same.
        sent: When the request was sent.
        received: When the reply came.
        order: The number of the request.
        delivery_ids: The ids whose keys were given to the script, in order.
    """
    text, server_us, *existing = reply
    version, entry, expected, is_refused = known.version, known.entry, known.expected, known.is_refused
    if text is not None:
        text = as_bytes(text)
        versioned = _VERSION.match(text)
        expected = versioned[1] if versioned else b""
        version, entry, is_refused = 0, NOTHING.entry, False
        try:
            if text:
                entry, version = decode_entry(text[len(expected) :]), int(expected[:_VERSION_DIGITS])
                is_refused = version >= MAX_NUMBER or len(expected) > _VERSION_DIGITS
        except ValueError:  # a MalformedError, or there is no version
            is_refused = True
        if is_refused:
            version, entry = 0, NOTHING.entry
    server = int(server_us)
    return Found(
        entry=entry,
        version=version,
        expected=expected,
        is_refused=is_refused,
        server_us=server,
        seen=frozenset(compress(delivery_ids, existing)),
        received=received,
        early_offset=sent - server / 1e6,
        late_offset=received - server / 1e6,
        order=order,
    )


class Scripts:
    """Runs the scripts over a client.

    Args:
        connect: Returns the client; raises `StoreError`.
        clock: Tells the time.

    Attributes:
        orders: Numbers the requests.
    """

    def __init__(self, connect: Callable[[], Client], *, clock: Clock) -> None:
        self._connect = connect
        self._clock = clock
        self._registered: dict[str, Any] = {}
        self.orders = itertools.count(1)

    def run(self, script: str, keys: Sequence[str], arguments: Arguments) -> Any:  # noqa: ANN401 - any reply of Redis
        """Run a script; a server that does not know it yet gets it first.

        Raises:
            StoreError: Redis did not run it, or did not answer.
        """
        client = self._connect()
        with store_errors():
            return self._script(client, script)(keys, arguments)

    def _script(self, client: Client, text: str) -> Any:  # noqa: ANN401 - redis-py has no type for it
        script = self._registered.get(text)
        if script is None or script.registered_client is not client:
            script = self._registered[text] = client.register_script(text)  # which hashes the text
        return script

    def read(self, keys: Sequence[str], delivery_ids: Sequence[str], known: Found) -> Found:
        """Return the entry of a tenant; Redis sends it only where its version is not the known one."""
        found = self.find(READ, keys, [known.expected or NO_VERSION], delivery_ids, known)
        assert found is not None  # noqa: S101 - READ always replies
        return found

    def find(
        self,
        script: str,
        keys: Sequence[str],
        arguments: Arguments,
        delivery_ids: Sequence[str] = (),
        known: Found = NOTHING,
    ) -> Found | None:
        """Run READ or COMPARE_AND_SET; return the entry that is found; None where the given one was stored."""
        order, sent = next(self.orders), self._clock.monotonic()
        reply = self.run(script, keys, arguments)
        received = self._clock.monotonic()
        if reply is None:
            return None
        return decode_found(reply, known, sent=sent, received=received, order=order, delivery_ids=delivery_ids)

    def read_all(self, known: Mapping[str, Found]) -> Iterator[tuple[str, Found]]:
        """Read entries in one round trip per server; yield each with its key.

        A cluster's pipeline takes no scripts, so each server of it gets a pipeline of its own. An entry that answers
        with an error is read alone, which loads the script into a new server, follows a slot that has moved, or raises.

        Args:
            known: The keys of the entries, each with what the caller knows.
        """
        keys = list(known)
        for start in range(0, len(keys), PULL_AT_ONCE):
            pending = keys[start : start + PULL_AT_ONCE]
            while pending:
                client = self._connect()
                with store_errors():
                    replies, pending = self._read_by_server(client, pending, known)
                yield from replies
                if pending:
                    key = pending.pop()
                    yield key, self.read([key], (), known[key])

    def _read_by_server(
        self, client: Client, keys: Sequence[str], known: Mapping[str, Found]
    ) -> tuple[list[tuple[str, Found]], list[str]]:
        replies: list[tuple[str, Found]] = []
        failed: list[str] = []
        sha = self._script(client, READ).sha
        servers: dict[Server, list[str]] = {}
        for key in keys:
            servers.setdefault(server_of(client, key), []).append(key)
        for server, group in servers.items():
            order, sent = next(self.orders), self._clock.monotonic()
            pipeline = server.pipeline(transaction=False)
            for key in group:
                pipeline.evalsha(sha, 1, key, known[key].expected or NO_VERSION)
            answers = pipeline.execute(raise_on_error=False)
            received = self._clock.monotonic()
            for key, answer in zip(group, answers, strict=True):
                if isinstance(answer, Exception):
                    failed.append(key)
                else:
                    found = decode_found(answer, known[key], sent=sent, received=received, order=order)
                    replies.append((key, found))
        return replies, failed


def decode_rows(reply: Iterable[Any]) -> Iterator[tuple[int, Mapping[bytes, bytes]]]:
    """Return the rows of a stream: the first part of each id, and the fields."""
    for stream_id, fields in reply:
        pairs = fields.items() if isinstance(fields, dict) else zip(fields[::2], fields[1::2], strict=False)
        number = int(as_bytes(stream_id).partition(b"-")[0])
        yield number, {as_bytes(name): as_bytes(value) for name, value in pairs}


def as_bytes(text: str | bytes) -> bytes:
    """Return a text of a reply as bytes; a client that the caller made may decode replies."""
    return text.encode(errors="replace") if isinstance(text, str) else text
