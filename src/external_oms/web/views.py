"""What the templates are given: values ready to be written down, so that a template decides nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from external_oms.entry import Failure
from external_oms.heartbeat import MemberStatus
from external_oms.policy import State
from external_oms.records import Cause, Event
from external_oms.settings import Settings
from external_oms.stores.base import Health
from external_oms.web.fleet import Fleet, Shown
from external_oms.web.words import Flag, flag_of, freshness_words, latency, meaning, tone_of, word_of

__all__ = ["MemberView", "Summary", "TenantView", "last_delivery", "members_view", "summarised", "tenant_view"]

_GLANCE = 3


@dataclass(frozen=True, slots=True)
class TenantView:
    """A tenant on the page.

    Attributes:
        state: Its state.
        flag: What evaluations get.
        word: The same as it is written: ON, OFF, or NO VALUE.
        meaning: What that means for the orders.
        freshness: What the value is worth, in words.
        tone: How much it needs somebody.
        life_seconds: The whole lifetime of the value, for the bar; 0 without one.
        last_read: When the last read was, how long it took and how it ended, in words.
        delivery: The last delivery among the rows of history at hand, or None.
        members: Who serves what.
        lagging: How many of them lag or are silent.
        opposite: What a switch would write; None where the present value is not known.
    """

    state: State
    flag: Flag
    word: str
    meaning: str
    freshness: str
    tone: Literal["good", "warn", "bad"]
    life_seconds: float
    last_read: str
    delivery: Event | None
    members: Sequence[Shown]
    lagging: int
    opposite: bool | None

    @property
    def needs_somebody(self) -> bool:
        """Whether it is more than good, or a member lags."""
        return self.tone != "good" or self.lagging > 0


@dataclass(frozen=True, slots=True)
class MemberView:
    """A process over all its tenants.

    Attributes:
        name: `host:pid`.
        tenants: How many tenants it serves.
        behind: Those of them of which it serves an older value.
        silent: Whether it reports no more.
        seen_seconds: Seconds since its last report.
    """

    name: str
    tenants: int
    behind: Sequence[str]
    silent: bool
    seen_seconds: float


@dataclass(frozen=True, slots=True)
class Summary:
    """The whole in one line.

    Attributes:
        on: Tenants whose evaluations get on.
        off: And off.
        none: And no value.
        needy: The names of those that need somebody.
        tone: The worst of them, the store included.
        text: The sentence.
    """

    on: int
    off: int
    none: int
    needy: Sequence[str]
    tone: Literal["good", "warn", "bad"]
    text: str


def tenant_view(
    state: State,
    settings: Settings,
    fleet: Fleet | None,
    *,
    members: Sequence[Shown] = (),
    events: Sequence[Event] = (),
) -> TenantView:
    """The view of a tenant.

    Args:
        state: Its state.
        settings: The settings.
        fleet: Where the last read is known; None where it is not shown.
        members: Who serves it.
        events: Rows of history, newest first, in which its last delivery is looked for.
    """
    flag = flag_of(state, settings)
    return TenantView(
        state=state,
        flag=flag,
        word="NO VALUE" if flag == "none" else flag.upper(),
        meaning=meaning(state, settings),
        freshness=freshness_words(state, settings),
        tone=tone_of(state, settings),
        life_seconds=max(0.0, (state.age_seconds or 0.0) + (state.fresh_seconds or 0.0)),
        last_read="" if fleet is None else _last_read(state, fleet),
        delivery=last_delivery(state.tenant, events),
        members=members,
        lagging=sum(shown.status is not MemberStatus.CURRENT for shown in members),
        opposite=None if state.enabled is None else not state.enabled,
    )


def _last_read(state: State, fleet: Fleet) -> str:
    end = fleet.last_read(state.tenant)
    if end is not None:
        took = latency(end.latency_seconds)
        return f"failed after {took}" if isinstance(end.outcome, Failure) else f"answered in {took}"
    if state.failures:
        return "failed, in another process"
    return "—" if state.age_seconds is None else "answered, in another process"


def last_delivery(tenant: str, events: Iterable[Event]) -> Event | None:
    """The newest delivery of the tenant among these rows, which come newest first."""
    return next((event for event in events if event.tenant == tenant and event.cause is Cause.DELIVERY), None)


def members_view(shown: Sequence[Shown]) -> list[MemberView]:
    """Every process over all its tenants, in the order given."""
    views = []
    for name, rows in groupby(shown, key=lambda one: one.member.name):
        own = list(rows)
        behind = [one.member.tenant for one in own if one.status is MemberStatus.LAGS]
        silent = any(one.status is MemberStatus.SILENT for one in own)
        views.append(MemberView(name, len(own), behind, silent, min(one.member.seen_seconds for one in own)))
    return views


def summarised(views: Sequence[TenantView], members: Sequence[MemberView], health: Health) -> Summary:
    """The line on top: what needs somebody first, else that nothing does."""
    needy = [view.state.tenant for view in views if view.needs_somebody]
    count = {flag: sum(view.flag == flag for view in views) for flag in ("on", "off", "none")}
    expired = [view.state.tenant for view in views if view.tone == "bad"]
    failing = [view.state.tenant for view in views if view.tone == "warn"]
    behind = [member.name for member in members if member.behind]
    silent = [member.name for member in members if member.silent]
    parts = [
        f"no value may be served for {_named(expired, 'tenants')}" if expired else "",
        f"reads fail for {_named(failing, 'tenants')}, the last value serves" if failing else "",
        f"lagging behind: {_named(behind, 'processes')}" if behind else "",
        f"no report from {_named(silent, 'processes')}" if silent else "",
        "" if health.ok else health.problem,
    ]
    trouble = "; ".join(part for part in parts if part)
    if trouble:
        tone: Literal["good", "warn", "bad"] = "bad" if expired else "warn"
        return Summary(count["on"], count["off"], count["none"], needy, tone, trouble[0].upper() + trouble[1:] + ".")
    one = views[0] if len(views) == 1 else None
    served = "Both tenants are" if len(views) == 2 else f"All {len(views):,} tenants are"  # noqa: PLR2004 - both
    text = f"{one.state.tenant} is {word_of(one.state.enabled)}" if one else f"{served} served"
    agreed = ", and every process agrees" if len(members) > 1 else ""
    return Summary(count["on"], count["off"], count["none"], needy, "good", f"{text}{agreed}.")


def _named(names: Sequence[str], what: str) -> str:
    """The names, where they are few enough to be read at a glance."""
    if len(names) > _GLANCE:
        return f"{len(names):,} {what}"
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
