"""Whom to tell: listeners that come and go, called one after the other with no lock held."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Signal"]

logger = logging.getLogger("external_oms")

T = TypeVar("T")


class Signal(Generic[T]):
    """A thing that happens, and those who want to be told."""

    def __init__(self) -> None:
        self._keys = itertools.count()
        self._listeners: dict[int, Callable[[T], None]] = {}
        self._line: deque[T] = deque()
        self._telling = threading.Lock()

    def listen(self, listener: Callable[[T], None]) -> Callable[[], None]:
        """Have it told, from whichever thread it happens in; returns what ends that. A listener must not block."""
        key = next(self._keys)
        self._listeners[key] = listener
        return lambda: self._listeners.pop(key, None) and None

    def tell(self, what: T) -> None:
        """Tell everybody; one listener's mistake is logged and keeps nothing from the others."""
        for listener in tuple(self._listeners.values()):
            try:
                listener(what)
            except Exception:
                logger.exception("a listener failed")

    def line_up(self, what: T) -> None:
        """Have it told by `tell_all`, after what was lined up before; called under the lock that sets the order."""
        self._line.append(what)

    def tell_all(self) -> None:
        """Tell what is lined up, in its order; where another thread is telling, that one tells this too."""
        while self._line and self._telling.acquire(blocking=False):
            try:
                while self._line:
                    self.tell(self._line.popleft())
            finally:
                self._telling.release()

    def after_fork(self) -> None:
        """In a forked child: what the parent was telling is the parent's."""
        self._line.clear()
        self._telling = threading.Lock()
