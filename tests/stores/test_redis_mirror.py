"""The mirror moves forward only: what it makes of states seen in Redis, in order, late, lost and of another epoch."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from external_oms.config import Failure, Snapshot
from external_oms.stores.base import Lease, Record
from external_oms.stores.redis_mirror import Mirror, Verdict, supersedes
from external_oms.stores.redis_wire import Remote, Stamp
from tests.support.clock import FakeClock

TENANT = "acme"
DAY = datetime(2026, 3, 1, tzinfo=UTC)
VALUE = Snapshot(True, None, None, 1, 1, 10.0, DAY, 30.0)
FAILURE = Failure("unavailable", "no answer", 503, 1, 2, 1, 11.0, DAY, 12.0)


@pytest.fixture
def mirror(clock: FakeClock) -> Mirror:
    return Mirror([TENANT], bound_seconds=5.0, clock=clock, history_seconds=60.0)


def state(
    generation: int, revision: int, *, epoch: str = "one", was: int | None = None, record: Record | None = None
) -> Remote:
    told = replace(record or Record(), generation=generation)
    return Remote(Stamp(epoch, generation, revision), told, revision - 1 if was is None else was, "")


def settle(mirror: Mirror, remote: Remote, *, asked: bool = True) -> Verdict:
    return mirror.settle(TENANT, remote, mirror.debt(TENANT) if asked else None)


def word(mirror: Mirror) -> int:
    words, slot = mirror.watch(TENANT)
    return words[slot]


def test_the_first_state_is_adopted_and_every_later_one(mirror: Mirror) -> None:
    before = word(mirror)
    assert settle(mirror, state(3, 30)) is Verdict.ADOPTED
    assert word(mirror) != before
    assert mirror.load(TENANT).generation == 3
    assert settle(mirror, state(3, 31), asked=False) is Verdict.ADOPTED
    assert settle(mirror, state(9, 40), asked=False) is Verdict.ADOPTED
    assert mirror.load(TENANT).generation == 9


@pytest.mark.parametrize("asked", [True, False])
def test_a_late_state_changes_nothing(mirror: Mirror, asked: bool) -> None:
    settle(mirror, state(3, 30))
    before = word(mirror)
    assert settle(mirror, state(2, 20), asked=asked) is Verdict.SAME
    assert settle(mirror, state(3, 30), asked=asked) is Verdict.SAME
    assert (word(mirror), mirror.load(TENANT).generation) == (before, 3)


@pytest.mark.parametrize("asked", [True, False])
def test_a_later_state_of_a_lower_generation_has_lost_writes(mirror: Mirror, asked: bool) -> None:
    settle(mirror, state(3, 30))
    assert settle(mirror, state(2, 31), asked=asked) is Verdict.LOST
    assert mirror.load(TENANT).generation == 3


def test_another_epoch_is_believed_only_where_it_was_asked_for(mirror: Mirror) -> None:
    settle(mirror, state(3, 30))
    assert settle(mirror, state(4, 40, epoch="two"), asked=False) is Verdict.ASK
    stale = mirror.debt(TENANT)
    assert settle(mirror, state(3, 40, epoch="two")) is Verdict.LOST
    assert settle(mirror, state(4, 40, epoch="two")) is Verdict.ADOPTED
    assert mirror.settle(TENANT, state(9, 35, epoch="one"), stale) is Verdict.ASK


def test_an_invalidation_made_alone_stands_until_redis_has_one_more(mirror: Mirror) -> None:
    assert mirror.invalidate(TENANT) == 1
    assert mirror.debt(TENANT).owes
    assert settle(mirror, state(0, 10), asked=False) is Verdict.LOST
    assert settle(mirror, state(2, 11)) is Verdict.ADOPTED
    assert not mirror.debt(TENANT).owes


def test_an_invalidation_that_came_while_the_last_one_was_paid_is_still_owed(mirror: Mirror) -> None:
    mirror.invalidate(TENANT)
    asked = mirror.debt(TENANT)
    mirror.invalidate(TENANT)
    mirror.settle(TENANT, state(2, 11), asked)
    assert mirror.debt(TENANT).owes


def test_a_delivery_taken_alone_is_owed_and_its_repetition_is_not(mirror: Mirror) -> None:
    assert mirror.deliver(TENANT, "msg", seconds=60.0) == 1
    settle(mirror, state(2, 11))
    assert mirror.deliver(TENANT, "msg", seconds=60.0) is None
    assert not mirror.debt(TENANT).owes


def test_what_others_did_is_told_once_and_wakes(mirror: Mirror) -> None:
    woken: list[int] = []
    mirror.attach(lambda: woken.append(word(mirror)))
    settle(mirror, state(1, 10, was=0))
    assert (mirror.changed(), woken) == ((), [])
    settle(mirror, state(2, 20, was=10), asked=True)
    assert mirror.changed() == ()
    settle(mirror, state(3, 30, was=25), asked=True)
    assert mirror.changed() == (TENANT,)
    settle(mirror, state(4, 40, was=30), asked=False)
    assert mirror.changed() == (TENANT,)
    assert mirror.changed() == ()
    assert len(woken) == 2
    assert woken[-1] == word(mirror), "woken after the change can be loaded"


def test_what_was_converted_once_is_not_converted_again(mirror: Mirror) -> None:
    known = Record(snapshot=VALUE, failure=FAILURE, invalidated_at=9.0)
    settle(mirror, state(1, 10, record=known))
    moved = Record(
        snapshot=replace(VALUE, read_at=9.99),
        failure=replace(FAILURE, failed_at=10.99, not_before=11.99),
        invalidated_at=8.99,
    )
    settle(mirror, state(1, 11, record=moved))
    assert mirror.load(TENANT) == replace(known, generation=1)


def test_the_last_value_outlives_a_record_that_was_born_again(mirror: Mirror) -> None:
    settle(mirror, state(1, 10, record=Record(snapshot=VALUE)))
    settle(mirror, state(2, 20, epoch="two", was=0))
    assert mirror.load(TENANT).snapshot is VALUE
    assert mirror.debt(TENANT).offer is VALUE
    settle(mirror, state(2, 21, epoch="two", was=20, record=Record(snapshot=replace(VALUE, read_at=9.99))))
    assert mirror.load(TENANT).snapshot is VALUE
    assert mirror.debt(TENANT).offer is None


def test_a_value_read_alone_is_kept_until_redis_has_judged_it(mirror: Mirror) -> None:
    settle(mirror, state(1, 10, record=Record(snapshot=VALUE)))
    lease = mirror.acquire(TENANT, seconds=5.0, metered=False)
    assert isinstance(lease, Lease)
    alone = replace(VALUE, read_number=lease.number, read_at=20.0, enabled=False)
    assert mirror.put(lease, alone)
    settle(mirror, state(1, 11, record=Record(snapshot=VALUE)), asked=False)
    assert mirror.load(TENANT).snapshot is alone
    newer = replace(VALUE, read_number=9, read_at=30.0)
    refusal = state(1, 11, was=11, record=Record(snapshot=newer))
    assert settle(mirror, refusal) is Verdict.SAME
    assert mirror.load(TENANT).snapshot == newer
    assert mirror.debt(TENANT).offer is None


def test_a_child_doubts_once_the_bound_has_passed_and_trusts_after_a_look(mirror: Mirror, clock: FakeClock) -> None:
    settle(mirror, state(1, 10, record=Record(snapshot=VALUE)))
    mirror.verify()
    clock.advance(60.0)
    assert mirror.load(TENANT).snapshot is VALUE, "a process that was not forked follows without a pause"
    mirror.verify()
    before = word(mirror)
    mirror.after_fork()
    assert word(mirror) != before
    assert mirror.load(TENANT).snapshot is VALUE
    clock.advance(5.5)
    doubted = mirror.load(TENANT)
    assert doubted.snapshot is not None
    assert (doubted.generation, doubted.snapshot.generation, doubted.invalidated_at) == (1, 0, clock.monotonic())
    assert mirror.record(TENANT).snapshot is VALUE
    before = word(mirror)
    mirror.trust()
    assert word(mirror) != before
    assert mirror.load(TENANT).snapshot is VALUE


def test_a_lease_given_alone_is_known_until_it_ends(mirror: Mirror) -> None:
    lease = mirror.acquire(TENANT, seconds=5.0, metered=False)
    assert isinstance(lease, Lease)
    mirror.hold(lease)
    assert mirror.let_go(lease)
    assert not mirror.let_go(lease)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (VALUE, None, True),
        (replace(VALUE, generation=2), replace(VALUE, read_at=11.0), False),
        (replace(VALUE, read_at=11.0), replace(VALUE, generation=2), False),
        (replace(VALUE, read_at=11.0), VALUE, True),
        (VALUE, VALUE, False),
        (replace(VALUE, updated_at=DAY, read_at=99.0), replace(VALUE, updated_at=DAY.replace(day=2)), False),
        (replace(VALUE, updated_at=DAY.replace(day=2)), replace(VALUE, updated_at=DAY, read_at=99.0), True),
        (replace(VALUE, updated_at=DAY, read_at=11.0), replace(VALUE, updated_at=DAY), True),
    ],
)
def test_the_newer_snapshot_is_known_by_generation_then_by_the_api_then_by_the_read(
    ours: Snapshot, theirs: Snapshot | None, expected: bool
) -> None:
    assert supersedes(ours, theirs) is expected
