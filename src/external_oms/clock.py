"""The clocks: ages are counted on one that never goes back and runs on in suspend; the wall clock is for people."""

from __future__ import annotations

import time
from functools import partial
from typing import Protocol

__all__ = ["SYSTEM_CLOCK", "Clock", "SystemClock"]


class Clock(Protocol):
    """The two clocks that the package reads; tests pass one that moves only when told to."""

    def monotonic(self) -> float:
        """Return the seconds since this host booted, time in suspend included; equal for all processes of the host."""
        ...  # pragma: no cover - a Protocol's body never runs

    def wall(self) -> float:
        """Return the seconds since the Unix epoch."""
        ...  # pragma: no cover - a Protocol's body never runs


# Linux stops `time.monotonic` in suspend: a virtual machine that was paused for an hour would serve an hour-old value
# as fresh. CLOCK_BOOTTIME runs on. The platform decides, since all processes of a host must read the same clock, and
# `partial` calls it without a Python frame, since every evaluation reads it.
_BOOTTIME: int | None = getattr(time, "CLOCK_BOOTTIME", None)


class SystemClock:
    """The clocks of this host."""

    monotonic = staticmethod(time.monotonic if _BOOTTIME is None else partial(time.clock_gettime, _BOOTTIME))
    wall = staticmethod(time.time)


SYSTEM_CLOCK = SystemClock()
