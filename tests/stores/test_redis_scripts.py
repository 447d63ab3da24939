"""The Lua on a real server, against the Python that it restates, and what it leaves behind."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
import redis
from external_oms.freshness import BUCKET_BURST, BUCKET_RATE_PER_SECOND, bucket_take
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from external_oms.config import Snapshot
from external_oms.stores import redis_scripts as scripts
from external_oms.stores.base import Cause, Event, Lease, Member
from external_oms.stores.redis import RedisStore
from external_oms.stores.redis_mirror import supersedes
from external_oms.stores.redis_wire import ServerClock, encode_snapshot
from tests.support.redis import RedisServer

KEYS = ("p:{acme}:record", "p:{acme}:lease")
NOTHING_KNOWN = ("acme", "p:changes", "member", "60000", "epoch", "", "0", "0", "0", "0", "")
DAY = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url, decode_responses=True) as client:
        client.flushall()
        yield client


Answer = tuple[list[str], list[str]]


def run(client: redis.Redis, script: scripts.Script, *more: str, known: tuple[str, ...] = NOTHING_KNOWN) -> Answer:
    record, outcome = client.eval(script.text, 2, *KEYS, *known, *more)
    return record, outcome


def acquire(client: redis.Redis, *, word: str = "w", metered: bool = False) -> Answer:
    bucket = (str(BUCKET_BURST), repr(BUCKET_RATE_PER_SECOND))
    return run(client, scripts.ACQUIRE, "5000", word, "1" if metered else "0", *bucket)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(level=st.floats(0, BUCKET_BURST), elapsed=st.floats(-10, 10))
def test_the_bucket_is_that_of_the_other_stores(client: redis.Redis, level: float, elapsed: float) -> None:
    seconds, microseconds = client.time()
    touched = seconds * 1_000_000 + microseconds - int(elapsed * 1_000_000)
    client.delete(*KEYS)
    client.hset(KEYS[0], mapping={"epoch": "e", "level": repr(level), "level_at": touched})
    record, outcome = acquire(client, metered=True)
    expected, wait_seconds = bucket_take(level, (int(record[0]) - touched) / 1_000_000)
    assert float(str(client.hget(KEYS[0], "level"))) == pytest.approx(expected, abs=1e-12)
    if wait_seconds:
        assert outcome[0] == "metered"
        assert float(outcome[1]) == pytest.approx(wait_seconds, abs=1e-12)
    else:
        assert outcome == ["lease", "1"]


SNAPSHOTS = st.builds(
    Snapshot,
    enabled=st.booleans(),
    updated_at=st.none() | st.integers(0, 2).map(lambda number: DAY + timedelta(microseconds=number)),
    etag=st.none(),
    generation=st.integers(0, 2),
    read_number=st.just(1),
    read_at=st.integers(-2, 2).map(float),
    fetched_at=st.just(DAY),
    lifetime_seconds=st.just(30.0),
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ours=SNAPSHOTS, theirs=st.none() | SNAPSHOTS)
def test_an_offer_is_taken_where_the_mirror_would_keep_it(
    client: redis.Redis, ours: Snapshot, theirs: Snapshot | None
) -> None:
    clock = ServerClock()
    clock.note(0.0, 0.0, 1_795_000_000_000_000)
    stored = encode_snapshot(theirs, member="other", clock=clock) if theirs else ""
    offered = encode_snapshot(ours, member="member", clock=clock)
    client.hset(KEYS[0], mapping={"epoch": "e", "generation": 2, "revision": 1, "snapshot": stored})
    record, _ = run(client, scripts.TOUCH, known=(*NOTHING_KNOWN[:-1], offered))
    assert record[6] == (offered if supersedes(ours, theirs) else stored)


def test_numbers_stay_whole_and_exact(client: redis.Redis) -> None:
    """Lua's own formatting would write 1795000000000001 as 1.795e+15."""
    run(client, scripts.INVALIDATE)
    run(client, scripts.INVALIDATE)
    record, _ = run(client, scripts.INVALIDATE)
    assert all(re.fullmatch(r"\d*", record[index]) for index in (0, 2, 3, 4, 5, 8))
    assert record[2] == "3"
    assert len(record[3]) == 16
    said = client.hgetall(KEYS[0])
    assert said["revision"] == record[3]


def test_a_call_that_the_client_repeats_finds_its_own_lease(client: redis.Redis) -> None:
    assert acquire(client, word="one")[1] == ["lease", "1"]
    assert acquire(client, word="one")[1] == ["lease", "1"]
    assert acquire(client, word="two")[1][:2] == ["busy", "1"]


def test_a_read_that_took_too_long_ends_nobody_elses_lease(client: redis.Redis) -> None:
    acquire(client, word="one")
    client.delete(KEYS[1])
    acquire(client, word="two")
    assert run(client, scripts.PUT, "1", "0", "{}")[1] == ["0"]
    assert run(client, scripts.FAIL, "1", "0", "{}")[1] == ["0"]
    run(client, scripts.RELEASE, "1")
    assert acquire(client, word="three")[1][:2] == ["busy", "2"]


def test_a_script_is_named_by_what_it_says() -> None:
    assert scripts.Script("return 1").sha == "e0e1f9fabfc9d4800c877a703b823ac0578ff8db"


def test_every_key_has_a_life_and_those_of_a_tenant_one_hash_tag(server: RedisServer, client: redis.Redis) -> None:
    prefix = f"test-{secrets.token_hex(4)}"
    store = RedisStore(server.url, prefix=prefix, tenants=("acme",), history_seconds=3600.0)
    try:
        store.deliver("acme", "msg_1", seconds=600.0)
        lease = store.acquire("acme", seconds=5.0, metered=True)
        assert isinstance(lease, Lease)
        store.append(Event(DAY, "acme", Cause.CHANGED))
        store.report([Member("host:1", "acme", 0, None, "expired", None)])
        lives = {key: client.ttl(key) for key in server.holds()}
        seen = {re.sub(r"seen:[0-9a-f]{64}$", "seen:…", key): life for key, life in lives.items()}
        assert set(seen) == {
            f"{prefix}:{{acme}}:record",
            f"{prefix}:{{acme}}:lease",
            f"{prefix}:{{acme}}:seen:…",
            f"{prefix}:{{_history}}:rows",
            f"{prefix}:{{_members}}:index",
            f"{prefix}:{{_members}}:host:1",
        }
        assert 29 * 86_400 < seen[f"{prefix}:{{acme}}:record"] <= 30 * 86_400
        assert 0 < seen[f"{prefix}:{{acme}}:lease"] <= 5
        assert 590 < seen[f"{prefix}:{{acme}}:seen:…"] <= 600
        assert 3590 < seen[f"{prefix}:{{_history}}:rows"] <= 3600
        assert 0 < seen[f"{prefix}:{{_members}}:index"] <= 60
        assert 0 < seen[f"{prefix}:{{_members}}:host:1"] <= 60
    finally:
        store.close()


def test_what_is_stored_is_json_and_says_nothing_of_the_delivery(server: RedisServer, client: redis.Redis) -> None:
    store = RedisStore(server.url, tenants=("acme",))
    try:
        store.deliver("acme", "msg_secret", seconds=600.0)
        lease = store.acquire("acme", seconds=5.0, metered=False)
        assert isinstance(lease, Lease)
        assert store.put(lease, Snapshot(True, DAY, '"e"', 1, lease.number, 0.0, DAY, 30.0))
        said = json.loads(server.field("external_oms:{acme}:record", "snapshot") or "")
        assert said["enabled"] is True
        assert said["generation"] == 1
        assert not [key for key in server.holds() if "msg_secret" in key]
    finally:
        store.close()
