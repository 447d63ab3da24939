"""A client of redis-py for every form of URL, bounded in time from the start; and what is used of such clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

from redis import Redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.exceptions import ChildDeadlockedError, RedisClusterException, RedisError
from redis.retry import Retry
from redis.sentinel import Sentinel

__all__ = ["FAILURES", "Client", "Pipeline", "PubSub", "connect"]

SENTINEL_PORT = 26_379

FAILURES: tuple[type[Exception], ...] = (RedisError, RedisClusterException, ChildDeadlockedError, OSError, ValueError)
"""Everything that redis-py raises: not all of it descends from its RedisError, and a connection that another thread
closes meanwhile raises ValueError, for its buffer is closed."""


class PubSub(Protocol):
    """What is used of redis-py's subscriber."""

    def subscribe(self, *channels: str) -> object:
        """Ask for the messages of these channels."""
        ...

    def ping(self, message: str | None = None) -> object:
        """Ask for a PONG, which comes as a message."""
        ...

    def get_message(self, *, timeout: float) -> Mapping[str, object] | None:
        """The next message; None where none came within so many seconds."""
        ...

    def close(self) -> None:
        """End the subscription and its connection."""
        ...


class Pipeline(Protocol):
    """What is used of redis-py's pipeline: commands are collected, and sent by `execute`."""

    def eval(self, script: str, numkeys: int, *keys_and_args: str) -> object:
        """Run a script by its text."""
        ...

    def evalsha(self, sha: str, numkeys: int, *keys_and_args: str) -> object:
        """Run a script that the server knows."""
        ...

    def hmget(self, name: str, keys: Sequence[str]) -> object:
        """Some fields of a hash."""
        ...

    def execute(self) -> list[object]:
        """Send what was collected; the answers in order."""
        ...


class Client(Protocol):
    """What is used of redis-py's clients: `Redis`, one from `Sentinel.master_for`, or `RedisCluster`."""

    def eval(self, script: str, numkeys: int, *keys_and_args: str) -> object:
        """Run a script by its text."""
        ...

    def evalsha(self, sha: str, numkeys: int, *keys_and_args: str) -> object:
        """Run a script that the server knows."""
        ...

    def mget(self, keys: Sequence[str]) -> object:
        """Some values, all on one server."""
        ...

    def pipeline(self, *, transaction: bool) -> Pipeline:
        """A pipeline."""
        ...

    def pubsub(self) -> PubSub:
        """A subscriber, with a connection of its own."""
        ...

    def close(self) -> None:
        """Close every connection."""
        ...


def connect(url: str, *, timeout_seconds: float) -> Client:
    """A client for a URL.

    Args:
        url: `redis://`, `rediss://` and `unix://` as in redis-py, its query options included;
            `redis+cluster://` and `rediss+cluster://` likewise, for a cluster;
            `redis+sentinel://[user:password@]host[:port][,host[:port]…]/service[/db]` asks Sentinels for the primary of
            a service (`?sentinel_username=…&sentinel_password=…` where they want credentials of their own).
        timeout_seconds: The longest that connecting and any one operation may take, > 0. redis-py's own defaults
            (5 s, ten retries) block a caller for up to a minute.
    """
    options = {
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "protocol": 2,  # one handshake less, and no maintenance pushes between the answers
        "retry": Retry(NoBackoff(), 0),
    }
    scheme = urlsplit(url).scheme
    if scheme == "redis+sentinel":
        return _by_sentinel(url, options)
    if scheme in {"redis+cluster", "rediss+cluster"}:
        plain = urlunsplit(urlsplit(url)._replace(scheme=scheme.removesuffix("+cluster")))
        # once more: the first error is how a cluster's client learns that a slot has moved
        return cast("Client", RedisCluster.from_url(plain, **options | {"retry": Retry(NoBackoff(), 1)}))
    return cast("Client", Redis.from_url(url, **options))


class _Sentinels(Protocol):
    def master_for(self, service_name: str, **kwargs: object) -> Client: ...


def _by_sentinel(url: str, options: Mapping[str, object]) -> Client:
    parts = urlsplit(url)
    credentials, _, places = parts.netloc.rpartition("@")
    username, _, password = credentials.partition(":")
    service, _, db = parts.path.strip("/").partition("/")
    query = dict(parse_qsl(parts.query))
    theirs = {name: query[f"sentinel_{name}"] for name in ("username", "password") if f"sentinel_{name}" in query}
    hosts = []
    for place in places.split(","):
        host, _, port = place.rpartition(":") if ":" in place else (place, "", "")
        hosts.append((host, int(port or SENTINEL_PORT)))
    make = cast("Callable[..., _Sentinels]", Sentinel)  # redis-py has it without types
    sentinels = make(hosts, sentinel_kwargs={**options, **theirs})
    own: dict[str, object] = {**options, "db": int(db or 0)}
    if credentials:
        own |= {"username": unquote(username) or None, "password": unquote(password) or None}
    return sentinels.master_for(service, **own)
