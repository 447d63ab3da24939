"""No process is forked while a connection to the database is open.

SQLite counts a process's locks in the process itself. A child that inherits an open connection inherits the count but
not the locks: connections that it opens later believe themselves safe and hold nothing, and whoever closes last
removes the log under them. (Measured: such a child has no line in `/proc/locks`.) Keeping the inherited connection
unused does not help; it must be closed before the fork. Source: sqlite.org/howtocorrupt.html §2.7.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Gate", "Gated", "keep_from_forks"]

WAIT_SECONDS = 2.0
"""How long a fork waits for what is under way: several times what one transaction may last."""


class Gate:
    """Counts the operations under way, and holds new ones back while it is shut."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # re-entrant: a signal handler may fork
        self._inside = 0
        self._shut = 0

    @contextmanager
    def passed(self) -> Iterator[None]:
        """Be inside; waits while the gate is shut. Not to be entered twice by one thread."""
        with self._changed:
            self._changed.wait_for(lambda: not self._shut)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def shut(self) -> bool:
        """Hold everybody back; returns whether all who were inside came out in time. Balanced by `open`."""
        with self._changed:
            self._shut += 1
            return self._changed.wait_for(lambda: not self._inside, WAIT_SECONDS)

    def open(self) -> None:
        """Let everybody in again."""
        with self._changed:
            self._shut -= 1
            self._changed.notify_all()


class Gated(Protocol):
    """What has connections."""

    def before_fork(self) -> None:
        """Close them, and open none until told."""
        ...

    def after_fork_in_parent(self) -> None:
        """Open them again, when they are needed."""
        ...

    def after_fork(self) -> None:
        """Begin anew in the child."""
        ...


_kept: weakref.WeakSet[Gated] = weakref.WeakSet()
_forking = threading.local()


def keep_from_forks(gated: Gated) -> None:
    """Have it close what it has before each fork that Python makes, as long as it lives."""
    _kept.add(gated)


def _before_fork() -> None:
    _forking.held = list(_kept)  # what comes to be meanwhile was not held, and is not let go
    for gated in _forking.held:
        gated.before_fork()


def _after_fork_in_parent() -> None:
    for gated in _forking.held:
        gated.after_fork_in_parent()
    del _forking.held


def _after_fork_in_child() -> None:
    for gated in list(_kept):
        gated.after_fork()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
