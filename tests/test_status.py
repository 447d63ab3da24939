"""How tenants stand: edges, not levels; one line for each; one dead tenant does not make the others look dead."""

from __future__ import annotations

import itertools
import threading
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from external_oms.config import Failure, Snapshot
from external_oms.freshness import Freshness
from external_oms.judgement import Answer, Source
from external_oms.status import Edge, Standing, Standings, overall, standing_of
from external_oms.stores.base import Record

EPOCH = datetime(2026, 3, 1, tzinfo=UTC)
SNAPSHOT = Snapshot(True, None, None, 0, 1, 1000.0, EPOCH, 30.0)


def failure(count: int = 1, message: str = "no answer in time") -> Failure:
    return Failure("unavailable", message, None, count, 1 + count, 0, 1031.0, EPOCH, 1035.0, obliged=False)


def answer(
    freshness: Freshness, *, failed: Failure | None = None, known: Snapshot | None = SNAPSHOT, tenant: str = "acme"
) -> Answer:
    return Answer(tenant, Record(reads=1, snapshot=known, failure=failed), freshness, 1030.0, Source.MEMORY)


READY = answer(Freshness.FRESH)
STALE = answer(Freshness.STALE, failed=failure())
ERROR = answer(Freshness.EXPIRED, failed=failure())
UNKNOWN = answer(Freshness.EXPIRED, known=None)
BY_STANDING = {Standing.READY: READY, Standing.STALE: STALE, Standing.ERROR: ERROR}


@pytest.mark.parametrize(
    ("freshness", "failed", "known", "standing"),
    [
        (Freshness.FRESH, False, True, Standing.READY),
        (Freshness.STALE, False, True, Standing.READY),  # by age alone nothing is wrong: a read is under way
        (Freshness.EXPIRED, False, True, Standing.READY),
        (Freshness.EXPIRED, False, False, None),
        (Freshness.FRESH, True, True, Standing.STALE),
        (Freshness.STALE, True, True, Standing.STALE),
        (Freshness.EXPIRED, True, True, Standing.ERROR),
        (Freshness.EXPIRED, True, False, Standing.ERROR),
    ],
)
def test_the_table_of_standings(freshness: Freshness, failed: bool, known: bool, standing: Standing | None) -> None:
    given_answer = answer(freshness, failed=failure() if failed else None, known=SNAPSHOT if known else None)
    assert standing_of(given_answer) is standing


@pytest.mark.parametrize(
    ("standings", "together"),
    [
        ("", None),
        ("r", Standing.READY),
        ("s", Standing.STALE),
        ("e", Standing.ERROR),
        ("rr", Standing.READY),
        ("rs", Standing.STALE),
        ("re", Standing.STALE),
        ("se", Standing.STALE),
        ("ss", Standing.STALE),
        ("ee", Standing.ERROR),
        ("rse", Standing.STALE),
    ],
)
def test_the_table_of_all_together(standings: str, together: Standing | None) -> None:
    words = {"r": Standing.READY, "s": Standing.STALE, "e": Standing.ERROR}
    for order in itertools.permutations(standings):
        assert overall([words[letter] for letter in order]) is together


@pytest.mark.parametrize("before", [None, *Standing])
@pytest.mark.parametrize("after", Standing)
def test_an_edge_is_told_once_where_the_standing_changes(before: Standing | None, after: Standing) -> None:
    standings = Standings()
    if before is not None:
        standings.observe(BY_STANDING[before])
    edge = standings.observe(BY_STANDING[after])
    if before is after or (before is None and after is Standing.READY):
        assert edge is None
    else:
        assert edge is not None
        assert (edge.tenant, edge.before, edge.after) == ("acme", before, after)
    assert standings.observe(BY_STANDING[after]) is None


def test_nothing_known_is_no_standing_and_changes_none() -> None:
    standings = Standings()
    assert standings.observe(UNKNOWN) is None
    assert standings.overall() is None
    standings.observe(STALE)
    assert standings.observe(UNKNOWN) is None
    assert standings.overall() is Standing.STALE


def test_an_edge_says_how_many_failures_it_stands_for() -> None:
    standings = Standings()
    first = standings.observe(STALE)
    for count in range(2, 41):
        assert standings.observe(answer(Freshness.STALE, failed=failure(count))) is None
    worse = standings.observe(answer(Freshness.EXPIRED, failed=failure(41)))
    better = standings.observe(READY)
    assert first is not None
    assert worse is not None
    assert better is not None
    assert [edge.failures for edge in (first, worse, better)] == [1, 41, 41]
    again = standings.observe(STALE)
    assert again is not None
    assert again.failures == 1, "a new row of failures counts from its beginning"


def test_every_edge_is_one_line_that_says_whose_what_and_why() -> None:
    lines = [
        Edge("acme", None, Standing.STALE, 1, "no answer").line,
        Edge("acme", Standing.STALE, Standing.ERROR, 1, "no answer").line,
        Edge("acme", Standing.STALE, Standing.ERROR, 7, "no answer").line,
        Edge("acme", Standing.ERROR, Standing.READY, 7, "").line,
    ]
    assert lines == [
        "tenant acme: reads fail, an old value serves: no answer",
        "tenant acme: reads fail (1 failed read), no value may be served: no answer",
        "tenant acme: reads fail (7 failed reads), no value may be served: no answer",
        "tenant acme: reads work again after 7 failed reads",
    ]


def test_tenants_stand_each_for_itself() -> None:
    standings = Standings()
    standings.observe(answer(Freshness.FRESH, tenant="alive"))
    edge = standings.observe(answer(Freshness.EXPIRED, failed=failure(), known=None, tenant="dead"))
    assert edge is not None
    assert edge.tenant == "dead"
    assert standings.overall() is Standing.STALE
    assert standings.observe(answer(Freshness.FRESH, tenant="alive")) is None


@settings(deadline=None)
@given(st.lists(st.sampled_from([READY, STALE, ERROR, UNKNOWN])))
def test_edges_join_end_to_end_and_the_last_is_where_the_tenant_stands(answers: list[Answer]) -> None:
    standings = Standings()
    standing: Standing | None = None
    for given_answer in answers:
        edge = standings.observe(given_answer)
        if edge is not None:
            assert edge.before is standing
            assert edge.after is not standing
        standing = standing_of(given_answer) or standing
        assert standings.overall() is standing


def test_a_lock_held_at_the_instant_of_a_fork_does_not_stop_the_child() -> None:
    standings = Standings()
    standings.observe(STALE)
    standings._lock.acquire()
    standings.after_fork()
    thread = threading.Thread(target=standings.observe, args=(READY,), daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert standings.overall() is Standing.READY
