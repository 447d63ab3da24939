"""Make a failing sequence of choices smaller, while it fails in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

__all__ = ["shrink"]


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
                if candidate != best and any(best[place : place + size]) | (len(candidate) < len(best)) and fails(candidate):
                    best, smaller = candidate, True
                    break
            else:
                place += size
        if not smaller:
            size //= 2
    return best
