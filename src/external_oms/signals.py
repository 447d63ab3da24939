"""Whom to tell: listeners that come and go, called one after the other with no lock held."""

from __future__ import annotations

import itertools
import logging
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
