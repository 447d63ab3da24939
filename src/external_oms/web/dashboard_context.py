"""The context of the dashboard's templates: what the pages say about tenants, processes and history rows.

The functions are pure, so a page says the same about the same state wherever it is rendered. `Fleet` and `DayLog` are
the two that ask the store.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Literal

from external_oms.cache import Cache, Change
from external_oms.clock import Clock
from external_oms.entry import Failure, last_token
from external_oms.heartbeat import MemberStatus, member_status
from external_oms.policy import Freshness, Source, State
from external_oms.records import Cause, Event, Member
from external_oms.settings import Settings
from external_oms.singleflight import ReadEnd
from external_oms.stores.base import Health, Store

__all__ = [
    "TIMELINE_CAUSES",
    "DayLog",
    "Fleet",
    "MemberView",
    "ProcessView",
    "Severity",
    "Summary",
    "TenantView",
    "environment_color",
    "event_title",
    "format_duration",
    "format_generation",
    "format_latency",
    "format_time",
    "has_ended",
    "is_unasked",
    "processes_of",
    "summarize",
    "value_word",
]

Severity = Literal["good", "warn", "bad"]

KEEP_SECONDS = 0.5
"""How long the members are kept: fifty pages that are fetched at once ask the store once."""

LONG_GENERATION = 10**9
"""From this number on a generation is shortened."""

GONE_SECONDS = 12.0
"""After how many seconds without a report a process of this host that does not exist counts as gone: it may live in
another container of the same host name, and then it reports every ten seconds."""

_GLANCE = 3
_MINUTE, _HOUR, _DAY_HOURS = 60, 60, 24


# -- words ----------------------------------------------------------------------------------------------------------


def format_duration(seconds: float | None) -> str:
    """Return a duration in its two largest units: `12 s`, `3 min 05 s`, `2 h 14 min`, `3 d 4 h`; a dash for None."""
    if seconds is None:
        return "—"
    whole = max(0, int(seconds))
    if whole < _MINUTE:
        return f"{whole} s"
    minutes, rest = divmod(whole, _MINUTE)
    if minutes < _HOUR:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, _HOUR)
    return f"{hours} h {minutes:02d} min" if hours < _DAY_HOURS else f"{hours // _DAY_HOURS} d {hours % _DAY_HOURS} h"


def format_latency(seconds: float | None) -> str:
    """Return how long something took: `23 ms`, `1.4 s`; empty for None."""
    if seconds is None:
        return ""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def format_time(moment: datetime | None) -> str:
    """Return an instant to the second, in UTC; a dash for None."""
    return "—" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def format_generation(generation: int) -> str:
    """Return a generation; of one with more than nine digits the last six, as in `…000123`.

    A generation in Redis is a time in milliseconds: the last six digits tell the generations of a quarter of an hour
    apart, and thirteen digits do not fit the columns.
    """
    return str(generation) if generation < LONG_GENERATION else f"…{generation % 1_000_000:06d}"


def value_word(enabled: bool | None) -> str:
    """Return a value in words."""
    return "unknown" if enabled is None else "ON" if enabled else "OFF"


def event_title(event: Event) -> str:
    """Return what a history row records, in a few words."""
    value = "" if event.enabled is None else f" {value_word(event.enabled)}"
    return {
        Cause.CHANGED: f"Value{value}",
        Cause.DELIVERY: "Delivery",
        Cause.INVALIDATED: "Invalidated",
        Cause.WRITE: f"Switch{value}",
        Cause.FAILED: "Reads fail",
        Cause.RECOVERED: "Reads work again",
        Cause.STORE: "Store",
    }[event.cause]


def environment_color(settings: Settings) -> str:
    """Return the colour of the environment's name: the setting's, else one by its first word."""
    if settings.environment_color is not None:
        return settings.environment_color
    word = (settings.environment or "").lower()
    if re.match(r"prod|live", word):
        return "red"
    return "amber" if re.match(r"stag|test|qa|uat|pre", word) else "blue"


# -- a tenant -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TenantView:
    """A tenant as a page shows it.

    Attributes:
        state: Its state.
        settings: The settings.
        members: The processes that serve it.
        host: The host of its config API.
        read_end: Its last read, where this process made it.
        delivery: The last delivery of the day.
        value_generation: The generation of its value: lower than that of the tenant while no read has followed an
            invalidation.
    """

    state: State
    settings: Settings
    members: Sequence[MemberView] = ()
    host: str = ""
    read_end: ReadEnd | None = None
    delivery: Event | None = None
    value_generation: int | None = None

    @property
    def flag(self) -> Literal["on", "off", "none"]:
        """What evaluations get; `none` where each caller's own default holds."""
        policy = self.settings.when_expired
        if self._is_expired and policy in {"on", "off"}:
            return "on" if policy == "on" else "off"
        if self.state.enabled is None or (self._is_expired and policy == "default"):
            return "none"
        return "on" if self.state.enabled else "off"

    @property
    def word(self) -> str:
        """The same in words."""
        return "NO VALUE" if self.flag == "none" else self.flag.upper()

    @property
    def meaning(self) -> str:
        """What that means for the orders."""
        owner = {
            "on": "The external OMS owns the orders",
            "off": "The tenant's own order management owns the orders",
            "none": "Each caller's own default decides",
        }[self.flag]
        if self._is_expired:
            enabled = self.state.enabled
            last = "No value was ever read" if enabled is None else f"The last known value was {value_word(enabled)}"
            return f"{owner}, by when_expired = {self.settings.when_expired}. {last}."
        if self.state.freshness is Freshness.EXPIRED:
            return (
                f"{owner}, as far as is known. No evaluation has come for a while; the next evaluation reads it first."
            )
        return f"{owner}."

    @property
    def severity(self) -> Severity:
        """Whether somebody must act."""
        if self._is_expired:
            return "bad"
        return "warn" if self.state.failures or self.state.last_error else "good"

    @property
    def needs_attention(self) -> bool:
        """Whether somebody must act, or a process lags."""
        return self.severity != "good" or any(member.status == "behind" for member in self.members)

    @property
    def status(self) -> tuple[str, float | None, int]:
        """How fresh the value is, in words that end with a duration in seconds, which rises (1) or falls (-1)."""
        state, fresh = self.state, self.state.fresh_seconds
        if fresh is None:
            return ("No value: every read so far has failed" if state.failures else "No value yet"), None, 0
        if state.freshness is Freshness.FRESH:
            settles = self.life_seconds < self.settings.ttl_seconds - 1 and not state.failures
            return "Fresh, settling after an invalidation; read again in" if settles else "Fresh for another", fresh, -1
        if state.freshness is Freshness.EXPIRED:
            return "Expired: too old to serve, not fresh for", -fresh, 1
        if not state.failures:
            return "Stale, a read is due; not fresh for", -fresh, 1
        left = self.settings.windows.hard_limit_seconds - self.settings.ttl_seconds + fresh
        return "Stale while reads fail; served for another", left, -1

    @property
    def life_seconds(self) -> float:
        """The whole freshness lifetime of the value; 0 without one."""
        return max(0.0, (self.state.age_seconds or 0.0) + (self.state.fresh_seconds or 0.0))

    @property
    def last_read(self) -> str:
        """How the last read went."""
        if self.read_end is not None:
            took = format_latency(self.read_end.latency_seconds)
            return f"{'failed after' if isinstance(self.read_end.outcome, Failure) else 'succeeded in'} {took}"
        if self.state.failures:
            return "failed, in another process"
        return "—" if self.state.age_seconds is None else "succeeded, in another process"

    @property
    def source(self) -> str:
        """Who read the value."""
        names = {Source.MEMORY: "this process", Source.STORE: "another process", Source.API: "the API"}
        return "—" if self.state.enabled is None else names[self.state.source]

    @property
    def agreement(self) -> str:
        """How many processes serve the value."""
        return agreement([member.status for member in self.members])

    @property
    def _is_expired(self) -> bool:
        lazy = self.settings.refresh == "lazy"
        return self.state.freshness is Freshness.EXPIRED and not is_unasked(self.state, lazy=lazy)


def is_unasked(state: State, *, lazy: bool) -> bool:
    """Return whether a value is expired only because no evaluation asked for it: the next one reads it first."""
    return lazy and not state.failures and state.freshness is Freshness.EXPIRED and state.enabled is not None


# -- processes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemberView:
    """What a process reported for one tenant.

    Attributes:
        member: Its last report.
        status: `current`, `following` (it has a moment to follow a change), `behind`, `silent`, or `gone` (the
            process has ended).
    """

    member: Member
    status: Literal["current", "following", "behind", "silent", "gone"]


def agreement(statuses: Sequence[str]) -> str:
    """Return how many of the living processes serve the value that the store holds; empty where there is one."""
    living = [status for status in statuses if status != "gone"]
    current = living.count("current")
    if current == len(living):
        return f"all {current} processes agree" if current > 1 else ""
    return f"{current} of {len(living)} processes follow so far"


def has_ended(name: str, exists: Callable[[int], bool], *, host: str, seen_seconds: float) -> bool:
    """Return whether the process `host:pid` has ended, as far as this host can tell."""
    where, _, pid = name.rpartition(":")
    known = where == host and pid.isascii() and pid.isdigit() and len(pid) < 10  # noqa: PLR2004 - digits of a PID
    return known and seen_seconds > GONE_SECONDS and not exists(int(pid))


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


class Fleet:
    """The processes that share the store, as this process sees them.

    Args:
        cache: The cache of this process.
        store: Where members report.
        clock: Tells the time.
    """

    def __init__(self, cache: Cache, store: Store, clock: Clock) -> None:
        self._cache = cache
        self._tenants = frozenset(cache.tenants)
        self._store = store
        self._clock = clock
        self._since: dict[str, tuple[int, float]] = {}
        self._reads: dict[str, ReadEnd] = {}
        self._kept: dict[str | None, tuple[float, Sequence[Member]]] = {}
        cache.changes.subscribe(self._changed)
        cache.reads.subscribe(self._read_ended)

    def last_read(self, tenant: str) -> ReadEnd | None:
        """Return the last read of the tenant if this process made it."""
        end, entry = self._reads.get(tenant), self._cache.peek(tenant).entry
        return end if end is not None and end.outcome.token == last_token(entry) else None

    def members(self, tenant: str | None = None) -> list[MemberView]:
        """Return what each process reported, for one tenant or for all, in the order of their names."""
        now = self._clock.monotonic()
        kept = self._kept.get(tenant)
        if kept is None or now - kept[0] >= KEEP_SECONDS:
            kept = self._kept[tenant] = (now, self._store.members(tenant))
        found = sorted(kept[1], key=lambda member: (member.name, member.tenant))
        return [self._view(member, now) for member in found if member.tenant in self._tenants]

    def _view(self, member: Member, now: float) -> MemberView:
        snapshot = self._cache.peek(member.tenant).entry.snapshot
        held = snapshot.generation if snapshot else 0
        generation, since = self._since.get(member.tenant, (held, now))
        status = member_status(member, generation=max(held, generation), since_seconds=now - since)
        if has_ended(member.name, _exists, host=socket.gethostname(), seen_seconds=member.seen_seconds):
            return MemberView(member, "gone")
        if status is MemberStatus.CURRENT:
            return MemberView(member, "current" if member.generation >= held else "following")
        return MemberView(member, "behind" if status is MemberStatus.LAGS else "silent")

    def _changed(self, change: Change) -> None:
        snapshot = change.evaluation.entry.snapshot
        if snapshot is not None and snapshot.generation > self._since.get(change.tenant, (-1, 0.0))[0]:
            self._since[change.tenant] = (snapshot.generation, self._clock.monotonic())

    def _read_ended(self, end: ReadEnd) -> None:
        self._reads[end.tenant] = end


@dataclass(frozen=True, slots=True)
class ProcessView:
    """A process over all its tenants.

    Attributes:
        name: `host:pid`.
        tenants: How many tenants it serves.
        behind: Those of them of which it serves an older value, for longer than a change takes to reach it.
        status: The worst of its statuses.
        seen_seconds: Seconds since its last report.
    """

    name: str
    tenants: int
    behind: Sequence[str]
    status: str
    seen_seconds: float


_WORST_FIRST = ("gone", "silent", "behind", "following", "current")


def processes_of(members: Iterable[MemberView]) -> list[ProcessView]:
    """Return every process over all its tenants, in the order given."""
    views = []
    for name, rows in groupby(members, key=lambda one: one.member.name):
        own = list(rows)
        status = min((one.status for one in own), key=_WORST_FIRST.index)
        behind = [one.member.tenant for one in own if one.status == "behind"]
        views.append(ProcessView(name, len(own), behind, status, min(one.member.seen_seconds for one in own)))
    return views


# -- the summary ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything in one line.

    Attributes:
        on: Tenants whose evaluations get on.
        off: Tenants whose evaluations get off.
        none: Tenants whose evaluations get no value.
        needing: The names of those that need attention.
        severity: The worst of them, the store included.
        text: The sentence.
    """

    on: int
    off: int
    none: int
    needing: Sequence[str]
    severity: Severity
    text: str


def summarize(views: Sequence[TenantView], processes: Sequence[ProcessView], health: Health) -> Summary:
    """Return the line on top: what needs attention, then what is served and how many processes follow."""
    named = {
        severity: [view.state.tenant for view in views if view.severity == severity] for severity in ("bad", "warn")
    }
    behind = [process.name for process in processes if process.status == "behind"]
    silent = [process.name for process in processes if process.status == "silent"]
    troubles = [
        f"no value may be served for {_names(named['bad'], 'tenants')}" if named["bad"] else "",
        f"reads fail for {_names(named['warn'], 'tenants')}, and the last value is served" if named["warn"] else "",
        f"an older value is served by {_names(behind, 'processes')}" if behind else "",
        f"no report from {_names(silent, 'processes')} for more than 30 s" if silent else "",
        "" if health.ok else health.problem,
    ]
    trouble = "; ".join(part for part in troubles if part)
    severity: Severity = "bad" if named["bad"] else "warn" if trouble else "good"
    agreed = agreement([process.status for process in processes])
    text = f"{trouble[:1].upper()}{trouble[1:]}" or ", and ".join(part for part in (_served(views), agreed) if part)
    gone = [process.name for process in processes if process.status == "gone"]
    ended = f" Ended: {_names(gone, 'processes')}." if gone else ""
    return Summary(
        on=sum(view.flag == "on" for view in views),
        off=sum(view.flag == "off" for view in views),
        none=sum(view.flag == "none" for view in views),
        needing=[view.state.tenant for view in views if view.needs_attention],
        severity=severity,
        text=f"{text}.{ended}",
    )


def _served(views: Sequence[TenantView]) -> str:
    if len(views) == 1:
        return f"{views[0].state.tenant} is {views[0].word}"
    return "Both tenants are served" if len(views) == 2 else f"All {len(views):,} tenants are served"  # noqa: PLR2004


def _names(names: Sequence[str], what: str) -> str:
    """Return the names, where they are few enough to be read at a glance."""
    if len(names) > _GLANCE:
        return f"{len(names):,} {what}"
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


# -- the last day ---------------------------------------------------------------------------------------------------

DAY_SECONDS = 86_400.0

TIMELINE_CAUSES = frozenset({Cause.CHANGED, Cause.FAILED, Cause.RECOVERED})
"""The history rows that a timeline is computed from."""

_PAGE_ROWS = 500
_PAGES = 10

_Key = tuple[bool | None, int, datetime | None, datetime | None]


@dataclass(frozen=True, slots=True)
class DayRows:
    """The history rows of one tenant's last day.

    Attributes:
        rows: The rows that a timeline needs, newest first.
        since: From when on they are complete.
        delivery: The last delivery.
        newest: The newest row of any cause.
    """

    rows: Sequence[Event]
    since: datetime
    delivery: Event | None
    newest: Event | None = None


class DayLog:
    """The history rows of the last day, by tenant; after a change of the tenant's state, the newer ones are read.

    Args:
        history: Returns rows of history, newest first, as `Operations.history`.
    """

    def __init__(self, history: Callable[..., Sequence[Event]]) -> None:
        self._history = history
        self._kept: dict[str, tuple[_Key, DayRows]] = {}

    def rows(self, state: State, *, now: datetime) -> DayRows:
        """Return the rows of the tenant. A row that matters comes with a change of the key."""
        key = (state.enabled, state.generation, state.fetched_at, state.failing_since)
        kept = self._kept.get(state.tenant)
        if kept is None or kept[0] != key:
            start = now - timedelta(seconds=DAY_SECONDS)
            kept = self._kept[state.tenant] = (key, self._read(state, start, kept and kept[1]))
        return kept[1]

    def _read(self, state: State, start: datetime, known: DayRows | None) -> DayRows:
        rows: list[Event] = []
        newest: Event | None = None
        delivery: Event | None = None
        before: int | None = None
        since = state.failing_since if state.enabled is None else state.fetched_at
        for _ in range(_PAGES):
            page = self._history(tenant=state.tenant, limit=_PAGE_ROWS, before=before)
            newest = newest or next(iter(page), None)
            for row in page:
                if known is not None and row == known.newest:
                    return DayRows([*rows, *known.rows], known.since, delivery or known.delivery, newest)
                if row.cause in TIMELINE_CAUSES and row.at > start:
                    rows.append(row)
                if row.cause is Cause.DELIVERY:
                    delivery = delivery or row
            if page and page[-1].at <= start:
                return DayRows(rows, start, delivery, newest)
            if page:
                since, before = page[-1].at, page[-1].id
            if len(page) < _PAGE_ROWS:
                break
        return DayRows(rows, since or datetime.max.replace(tzinfo=UTC), delivery, newest)
