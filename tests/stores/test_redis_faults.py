"""What a fleet goes through: deaf and cut connections, a Redis that is frozen, emptied, replaced or full, and forks.

Evaluations are timed and watched in every test: they never wait, and no generation falls.
"""

from __future__ import annotations

import multiprocessing
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection

import pytest

from external_oms.clock import SYSTEM_CLOCK
from external_oms.entry import Change, Entry, Lease, Moment, Snapshot, is_current
from external_oms.errors import StoreError
from external_oms.records import Cause, Event, Member
from external_oms.stores.base import Store
from external_oms.stores.fallback import Fallback
from external_oms.stores.redis import RedisStore
from tests.support.contract import committed, delivered, in_a_fork, invalidated, leased, word
from tests.support.redis import RedisProxy, RedisServer
from tests.support.stores import PolledStore
from tests.support.waiting import wait_until
from tests.support.watching import watched

TENANT = "acme"
KEYS = {TENANT: "acme@https://acme.example"}
BOUND_SECONDS = 1.0
PATIENCE_SECONDS = 20 * BOUND_SECONDS
"""Many times what is promised, as the machine may be busy; without what is tested it would take for ever."""


def is_fresh(store: Store) -> bool:
    entry = store.load(TENANT)
    return is_current(entry) and entry.verified


def value(store: Store) -> bool | None:
    snapshot = store.load(TENANT).snapshot
    return None if snapshot is None else snapshot.enabled


def put(store: Store, lease: Lease, *, enabled: bool) -> Snapshot | None:
    return committed(store, lease, SYSTEM_CLOCK, TENANT, enabled=enabled)  # type: ignore[arg-type]  # any clock will do


def store_value(store: Store, *, enabled: bool) -> None:
    assert put(store, leased(store, TENANT), enabled=enabled) is not None


def reaches(store: Store, generation: int) -> None:
    wait_until(lambda: store.load(TENANT).generation >= generation, seconds=PATIENCE_SECONDS)


def polls(store: RedisStore) -> bool:
    try:
        store.poll()
    except StoreError:
        return False
    return True


def follows(store: RedisStore) -> RedisStore:
    """Return the store once its first pull has ended."""
    store.start()
    assert store._sync.first_pull.wait(PATIENCE_SECONDS)
    return store


class Reader(threading.Thread):
    """Loads all the time, and keeps what it saw and what it waited for."""

    def __init__(self, store: Store) -> None:
        super().__init__(daemon=True)
        self._store = store
        self._ended = threading.Event()
        self.waits: list[str] = []
        self.generations: list[int] = []

    def run(self) -> None:
        while not self._ended.wait(0.001):
            self._store.version_ref(TENANT)
            entry, waits = watched(lambda: self._store.load(TENANT))
            self.waits += waits
            self.generations.append(entry.generation)

    def end(self) -> None:
        self._ended.set()
        self.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[RedisProxy]:
    proxy = RedisProxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def prefix() -> str:
    return f"test-{secrets.token_hex(4)}"


MakeMember = Callable[[str], RedisStore]
MakePolled = Callable[[str], PolledStore]


@contextmanager
def read_all_the_while() -> Iterator[Callable[[Store], None]]:
    """Load from each store all the while; in the end check that nothing waited and no generation fell."""
    readers: list[tuple[Store, Reader]] = []

    def read(store: Store) -> None:
        readers.append((store, Reader(store)))
        readers[-1][1].start()

    yield read
    for store, reader in readers:
        reader.end()
        store.close()
        assert reader.generations
        assert reader.waits == [], "a load waits for Redis"
        assert reader.generations == sorted(reader.generations), "a generation fell"


@pytest.fixture
def member(prefix: str) -> Iterator[MakeMember]:
    """Makes members of one fleet."""
    with read_all_the_while() as read:

        def make(url: str) -> RedisStore:
            store = follows(RedisStore(url, prefix=prefix, keys=KEYS, bound_seconds=BOUND_SECONDS))
            read(store)
            return store

        yield make


@pytest.fixture
def polled(prefix: str) -> Iterator[MakePolled]:
    """Makes members of one fleet as a provider has them: they repair what Redis loses."""
    with read_all_the_while() as read:

        def make(url: str) -> PolledStore:
            shared = follows(RedisStore(url, prefix=prefix, keys=KEYS, bound_seconds=BOUND_SECONDS))
            store = PolledStore(shared)
            read(store)
            return store

        yield make


# -- connections ------------------------------------------------------------------------------------------------------


def test_a_member_whose_connections_went_deaf_sees_a_change_within_the_bound(
    server: RedisServer, proxy: RedisProxy, member: MakeMember
) -> None:
    deaf, healthy = member(proxy.url), member(server.url)
    for _ in range(3):
        wait_until(lambda: proxy.living >= 2)
        proxy.deafen()
        reaches(deaf, invalidated(healthy, TENANT))
    wait_until(lambda: polls(deaf), seconds=PATIENCE_SECONDS)


def test_a_deaf_subscription_is_replaced_though_nothing_changes(
    server: RedisServer, proxy: RedisProxy, member: MakeMember, prefix: str
) -> None:
    deaf, healthy = member(proxy.url), member(server.url)
    wait_until(lambda: server.command("PUBSUB", "NUMSUB", f"{prefix}:2:changes") == [f"{prefix}:2:changes", 2])
    proxy.deafen()
    wait_until(lambda: proxy.living >= 2, seconds=PATIENCE_SECONDS, message="no new subscription and connection")
    reaches(deaf, invalidated(healthy, TENANT))


def test_a_subscription_that_went_deaf_alone_is_replaced(proxy: RedisProxy, member: MakeMember) -> None:
    store = member(proxy.url)
    subscriptions = len(proxy.subscriptions)
    subscription, deaf = proxy.subscriptions[-1]
    deaf.set()
    wait_until(lambda: len(proxy.subscriptions) > subscriptions and subscription.fileno() < 0, seconds=PATIENCE_SECONDS)
    assert polls(store)


def test_a_cut_connection_costs_nothing_but_a_new_one(
    server: RedisServer, proxy: RedisProxy, member: MakeMember, caplog: pytest.LogCaptureFixture
) -> None:
    cut, healthy = member(proxy.url), member(server.url)
    for _ in range(5):
        wait_until(lambda: proxy.living >= 1)
        proxy.cut()
        reaches(cut, invalidated(healthy, TENANT))
        assert polls(cut)
        generation = invalidated(cut, TENANT)
        reaches(healthy, generation)
    assert not [entry for entry in caplog.records if entry.name == "external_oms"]


# -- Redis loses data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["flush", "restart"])
def test_what_redis_lost_counts_as_an_invalidation_and_the_last_value_lives_on(
    server: RedisServer, polled: MakePolled, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = polled(server.url), polled(server.url)
    known = invalidated(one, TENANT)
    store_value(one, enabled=True)
    wait_until(lambda: is_fresh(other))
    server.flush() if loss == "flush" else server.restart()
    wait_until(lambda: not is_fresh(one) and not is_fresh(other), seconds=PATIENCE_SECONDS)
    wait_until(lambda: one.load(TENANT).generation == other.load(TENANT).generation > known)
    newcomer = polled(server.url)
    for store in (one, other, newcomer):
        assert value(store) is True
        assert not is_fresh(store)
    store_value(newcomer, enabled=False)
    wait_until(lambda: is_fresh(one) and is_fresh(other))
    assert value(one) is value(other) is False
    lines = [entry for entry in caplog.records if entry.name == "external_oms"]
    assert {entry.levelname for entry in lines} == {"WARNING"}
    assert 1 <= len([entry for entry in lines if "lost data" in entry.message]) <= 2, "once for each member"
    causes = [row.cause for row in newcomer.history(tenant=TENANT)]
    assert causes.count(Cause.STORE) == 1, "one member has repaired it"


def test_a_flush_invalidates_also_what_was_never_invalidated(server: RedisServer, polled: MakePolled) -> None:
    """A delivery that this member has not heard may be among what was lost."""
    store = polled(server.url)
    store_value(store, enabled=True)
    assert store.load(TENANT).generation == 0
    server.flush()
    wait_until(lambda: store.load(TENANT).generation > 0, seconds=PATIENCE_SECONDS)
    assert value(store) is True
    assert not is_fresh(store)


@pytest.fixture
def quiet(server: RedisServer, prefix: str) -> Iterator[Callable[[], Fallback]]:
    """Makes members that pull and poll only when the test says so."""
    made: list[Fallback] = []

    def make() -> Fallback:
        shared = RedisStore(server.url, prefix=prefix, keys=KEYS)
        made.append(Fallback(shared, clock=SYSTEM_CLOCK, random=lambda: 0.5))
        return made[-1]

    yield make
    for store in made:
        store.close()


def pulled(store: Fallback) -> Fallback:
    """Return the store once it has pulled, loaded and polled."""
    assert isinstance(store._shared, RedisStore)
    store._shared._pull(True)
    store.load(TENANT)
    store.poll()
    return store


def test_a_change_that_meets_the_loss_is_not_verified_before_the_loss_is_repaired(
    server: RedisServer, quiet: Callable[[], Fallback]
) -> None:
    store = quiet()
    known = invalidated(store, TENANT)
    store_value(store, enabled=True)
    assert is_fresh(store)
    server.flush()
    lease = leased(store, TENANT)
    assert store.load(TENANT).generation == known
    assert (value(store), is_fresh(store)) == (True, False)
    store.poll()
    assert store.load(TENANT).verified
    assert store.load(TENANT).generation > known
    put(store, lease, enabled=False)
    assert not is_fresh(store), "its generation is lost"
    server.flush()
    second = delivered(store, "msg_1", TENANT).generation
    assert second > known
    server.flush()
    assert delivered(store, "msg_1", TENANT).generation > second
    assert value(store) is not None


def test_a_loss_counts_whatever_was_lost_and_whatever_the_clock_of_the_server_says(
    server: RedisServer, quiet: Callable[[], Fallback]
) -> None:
    store = quiet()
    leased(store, TENANT)
    assert store.load(TENANT).generation == 0
    server.flush()
    assert pulled(store).load(TENANT).generation > 0, "no more than a lease was known"
    ahead = 1 << 50  # of a server whose clock was ahead
    store.transact(TENANT, lambda entry, _: Change(replace(entry, generation=ahead), None))
    store.load(TENANT)
    server.flush()
    assert pulled(store).load(TENANT).generation == ahead + 1


def test_a_process_that_knows_less_does_not_take_the_others_back(
    server: RedisServer, quiet: Callable[[], Fallback]
) -> None:
    one, lagging = quiet(), quiet()
    store_value(one, enabled=True)
    generation = invalidated(lagging, TENANT)
    assert value(lagging) is True
    store_value(one, enabled=False)
    assert value(one) is False
    server.flush()
    assert pulled(lagging).load(TENANT).generation > generation
    assert value(lagging) is True
    assert not is_fresh(lagging)
    assert value(pulled(one)) is False
    assert value(pulled(lagging)) is False
    assert not is_fresh(lagging)


def test_a_member_that_was_cut_off_raises_an_entry_that_was_born_again_below_what_it_knows(
    server: RedisServer, proxy: RedisProxy, polled: MakePolled
) -> None:
    ahead = polled(proxy.url)
    known = invalidated(ahead, TENANT)
    reaches(ahead, known)
    proxy.swallows = True
    server.flush()
    newcomer = polled(server.url)
    store_value(newcomer, enabled=True)
    assert newcomer.load(TENANT).generation == 0
    proxy.swallows = False
    proxy.cut()
    wait_until(lambda: newcomer.load(TENANT).generation == ahead.load(TENANT).generation > known)
    assert not is_fresh(newcomer)
    assert value(ahead) is True


def test_a_failover_that_lost_writes_counts_as_an_invalidation(
    server: RedisServer, proxy: RedisProxy, polled: MakePolled, tmp_path_factory: pytest.TempPathFactory, prefix: str
) -> None:
    directory = tmp_path_factory.mktemp("replica")
    with RedisServer(directory, "--replicaof", "127.0.0.1", str(server.port)) as replica:
        one, other = polled(proxy.url), polled(proxy.url)
        store_value(one, enabled=True)
        with replica.client() as client:
            wait_until(lambda: client.info("replication")["master_link_status"] == "up")
            wait_until(lambda: '"enabled":true' in str(client.get(f"{prefix}:2:{{{KEYS[TENANT]}}}:entry")))
            client.replicaof("NO", "ONE")
        lost = invalidated(one, TENANT)
        store_value(one, enabled=False)
        wait_until(lambda: value(other) is False)
        proxy.target = replica.port
        proxy.cut()
        wait_until(lambda: one.load(TENANT).generation == other.load(TENANT).generation > lost)
        assert not is_fresh(one)
        assert not is_fresh(other)


# -- Redis does not answer, or answers with errors --------------------------------------------------------------------


def test_while_redis_is_frozen_changes_fail_in_time_and_loading_goes_on(
    server: RedisServer, member: MakeMember, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = member(server.url), member(server.url)
    store_value(one, enabled=True)
    wait_until(lambda: is_fresh(other))
    woken = threading.Event()
    other.attach(woken.set)
    event = Event(datetime.now(UTC), TENANT, Cause.CHANGED)
    server.freeze()
    try:
        for use in (
            lambda: invalidated(one, TENANT),
            lambda: one.append(event),
            one.history,
            lambda: one.report([Member("host:1", TENANT, 2, False, "fresh", 0.0)]),
            one.members,
        ):
            with pytest.raises(StoreError, match="Redis does not answer; check that it runs"):
                use()
        assert is_fresh(one)
        assert is_fresh(other)
        assert woken.wait(PATIENCE_SECONDS), "a member learns of the outage without a call"
        wait_until(lambda: not polls(other), seconds=PATIENCE_SECONDS)
        assert not other.health().ok
        assert "does not answer" in other.health().problem
        woken.clear()
    finally:
        server.thaw()
    assert woken.wait(PATIENCE_SECONDS)
    wait_until(lambda: polls(one) and polls(other), seconds=PATIENCE_SECONDS)
    assert one.health().ok
    reaches(other, invalidated(one, TENANT))
    assert not [entry for entry in caplog.records if entry.name == "external_oms"], "who uses the store logs an outage"


def test_a_member_that_starts_without_redis_joins_when_redis_comes(
    server: RedisServer, proxy: RedisProxy, member: MakeMember
) -> None:
    other = member(server.url)
    store_value(other, enabled=True)
    proxy.swallows = True
    late = member(proxy.url)
    assert late.load(TENANT) == Entry()
    assert not polls(late)
    proxy.swallows = False
    wait_until(lambda: polls(late), seconds=PATIENCE_SECONDS)
    assert value(late) is True
    assert TENANT in late.poll() or is_fresh(late)


def test_a_write_that_was_not_answered_may_have_been_done(server: RedisServer, proxy: RedisProxy, prefix: str) -> None:
    store = RedisStore(proxy.url, prefix=prefix, keys=KEYS, bound_seconds=BOUND_SECONDS)
    witness = RedisStore(server.url, prefix=prefix, keys=KEYS)
    try:
        before = invalidated(store, TENANT)

        def transition(entry: Entry, moment: Moment) -> Change[None]:
            proxy.swallows = True
            return Change(Entry(generation=moment.floor), None, claims=("msg_1",))

        with pytest.raises(StoreError):
            store.transact(TENANT, transition, delivery_ids=["msg_1"])
        assert store.load(TENANT).generation == before
        proxy.swallows = False
        proxy.cut()
        assert delivered(witness, "msg_1", TENANT).generation >= before
        assert invalidated(store, TENANT) > before
    finally:
        store.close()
        witness.close()


@pytest.mark.parametrize(
    ("command", "undo", "complaint"),
    [
        ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0", "has no memory left; raise maxmemory"),
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE", "is a read-only replica; name the primary"),
        ("ACL SETUSER default -set", "ACL SETUSER default +@all", "denies its user a command"),
        ("ACL SETUSER default -evalsha", "ACL SETUSER default +@all", "denies its user a command"),
        ("ACL SETUSER default resetkeys", "ACL SETUSER default allkeys", "denies its user a command, a key"),
        ("ACL SETUSER default resetchannels", "ACL SETUSER default allchannels", "a key or a channel"),
    ],
)
def test_an_error_of_redis_is_told_with_what_to_do(
    server: RedisServer, prefix: str, command: str, undo: str, complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = RedisStore(server.url, prefix=prefix, keys=KEYS, bound_seconds=BOUND_SECONDS)
    try:
        before = invalidated(store, TENANT)
        server.command(*command.split())
        try:
            with pytest.raises(StoreError, match=complaint):
                invalidated(store, TENANT)
        finally:
            server.command(*undo.split())
        assert invalidated(store, TENANT) > before
        assert not [entry for entry in caplog.records if entry.name == "external_oms"]
    finally:
        store.close()


def test_a_denied_channel_is_reported_by_the_thread_and_pulling_goes_on(
    server: RedisServer, member: MakeMember
) -> None:
    one, other = member(server.url), member(server.url)
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "-subscribe")  # type: ignore[no-untyped-call]
        client.client_kill_filter(_type="pubsub")
    try:
        reaches(other, invalidated(one, TENANT))
    finally:
        server.command("ACL", "SETUSER", "default", "+@all")
    wait_until(lambda: polls(one) and polls(other))


@pytest.mark.serial
def test_closing_takes_less_than_a_second_whatever_redis_does(proxy: RedisProxy, prefix: str) -> None:
    store = follows(RedisStore(proxy.url, prefix=prefix, keys=KEYS))
    proxy.swallows = True

    def invalidate_meanwhile() -> None:
        with pytest.raises(StoreError):
            invalidated(store, TENANT)

    invalidator = threading.Thread(target=invalidate_meanwhile)
    invalidator.start()
    began = time.monotonic()
    store.close()
    assert time.monotonic() - began < 5.0  # promised is a second
    invalidator.join()
    proxy.swallows = False
    assert invalidated(store, TENANT) > 0, "it can be used again"
    store.close()
    wait_until(lambda: not [one for one in threading.enumerate() if one.name == "external-oms-redis"])


# -- forks ------------------------------------------------------------------------------------------------------------


def test_a_child_is_right_at_its_first_load_though_its_parent_had_not_heard(server: RedisServer, prefix: str) -> None:
    parent, other = (RedisStore(server.url, prefix=prefix, keys=KEYS) for _ in range(2))
    try:
        store_value(parent, enabled=True)
        generation = delivered(other, "msg_1", TENANT).generation
        assert is_fresh(parent), "without its thread it has not heard of the delivery"

        def child() -> bool:
            parent.after_fork()
            parent.start()
            old = is_fresh(parent)  # where the machine is too busy for a look in 100 ms, nothing is verified
            wait_until(lambda: parent.load(TENANT).generation == generation)
            parent.close()
            return not old

        for _ in range(10):
            assert in_a_fork(child)
    finally:
        parent.close()
        other.close()


def test_an_idle_child_follows_from_the_fork_on_without_a_call(server: RedisServer, member: MakeMember) -> None:
    parent = member(server.url)
    ours, theirs = multiprocessing.Pipe()

    def idle() -> None:
        parent.after_fork()
        parent.start()
        words, index = parent.version_ref(TENANT)
        wait_until(parent._sync.first_pull.is_set)
        before = words[index]
        theirs.send("idle")
        wait_until(lambda: words[index] != before)
        entry = parent.load(TENANT)
        parent.close()
        theirs.send(entry.generation if not is_current(entry) else None)

    store_value(parent, enabled=True)
    process = multiprocessing.get_context("fork").Process(target=idle, daemon=True)
    process.start()
    try:
        assert ours.poll(PATIENCE_SECONDS)
        ours.recv()
        generation = delivered(parent, "msg_1", TENANT).generation
        assert ours.poll(PATIENCE_SECONDS)
        assert ours.recv() == generation
    finally:
        process.kill()
        process.join()


def test_a_child_that_cannot_look_waits_once_and_then_serves_what_it_inherited_as_not_verified(
    proxy: RedisProxy, member: MakeMember
) -> None:
    parent = member(proxy.url)
    store_value(parent, enabled=True)
    before = word(parent, TENANT)

    def child() -> bool:
        parent.after_fork()
        changed = word(parent, TENANT) != before
        parent.start()
        loads = [watched(lambda: parent.load(TENANT)) for _ in range(50)]
        entry = loads[-1][0]
        doubted = entry.snapshot is not None and not entry.verified
        waited = [bool(waits) for _, waits in loads]
        wait_until(lambda: not polls(parent), seconds=PATIENCE_SECONDS)
        return changed and doubted and waited == [True] + 49 * [False] and not parent.load(TENANT).verified

    proxy.swallows = True
    assert in_a_fork(child)
    proxy.swallows = False


def test_a_child_verifies_what_did_not_change_and_leaves_the_parents_sockets_alone(
    server: RedisServer, member: MakeMember
) -> None:
    parent = member(server.url)

    def child() -> bool:
        parent.after_fork()
        parent.start()
        wait_until(lambda: is_fresh(parent))
        right = value(parent) is True
        invalidated(parent, TENANT)
        parent.close()
        return right

    for _ in range(5):
        store_value(parent, enabled=True)
        generation = parent.load(TENANT).generation
        assert in_a_fork(child)
        reaches(parent, generation + 1)
        assert polls(parent)


# -- promptness -------------------------------------------------------------------------------------------------------

MEMBERS = 12
ROUNDS = 200
PROMISED_SECONDS = 0.02


def follow(url: str, prefix: str, pipe: Connection) -> None:
    """Note when each generation arrives in this process, until the pipe closes."""
    store = follows(RedisStore(url, prefix=prefix, keys=KEYS))
    seen: dict[int, float] = {}
    arrived = threading.Event()
    store.attach(arrived.set)
    pipe.send("ready")
    while not pipe.poll(0):
        arrived.wait(0.2)
        arrived.clear()
        seen.setdefault(store.load(TENANT).generation, time.monotonic())
    pipe.send(seen)
    store.close()


def last_arrivals(server: RedisServer, prefix: str, *, rounds: int = ROUNDS) -> list[float]:
    """Return how many seconds after the answer to each delivery the last of twelve members had seen it, sorted."""
    context = multiprocessing.get_context("fork")
    with ExitStack() as stack:
        pipes: list[Connection] = []
        for _ in range(MEMBERS - 1):
            ours, theirs = context.Pipe()
            process = context.Process(target=follow, args=(server.url, prefix, theirs), daemon=True)
            process.start()
            stack.callback(process.join, 10.0)
            pipes.append(ours)
        for pipe in pipes:
            assert pipe.poll(30.0)
            pipe.recv()
        sender = follows(RedisStore(server.url, prefix=prefix, keys=KEYS))
        answered: dict[int, float] = {}
        for number in range(rounds):
            generation = delivered(sender, f"msg_{number}", TENANT).generation
            answered[generation] = time.monotonic()
            time.sleep(0.02)
        sender.close()
        for pipe in pipes:
            pipe.send("end")
        seen: list[dict[int, float]] = []
        for pipe in pipes:
            assert pipe.poll(30.0)
            seen.append(pipe.recv())
    return sorted(
        max(min(at for one, at in times.items() if one >= generation) for times in seen) - answered_at
        for generation, answered_at in answered.items()
    )


@pytest.mark.serial
def test_the_last_of_twelve_members_sees_a_delivery_within_milliseconds(server: RedisServer, prefix: str) -> None:
    arrivals = last_arrivals(server, prefix)
    assert arrivals[len(arrivals) * 99 // 100] < 10 * PROMISED_SECONDS
