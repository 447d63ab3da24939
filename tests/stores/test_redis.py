"""The Redis store against the contract, on a real server, and what it alone promises."""

from __future__ import annotations

import hashlib
import multiprocessing
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing.connection import Connection

import pytest
import redis

from external_oms.codec import MAX_COUNTER, decode_entry, encode_entry
from external_oms.entry import Change, Entry, Granted, Moment, is_current, shift
from external_oms.errors import StoreBusy, StoreError
from external_oms.records import Cause, Member
from external_oms.stores import redis as redis_module
from external_oms.stores.redis import RedisStore
from external_oms.stores.redis_scripts import NOTHING
from tests.support.clock import FakeClock
from tests.support.contract import (
    DEADLINE_SECONDS,
    TENANT,
    MakeElsewhere,
    MakeStore,
    SharedStoreContract,
    committed,
    delivered,
    event,
    invalidated,
    leased,
    try_lease,
    word,
)
from tests.support.redis import RedisServer
from tests.support.stores import PolledStore
from tests.support.waiting import wait_until

FORK = multiprocessing.get_context("fork")

OPENED: list[RedisStore] = []
"""Handles on the machine's clock, closed by the process that opened them."""


def ready(store: RedisStore) -> RedisStore:
    """Start a store and return it once it has pulled everything and follows the channel."""
    store.start()
    assert store._sync.first_pull.wait(10.0)
    return store


def elsewhere(url: str, prefix: str) -> RedisStore:
    """Return a handle in another process, on the machine's clock."""
    store = RedisStore(url, prefix=prefix, keys={TENANT: TENANT})
    OPENED.append(store)
    return ready(store)


def age(server: RedisServer, seconds: float) -> None:
    """Make everything that the server holds older: its clock cannot be set."""
    with redis.Redis(port=server.port, protocol=2) as client:
        for key in client.keys("*"):
            life_ms = client.pttl(key) - round(seconds * 1000)
            if life_ms <= 0:
                client.delete(key)
                continue
            if key.endswith(b":entry"):
                version, _, text = client.get(key).partition(b"\n")
                older = encode_entry(shift(decode_entry(text), -seconds))
                client.set(key, version + b"\n" + older.encode())
            elif client.type(key) == b"stream":
                unit = 1_000_000 if key.endswith(b":history") else 1000
                rows = client.xrange(key)
                client.delete(key)
                for number, fields in rows:
                    first, _, second = number.partition(b"-")
                    client.xadd(key, fields, id=b"%d-%s" % (int(first) - round(seconds * unit), second))
            client.pexpire(key, life_ms)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def prefix() -> str:
    """A prefix per test: a store that lives repairs what is flushed under it."""
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture
def make_store(server: RedisServer, clock: FakeClock, prefix: str) -> Iterator[MakeStore]:
    made: list[RedisStore] = []

    def make(
        *,
        history_rows: int = 10_000,
        history_seconds: float = 30 * 86_400.0,
        keys: Mapping[str, str] | None = None,
    ) -> RedisStore:
        store = RedisStore(
            server.url,
            keys=keys,
            prefix=prefix,
            clock=clock,
            history_rows=history_rows,
            history_seconds=history_seconds,
        )
        made.append(store)
        store.load(TENANT)
        return ready(store)

    yield make
    for store in made:
        store.close()


class TestRedisStore(SharedStoreContract):
    instant_tolerance_seconds = 2.0  # the test's clock stands still, and that of the server goes on
    visible_within_seconds = 5.0

    @pytest.fixture
    def make_elsewhere(self, server: RedisServer, prefix: str) -> Iterator[MakeElsewhere]:
        yield partial(elsewhere, server.url, prefix)
        while OPENED:
            OPENED.pop().close()

    @pytest.fixture
    def advance(self, server: RedisServer, clock: FakeClock) -> Callable[[float], None]:
        def advance(seconds: float) -> None:
            age(server, seconds)
            clock.advance(seconds)

        return advance


# -- round trips and conflicts ----------------------------------------------------------------------------------------


def scripts_run(server: RedisServer) -> int:
    """Return how many scripts the server has run."""
    with server.client() as client:
        return int(client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])


@pytest.fixture
def quiet(server: RedisServer, prefix: str, clock: FakeClock) -> Iterator[RedisStore]:
    """A store without its thread: nothing but the test talks to Redis."""
    store = RedisStore(server.url, keys={TENANT: TENANT}, prefix=prefix, clock=clock)
    invalidated(store)
    yield store
    store.close()


@pytest.fixture
def other(server: RedisServer, prefix: str, clock: FakeClock) -> Iterator[RedisStore]:
    store = RedisStore(server.url, keys={TENANT: TENANT}, prefix=prefix, clock=clock)
    yield store
    store.close()


def test_a_change_takes_two_round_trips_and_a_look_takes_one(server: RedisServer, quiet: RedisStore) -> None:
    before = scripts_run(server)
    assert not delivered(quiet, "msg_1").duplicate
    assert scripts_run(server) - before == 2
    assert delivered(quiet, "msg_1").duplicate
    assert scripts_run(server) - before == 3


def test_a_conflict_is_retried_over_the_entry_that_came_with_it(
    server: RedisServer, quiet: RedisStore, other: RedisStore
) -> None:
    given: list[int] = []

    def transition(entry: Entry, moment: Moment) -> Change[None]:
        if not given:
            delivered(other, "msg_1")
        given.append(entry.generation)
        assert moment.seen == (frozenset() if len(given) == 1 else {"msg_1"})
        return Change(Entry(generation=entry.generation + 1), None)

    before = scripts_run(server)
    quiet.transact(TENANT, transition, delivery_ids=["msg_1"])
    assert scripts_run(server) - before == 5, "read, the other's two, refused, stored"
    assert len(given) == 2
    assert given[1] > given[0]
    assert quiet.load(TENANT).generation == given[1] + 1


def test_a_transition_that_always_meets_conflicts_ends_as_busy(
    quiet: RedisStore, other: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_module, "BUSY_SECONDS", 0.1)

    def transition(entry: Entry, _moment: Moment) -> Change[None]:
        invalidated(other)
        return Change(Entry(generation=1 << 50), None)

    with pytest.raises(StoreBusy, match="try again"):
        quiet.transact(TENANT, transition)
    assert other.load(TENANT).generation < 1 << 50
    assert quiet.load(TENANT).generation < 1 << 50


def test_of_eight_processes_that_change_one_entry_none_loses_a_change(server: RedisServer, prefix: str) -> None:
    times = 40
    begin = FORK.Event()

    def work(pipe: Connection) -> None:
        store = RedisStore(server.url, keys={TENANT: TENANT}, prefix=prefix)
        begin.wait()
        generations: list[int] = []
        while len(generations) < times:
            with suppress(StoreBusy):
                generations.append(invalidated(store))
        pipe.send(generations)

    generations: list[int] = []
    with ExitStack() as stack:
        ends = [FORK.Pipe(duplex=False) for _ in range(8)]
        for _, theirs in ends:
            process = FORK.Process(target=work, args=(theirs,), daemon=True)
            process.start()
            stack.callback(process.kill)
        begin.set()
        for ours, _ in ends:
            assert ours.poll(DEADLINE_SECONDS)
            generations += ours.recv()
    assert len(set(generations)) == 8 * times
    store = ready(RedisStore(server.url, keys={TENANT: TENANT}, prefix=prefix))
    assert store.load(TENANT).generation == max(generations)
    store.close()


# -- the replica ------------------------------------------------------------------------------------------------------


def test_the_change_of_this_process_is_neither_polled_nor_pulled(make_store: MakeStore, server: RedisServer) -> None:
    store, other = make_store(), make_store()
    woken: list[str] = []
    store.attach(lambda: woken.append("store"))
    other_is_woken = threading.Event()
    other.attach(other_is_woken.set)
    store.poll()
    before = word(store)
    generation = invalidated(store)
    assert word(store) != before
    assert other_is_woken.wait(10.0)
    assert other.load(TENANT).generation == generation
    assert set(other.poll()) == {TENANT}
    assert store.poll() == set()
    assert not woken


def test_a_value_never_seems_younger_than_it_is(server: RedisServer, prefix: str) -> None:
    class SlowClock(FakeClock):
        """A clock by which every request takes a tenth of a second."""

        def monotonic(self) -> float:
            self.advance(0.1)
            return super().monotonic()

    def server_seconds() -> float:
        with server.client() as client:
            seconds, microseconds = client.time()
        return float(seconds) + microseconds / 1e6

    clock = SlowClock()
    one, other = (RedisStore(server.url, prefix=prefix, clock=clock) for _ in range(2))
    try:
        lease = leased(one)
        snapshot = committed(one, lease, clock)
        assert snapshot is not None
        received = FakeClock.monotonic(clock) - 0.2  # the entry; storing it took two ticks more
        text = str(server.command("GET", f"{prefix}:2:{{{TENANT}}}:entry"))
        in_redis = decode_entry(text.partition("\n")[2]).snapshot
        assert in_redis is not None
        assert server_seconds() - in_redis.read_at >= received - snapshot.read_at - 1e-6

        own = one.load(TENANT).snapshot
        assert own is not None
        assert snapshot.read_at - 0.2 < own.read_at < snapshot.read_at

        age_before = server_seconds() - in_redis.read_at
        try_lease(other)
        foreign = other.load(TENANT).snapshot
        assert foreign is not None
        assert FakeClock.monotonic(clock) - foreign.read_at > age_before
    finally:
        one.close()
        other.close()


def test_a_late_reply_does_not_take_the_replica_back(quiet: RedisStore, other: RedisStore) -> None:
    tenant = quiet._replica.tenant(TENANT)
    early = quiet._scripts.read(tenant.keys, (), NOTHING)
    generation = invalidated(quiet)
    state = tenant.state
    quiet._replica.adopt(tenant, early)
    assert tenant.state is state
    assert quiet.load(TENANT).generation == generation


def test_every_key_has_a_life_and_begins_with_the_prefix(
    make_store: MakeStore, server: RedisServer, clock: FakeClock, prefix: str
) -> None:
    server.flush()
    store = make_store()
    delivered(store, "msg_1", row=event(clock))
    committed(store, leased(store), clock)
    store.report([Member("host:1", TENANT, 1, True, "fresh", 1.0)])
    server.command("SET", f"{prefix}:2:{{{TENANT}}}:entry", "garbage")
    invalidated(store)
    with server.client() as client:
        names = {
            str(key).removeprefix(f"{prefix}:2:").partition("}:")[2][:9]: client.ttl(key) for key in client.scan_iter()
        }
    assert set(names) == {"entry", "history", "set-aside", "", "id:" + names_hash("msg_1")[:6]}
    assert all(0 < seconds <= 30 * 86_400 for seconds in names.values())


def names_hash(delivery_id: str) -> str:
    return hashlib.sha256(delivery_id.encode()).hexdigest()


# -- what is not ours -------------------------------------------------------------------------------------------------

DEEP = "[" * 50_000 + "]" * 50_000

Value = str | bytes | tuple[str, ...]

STRANGE: dict[str, Value] = {
    "text": "garbage",
    "no version": '{"generation": 3}',
    "deep JSON": f"17\n{DEEP}",
    "a generation of 2^60": f'17\n{{"generation": {1 << 60}}}',
    "a generation of 2^52 - 1": f'17\n{{"generation": {(1 << 52) - 1}}}',
    "a value of a later generation": (
        '17\n{"generation": 3, "token": 9, "snapshot": {"enabled": true, "generation": 4, "token": 9, "read_at": 1,'
        '"fetched_at": "2026-03-01T00:00:00+00:00", "lifetime_seconds": 30}}'
    ),
    "a value of a later read": (
        '17\n{"generation": 3, "token": 9, "snapshot": {"enabled": true, "generation": 3, "token": 10, "read_at": 1,'
        '"fetched_at": "2026-03-01T00:00:00+00:00", "lifetime_seconds": 30}}'
    ),
    "a generation of 2^53 as a float": '17\n{"generation": 9007199254740992.0}',
    "a lease without a life": '17\n{"lease": {"token": 1, "holder": "x", "generation": 0}}',
    "infinity": '17\n{"paced_until": Infinity}',
    "a version of 2^60": f"{1 << 60}\n{{}}",
    "a version of 400 digits": "9" * 400 + "\n{}",
    "bytes": b"\xff\xfe\x00",
    "a hash": ("HSET", "generation", str(1 << 53)),
    "a list": ("RPUSH", "1", "2"),
}


def put(server: RedisServer, key: str, value: Value) -> None:
    """Replace a key in one step."""
    name, *arguments = value if isinstance(value, tuple) else ("SET", value)
    with server.client() as client, client.pipeline() as pipeline:
        pipeline.delete(key)
        pipeline.execute_command(name, key, *arguments)  # type: ignore[no-untyped-call]  # redis-py has it without types
        pipeline.execute()


@pytest.fixture
def make_polled(make_store: MakeStore) -> Iterator[Callable[[], PolledStore]]:
    made: list[PolledStore] = []

    def make() -> PolledStore:
        made.append(PolledStore(make_store()))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.mark.parametrize("value", STRANGE.values(), ids=STRANGE)
def test_what_is_no_entry_is_set_aside_and_the_generation_rises(
    make_polled: Callable[[], PolledStore],
    server: RedisServer,
    clock: FakeClock,
    prefix: str,
    caplog: pytest.LogCaptureFixture,
    value: Value,
) -> None:
    store, other = make_polled(), make_polled()
    committed(store, leased(store), clock)
    known = invalidated(store)
    assert store.load(TENANT).snapshot is not None
    key = f"{prefix}:2:{{{TENANT}}}:entry"
    put(server, key, value)
    first = delivered(store, "msg_1").generation
    assert first > known
    assert delivered(store, "msg_2").generation > first
    wait_until(lambda: other.load(TENANT).generation == store.load(TENANT).generation)
    assert store.load(TENANT).snapshot is not None, "the last known value is still there"
    with redis.Redis(port=server.port, protocol=2) as client:
        aside = f"{prefix}:2:{{{TENANT}}}:set-aside:entry"
        if not isinstance(value, tuple):
            assert client.get(aside) == (value if isinstance(value, bytes) else value.encode())
        assert client.exists(aside) == 1
    assert isinstance(try_lease(other), Granted)
    lines = [entry for entry in caplog.records if entry.name == "external_oms"]
    assert 1 <= len(lines) <= 4, "at most two for each store"
    assert {entry.levelname for entry in lines} == {"WARNING"}
    assert any("set aside" in entry.message for entry in lines)
    assert not any(entry.exc_info for entry in lines)


@pytest.mark.parametrize("field", ["generation", "token"])
def test_forged_numbers_at_their_end_do_not_keep_deliveries_and_reads_from_having_effect(
    make_polled: Callable[[], PolledStore], server: RedisServer, clock: FakeClock, prefix: str, field: str
) -> None:
    store, other = make_polled(), make_polled()
    committed(store, leased(store), clock)
    wait_until(lambda: other.load(TENANT).snapshot is not None)
    with server.client() as client:
        seconds, microseconds = client.time()
    version = seconds * 1_000_000 + microseconds
    put(server, f"{prefix}:2:{{{TENANT}}}:entry", f'{version}\n{{"{field}": {MAX_COUNTER - 1}}}')
    server.command("PUBLISH", f"{prefix}:2:changes", f"{version} {TENANT}")

    def works() -> bool:
        delivered(store, f"msg_{secrets.token_hex(4)}")
        lease = try_lease(other)
        if not isinstance(lease, Granted) or committed(other, lease.lease, clock) is None:
            return False
        entry = other.load(TENANT)
        return is_current(entry) and max(entry.generation, entry.token) < MAX_COUNTER - 100

    wait_until(works)
    wait_until(lambda: is_current(store.load(TENANT)))


def test_a_store_that_knows_nothing_takes_what_is_no_entry_for_none(
    make_store: MakeStore, server: RedisServer, prefix: str
) -> None:
    put(server, f"{prefix}:2:{{{TENANT}}}:entry", STRANGE["deep JSON"])
    store = make_store()
    assert store.load(TENANT) == Entry()
    assert isinstance(try_lease(store), Granted)
    assert [row.cause for row in store.history()] == [Cause.STORE]


@pytest.mark.parametrize(
    "value", [("SET", "text"), ("HSET", "a", "b"), ("XADD", "18446744073709551615-18446744073709551615", "a", "b")]
)
def test_a_history_that_cannot_be_added_to_is_set_aside(
    make_store: MakeStore, server: RedisServer, clock: FakeClock, prefix: str, value: tuple[str, ...]
) -> None:
    store = make_store()
    put(server, f"{prefix}:2:{{{TENANT}}}:history", value)
    assert store.history() == ()
    delivered(store, "msg_1", row=event(clock, detail="one"))
    store.append(event(clock, detail="two"))
    assert [row.detail for row in store.history()] == ["two", "one"]
    assert f"{prefix}:2:{{{TENANT}}}:set-aside:history" in server.holds()


def test_rows_and_heartbeats_that_nobody_of_us_wrote_are_passed_over(
    make_store: MakeStore, server: RedisServer, clock: FakeClock, prefix: str
) -> None:
    store = make_store()
    members = f"{prefix}:2:{{members}}"
    put(server, members, ("SET", "text"))
    assert store.members() == ()
    store.report([Member("host:1", TENANT, 1, True, "fresh", 1.0)])
    store.append(event(clock, detail="one"))
    for text in ("", "text", DEEP, '{"cause": "of a later version"}', "Infinity"):
        server.command("XADD", f"{prefix}:2:{{{TENANT}}}:history", "*", "event", text)
        server.command("XADD", members, "*", "member", text)
        server.command("XADD", members, "*", "key", TENANT, "member", text)
    server.command("XADD", f"{prefix}:2:{{{TENANT}}}:history", "*", "other", "text")
    server.command("XADD", members, "*", "other", "text")
    assert [row.detail for row in store.history()] == ["one"]
    assert [member.name for member in store.members()] == ["host:1"]
    store.append(event(clock, detail="two"))
    assert [row.detail for row in store.history()] == ["two", "one"]


def test_a_message_is_a_hint_and_no_message_is_believed_or_costs_more_than_a_pull(
    make_store: MakeStore, server: RedisServer, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, other = make_store(), make_store()
    generation = invalidated(store)
    wait_until(lambda: other.load(TENANT).generation == generation)
    entry, subscriptions = other.load(TENANT), server.command("PUBSUB", "NUMSUB", f"{prefix}:2:changes")
    for message in (
        b"",
        b" ",
        DEEP.encode(),
        b"\xff\x00",
        TENANT.encode(),
        b"%d %s" % (1 << 60, TENANT.encode()),
        b"x " + TENANT.encode(),
        b"null",
        b"9" * 100_000,
        b'["x","acme",["1","epoch","9","9","9",""]]',
    ):
        with redis.Redis(port=server.port, protocol=2) as client:
            assert client.publish(f"{prefix}:2:changes", message) == 2
    generation = invalidated(store)
    wait_until(lambda: other.load(TENANT).generation == generation)
    assert other.load(TENANT).generation > entry.generation
    assert server.command("PUBSUB", "NUMSUB", f"{prefix}:2:changes") == subscriptions
    assert other.health().ok
    assert not [entry for entry in caplog.records if entry.name == "external_oms"]


# -- threads ----------------------------------------------------------------------------------------------------------


def threads_of_stores() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "external-oms-redis"]


def test_the_thread_starts_only_by_start_and_does_not_come_back_after_close(
    server: RedisServer, clock: FakeClock, prefix: str
) -> None:
    before = len(threads_of_stores())
    store = RedisStore(server.url, keys={TENANT: TENANT}, prefix=prefix, clock=clock)

    def use() -> None:
        invalidated(store)
        store.load(TENANT)
        store.version_ref(TENANT)
        store.poll()
        store.append(event(clock))
        store.history()

    use()
    assert len(threads_of_stores()) == before
    ready(store)
    assert len(threads_of_stores()) == before + 1
    store.close()
    use()
    assert len(threads_of_stores()) == before
    store.close()


def test_a_process_that_has_no_thread_to_spare_says_so_and_tries_again(
    server: RedisServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    store = RedisStore(server.url, keys={TENANT: TENANT}, prefix=prefix)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            store.start()
            with pytest.raises(StoreError, match="limit of threads"):
                store.poll()
            assert not store.health().ok
            assert invalidated(store) > 0

        def polls() -> bool:
            try:
                store.poll()
            except StoreError:
                return False
            return True

        wait_until(polls)
        assert store.health().ok
    finally:
        store.close()


def test_a_defect_in_the_thread_is_reported_once_and_the_thread_goes_on(
    make_store: MakeStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    prefix: str,
    server: RedisServer,
) -> None:
    store = RedisStore(server.url, keys={TENANT: TENANT}, prefix=prefix, bound_seconds=0.2)
    failures: list[int] = []

    def fail(_everything: bool) -> None:
        failures.append(1)
        raise ZeroDivisionError

    pull = store._sync._pull
    monkeypatch.setattr(store._sync, "_pull", fail)
    store.start()
    try:
        wait_until(lambda: len(failures) > 3)
        with pytest.raises(StoreError, match="defect"):
            store.poll()
        monkeypatch.setattr(store._sync, "_pull", pull)
        wait_until(lambda: store.health().ok)
        assert len([entry for entry in caplog.records if "defect" in entry.message]) == 1
    finally:
        store.close()
