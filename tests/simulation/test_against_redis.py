"""The model against small fleets of real members over a real Redis: counts and bytes, within a quarter."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
import redis

from external_oms.cache import Cache
from external_oms.clock import SYSTEM_CLOCK
from external_oms.errors import Unavailable
from external_oms.freshness import Windows
from external_oms.stores.base import Busy, Lease
from external_oms.stores.redis import RedisStore
from tests.simulation.costs import MEASURED, Load, Steady, steady_load
from tests.simulation.fleet import Fleet
from tests.simulation.measure import Meter, idle_member, snapshot_of
from tests.simulation.real import Api, members_of
from tests.support.redis import RedisServer
from tests.support.scripted import WINDOWS
from tests.support.waiting import wait_until

TOLERANCE = 0.25
"""How far the model may be off; what is counted by a few may be off by two besides."""

SEED = 7
LOOKED_AT_BYTES = (600.0, 12_000.0)
"""In and out, of the two looks at INFO themselves."""

SIZES = [(4, 1), (8, 1), (16, 1), (8, 60)]
WINDOW_SECONDS = 6.6
TTL_SECONDS = 2.2
BOUND_SECONDS = 1.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


def close_to(measured: float, predicted: float, *, few: float = 2.0) -> bool:
    return abs(measured - predicted) <= TOLERANCE * predicted + few


def in_step(members: Sequence[tuple[Cache, RedisStore]], client: redis.Redis) -> Meter:
    """A meter, once everybody has the value, hears, and has nothing more to ask."""
    wait_until(lambda: all(cache.state("acme").enabled and store.is_hearing for cache, store in members))
    meter, quiet = Meter(client), threading.Event()
    wait_until(lambda: not quiet.wait(0.3) and meter.look().get("evalsha", 0) == 0)
    return meter


def running(stack: ExitStack, server: RedisServer, members: int, tenants: int) -> tuple[Api, Meter]:
    api = Api(0.02)
    names = tuple(f"tenant-{number:04}" for number in range(tenants))
    stack.enter_context(
        members_of(
            server.url,
            members=members,
            tenants=names,
            api=api,
            windows=Windows(TTL_SECONDS, TTL_SECONDS, 3600.0),
            timeout_seconds=1.0,
            bound_seconds=BOUND_SECONDS,
            seed=SEED,
        )
    )
    wait_until(lambda: len({tenant for _, tenant in api.reads}) == tenants)
    return api, Meter(stack.enter_context(server.client()))


def predicted(members: int, tenants: int) -> Load:
    steady = Steady(members, tenants, ttl_seconds=TTL_SECONDS, bound_seconds=BOUND_SECONDS, reports=False)
    return steady_load(steady)


def test_a_steady_fleet_costs_what_the_model_says(tmp_path: Path) -> None:
    with ExitStack() as stack:
        fleets = []
        for number, (members, tenants) in enumerate(SIZES):
            (directory := tmp_path / str(number)).mkdir()
            server = RedisServer(directory)
            stack.callback(server.stop)
            server.start()
            fleets.append((members, tenants, *running(stack, server, members, tenants)))
        threading.Event().wait(1.0)  # they have begun together, and are in step after one message
        began = time.monotonic()
        before = []
        for _, _, api, meter in fleets:
            meter.look()
            before.append(len(api.reads))
        threading.Event().wait(WINDOW_SECONDS)  # what is measured is what happens in this time
        for (members, tenants, api, meter), had in zip(fleets, before, strict=True):
            told, seconds = meter.look(), time.monotonic() - began
            check(predicted(members, tenants), told, len(api.reads) - had, seconds, members)


def check(load: Load, told: dict[str, float], reads: int, seconds: float, members: int) -> None:
    tenants = round(load.stamps / load.looks)
    few = 2.0 * tenants
    assert close_to(reads, load.reads * seconds, few=few)
    assert close_to(told["publish"], load.reads * seconds, few=few)
    assert close_to(told["evalsha"], (load.scripts + load.looks) * seconds, few=2 * few)
    assert close_to(told["hmget"], (load.scripts + load.stamps) * seconds, few=2 * few)
    if tenants == 1:  # the tenants of the others have begun together, which the model does not know
        assert close_to(told["ping"], load.pings * seconds, few=members)
    change = few * (2 * MEASURED.script_in_bytes)
    assert close_to(told["in"], load.in_bytes * seconds, few=LOOKED_AT_BYTES[0] + change)
    change = few * (2 * MEASURED.script_out_bytes + members * MEASURED.message_bytes)
    assert close_to(told["out"], load.out_bytes * seconds, few=LOOKED_AT_BYTES[1] + change)


def test_a_delivery_and_what_follows_cost_what_the_model_says(server: RedisServer) -> None:
    api = Api(0.1)
    model = Fleet(16, seed=SEED)
    model.deliver(10.0, 3)
    model.run(13.5)
    with (
        members_of(
            server.url,
            members=16,
            tenants=("acme",),
            api=api,
            windows=WINDOWS,
            timeout_seconds=5.0,
            bound_seconds=60.0,
            seed=SEED,
        ) as members,
        server.client() as client,
    ):
        before, meter = len(api.reads), in_step(members, client)
        members[3][0].invalidate("acme")
        threading.Event().wait(3.5)  # the time that the model was given
        told = meter.look()
        assert abs(len(api.reads) - before - len(model.reads)) <= 1
    scripts = model.counts["asks"] + model.counts["stores"] + model.counts["invalidations"]
    assert close_to(told["evalsha"], scripts, few=4.0)
    assert close_to(told["publish"], model.counts["copies"] / 16 - 1, few=2.0)


def test_a_slow_api_makes_members_ask_as_often_as_the_model_says(server: RedisServer) -> None:
    model = Fleet(8, seed=SEED, api=lambda _now, _chance: (3.0, None))
    model.deliver(10.0, 3)
    model.run(13.0)
    asks = sum(moment >= 10.0 for moment in model.asked_at)
    api = Api(0.05)
    with (
        members_of(
            server.url,
            members=8,
            tenants=("acme",),
            api=api,
            windows=WINDOWS,
            timeout_seconds=5.0,
            bound_seconds=60.0,
            seed=SEED,
        ) as members,
        server.client() as client,
    ):
        meter = in_step(members, client)
        api.seconds = 3.0
        members[3][0].invalidate("acme")
        threading.Event().wait(2.9)  # the slow read is still under way
        told = meter.look()
    assert close_to(told["evalsha"] - 1, asks, few=4.0)


def test_members_whose_redis_is_gone_do_not_read_together(server: RedisServer) -> None:
    api = Api(0.02)
    with members_of(
        server.url,
        members=8,
        tenants=("acme",),
        api=api,
        windows=Windows(4.0, 4.0, 3600.0),
        timeout_seconds=1.0,
        bound_seconds=1.0,
        seed=SEED,
    ) as members:
        wait_until(lambda: all(cache.state("acme").enabled for cache, _ in members))
        server.stop()
        gone = SYSTEM_CLOCK.monotonic()
        wait_until(lambda: len(api.reads) >= 9)
    alone = [at - gone for at, _ in api.reads if at > gone][:8]
    busiest = Counter(math.floor(2 * at) for at in alone).most_common(1)[0][1]
    assert busiest <= 5, f"they read at {alone}"


def test_members_that_start_into_a_warm_fleet_tell_it_nothing(server: RedisServer) -> None:
    with idle_member(server.url, ("acme",)) as store:
        lease = store.acquire("acme", seconds=7.0, metered=False)
        assert isinstance(lease, Lease)
        store.put(lease, snapshot_of(lease))
    with server.client() as client:
        meter = Meter(client)
        for _ in range(4):
            with idle_member(server.url, ("acme",)) as store:
                assert store.acquire("acme", seconds=7.0, metered=False) == Busy(1, 0.0)
                assert store.load("acme").snapshot is not None
        assert meter.look().get("publish", 0.0) == 0


def test_a_member_that_has_seen_the_value_may_take_the_lease(server: RedisServer) -> None:
    with idle_member(server.url, ("acme",)) as store:
        store.put(lease := _leased(store), snapshot_of(lease))
    with idle_member(server.url, ("acme",)) as store:
        assert isinstance(store.acquire("acme", seconds=7.0, metered=False), Busy)
        assert _leased(store).number == 2


def _leased(store: RedisStore) -> Lease:
    lease = store.acquire("acme", seconds=7.0, metered=False)
    assert isinstance(lease, Lease)
    return lease


def test_a_failing_api_is_asked_by_real_members_as_by_the_models(server: RedisServer) -> None:
    api = Api(0.01)
    api.fails = Unavailable("down")
    with members_of(
        server.url,
        members=8,
        tenants=("acme",),
        api=api,
        windows=WINDOWS,
        timeout_seconds=5.0,
        bound_seconds=5.0,
        seed=SEED,
    ):
        threading.Event().wait(4.0)  # so long is counted
        moments = [at for at, _ in api.reads]
    gaps = [later - earlier for earlier, later in pairwise(moments)]
    assert 1 <= len(gaps) <= 3
    assert min(gaps) >= 1.0
