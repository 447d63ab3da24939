"""A thousand tenants over a real Redis, one of which hangs: the reads of the others keep their times."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

import pytest

from external_oms.cache import Cache
from external_oms.clock import SYSTEM_CLOCK
from external_oms.config import Document, Reading
from external_oms.errors import Unavailable
from external_oms.policy import Freshness, Windows
from external_oms.scheduler import Scheduler
from external_oms.stores.fallback import Fallback
from external_oms.stores.redis import RedisStore
from tests.support.redis import RedisServer

TENANTS = [f"tenant-{number}" for number in range(1000)]
HANGING = TENANTS[500]
WINDOWS = Windows(ttl_seconds=6.0, stale_while_revalidate_seconds=6.0, stale_if_error_seconds=600.0)
TIMEOUT_SECONDS = 2.0
LIFETIMES = 3
LATE_SECONDS = 0.5
"""How late a read may begin on a machine that does nothing else."""


class Source:
    """An API that answers at once, and for one tenant not before the deadline."""

    def __init__(self) -> None:
        self.reads: dict[str, list[float]] = defaultdict(list)
        self.ended = threading.Event()

    def __call__(self, tenant: str, _etag: str | None) -> Reading:
        self.reads[tenant].append(time.monotonic())
        if tenant == HANGING:
            self.ended.wait(TIMEOUT_SECONDS)
            raise Unavailable("no answer within the deadline")
        return Reading(Document(enabled=True))


@pytest.fixture
def store(redis_server: RedisServer) -> Iterator[Fallback]:
    keys = {tenant: tenant for tenant in TENANTS}
    made = Fallback(RedisStore(redis_server.url, keys=keys), clock=SYSTEM_CLOCK, random=random.Random(2).random)
    yield made
    made.close()


@pytest.mark.soak  # it watches times, and beside other tests on two cores it would watch theirs
@pytest.mark.timeout(120)
def test_one_tenant_that_hangs_does_not_slow_the_other_999(store: Fallback) -> None:
    source = Source()
    cache = Cache(
        tenants=TENANTS,
        store=store,
        source=source,
        windows=WINDOWS,
        timeout_seconds=TIMEOUT_SECONDS,
        clock=SYSTEM_CLOCK,
        random=random.Random(1).random,
        background=True,
        waits_after_failure=False,
        max_waiters=4,
        runner=lambda poll, seconds: Scheduler(workers=16, clock=SYSTEM_CLOCK, poll=poll, poll_seconds=seconds),
    )
    cache.start()
    time.sleep(LIFETIMES * WINDOWS.ttl_seconds + 3.0)  # what is watched takes this long, by real clocks
    worth = {tenant: cache.peek(tenant).freshness for tenant in TENANTS if tenant != HANGING}
    source.ended.set()
    cache.close()
    gaps = sorted(
        later - earlier
        for tenant, moments in source.reads.items()
        if tenant != HANGING
        for earlier, later in pairwise(moments)
    )
    p99 = gaps[len(gaps) * 99 // 100]
    print(f"\n{len(gaps)} lifetimes of 999 tenants: {gaps[0]:.2f} to {gaps[-1]:.2f} s, p99 {p99:.2f}")
    print(f"reads of the one that hangs: {len(source.reads[HANGING])}")
    assert set(worth.values()) == {Freshness.FRESH}
    assert all(len(source.reads[tenant]) >= LIFETIMES for tenant in worth)
    assert gaps[-1] < WINDOWS.ttl_seconds + 5 * LATE_SECONDS
    assert len(source.reads[HANGING]) >= 2
