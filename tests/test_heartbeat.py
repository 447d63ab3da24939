"""Who serves what, told to the store: at once when it matters, seldom when it does not, never in a storm."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from functools import partial

import pytest

from external_oms.cache import Cache
from external_oms.entry import Invalidation
from external_oms.errors import Unavailable
from external_oms.heartbeat import (
    LAG_SECONDS,
    MAX_INTERVAL_SECONDS,
    MIN_INTERVAL_SECONDS,
    SILENT_SECONDS,
    Heartbeat,
    MemberStatus,
    member_name,
    member_status,
)
from external_oms.records import Member
from external_oms.stores.memory import MemoryStore
from tests.support.clock import FakeClock
from tests.support.scripted import TENANT, Hand, Source, make_cache


class Counting(MemoryStore):
    """A store that remembers when it was told what."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock=clock)
        self.clock = clock
        self.told: list[tuple[float, tuple[Member, ...]]] = []

    def report(self, members: Sequence[Member]) -> None:
        self.told.append((self.clock.monotonic(), tuple(members)))
        super().report(members)


class Process:
    """A process that reports, on a clock that is moved by hand."""

    def __init__(self, clock: FakeClock, random: Callable[[], float] = lambda: 0.0) -> None:
        self.clock = clock
        self.source = Source(clock)
        self.hand = Hand(clock)
        self.store = Counting(clock)
        self.cache: Cache = make_cache(
            self.source, clock, runner=self.hand, store=self.store, tenants=(TENANT, "globex"), background=False
        )
        self.name = "web:1"
        self.heartbeat = Heartbeat(
            cache=self.cache, store=self.store, clock=clock, random=random, name=lambda: self.name
        )
        self.heartbeat.start()

    @property
    def times(self) -> list[float]:
        return [at for at, _ in self.store.told]


@pytest.fixture
def process(clock: FakeClock) -> Process:
    return Process(clock)


def test_a_process_that_only_looks_at_nothing_reports_nothing(process: Process) -> None:
    process.hand.advance(60.0)
    assert process.store.told == []


def test_what_is_served_is_reported_for_every_tenant(process: Process) -> None:
    process.cache.lookup(TENANT)
    process.hand.advance(MIN_INTERVAL_SECONDS)
    assert process.store.told[0][1] == (
        Member("web:1", TENANT, generation=0, enabled=True, freshness="fresh", age_seconds=0.5),
        Member("web:1", "globex", generation=0, enabled=None, freshness="expired", age_seconds=None),
    )


def test_a_storm_of_changes_is_one_report_a_second(process: Process) -> None:
    process.cache.lookup(TENANT)
    for _ in range(100):
        process.cache.invalidate(TENANT, Invalidation())
        process.cache.lookup(TENANT)
        process.hand.advance(0.03)
    gaps = [later - earlier for earlier, later in zip(process.times, process.times[1:], strict=False)]
    assert len(process.times) in {3, 4, 5}
    assert min(gaps) >= MIN_INTERVAL_SECONDS


def test_a_change_is_reported_within_a_second_and_mere_time_every_ten(process: Process) -> None:
    process.cache.lookup(TENANT)
    process.hand.advance(2.0)
    process.hand.advance(2 * MAX_INTERVAL_SECONDS)
    before = len(process.times)
    assert before == 3, "one as it began, and two in twenty seconds"
    process.source.says = False
    process.cache.refresh(TENANT)
    process.hand.advance(MIN_INTERVAL_SECONDS)
    assert len(process.times) == before + 1
    assert process.store.members(TENANT)[0].enabled is False


def test_members_of_a_fleet_do_not_report_together_what_they_learn_together(clock: FakeClock) -> None:
    delays = []
    for number in range(5):
        process = Process(clock, random=partial(float, number / 5))
        process.store.spread_seconds = 1.0
        process.cache.lookup(TENANT)
        process.hand.advance(5 * MIN_INTERVAL_SECONDS)
        began, process.source.says = clock.monotonic(), False
        process.cache.refresh(TENANT)
        process.hand.advance(2 * MIN_INTERVAL_SECONDS)
        delays.append(round(process.times[-1] - began, 3))
    assert delays == [0.0, 0.2, 0.4, 0.6, 0.8]


def test_reading_the_same_value_again_is_no_news(process: Process) -> None:
    process.cache.lookup(TENANT)
    process.hand.advance(1.5)
    before = len(process.times)
    for _ in range(5):
        process.cache.refresh(TENANT)
        process.hand.advance(0.5)
    assert len(process.times) == before


def test_a_value_too_old_to_serve_is_reported_as_none(process: Process) -> None:
    process.cache.lookup(TENANT)
    process.source.says = Unavailable("down")
    process.hand.advance(4_000.0)
    process.cache.peek(TENANT)
    process.hand.advance(MIN_INTERVAL_SECONDS)
    (member,) = process.store.members(TENANT)
    assert (member.enabled, member.freshness) == (None, "expired")


def test_after_a_fork_the_child_reports_under_its_own_name(process: Process) -> None:
    process.cache.lookup(TENANT)
    process.hand.advance(1.0)
    process.heartbeat.restart()
    process.cache.after_fork()
    process.name = "web:2"
    process.hand.advance(MIN_INTERVAL_SECONDS)
    assert {member.name for member in process.store.told[-1][1]} == {"web:2"}, "though nobody has evaluated in it yet"
    process.hand.advance(MAX_INTERVAL_SECONDS)
    assert process.store.told[-1][1][0].name == "web:2"


def test_a_process_that_is_gone_in_a_moment_is_no_member(process: Process) -> None:
    process.cache.lookup(TENANT)
    process.hand.advance(0.49)
    assert process.store.told == []


def test_starting_twice_reports_once(process: Process) -> None:
    process.heartbeat.start()
    process.cache.lookup(TENANT)
    process.hand.advance(0.5)
    assert len(process.times) == 1


def test_a_process_is_called_by_its_host_and_number() -> None:
    assert member_name() == f"{socket.gethostname()}:{os.getpid()}"


@pytest.mark.parametrize(
    ("generation", "since_seconds", "seen_seconds", "status"),
    [
        (4, 60.0, 0.0, MemberStatus.CURRENT),
        (3, LAG_SECONDS, 0.0, MemberStatus.CURRENT),
        (3, LAG_SECONDS + 0.1, 0.0, MemberStatus.LAGS),
        (5, 60.0, 0.0, MemberStatus.CURRENT),
        (4, 60.0, SILENT_SECONDS, MemberStatus.CURRENT),
        (4, 60.0, SILENT_SECONDS + 0.1, MemberStatus.SILENT),
        (3, 60.0, SILENT_SECONDS + 0.1, MemberStatus.SILENT),
    ],
)
def test_who_lags_and_who_is_silent(
    generation: int, since_seconds: float, seen_seconds: float, status: MemberStatus
) -> None:
    member = Member("web:1", TENANT, generation, True, "fresh", 1.0, seen_seconds)
    assert member_status(member, generation=4, since_seconds=since_seconds) is status
