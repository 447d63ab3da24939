"""The status of each tenant and of the provider, and its transitions: one log line for each."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from external_oms.policy import Evaluation

__all__ = ["StatusTracker", "TenantStatus", "Transition", "aggregate", "status_of"]


class TenantStatus(StrEnum):
    """The status of a tenant."""

    READY = "ready"
    """The last read succeeded."""
    STALE = "stale"
    """The last read failed, and the last value is served."""
    ERROR = "error"
    """The last read failed, and no value may be served."""


@dataclass(frozen=True, slots=True)
class Transition:
    """A change of status.

    Attributes:
        tenant: The tenant.
        before: The status before; None where none was known.
        after: The status now.
        failures: How many failed reads in a row the transition stands for.
        reason: Why reads fail; empty where they do not.
    """

    tenant: str
    before: TenantStatus | None
    after: TenantStatus
    failures: int
    reason: str

    @property
    def line(self) -> str:
        """The transition as one log line."""
        count = f"{self.failures} failed read{'' if self.failures == 1 else 's'}"
        if self.after is TenantStatus.STALE:
            return f"tenant {self.tenant}: config API reads are failing; serving the last value: {self.reason}"
        if self.after is TenantStatus.ERROR:
            return f"tenant {self.tenant}: config API reads are failing ({count}); nothing may be served: {self.reason}"
        return f"tenant {self.tenant}: config API reads succeed again after {count}"


def status_of(evaluation: Evaluation) -> TenantStatus | None:
    """Return the status of a tenant; None where nothing is known yet."""
    if evaluation.entry.failure is not None:
        return TenantStatus.ERROR if evaluation.servable is None else TenantStatus.STALE
    return None if evaluation.entry.snapshot is None else TenantStatus.READY


def aggregate(statuses: Collection[TenantStatus]) -> TenantStatus | None:
    """Return the status of a provider from those of its tenants; None where nothing is known yet.

    It is ERROR where every known tenant is, and STALE where one of them is not READY: one tenant that fails does not
    make the others look failed.
    """
    if not statuses:
        return None
    if all(status is TenantStatus.ERROR for status in statuses):
        return TenantStatus.ERROR
    return TenantStatus.READY if all(status is TenantStatus.READY for status in statuses) else TenantStatus.STALE


class StatusTracker:
    """The statuses of the tenants of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[TenantStatus, int]] = {}

    def observe(self, evaluation: Evaluation) -> Transition | None:
        """Record an evaluation; return the transition where the status changed. The first READY is none."""
        after = status_of(evaluation)
        failure = evaluation.entry.failure
        if after is None:
            return None
        with self._lock:
            before, failures = self._known.get(evaluation.tenant, (None, 0))
            count = failure.count if failure is not None else failures
            self._known[evaluation.tenant] = after, count if failure is not None else 0
        if before is after or (before is None and after is TenantStatus.READY):
            return None
        return Transition(evaluation.tenant, before, after, count, failure.message if failure is not None else "")

    def aggregate(self) -> TenantStatus | None:
        """Return the status of all tenants together; None where nothing is known yet."""
        with self._lock:
            return aggregate([status for status, _ in self._known.values()])

    def after_fork(self) -> None:
        """Make a new lock in a forked child."""
        self._lock = threading.Lock()
