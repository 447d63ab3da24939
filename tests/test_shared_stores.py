"""The provider over real shared stores: what it keeps to itself, what it goes on doing while they fail, and its end."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from external_oms import ExternalOMSProvider, SettingsError
from external_oms.errors import StoreError
from external_oms.testing import ConfigAPIEmulator
from tests.support.redis import RedisServer
from tests.support.stores import FaultyStore
from tests.support.waiting import wait_until

Make = Callable[..., ExternalOMSProvider]


@pytest.fixture
def make(external_oms_api: ConfigAPIEmulator) -> Iterator[Make]:
    made: list[ExternalOMSProvider] = []

    def provider(
        api: ConfigAPIEmulator = external_oms_api, store: object = None, **more: object
    ) -> ExternalOMSProvider:
        given = {"store": store} if isinstance(store, str) else {}
        own = None if isinstance(store, str) else store
        made.append(ExternalOMSProvider(api.settings(**given, **more), store=own))  # type: ignore[arg-type]  # a stand-in of the tests
        return made[-1]

    yield provider
    for one in made:
        one.shutdown()


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("store")
    if request.param == "sqlite":
        yield f"sqlite:///{directory}/state/state.db"
        return
    with RedisServer(directory) as server:
        yield server.url


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("external-oms")]


def test_two_environments_with_one_tenant_name_and_one_store_never_share_a_value(make: Make, store: str) -> None:
    with ConfigAPIEmulator(enabled=True) as staging, ConfigAPIEmulator(enabled=False) as production:
        one, other = make(staging, store), make(production, store)
        assert (one.enabled(), other.enabled()) == (True, False)
        assert one.invalidate() > 0
        assert other.state().generation == 0
        assert (one.refresh().enabled, other.enabled()) == (True, False)


def test_a_process_that_finds_the_file_locked_waits_and_does_not_give_it_up(
    make: Make, tmp_path: Path, external_oms_api: ConfigAPIEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "state" / "state.db"
    first = make(store=f"sqlite:///{file}", refresh="lazy")
    assert first.enabled() is False
    first.shutdown()
    with closing(sqlite3.connect(file, isolation_level=None)) as other, ThreadPoolExecutor() as pool:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        second = make(store=f"sqlite:///{file}", refresh="lazy")
        evaluation = pool.submit(second.enabled)
        assert second.state().enabled is None, "this one meets the lock"
        other.execute("ROLLBACK")
        other.close()
        assert evaluation.result(20) is False
    assert external_oms_api.reads() == 1, "the value is that of the file"
    assert caplog.records == []


@pytest.mark.serial  # when the read begins
def test_a_read_follows_an_invalidation_at_once(make: Make, store: str, external_oms_api: ConfigAPIEmulator) -> None:
    provider = make(store=store)
    provider.initialize(None)  # type: ignore[arg-type]  # the SDK's context, which is not looked at
    took = 0.0
    for _ in range(3):  # as many as the pace lets through at once
        reads, began = external_oms_api.reads(), time.monotonic()
        provider.invalidate()
        wait_until(lambda: external_oms_api.reads() > reads)  # noqa: B023 - called at once
        took += time.monotonic() - began
        wait_until(lambda: provider.state().freshness == "fresh")
    assert took < 1.5


def test_after_a_shutdown_no_thread_comes_back_whatever_is_called(
    make: Make, store: str, external_oms_api: ConfigAPIEmulator
) -> None:
    before = threads()
    provider = make(store=store)
    assert provider.enabled() is external_oms_api.enabled()
    provider.shutdown()
    wait_until(lambda: threads() == before, message="the shutdown leaves a thread")
    provider.state()
    provider.invalidate()
    assert threads() == before


@pytest.mark.parametrize("fault", [StoreError("down"), ValueError("a defect"), OSError("no such device")])
def test_a_store_that_raises_is_tried_again_after_pauses_and_logged_once(
    make: Make, fault: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    store = FaultyStore()
    provider = make(store=store)
    provider.initialize(None)  # type: ignore[arg-type]  # as above
    store.calls.clear()
    with caplog.at_level(logging.DEBUG, logger="external_oms"):
        store.fault = fault
        wait_until(lambda: len(store.calls) >= 3)
        seen, began = len(store.calls), time.monotonic()
        wait_until(lambda: len(store.calls) >= seen + 4)
        assert time.monotonic() - began >= 0.2, "it is tried without a pause"
        assert provider.enabled() is False, "evaluations go on"
    lines = [record for record in caplog.records if "store" in record.message]
    assert len(lines) == 1, caplog.text


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1:none/0", "redis://127.0.0.1/not-a-number", "redis://127.0.0.1:6379/0?no_such=option"]
)
def test_a_redis_url_that_cannot_be_used_is_refused_at_the_start(make: Make, url: str) -> None:
    before = threads()
    with pytest.raises(SettingsError, match="store"):
        make(store=url)
    assert threads() == before
