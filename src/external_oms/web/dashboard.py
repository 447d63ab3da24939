"""The page: see every tenant, and switch one with a reason. It reads without JavaScript, and what is shown is escaped.

No script or style stands in a page, so the content security policy allows none: what a name or an error might smuggle
in cannot run. Source: W3C Content Security Policy Level 3.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flask import Blueprint, Response, redirect, render_template, request, url_for
from werkzeug.wrappers import Response as WerkzeugResponse

from external_oms.errors import ExternalOMSError, ReadError, WriteConflict, WriteError, WriteOutcomeUnknown
from external_oms.policy import State
from external_oms.records import Event
from external_oms.web import words
from external_oms.web.access import Identity, Role, Via, demand, identity_of
from external_oms.web.api import REASON_LENGTH
from external_oms.web.fleet import Fleet, Shown
from external_oms.web.login import add_login
from external_oms.web.parts import Parts
from external_oms.web.problems import problem_of, resource
from external_oms.web.sessions import FIELD, Sessions, secret_of
from external_oms.web.views import TenantView, members_view, summarised, tenant_view

__all__ = ["PANELS", "blueprint"]

PANELS = 8
"""Up to so many tenants each has its panel with everything; beyond, a line each, and a page of its own."""

TIMELINE_ROWS = 30
"""Rows of history on one page: as much as one looks through; older ones are a link away."""

_LOOKED_THROUGH = 300
_FORM_BYTES = 8192
_FIRST_ROW = 10**18

_SEALS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # under no-referrer browsers send `Origin: null` with our own forms
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}

Note = tuple[Literal["good", "warn", "bad"], str]


def blueprint(parts: Parts) -> Blueprint:
    """The pages of one app.

    Raises:
        SettingsError: `session_secret` is too short, or the file that stands for it may be read by others.
    """
    mounted = Blueprint(
        "dashboard",
        __name__,
        template_folder="templates",
        static_folder="static",
        static_url_path="/static/external-oms",
    )
    sessions = Sessions(
        secret_of(parts.settings),
        parts.access.keyring,
        seconds=parts.settings.session_seconds,
        prefix=parts.url_prefix,
        wall=time.time,
    )
    parts.access.recognise_by(sessions.identity)
    pages = _Pages(parts, sessions)
    resource(mounted, "/", GET=pages.overview)
    resource(mounted, "/tenants/<tenant>", GET=pages.tenant)
    resource(mounted, "/tenants/<tenant>/switch", GET=pages.confirmation, POST=pages.switch)
    resource(mounted, "/tenants/<tenant>/read", POST=pages.read)
    add_login(mounted, parts, sessions)
    mounted.before_request(_bounded)
    mounted.after_request(sessions.apply)
    mounted.after_request(_sealed)
    mounted.register_error_handler(Exception, pages.problem)
    return mounted


def _bounded() -> None:
    request.max_content_length = _FORM_BYTES
    request.max_form_memory_size = _FORM_BYTES


def _sealed(answer: Response) -> Response:
    for name, value in _SEALS.items():
        answer.headers.setdefault(name, value)
    answer.vary.add("Cookie")
    return answer


class _Pages:
    """The views, over the parts of one app."""

    def __init__(self, parts: Parts, sessions: Sessions) -> None:
        service = parts.service
        self._parts = parts
        self._settings = parts.settings
        self._sessions = sessions
        self._cache, self._operations, self._store = service.cache, service.operations, service.store
        self._fleet = Fleet(service.cache, service.store, service.clock)

    # -- looking --------------------------------------------------------------------------------------------------

    def overview(self) -> WerkzeugResponse:
        """Every tenant, every process, and what happened."""
        who = demand(Role.VIEWER)
        tenants = self._cache.tenants
        if len(tenants) == 1:
            return self._one(who, tenants[0], alone=True)
        before = _before()
        events = self._operations.history(limit=_LOOKED_THROUGH if before is None else TIMELINE_ROWS + 1, before=before)
        shown = self._fleet.members()
        by_tenant: dict[str, list[Shown]] = {name: [] for name in tenants}
        for one in shown:
            by_tenant[one.member.tenant].append(one)
        states = [self._cache.state(name) for name in tenants]
        views = [
            tenant_view(state, self._settings, self._fleet, members=by_tenant[state.tenant], events=events)
            for state in states
        ]
        members = members_view(shown)
        return self._page(
            who,
            "overview.html",
            views=views,
            members=members,
            summary=summarised(views, members, self._store.health()),
            panels=len(views) <= PANELS,
            parts_only="parts" in request.args,
            wanted=request.args.get("q", "").strip().lower()[:63],
            show=request.args.get("show", ""),
            timeline=_timeline(events),
        )

    def tenant(self, tenant: str) -> WerkzeugResponse:
        """Everything about one."""
        return self._one(demand(Role.VIEWER), self._cache.tenant_of(tenant), alone=False)

    def _one(self, who: Identity, tenant: str, *, alone: bool) -> WerkzeugResponse:
        before = _before()
        events = self._operations.history(tenant=tenant, limit=_LOOKED_THROUGH, before=before)
        view = self._view(tenant, events)
        members = members_view(view.members)
        return self._page(
            who,
            "tenant.html",
            view=view,
            alone=alone,
            summary=summarised([view], members, self._store.health()),
            note=self._sessions.noted(request.args.get("note")),
            timeline=_timeline(events),
        )

    def _view(self, tenant: str, events: Sequence[Event] = ()) -> TenantView:
        state = self._cache.state(tenant)
        members = self._fleet.members(tenant)
        return tenant_view(state, self._settings, self._fleet, members=members, events=events)

    def _page(self, who: Identity | None, template: str, *, status: int = 200, **given: object) -> WerkzeugResponse:
        page = render_template(
            f"external_oms/{template}",
            who=who,
            may_read=who is not None and who.role >= Role.OPERATOR,
            may_switch=who is not None and who.role >= Role.ADMIN,
            by_session=who is not None and who.via is Via.SESSION,
            insecure=who is not None and who.via is Via.NOTHING,
            ends=self._sessions.ends(request),
            settings=self._settings,
            store=self._store.kind,
            words=words,
            form_token=self._sessions.form_token(),
            form_field=FIELD,
            **given,
        )
        return Response(page, status, content_type="text/html; charset=utf-8")

    # -- doing ----------------------------------------------------------------------------------------------------

    def read(self, tenant: str) -> WerkzeugResponse:
        """Have the API read now."""
        who = demand(Role.OPERATOR)
        self._sessions.check_form()
        name = self._cache.tenant_of(tenant)
        self._parts.limits.take("refresh", who.name, per_minute=self._settings.writes_per_minute)
        try:
            state = self._operations.refresh(name)
        except ReadError as error:
            return self._told(name, ("bad", f"The read failed: {error}."))
        return self._told(name, ("good", f"Read just now: {name} is {words.word_of(state.enabled)}."))

    def confirmation(self, tenant: str) -> WerkzeugResponse:
        """Ask before a switch: whose flag, from what to what, and why."""
        who = demand(Role.ADMIN)
        return self._ask(who, self._cache.tenant_of(tenant), to=_value(request.args.get("to")))

    def switch(self, tenant: str) -> WerkzeugResponse:
        """Write the value, and say what came of it."""
        who = demand(Role.ADMIN)
        self._sessions.check_form()
        name = self._cache.tenant_of(tenant)
        to, reason = _value(request.form.get("to")), " ".join(request.form.get("reason", "").split())
        state = self._cache.state(name)
        problem = _objection(reason, seen=request.form.get("from"), state=state)
        if to is None or problem:
            return self._ask(who, name, to=to, reason=reason, problem=problem or "Choose what to switch it to.")
        self._parts.limits.take("switch", who.name, per_minute=self._settings.writes_per_minute)
        try:
            after = self._operations.set_enabled(name, enabled=to, actor=who.name, reason=reason)
        except (WriteError, ReadError) as error:
            return self._told(name, _failed(error, to))
        return self._told(name, _written(after, to))

    def _ask(
        self, who: Identity, tenant: str, *, to: bool | None, reason: str = "", problem: str = ""
    ) -> WerkzeugResponse:
        view = self._view(tenant)
        wanted = view.opposite if to is None else to
        return self._page(
            who,
            "switch.html",
            status=400 if problem else 200,
            view=view,
            to=wanted,
            reason=reason,
            problem=problem,
            longest=REASON_LENGTH,
        )

    def _told(self, tenant: str, note: Note) -> WerkzeugResponse:
        """Send the browser to the tenant's page, with what came of the form: a reload sends nothing again."""
        return redirect(url_for(".tenant", tenant=tenant, note=self._sessions.note(*note)), 303)

    # -- failing --------------------------------------------------------------------------------------------------

    def problem(self, error: Exception) -> WerkzeugResponse:
        """The error as a page; who is not logged in is asked to, where a page was asked for."""
        found = problem_of(error)
        if found.status == 401 and request.method in {"GET", "HEAD"}:  # noqa: PLR2004 - unauthorized
            arguments = request.view_args or {}
            return redirect(
                url_for(".login", **{name: arguments[name] for name in ("tenant",) if name in arguments}), 303
            )
        answer = self._page(identity_of(request), "problem.html", status=found.status, problem=found)
        for name in ("Allow", "Retry-After", "WWW-Authenticate"):
            if name in found.answer.headers:
                answer.headers[name] = found.answer.headers[name]
        return answer


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
