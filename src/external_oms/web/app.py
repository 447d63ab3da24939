"""The whole server, and how its parts come onto any app: what is not configured is not open, and says so at start."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Collection
from typing import Protocol

from flask import Blueprint, Flask, Response

from external_oms import signature
from external_oms.errors import SettingsError, SignatureError
from external_oms.provider import ExternalOMSProvider
from external_oms.settings import Settings
from external_oms.web import api, dashboard, flagd, health, metrics, ofrep, openapi, webhook
from external_oms.web.access import EXTENSION, Access, only_loopback
from external_oms.web.limits import Limits
from external_oms.web.parts import Parts
from external_oms.web.problems import report_problems
from external_oms.web.servers import worker_count
from external_oms.web.sessions import is_lone
from external_oms.web.streams import Hub

__all__ = ["FLAGS", "check_credentials", "create_app", "mount"]

BLUEPRINTS: tuple[tuple[str, Callable[[Parts], Blueprint]], ...] = (
    ("webhook", webhook.blueprint),
    ("api", api.blueprint),
    ("api", openapi.blueprint),
    ("ofrep", ofrep.blueprint),
    ("ofrep", flagd.blueprint),
    ("health", health.blueprint),
    ("metrics", metrics.blueprint),
    ("dashboard", dashboard.blueprint),
)
"""What can be mounted: the flag that asks for it, and what makes it. A new part is one line here."""

FLAGS = frozenset(flag for flag, _ in BLUEPRINTS)
"""Every flag there is."""

_OPEN = frozenset({"webhook", "health"})
"""Flags whose routes ask for no key of `api_keys`: the webhook has its own credentials, health has nothing to hide."""

_logger = logging.getLogger(__name__)


def create_app(
    settings: Settings | None = None, *, provider: ExternalOMSProvider | None = None, url_prefix: str = ""
) -> Flask:
    """The whole server: every part, on an app of its own.

    Args:
        settings: The settings; without them, those of the provider, else of the environment.
        provider: What resolves the flag; made of the settings where it is not given.
        url_prefix: Under which everything is mounted.

    Raises:
        SettingsError: A part would be open to anyone, or a credential is malformed; the setting is named.
    """
    settings = _settled(settings, provider)
    flags = FLAGS if settings.dashboard else FLAGS - {"dashboard"}
    check_credentials(settings, flags)
    app = Flask("external_oms", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.webhook_max_bytes
    report_problems(app)
    parts = mount(app, provider or ExternalOMSProvider(settings), settings, flags=flags, url_prefix=url_prefix)
    parts.service.cache.start()  # nobody evaluates before the load balancer has found this process ready
    return app


def _settled(settings: Settings | None, provider: ExternalOMSProvider | None) -> Settings:
    if settings is not None:
        return settings
    return Settings() if provider is None else provider.service.settings


def check_credentials(settings: Settings, flags: Collection[str]) -> None:
    """See that nothing which these flags mount would be open to anyone.

    Raises:
        SettingsError: It would, and `insecure` does not allow it; or a credential is malformed.
    """
    for number, secret in enumerate(settings.webhook_secrets, start=1):
        try:
            signature.check_secret(secret.get_secret_value())
        except SignatureError as error:
            raise SettingsError("webhook_secrets", f"entry {number} {error}") from error
    for number, key in enumerate(settings.webhook_api_keys, start=1):
        text = key.get_secret_value()
        if not text.isascii() or not text.isprintable() or not text.strip() or " " in text:
            raise SettingsError("webhook_api_keys", f"entry {number} must be printable ASCII without spaces")
    configured = Access(settings).is_configured
    if settings.insecure:
        return
    if "webhook" in flags and not (settings.webhook_secrets or settings.webhook_api_keys):
        raise SettingsError(
            "webhook_secrets",
            "is not set, and neither is webhook_api_keys, so nobody could send a genuine delivery; set one of them "
            "(`insecure` does without, on loopback only)",
        )
    needing = sorted(set(flags) - _OPEN - ({"metrics"} if settings.metrics_open else set()))
    if needing and not configured:
        raise SettingsError(
            "api_keys",
            f"is not set, and {', '.join(needing)} would be closed to everyone; make an entry with "
            "`external-oms keys new` (`insecure` does without, on loopback only)",
        )


def mount(
    app: Flask, provider: ExternalOMSProvider, settings: Settings, *, flags: Collection[str], url_prefix: str
) -> Parts:
    """Put the parts that the flags name onto an app, and their state into its extensions.

    Args:
        app: The app.
        provider: What resolves the flag.
        settings: Its settings, checked by `check_credentials`.
        flags: What to mount, of `FLAGS`.
        url_prefix: Under which; empty, or with a slash in front.
    """
    prefix = url_prefix.rstrip("/")
    parts = Parts(
        provider=provider,
        settings=settings,
        access=Access(settings),
        limits=Limits(settings),
        hub=Hub(provider.service.cache, max_streams=settings.max_streams),
        url_prefix=prefix,
        mounted=frozenset(flags),
    )
    app.extensions[EXTENSION] = parts
    whole = Blueprint(EXTENSION, __name__, url_prefix=prefix or None)
    report_problems(whole)
    whole.after_request(_sealed)
    if settings.insecure:
        whole.before_request(only_loopback)
        _logger.warning("`insecure` is set: without credentials, and for this machine only")
    made = [blueprint(parts) for flag, blueprint in BLUEPRINTS if flag in flags]
    for part in made:
        whole.register_blueprint(part)
    app.register_blueprint(whole)
    _exempt_from_csrf(app, made)
    _warn_of_lone_workers(settings, flags)
    if "dashboard" in flags and "redis" in settings.store and settings.session_secret is None:
        _logger.warning(
            "session_secret is not set: a login at this host is not known at the others that share the store; "
            "set the same one at each, such as `openssl rand -base64 32` makes"
        )
    return parts


def _sealed(answer: Response) -> Response:
    for name, value in _SEALS:
        if name not in answer.headers:
            answer.headers.add(name, value)
    return answer


_SEALS = (("X-Content-Type-Options", "nosniff"), ("Cache-Control", "no-store"))


class _Csrf(Protocol):
    """As much of Flask-WTF's CSRFProtect as is needed here."""

    def exempt(self, view: Blueprint) -> Blueprint: ...


def _exempt_from_csrf(app: Flask, blueprints: Collection[Blueprint]) -> None:
    """Have the app's own CSRFProtect let through what shows credentials, or form tokens, of its own.

    It may come onto the app later than we do, so the first requests look for it again, before it looks at them.
    """
    found: list[_Csrf] = []

    def exempt() -> None:
        guard: _Csrf | None = app.extensions.get("csrf")
        if guard is not None and guard not in found:
            found.append(guard)
            for blueprint in blueprints:
                guard.exempt(blueprint)

    exempt()
    app.before_request_funcs.setdefault(None, []).insert(0, exempt)


def _warn_of_lone_workers(settings: Settings, flags: Collection[str]) -> None:
    """Say that a delivery reaches one worker of several, or that a scrape counts one alone, where it does."""
    uwsgi = sys.modules.get("uwsgi")
    workers = worker_count(sys.argv, os.environ, uwsgi_processes=None if uwsgi is None else int(uwsgi.numproc))
    if workers == 1:
        return
    if "webhook" in flags and settings.store.startswith("memory:"):
        _logger.warning(
            "this server runs %d workers, and with store = memory:// a delivery reaches only the one that it lands on; "
            "the others serve the old value until its ttl_seconds (%g) have passed. Set store to "
            "sqlite:////path/state.db, which all workers of a host share, or to redis://",
            workers,
            settings.ttl_seconds,
        )
    if "dashboard" in flags and is_lone(settings):
        _logger.warning(
            "this server runs %d workers, and a login at one of them is not known to the others; set session_secret, "
            "such as `openssl rand -base64 32` makes",
            workers,
        )
    if "metrics" in flags and not metrics.are_shared():
        _logger.warning(
            "this server runs %d workers, and each scrape of /metrics counts the one that it lands on. Have %s name an "
            "empty directory before the server starts; docs/metrics.md has the rest",
            workers,
            metrics.DIRECTORY_VARIABLE,
        )
