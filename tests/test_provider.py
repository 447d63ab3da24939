"""The provider behind the SDK's client, against a config API over real HTTP that misbehaves on command."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import gc
import json
import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

import pytest
import requests
from openfeature import api as openfeature
from openfeature.client import OpenFeatureClient
from openfeature.evaluation_context import EvaluationContext
from openfeature.event import ProviderEvent, ProviderEventDetails
from openfeature.exception import (
    ErrorCode,
    FlagNotFoundError,
    GeneralError,
    InvalidContextError,
    ProviderNotReadyError,
    TypeMismatchError,
)
from openfeature.flag_evaluation import FlagEvaluationDetails, FlagResolutionDetails, Reason
from openfeature.hook import Hook, HookContext, HookHints
from openfeature.provider import FeatureProvider, ProviderStatus
from openfeature.provider._registry import ProviderRegistry

from external_oms import (
    FLAG_KEY,
    ExternalOMSProvider,
    NothingToServe,
    Settings,
    TenantError,
    Unavailable,
    WriteConflict,
    wiring,
)
from external_oms.config import Document, Reading
from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.entry import Entry, Snapshot
from external_oms.policy import Freshness
from external_oms.status import TenantStatus
from external_oms.stores.memory import MemoryStore
from tests.support.clock import FakeClock
from tests.support.scripted import SOON, Hand
from tests.support.waiting import wait_until

TENANT, OTHER = "acme-staging", "zulu"
HANG = Fault(delay_seconds=60.0, times=None)
DOWN = Fault(status=500, times=None)


@pytest.fixture
def api() -> Iterator[ConfigAPIEmulator]:
    with ConfigAPIEmulator((TENANT, OTHER), enabled=True) as emulator:
        yield emulator


Make = Callable[..., ExternalOMSProvider]


@pytest.fixture
def make(api: ConfigAPIEmulator) -> Iterator[Make]:
    """Makes providers for the emulator; at the end nothing of them is left in the SDK or in the process."""
    before = set(threading.enumerate())
    made: list[ExternalOMSProvider] = []

    def make_one(
        *tenants: str, store: MemoryStore | None = None, session: requests.Session | None = None, **more: object
    ) -> ExternalOMSProvider:
        provider = ExternalOMSProvider(api.settings(*tenants, **more), store=store, session=session)
        made.append(provider)
        return provider

    yield make_one
    api.clear(TENANT)
    api.clear(OTHER)
    openfeature.shutdown()
    openfeature.clear_providers()
    for provider in made:
        provider.shutdown()
    wait_until(lambda: not [name for name in threads_since(before) if name.startswith("external-oms-")])


def threads_since(before: set[threading.Thread]) -> list[str]:
    emulator = "external-oms-emulator"
    return [thread.name for thread in set(threading.enumerate()) - before if thread.name != emulator]


@dataclasses.dataclass
class Dispatched:
    """What the SDK was told, in the order in which it was."""

    seen: list[tuple[FeatureProvider, ProviderEvent, ProviderEventDetails]]

    def events(self, provider: FeatureProvider, *, changes: bool = False) -> list[str]:
        names = [event.name.removeprefix("PROVIDER_") for of, event, _ in self.seen if of is provider]
        return [name for name in names if changes or name != "CONFIGURATION_CHANGED"]


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Dispatched:
    told = Dispatched([])
    dispatch = ProviderRegistry.dispatch_event

    def dispatch_event(
        self: ProviderRegistry, provider: FeatureProvider, event: ProviderEvent, details: ProviderEventDetails
    ) -> None:
        told.seen.append((provider, event, details))
        dispatch(self, provider, event, details)

    monkeypatch.setattr(ProviderRegistry, "dispatch_event", dispatch_event)
    return told


def status_of(provider: FeatureProvider, domain: str | None = None) -> ProviderStatus:
    client = openfeature.get_client(domain)
    assert client.provider is provider
    return client.get_provider_status()


def old_value(*, enabled: bool = True, age_seconds: float, tenant: str = TENANT) -> MemoryStore:
    """A store in which somebody left a value so long ago."""
    read_at = time.monotonic() - age_seconds
    fetched_at = datetime.fromtimestamp(time.time() - age_seconds, UTC)
    snapshot = Snapshot(enabled, None, None, 0, 1, read_at, fetched_at, 30.0)
    return MemoryStore(entries={tenant: Entry(token=1, snapshot=snapshot)})


def context(tenant: object) -> EvaluationContext:
    attributes: Any = {"tenant": tenant, "order": 7}
    return EvaluationContext("order-7", attributes)


def both_ways(client: OpenFeatureClient, default: bool, where: EvaluationContext | None = None) -> Any:  # noqa: ANN401 - the SDK's details
    """The details of a sync evaluation, which an async one must share."""
    sync = client.get_boolean_details(FLAG_KEY, default, where)
    shared = asyncio.run(client.get_boolean_details_async(FLAG_KEY, default, where))
    assert (shared.value, shared.error_code, shared.variant) == (sync.value, sync.error_code, sync.variant)
    return sync


# -- resolving -----------------------------------------------------------------------------------------------------


def test_the_flag_is_read_once_and_remembered(api: ConfigAPIEmulator, make: Make) -> None:
    provider = make()
    first = provider.resolve_boolean_details(FLAG_KEY, False)
    second = provider.resolve_boolean_details(FLAG_KEY, False)
    third = asyncio.run(provider.resolve_boolean_details_async(FLAG_KEY, False))
    assert (first.value, first.reason, first.variant) == (True, Reason.STATIC, "on")
    assert (second.value, second.reason, second.variant) == (True, Reason.CACHED, "on")
    assert third == second
    assert first.flag_metadata == {**second.flag_metadata, "source": "api"}
    assert second.flag_metadata["source"] == "memory"
    assert second.flag_metadata["tenant"] == TENANT
    assert second.flag_metadata["generation"] == 0
    assert second.flag_metadata["stale"] is False
    assert str(second.flag_metadata["updated_at"]) <= str(second.flag_metadata["fetched_at"])
    assert api.reads() == 1


def test_a_client_of_the_sdk_evaluates_it_both_ways(api: ConfigAPIEmulator, make: Make) -> None:
    api.set_enabled(TENANT, False)
    openfeature.set_provider_and_wait(make())
    client = openfeature.get_client()
    assert client.get_boolean_value(FLAG_KEY, True) is False
    details = both_ways(client, True)
    assert (details.value, details.reason, details.variant) == (False, Reason.CACHED, "off")
    assert client.provider.get_metadata().name == "external-oms"


TYPES: list[tuple[str, Any]] = [("string", "x"), ("integer", 1), ("float", 1.5), ("object", {"a": 1})]


@pytest.mark.parametrize(("kind", "default"), TYPES)
def test_as_another_type_it_mismatches_both_ways_and_the_default_serves(make: Make, kind: str, default: Any) -> None:  # noqa: ANN401 - of four types
    provider = make()
    for key, error in ((FLAG_KEY, TypeMismatchError), ("other", FlagNotFoundError)):
        with pytest.raises(error):
            getattr(provider, f"resolve_{kind}_details")(key, default)
        with pytest.raises(error):
            asyncio.run(getattr(provider, f"resolve_{kind}_details_async")(key, default, EvaluationContext()))
    openfeature.set_provider_and_wait(provider)
    client = openfeature.get_client()
    details = getattr(client, f"get_{kind}_details")(FLAG_KEY, default)
    assert (details.value, details.error_code) == (default, ErrorCode.TYPE_MISMATCH)
    details = asyncio.run(getattr(client, f"get_{kind}_details_async")(FLAG_KEY, default))
    assert (details.value, details.error_code) == (default, ErrorCode.TYPE_MISMATCH)


@pytest.mark.parametrize("default", [True, False])
def test_another_key_is_not_found_and_the_default_serves(make: Make, default: bool) -> None:
    openfeature.set_provider_and_wait(make())
    client = openfeature.get_client()
    details = client.get_boolean_details("other", default)
    assert (details.value, details.error_code, details.reason) == (default, ErrorCode.FLAG_NOT_FOUND, Reason.ERROR)
    details = asyncio.run(client.get_boolean_details_async("other", default))
    assert (details.value, details.error_code) == (default, ErrorCode.FLAG_NOT_FOUND)


def test_the_context_chooses_the_tenant(api: ConfigAPIEmulator, make: Make) -> None:
    api.set_enabled(OTHER, False)
    openfeature.set_provider_and_wait(make(TENANT, OTHER))
    client = openfeature.get_client()
    for _ in range(3):
        assert both_ways(client, False, context(TENANT)).value is True
        assert both_ways(client, True, context(OTHER)).value is False
    assert both_ways(client, True, context(OTHER)).flag_metadata["tenant"] == OTHER
    assert (api.reads(TENANT), api.reads(OTHER)) == (1, 1)


class EvilHash:
    def __hash__(self) -> int:
        return hash(TENANT)

    def __eq__(self, other: object) -> bool:
        return False

    def __repr__(self) -> str:
        return "an evil hash"


ODD = [["acme"], {"a": 1}, {"s"}, 7, 0, True, False, 1.5, b"acme-staging", "", "unknown", "ACME-STAGING", EvilHash()]


@pytest.mark.parametrize("odd", ODD, ids=repr)
@pytest.mark.parametrize("tenants", [(TENANT,), (TENANT, OTHER)])
def test_a_tenant_that_is_none_is_an_invalid_context_whatever_it_is(
    make: Make, odd: object, tenants: tuple[str, ...]
) -> None:
    openfeature.set_provider_and_wait(make(*tenants))
    for default in (True, False):
        details = both_ways(openfeature.get_client(), default, context(odd))
        assert (details.value, details.error_code) == (default, ErrorCode.INVALID_CONTEXT)
        assert details.reason == Reason.ERROR


def test_no_tenant_named_means_the_only_one_and_is_invalid_where_there_are_several(make: Make) -> None:
    one, several = make(TENANT), make(TENANT, OTHER)
    for nameless in (None, EvaluationContext(), EvaluationContext("key", {"other": 1}), context(None)):
        assert one.resolve_boolean_details(FLAG_KEY, False, nameless).value is True
        with pytest.raises(InvalidContextError):
            several.resolve_boolean_details(FLAG_KEY, False, nameless)
        with pytest.raises(InvalidContextError):
            asyncio.run(several.resolve_boolean_details_async(FLAG_KEY, False, nameless))
    assert several.resolve_boolean_details(FLAG_KEY, False, context(TENANT)).value is True
    with pytest.raises(InvalidContextError):
        several.resolve_boolean_details(FLAG_KEY, False, None)


def test_an_invalidation_is_seen_by_the_very_next_evaluation(api: ConfigAPIEmulator, make: Make) -> None:
    provider = make(refresh="lazy", timeout_seconds=30.0)  # so that an evaluation alone begins a read, and it hangs
    for _ in range(2):
        provider.resolve_boolean_details(FLAG_KEY, False)
    for number in range(1, 4):
        api.fault(TENANT, HANG)
        reads = api.reads()
        assert provider.invalidate() == number
        for _ in range(100):
            details = provider.resolve_boolean_details(FLAG_KEY, False)
            assert (details.reason, details.flag_metadata["stale"]) == (Reason.STALE, True)
            assert provider.enabled() is True
        wait_until(lambda: api.reads() == reads + 1)  # noqa: B023 - called at once
        provider.service.clients[TENANT].abort()
        wait_until(lambda: provider.state().failures > 0)
        api.clear(TENANT)
        provider.refresh()
        details = provider.resolve_boolean_details(FLAG_KEY, False)
        assert (details.reason, details.flag_metadata["generation"]) == (Reason.CACHED, number)


# -- metadata ------------------------------------------------------------------------------------------------------


class Poisoner(Hook):
    """A hook that changes what it is handed."""

    def after(self, hook_context: HookContext, details: FlagEvaluationDetails[Any], hints: HookHints) -> None:
        metadata: Any = details.flag_metadata
        metadata["tenant"] = "poison"


def test_who_changes_the_metadata_changes_nothing_for_others(make: Make) -> None:
    provider = make()
    openfeature.set_provider_and_wait(provider)
    client = openfeature.get_client()
    for hooks in ([], [Poisoner()]):
        client.hooks = list(hooks)
        for _ in range(3):
            mine: Any = client.get_boolean_details(FLAG_KEY, False).flag_metadata
            mine["tenant"] = "poison"
            mine.clear()
    client.hooks = []
    assert client.get_boolean_details(FLAG_KEY, False).flag_metadata["tenant"] == TENANT
    assert provider.resolve_boolean_details(FLAG_KEY, False).flag_metadata["tenant"] == TENANT


def test_metadata_survives_whatever_a_caller_does_with_it_through_the_client_and_through_the_provider(
    make: Make,
) -> None:
    provider = make()
    openfeature.set_provider_and_wait(provider)
    for details in (
        openfeature.get_client().get_boolean_details(FLAG_KEY, False),
        asyncio.run(openfeature.get_client().get_boolean_details_async(FLAG_KEY, False)),
        provider.resolve_boolean_details(FLAG_KEY, False),
    ):
        metadata = details.flag_metadata
        assert json.loads(json.dumps(metadata)) == metadata
        assert copy.deepcopy(metadata) == metadata
        assert pickle.loads(pickle.dumps(metadata)) == metadata  # noqa: S301 - our own bytes
        for again in (copy.deepcopy(details), pickle.loads(pickle.dumps(details))):  # noqa: S301 - our own bytes
            assert again.flag_metadata == metadata
        assert dataclasses.asdict(details)["flag_metadata"] == metadata
        assert dataclasses.replace(details, reason=Reason.STALE).flag_metadata == metadata
        assert details.reason == Reason.CACHED


# -- statuses and events -------------------------------------------------------------------------------------------


def test_a_provider_becomes_ready_once(make: Make, dispatched: Dispatched) -> None:
    provider = make()
    openfeature.set_provider_and_wait(provider)
    assert status_of(provider) is ProviderStatus.READY
    wait_until(lambda: provider._open)
    provider.refresh()
    provider.invalidate()
    provider.refresh()
    assert dispatched.events(provider, changes=True) == ["READY"]


@pytest.mark.parametrize("age_seconds", [40.0, 200.0], ids=["served at once", "served once the read has failed"])
def test_a_stored_old_value_makes_it_stale_and_the_ready_of_the_sdk_does_not_hide_that(
    api: ConfigAPIEmulator, make: Make, dispatched: Dispatched, age_seconds: float
) -> None:
    api.fault(TENANT, DOWN)
    provider = make(store=old_value(age_seconds=age_seconds))
    openfeature.set_provider_and_wait(provider)
    wait_until(lambda: status_of(provider) is ProviderStatus.STALE)
    details = both_ways(openfeature.get_client(), False)
    assert (details.value, details.reason) == (True, Reason.STALE)
    assert dispatched.events(provider, changes=True) == ["READY", "STALE"]
    api.clear(TENANT)
    wait_until(lambda: status_of(provider) is ProviderStatus.READY)
    assert dispatched.events(provider, changes=True) == ["READY", "STALE", "READY"]


def test_however_late_the_sdk_says_ready_it_does_not_hide_that_reads_fail(
    api: ConfigAPIEmulator, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    looks: list[int] = []
    dispatch, reconcile = ProviderRegistry.dispatch_event, ExternalOMSProvider._reconcile

    def counted(self: ExternalOMSProvider, tries: int) -> None:
        looks.append(tries)
        reconcile(self, tries)

    def dispatch_late(
        self: ProviderRegistry, of: FeatureProvider, event: ProviderEvent, details: ProviderEventDetails
    ) -> None:
        if not events and event is ProviderEvent.PROVIDER_READY:
            wait_until(lambda: provider._statuses.aggregate() is TenantStatus.STALE)
            before = len(looks)
            wait_until(lambda: len(looks) >= before + 5)  # room for what must not happen
        events.append(event.name)
        dispatch(self, of, event, details)

    monkeypatch.setattr(ProviderRegistry, "dispatch_event", dispatch_late)
    monkeypatch.setattr(ExternalOMSProvider, "_reconcile", counted)
    api.fault(TENANT, DOWN)
    provider = make(store=old_value(age_seconds=200.0))
    openfeature.set_provider_and_wait(provider)
    wait_until(lambda: status_of(provider) is ProviderStatus.STALE)
    assert events == ["PROVIDER_READY", "PROVIDER_STALE"]


def test_with_nothing_to_serve_it_is_in_error_and_becomes_ready_by_itself(
    api: ConfigAPIEmulator, make: Make, dispatched: Dispatched
) -> None:
    api.fault(TENANT, DOWN)
    provider = make()
    with pytest.raises(GeneralError, match=f"{TENANT}.*500"):
        openfeature.set_provider_and_wait(provider)
    assert status_of(provider) is ProviderStatus.ERROR
    details = both_ways(openfeature.get_client(), True)
    assert (details.value, details.error_code, details.reason) == (True, ErrorCode.GENERAL, Reason.ERROR)
    api.clear(TENANT)
    wait_until(lambda: status_of(provider) is ProviderStatus.READY)
    assert openfeature.get_client().get_boolean_value(FLAG_KEY, False) is True
    assert dispatched.events(provider, changes=True) == ["ERROR", "READY"]


def test_the_events_of_an_outage_are_its_edges_each_once(
    api: ConfigAPIEmulator, make: Make, dispatched: Dispatched
) -> None:
    provider = make()
    openfeature.set_provider_and_wait(provider)
    wait_until(lambda: provider._open)
    api.fault(TENANT, DOWN)
    for _ in range(3):
        with pytest.raises(Unavailable):
            provider.refresh()
    wait_until(lambda: status_of(provider) is ProviderStatus.STALE)
    (stale,) = [details for _, event, details in dispatched.seen if event is ProviderEvent.PROVIDER_STALE]
    assert stale.message is not None
    assert "500" in stale.message
    api.clear(TENANT)
    provider.refresh()
    wait_until(lambda: status_of(provider) is ProviderStatus.READY)
    assert dispatched.events(provider, changes=True) == ["READY", "STALE", "READY"]


def test_a_change_of_the_value_is_told_once_with_flag_and_tenant(
    api: ConfigAPIEmulator, make: Make, dispatched: Dispatched
) -> None:
    provider = make(TENANT, OTHER)
    openfeature.set_provider_and_wait(provider)
    heard = threading.Event()
    openfeature.get_client().add_handler(ProviderEvent.PROVIDER_CONFIGURATION_CHANGED, lambda _: heard.set())
    api.set_enabled(OTHER, False)
    assert provider.refresh(OTHER).enabled is False
    for tenant in (TENANT, OTHER):
        provider.invalidate(tenant)
        provider.refresh(tenant)
    assert heard.wait(SOON)
    (told,) = [
        details for _, event, details in dispatched.seen if event is ProviderEvent.PROVIDER_CONFIGURATION_CHANGED
    ]
    assert (told.flags_changed, told.metadata) == ([FLAG_KEY], {"tenant": OTHER})


def test_one_dead_tenant_makes_it_stale_and_hides_nothing_of_the_other(
    api: ConfigAPIEmulator, make: Make, dispatched: Dispatched
) -> None:
    api.fault(OTHER, DOWN)
    provider = make(TENANT, OTHER)
    openfeature.set_provider_and_wait(provider)
    wait_until(lambda: status_of(provider) is ProviderStatus.STALE)
    client = openfeature.get_client()
    assert both_ways(client, False, context(TENANT)).value is True
    assert both_ways(client, True, context(OTHER)).error_code == ErrorCode.GENERAL
    api.clear(OTHER)
    wait_until(lambda: status_of(provider) is ProviderStatus.READY)
    assert dispatched.events(provider) == ["READY", "STALE", "READY"]


def test_of_two_publishers_the_last_word_is_the_newest(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one event is being told, the status of the tenants changes twice more: only the last of these is told."""
    provider = make()
    openfeature.set_provider_and_wait(provider)
    wait_until(lambda: provider._open)
    status, told = [TenantStatus.STALE], []
    telling, go_on = threading.Event(), threading.Event()

    def emit(event: ProviderEvent, details: ProviderEventDetails) -> None:
        told.append(event)
        telling.set()
        assert go_on.wait(SOON)

    monkeypatch.setattr(provider._statuses, "aggregate", lambda: status[0])
    monkeypatch.setattr(provider, "emit", emit)
    first = threading.Thread(target=provider._publish, args=("down",), daemon=True)
    first.start()
    assert telling.wait(SOON)
    for newer in (TenantStatus.READY, TenantStatus.ERROR):
        status[0] = newer
        provider._publish(None)  # comes back at once
    go_on.set()
    first.join(SOON)
    assert told == [ProviderEvent.PROVIDER_STALE, ProviderEvent.PROVIDER_ERROR]


@pytest.mark.parametrize("error", [AttributeError("_on_emit"), RuntimeError("cannot schedule new futures")])
def test_an_event_that_races_with_the_end_of_its_listener_hurts_nobody(make: Make, error: Exception) -> None:
    provider = make()

    def on_emit(of: FeatureProvider, event: ProviderEvent, details: ProviderEventDetails) -> None:
        raise error

    provider.attach(on_emit)
    provider.emit_provider_stale(ProviderEventDetails())
    provider.detach()
    provider.emit_provider_stale(ProviderEventDetails())


def test_events_and_detaching_at_once_raise_nothing(make: Make) -> None:
    provider = make()
    stop = threading.Event()

    def emit() -> None:
        while not stop.is_set():
            provider.emit_provider_stale(ProviderEventDetails())

    with ThreadPoolExecutor(1) as pool:
        emitting = pool.submit(emit)
        for _ in range(2000):
            provider.attach(lambda *_: None)
            provider.detach()
        stop.set()
        emitting.result(SOON)


# -- life ----------------------------------------------------------------------------------------------------------


@pytest.mark.serial
@pytest.mark.parametrize("trouble", ["refuses", "answers 500", "hangs", "drops", "hangs at the token", "html"])
def test_initialize_ends_within_the_timeout_whatever_the_api_does(
    api: ConfigAPIEmulator, make: Make, trouble: str
) -> None:
    faults = {
        "answers 500": DOWN,
        "hangs": HANG,
        "drops": Fault(dropped="headers", times=None),
        "hangs at the token": dataclasses.replace(HANG, where="token"),
        "html": Fault(malformed="html", times=None),
    }
    provider = make(timeout_seconds=0.5)
    if trouble == "refuses":
        api.stop()
    else:
        api.fault(TENANT, faults[trouble])
    began = time.monotonic()
    with pytest.raises(GeneralError):
        openfeature.set_provider_and_wait(provider)
    assert time.monotonic() - began < 5 * 0.5  # promised is timeout_seconds
    assert status_of(provider) is ProviderStatus.ERROR
    with pytest.raises(NothingToServe):
        provider.enabled()


def test_registering_without_waiting_comes_back_at_once_and_defaults_serve_until_it_is_ready(
    api: ConfigAPIEmulator, make: Make, dispatched: Dispatched
) -> None:
    api.fault(TENANT, HANG)
    provider = make(timeout_seconds=20.0)
    openfeature.set_provider(provider)
    early = openfeature.get_client().get_boolean_details(FLAG_KEY, False)
    assert (early.value, early.error_code) == (False, ErrorCode.PROVIDER_NOT_READY)
    wait_until(lambda: api.reads() == 1)
    api.stop()  # lets go what is held back
    wait_until(lambda: status_of(provider) is ProviderStatus.READY)
    assert openfeature.get_client().get_boolean_value(FLAG_KEY, False) is True
    assert dispatched.events(provider, changes=True) == ["READY"]


@pytest.mark.serial
def test_shutdown_while_a_read_hangs_ends_within_a_second_and_leaves_no_thread(
    api: ConfigAPIEmulator, make: Make
) -> None:
    before = set(threading.enumerate())
    provider = make(timeout_seconds=20.0)
    api.fault(TENANT, HANG)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(provider.initialize, EvaluationContext())
        wait_until(lambda: api.reads() == 1)
        began = time.monotonic()
        provider.shutdown()
        assert time.monotonic() - began < 5.0  # promised is a second
        with pytest.raises(GeneralError):
            waiting.result(SOON)  # whoever waits for the read is let go
    wait_until(lambda: not [name for name in threads_since(before) if name.startswith("external-oms")])
    provider.shutdown()
    with pytest.raises(ProviderNotReadyError):
        provider.resolve_boolean_details(FLAG_KEY, True)
    with pytest.raises(ProviderNotReadyError):
        asyncio.run(provider.resolve_boolean_details_async(FLAG_KEY, True))


def test_after_a_shutdown_it_can_be_initialized_again_and_again(
    api: ConfigAPIEmulator, make: Make, dispatched: Dispatched
) -> None:
    provider = make(timeout_seconds=2.0)
    provider.shutdown()  # before it ever began
    for _ in range(3):
        openfeature.set_provider_and_wait(provider)
        for enabled in (False, True):
            api.set_enabled(TENANT, enabled)
            assert provider.refresh().enabled is enabled
            assert openfeature.get_client().get_boolean_value(FLAG_KEY, not enabled) is enabled
        openfeature.shutdown()
        with pytest.raises(ProviderNotReadyError):
            provider.resolve_boolean_details(FLAG_KEY, False)
    assert dispatched.events(provider) == ["READY"] * 3


def test_initialized_again_after_a_shutdown_amid_a_hanging_read_it_reads_at_once(
    api: ConfigAPIEmulator, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """The read that the shutdown broke off is no failure of the API: nothing has to be waited for."""
    provider = make(timeout_seconds=5.0)
    api.fault(TENANT, dataclasses.replace(HANG, times=1))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(provider.enabled)
        wait_until(lambda: api.reads() == 1)
        provider.shutdown()
        with pytest.raises(NothingToServe):
            first.result(SOON)
    assert provider.state().failures == 0
    openfeature.set_provider_and_wait(provider)
    assert provider.enabled() is True
    assert caplog.records == []


def test_after_a_shutdown_and_back_the_background_goes_on(api: ConfigAPIEmulator, make: Make) -> None:
    provider = make()
    openfeature.set_provider_and_wait(provider)
    openfeature.shutdown()
    openfeature.set_provider_and_wait(provider)
    reads = api.reads()
    provider.invalidate()
    wait_until(lambda: api.reads() >= reads + 2)  # the read that follows, and another after a second


def test_initialized_twice_in_a_row_it_goes_on(api: ConfigAPIEmulator, make: Make, dispatched: Dispatched) -> None:
    """Set again on its only domain, the SDK initializes it anew without a shutdown between."""
    provider = make()
    for _ in range(2):
        openfeature.set_provider_and_wait(provider, "orders")
        assert status_of(provider, "orders") is ProviderStatus.READY
    assert openfeature.get_client("orders").get_boolean_value(FLAG_KEY, False) is True
    assert dispatched.events(provider) == ["READY"] * 2
    assert api.reads() == 1


def test_one_provider_on_two_domains_is_shut_down_when_the_last_lets_go(make: Make, dispatched: Dispatched) -> None:
    provider, follower = make(), make()
    openfeature.set_provider_and_wait(provider, "orders")
    openfeature.set_provider_and_wait(provider, "stock")
    assert dispatched.events(provider) == ["READY"]
    openfeature.set_provider_and_wait(follower, "orders")
    assert openfeature.get_client("stock").get_boolean_value(FLAG_KEY, False) is True
    assert not provider._shut
    openfeature.set_provider_and_wait(follower, "stock")
    wait_until(lambda: provider._shut)


def test_two_providers_in_one_process_have_nothing_in_common(
    api: ConfigAPIEmulator, make: Make, dispatched: Dispatched
) -> None:
    api.set_enabled(OTHER, False)
    first, second = make(TENANT), make(OTHER)
    openfeature.set_provider_and_wait(first, "first")
    openfeature.set_provider_and_wait(second, "second")
    assert openfeature.get_client("first").get_boolean_value(FLAG_KEY, False) is True
    assert openfeature.get_client("second").get_boolean_value(FLAG_KEY, True) is False
    wait_until(lambda: first._open and second._open)
    api.fault(TENANT, DOWN)
    with pytest.raises(Unavailable):
        first.refresh()
    wait_until(lambda: status_of(first, "first") is ProviderStatus.STALE)
    assert status_of(second, "second") is ProviderStatus.READY
    first.shutdown()
    assert second.refresh().enabled is False
    assert dispatched.events(second) == ["READY"]


def test_without_a_background_an_evaluation_brings_it_back(
    api: ConfigAPIEmulator, make: Make, dispatched: Dispatched
) -> None:
    api.fault(TENANT, dataclasses.replace(DOWN, times=1))
    provider = make(refresh="lazy")
    with pytest.raises(GeneralError):
        openfeature.set_provider_and_wait(provider)
    wait_until(lambda: openfeature.get_client().get_boolean_value(FLAG_KEY, False))
    wait_until(lambda: status_of(provider) is ProviderStatus.READY)
    assert dispatched.events(provider) == ["ERROR", "READY"]
    assert api.reads() == 2


@pytest.mark.serial
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # newer Pythons warn of what is tested here
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_serves_at_once_and_follows_by_itself(api: ConfigAPIEmulator, make: Make) -> None:
    provider = make()
    openfeature.set_provider_and_wait(provider)
    client = openfeature.get_client()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        code = 1
        try:
            began = time.monotonic()
            warm = client.get_boolean_value(FLAG_KEY, False)
            warm = warm and time.monotonic() - began < 0.5  # promised is a tenth of a second
            changed = threading.Event()
            client.add_handler(ProviderEvent.PROVIDER_CONFIGURATION_CHANGED, lambda _: changed.set())
            written = provider.set_enabled(False).enabled is False
            heard = changed.wait(SOON)
            code = 0 if warm and written and heard and client.get_boolean_value(FLAG_KEY, True) is False else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert client.get_boolean_value(FLAG_KEY, False) is True, "memory is not shared; the parent has its own"
    assert provider.refresh().enabled is False


# -- beside the SDK's ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "known", "served", "variant", "reason"),
    [
        ("default", True, None, None, Reason.ERROR),
        ("default", None, None, None, Reason.ERROR),
        ("on", False, True, "on", Reason.DEFAULT),
        ("on", None, True, "on", Reason.DEFAULT),
        ("off", True, False, "off", Reason.DEFAULT),
        ("off", None, False, "off", Reason.DEFAULT),
        ("last", True, True, "on", Reason.STALE),
        ("last", False, False, "off", Reason.STALE),
        ("last", None, None, None, Reason.ERROR),
    ],
)
def test_what_is_served_when_nothing_may_be(
    api: ConfigAPIEmulator,
    make: Make,
    policy: str,
    known: bool | None,
    served: bool | None,
    variant: str | None,
    reason: Reason,
) -> None:
    api.fault(TENANT, DOWN)
    store = MemoryStore() if known is None else old_value(enabled=known, age_seconds=10_000.0)
    provider = make(store=store, when_expired=policy)
    if policy in {"default", "last"}:
        with pytest.raises(GeneralError):
            openfeature.set_provider_and_wait(provider)
    else:
        openfeature.set_provider_and_wait(provider)
    wait_until(lambda: status_of(provider) is ProviderStatus.ERROR, message="whatever is served, nothing is known")
    for default in (True, False):
        details = both_ways(openfeature.get_client(), default)
        assert (details.value, details.variant, details.reason) == (
            default if served is None else served,
            variant,
            reason,
        )
        assert details.error_code == (ErrorCode.GENERAL if served is None else None)
        if served is not None:
            assert details.flag_metadata["when_expired"] == policy
    if served is None:
        with pytest.raises(NothingToServe) as raised:
            provider.enabled()
        assert isinstance(raised.value.failure, Unavailable)
    else:
        assert provider.enabled() is served


def test_the_short_cut_gives_the_value_and_raises_by_the_same_rules(api: ConfigAPIEmulator, make: Make) -> None:
    api.set_enabled(OTHER, False)
    several, one = make(TENANT, OTHER), make(OTHER)
    for _ in range(3):
        assert several.enabled(TENANT) is True
        assert several.enabled(OTHER) is False
        assert one.enabled() is one.enabled(OTHER) is False
    for name in (None, "unknown"):
        with pytest.raises(TenantError):
            several.enabled(name)
    odd: Any = ["unhashable"]
    with pytest.raises(TenantError):
        several.enabled(odd)
    for method in (several.state, several.refresh, several.invalidate, partial(several.set_enabled, True)):
        with pytest.raises(TenantError):
            method(tenant=None)
    one.shutdown()
    with pytest.raises(NothingToServe):
        one.enabled()


def test_the_state_is_a_value_that_says_where_it_came_from(api: ConfigAPIEmulator, make: Make) -> None:
    provider = make()
    assert provider.state().enabled is None
    assert api.reads() == 0
    began = time.monotonic()
    refreshed = provider.refresh()
    assert (refreshed.enabled, refreshed.freshness, refreshed.source) == (True, Freshness.FRESH, "api")
    state = provider.state()
    assert (state.source, state.tenant, state.generation, state.last_error) == ("memory", TENANT, 0, None)
    assert state.age_seconds is not None
    assert 0 <= state.age_seconds <= time.monotonic() - began
    assert state.updated_at is not None
    assert state.updated_at.tzinfo is UTC
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.enabled = False  # type: ignore[misc]  # what is tested


def test_setting_the_flag_writes_it_and_everybody_sees_it(
    api: ConfigAPIEmulator, make: Make, dispatched: Dispatched
) -> None:
    provider = make()
    openfeature.set_provider_and_wait(provider)
    state = provider.set_enabled(False)
    assert (state.enabled, api.enabled(), api.writes()) == (False, False, 1)
    details = both_ways(openfeature.get_client(), True)
    assert (details.value, details.flag_metadata["generation"]) == (False, 1)
    assert dispatched.events(provider, changes=True) == ["READY", "CONFIGURATION_CHANGED"]
    api.fault(TENANT, Fault(status=409, where="write"))
    with pytest.raises(WriteConflict):
        provider.set_enabled(True)
    assert provider.enabled() is False


def test_it_can_be_used_without_the_sdk_and_with_the_users_own_session(api: ConfigAPIEmulator, make: Make) -> None:
    with requests.Session() as session:
        session.headers["X-Mine"] = "1"
        provider = make(session=session)
        assert provider.enabled() is True
        assert provider.refresh().enabled is True
    assert api.reads() == 2


def test_without_settings_it_reads_the_environment(api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXTERNAL_OMS_TENANT", TENANT)
    monkeypatch.setenv("EXTERNAL_OMS_BASE_URL", api.base_url)
    monkeypatch.setenv("EXTERNAL_OMS_ACCESS_TOKEN", api.access_token())
    provider = ExternalOMSProvider()
    assert provider.enabled() is True
    provider.shutdown()
    assert "token" not in repr(provider)


# -- quiet -----------------------------------------------------------------------------------------------------------


class Timed:
    """A provider on a clock that stands still until told, over a config API that is a variable."""

    def __init__(self, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, **more: object) -> None:
        self.says: bool | Exception | Document | Callable[[], bool] = True
        self.reads = 0
        self.hand = Hand(clock)
        monkeypatch.setattr(wiring, "_read", self._read)
        monkeypatch.setattr(wiring, "Scheduler", lambda **_: self.hand)
        monkeypatch.setattr(wiring, "build_service", partial(wiring.build_service, clock=clock))
        self.provider = ExternalOMSProvider(Settings(tenant=TENANT, access_token="t", **more))

    def _read(self, clients: object, tenant: str, etag: str | None) -> Reading:
        self.reads += 1
        if isinstance(self.says, Exception):
            raise self.says
        if isinstance(self.says, Document):
            return Reading(self.says)
        return Reading(Document(self.says() if callable(self.says) else self.says))

    def details(self) -> FlagResolutionDetails[bool]:
        return self.provider.resolve_boolean_details(FLAG_KEY, False)

    def last(self, seconds: int) -> None:
        for _ in range(seconds):
            self.hand.advance(1.0)
            self.evaluate()

    def evaluate(self) -> Literal["served", "default"]:
        try:
            self.provider.resolve_boolean_details(FLAG_KEY, False)
        except GeneralError:
            return "default"
        return "served"


@pytest.mark.parametrize("deliveries", [False, True], ids=["alone", "with a delivery every ten seconds"])
def test_an_outage_of_two_hours_is_a_handful_of_lines(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, deliveries: bool
) -> None:
    outage = Timed(clock, monkeypatch)
    with caplog.at_level(logging.INFO):
        outage.provider.initialize(EvaluationContext())
        outage.last(60)
        assert caplog.records == []
        outage.says = Unavailable("the config API answered 503", status=503)
        for _ in range(720):
            outage.last(10)
            if deliveries:
                outage.provider.service.operations.deliver(TENANT, delivery_id=None, actor="webhook")
        assert outage.evaluate() == "default"
        outage.says = True
        outage.last(60)
    assert outage.evaluate() == "served"
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert "serving the last value" in lines[0]
    assert "nothing may be served" in lines[1]
    assert "succeed again after" in lines[2]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3


def test_an_api_that_flaps_is_a_line_for_each_change(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outage = Timed(clock, monkeypatch)
    outage.provider.initialize(EvaluationContext())
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            outage.says = Unavailable("down")
            outage.last(40)
            outage.says = True
            outage.last(40)
    assert len(caplog.records) == 10


# -- invalidations and failures over time ----------------------------------------------------------------------------


def test_a_second_invalidation_before_a_read_makes_no_evaluation_wait(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = Timed(clock, monkeypatch, ttl_seconds=300, refresh="lazy")
    assert timed.details().reason is Reason.STATIC
    timed.hand.advance(100.0)
    timed.provider.invalidate()
    timed.provider.invalidate()
    assert timed.details().reason is Reason.STALE


def test_values_move_forward_though_a_delivery_overtakes_every_read(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = Timed(clock, monkeypatch, refresh="lazy")
    assert timed.details().value is True

    def overtaken() -> bool:
        timed.provider.invalidate()
        return False

    timed.says = overtaken
    timed.provider.invalidate()
    timed.details()  # causes the read
    details = timed.details()
    assert (details.value, details.reason) == (False, Reason.STALE)


def test_in_an_outage_the_configured_answer_is_given_without_waiting(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang() -> bool:
        clock.advance(5.0)
        raise Unavailable("no complete response within 5 s")

    timed = Timed(clock, monkeypatch, when_expired="on")
    timed.says = hang
    timed.provider.initialize(EvaluationContext())
    reads = timed.reads
    for _ in range(120):
        timed.hand.advance(1.0)
        began = clock.monotonic()
        details = timed.details()
        assert (details.value, details.reason, clock.monotonic() - began) == (True, Reason.DEFAULT, 0.0)
    assert timed.reads > reads + 3, "the background tries on"


def test_one_updated_at_in_the_future_blocks_no_later_answer(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(clock, monkeypatch, refresh="lazy")
    timed.says = Document(True, updated_at=datetime(2099, 1, 1, tzinfo=UTC))
    assert timed.details().value is True
    timed.says = Document(False, updated_at=datetime(2026, 1, 1, tzinfo=UTC))
    assert timed.provider.refresh().enabled is False


def test_an_invalidation_ends_our_own_back_off_whatever_short_waits_the_api_asked_for(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.SystemRandom.random", lambda _: 0.999)
    timed = Timed(clock, monkeypatch, refresh="lazy")
    assert timed.details().value is True
    timed.says = Unavailable("answered 503", status=503, retry_after_seconds=1.0)
    for _ in range(6):
        with pytest.raises(Unavailable):
            timed.provider.refresh()
        timed.hand.advance(1.5)
    reads = timed.reads
    timed.details()
    assert timed.reads == reads, "our own back-off is longer than the wait that the API asked for"
    timed.says = False
    timed.provider.invalidate()
    timed.details()
    assert (timed.reads, timed.details().value) == (reads + 1, False)


def test_entries_that_were_replaced_are_not_kept(make: Make) -> None:
    provider = make(ttl_seconds=1e6)
    provider.refresh()

    def alive() -> int:
        gc.collect()
        return sum(isinstance(one, Entry) for one in gc.get_objects())

    before = alive()
    for _ in range(20):
        provider.refresh()
    assert alive() < before + 10


# -- odd values ------------------------------------------------------------------------------------------------------


class Odd:
    """Equal to nothing and hashed as a tenant; its text raises."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("no comparison")

    def __hash__(self) -> int:
        return hash(TENANT)

    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


def test_a_tenant_that_cannot_be_compared_or_printed_is_an_invalid_context(make: Make) -> None:
    provider = make()
    openfeature.set_provider_and_wait(provider)
    context = EvaluationContext(attributes={"tenant": Odd()})  # type: ignore[dict-item]  # what is tested
    client = openfeature.get_client()
    assert client.get_boolean_value(FLAG_KEY, False) is True
    assert client.get_boolean_details(FLAG_KEY, False, context).error_code is ErrorCode.INVALID_CONTEXT
    details = asyncio.run(client.get_boolean_details_async(FLAG_KEY, False, context))
    assert details.error_code is ErrorCode.INVALID_CONTEXT
    with pytest.raises(TenantError):
        provider.enabled(Odd())  # type: ignore[arg-type]  # what is tested


def test_a_context_without_attributes_names_no_tenant(make: Make) -> None:
    context = EvaluationContext(attributes=None)  # type: ignore[arg-type]  # what is tested
    assert make().resolve_boolean_details(FLAG_KEY, False, context).value is True


@pytest.mark.parametrize("key", [5, None, Odd, ["x"]])
def test_a_key_that_is_no_text_is_not_found(make: Make, key: Any) -> None:  # noqa: ANN401 - what is tested
    with pytest.raises(FlagNotFoundError):
        make().resolve_boolean_details(key, False)


@pytest.mark.parametrize("value", ["off", 0, None])
def test_what_is_no_boolean_is_not_written(api: ConfigAPIEmulator, make: Make, value: Any) -> None:  # noqa: ANN401 - what is tested
    with pytest.raises(TypeError, match="True or False"):
        make().set_enabled(value)
    assert api.writes() == 0


def test_an_invalidation_by_a_handler_of_events_is_taken(
    api: ConfigAPIEmulator, make: Make, dispatched: Dispatched
) -> None:
    provider = make()
    openfeature.set_provider_and_wait(provider)
    wait_until(lambda: provider._open)

    def invalidate(_: object) -> None:
        provider.invalidate()

    openfeature.add_handler(ProviderEvent.PROVIDER_CONFIGURATION_CHANGED, invalidate)
    api.set_enabled(TENANT, False)
    provider.invalidate()
    wait_until(lambda: provider.state().generation == 2)
    wait_until(lambda: provider.state().freshness == "fresh")
    assert provider.enabled() is False


def test_a_shutdown_by_a_subscriber_ends_everything(api: ConfigAPIEmulator, make: Make) -> None:
    provider = make()
    assert provider.enabled() is True
    provider.service.cache.changes.subscribe(lambda _: provider.shutdown())
    provider.invalidate()
    wait_until(lambda: not [name for name in threads_since(set()) if name.startswith("external-oms-")])
    with pytest.raises(ProviderNotReadyError):
        provider.resolve_boolean_details(FLAG_KEY, False)


@pytest.mark.parametrize("seconds", [-1e7, 1e9, -1.7e9])
def test_a_wall_clock_that_is_set_makes_no_answer_older_or_younger(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    timed = Timed(clock, monkeypatch)
    timed.provider.initialize(EvaluationContext())
    timed.hand.advance(10.0)
    before = timed.provider.state()
    clock.set_wall(clock.wall() + seconds)
    assert timed.provider.state() == before
    timed.says = False
    timed.provider.invalidate()
    assert timed.provider.state().enabled is False
    timed.hand.advance(60.0)
    assert timed.details().reason is Reason.CACHED
