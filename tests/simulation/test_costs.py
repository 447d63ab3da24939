"""A fleet reads once per lifetime, docs/scale.md shows what the simulation counts, and a real Redis counts the same."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from external_oms.cache import Cache
from external_oms.clock import SYSTEM_CLOCK
from external_oms.config import Document, Reading
from external_oms.entry import Invalidation
from external_oms.scheduler import Scheduler
from external_oms.stores.fallback import Fallback
from external_oms.stores.redis import RedisStore
from tests.simulation.costs import SMALL, TENANT, TIMEOUT_SECONDS, WINDOWS, Fleet, ends, steady, tables
from tests.support.redis import RedisServer
from tests.support.waiting import wait_until

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
MEMBERS = 8
DELIVERIES = 3
QUIET_SECONDS = 300.0
"""A bound after which nothing is pulled without a message within a test."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("size", SMALL)
def test_a_fleet_of_any_size_reads_once_per_lifetime_and_never_twice_at_once(size: int) -> None:
    fleet, costs = steady(size)
    assert 0.9 <= costs.reads / costs.lifetimes <= 1.15
    assert fleet.most_at_once == 1
    assert costs.messages <= 2.2 * size * costs.reads, "a lease and a value, and seldom a read that was not needed"
    assert costs.counts["timeout"] == 0


def test_the_page_shows_what_the_simulation_prints() -> None:
    page = rows(PAGE.read_text(encoding="utf-8"))
    for table in (*tables(SMALL), ends()):
        assert [row for row in rows(table) if row not in page] == []


def simulated() -> tuple[int, int]:
    """Commands and messages of some deliveries to a simulated fleet."""
    fleet = Fleet(MEMBERS, bound_seconds=QUIET_SECONDS, background=False)
    fleet.start(over_seconds=1.0)
    fleet.world.run(3.0)
    before = fleet.server.counts.copy()
    for number in range(DELIVERIES):
        cache = fleet.members[number].cache

        def deliver(cache: Cache = cache) -> None:
            result, _ = cache.invalidate(TENANT, Invalidation())
            assert cache.wait_for_generation(TENANT, result.generation) is not None

        fleet.world.spawn(fleet.members[number], deliver, "delivery")
        fleet.world.run(1.0)
    spent = fleet.server.counts - before
    return spent["pull"] + spent["read"] + spent["set"], spent["message"]


def real(server: RedisServer) -> tuple[int, int]:
    """The same of real members with threads of their own over a real Redis."""

    def read(tenant: str, etag: str | None) -> Reading:
        time.sleep(0.1)  # what an API takes
        return Reading(Document(True, None), None)

    def calls(command: str) -> int:
        with server.client() as client:
            return int(client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])

    with ExitStack() as stack:
        caches: list[Cache] = []
        for _ in range(MEMBERS):
            store = Fallback(
                RedisStore(server.url, bound_seconds=QUIET_SECONDS), clock=SYSTEM_CLOCK, random=random.random
            )
            cache = Cache(
                tenants=[TENANT],
                store=store,
                source=read,
                windows=WINDOWS,
                timeout_seconds=TIMEOUT_SECONDS,
                clock=SYSTEM_CLOCK,
                random=random.random,
                background=False,
                waits_after_failure=False,
                max_waiters=3,
                runner=lambda poll, poll_seconds: Scheduler(
                    workers=4, clock=SYSTEM_CLOCK, poll=poll, poll_seconds=poll_seconds
                ),
            )
            stack.callback(cache.close)
            cache.start()
            cache.lookup(TENANT)
            caches.append(cache)
        with server.client() as client:
            wait_until(
                lambda: client.pubsub_numsub("external_oms:2:changes")[0][1] == MEMBERS,
                message="a member does not subscribe",
            )
        wait_until(lambda: len({one.state(TENANT).fetched_at for one in caches}) == 1, message="a member has no value")
        commands, published = calls("evalsha"), calls("publish")
        for cache in caches[:DELIVERIES]:
            result, shared = cache.invalidate(TENANT, Invalidation())
            assert shared
            assert cache.wait_for_generation(TENANT, result.generation) is not None
            serve = partial(_serve, caches, result.generation)
            wait_until(serve, message="a member does not serve the value")
        return calls("evalsha") - commands, (calls("publish") - published) * MEMBERS


def _serve(caches: list[Cache], generation: int) -> bool:
    return all(one.state(TENANT).generation == generation and one.state(TENANT).freshness == "fresh" for one in caches)


def test_a_real_redis_counts_what_the_simulation_counts(redis_server: RedisServer) -> None:
    commands, messages = simulated()
    real_commands, real_messages = real(redis_server)
    print(f"{MEMBERS} members, {DELIVERIES} deliveries: {real_commands} commands ({commands} simulated)")
    assert real_messages == messages == 3 * MEMBERS * DELIVERIES
    # one pull may answer two messages that come together, and the last pull of the sender may be under way
    assert 0.75 * commands <= real_commands <= commands + DELIVERIES * MEMBERS
