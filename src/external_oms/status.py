"""How a tenant stands, and all together, as a state that changes at edges; and the one line for each edge."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import StrEnum

from external_oms.judgement import Answer

__all__ = ["Edge", "Standing", "Standings", "overall", "standing_of"]


class Standing(StrEnum):
    """How a tenant stands."""

    READY = "ready"
    """The last read succeeded."""
    STALE = "stale"
    """The last read failed, and an old value serves."""
    ERROR = "error"
    """The last read failed, and nothing serves."""


@dataclass(frozen=True, slots=True)
class Edge:
    """A change of standing.

    Attributes:
        tenant: Whose.
        before: How it stood; None where nothing was known.
        after: How it stands.
        failures: How many failed reads in a row this edge stands for.
        reason: Why reads fail, in words; empty where they do not.
    """

    tenant: str
    before: Standing | None
    after: Standing
    failures: int
    reason: str

    @property
    def line(self) -> str:
        """The edge as one line of log."""
        tenant, count = self.tenant, f"{self.failures} failed read{'' if self.failures == 1 else 's'}"
        if self.after is Standing.STALE:
            return f"tenant {tenant}: reads fail, an old value serves: {self.reason}"
        if self.after is Standing.ERROR:
            return f"tenant {tenant}: reads fail ({count}), no value may be served: {self.reason}"
        return f"tenant {tenant}: reads work again after {count}"


def standing_of(answer: Answer) -> Standing | None:
    """How a tenant stands by an answer; None where nothing is known yet."""
    if answer.record.failure is not None:
        return Standing.ERROR if answer.servable is None else Standing.STALE
    return None if answer.record.snapshot is None else Standing.READY


def overall(standings: list[Standing]) -> Standing | None:
    """How a provider of several tenants stands: ERROR where none of those known serves, STALE where one has trouble.

    One dead tenant does not make the others look dead.
    """
    if not standings:
        return None
    if all(standing is Standing.ERROR for standing in standings):
        return Standing.ERROR
    return Standing.READY if all(standing is Standing.READY for standing in standings) else Standing.STALE


class Standings:
    """The standings of all tenants of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[Standing, int]] = {}

    def observe(self, answer: Answer) -> Edge | None:
        """Take note of an answer; returns the edge where the tenant's standing changed. The first READY is none."""
        after = standing_of(answer)
        failure = answer.record.failure
        if after is None:
            return None
        with self._lock:
            before, failures = self._known.get(answer.tenant, (None, 0))
            count = failure.count if failure is not None else failures
            self._known[answer.tenant] = after, count if failure is not None else 0
        if before is after or (before is None and after is Standing.READY):
            return None
        return Edge(answer.tenant, before, after, count, failure.message if failure is not None else "")

    def overall(self) -> Standing | None:
        """How all tenants together stand; None where nothing is known yet."""
        with self._lock:
            return overall([standing for standing, _ in self._known.values()])

    def after_fork(self) -> None:
        """A lock that nobody holds."""
        self._lock = threading.Lock()
