"""The whole server as one Flask application: the webhook, the API, OFREP, health, metrics and the dashboard."""

from __future__ import annotations

import importlib
import re
import secrets
from datetime import timedelta

from flask import Flask, Response, request
from flask_wtf.csrf import CSRFProtect
from werkzeug.exceptions import HTTPException
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.wrappers import Response as WerkzeugResponse

from external_oms.errors import ExternalOMSError, SettingsError
from external_oms.problems import Problem
from external_oms.provider import ExternalOMSProvider
from external_oms.settings import Settings
from external_oms.web import api, dashboard, health, login, ofrep, webhook
from external_oms.web.access import require_loopback
from external_oms.web.errors import Error, problem_response, read_body, to_problem
from external_oms.web.keys import APIKeys
from external_oms.web.state import EXTENSION, OMS, get_oms, provider_of
from external_oms.webhook import check_webhook_credentials

__all__ = ["check_credentials", "create_app", "make_app"]

FORM_BYTES = 8192
"""The largest form, in bytes."""

SECRET_LENGTH = 16
"""The least characters of `session_secret`."""

_HEADERS = (("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store"))
_DATA = frozenset({"api", "ofrep", "health", "metrics", webhook.bp.name})
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = (
    *_HEADERS,
    ("Content-Security-Policy", _POLICY),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "same-origin"),  # under no-referrer, browsers send `Origin: null` with our own forms
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Permissions-Policy", "camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
)

_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+){0,8}")

_SECRET = secrets.token_urlsafe(32)
"""Signs sessions where `session_secret` is not set; workers that are forked after this import share it."""


def read_form() -> None:
    """Read the form of a request, under a limit; Flask then parses what was read.

    Raises:
        Problem: 413, or 400: the server could not read it.
    """
    if request.method == "POST":
        read_body(FORM_BYTES)


csrf = CSRFProtect()
for _with_forms in (dashboard.bp, login.bp):
    _with_forms.before_request(read_form)
    _with_forms.before_request(csrf.protect)


def create_app(settings: Settings | None = None, *, provider: ExternalOMSProvider | None = None) -> Flask:
    """Return the whole server.

    Args:
        settings: The settings; those of the provider, else of the environment, unless given.
        provider: The provider; made from the settings unless given.

    Raises:
        SettingsError: A route would be open to anyone, or a credential is malformed or weak; the setting is named.
    """
    if settings is None:
        settings = Settings() if provider is None else provider.service.settings
    check_credentials(settings)
    oms = OMS(provider_of(settings, provider))
    app = make_app(oms, with_webhook=True)
    oms.cache.start()  # no evaluation comes before the load balancer has found this process ready
    return app


def check_credentials(settings: Settings) -> None:
    """Refuse settings with which a route of the server would be open to anyone, or a credential could be guessed.

    Raises:
        SettingsError: They are such.
    """
    check_webhook_credentials(settings)
    ofrep.check_origins(settings.ofrep_origins)
    if settings.session_secret is not None and len(settings.session_secret.get_secret_value()) < SECRET_LENGTH:
        advice = f"is shorter than {SECRET_LENGTH} characters; try `openssl rand -base64 32`"
        raise SettingsError("session_secret", advice)
    if not len(APIKeys(settings.api_keys)) and not settings.insecure:
        raise SettingsError(
            "api_keys",
            "is not set, so every request to the API, OFREP and the dashboard would be refused; make an entry with "
            "`external-oms keys new` (`insecure` does without, on loopback only)",
        )
    if settings.insecure and settings.proxies:
        raise SettingsError("insecure", "is set beside proxies; without credentials, only this machine may ask")


def make_app(oms: OMS, *, with_webhook: bool) -> Flask:
    """Return the application over a state.

    Args:
        oms: The state.
        with_webhook: Whether it takes deliveries; an application that mounts this one has the webhook itself.
    """
    # prometheus-client reads the environment when it is imported, and `serve` sets a variable before this.
    metrics = importlib.import_module("external_oms.web.metrics")
    settings = oms.settings
    app = Flask("external_oms.web", static_folder=None)
    app.url_map.merge_slashes = False
    app.session_interface = login.SessionInterface()
    app.config.update(
        SECRET_KEY=settings.session_secret.get_secret_value() if settings.session_secret else _SECRET,
        SESSION_COOKIE_NAME=login.COOKIE,
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_REFRESH_EACH_REQUEST=False,
        PERMANENT_SESSION_LIFETIME=timedelta(seconds=settings.session_seconds),
        MAX_CONTENT_LENGTH=FORM_BYTES,
        MAX_FORM_MEMORY_SIZE=FORM_BYTES,
        WTF_CSRF_CHECK_DEFAULT=False,  # the blueprints with forms check; the others have credentials of their own
        WTF_CSRF_TIME_LIMIT=None,
        WTF_CSRF_SSL_STRICT=False,  # a proxy may change the Host header; the token is enough
    )
    app.extensions[EXTENSION] = oms
    app.extensions[metrics.EXTENSION] = metrics.init_app(oms)
    app.register_error_handler(HTTPException, on_error)
    app.register_error_handler(ExternalOMSError, on_error)
    app.register_error_handler(Problem, on_error)
    app.after_request(set_security_headers)
    if settings.insecure:
        oms.warn_once("`insecure` is set: without credentials, and for this machine only")
        app.before_request(require_loopback)
    if settings.dashboard and settings.session_secret is None and oms.store.kind == "redis":
        oms.warn_once("session_secret is not set: a login at this host is not known to the others that share the store")
    csrf.init_app(app)
    parts = [api.bp, ofrep.bp, health.bp, metrics.bp]
    parts += [webhook.bp] if with_webhook else []
    parts += [dashboard.bp, login.bp] if settings.dashboard else []
    for blueprint in parts:
        app.register_blueprint(blueprint)
    if settings.proxies:
        count = settings.proxies
        app.before_request(check_prefix)
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=count, x_proto=count, x_host=count, x_prefix=count)  # type: ignore[method-assign]  # Flask's documented way
    return app


def on_error(error: Error) -> WerkzeugResponse:
    """Return an error as problem details; OFREP's routes have a shape of their own."""
    if request.path.startswith(ofrep.PREFIX):
        return ofrep.error_response(error)
    if get_oms().settings.dashboard and _is_page():
        return dashboard.error_page(error)
    return problem_response(to_problem(error))


def _is_page() -> bool:
    """Return whether a person reads the response: a page was requested, or a browser asks for an unknown path."""
    if request.path in {"/", "/login", "/logout"} or request.path.startswith("/tenants/"):
        return True
    wanted = request.accept_mimetypes.best_match(["application/json", "text/html"])
    return wanted == "text/html" and not request.path.startswith("/api/")


def check_prefix() -> None:
    """Refuse an X-Forwarded-Prefix that would lead a redirect to another host.

    Raises:
        Problem: 400.
    """
    if not _PREFIX.fullmatch(request.script_root):
        raise Problem(400, "the prefix that the proxy names is not a path")


def set_security_headers(response: Response) -> Response:
    """Add the security headers that the response does not have."""
    headers = response.headers
    for name, value in _HEADERS if request.blueprint in _DATA else _PAGE_HEADERS:
        if name not in headers:
            headers.add(name, value)
    return response
