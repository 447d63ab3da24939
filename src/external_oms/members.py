"""Who serves what: each process tells the store, at most once a second, so that one that lags is seen.

Nothing here is on the way of an evaluation: a change or a poll arranges a report, and a reader thread makes it.
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
from external_oms.judgement import Answer
from external_oms.stores.base import Member, Store

__all__ = ["LEAST_SECONDS", "MOST_SECONDS", "Reporter", "Standing", "member_name", "member_of", "standing_of"]

MOST_SECONDS = 10.0
"""How often a process reports though nothing changed: three reports fit into `SILENT_SECONDS`."""

LEAST_SECONDS = 1.0
"""The least time between two reports of a process: a storm of changes is not made into a storm of writes."""

LAG_SECONDS = 1.0 + LEAST_SECONDS
"""How long an older generation is no lag: a second to follow, and one more that the report of it may be held back."""

SILENT_SECONDS = 30.0
"""From when a process that reports no more is marked; the store forgets it after a minute."""


class Standing(StrEnum):
    """How a member stands to the rest."""

    CURRENT = "current"
    """It serves what the store holds."""
    LAGS = "lags"
    """It serves a value of an older generation, for longer than a change takes to reach it."""
    SILENT = "silent"
    """It has not reported for a while: it ended without a word, hangs, or has lost the store."""


def member_name() -> str:
    """What this process is called: `host:pid`."""
    return f"{socket.gethostname()}:{os.getpid()}"


def member_of(answer: Answer, *, name: str, now: float) -> Member:
    """What a process that may give this answer reports.

    Args:
        answer: What it may serve.
        name: What it is called.
        now: The present moment, seconds on the monotonic clock.
    """
    snapshot, served = answer.record.snapshot, answer.servable
    return Member(
        name=name,
        tenant=answer.tenant,
        generation=snapshot.generation if snapshot else 0,
        enabled=served.enabled if served else None,
        freshness=answer.freshness.value,
        age_seconds=max(0.0, now - snapshot.read_at) if snapshot else None,
    )


def standing_of(member: Member, *, generation: int, since_seconds: float) -> Standing:
    """How a member stands.

    Args:
        member: What it reported last.
        generation: The generation of the value that the store holds.
        since_seconds: Seconds since the store holds a value of that generation.
    """
    if member.seen_seconds > SILENT_SECONDS:
        return Standing.SILENT
    lags = member.generation < generation and since_seconds > LAG_SECONDS
    return Standing.LAGS if lags else Standing.CURRENT


class Reporter:
    """Reports what this process serves.

    Args:
        cache: What it serves.
        store: Whom to tell.
        clock: What tells the time.
        random: Gives numbers in [0, 1): members that started together do not report together for ever.
        name: What this process is called; asked at each report, for a fork changes it.
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
        self._listens = False
        self.restart()

    def start(self) -> None:
        """Report from now on, whenever the cache is at work; starts no thread; idempotent."""
        if not self._listens:
            self._listens = True
            self._cache.changes.listen(self._changed)
            self._cache.polls.listen(self._polled)

    def restart(self) -> None:
        """Begin anew, in a forked child or after the cache's threads have ended: what was arranged is gone."""
        self._lock = threading.Lock()
        self._due: float | None = None
        self._last: float | None = None
        self._told: dict[str, tuple[int, bool | None, str]] = {}

    def _changed(self, change: Change) -> None:
        now = self._clock.monotonic()
        if self._told.get(change.tenant) != _essence(member_of(change.answer, name="", now=now)):
            # the whole fleet learns it at once, and the read that is to follow must not queue behind its reports
            spread_seconds = self._random() * self._store.spread_seconds
            self._arrange(self._soonest(now + spread_seconds))

    def _polled(self, _: None) -> None:
        if self._due is None:  # a stale look arranges one report more
            self._arrange(self._soonest(self._clock.monotonic()))

    def _soonest(self, now: float) -> float:
        """When the next report may be made; a process that lives for less than a moment makes none."""
        if self._last is None:
            return now + LEAST_SECONDS * (0.5 + self._random() / 2)
        return max(now, self._last + LEAST_SECONDS)

    def _arrange(self, when: float) -> None:
        with self._lock:
            if self._due is not None and self._due <= when:
                return
            self._due = when
        self._cache.after(max(0.0, when - self._clock.monotonic()), partial(self._fall_due, when))

    def _fall_due(self, when: float) -> None:
        if self._due == when:  # else an earlier one took its place
            self._cache.run(self._report)

    def _report(self) -> None:
        now, name = self._clock.monotonic(), self._name()
        with self._lock:
            self._due, self._last = None, now
        members = [member_of(self._cache.peek(tenant), name=name, now=now) for tenant in self._cache.tenants]
        self._told = {member.tenant: _essence(member) for member in members}
        self._store.report(members)
        self._arrange(self._clock.monotonic() + MOST_SECONDS * (1.0 - self._random() / 5))


def _essence(member: Member) -> tuple[int, bool | None, str]:
    """What of a member is worth a report at once; that time passes is not."""
    return member.generation, member.enabled, member.freshness
