"""A command that runs until it is told to end hears Ctrl-C, a termination and a closed terminal alike, and once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Ended", "endable", "uninterrupted", "wait_to_be_ended"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(BaseException):
    """Somebody told this process to end; not an error, and nothing may catch it as one."""


@contextmanager
def endable() -> Iterator[None]:
    """What stands in this block ends, in order, when the process is told to; the block then counts as done.

    What the block opened is closed with the signals held off, so that an impatient second Ctrl-C leaves nothing behind.
    Only the main thread may use it: Python delivers signals nowhere else.
    """
    before = {number: signal.signal(number, _end) for number in _SIGNALS}
    try:
        yield
    except Ended:
        return
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """What this block begins it also finishes; whoever told the process to end meanwhile is heard right after it."""
    heard: list[int] = []
    before = {number: signal.signal(number, lambda told, _: heard.append(told)) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if heard:
            signal.raise_signal(heard[0])


def wait_to_be_ended() -> None:
    """Wait, inside `endable`, for nothing else."""
    threading.Event().wait()


def _end(_number: int, _frame: FrameType | None) -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise Ended
