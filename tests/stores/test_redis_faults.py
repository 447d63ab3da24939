"""What a fleet goes through: deaf connections, a frozen, emptied or replaced server. Always back in step in time.

Each test has a bound of a second and measures against it; the read path is timed all the while.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from external_oms.clock import SYSTEM_CLOCK
from external_oms.config import Failure, Snapshot
from external_oms.stores.base import Cause, Event, Lease, Member
from external_oms.stores.redis import RedisStore
from tests.support.contract import in_a_fork
from tests.support.redis import RedisProxy, RedisServer
from tests.support.waiting import wait_until

TENANT = "acme"
BOUND_SECONDS = 1.0
LOAD_SECONDS = 0.005
"""The longest that an evaluation may be kept by the store, whatever happens to Redis; judged at the 99th percentile,
for the machine stalls too. One that waited for a socket would be kept forty times as long, each time."""


def snapshot(lease: Lease, *, enabled: bool, updated: int | None = None) -> Snapshot:
    """What a read under this lease gives now; `updated` seconds past a fixed day."""
    day = datetime(2026, 3, 1, tzinfo=UTC)
    return Snapshot(
        enabled=enabled,
        updated_at=None if updated is None else day + timedelta(seconds=updated),
        etag=None,
        generation=lease.record.generation,
        read_number=lease.number,
        read_at=SYSTEM_CLOCK.monotonic(),
        fetched_at=datetime.fromtimestamp(SYSTEM_CLOCK.wall(), UTC),
        lifetime_seconds=30.0,
    )


def store_value(store: RedisStore, *, enabled: bool, updated: int | None = None) -> None:
    lease = store.acquire(TENANT, seconds=5.0, metered=False)
    assert isinstance(lease, Lease)
    assert store.put(lease, snapshot(lease, enabled=enabled, updated=updated))


def is_fresh(store: RedisStore) -> bool:
    record = store.load(TENANT)
    return record.snapshot is not None and record.snapshot.generation >= record.generation


def reached(store: RedisStore, generation: int) -> bool:
    return store.load(TENANT).generation >= generation


class Reader(threading.Thread):
    """Evaluates all the time, as far as the store sees of it, and keeps what went wrong."""

    def __init__(self, store: RedisStore) -> None:
        super().__init__(daemon=True)
        self._store = store
        self._ended = threading.Event()
        self.took: list[float] = []
        self.generations: list[int] = []

    def run(self) -> None:
        while not self._ended.wait(0.0005):
            began = time.perf_counter()
            self._store.watch(TENANT)
            generation = self._store.load(TENANT).generation
            self.took.append(time.perf_counter() - began)
            self.generations.append(generation)

    def end(self) -> None:
        self._ended.set()
        self.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[RedisProxy]:
    proxy = RedisProxy(server.port)
    yield proxy
    proxy.close()


MakeMember = Callable[[str], RedisStore]


@pytest.fixture
def member(server: RedisServer) -> Iterator[MakeMember]:
    """Makes members of one fleet, in step from the start, and reads from each all the while."""
    prefix = f"test-{secrets.token_hex(4)}"
    made: list[tuple[RedisStore, Reader]] = []

    def make(url: str) -> RedisStore:
        store = RedisStore(url, prefix=prefix, tenants=(TENANT,), bound_seconds=BOUND_SECONDS)
        store.watch(TENANT)
        wait_until(lambda: store.verified_until > float("-inf") and store.is_hearing)
        reader = Reader(store)
        reader.start()
        made.append((store, reader))
        return store

    yield make
    for store, reader in made:
        reader.end()
        began = time.monotonic()
        store.close()
        assert time.monotonic() - began < 1.0
        assert sorted(reader.took)[len(reader.took) * 99 // 100] < LOAD_SECONDS
        assert reader.generations == sorted(reader.generations), "a generation fell"


# -- hurry --------------------------------------------------------------------------------------------------------


def seconds_until(condition: Callable[[], object]) -> float:
    began = time.monotonic()
    wait_until(condition)
    return time.monotonic() - began


def test_an_invalidation_and_the_value_after_it_reach_the_other_members_long_before_a_look_is_due(
    server: RedisServer, member: MakeMember
) -> None:
    one, other = member(server.url), member(server.url)
    took = []
    for number in range(1, 31):
        generation = one.invalidate(TENANT)
        took.append(seconds_until(partial(reached, other, generation)))
        store_value(one, enabled=number % 2 == 0)
        took.append(seconds_until(lambda: is_fresh(other)))
        assert other.load(TENANT).foreign
    assert sorted(took)[len(took) // 2] < 0.05


def test_a_member_is_woken_by_what_others_change_and_not_by_what_it_does_itself(
    server: RedisServer, member: MakeMember
) -> None:
    one, other = member(server.url), member(server.url)
    woken = threading.Event()
    other.attach(woken.set)
    other.invalidate(TENANT)
    assert other.changed() == ()
    assert not woken.is_set()
    one.invalidate(TENANT)
    assert woken.wait(5.0)
    assert other.changed() == (TENANT,)
    assert other.changed() == ()


def test_what_strangers_say_on_the_channel_changes_nothing(server: RedisServer, member: MakeMember) -> None:
    store = member(server.url)
    store_value(store, enabled=True)
    before = store.load(TENANT)
    with server.client() as client:
        well_formed = '["x","acme",["1","epoch","9","9","9","",%s,"","0"]]'
        for said in ("", "null", "[1,2,3]", '["x","acme",[{},1]]', "\xff", well_formed % '"{}"', well_formed % "7"):
            assert client.publish(f"{store.prefix}:changes", said) == 1
    wait_until(lambda: store.verified_until > SYSTEM_CLOCK.monotonic() + BOUND_SECONDS * 0.9)
    assert store.load(TENANT) == before
    assert store.health().ok


# -- certainty ----------------------------------------------------------------------------------------------------


def test_a_member_whose_connections_went_deaf_is_back_in_step_within_the_bound(
    server: RedisServer, proxy: RedisProxy, member: MakeMember
) -> None:
    deaf, healthy = member(proxy.url), member(server.url)
    for _ in range(3):
        wait_until(lambda: proxy.living >= 2)
        proxy.deafen()
        generation = healthy.invalidate(TENANT)
        wait_until(partial(reached, deaf, generation), seconds=BOUND_SECONDS * 1.1)
    wait_until(lambda: deaf.health().ok)


def test_a_deaf_subscription_is_replaced_within_the_bound(proxy: RedisProxy, member: MakeMember) -> None:
    store = member(proxy.url)
    proxy.deafen()
    wait_until(lambda: not store.is_hearing, seconds=BOUND_SECONDS)
    wait_until(lambda: store.is_hearing, seconds=BOUND_SECONDS)


def test_a_waiter_asks_by_itself_where_nothing_is_heard(
    server: RedisServer, proxy: RedisProxy, member: MakeMember
) -> None:
    deaf, healthy = member(proxy.url), member(server.url)
    proxy.deafen()
    wait_until(lambda: not deaf.is_hearing)
    proxy.deafen()
    words, slot = deaf.watch(TENANT)
    later = threading.Timer(0.05, lambda: store_value(healthy, enabled=True))
    later.start()
    began = time.monotonic()
    while not is_fresh(deaf):
        assert time.monotonic() - began < BOUND_SECONDS
        deaf.wait(TENANT, words[slot], 0.5)
    later.join()


def test_a_cut_connection_costs_nothing_but_a_new_one(
    server: RedisServer, proxy: RedisProxy, member: MakeMember
) -> None:
    cut, healthy = member(proxy.url), member(server.url)
    for _ in range(5):
        proxy.cut()
        generation = healthy.invalidate(TENANT)
        wait_until(partial(reached, cut, generation), seconds=BOUND_SECONDS)


# -- Redis forgets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["flush", "restart"])
def test_what_redis_forgot_counts_as_an_invalidation_and_the_last_value_lives_on(
    server: RedisServer, member: MakeMember, loss: str
) -> None:
    one, other = member(server.url), member(server.url)
    for _ in range(3):
        one.invalidate(TENANT)
    store_value(one, enabled=True)
    wait_until(lambda: is_fresh(other))
    server.flush() if loss == "flush" else server.restart()
    wait_until(lambda: not is_fresh(one) and not is_fresh(other), seconds=BOUND_SECONDS)
    wait_until(lambda: one.load(TENANT).generation == other.load(TENANT).generation >= 4)
    newcomer = member(server.url)
    for store in (one, other, newcomer):
        record = store.load(TENANT)
        assert record.generation == 4
        assert record.snapshot is not None
        assert record.snapshot.enabled is True
        assert record.snapshot.generation == 3
    store_value(newcomer, enabled=False)
    wait_until(lambda: is_fresh(one) and is_fresh(other))


def test_a_member_with_a_newer_generation_raises_a_record_that_was_born_again_below_it(
    server: RedisServer, proxy: RedisProxy, member: MakeMember
) -> None:
    """One member knows 5 and is cut off; Redis forgets; a newcomer begins at 0. Nobody's number may fall."""
    ahead = member(proxy.url)
    for _ in range(5):
        ahead.invalidate(TENANT)
    proxy.swallows = True
    server.flush()
    newcomer = member(server.url)
    store_value(newcomer, enabled=True)
    assert newcomer.load(TENANT).generation == 0
    proxy.swallows = False
    proxy.cut()
    wait_until(lambda: newcomer.load(TENANT).generation == ahead.load(TENANT).generation == 6)
    assert not is_fresh(newcomer)


def test_an_operation_that_meets_a_forgotten_record_repairs_it_at_once(server: RedisServer, member: MakeMember) -> None:
    store = member(server.url)
    store.invalidate(TENANT)
    lease = store.acquire(TENANT, seconds=5.0, metered=False)
    assert isinstance(lease, Lease)
    server.flush()
    assert store.put(lease, snapshot(lease, enabled=True)) is False
    assert store.load(TENANT).generation == 2
    server.flush()
    assert store.invalidate(TENANT) == 3
    server.flush()
    assert store.deliver(TENANT, "msg_1", seconds=60.0) == 4


def test_a_failover_that_lost_writes_counts_as_an_invalidation(
    server: RedisServer, proxy: RedisProxy, member: MakeMember, tmp_path_factory: pytest.TempPathFactory
) -> None:
    replica = RedisServer(tmp_path_factory.mktemp("replica"), "--replicaof", "127.0.0.1", str(server.port))
    replica.start()
    try:
        one, other = member(proxy.url), member(proxy.url)
        one.invalidate(TENANT)
        store_value(one, enabled=True)
        with replica.client() as client:
            wait_until(lambda: client.info("replication")["master_link_status"] == "up")
            key = f"{one.prefix}:{{{TENANT}}}:record"
            wait_until(lambda: replica.field(key, "snapshot"))
            client.replicaof("NO", "ONE")
        one.invalidate(TENANT)
        wait_until(lambda: other.load(TENANT).generation == 2)
        store_value(one, enabled=False)
        wait_until(lambda: is_fresh(other))
        proxy.target = replica.port
        proxy.cut()
        wait_until(lambda: not is_fresh(one) and not is_fresh(other), seconds=BOUND_SECONDS)
        wait_until(lambda: one.load(TENANT).generation == other.load(TENANT).generation == 3)
        for store in (one, other):
            record = store.load(TENANT)
            assert record.snapshot is not None
            assert record.snapshot.enabled is False, "the value that Redis lost is not replaced by the one before it"
    finally:
        replica.stop()


# -- Redis away ---------------------------------------------------------------------------------------------------


def test_while_redis_is_frozen_a_member_works_alone_and_at_once(
    server: RedisServer, member: MakeMember, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="external_oms")
    one, other = member(server.url), member(server.url)
    store_value(one, enabled=True)
    wait_until(lambda: is_fresh(other))
    server.freeze()
    try:
        began = time.monotonic()
        assert one.invalidate(TENANT) == 1
        assert time.monotonic() - began < 0.5
        assert not one.health().ok
        assert "does not answer" in one.health().problem
        began = time.monotonic()
        for _ in range(20):
            assert one.deliver(TENANT, "msg_1", seconds=60.0) in {2, None}
            lease = one.acquire(TENANT, seconds=5.0, metered=False)
            assert isinstance(lease, Lease)
            assert not isinstance(one.acquire(TENANT, seconds=5.0, metered=False), Lease)
            assert one.put(lease, snapshot(lease, enabled=False))
            one.append(Event(datetime.now(UTC), TENANT, Cause.CHANGED, detail="alone"))
            one.report([Member("host:1", TENANT, 2, False, "fresh", 0.0)])
            assert len(one.members()) == 1
            assert one.history()[0].detail == "alone"
        assert (time.monotonic() - began) / 20 < LOAD_SECONDS
        assert is_fresh(one)
        assert is_fresh(other), "it has its value and nobody told it otherwise"
    finally:
        server.thaw()
    wait_until(lambda: one.health().ok and other.health().ok, seconds=BOUND_SECONDS)
    wait_until(lambda: one.load(TENANT).generation == other.load(TENANT).generation >= 3)
    for store in (one, other):
        record = store.load(TENANT)
        assert not is_fresh(store), "what was invalidated alone is invalidated for all"
        assert record.snapshot is not None
        assert record.snapshot.enabled is False
    assert len(other.history(limit=50)) == 20
    lines = [entry.levelname for entry in caplog.records if entry.name == "external_oms"]
    assert sorted(lines) in (["INFO", "WARNING"], ["INFO", "INFO", "WARNING", "WARNING"])


def test_many_threads_that_meet_a_frozen_redis_wait_once_and_together(server: RedisServer, member: MakeMember) -> None:
    store = member(server.url)
    took: list[float] = []

    def work() -> None:
        for _ in range(5):
            began = time.monotonic()
            store.invalidate(TENANT)
            took.append(time.monotonic() - began)

    server.freeze()
    try:
        threads = [threading.Thread(target=work) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        server.thaw()
    assert len(took) == 80
    assert max(took) < 1.0
    assert sum(seconds > 0.1 for seconds in took) <= 16
    wait_until(lambda: store.health().ok)


def test_a_value_read_alone_reaches_the_fleet_where_redis_has_nothing_newer(
    server: RedisServer, proxy: RedisProxy, member: MakeMember
) -> None:
    lonely, other = member(proxy.url), member(server.url)
    store_value(other, enabled=True, updated=10)
    wait_until(lambda: is_fresh(lonely))
    proxy.swallows = True
    store_value(lonely, enabled=False, updated=20)
    assert not lonely.health().ok
    proxy.swallows = False
    wait_until(lambda: (found := other.load(TENANT).snapshot) is not None and found.enabled is False)
    assert is_fresh(other)
    wait_until(lambda: lonely.health().ok)


def test_a_value_read_alone_is_dropped_where_redis_has_a_newer_one(
    server: RedisServer, proxy: RedisProxy, member: MakeMember
) -> None:
    lonely, other = member(proxy.url), member(server.url)
    store_value(lonely, enabled=True, updated=10)
    wait_until(lambda: is_fresh(other))
    proxy.swallows = True
    store_value(lonely, enabled=True, updated=15)
    store_value(other, enabled=False, updated=20)
    proxy.swallows = False
    wait_until(lambda: (found := lonely.load(TENANT).snapshot) is not None and found.enabled is False)
    wait_until(lambda: lonely.health().ok)
    found = other.load(TENANT).snapshot
    assert found is not None
    assert found.enabled is False


def test_a_lease_given_by_redis_can_be_put_alone_and_one_given_alone_with_redis_back(
    proxy: RedisProxy, member: MakeMember
) -> None:
    store = member(proxy.url)
    lease = store.acquire(TENANT, seconds=5.0, metered=False)
    assert isinstance(lease, Lease)
    proxy.swallows = True
    assert store.put(lease, snapshot(lease, enabled=True))
    alone = store.acquire(TENANT, seconds=5.0, metered=False)
    assert isinstance(alone, Lease)
    assert alone.number > lease.number
    failure = Failure("unavailable", "no answer", 503, 1, alone.number, 0, 0.0, datetime.now(UTC), 0.0)
    assert store.fail(alone, failure)
    again = store.acquire(TENANT, seconds=5.0, metered=False)
    assert isinstance(again, Lease)
    proxy.swallows = False
    wait_until(lambda: store.health().ok)
    assert store.put(again, snapshot(again, enabled=False))
    found = store.load(TENANT).snapshot
    assert found is not None
    assert found.enabled is False


def test_a_member_that_starts_without_redis_works_alone_and_joins_when_it_comes(
    server: RedisServer, proxy: RedisProxy, member: MakeMember
) -> None:
    other = member(server.url)
    other.invalidate(TENANT)
    proxy.swallows = True
    late = RedisStore(proxy.url, prefix=other.prefix, tenants=(TENANT,), bound_seconds=BOUND_SECONDS)
    try:
        assert late.invalidate(TENANT) == 1
        lease = late.acquire(TENANT, seconds=5.0, metered=False)
        assert isinstance(lease, Lease)
        assert late.put(lease, snapshot(lease, enabled=True))
        assert is_fresh(late)
        proxy.swallows = False
        wait_until(lambda: late.health().ok)
        wait_until(lambda: late.load(TENANT).generation == other.load(TENANT).generation == 2)
        assert not is_fresh(late)
    finally:
        late.close()


def test_closing_takes_less_than_a_second_whatever_redis_does(proxy: RedisProxy) -> None:
    store = RedisStore(proxy.url, tenants=(TENANT,), bound_seconds=BOUND_SECONDS)
    store.watch(TENANT)
    wait_until(lambda: store.is_hearing)
    proxy.swallows = True
    began = time.monotonic()
    store.close()
    assert time.monotonic() - began < 1.0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("external-oms-redis")]
    assert store.invalidate(TENANT) == 1, "and it may be used again"
    store.close()


def test_history_written_alone_is_added_with_its_own_time_once_redis_is_back(
    server: RedisServer, proxy: RedisProxy, member: MakeMember
) -> None:
    lonely, other = member(proxy.url), member(server.url)
    proxy.swallows = True
    happened = datetime(2026, 11, 1, tzinfo=UTC)
    for number in range(3):
        lonely.append(Event(happened, TENANT, Cause.CHANGED, detail=str(number)))
    assert [row.detail for row in lonely.history(limit=2)] == ["2", "1"]
    assert other.history() == ()
    proxy.swallows = False
    wait_until(lambda: len(other.history()) == 3)
    assert [(row.detail, row.at) for row in other.history()] == [(str(number), happened) for number in (2, 1, 0)]


@pytest.mark.parametrize("spoil", ["hset {key} snapshot {{}}", "hset {key} generation many", "set {key} text"])
def test_a_record_that_no_member_wrote_is_not_believed_and_the_member_works_alone(
    server: RedisServer, member: MakeMember, spoil: str
) -> None:
    store = member(server.url)
    store_value(store, enabled=True)
    key = f"{store.prefix}:{{{TENANT}}}:record"
    if spoil.startswith("hset"):
        server.command("HSET", key, "revision", "9" * 16)
    server.command(*spoil.format(key=key).split(" "))
    wait_until(lambda: not store.health().ok)
    assert is_fresh(store), "what it knew it still knows"
    assert store.invalidate(TENANT) == 1
    server.command("DEL", key)
    wait_until(lambda: store.health().ok)
    wait_until(lambda: store.load(TENANT).generation >= 2)


def test_history_or_members_that_cannot_be_used_take_nothing_else_along(
    server: RedisServer, proxy: RedisProxy, member: MakeMember
) -> None:
    store = member(proxy.url)
    rows, index, report = (
        f"{store.prefix}:{name}" for name in ("{_history}:rows", "{_members}:index", "{_members}:host:1")
    )
    event, told = Event(datetime.now(UTC), TENANT, Cause.CHANGED), [Member("host:1", TENANT, 0, None, "expired", None)]
    for key in (rows, index):
        server.command("SET", key, "text")
    store.append(event)
    store.report(told)
    assert [row.cause for row in store.history()] == [Cause.CHANGED], "what this process knows of it"
    assert [one.name for one in store.members()] == ["host:1"]
    store.invalidate(TENANT)
    wait_until(lambda: store.verified_until > SYSTEM_CLOCK.monotonic() + BOUND_SECONDS * 0.9)
    assert store.health().ok
    proxy.swallows = True
    store.invalidate(TENANT)
    assert not store.health().ok
    proxy.swallows = False
    wait_until(lambda: store.health().ok)
    server.command("DEL", rows, index)
    server.command("XADD", rows, "*", "event", '{"cause": "of a later version"}')
    store.report(told)
    wait_until(lambda: len(store.history()) == 1)
    server.command("SET", report, "[1]")
    assert [one.name for one in store.members()] == ["host:1"]
    server.command("DEL", report)
    assert store.members() == ()
    assert store.health().ok


def test_a_store_without_tenants_still_says_whether_redis_answers(proxy: RedisProxy) -> None:
    proxy.swallows = True
    store = RedisStore(proxy.url, bound_seconds=BOUND_SECONDS)
    try:
        store.attach(lambda: None)
        store.append(Event(datetime.now(UTC), TENANT, Cause.STORE))
        wait_until(lambda: not store.health().ok)
        proxy.swallows = False
        wait_until(lambda: store.health().ok)
    finally:
        store.close()


# -- forks --------------------------------------------------------------------------------------------------------


def test_a_child_answers_from_the_warm_record_follows_and_leaves_the_parents_sockets_alone(
    server: RedisServer, member: MakeMember
) -> None:
    parent, other = member(server.url), member(server.url)
    store_value(parent, enabled=True)
    words, slot = parent.watch(TENANT)
    before = words[slot]

    def child() -> bool:
        parent.after_fork()
        changed = words[slot] != before
        warm = is_fresh(parent)
        generation = other.load(TENANT).generation
        other.after_fork()
        other.invalidate(TENANT)
        wait_until(lambda: parent.load(TENANT).generation == generation + 1)
        parent.close()
        other.close()
        return changed and warm

    for number in range(1, 6):
        assert in_a_fork(child)
        wait_until(partial(reached, parent, number))
        assert parent.health().ok
        assert parent.is_hearing
        store_value(parent, enabled=number % 2 == 0)
        before = words[slot]


def idle_until_unverified(store: RedisStore) -> None:
    wait_until(lambda: SYSTEM_CLOCK.monotonic() > store.verified_until, seconds=BOUND_SECONDS * 2)


def test_a_child_that_was_idle_never_serves_as_fresh_what_was_invalidated_meanwhile(
    server: RedisServer, member: MakeMember
) -> None:
    parent, other = member(server.url), member(server.url)

    def child() -> bool:
        parent.after_fork()
        other.after_fork()
        other.invalidate(TENANT)
        idle_until_unverified(parent)
        was_fresh = is_fresh(parent)
        wait_until(lambda: parent.load(TENANT).generation == other.load(TENANT).generation)
        parent.close()
        other.close()
        return not was_fresh

    store_value(parent, enabled=True)
    wait_until(lambda: is_fresh(other))
    assert in_a_fork(child)


def test_a_child_doubts_what_it_inherited_until_its_first_look_has_ended_even_badly(
    proxy: RedisProxy, member: MakeMember
) -> None:
    parent = member(proxy.url)
    store_value(parent, enabled=True)

    def child() -> bool:
        parent.after_fork()
        idle_until_unverified(parent)
        first = parent.load(TENANT)
        doubted = first.snapshot is not None and first.snapshot.generation < first.generation
        recent = first.invalidated_at is not None and SYSTEM_CLOCK.monotonic() - first.invalidated_at < 0.1
        wait_until(lambda: is_fresh(parent))
        return doubted and recent and not parent.health().ok

    proxy.swallows = True
    assert in_a_fork(child)
