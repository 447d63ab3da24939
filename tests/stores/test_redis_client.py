"""Every form of URL against a server of that form: TLS, a user of an ACL, a Unix socket, Sentinels, a cluster."""

from __future__ import annotations

import secrets
import time
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pytest
import redis

from external_oms.stores.base import Lease
from external_oms.stores.redis import RedisStore
from external_oms.stores.redis_client import Client, connect
from tests.support.ports import free_port
from tests.support.redis import RedisProxy, RedisServer
from tests.support.tls import certificate
from tests.support.waiting import wait_until

TENANTS = tuple(f"tenant-{number}" for number in range(12))


def follows(url: str) -> None:
    """Two members at this URL: what one changes, the other sees, message or look."""
    prefix = f"test-{secrets.token_hex(4)}"
    with ExitStack() as stack:
        one, other = (RedisStore(url, prefix=prefix, tenants=TENANTS, bound_seconds=2.0) for _ in range(2))
        for store in (one, other):
            stack.callback(store.close)
            store.watch(TENANTS[0])
            wait_until(lambda store=store: store.is_hearing and store.verified_until > 0)  # type: ignore[misc]  # a default binds it
        for tenant in TENANTS:
            assert one.deliver(tenant, "msg", seconds=60.0) == 1
            assert other.deliver(tenant, "msg", seconds=60.0) is None
            assert isinstance(one.acquire(tenant, seconds=5.0, metered=True), Lease)
            assert not isinstance(other.acquire(tenant, seconds=5.0, metered=True), Lease)
        assert other.invalidate(TENANTS[-1]) == 2
        wait_until(lambda: one.load(TENANTS[-1]).generation == 2, seconds=2.0)
        assert one.health().ok
        assert other.health().ok


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("redis")


def test_a_unix_socket(directory: Path) -> None:
    path = directory / "redis.sock"
    with RedisServer(directory, "--unixsocket", str(path)):
        follows(f"unix://{path}?db=0")


def test_a_user_of_an_acl_with_no_more_rights_than_the_documentation_names(directory: Path) -> None:
    rights = (
        "eval evalsha hmget mget subscribe ping time hset get set del exists pexpire pttl publish "
        "xadd xtrim xrevrange zadd zrangebyscore zremrangebyscore"
    )
    commands = [f"+{right}" for right in rights.split()]
    with RedisServer(directory) as server:
        server.command(
            "ACL",
            "SETUSER",
            "oms",
            "on",
            ">s3cr3t:/@",
            "~test-*",
            "resetchannels",
            "&test-*:changes",
            "-@all",
            *commands,
        )
        follows(f"redis://oms:s3cr3t%3A%2F%40@127.0.0.1:{server.port}/0")
        store = RedisStore(f"redis://oms:wr0ng@127.0.0.1:{server.port}/0", tenants=("acme",))
        try:
            assert store.invalidate("acme") == 1
            assert "credentials" in store.health().problem
            assert "wr0ng" not in store.health().problem
        finally:
            store.close()
        denied = RedisStore(
            f"redis://oms:s3cr3t%3A%2F%40@127.0.0.1:{server.port}/0", prefix="elsewhere", tenants=("a",)
        )
        try:
            assert denied.invalidate("a") == 1
            assert "ACL" in denied.health().problem
        finally:
            denied.close()


def test_tls(directory: Path) -> None:
    context, bundle = certificate(directory)
    with RedisServer(directory) as server:
        proxy = RedisProxy(server.port, context=context)
        try:
            follows(f"rediss://127.0.0.1:{proxy.port}/0?ssl_ca_certs={bundle}")
        finally:
            proxy.close()


def test_sentinels_name_the_primary(directory: Path) -> None:
    with ExitStack() as stack:
        primary = stack.enter_context(RedisServer(directory, "--requirepass", "s3cr3t"))
        file = directory / "sentinel.conf"
        file.write_text(
            f"sentinel monitor fleet 127.0.0.1 {primary.port} 1\nsentinel auth-pass fleet s3cr3t\n", encoding="ascii"
        )
        sentinel = stack.enter_context(RedisServer(directory, configuration=file, sentinel=True))
        follows(f"redis+sentinel://:s3cr3t@127.0.0.1:{free_port()},127.0.0.1:{sentinel.port}/fleet/0")


def test_a_cluster(directory: Path) -> None:
    with ExitStack() as stack:
        nodes = [stack.enter_context(RedisServer(directory, in_cluster=True)) for _ in range(2)]
        for node, slots in zip(nodes, (range(8192), range(8192, 16384)), strict=True):
            node.command("CLUSTER", "ADDSLOTS", *slots)
        nodes[0].command("CLUSTER", "MEET", "127.0.0.1", nodes[1].port, nodes[1].bus)
        wait_until(lambda: all("cluster_state:ok" in str(node.command("CLUSTER", "INFO")) for node in nodes))
        follows(f"redis+cluster://127.0.0.1:{nodes[0].port}/0")
        assert all(node.holds() for node in nodes), "the tenants are spread over the nodes"


@pytest.mark.parametrize("decodes", [True, False])
@pytest.mark.parametrize("protocol", [2, 3])
def test_a_ready_client_can_be_handed_in_and_is_not_closed(directory: Path, decodes: bool, protocol: int) -> None:
    with RedisServer(directory) as server:
        client = redis.Redis.from_url(server.url, decode_responses=decodes, protocol=protocol)
        store = RedisStore(client=cast("Client", client), tenants=("acme",))
        assert store.invalidate("acme") == 1
        wait_until(lambda: store.is_hearing)
        assert store.load("acme").generation == 1
        store.close()
        assert client.ping()
        client.close()


def test_one_of_url_and_client_is_needed() -> None:
    with pytest.raises(TypeError, match="not both"):
        RedisStore()
    with pytest.raises(TypeError, match="not both"):
        RedisStore("redis://127.0.0.1:1/0", client=connect("redis://127.0.0.1:1/0", timeout_seconds=1.0))


@pytest.mark.parametrize(
    "url", ["redis+sentinel://127.0.0.1:1/fleet", "redis+cluster://127.0.0.1:1", "redis://127.0.0.1:1"]
)
def test_where_nobody_listens_a_store_works_alone_at_once(url: str) -> None:
    store = RedisStore(url, tenants=("acme",), bound_seconds=1.0)
    try:
        began = time.monotonic()
        assert store.invalidate("acme") == 1
        assert time.monotonic() - began < 1.0
        assert "does not answer" in store.health().problem or "RedisCluster" in store.health().problem
    finally:
        store.close()


def test_the_credentials_and_the_database_of_a_sentinels_url_reach_the_primary() -> None:
    client = connect("redis+sentinel://us%40er:p%3Aw@h1,h2:7/fleet/3?sentinel_password=x", timeout_seconds=0.5)
    options = cast("redis.Redis", client).connection_pool.connection_kwargs
    assert (options["username"], options["password"], options["db"]) == ("us@er", "p:w", 3)
    assert options["socket_timeout"] == 0.5
