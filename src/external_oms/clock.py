"""Two clocks and one law: ages are counted on the monotonic clock, the wall clock is for people."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["SYSTEM_CLOCK", "Clock", "SystemClock"]


class Clock(Protocol):
    """What tells the time; tests hand in one that stands still until told."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back, the same for all processes of one host since its boot."""
        ...  # pragma: no cover - a Protocol's body never runs

    def wall(self) -> float:
        """Seconds since the Unix epoch."""
        ...  # pragma: no cover - a Protocol's body never runs


class SystemClock:
    """The machine's own clocks."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)


SYSTEM_CLOCK = SystemClock()
