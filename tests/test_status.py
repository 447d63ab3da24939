"""How tenants stand: edges, not levels; one line for each; one dead tenant does not make the others look dead."""

from __future__ import annotations

import itertools
import threading
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_oms.entry import Entry, Failure, Snapshot
from external_oms.policy import Evaluation, Freshness, Source
from external_oms.status import StatusTracker, TenantStatus, Transition, aggregate, status_of

EPOCH = datetime(2026, 3, 1, tzinfo=UTC)
SNAPSHOT = Snapshot(True, None, None, 0, 1, 1000.0, EPOCH, 30.0)


def failure(count: int = 1, message: str = "no answer in time") -> Failure:
    return Failure("unavailable", message, None, count, 1 + count, 0, 1031.0, EPOCH, 1035.0)


def evaluation(
    freshness: Freshness, *, failed: Failure | None = None, known: Snapshot | None = SNAPSHOT, tenant: str = "acme"
) -> Evaluation:
    return Evaluation(tenant, Entry(token=1, snapshot=known, failure=failed), freshness, 1030.0, Source.MEMORY)


READY = evaluation(Freshness.FRESH)
STALE = evaluation(Freshness.STALE, failed=failure())
ERROR = evaluation(Freshness.EXPIRED, failed=failure())
UNKNOWN = evaluation(Freshness.EXPIRED, known=None)
BY_STATUS = {TenantStatus.READY: READY, TenantStatus.STALE: STALE, TenantStatus.ERROR: ERROR}


@pytest.mark.parametrize(
    ("freshness", "failed", "known", "status"),
    [
        (Freshness.FRESH, False, True, TenantStatus.READY),
        (Freshness.STALE, False, True, TenantStatus.READY),  # by age alone nothing is wrong: a read is under way
        (Freshness.EXPIRED, False, True, TenantStatus.READY),
        (Freshness.EXPIRED, False, False, None),
        (Freshness.FRESH, True, True, TenantStatus.STALE),
        (Freshness.STALE, True, True, TenantStatus.STALE),
        (Freshness.EXPIRED, True, True, TenantStatus.ERROR),
        (Freshness.EXPIRED, True, False, TenantStatus.ERROR),
    ],
)
def test_the_table_of_statuses(freshness: Freshness, failed: bool, known: bool, status: TenantStatus | None) -> None:
    given_evaluation = evaluation(freshness, failed=failure() if failed else None, known=SNAPSHOT if known else None)
    assert status_of(given_evaluation) is status


@pytest.mark.parametrize(
    ("standings", "together"),
    [
        ("", None),
        ("r", TenantStatus.READY),
        ("s", TenantStatus.STALE),
        ("e", TenantStatus.ERROR),
        ("rr", TenantStatus.READY),
        ("rs", TenantStatus.STALE),
        ("re", TenantStatus.STALE),
        ("se", TenantStatus.STALE),
        ("ss", TenantStatus.STALE),
        ("ee", TenantStatus.ERROR),
        ("rse", TenantStatus.STALE),
    ],
)
def test_the_table_of_all_together(standings: str, together: TenantStatus | None) -> None:
    words = {"r": TenantStatus.READY, "s": TenantStatus.STALE, "e": TenantStatus.ERROR}
    for order in itertools.permutations(standings):
        assert aggregate([words[letter] for letter in order]) is together


@pytest.mark.parametrize("before", [None, *TenantStatus])
@pytest.mark.parametrize("after", TenantStatus)
def test_an_edge_is_told_once_where_the_standing_changes(before: TenantStatus | None, after: TenantStatus) -> None:
    tracker = StatusTracker()
    if before is not None:
        tracker.observe(BY_STATUS[before])
    edge = tracker.observe(BY_STATUS[after])
    if before is after or (before is None and after is TenantStatus.READY):
        assert edge is None
    else:
        assert edge is not None
        assert (edge.tenant, edge.before, edge.after) == ("acme", before, after)
    assert tracker.observe(BY_STATUS[after]) is None


def test_nothing_known_is_no_standing_and_changes_none() -> None:
    tracker = StatusTracker()
    assert tracker.observe(UNKNOWN) is None
    assert tracker.aggregate() is None
    tracker.observe(STALE)
    assert tracker.observe(UNKNOWN) is None
    assert tracker.aggregate() is TenantStatus.STALE


def test_an_edge_says_how_many_failures_it_stands_for() -> None:
    tracker = StatusTracker()
    first = tracker.observe(STALE)
    for count in range(2, 41):
        assert tracker.observe(evaluation(Freshness.STALE, failed=failure(count))) is None
    worse = tracker.observe(evaluation(Freshness.EXPIRED, failed=failure(41)))
    better = tracker.observe(READY)
    assert first is not None
    assert worse is not None
    assert better is not None
    assert [edge.failures for edge in (first, worse, better)] == [1, 41, 41]
    again = tracker.observe(STALE)
    assert again is not None
    assert again.failures == 1, "a new row of failures counts from its beginning"


def test_every_edge_is_one_line_that_says_whose_what_and_why() -> None:
    lines = [
        Transition("acme", None, TenantStatus.STALE, 1, "no answer").line,
        Transition("acme", TenantStatus.STALE, TenantStatus.ERROR, 1, "no answer").line,
        Transition("acme", TenantStatus.STALE, TenantStatus.ERROR, 7, "no answer").line,
        Transition("acme", TenantStatus.ERROR, TenantStatus.READY, 7, "").line,
    ]
    assert lines == [
        "tenant acme: config API reads are failing; serving the last value: no answer",
        "tenant acme: config API reads are failing (1 failed read); nothing may be served: no answer",
        "tenant acme: config API reads are failing (7 failed reads); nothing may be served: no answer",
        "tenant acme: config API reads succeed again after 7 failed reads",
    ]


def test_tenants_stand_each_for_itself() -> None:
    tracker = StatusTracker()
    tracker.observe(evaluation(Freshness.FRESH, tenant="alive"))
    edge = tracker.observe(evaluation(Freshness.EXPIRED, failed=failure(), known=None, tenant="dead"))
    assert edge is not None
    assert edge.tenant == "dead"
    assert tracker.aggregate() is TenantStatus.STALE
    assert tracker.observe(evaluation(Freshness.FRESH, tenant="alive")) is None


@given(st.lists(st.sampled_from([READY, STALE, ERROR, UNKNOWN])))
def test_edges_join_end_to_end_and_the_last_is_where_the_tenant_stands(evaluations: list[Evaluation]) -> None:
    tracker = StatusTracker()
    status: TenantStatus | None = None
    for given_evaluation in evaluations:
        edge = tracker.observe(given_evaluation)
        if edge is not None:
            assert edge.before is status
            assert edge.after is not status
        status = status_of(given_evaluation) or status
        assert tracker.aggregate() is status


def test_a_lock_held_at_the_instant_of_a_fork_does_not_stop_the_child() -> None:
    tracker = StatusTracker()
    tracker.observe(STALE)
    tracker._lock.acquire()
    tracker.after_fork()
    thread = threading.Thread(target=tracker.observe, args=(READY,), daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert tracker.aggregate() is TenantStatus.READY
