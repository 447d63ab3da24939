"""Fixtures of the whole server in this process, over an emulated config API."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from external_oms.clock import SystemClock
from external_oms.emulator import ConfigAPIEmulator
from external_oms.provider import ExternalOMSProvider
from external_oms.settings import Settings
from external_oms.stores.base import Store
from external_oms.web import create_app
from external_oms.web.state import EXTENSION, OMS
from tests.support.clock import FakeClock
from tests.support.web import BEARER, ENTRIES, SECRET, TENANT, Server, StartServer, Threaded


@pytest.fixture
def api() -> Iterator[ConfigAPIEmulator]:
    with ConfigAPIEmulator([TENANT, "globex"]) as emulator:
        yield emulator


@pytest.fixture
def start(api: ConfigAPIEmulator) -> Iterator[StartServer]:
    """Starts servers; ends what they started."""
    providers: list[ExternalOMSProvider] = []

    def started(*tenants: str, shared: Store | None = None, **more: object) -> Server:
        credentials = {"webhook_secrets": [SECRET], "webhook_api_keys": [BEARER], "api_keys": ENTRIES}
        quick = {"ttl_seconds": 30.0, "timeout_seconds": 5.0}
        settings: Settings = api.settings(*tenants, **{**credentials, **quick, **more})
        provider = None if shared is None else ExternalOMSProvider(settings, store=shared)
        app = create_app(settings, provider=provider)
        oms = app.extensions[EXTENSION]
        assert isinstance(oms, OMS)
        providers.append(oms.provider)
        app.wsgi_app = Threaded(app.wsgi_app)  # type: ignore[method-assign]  # Flask's documented way
        return Server(app, app.test_client(), api, oms)

    yield started
    for provider in providers:
        provider.shutdown()


@pytest.fixture
def stop_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[], FakeClock]:
    """Stops the monotonic clock of all servers of the test; from then on it moves by `advance` alone."""

    def stopped() -> FakeClock:
        clock = FakeClock(monotonic=time.monotonic())
        monkeypatch.setattr(SystemClock, "monotonic", lambda _: clock.monotonic())
        return clock

    return stopped


@pytest.fixture
def server(start: StartServer) -> Server:
    return start()


@pytest.fixture
def two(start: StartServer) -> Server:
    """A server of two tenants."""
    return start(TENANT, "globex")
