"""What the SDK hides and loses: its status is read, a child gets its pool and locks back, nothing else is touched."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from openfeature import _event_support, api
from openfeature.event import EventDetails, ProviderEvent
from openfeature.provider import ProviderStatus
from openfeature.provider._registry import provider_registry

from external_oms import FLAG_KEY, ExternalOMSProvider
from external_oms.sdk import repair_after_fork, status_in_sdk
from external_oms.testing import ConfigAPIEmulator, Fault
from tests.support.waiting import PATIENCE_SECONDS, wait_until


def in_a_child(work: Callable[[], bool]) -> bool:
    """Whether the work comes out well in a forked child."""
    child = os.fork()
    if child == 0:
        signal.alarm(40)
        code = 1
        try:
            code = 0 if work() else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def provider(external_oms_api: ConfigAPIEmulator) -> Iterator[ExternalOMSProvider]:
    yield ExternalOMSProvider(external_oms_api.settings(timeout_seconds=30.0))
    api.shutdown()


def test_the_status_that_the_sdk_keeps_can_be_told(provider: ExternalOMSProvider) -> None:
    assert status_in_sdk(getattr(provider, "_on_emit", None), provider) is None
    api.set_provider_and_wait(provider)
    assert status_in_sdk(getattr(provider, "_on_emit", None), provider) is ProviderStatus.READY


@pytest.mark.parametrize("on_emit", [None, lambda *_: None, "text".upper])
def test_where_the_sdk_is_not_as_known_its_status_cannot_be_told(
    on_emit: Callable[..., object] | None, provider: ExternalOMSProvider
) -> None:
    assert status_in_sdk(on_emit, provider) is None


def test_a_registry_that_answers_something_else_is_not_believed(provider: ExternalOMSProvider) -> None:
    class Other:
        def get_provider_status(self, _provider: object) -> str:
            return "fine"

        def dispatch(self) -> None: ...

    assert status_in_sdk(Other().dispatch, provider) is None


def test_what_is_not_as_known_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unknown:
        pass

    pool, lock = Unknown(), Unknown()
    monkeypatch.setattr(_event_support, "_event_executor", pool)
    monkeypatch.setattr(_event_support, "_global_lock", lock)
    monkeypatch.setattr(provider_registry, "_lock", lock)
    repair_after_fork()
    assert vars(_event_support)["_event_executor"] is pool
    assert vars(_event_support)["_global_lock"] is lock
    assert vars(provider_registry)["_lock"] is lock


def test_an_sdk_of_other_rooms_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("sys").modules, "openfeature._event_support")
    monkeypatch.delitem(__import__("sys").modules, "openfeature.provider._registry")
    repair_after_fork()


def test_in_a_child_event_handlers_run_and_no_lock_of_another_thread_is_waited_for(
    provider: ExternalOMSProvider, external_oms_api: ConfigAPIEmulator
) -> None:
    heard = threading.Event()

    def hear(_details: EventDetails) -> None:
        heard.set()

    api.add_handler(ProviderEvent.PROVIDER_CONFIGURATION_CHANGED, hear)
    api.set_provider_and_wait(provider)
    external_oms_api.set_enabled(None, True)
    provider.refresh()
    assert heard.wait(PATIENCE_SECONDS)  # the parent's pool has a thread, idle from here on
    external_oms_api.set_enabled(None, False)

    def child() -> bool:
        heard.clear()
        provider.refresh()
        return (
            heard.wait(PATIENCE_SECONDS) and api.get_client().get_boolean_value(FLAG_KEY, default_value=True) is False
        )

    held = threading.Event()
    done = threading.Event()

    def hold() -> None:
        with vars(_event_support)["_client_lock"], vars(provider_registry)["_lock"]:
            held.set()
            done.wait(PATIENCE_SECONDS)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(PATIENCE_SECONDS)
    try:
        assert in_a_child(child)
    finally:
        done.set()
        holder.join()
    assert type(vars(_event_support)["_event_executor"]) is ThreadPoolExecutor


@pytest.mark.parametrize("answers", [True, False], ids=["the API answers", "the API is dead"])
def test_an_initialization_under_way_at_the_fork_ends_in_the_child(
    answers: bool, provider: ExternalOMSProvider, external_oms_api: ConfigAPIEmulator
) -> None:
    external_oms_api.set_enabled(None, True)
    external_oms_api.fault(None, Fault(delay_seconds=60.0))  # the parent's read is under way for as long as the test
    if not answers:
        external_oms_api.fault(None, Fault(status=500, times=None))
    api.set_provider(provider)
    wait_until(lambda: external_oms_api.reads() > 0)
    client = api.get_client()
    assert client.get_provider_status() is ProviderStatus.NOT_READY
    ends = ProviderStatus.READY if answers else ProviderStatus.ERROR

    def child() -> bool:
        wait_until(lambda: client.get_provider_status() is ends)
        return client.get_boolean_value(FLAG_KEY, default_value=False) is answers

    assert in_a_child(child)


def test_an_initialization_under_way_with_a_value_at_hand_ends_at_once_in_the_child(
    provider: ExternalOMSProvider, external_oms_api: ConfigAPIEmulator
) -> None:
    external_oms_api.set_enabled(None, True)
    assert provider.enabled()
    api.set_provider_and_wait(provider)
    with provider_registry._lock:
        provider_registry._provider_status[provider] = ProviderStatus.NOT_READY  # as before the first event

    def child() -> bool:
        client = api.get_client()
        ready = client.get_provider_status() is ProviderStatus.READY
        return ready and client.get_boolean_value(FLAG_KEY, default_value=False)

    assert in_a_child(child)
