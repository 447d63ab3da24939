"""Clients of redis-py for every form of URL, checked before they connect and bounded in time; their errors as ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, cast
from urllib.parse import urlsplit

from redis import Redis, RedisCluster
from redis.backoff import NoBackoff
from redis.client import PubSub
from redis.cluster import ClusterNode
from redis.connection import ConnectionPool, SSLConnection, parse_url
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ChildDeadlockedError,
    ClusterDownError,
    ConnectionError,  # noqa: A004 - redis-py's, not the built-in one
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    SlotNotCoveredError,
    TimeoutError,  # noqa: A004 - redis-py's, not the built-in one
)
from redis.retry import Retry
from redis.sentinel import Sentinel

from external_oms.errors import SettingsError, StoreError
from external_oms.store_url import check_store_url

__all__ = ["FAILURES", "Client", "PubSub", "Server", "client_factory", "server_of", "store_errors", "subscription_of"]

Client: TypeAlias = Redis | RedisCluster
Server: TypeAlias = Redis

SENTINEL_PORT = 26_379
CLUSTER_PORT = 6_379

FAILURES = (RedisError, RedisClusterException, ChildDeadlockedError, OSError, ValueError, AttributeError)
"""Everything that redis-py raises. Not all of it descends from RedisError, and a connection that another thread closes
raises ValueError or AttributeError, because its buffer is closed or gone."""

_NO_ANSWER = "does not answer; check that it runs and can be reached as the setting `store` says"

_COMPLAINTS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (AuthenticationError, "refuses the credentials; check the user and the password in the setting `store`"),
    (NoPermissionError, "denies its user a command, a key or a channel; docs/stores.md lists what the user needs"),
    (ReadOnlyError, "is a read-only replica; name the primary, or use redis+sentinel://"),
    (OutOfMemoryError, "has no memory left; raise maxmemory"),
    (BusyLoadingError, "is loading its data set; wait for the end of that"),
    ((ClusterDownError, SlotNotCoveredError, RedisClusterException), "has no node for these keys; check the cluster"),
    ((ConnectionError, TimeoutError, OSError, ValueError, AttributeError, ChildDeadlockedError), _NO_ANSWER),
)


_IN_SCRIPTS: tuple[tuple[str, type[Exception]], ...] = (
    ("OOM command not allowed", OutOfMemoryError),
    ("READONLY You can't write", ReadOnlyError),
    ("The user executing the script can't", NoPermissionError),
    ("ACL failure in script", NoPermissionError),
)
"""What Redis answers where a command of a script fails, and what redis-py raises where it is no script."""


@contextmanager
def store_errors() -> Iterator[None]:
    """Raise `StoreError` where redis-py raises anything of its own, with what is wrong and what to do."""
    try:
        yield
    except FAILURES as error:
        kind = next((kind for text, kind in _IN_SCRIPTS if text in str(error)), type(error))
        complaint = next((text for kinds, text in _COMPLAINTS if issubclass(kind, kinds)), None)
        raise StoreError(f"Redis {complaint or f'answers with {kind.__name__}; see its log'}") from error


def server_of(client: Client, key: str) -> Server:
    """Return the client of the server that keeps a key: in a cluster that of its node."""
    if isinstance(client, RedisCluster):
        node: ClusterNode = client.get_node_from_key(key)  # type: ignore[no-untyped-call]  # redis-py has no type here
        return client.get_redis_connection(node)
    return client


def subscription_of(client: Client, channel: str) -> PubSub:
    """Return a new subscription to a channel.

    Raises:
        StoreError: Redis cannot be reached.
    """
    with store_errors():
        subscription: PubSub = client.pubsub()  # type: ignore[no-untyped-call]  # redis-py has no type here
        subscription.subscribe(channel)
        return subscription


def client_factory(url: str, *, timeout_seconds: float) -> Callable[[], Client]:
    """Check a URL and return a function that makes clients for it.

    Args:
        url: `redis://`, `rediss://` and `unix://` as in redis-py, its query options included;
            `redis+cluster://` and `rediss+cluster://` likewise, for a cluster;
            `redis+sentinel://[user:password@]host[:port][,host[:port]…]/service[/db]` asks Sentinels for the primary of
            a service (`?sentinel_username=…&sentinel_password=…` where they want credentials of their own). IPv6
            addresses stand in brackets.
        timeout_seconds: How long connecting and each operation may take, > 0, unless the URL says otherwise. redis-py's
            own defaults (5 s, ten retries) block a caller for up to a minute.

    Raises:
        SettingsError: The URL cannot be used. The message holds no part of the URL but the name of an option.
    """
    problem = ""
    try:
        check_store_url(url)
    except ValueError as error:
        problem = str(error)
    if problem:  # without its cause, which may quote a part of the password
        raise SettingsError("store", f"the Redis URL cannot be used: {problem}")
    scheme, _, rest = url.partition("://")
    sentinels: list[tuple[str, int]] = []
    service = ""
    if scheme == "redis+sentinel":
        sentinels, service, rest = _sentinel_parts(rest)
    plain_scheme = "redis" if sentinels else scheme.removesuffix("+cluster")
    options: dict[str, Any] = {
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        **parse_url(f"{plain_scheme}://{rest}"),  # type: ignore[no-untyped-call]  # redis-py has no type here
        # one handshake less, and no pushes between the answers; a text that is not UTF-8 is for the codec to refuse
        "protocol": 2,
        "decode_responses": False,
        "retry": Retry(NoBackoff(), 0),
    }
    if plain_scheme != "unix":
        options.setdefault("socket_keepalive", True)  # finds a peer that is gone; the interval is the system's
    if sentinels:
        given = {
            name: options.pop(f"sentinel_{name}") for name in ("username", "password") if f"sentinel_{name}" in options
        }
        del options["host"]
        bounds = {name: options[name] for name in ("socket_timeout", "socket_connect_timeout", "protocol", "retry")}

        make: Callable[..., Any] = Sentinel  # redis-py has no types for it
        return lambda: cast("Redis", make(sentinels, sentinel_kwargs=bounds | given).master_for(service, **options))
    if not scheme.endswith("+cluster"):
        return lambda: Redis.from_pool(ConnectionPool(**options))
    if options.pop("db", 0):
        raise SettingsError("store", "the Redis URL names a database, and a cluster has only database 0")
    options |= {
        "host": options.get("host", "localhost"),
        "port": options.get("port", CLUSTER_PORT),
        "ssl": options.pop("connection_class", None) is SSLConnection,
        "retry": Retry(NoBackoff(), 1),  # the first error is how a cluster's client learns that a slot has moved
    }
    return lambda: RedisCluster(**options)  # made on first use, because it asks the cluster for its slots


def _sentinel_parts(rest: str) -> tuple[list[tuple[str, int]], str, str]:
    """Return the Sentinels, the service, and the rest of a URL for the primary with a host in the place of all."""
    address, _, query = rest.partition("?")
    authority, _, path = address.partition("/")
    credentials, at, hosts = authority.rpartition("@")
    service, _, database = path.partition("/")
    split = [urlsplit(f"//{host}") for host in hosts.split(",")]  # one by one: urlsplit knows only one host in a URL
    sentinels = [(one.hostname or "localhost", one.port or SENTINEL_PORT) for one in split]
    return sentinels, service, f"{credentials}{at}primary/{database}?{query}"
