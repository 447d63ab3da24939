"""Log in with an API key, and log out. The session is Flask's own, a signed cookie; it holds no key."""

from __future__ import annotations

import logging
import secrets
import time

from flask import Blueprint, Flask, Request, redirect, render_template, request, session, url_for
from flask import Response as FlaskResponse
from flask.sessions import SecureCookieSession, SecureCookieSessionInterface, SessionMixin
from werkzeug.wrappers import Response

from external_oms.problems import Problem
from external_oms.web.access import current_identity, is_local
from external_oms.web.keys import Via
from external_oms.web.state import current_oms

__all__ = ["COOKIE", "SessionInterface", "bp"]

COOKIE = "external_oms_session"
"""The name of the session cookie."""

_LONGEST_KEY = 512

bp = Blueprint("login", __name__)

logger = logging.getLogger("external_oms.access")


class SessionInterface(SecureCookieSessionInterface):
    """Flask's session in a cookie that is Secure unless this machine asks itself, and that stays below our prefix."""

    def open_session(self, app: Flask, request: Request) -> SecureCookieSession | None:
        """Return the session of the cookie; without one, none of the machinery that verifies it is made."""
        if COOKIE not in request.environ.get("HTTP_COOKIE", ""):
            return self.session_class()
        return super().open_session(app, request)

    def save_session(self, app: Flask, session: SessionMixin, response: FlaskResponse) -> None:
        """Save the session if a view has used it; the API and OFREP do not, unless a browser calls them."""
        if session.accessed or session.modified:
            super().save_session(app, session, response)

    def get_cookie_secure(self, app: Flask) -> bool:  # noqa: ARG002 - the form of the base
        """Return whether the cookie is sent over TLS alone: always behind a proxy, since the way to it may be long."""
        return current_oms.settings.proxies > 0 or not is_local(request)

    def get_cookie_path(self, app: Flask) -> str:  # noqa: ARG002 - the form of the base
        """Return where the browser sends the cookie: our prefix and below."""
        return request.script_root or "/"


@bp.get("/login")
def login() -> Response | str:
    """Ask for a key."""
    return _page() if current_identity() is None else _onward()


@bp.post("/login")
def enter() -> Response | tuple[str, int] | tuple[str, int, dict[str, str]]:
    """Begin a session for the holder of a key."""
    if current_oms.needs_shared_secret(request.environ):
        return _page("This server has several processes and no session_secret; set it, and restart"), 503
    address = request.remote_addr or ""
    try:
        current_oms.limits.hit("login", address, per_minute=current_oms.settings.logins_per_minute)
    except Problem as problem:
        return _page(f"{problem.detail[0].upper()}{problem.detail[1:]}"), problem.status, problem.headers
    identity = current_oms.api_keys.identity(request.form.get("key", "")[:_LONGEST_KEY].strip())
    if identity is None:
        logger.warning("failed login from %s", address or "a Unix socket")
        return _page("Invalid API key"), 403
    session.clear()  # against session fixation: nothing of a cookie that was there before is kept
    session.update(key=identity.fingerprint, id=secrets.token_urlsafe(16), at=time.time())
    session.permanent = True
    logger.info("%s (%s) logged in from %s", identity.name, identity.role.word, address or "a Unix socket")
    return _onward()


@bp.post("/logout")
def logout() -> Response:
    """End the session, its event streams, and every copy of its cookie."""
    identity = current_identity()
    if identity is not None and identity.via is Via.SESSION:
        current_oms.limits.revoke(str(session["id"]))
        logger.info("%s logged out", identity.name)
    session.clear()
    return redirect(url_for("login.login"), 303)


def _onward() -> Response:
    wanted = request.values.get("tenant", "")
    if wanted in current_oms.cache.tenants:
        return redirect(url_for("dashboard.tenant", tenant=wanted), 303)
    return redirect(url_for("dashboard.overview"), 303)


def _page(problem: str = "") -> str:
    return render_template("external_oms/login.html", problem=problem, wanted=request.values.get("tenant", ""))
