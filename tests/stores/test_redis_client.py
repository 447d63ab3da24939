"""Every form of URL against a server of that form: TLS, a user of an ACL, a Unix socket, Sentinels, a cluster."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest
import redis
from limits import RateLimitItemPerMinute
from limits.storage import storage_from_string
from limits.strategies import FixedWindowRateLimiter
from redis.sentinel import SentinelConnectionPool

from external_oms.errors import SettingsError, StoreError
from external_oms.records import Cause, Event, Member
from external_oms.stores import redis as redis_module
from external_oms.stores.redis import RedisStore
from external_oms.stores.redis_client import Client, client_factory
from tests.support.contract import delivered, invalidated, leased
from tests.support.ports import free_port
from tests.support.redis import RedisProxy, RedisServer
from tests.support.stores import PolledStore
from tests.support.tls import certificate
from tests.support.waiting import wait_until

TENANTS = tuple(f"tenant-{number}" for number in range(12))
PASSWORD = "s3cr3t:/@#?"
ENCODED = "s3cr3t%3A%2F%40%23%3F"


def works(url: str | None = None, *, client: redis.Redis | None = None) -> None:
    """Check everything that a store asks of Redis, between two members."""
    prefix = f"test-{secrets.token_hex(4)}"
    keys = {tenant: f"{tenant}@https://{tenant}.example" for tenant in TENANTS}
    with ExitStack() as stack:
        one, other = (RedisStore(url, client=client, prefix=prefix, keys=keys) for _ in range(2))
        for store in (one, other):
            stack.callback(store.close)
            store.start()
            wait_until(store._sync.first_pull.is_set)
        for tenant in TENANTS:
            generation = delivered(one, "msg", tenant, row=Event(datetime.now(UTC), tenant, Cause.DELIVERY)).generation
            assert delivered(other, "msg", tenant).duplicate
            leased(other, tenant)
            wait_until(lambda t=tenant, g=generation: one.load(t).generation == g, seconds=2.0)  # type: ignore[misc]  # defaults bind the present values
        generation = invalidated(other, TENANTS[-1])
        wait_until(lambda: one.load(TENANTS[-1]).generation == generation, seconds=2.0)
        assert {found.tenant for found in one.history(limit=50)} == set(TENANTS)
        one.report([Member("host:1", tenant, 1, True, "fresh", 1.0) for tenant in TENANTS])
        assert len(other.members()) == len(TENANTS)
        assert one.health().ok
        assert other.poll() is not None


def add_documented_user(server: RedisServer, *more: str) -> str:
    """Give a user the rights that the documentation names, for the prefixes of these tests, and return its name."""
    documented = (Path(__file__).parents[2] / "docs" / "stores.md").read_text(encoding="utf-8")
    command = re.search(r"ACL SETUSER ((?:.*\\\n)*.*)", documented)
    assert command is not None
    rights = command[1].replace("\\\n", " ").replace("external_oms:", "test-*:").replace("PASSWORD", PASSWORD).split()
    server.command("ACL", "SETUSER", *rights, *more)
    return rights[0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("redis")


def test_a_unix_socket(directory: Path) -> None:
    path = directory / "redis.sock"
    with RedisServer(directory, "--unixsocket", str(path)):
        works(f"unix://{path}?db=3")


def test_tls(directory: Path) -> None:
    context, bundle = certificate(directory)
    with RedisServer(directory) as server:
        proxy = RedisProxy(server.port, context=context)
        try:
            works(f"rediss://127.0.0.1:{proxy.port}/0?ssl_ca_certs={bundle}")
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
        works(f"redis+sentinel://:s3cr3t@127.0.0.1:{free_port()},127.0.0.1:{sentinel.port}/fleet/2")


@pytest.fixture
def cluster(directory: Path) -> Iterator[list[RedisServer]]:
    with ExitStack() as stack:
        nodes = [stack.enter_context(RedisServer(directory, in_cluster=True)) for _ in range(2)]
        for node, slots in zip(nodes, (range(8192), range(8192, 16384)), strict=True):
            node.command("CLUSTER", "ADDSLOTS", *slots)
        nodes[0].command("CLUSTER", "MEET", "127.0.0.1", nodes[1].port, nodes[1].bus)
        wait_until(lambda: all("cluster_state:ok" in str(node.command("CLUSTER", "INFO")) for node in nodes))
        yield nodes


def test_a_cluster(cluster: list[RedisServer]) -> None:
    users = [add_documented_user(node, "+cluster|slots", "+command") for node in cluster]
    works(f"redis+cluster://{users[0]}:{ENCODED}@127.0.0.1:{cluster[0].port}/0")
    assert all(node.holds() for node in cluster), "the tenants are spread over the nodes"


def test_a_slot_that_moves_is_followed_by_changes_and_by_pulls(cluster: list[RedisServer]) -> None:
    """An empty slot moves, so the entry is lost with it, as in a failover that lost everything."""
    url = f"redis+cluster://127.0.0.1:{cluster[0].port}"
    with ExitStack() as stack:
        one, other = (PolledStore(RedisStore(url, keys={"acme": "acme"}, bound_seconds=1.0)) for _ in range(2))
        for store in (one, other):
            stack.callback(store.close)
        before = invalidated(one, "acme")
        wait_until(lambda: other.load("acme").generation == before)
        slot = int(str(cluster[0].command("CLUSTER", "KEYSLOT", "{acme}")))
        source, target = (0, 1) if slot < 8192 else (1, 0)
        name = str(cluster[target].command("CLUSTER", "MYID"))
        cluster[source].flush()
        for node in (cluster[target], cluster[source]):
            node.command("CLUSTER", "SETSLOT", slot, "NODE", name)
        wait_until(lambda: one.load("acme").generation == other.load("acme").generation > before)
        after = invalidated(one, "acme")
        wait_until(lambda: other.load("acme").generation == after)
        assert cluster[target].holds()


def test_a_user_with_the_rights_that_the_documentation_names_and_no_others(directory: Path) -> None:
    with RedisServer(directory) as server:
        user = add_documented_user(server)
        url = f"redis://{user}:{ENCODED}@127.0.0.1:{server.port}"
        works(f"{url}/0")
        works(f"{url}/1")
        server.command("SET", "test-x:2:{acme}:entry", "garbage")
        store = RedisStore(f"{url}/0", prefix="test-x")
        assert invalidated(store, "acme") > 0
        store.close()
        storage = storage_from_string(f"{url}/0", wrap_exceptions=True, key_prefix="test-x:limits")
        limiter, item = FixedWindowRateLimiter(storage), RateLimitItemPerMinute(1)
        assert limiter.hit(item, "deliveries", "acme")
        assert not limiter.hit(item, "deliveries", "acme")
        assert limiter.get_window_stats(item, "deliveries", "acme").remaining == 0
        with server.client() as client:
            denied = {entry["object"] for entry in client.acl_log()}
        assert denied <= {"client", "client|setinfo"}


def test_wrong_credentials_and_missing_rights_are_told_without_the_password(directory: Path) -> None:
    with RedisServer(directory) as server:
        server.command("ACL", "SETUSER", "oms", "on", f">{PASSWORD}", "~other:*", "+@all")
        for credentials, problem in ((f"oms:wr0ng{ENCODED}", "credentials"), (f"oms:{ENCODED}", "what the user needs")):
            store = RedisStore(f"redis://{credentials}@127.0.0.1:{server.port}", bound_seconds=1.0)
            try:
                with pytest.raises(StoreError, match=problem) as failure:
                    invalidated(store, "acme")
                assert "s3cr3t" not in str(failure.value)
            finally:
                store.close()


@pytest.mark.parametrize("decodes", [True, False])
@pytest.mark.parametrize("protocol", [2, 3])
def test_a_ready_client_can_be_handed_in_and_is_not_closed(directory: Path, decodes: bool, protocol: int) -> None:
    with RedisServer(directory) as server:
        client = redis.Redis.from_url(server.url, decode_responses=decodes, protocol=protocol)
        works(client=client)
        assert client.connection_pool._available_connections, "they were given back, and not closed"
        assert client.ping()
        client.close()


def test_threads_that_come_first_at_once_make_one_client(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[redis.Redis] = []

    def slow_factory(url: str, *, timeout_seconds: float) -> Callable[[], Client]:
        make = client_factory(url, timeout_seconds=timeout_seconds)

        def make_slowly() -> Client:
            together.wait(0.2)  # a second thread would come here too
            made.append(cast("redis.Redis", make()))
            return made[-1]

        return make_slowly

    together = threading.Event()
    monkeypatch.setattr(redis_module, "client_factory", slow_factory)
    with RedisServer(directory) as server, ThreadPoolExecutor(8) as pool:
        store = RedisStore(server.url)
        generations = list(pool.map(lambda _: invalidated(store, "acme"), range(8)))
        store.close()
    assert len(set(generations)) == 8
    assert len(made) == 1


def test_one_of_url_and_client_is_needed() -> None:
    with pytest.raises(TypeError, match="not both"):
        RedisStore()
    with pytest.raises(TypeError, match="not both"):
        RedisStore("redis://127.0.0.1:1/0", client=redis.Redis(port=1))


@pytest.mark.parametrize(
    "url", ["redis+sentinel://127.0.0.1:1/fleet", "redis+cluster://127.0.0.1:1", "redis://127.0.0.1:1", "unix:///none"]
)
def test_where_nobody_listens_the_store_says_so(url: str) -> None:
    store = RedisStore(url, bound_seconds=1.0)
    try:
        with pytest.raises(StoreError, match=r"does not answer|no node"):
            invalidated(store, "acme")
        store.start()
        wait_until(lambda: not store.health().ok)
    finally:
        store.close()


# -- what a URL says --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("redis://:PASSWORD@h/0?foo=bar", "`foo` is unknown"),
        ("redis://h/0?password=PASSWORD&foo=bar", "`foo` is unknown"),
        ("redis+cluster://:PASSWORD@h?read_from_replicas=true", "`read_from_replicas` is unknown"),
        ("redis+sentinel://:PASSWORD@h/fleet?foo=bar", "`foo` is unknown"),
        ("redis://:PASSWORD@h/0?socket_timeout=soon", "`socket_timeout` must be seconds"),
        ("rediss://:PASSWORD@h/0?ssl_cert_reqs=perhaps", "`ssl_cert_reqs` must be none"),
        ("redis://:PASSWORD@h:port/0", "port is malformed"),
        ("redis://:PASSWORD@h:65536/0", "port is malformed"),
        ("redis+sentinel://:PASSWORD@h1:port,h2/fleet", "port is malformed"),
        ("redis://:PASSWORD@h/first", "not the number of a database"),
        ("redis+sentinel://:PASSWORD@h/fleet/first", "not the number of a database"),
        ("redis+cluster://:PASSWORD@h/3", "a cluster has only database 0"),
        ("redis://:PASS/WORD@h/0", "write @ as %40"),
        ("redis://:PASS#WORD@h/0", "write @ as %40"),
        ("redis://:PASS?WORD@h/0", "write @ as %40"),
        ("redis://:123/PASSWORD@h/0", "write @ as %40"),
        ("redis://[::1/0", "port is malformed"),
        ("redis+sentinel://:PASSWORD@h", "the name of the service is missing"),
        ("redis+sentinel:///fleet", "port is malformed"),
        ("unix://", "the path of the socket is missing"),
        ("redis", "the scheme is not one of those allowed"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_at_once_and_the_password_is_not_told(url: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(problem)) as refused:
        RedisStore(url)
    assert refused.value.setting == "store"
    assert "PASS" not in str(refused.value)
    assert "WORD" not in str(refused.value)
    assert refused.value.__cause__ is refused.value.__context__ is None, "a cause might quote the password"


def test_the_options_of_a_url_reach_the_client_and_none_lets_it_wait_for_long() -> None:
    client = client_factory("redis://us%40er:p%3Aw@[::1]:7/3?socket_timeout=0.25", timeout_seconds=0.5)()
    assert isinstance(client, redis.Redis)
    options = client.connection_pool.connection_kwargs
    assert (options["host"], options["port"], options["db"]) == ("::1", 7, 3)
    assert (options["username"], options["password"]) == ("us@er", "p:w")
    assert (options["socket_timeout"], options["socket_connect_timeout"]) == (0.25, 0.5)
    assert options["socket_keepalive"] is True
    assert options["retry"]._retries == 0


def test_a_url_cannot_change_how_replies_are_read() -> None:
    for option in ("decode_responses=True", "protocol=3"):
        with pytest.raises(SettingsError, match="is unknown"):
            client_factory(f"redis://h?{option}", timeout_seconds=0.5)


def test_a_url_of_sentinels_has_credentials_for_the_primary_and_for_the_sentinels() -> None:
    url = (
        "redis+sentinel://us%40er:p%3Aw@[::1],h2:7,[fe80::1]:26380/fleet/3?sentinel_username=s&sentinel_password=p%26q"
    )
    client = client_factory(url, timeout_seconds=0.5)()
    pool = cast("SentinelConnectionPool", cast("redis.Redis", client).connection_pool)
    options = pool.connection_kwargs
    assert (options["username"], options["password"], options["db"]) == ("us@er", "p:w", 3)
    assert options["socket_timeout"] == 0.5
    assert pool.service_name == "fleet"
    sentinels = [one.connection_pool.connection_kwargs for one in pool.sentinel_manager.sentinels]
    assert [(one["host"], one["port"]) for one in sentinels] == [("::1", 26379), ("h2", 7), ("fe80::1", 26380)]
    assert {(one["username"], one["password"], one["socket_timeout"]) for one in sentinels} == {("s", "p&q", 0.5)}
