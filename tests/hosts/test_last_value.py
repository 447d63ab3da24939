"""A start with a dead API: the value that the file store kept serves as stale at once, and the provider recovers."""

from __future__ import annotations

from pathlib import Path

import pytest
from openfeature import api as openfeature
from openfeature.flag_evaluation import Reason
from openfeature.provider import ProviderStatus

from external_oms import FLAG_KEY, ExternalOMSProvider, Settings
from external_oms.clock import SystemClock
from external_oms.testing import ConfigAPIEmulator, Fault
from tests.support.clock import SkipClock
from tests.support.waiting import wait_until


@pytest.fixture
def settings(external_oms_api: ConfigAPIEmulator, tmp_path: Path) -> Settings:
    return external_oms_api.settings(store=f"sqlite:///{tmp_path / 'state' / 'state.db'}", timeout_seconds=20.0)


def test_a_start_with_a_dead_api_serves_the_stored_value_as_stale_at_once_and_recovers(
    external_oms_api: ConfigAPIEmulator, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = settings.tenant or ""
    external_oms_api.set_enabled(tenant, True)
    first = ExternalOMSProvider(settings)
    assert first.enabled()
    first.shutdown()
    external_oms_api.fault(tenant, Fault(status=503, delay_seconds=60.0, times=None))
    clock = SkipClock()
    clock.skip(31)  # the stored value's lifetime is half a minute
    monkeypatch.setattr(SystemClock, "monotonic", lambda _: clock.monotonic())
    second = ExternalOMSProvider(settings)
    client = openfeature.get_client("last-value")
    try:
        openfeature.set_provider_and_wait(second, "last-value")
        details = client.get_boolean_details(FLAG_KEY, default_value=False)
        assert client.get_provider_status() is ProviderStatus.READY, "no read has failed yet: the API keeps it waiting"
        assert details.value is True
        assert details.reason == Reason.STALE
        assert details.flag_metadata["source"] == "store"
        assert details.flag_metadata["stale"] is True
        wait_until(lambda: external_oms_api.reads(tenant) == 2)
        external_oms_api.stop()  # lets go what is held back
        wait_until(lambda: client.get_provider_status() is ProviderStatus.STALE)
        external_oms_api.clear(tenant)
        external_oms_api.start()
        wait_until(lambda: client.get_provider_status() is ProviderStatus.READY)
        assert client.get_boolean_details(FLAG_KEY, default_value=False).reason in {Reason.CACHED, Reason.STATIC}
    finally:
        openfeature.clear_providers()


def test_a_start_with_a_dead_api_and_nothing_stored_raises_and_becomes_ready_by_itself(
    external_oms_api: ConfigAPIEmulator, settings: Settings
) -> None:
    tenant = settings.tenant or ""
    external_oms_api.fault(tenant, Fault(status=500, times=None))
    client = openfeature.get_client("first-value")
    try:
        with pytest.raises(Exception, match="500"):
            openfeature.set_provider_and_wait(ExternalOMSProvider(settings), "first-value")
        assert client.get_provider_status() is ProviderStatus.ERROR
        external_oms_api.set_enabled(tenant, True)
        external_oms_api.clear(tenant)
        wait_until(lambda: client.get_provider_status() is ProviderStatus.READY)
        assert client.get_boolean_value(FLAG_KEY, default_value=False) is True
    finally:
        openfeature.clear_providers()
