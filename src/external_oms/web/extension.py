"""The extension for an app that is not ours: it takes nothing of the app but the routes that it was asked to mount."""

from __future__ import annotations

from contextlib import suppress
from typing import TypedDict, Unpack

from flask import Flask
from openfeature import api
from openfeature.exception import OpenFeatureError

from external_oms.provider import ExternalOMSProvider
from external_oms.settings import Settings
from external_oms.web.app import FLAGS, check_credentials, mount
from external_oms.web.parts import Parts, parts_of

__all__ = ["Choice", "ExternalOMS"]


class Choice(TypedDict, total=False):
    """What `ExternalOMS` mounts and how; every one may be left out.

    Attributes:
        url_prefix: Under which everything is mounted. None: at the root.
        domain: The OpenFeature domain that the provider is registered for. None: the default provider. Two apps of one
            process with different settings need different domains, or the later one's provider replaces the earlier's;
            with the same settings they share one provider.
        wait: Whether `init_app` waits for the first read, `timeout_seconds` at the most, so that the first order is
            routed by a value that was read. True; a dead API does not keep the app from starting. False: evaluations
            give the caller's default until the read has ended.
        webhook: Whether deliveries are taken. True.
        api: Whether `/api/v1` and `/openapi.json` are served. False, as are the following.
        ofrep: Whether OFREP is served.
        dashboard: Whether the page is served, and with it the API, whose event stream keeps it live.
        metrics: Whether `/metrics` is served.
        health: Whether `/healthz` and `/readyz` are served.
    """

    url_prefix: str
    domain: str | None
    wait: bool
    webhook: bool
    api: bool
    ofrep: bool
    dashboard: bool
    metrics: bool
    health: bool


class ExternalOMS:
    """The provider and the webhook on the user's own Flask app.

    ::

        oms = ExternalOMS()

        def create_app():
            app = Flask(__name__)
            oms.init_app(app)
            return app

    One object serves any number of apps; what belongs to an app is kept there, in `app.extensions["external_oms"]`.

    Args:
        app: An app to mount on at once.
        settings: The settings; without them, `EXTERNAL_OMS_…` of the app's configuration, else the environment.
        provider: A provider to share; made of the settings where it is not given.
        choice: What to mount; see `Choice`. `init_app` may choose otherwise for one app.

    Raises:
        SettingsError: As `init_app`.
    """

    def __init__(
        self,
        app: Flask | None = None,
        settings: Settings | None = None,
        *,
        provider: ExternalOMSProvider | None = None,
        **choice: Unpack[Choice],
    ) -> None:
        self._settings = settings
        self._provider = provider
        self._choice = choice
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask, settings: Settings | None = None, **choice: Unpack[Choice]) -> Parts:
        """Register the provider with OpenFeature and mount what was chosen; once per app, however often it is called.

        Args:
            app: The app.
            settings: Settings for this app alone.
            choice: What to choose otherwise for this app.

        Returns:
            What is mounted, as in `app.extensions["external_oms"]`.

        Raises:
            SettingsError: A setting is malformed, or a part would be open to anyone.
        """
        mounted = parts_of(app)
        if mounted is not None:
            return mounted
        chosen = Choice(**(self._choice | choice))
        domain = chosen.get("domain")
        settled = settings or self._settings or self._configured(app)
        flags = frozenset(flag for flag in FLAGS if chosen.get(flag, flag == "webhook"))
        if "dashboard" in flags:
            flags |= {"api"}  # whose event stream keeps the page live
        check_credentials(settled, flags)
        registered = api.get_client(domain).provider
        provider = self._provider if settings is None else None
        if provider is None and isinstance(registered, ExternalOMSProvider) and registered.service.settings == settled:
            provider = registered  # of another app with the same settings, which goes on using it
        provider = provider or ExternalOMSProvider(settled)
        parts = mount(app, provider, settled, flags=flags, url_prefix=chosen.get("url_prefix", ""))
        if registered is not provider:
            _register(provider, domain, wait=chosen.get("wait", True))
        return parts

    def _configured(self, app: Flask) -> Settings:
        if self._provider is not None:
            return self._provider.service.settings
        return Settings(**app.config.get_namespace("EXTERNAL_OMS_"))


def _register(provider: ExternalOMSProvider, domain: str | None, *, wait: bool) -> None:
    if not wait:
        api.set_provider(provider, domain)
        return
    with suppress(OpenFeatureError):  # the provider has said what is wrong, and goes on trying by itself
        api.set_provider_and_wait(provider, domain)
