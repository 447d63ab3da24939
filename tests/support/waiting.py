"""The one way in which tests wait for something that has no event to wait on."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["PATIENCE_SECONDS", "wait_until"]

T = TypeVar("T")

PATIENCE_SECONDS = 30.0
"""How long a test waits before it fails. Only a test that fails waits so long, even on a machine that is busy."""

LONGEST_PAUSE_SECONDS = 0.02


def wait_until(condition: Callable[[], T | None], *, seconds: float = PATIENCE_SECONDS, message: str = "") -> T:
    """Wait until a condition holds, and fail the test at the deadline.

    Args:
        condition: Called again and again; an exception that it raises ends the wait.
        seconds: The deadline, > 0.
        message: What the failure says; the traceback shows the line that waits in any case.

    Returns:
        The first true value that the condition gave.
    """
    __tracebackhide__ = True
    deadline = time.monotonic() + seconds
    pause = 0.0005
    while not (value := condition()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"{message or 'the condition did not hold'} (waited {seconds:g} seconds)")
        pause = min(LONGEST_PAUSE_SECONDS, pause * 1.5)
        time.sleep(pause)
    return value
