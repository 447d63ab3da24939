"""The fence over a fleet, at interleavings that nobody would think of: lost, late and reordered messages, lost writes.

Members here have no threads: a rule says who acts, who hears which message, who looks, and what Redis forgets.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.client import PubSub

from external_oms.clock import SYSTEM_CLOCK
from external_oms.config import Snapshot
from external_oms.stores.base import Lease, Record
from external_oms.stores.redis import RedisStore
from external_oms.stores.redis_follow import Follower
from tests.support.redis import RedisServer

TENANT = "acme"
MEMBERS = st.integers(0, 2)


@dataclass
class Member:
    """A store whose threads never start."""

    store: RedisStore
    generation: int = 0
    leases: list[tuple[Lease, int]] = field(default_factory=list)

    def record(self) -> Record:
        return self.store._mirror.record(TENANT)

    def look(self) -> None:
        self.store._look()


def read_under(lease: Lease, version: int, *, updated: int | None = None) -> Snapshot:
    """What a read gives that began when the world stood at this version; the validator names it."""
    return Snapshot(
        enabled=bool(version % 2),
        updated_at=None if updated is None else datetime(2026, 3, 1, tzinfo=UTC) + timedelta(seconds=updated),
        etag=str(version),
        generation=lease.record.generation,
        read_number=lease.number,
        read_at=SYSTEM_CLOCK.monotonic(),
        fetched_at=datetime.now(UTC),
        lifetime_seconds=30.0,
    )


class Fleet(RuleBasedStateMachine):
    """The world's value has a version, announced by every invalidation; a read knows the version at its beginning."""

    url = ""

    @initialize()
    def begin(self) -> None:
        self.client = redis.Redis.from_url(self.url, decode_responses=True)
        self.client.flushall()
        self.prefix = prefix = f"test-{secrets.token_hex(4)}"
        self.key = f"{prefix}:{{{TENANT}}}:record"
        self.members = [Member(RedisStore(self.url, prefix=prefix, tenants=(TENANT,))) for _ in range(3)]
        self.told = PubSub(self.client.connection_pool, ignore_subscribe_messages=True)
        self.told.subscribe(f"{prefix}:changes")
        self.messages: list[str] = []
        self.version = 0
        self.saved: bytes | None = None
        self.binary = redis.Redis.from_url(self.url)

    def collect(self) -> None:
        """Messages arrive here first; the rules decide who hears them, when, and whether at all."""
        while (message := self.told.get_message(timeout=0.002)) is not None:
            self.messages.append(str(message["data"]))

    @rule(who=MEMBERS)
    def invalidate(self, who: int) -> None:
        self.version += 1
        member = self.members[who]
        generation = member.store.invalidate(TENANT)
        assert member.record().generation >= generation
        snapshot = member.record().snapshot
        assert snapshot is None or snapshot.generation < generation

    @rule(who=MEMBERS)
    def begin_a_read(self, who: int) -> None:
        acquired = self.members[who].store.acquire(TENANT, seconds=60.0, metered=False)
        if isinstance(acquired, Lease):
            self.members[who].leases.append((acquired, self.version))

    @rule(who=MEMBERS, oldest=st.booleans())
    def end_a_read(self, who: int, oldest: bool) -> None:
        member = self.members[who]
        if not member.leases:
            return
        lease, version = member.leases.pop(0 if oldest else -1)
        member.store.put(lease, read_under(lease, version))

    @rule(who=MEMBERS, overtaken_by=st.none() | MEMBERS)
    def read(self, who: int, overtaken_by: int | None) -> None:
        """A whole read, perhaps overtaken by an invalidation of a member that takes Redis for gone."""
        self.lose_the_lease()
        self.begin_a_read(who)
        if overtaken_by is not None:
            self.cut_off(overtaken_by)
            self.invalidate(overtaken_by)
        self.end_a_read(who, oldest=False)

    @rule()
    def lose_the_lease(self) -> None:
        self.client.delete(self.key.replace(":record", ":lease"))

    @rule(who=MEMBERS, which=st.integers(0, 5))
    def hear(self, who: int, which: int) -> None:
        self.collect()
        if self.messages:
            self.members[who].store._exchange.hear(self.messages[which % len(self.messages)])

    @rule(who=MEMBERS)
    def look(self, who: int) -> None:
        self.members[who].look()

    @rule()
    def flush(self) -> None:
        self.client.flushall()

    @rule()
    def save(self) -> None:
        self.saved = self.binary.dump(self.key)

    @precondition(lambda self: self.saved)
    @rule()
    def fail_over_to_what_was_saved(self) -> None:
        assert self.saved is not None
        self.binary.restore(self.key, 0, self.saved, replace=True)

    @rule(who=MEMBERS)
    def cut_off(self, who: int) -> None:
        """The member takes Redis for gone, until it looks again."""
        self.members[who].store._link.fail(redis.ConnectionError())

    @invariant()
    def no_generation_falls(self) -> None:
        for member in getattr(self, "members", ()):
            generation = member.record().generation
            assert generation >= member.generation
            member.generation = generation

    def teardown(self) -> None:
        if not hasattr(self, "members"):
            return
        try:
            for member in self.members * 3:  # what each owes, and what the others make of it
                member.look()
            newcomer = Member(RedisStore(self.url, prefix=self.prefix, tenants=(TENANT,)))
            self.members.append(newcomer)
            newcomer.look()
            records = [member.record() for member in self.members]
            if not any(record.generation or record.reads for record in records):
                return  # nobody has used it
            stamps = {member.store._mirror.debt(TENANT).stamp for member in self.members}
            assert len(stamps) == 1, "not in step after everybody has looked"
            for record in records:
                if record.snapshot is not None and record.snapshot.generation >= record.generation:
                    assert record.snapshot.etag == str(self.version), "a value from before an invalidation is fresh"
            assert len({record.snapshot and record.snapshot.etag for record in records}) == 1
        finally:
            for member in self.members:
                member.store.close()
            self.told.close()
            self.client.close()
            self.binary.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def make_member(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Member]]:
    monkeypatch.setattr(Follower, "start", lambda self: None)
    prefix = f"test-{secrets.token_hex(4)}"
    made: list[Member] = []

    def make() -> Member:
        made.append(Member(RedisStore(server.url, prefix=prefix, tenants=(TENANT,))))
        return made[-1]

    yield make
    for member in made:
        member.store.close()


def read(member: Member, version: int, *, updated: int | None = None) -> None:
    acquired = member.store.acquire(TENANT, seconds=60.0, metered=False)
    assert isinstance(acquired, Lease)
    assert member.store.put(acquired, read_under(acquired, version, updated=updated))


def test_a_failover_that_lost_nothing_but_a_value_counts_as_an_invalidation_too(
    server: RedisServer, make_member: Callable[[], Member]
) -> None:
    """Perhaps an invalidation was lost with it of which only the dead knew."""
    one, other = make_member(), make_member()
    key = f"{one.store.prefix}:{{{TENANT}}}:record"
    read(one, 1)
    with redis.Redis.from_url(server.url) as client:
        saved = client.dump(key)
        assert isinstance(saved, bytes)
        read(one, 2)
        other.look()
        client.restore(key, 0, saved, replace=True)
    for member in (one, other, make_member()):
        member.look()
        record = member.record()
        assert record.generation == 1
        assert record.snapshot is not None
        assert (record.snapshot.generation, record.snapshot.etag) == (0, "2")


def test_an_operation_that_meets_an_older_value_after_a_failover_keeps_the_newer_one(
    server: RedisServer, make_member: Callable[[], Member]
) -> None:
    one, other = make_member(), make_member()
    read(one, 1)
    with redis.Redis.from_url(server.url) as client:
        key = f"{one.store.prefix}:{{{TENANT}}}:record"
        saved = client.dump(key)
        assert isinstance(saved, bytes)
        read(one, 2)
        client.restore(key, 0, saved, replace=True)
    assert one.store.invalidate(TENANT) == 1
    for member in (one, other):
        member.look()
        snapshot = member.record().snapshot
        assert snapshot is not None
        assert snapshot.etag == "2"


def test_a_late_message_of_an_epoch_that_is_gone_is_not_believed(
    server: RedisServer, make_member: Callable[[], Member]
) -> None:
    one, other = make_member(), make_member()
    with redis.Redis.from_url(server.url, decode_responses=True) as client, PubSub(client.connection_pool) as told:
        told.subscribe(f"{one.store.prefix}:changes")
        for _ in range(3):
            one.store.invalidate(TENANT)
        client.delete(f"{one.store.prefix}:{{{TENANT}}}:record")
        other.look()
        read(other, 1)
        late = []
        while (message := told.get_message(timeout=0.2)) is not None:
            late.append(message)
    one.look()
    other.look()
    before = other.record()
    for message in late:
        if message["type"] == "message":
            other.store._exchange.hear(str(message["data"]))
    assert other.record() == before
    assert one.record().generation == before.generation == 4


def test_a_value_from_the_outage_loses_against_a_newer_one_by_what_the_api_says(
    make_member: Callable[[], Member],
) -> None:
    lonely, other = make_member(), make_member()
    read(other, 1, updated=10)
    lonely.look()
    lonely.store._link.fail(redis.ConnectionError())
    read(lonely, 2, updated=15)
    read(other, 3, updated=20)
    lonely.look()
    for member in (lonely, other):
        snapshot = member.record().snapshot
        assert snapshot is not None
        assert snapshot.etag == "3"
    assert lonely.store._mirror.debt(TENANT).offer is None


@pytest.mark.parametrize("tenants", [1, 3, 1200])
def test_a_fleet_of_tenants_that_redis_forgot_is_repaired_with_one_script_each(
    server: RedisServer, make_member: Callable[[], Member], tenants: int
) -> None:
    store = make_member().store
    names = [f"tenant-{number}" for number in range(tenants)]
    for name in names:
        store.watch(name)
        store.invalidate(name)
    server.flush()
    calls = server.calls()
    store._look()
    assert [store.load(name).generation for name in names] == [2] * tenants
    assert server.calls() - calls <= tenants * 7 + 30, "its stamp, and a script of five commands"
    before = server.calls()
    store._look()
    assert server.calls() - before <= tenants + 20, "a look at what is in step asks for stamps alone"


def test_the_fence_holds_at_every_interleaving(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Follower, "start", lambda self: None)
    Fleet.url = server.url
    with suppress(AttributeError):
        del Fleet.TestCase
    run_state_machine_as_test(
        Fleet,
        settings=settings(
            max_examples=200,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
