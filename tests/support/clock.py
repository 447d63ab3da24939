"""Clocks for tests: one that stands still until the test moves it, and one that runs and can jump ahead."""

from __future__ import annotations

import time

__all__ = ["FakeClock", "SkipClock"]


class FakeClock:
    """A clock that moves only by `advance`.

    The monotonic start is no round number and not the wall's, so that a test in which the two are mixed up fails.
    """

    def __init__(self, monotonic: float = 5_000.25, wall: float = 1_780_000_000.0) -> None:
        self._monotonic = monotonic
        self._wall = wall

    def monotonic(self) -> float:
        return self._monotonic

    def wall(self) -> float:
        return self._wall

    def advance(self, seconds: float) -> None:
        """Let time pass on both clocks; a negative number is an error of the test."""
        assert seconds >= 0, "a monotonic clock does not go back; use set_wall for the wall clock"
        self._monotonic += seconds
        self._wall += seconds

    def set_wall(self, wall: float) -> None:
        """Set the wall clock alone, as an administrator or NTP does."""
        self._wall = wall


class SkipClock:
    """The machine's clock plus what the test has skipped: for real threads in tests that span long times."""

    def __init__(self) -> None:
        self._skipped = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self._skipped

    def wall(self) -> float:
        return time.time() + self._skipped

    def skip(self, seconds: float) -> None:
        self._skipped += seconds
