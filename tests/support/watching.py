"""What a call does that may keep its thread waiting: for a socket, for time, or for another thread."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

__all__ = ["watched"]

T = TypeVar("T")

_WAITING_IN = (threading.Condition.wait.__code__, threading.Thread.join.__code__)
"""Where a thread that acquires a lock waits for what another one does; events and futures wait by a condition."""


def watched(call: Callable[[], T]) -> tuple[T, list[str]]:
    """Call, and return the result and what was called meanwhile that may wait.

    A lock in a `with` statement is not among it: nobody waits while holding one, so it is free in a moment.
    """
    found: list[str] = []

    def profile(frame: FrameType, event: str, function: Any) -> None:  # noqa: ANN401 - whatever is called
        if event == "c_call" and _may_wait(frame, function):
            found.append(f"{function.__qualname__} in {frame.f_code.co_qualname}")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        return call(), found
    finally:
        sys.setprofile(before)


def _may_wait(frame: FrameType, function: Any) -> bool:  # noqa: ANN401 - whatever is called
    owner = getattr(function, "__self__", None)
    return (
        function is time.sleep
        or isinstance(owner, socket.SocketType)
        or type(owner).__module__ in {"select", "_ssl"}
        or getattr(owner, "__name__", "") in {"select", "_socket"}
        or (function.__name__ == "acquire" and frame.f_code in _WAITING_IN)
    )
