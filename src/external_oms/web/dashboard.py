"""The dashboard: the state of every tenant, its history, and the switch. The pages work without JavaScript.

The server renders every word. `?parts=1` returns only the parts that change, which the script swaps into an open page.
No page has an inline script or style, so the content security policy forbids both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from itertools import chain
from typing import Any, Literal, NamedTuple
from urllib.parse import urlencode

from flask import Blueprint, Response, current_app, flash, redirect, render_template, request, url_for
from markupsafe import Markup
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as WerkzeugResponse

from external_oms import __version__
from external_oms.config import FLAG_KEY
from external_oms.errors import ExternalOMSError, ReadError, WriteConflict, WriteError, WriteOutcomeUnknown
from external_oms.policy import State
from external_oms.problems import Problem
from external_oms.records import Cause, Event
from external_oms.web import charts
from external_oms.web import dashboard_context as context
from external_oms.web.access import current_identity, require_role, session_seconds_left
from external_oms.web.api import (
    CSV_TYPE,
    MAX_DIGITS,
    REASON_LENGTH,
    csv_header,
    event_csv,
    event_shape,
    history_filter,
    read_now,
    write_enabled,
)
from external_oms.web.errors import Error, to_problem
from external_oms.web.keys import Role, Via
from external_oms.web.state import current_oms, get_oms

__all__ = ["PANELS", "bp", "error_page"]

PANELS = 8
"""Up to this many tenants are shown with everything; more of them have a line each, and a page of their own."""

ACTIVITY_ROWS = 30
"""Rows of history on one page."""

EXPORT_ROWS = 100_000
"""The most rows of an export."""

_VALUES = {"on": "ON", "off": "OFF", "none": "no value"}
_SHOWN_LATENCIES = (0.05, 0.1, 0.25, 0.5, 1.0, 5.0)

Message = tuple[Literal["good", "warn", "bad"], str]

bp = Blueprint(
    "dashboard",
    __name__,
    template_folder="templates",
    static_folder="static",
    static_url_path="/static/external-oms",
)


# -- filters of the templates ---------------------------------------------------------------------------------------


for _filter in (
    context.event_title,
    context.format_duration,
    context.format_generation,
    context.format_latency,
    context.format_time,
    context.value_word,
):
    bp.add_app_template_filter(_filter)


@bp.app_template_filter()
def ticking(seconds: float | None, step: int) -> str | Markup:
    """Return a duration that the script counts on: up for a step of 1, down for -1."""
    if seconds is None:
        return "—"
    return Markup('<span data-seconds="{:.2f}" data-step="{}">{}</span>').format(
        seconds, step, context.format_duration(seconds)
    )


# -- pages ----------------------------------------------------------------------------------------------------------


@bp.get("/")
@require_role(Role.VIEWER)
def overview() -> WerkzeugResponse:
    """Show every tenant, every process, and the history."""
    oms = get_oms()
    if len(oms.cache.tenants) == 1:
        return _tenant_page(oms.cache.tenants[0], alone=True)
    rows_only = len(oms.cache.tenants) > PANELS
    members: dict[str, list[context.MemberView]] = {name: [] for name in oms.cache.tenants}
    reported = oms.fleet.members()
    for one in reported:
        members[one.member.tenant].append(one)
    days = {} if rows_only else {name: _day(oms.cache.state(name)) for name in oms.cache.tenants}
    views = [_view(name, members[name], days.get(name)) for name in oms.cache.tenants]
    processes = context.processes_of(reported)
    wanted, show = request.args.get("q", "").strip().lower()[:63], request.args.get("show", "")
    named = request.args.get("tenants", "") if rows_only and "parts" in request.args else None
    return _page(
        "overview.html",
        views=sorted(
            (view for view in views if _is_shown(view, wanted, show, named)),
            key=lambda view: ("bad", "warn", "good").index(view.severity),
        ),
        days=days,
        count=len(views),
        processes=processes,
        summary=context.summarize(views, processes, oms.store.health()),
        rows_only=rows_only,
        wanted=wanted,
        show=show,
        page=_activity(None),
    )


def _is_shown(view: context.TenantView, wanted: str, show: str, named: str | None) -> bool:
    if named is not None:  # an open page asks for the rows that changed; their filter does not count
        return view.state.tenant in named.split(",")
    fits = {"attention": view.needs_attention, "on": view.flag == "on", "off": view.flag == "off"}
    return wanted in view.state.tenant and {**fits, "none": view.flag == "none"}.get(show, True)


@bp.get("/tenants/<tenant>")
@require_role(Role.VIEWER)
def tenant(tenant: str) -> WerkzeugResponse:
    """Show everything about one tenant."""
    return _tenant_page(current_oms.cache.tenant_of(tenant), alone=False)


def _tenant_page(name: str, *, alone: bool) -> Response:
    oms = get_oms()
    members = oms.fleet.members(name)
    day = _day(oms.cache.state(name))
    view = _view(name, members, day)
    return _page(
        "tenant.html",
        view=view,
        days={name: day},
        **_counts(name),
        alone=alone,
        only=name,
        summary=context.summarize([view], context.processes_of(members), oms.store.health()),
        page=_activity(name),
    )


def _view(name: str, members: Sequence[context.MemberView], day: Day | None) -> context.TenantView:
    oms = get_oms()
    snapshot = oms.cache.peek(name).entry.snapshot
    return context.TenantView(
        oms.cache.state(name),
        oms.settings,
        members=members,
        host=oms.hosts[name],
        read_end=oms.fleet.last_read(name),
        delivery=None if day is None else day.delivery,
        value_generation=None if snapshot is None else snapshot.generation,
    )


def _page(template: str, *, status: int = 200, **given: object) -> Response:
    identity, oms = current_identity(), get_oms()
    page = render_template(
        f"external_oms/{template}",
        identity=identity,
        may_read=identity is not None and identity.role >= Role.OPERATOR,
        may_switch=identity is not None and identity.role >= Role.ADMIN,
        by_session=identity is not None and identity.via is Via.SESSION,
        insecure=identity is not None and identity.via is Via.INSECURE,
        ends_seconds=session_seconds_left(),
        parts_only="parts" in request.args,
        store_kind=oms.store.kind,
        version=__version__,
        flag_key=FLAG_KEY,
        **given,
    )
    return Response(page, status, content_type="text/html; charset=utf-8")


@bp.app_context_processor
def _common() -> dict[str, Any]:
    """Return what every template knows."""
    settings = get_oms().settings
    return {"settings": settings, "environment_color": context.environment_color(settings), "causes": list(Cause)}


# -- charts ---------------------------------------------------------------------------------------------------------


class Day(NamedTuple):
    """The last 24 hours of a tenant, as segments, picture and totals, and the last delivery."""

    segments: Sequence[charts.Segment]
    svg: Markup
    totals: Sequence[tuple[charts.Kind, float]]
    delivery: Event | None


def _day(state: State) -> Day:
    oms = get_oms()
    now = datetime.fromtimestamp(oms.clock.wall(), UTC)
    day = oms.days.rows(state, now=now)
    segments = charts.timeline(
        day.rows,
        state,
        now=now,
        since=day.since,
        windows=oms.settings.windows,
        when_expired=oms.settings.when_expired,
        lazy=oms.settings.refresh == "lazy",
    )
    svg = charts.timeline_svg(segments, name=state.tenant)
    return Day(segments, svg, charts.totals(segments), day.delivery)


def _counts(tenant: str) -> dict[str, Any]:
    """Return the charts of what is counted for a tenant, and which processes they cover."""
    metrics = current_app.extensions["external_oms_metrics"]
    counts = metrics.counts_of(tenant)
    reads = charts.latency_bars(counts.latencies, counts.failed_reads, shown=_SHOWN_LATENCIES)
    values = [charts.Bar(word, counts.evaluations[kind], kind) for kind, word in _VALUES.items()]
    return {
        "latencies": charts.bar_chart(reads, name="latencies-chart", title="Reads of the config API by latency"),
        "evaluations": charts.bar_chart(values, name="evaluations-chart", title="Evaluations by value"),
        "covered": "All processes of this server" if metrics.is_shared else "This process",
    }


# -- history --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Activity:
    """A page of history, and its filter.

    Attributes:
        events: The rows, newest first.
        older: What `before` is for older rows; None where there are none.
        before: What it was for these.
        cause: The cause that is shown; None for all.
        actor: The text that the actors contain.
    """

    events: Sequence[Event]
    older: int | None
    before: int | None
    cause: Cause | None
    actor: str

    @property
    def cause_name(self) -> str | None:
        """The cause in a query."""
        return None if self.cause is None else self.cause.value

    def query(self, before: int | None = None) -> str:
        """Return the query of a page with the same filter."""
        given = {"cause": self.cause_name, "actor": self.actor or None, "before": before}
        return urlencode({name: value for name, value in given.items() if value is not None})


def _activity(tenant: str | None) -> Activity:
    given = request.args.get("before", "")
    known = given.isascii() and given.isdigit() and len(given) <= MAX_DIGITS
    before = int(given) if known else None
    cause = next((cause for cause in Cause if cause.value == request.args.get("cause")), None)
    actor = request.args.get("actor", "").strip()[:64]
    found = current_oms.operations.search_history(
        tenant=tenant, limit=ACTIVITY_ROWS, before=before, cause=cause, actor=actor
    )
    return Activity(found.events, found.next, before, cause, actor)


@bp.get("/history.csv")
@require_role(Role.VIEWER)
def history_csv() -> Response:
    """Return the history that matches the filter as a CSV file."""
    return _export("csv", CSV_TYPE, chain([csv_header()], map(event_csv, _all_events())))


@bp.get("/history.json")
@require_role(Role.VIEWER)
def history_json() -> Response:
    """Return the history that matches the filter as a JSON array."""
    rows = (f"{'' if number == 0 else ','}\n{json.dumps(event_shape(row))}" for number, row in enumerate(_all_events()))
    return _export("json", "application/json", chain(["["], rows, ["\n]\n"]))


def _all_events() -> Iterator[Event]:
    """Return the rows that match the query; they are read as they are sent, and the first of them before."""
    chosen, operations = history_filter(), get_oms().operations
    first = operations.search_history(limit=500, **chosen)

    def rows() -> Iterator[Event]:
        page, count = first, 0
        while True:
            yield from page.events
            count += len(page.events)
            if page.next is None or count >= EXPORT_ROWS:
                return
            page = operations.search_history(limit=500, before=page.next, **chosen)

    return rows()


def _export(kind: str, content_type: str, body: Iterator[str]) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="external-oms-history.{kind}"'}
    return Response(body, headers=headers, content_type=content_type)


# -- forms ----------------------------------------------------------------------------------------------------------


@bp.post("/tenants/<tenant>/read")
@require_role(Role.OPERATOR)
def read(tenant: str) -> WerkzeugResponse:
    """Have the config API read now."""
    name = current_oms.cache.tenant_of(tenant)
    try:
        state = read_now(name)
    except ReadError as error:
        return _back(name, ("bad", f"The read failed: {error}."))
    return _back(name, ("good", f"Read just now: {name} is {context.value_word(state.enabled)}."))


@bp.get("/tenants/<tenant>/switch")
@require_role(Role.ADMIN)
def confirmation(tenant: str) -> WerkzeugResponse:
    """Ask for confirmation and a reason before a switch."""
    return _ask(current_oms.cache.tenant_of(tenant), to=_value(request.args.get("to")))


@bp.post("/tenants/<tenant>/switch")
@require_role(Role.ADMIN)
def switch(tenant: str) -> WerkzeugResponse:
    """Write the value, and say what came of it."""
    name = current_oms.cache.tenant_of(tenant)
    to, reason = _value(request.form.get("to")), " ".join(request.form.get("reason", "").split())
    problem = _objection(reason, seen=request.form.get("from"), state=current_oms.cache.state(name))
    if to is None or problem:
        return _ask(name, to=to, reason=reason, problem=problem or "Choose a value.")
    try:
        after = write_enabled(name, enabled=to, reason=reason)
    except (WriteError, ReadError) as error:
        return _back(name, _failed(error, to))
    return _back(name, _written(after, to))


def _ask(tenant: str, *, to: bool | None, reason: str = "", problem: str = "") -> WerkzeugResponse:
    view = _view(tenant, [], None)
    if to is None and view.state.enabled is not None:
        to = not view.state.enabled
    return _page(
        "switch.html",
        status=400 if problem else 200,
        view=view,
        to=to,
        reason=reason,
        problem=problem,
        longest=REASON_LENGTH,
    )


def _back(tenant: str, message: Message) -> WerkzeugResponse:
    """Redirect to the tenant's page with a message; a reload then sends nothing again."""
    category, text = message
    flash(text, category)
    return redirect(url_for("dashboard.tenant", tenant=tenant), 303)


def _value(given: str | None) -> bool | None:
    return {"on": True, "off": False}.get(given or "")


def _objection(reason: str, *, seen: str | None, state: State) -> str:
    """Return why a switch is refused; empty where it is not."""
    if not reason:
        return "Give a reason. It is recorded in the activity with your name."
    if len(reason) > REASON_LENGTH or not reason.isprintable():
        return f"The reason must be one line of text, {REASON_LENGTH} characters at most."
    now = context.value_word(state.enabled)
    if seen != now:
        return f"The value is {now} now; it has changed since you opened this page. Nothing was written. Check again."
    return ""


def _written(after: State, to: bool) -> Message:
    wanted, tenant = context.value_word(to), after.tenant
    if after.last_error:
        served = context.TenantView(after, current_oms.settings).word
        return "warn", (
            f"The config API took {wanted} for {tenant}, and reading it back fails: {after.last_error}. "
            f"{served} is served until a read succeeds."
        )
    if after.enabled is to:
        return "good", f"{tenant} is {wanted}: written, and read back at generation {after.generation}."
    return "warn", (
        f"The config API took {wanted} for {tenant} and still answers {context.value_word(after.enabled)}. "
        "It is being read again; this page shows when it follows."
    )


def _failed(error: ExternalOMSError, to: bool) -> Message:
    wanted = context.value_word(to)
    if isinstance(error, WriteOutcomeUnknown):
        return "warn", (
            f"It is not known whether {wanted} was written: {error}. It was read back several times and did not show. "
            "Watch this page before you try again; it shows the value as soon as the config API answers."
        )
    if isinstance(error, WriteConflict):
        return "bad", f"Not switched: the config API refuses {wanted} in its present state (409). {error}."
    if isinstance(error, WriteError):
        return "bad", f"Not switched: the config API refused {wanted}. {error}."
    return "bad", f"Not switched: nothing was written. {error}."


# -- errors ---------------------------------------------------------------------------------------------------------


@bp.errorhandler(HTTPException)
@bp.errorhandler(ExternalOMSError)
@bp.errorhandler(Problem)
def error_page(error: Error) -> WerkzeugResponse:
    """Return an error as a page; a reader without a session is sent to log in."""
    problem = to_problem(error)
    if problem.status == HTTPStatus.UNAUTHORIZED and request.method in {"GET", "HEAD"}:
        wanted = (request.view_args or {}).get("tenant")
        return redirect(url_for("login.login", tenant=wanted), 303)
    page = _page("problem.html", status=problem.status, problem=problem)
    page.headers.update(problem.headers)
    return page
