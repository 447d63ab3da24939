"""The state of the extension on one application, kept in `app.extensions["external_oms"]`."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple, cast
from urllib.parse import urlsplit

from flask import current_app
from openfeature.flag_evaluation import FlagResolutionDetails
from werkzeug.local import LocalProxy

from external_oms.cache import Cache
from external_oms.clock import Clock
from external_oms.errors import SettingsError
from external_oms.operations import Operations
from external_oms.provider import ExternalOMSProvider
from external_oms.settings import Settings
from external_oms.signals import Signal
from external_oms.stores.base import Store
from external_oms.web.dashboard_context import DayLog, Fleet
from external_oms.web.keys import APIKeys
from external_oms.web.limits import Limits
from external_oms.web.sse import Broker
from external_oms.webhook import RefusalLog, Webhook

__all__ = [
    "DIRECTORY_VARIABLE",
    "EXTENSION",
    "OMS",
    "Answer",
    "Evaluation",
    "current_oms",
    "get_oms",
    "instances",
    "provider_of",
]

EXTENSION = "external_oms"
"""The key in `app.extensions`."""

DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus-client's own variable: the directory where the processes of one server count together. It is read when the
library is imported, so it has its name here and not in `metrics`, which imports the library."""

_IMPORTED_BY = os.getpid()
"""The process that imported this module; a worker that was forked later shares what it made up."""

logger = logging.getLogger("external_oms.web")


class Evaluation(NamedTuple):
    """The flag was evaluated.

    Attributes:
        tenant: The tenant; empty where the caller named none that is configured.
        reason: The reason in OpenFeature's words: `CACHED`, `STATIC`, `STALE`, `DEFAULT`, `ERROR`.
        via: `sdk` by a client of OpenFeature in this process, `ofrep` over HTTP.
        value: `on` or `off`; `none` where the caller's own default decides.
    """

    tenant: str
    reason: str
    via: str
    value: str


class Answer(NamedTuple):
    """The answer of OFREP for some details.

    Attributes:
        details: What the provider gave.
        body: The body.
        event: The event for the metrics.
    """

    details: FlagResolutionDetails[bool]
    body: bytes
    event: Evaluation


class OMS:
    """What the views of one application work with.

    Args:
        provider: The provider.
        prefix: Where the server is mounted on the user's application; None where it is not.

    Attributes:
        provider: Resolves the flag.
        prefix: The same as the argument.
        settings: The settings of the provider.
        cache: Serves the values.
        operations: Changes them.
        store: Holds entries, history and heartbeats.
        clock: Tells the time.
        api_keys: Recognise callers.
        limits: Count requests.
        broker: Feeds the event streams.
        webhook: Decides about deliveries.
        fleet: The processes that share the store, and the last reads of this one.
        days: The history of the last day, by tenant.
        answers: The last answer of OFREP, by the tenant that the request named.
        evaluated: Sent after every evaluation over OFREP.
        refused_keys: Logs API keys that are not known.

    Raises:
        SettingsError: `api_keys` or `webhook_secrets` has a malformed entry.
    """

    def __init__(self, provider: ExternalOMSProvider, *, prefix: str | None = None) -> None:
        service = provider.service
        self.provider = provider
        self.prefix = prefix
        self.settings = settings = service.settings
        self.cache: Cache = service.cache
        self.operations: Operations = service.operations
        self.store: Store = service.store
        self.clock: Clock = service.clock
        self.api_keys = APIKeys(settings.api_keys)
        self.limits = Limits(settings)
        self.broker = Broker(service.cache, max_streams=settings.max_streams)
        self.webhook = Webhook(provider, limits=self.limits)
        self.fleet = Fleet(self.cache, self.store, self.clock)
        self.days = DayLog(self.operations.history)
        self.answers: dict[object, Answer] = {}
        self.evaluated: Signal[Evaluation] = Signal()
        self.refused_keys = RefusalLog(
            logging.getLogger("external_oms.access"),
            "API keys",
            monotonic=self.clock.monotonic,
            at=service.cache.runner.at,
        )
        self._warned: set[str] = set()
        instances.add(self)

    @cached_property
    def hosts(self) -> Mapping[str, str]:
        """The host of the config API of each tenant."""
        return {name: urlsplit(own.config_url(name)).netloc for name, own in self.settings.by_tenant().items()}

    def needs_shared_secret(self, environ: Mapping[str, object]) -> bool:
        """Return whether a login would hold at one process of several only, because each has made up a secret."""
        is_own = self.settings.session_secret is None and os.getpid() == _IMPORTED_BY
        return is_own and bool(environ.get("wsgi.multiprocess"))

    def warn_once(self, message: str, *values: object) -> None:
        """Log a warning that is not repeated while this process lives."""
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message, *values)


instances: weakref.WeakSet[OMS] = weakref.WeakSet()
"""Those of this process, which a server ends whatever the application is wrapped in."""


def provider_of(settings: Settings, given: ExternalOMSProvider | None) -> ExternalOMSProvider:
    """Return the given provider, or a new one.

    Raises:
        SettingsError: The given one was made from other settings.
    """
    if given is None:
        return ExternalOMSProvider(settings)
    if given.service.settings != settings:
        raise SettingsError("provider", "was made from other settings than those given beside it; give one of the two")
    return given


def get_oms() -> OMS:
    """Return the state of the extension on the current application."""
    return cast("OMS", current_app.extensions[EXTENSION])


current_oms: OMS = LocalProxy(get_oms)  # type: ignore[assignment]  # a proxy behaves as what it stands for
"""The state of the extension on the current application."""
