"""The door of the page: a key in, a session out. Where it leads is named by a tenant, never by a URL."""

from __future__ import annotations

from flask import Blueprint, Response, redirect, render_template, request, url_for
from werkzeug.wrappers import Response as WerkzeugResponse

from external_oms.web.access import identity_of
from external_oms.web.parts import Parts
from external_oms.web.problems import Problem, resource
from external_oms.web.sessions import Sessions

__all__ = ["add_login", "login_page"]

_LONGEST_KEY = 512


def login_page(sessions: Sessions, *, problem: str = "", status: int = 200) -> Response:
    """The page that asks for a key."""
    page = render_template(
        "external_oms/login.html",
        problem=problem,
        wanted=request.values.get("tenant", ""),
        form_token=sessions.form_token(),
    )
    return Response(page, status, content_type="text/html; charset=utf-8")


def add_login(mounted: Blueprint, parts: Parts, sessions: Sessions) -> None:
    """Add `/login` and `/logout` to a blueprint of pages."""

    def onward() -> WerkzeugResponse:
        wanted = request.values.get("tenant", "")
        known = wanted in parts.service.cache.tenants
        return redirect(url_for(".tenant", tenant=wanted) if known else url_for(".overview"), 303)

    def login() -> WerkzeugResponse:
        return login_page(sessions) if identity_of(request) is None else onward()

    def enter() -> WerkzeugResponse:
        try:
            parts.limits.take("login", parts.access.address(request), per_minute=parts.settings.logins_per_minute)
            sessions.check_form()
        except Problem as problem:
            answer = login_page(sessions, problem=_in_words(problem), status=problem.status)
            if "Retry-After" in problem.answer.headers:
                answer.headers["Retry-After"] = problem.answer.headers["Retry-After"]
            return answer
        if sessions.login(request.form.get("key", "")[:_LONGEST_KEY].strip()) is None:
            return login_page(sessions, problem="This key is not known here.", status=403)
        return onward()

    def logout() -> WerkzeugResponse:
        sessions.check_form()
        sessions.logout()
        return redirect(url_for(".login"), 303)

    resource(mounted, "/login", GET=login, POST=enter)
    resource(mounted, "/logout", POST=logout)


def _in_words(problem: Problem) -> str:
    return f"{problem.detail[0].upper()}{problem.detail[1:]}."
