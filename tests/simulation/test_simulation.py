"""The simulation holds every promise about state, repeats itself exactly, and finds every planted defect."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import pytest

from tests.simulation.history import History, play
from tests.simulation.mutants import MUTANTS, Mutant, kill
from tests.simulation.runs import broken, shrink, tell
from tests.simulation.world import Choices

HISTORIES = 400
"""Histories that are played in each run of the tests, always the same; `make simulate` plays fresh ones."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Histories write many log lines, which nobody reads."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("first", range(0, HISTORIES, 50))
def test_no_history_breaks_a_promise(first: int) -> None:
    for seed in range(first, first + 50):
        end = broken(Choices(seed=seed))
        assert not end, f"seed {seed}: {end}; see `python -m tests.simulation --seed {seed}`"


def test_the_same_choices_give_the_same_history() -> None:
    for seed in range(20):
        first = Choices(seed=seed)
        history = play(first)
        again = play(Choices(first.made))
        assert again.world.log == history.world.log
        assert again.world.switches == history.world.switches
        assert [read.started for read in again.reads] == [read.started for read in history.reads]


def test_histories_reach_every_kind_of_store_and_fault() -> None:
    faults = "delivery storm refreshes forks killed frozen down cut busy deaf loses"
    missing = {*faults.split(), "memory", "file", "fleet", "background", "lazy", "one tenant", "two tenants"}

    def begun(history: History) -> None:
        missing.difference_update(
            (
                history.kind,
                "background" if history.background else "lazy",
                "one tenant" if len(history.tenants) == 1 else "two tenants",
            )
        )

    for seed in range(HISTORIES):
        log = play(Choices(seed=seed), begun).world.log
        missing.difference_update(word for line in log for word in line.split())
        if not missing:
            break
    assert not missing


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_planted_defect_is_found(mutant: Mutant) -> None:
    assert kill(mutant) is not None, "the simulation does not find this defect"


def test_a_failing_history_is_made_smaller_and_still_fails() -> None:
    def fails(given: Sequence[int]) -> bool:
        return sum(given) >= 10 and 7 in given

    smaller = shrink([3, 7, 0, 9, 2, 1, 0, 0], fails)
    assert fails(smaller)
    assert len(smaller) <= 3


def test_the_story_of_a_history_tells_its_steps() -> None:
    choices = Choices(seed=3)
    history = play(choices)
    assert history.world.log
    assert tell(choices.made) == (history.world.log, "")
