"""Play histories: many in a row, one again, and a failing one made smaller while it fails in the same way."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from tests.simulation.history import History, play
from tests.simulation.world import Choices, Violation

__all__ = ["BATCH", "Report", "broken", "shrink", "tell", "work"]

BATCH = 20
"""Histories between two reports of a worker."""

Report = tuple[int, int, int | None]
"""Histories, steps, and the seed that broke a promise."""


def work(first: int, seconds: float) -> Report:
    """Play histories for so many seconds, at most a batch."""
    logging.disable(logging.CRITICAL)
    until, steps = time.monotonic() + seconds, 0
    for played in range(1, BATCH + 1):
        try:
            steps += play(Choices(seed=first + played)).world.switches
        except Violation:
            return played, steps, first + played
        if time.monotonic() > until:
            break
    return played, steps, None


def broken(choices: Choices) -> str:
    """Return the promise that a history breaks, as far as it names the promise; empty where it breaks none."""
    try:
        play(choices)
    except Violation as violation:
        return str(violation)[:12]
    return ""


def tell(given: Sequence[int]) -> tuple[list[str], str]:
    """Return the story of a history, and how it ends."""
    histories: list[History] = []
    try:
        play(Choices(given), histories.append)
    except Violation as violation:
        return histories[0].world.log, str(violation)
    return histories[0].world.log, ""


def shrink(made: Sequence[int], fails: Callable[[Sequence[int]], bool], *, seconds: float = 10.0) -> list[int]:
    """Return a shorter sequence of choices that fails too.

    Args:
        made: The choices of the failing history.
        fails: Plays a sequence, followed by zeros, and returns whether it fails in the same way.
        seconds: How long to try, > 0.
    """
    best = list(made)
    until = time.monotonic() + seconds
    while best and best[-1] == 0:
        best.pop()
    size = max(1, len(best) // 2)
    while size and time.monotonic() < until:
        place, smaller = 0, False
        while place < len(best) and time.monotonic() < until:
            for candidate in (
                best[:place] + best[place + size :],
                best[:place] + [0] * len(best[place : place + size]) + best[place + size :],
            ):
                if (
                    candidate != best
                    and any(best[place : place + size]) | (len(candidate) < len(best))
                    and fails(candidate)
                ):
                    best, smaller = candidate, True
                    break
            else:
                place += size
        if not smaller:
            size //= 2
    return best
