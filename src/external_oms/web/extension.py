"""The extension for the user's own Flask application: the webhook there, and the rest of the server below a prefix."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from flask import Flask
from openfeature import api
from openfeature.exception import OpenFeatureError
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from external_oms.errors import SettingsError
from external_oms.provider import ExternalOMSProvider
from external_oms.settings import Settings
from external_oms.web import webhook
from external_oms.web.app import check_credentials, make_app
from external_oms.web.state import EXTENSION, OMS, provider_of
from external_oms.webhook import check_webhook_credentials

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

__all__ = ["ExternalOMS"]


class ExternalOMS:
    """The provider, and its webhook on the user's own Flask application.

    ::

        oms = ExternalOMS()

        def create_app():
            app = Flask(__name__)
            oms.init_app(app)
            return app

    The application gets one route, `POST /webhooks/external-oms`. With `mount="/external-oms"` the dashboard, the API,
    OFREP, metrics and health are served below that prefix, by an application of their own.

    One object serves any number of applications; the state of each is in `app.extensions["external_oms"]`.

    Args:
        app: An application to initialize at once.
        settings: The settings; those of the provider, else `EXTERNAL_OMS_…` of the application's configuration and the
            environment, unless given.
        provider: The provider; made from the settings unless given.
        domain: The OpenFeature domain that the provider is registered for; None: the default provider. Two applications
            of one process with different settings need different domains.
        mount: The prefix of everything but the webhook; None: it is not served.

    Raises:
        SettingsError: As `init_app`.
    """

    def __init__(
        self,
        app: Flask | None = None,
        settings: Settings | None = None,
        *,
        provider: ExternalOMSProvider | None = None,
        domain: str | None = None,
        mount: str | None = None,
    ) -> None:
        self._settings = settings
        self._provider = provider
        self._domain = domain
        self._mount = mount
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask, settings: Settings | None = None, *, mount: str | None = None) -> OMS:
        """Register the provider with OpenFeature and the webhook with the application.

        Waits for the first read, `timeout_seconds` at most, so that the first order gets a value; not while
        `app.testing` is set. An API that fails does not keep the application from starting.

        Args:
            app: The application.
            settings: Settings for this application alone.
            mount: The prefix for this application alone.

        Returns:
            The state, as in `app.extensions["external_oms"]`.

        Raises:
            SettingsError: A setting is malformed, or a route would be open to anyone; the application is unchanged.
            RuntimeError: The application was initialized before with other settings or another prefix.
        """
        prefix = _checked_prefix(self._mount if mount is None else mount)
        chosen = settings or self._settings or self._settings_of(app)
        known = app.extensions.get(EXTENSION)
        if isinstance(known, OMS):
            if known.settings != chosen or known.prefix != prefix:
                raise RuntimeError("this application was initialized before, with other settings or another prefix")
            return known
        (check_webhook_credentials if prefix is None else check_credentials)(chosen)
        registered = api.get_client(self._domain).provider
        given = self._provider if settings is None else None
        if given is None and isinstance(registered, ExternalOMSProvider) and registered.service.settings == chosen:
            given = registered  # of another application with the same settings, which goes on using it
        provider = provider_of(chosen, given)
        try:
            oms = OMS(provider, prefix=prefix)
            ours = None if prefix is None else make_app(oms, with_webhook=False)
            app.register_blueprint(webhook.bp)  # the first change of the application, and the last that may fail
        except BaseException:
            if provider is not given:
                provider.shutdown()
            raise
        app.extensions[EXTENSION] = oms
        if ours is not None and prefix is not None:
            app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {prefix: _Mounted(ours, app)})  # type: ignore[method-assign]  # Flask's documented way
        if registered is not provider:
            _register(provider, self._domain, wait=not app.testing)
        return oms

    def _settings_of(self, app: Flask) -> Settings:
        if self._provider is not None:
            return self._provider.service.settings
        return Settings(**app.config.get_namespace("EXTERNAL_OMS_"))


class _Mounted:
    """Our application below a prefix of the host's; an exception propagates from it where it would from the host."""

    def __init__(self, app: Flask, host: Flask) -> None:
        self._app = app
        self._host = host

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        propagates = self._host.config["PROPAGATE_EXCEPTIONS"]
        self._app.config["PROPAGATE_EXCEPTIONS"] = (
            self._host.testing or self._host.debug if propagates is None else propagates
        )
        return self._app(environ, start_response)


def _checked_prefix(given: str | None) -> str | None:
    if given is None:
        return None
    prefix = given.rstrip("/")
    if not prefix.startswith("/") or not prefix.strip("/") or "//" in prefix:
        raise SettingsError("mount", f"{given[:80]!r} is not a prefix such as /external-oms; the root stays yours")
    return prefix


def _register(provider: ExternalOMSProvider, domain: str | None, *, wait: bool) -> None:
    if not wait:
        api.set_provider(provider, domain)
        return
    with suppress(OpenFeatureError):  # the provider has logged what is wrong, and goes on trying
        api.set_provider_and_wait(provider, domain)
