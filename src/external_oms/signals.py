"""Signals: subscribers that are called one after the other, with no lock held while they run."""

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
    """A kind of event, and its subscribers."""

    def __init__(self) -> None:
        self._keys = itertools.count()
        self._subscribers: dict[int, Callable[[T], None]] = {}
        self._queue: deque[T] = deque()
        self._flushing = False
        self._lock = threading.Lock()

    def subscribe(self, subscriber: Callable[[T], None]) -> Callable[[], None]:
        """Call the subscriber for every event, in whichever thread it happens; it must not block.

        Returns:
            A function that ends the subscription.
        """
        key = next(self._keys)
        self._subscribers[key] = subscriber
        return lambda: self._subscribers.pop(key, None) and None

    def send(self, event: T) -> None:
        """Call every subscriber; an exception in one of them is logged, and the others are called all the same."""
        for subscriber in tuple(self._subscribers.values()):
            try:
                subscriber(event)
            except Exception:
                logger.exception("a subscriber failed")

    def enqueue(self, event: T) -> None:
        """Queue an event for `flush`; call it while holding the lock that defines the order of events."""
        self._queue.append(event)

    def flush(self) -> None:
        """Send the queued events in their order; while another thread does that, it sends these too."""
        while self._queue:
            with self._lock:
                if self._flushing:
                    return
                self._flushing = True
            try:
                while self._queue:
                    self.send(self._queue.popleft())
            finally:
                self._flushing = False

    def after_fork(self) -> None:
        """Forget the events that the parent had queued."""
        self._queue.clear()
        self._flushing = False
        self._lock = threading.Lock()
