"""What must hold of a fleet of any size, shown by the model: one read, few that ask, nobody together."""

from __future__ import annotations

from itertools import pairwise

import pytest

from external_oms.errors import ReadError
from external_oms.flights import LEASE_GRACE_SECONDS
from external_oms.freshness import BACKOFF_FLOOR_SECONDS
from external_oms.stores.redis import RedisStore
from tests.simulation.alone import outage
from tests.simulation.costs import Steady, steady_load
from tests.simulation.fleet import Api, Fleet, answering, hanging, refusing

SEED = 20_261_123
TTL_SECONDS = 30.0
LARGE = pytest.param(100_000, marks=pytest.mark.soak)


def often(fleet: Fleet) -> float:
    """Questions for the lease per read."""
    return fleet.counts["asks"] / len(fleet.reads)


@pytest.mark.parametrize("members", [1, 10, 1_000, 10_000, LARGE])
def test_a_fleet_of_any_size_reads_once_per_lifetime(members: int) -> None:
    fleet = Fleet(members, seed=SEED)
    seconds = 300.0
    fleet.run(seconds)
    lifetimes = seconds / Steady(members, 1).lifetime_seconds
    assert 0.85 <= len(fleet.reads) / lifetimes <= 1.15


@pytest.mark.parametrize(
    ("members", "most"), [(10, 10), (1_000, 15), (10_000, 30), pytest.param(100_000, 250, marks=pytest.mark.soak)]
)
def test_few_members_ask_for_the_lease_of_a_read(members: int, most: int) -> None:
    fleet = Fleet(members, seed=SEED)
    fleet.run(300.0)
    assert often(fleet) <= most


@pytest.mark.parametrize("members", [10, 1_000, 10_000, LARGE])
def test_a_delivery_is_read_by_who_got_it_and_a_handful_ask_beside(members: int) -> None:
    fleet = Fleet(members, seed=SEED)
    delivery = fleet.deliver(10.0, members // 3)
    fleet.run(10.6 if members < 100_000 else 11.4)
    assert len(fleet.reads) == 1
    last = max(delivery.served)
    assert sum(moment <= last for moment in fleet.asked_at) <= (5 if members < 100_000 else 5_000)


@pytest.mark.parametrize("members", [10, 1_000, 10_000])
def test_while_a_value_settles_whoever_read_it_last_reads_it_next(members: int) -> None:
    fleet = Fleet(members, seed=SEED)
    fleet.deliver(10.0, members // 3)
    fleet.run(26.0)
    looks = [moment for moment in fleet.reads if moment > 10.0]
    assert len(looks) == 6, "at once, after 1, 1, 2, 4 and 8 seconds"
    assert often(fleet) <= 5


@pytest.mark.parametrize(("members", "seconds"), [(10, 0.002), (1_000, 0.02), (10_000, 0.2)])
def test_all_members_serve_the_new_value_soon_after_the_answer_to_the_delivery(members: int, seconds: float) -> None:
    fleet = Fleet(members, seed=SEED, share=steady_load(Steady(members, 1)).share)
    delivery = fleet.deliver(10.0, members // 2)
    fleet.run(12.0)
    assert delivery.answered is not None
    assert len(delivery.served) == members
    assert max(delivery.served) - delivery.answered <= seconds


@pytest.mark.parametrize("members", [10, 1_000])
@pytest.mark.parametrize(("api", "takes"), [(refusing, 0.01), (hanging, 5.0)])
def test_while_the_api_is_down_the_fleet_asks_it_as_one_member_would(members: int, api: Api, takes: float) -> None:
    fleet = Fleet(members, seed=SEED, api=api)
    fleet.run(600.0 if members < 1_000 or api is refusing else 200.0)
    gaps = [later - earlier for earlier, later in pairwise(fleet.reads)]
    assert min(gaps) >= BACKOFF_FLOOR_SECONDS + takes
    assert sum(gaps) / len(gaps) >= 10.0, "half a lifetime of jitter, less while the span grows"
    assert max(gaps) <= BACKOFF_FLOOR_SECONDS + TTL_SECONDS + takes + 1.5


def test_who_finds_the_lease_busy_asks_again_less_and_less() -> None:
    fleet, eager = Fleet(100, seed=SEED, api=hanging), Fleet(100, seed=SEED, api=hanging, follow=lambda *_: 0.05)
    fleet.run(60.0)
    eager.run(60.0)
    assert often(fleet) <= 9 * 100
    assert often(eager) >= 9 * often(fleet), "what a steady 50 ms would cost"


def test_when_the_holder_of_the_lease_dies_the_others_come_one_after_the_other() -> None:
    def dies(now: float, chance: float) -> tuple[float, ReadError | None]:
        return (1e9, None) if now < 31.0 else answering(now, chance)

    fleet = Fleet(1_000, seed=SEED, api=dies)
    fleet.run(40.0)
    _, second = fleet.reads
    free = fleet.reads[0] + 5.0 + LEASE_GRACE_SECONDS
    assert free <= second <= free + RedisStore.spread_seconds
    assert sum(free <= moment <= second + 0.15 for moment in fleet.asked_at) <= 60


@pytest.mark.parametrize("members", [1, 10, 1_000, LARGE])
def test_while_redis_is_away_members_read_as_so_many_single_processes(members: int) -> None:
    told = outage(members, seed=SEED, back_at=132.0)
    usual = members / TTL_SECONDS
    lifetimes = (told.reads[-1] - told.reads[0]) / (TTL_SECONDS - 0.65) + 1
    assert len(told.reads) <= members * lifetimes
    assert told.most_in_a_second <= 1.7 * usual + 6 * usual**0.5 + 1, "where one round ends, the next has begun"


def test_members_that_did_not_part_would_read_together() -> None:
    assert outage(1_000, seed=SEED, back_at=62.0, parting=False).most_in_a_second >= 900


@pytest.mark.parametrize("members", [10, 1_000, LARGE])
def test_when_redis_is_back_it_takes_a_handful_of_offers_and_nobody_reads_for_it(members: int) -> None:
    told = outage(members, seed=SEED, back_at=132.0)
    assert 1 <= told.accepted <= (25 if members < 100_000 else 100)
    assert max(told.rejoined) - 132.0 <= 1.0
    usual = members / TTL_SECONDS
    assert sum(read >= 132.0 for read in told.reads) <= usual + 6 * usual**0.5 + 1


def test_the_same_seed_tells_the_same_story() -> None:
    one, other = (Fleet(100, seed=SEED) for _ in range(2))
    for fleet in (one, other):
        fleet.deliver(10.0, 50)
        fleet.run(100.0)
    assert (one.reads, one.counts) == (other.reads, other.counts)
