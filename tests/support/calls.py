"""Counts the calls of Python functions of the package, over all threads that start while it watches.

What a poll calls is left out: how many polls there are depends on how long the work takes.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import external_oms

__all__ = ["Calls"]

PACKAGE = external_oms.__file__.removesuffix("__init__.py")
POLL = "Cache._poll"


class Calls:
    """What was called while `counting`.

    Attributes:
        counted: How often each function was called, by module and name.
    """

    def __init__(self) -> None:
        self.counted: Counter[tuple[str, str]] = Counter()
        self._on = False
        self._thread = threading.local()

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        if event not in {"call", "return"} or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        if frame.f_code.co_qualname == POLL:
            self._thread.polls = event == "call"
        if event == "call" and self._on and not getattr(self._thread, "polls", False):
            self.counted[frame.f_code.co_filename.removeprefix(PACKAGE), frame.f_code.co_qualname] += 1

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Watch this thread, and every thread that starts from now on."""
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count, from nothing."""
        self.counted.clear()
        self._on = True
        try:
            yield
        finally:
            self._on = False

    @property
    def total(self) -> int:
        """How many calls there were."""
        return self.counted.total()

    @property
    def modules(self) -> set[str]:
        """The modules whose functions were called."""
        return {module for module, _ in self.counted}

    def __str__(self) -> str:
        by_module: Counter[str] = Counter()
        for (module, _), count in self.counted.items():
            by_module[module] += count
        return f"{self.total} calls in {len(by_module)} modules: " + ", ".join(
            f"{module} {count}" for module, count in by_module.most_common()
        )
