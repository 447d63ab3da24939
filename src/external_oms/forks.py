"""Objects that forget the state of the parent in a forked child: one hook of the interpreter for all of them."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["call_after_fork"]


class AfterFork(Protocol):
    """An object with state that a forked child must not share: locks, threads, counts."""

    def after_fork(self) -> None:
        """Begin anew; called in the child, before any other code of it runs."""
        ...  # pragma: no cover - a Protocol's body never runs


_objects: weakref.WeakSet[AfterFork] = weakref.WeakSet()


def call_after_fork(one: AfterFork) -> None:
    """Call the `after_fork` of an object in every child that is forked while the object lives."""
    _objects.add(one)


def _in_child() -> None:
    for one in tuple(_objects):
        one.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
