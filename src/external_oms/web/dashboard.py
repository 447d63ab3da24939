"""The page: see every tenant, and switch one with a reason. It reads without JavaScript, and what is shown is escaped.

No script or style stands in a page, so the content security policy allows none: what a name or an error might smuggle
in cannot run. Source: W3C Content Security Policy Level 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal

from flask import Blueprint, Response, flash, redirect, render_template, request, url_for
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as WerkzeugResponse

from external_oms.errors import ExternalOMSError, ReadError, WriteConflict, WriteError, WriteOutcomeUnknown
from external_oms.policy import State
from external_oms.problems import Problem
from external_oms.records import Event
from external_oms.web import words
from external_oms.web.access import current_identity, require_role, session_seconds_left
from external_oms.web.api import REASON_LENGTH, read_now, write_enabled
from external_oms.web.errors import Error, to_problem
from external_oms.web.fleet import Shown
from external_oms.web.keys import Role, Via
from external_oms.web.state import current_oms
from external_oms.web.views import TenantView, members_view, summarised, tenant_view

__all__ = ["PANELS", "bp", "error_page"]

PANELS = 8
"""Up to so many tenants each has its panel with everything; beyond, a line each, and a page of its own."""

TIMELINE_ROWS = 30
"""Rows of history on one page: as much as one looks through; older ones are a link away."""

_LOOKED_THROUGH = 300
_FIRST_ROW = 10**18

Note = tuple[Literal["good", "warn", "bad"], str]

bp = Blueprint(
    "dashboard",
    __name__,
    template_folder="templates",
    static_folder="static",
    static_url_path="/static/external-oms",
)


# -- reading  ----------------------------------------------------------------------------------------------------------


@bp.get("/")
@require_role(Role.VIEWER)
def overview() -> WerkzeugResponse:
    """Every tenant, every process, and what happened."""
    tenants = current_oms.cache.tenants
    if len(tenants) == 1:
        return _one(tenants[0], alone=True)
    before = _before()
    events = current_oms.operations.history(
        limit=_LOOKED_THROUGH if before is None else TIMELINE_ROWS + 1, before=before
    )
    shown = current_oms.fleet.members()
    by_tenant: dict[str, list[Shown]] = {name: [] for name in tenants}
    for one in shown:
        by_tenant[one.member.tenant].append(one)
    states = [current_oms.cache.state(name) for name in tenants]
    views = [
        tenant_view(state, current_oms.settings, current_oms.fleet, members=by_tenant[state.tenant], events=events)
        for state in states
    ]
    members = members_view(shown)
    return _page(
        "overview.html",
        views=views,
        members=members,
        summary=summarised(views, members, current_oms.store.health()),
        panels=len(views) <= PANELS,
        parts_only="parts" in request.args,
        wanted=request.args.get("q", "").strip().lower()[:63],
        show=request.args.get("show", ""),
        timeline=_timeline(events),
    )


@bp.get("/tenants/<tenant>")
@require_role(Role.VIEWER)
def tenant(tenant: str) -> WerkzeugResponse:
    """Everything about one."""
    return _one(current_oms.cache.tenant_of(tenant), alone=False)


def _one(tenant: str, *, alone: bool) -> Response:
    before = _before()
    events = current_oms.operations.history(tenant=tenant, limit=_LOOKED_THROUGH, before=before)
    view = _view(tenant, events)
    members = members_view(view.members)
    return _page(
        "tenant.html",
        view=view,
        alone=alone,
        summary=summarised([view], members, current_oms.store.health()),
        timeline=_timeline(events),
    )


def _view(tenant: str, events: Sequence[Event] = ()) -> TenantView:
    state = current_oms.cache.state(tenant)
    members = current_oms.fleet.members(tenant)
    return tenant_view(state, current_oms.settings, current_oms.fleet, members=members, events=events)


def _page(template: str, *, status: int = 200, **given: object) -> Response:
    identity = current_identity()
    page = render_template(
        f"external_oms/{template}",
        who=identity,
        may_read=identity is not None and identity.role >= Role.OPERATOR,
        may_switch=identity is not None and identity.role >= Role.ADMIN,
        by_session=identity is not None and identity.via is Via.SESSION,
        insecure=identity is not None and identity.via is Via.INSECURE,
        seconds_left=session_seconds_left(),
        settings=current_oms.settings,
        store=current_oms.store.kind,
        words=words,
        **given,
    )
    return Response(page, status, content_type="text/html; charset=utf-8")


# -- doing -------------------------------------------------------------------------------------------------------------


@bp.post("/tenants/<tenant>/read")
@require_role(Role.OPERATOR)
def read(tenant: str) -> WerkzeugResponse:
    """Have the API read now."""
    name = current_oms.cache.tenant_of(tenant)
    try:
        state = read_now(name)
    except ReadError as error:
        return _told(name, ("bad", f"The read failed: {error}."))
    return _told(name, ("good", f"Read just now: {name} is {words.word_of(state.enabled)}."))


@bp.get("/tenants/<tenant>/switch")
@require_role(Role.ADMIN)
def confirmation(tenant: str) -> WerkzeugResponse:
    """Ask before a switch: whose flag, from what to what, and why."""
    return _ask(current_oms.cache.tenant_of(tenant), to=_value(request.args.get("to")))


@bp.post("/tenants/<tenant>/switch")
@require_role(Role.ADMIN)
def switch(tenant: str) -> WerkzeugResponse:
    """Write the value, and say what came of it."""
    name = current_oms.cache.tenant_of(tenant)
    to, reason = _value(request.form.get("to")), " ".join(request.form.get("reason", "").split())
    state = current_oms.cache.state(name)
    problem = _objection(reason, seen=request.form.get("from"), state=state)
    if to is None or problem:
        return _ask(name, to=to, reason=reason, problem=problem or "Choose what to switch it to.")
    try:
        after = write_enabled(name, enabled=to, reason=reason)
    except (WriteError, ReadError) as error:
        return _told(name, _failed(error, to))
    return _told(name, _written(after, to))


def _ask(tenant: str, *, to: bool | None, reason: str = "", problem: str = "") -> WerkzeugResponse:
    view = _view(tenant)
    wanted = view.opposite if to is None else to
    return _page(
        "switch.html",
        status=400 if problem else 200,
        view=view,
        to=wanted,
        reason=reason,
        problem=problem,
        longest=REASON_LENGTH,
    )


def _told(tenant: str, note: Note) -> WerkzeugResponse:
    """Send the browser to the tenant's page, with what came of the form: a reload sends nothing again."""
    category, text = note
    flash(text, category)
    return redirect(url_for("dashboard.tenant", tenant=tenant), 303)


# -- failing -----------------------------------------------------------------------------------------------------------


@bp.errorhandler(HTTPException)
@bp.errorhandler(ExternalOMSError)
@bp.errorhandler(Problem)
def error_page(error: Error) -> WerkzeugResponse:
    """Return an error as a page; a reader without a login is sent to log in."""
    problem = to_problem(error)
    if problem.status == HTTPStatus.UNAUTHORIZED and request.method in {"GET", "HEAD"}:
        wanted = (request.view_args or {}).get("tenant")
        return redirect(url_for("login.login", tenant=wanted), 303)
    page = _page("problem.html", status=problem.status, problem=problem)
    page.headers.update(problem.headers)
    return page


def _before() -> int | None:
    """The row of history to go on from; None for the newest."""
    given = request.args.get("before", "")
    return int(given) if given.isascii() and given.isdigit() and 0 < len(given) < len(str(_FIRST_ROW)) else None


@dataclass(frozen=True, slots=True)
class _Timeline:
    """Rows of history on a page, the row to go on from (None: no older ones), and whether they are the newest."""

    events: Sequence[Event]
    older: int | None
    is_first: bool


def _timeline(events: Sequence[Event]) -> _Timeline:
    rows = events[:TIMELINE_ROWS]
    return _Timeline(rows, rows[-1].id if len(events) > len(rows) else None, _before() is None)


def _value(given: str | None) -> bool | None:
    return {"on": True, "off": False}.get(given or "")


def _objection(reason: str, *, seen: str | None, state: State) -> str:
    """Why a switch is not taken as it was asked; empty where it is."""
    if not reason:
        return "Say why: the reason stands in the history beside your name."
    if len(reason) > REASON_LENGTH or not reason.isprintable():
        return f"The reason is one line of text, {REASON_LENGTH} characters at most."
    now = words.word_of(state.enabled)
    if seen != now:
        return f"It is {now} now, which is not what you saw when you decided. Nothing was written; look again."
    return ""


def _written(after: State, to: bool) -> Note:
    if after.enabled is to:
        told = f"read back at generation {after.generation}. Every process follows"
        return "good", f"{after.tenant} is {words.word_of(to)}: written, and {told}."
    return "warn", (
        f"The config API took {words.word_of(to)} for {after.tenant} and still answers {words.word_of(after.enabled)}. "
        "It is being read again; this page shows when it follows."
    )


def _failed(error: ExternalOMSError, to: bool) -> Note:
    wanted = words.word_of(to)
    if isinstance(error, WriteOutcomeUnknown):
        return "warn", (
            f"Nobody knows yet whether {wanted} was taken: {error}. It was read back several times and did not show. "
            "Watch this page before you try again; it shows the value as soon as the config API answers."
        )
    if isinstance(error, WriteConflict):
        return "bad", f"Not switched: the config API refuses {wanted} in its present state (409). {error}."
    if isinstance(error, WriteError):
        return "bad", f"Not switched: the config API refused {wanted}. {error}."
    return "bad", f"Not switched: nothing was written. {error}."
