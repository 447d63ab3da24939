"""Heartbeats: each process reports to the store which value it serves, so that one that lags is seen.

No evaluation waits for a heartbeat. A change plans one, and a worker thread sends it.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from enum import StrEnum
from functools import partial

from external_oms.cache import Cache, Change
from external_oms.clock import Clock
from external_oms.policy import Evaluation
from external_oms.records import Member
from external_oms.stores.base import Store

__all__ = ["MAX_INTERVAL_SECONDS", "MIN_INTERVAL_SECONDS", "Heartbeat", "MemberStatus", "member_name", "member_status"]

MAX_INTERVAL_SECONDS = 10.0
"""How often a process reports although nothing changed, in seconds: three times within `SILENT_SECONDS`."""

MIN_INTERVAL_SECONDS = 1.0
"""The least time between two reports of a process, in seconds; it limits the writes that frequent changes cause."""

LAG_SECONDS = 1.0 + MIN_INTERVAL_SECONDS
"""How long an older generation counts as current: a second to follow, and one for which the report may be held back."""

SILENT_SECONDS = 30.0
"""After how many seconds without a report a process is marked as silent."""


class MemberStatus(StrEnum):
    """The status of a member process."""

    CURRENT = "current"
    """It serves the value that the store holds."""
    LAGS = "lags"
    """It serves a value of an older generation, for longer than a change takes to reach it."""
    SILENT = "silent"
    """It has not reported for a while: it ended, hangs, or lost the store."""


def member_name() -> str:
    """Return the name of this process: `host:pid`."""
    return f"{socket.gethostname()}:{os.getpid()}"


def member_of(evaluation: Evaluation, *, name: str, now: float) -> Member:
    """Return the report of a process that serves this evaluation.

    Args:
        evaluation: What the process serves.
        name: The name of the process.
        now: The present instant.
    """
    snapshot, served = evaluation.entry.snapshot, evaluation.servable
    return Member(
        name=name,
        tenant=evaluation.tenant,
        generation=snapshot.generation if snapshot else 0,
        enabled=served.enabled if served else None,
        freshness=evaluation.freshness.value,
        age_seconds=max(0.0, now - snapshot.read_at) if snapshot else None,
    )


def member_status(member: Member, *, generation: int, since_seconds: float) -> MemberStatus:
    """Return the status of a member.

    Args:
        member: Its last report.
        generation: The generation of the value that the store holds.
        since_seconds: Seconds since the store holds a value of that generation, >= 0.
    """
    if member.seen_seconds > SILENT_SECONDS:
        return MemberStatus.SILENT
    lags = member.generation < generation and since_seconds > LAG_SECONDS
    return MemberStatus.LAGS if lags else MemberStatus.CURRENT


class Heartbeat:
    """Reports the values that this process serves.

    Args:
        cache: Serves them.
        store: Takes the reports.
        clock: Tells the time.
        random: Returns numbers in [0, 1): members that started together do not report together for ever.
        name: Returns the name of this process, which a fork changes.
    """

    def __init__(
        self,
        *,
        cache: Cache,
        store: Store,
        clock: Clock,
        random: Callable[[], float],
        name: Callable[[], str] = member_name,
    ) -> None:
        self._cache = cache
        self._store = store
        self._clock = clock
        self._random = random
        self._name = name
        self._subscribed = False
        self.restart()

    def start(self) -> None:
        """Report from now on, while the cache works; starts no thread; idempotent."""
        if not self._subscribed:
            self._subscribed = True
            self._cache.changes.subscribe(self._changed)

    def restart(self) -> None:
        """Forget what was planned, in a forked child or after the threads of the cache have ended."""
        self._lock = threading.Lock()
        self._due: float | None = None
        self._last: float | None = None
        self._reported: dict[str, tuple[int, bool | None, str]] = {}

    def _changed(self, change: Change) -> None:
        now = self._clock.monotonic()
        if self._reported.get(change.tenant) != _fingerprint(member_of(change.evaluation, name="", now=now)):
            # the members of a fleet learn of a change at the same moment; their reports must not delay the read
            self._plan(self._earliest(now + self._random() * self._store.spread_seconds))

    def _earliest(self, now: float) -> float:
        if self._last is None:  # a process that lives for a moment reports nothing
            return now + MIN_INTERVAL_SECONDS * (0.5 + self._random() / 2)
        return max(now, self._last + MIN_INTERVAL_SECONDS)

    def _plan(self, when: float) -> None:
        with self._lock:
            if self._due is not None and self._due <= when:
                return
            self._due = when
        self._cache.runner.at("heartbeat", when, partial(self._cache.runner.submit, self._report))

    def _report(self) -> None:
        now, name = self._clock.monotonic(), self._name()
        with self._lock:
            self._due, self._last = None, now
        members = [member_of(self._cache.peek(tenant), name=name, now=now) for tenant in self._cache.tenants]
        self._reported = {member.tenant: _fingerprint(member) for member in members}
        self._store.report(members)
        self._plan(now + MAX_INTERVAL_SECONDS * (1.0 - self._random() / 5))


def _fingerprint(member: Member) -> tuple[int, bool | None, str]:
    """Return the fields whose change is worth a report at once."""
    return member.generation, member.enabled, member.freshness
