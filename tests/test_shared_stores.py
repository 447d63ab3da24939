"""The provider over real shared stores: what it keeps to itself, what it goes on doing while they fail, and its end."""

from __future__ import annotations

import json
import logging
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests

from external_oms import ExternalOMSProvider, SettingsError, Unavailable
from external_oms.emulator import Fault
from external_oms.errors import StoreError
from external_oms.stores.redis import RedisStore
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


# -- what another release or program leaves in the store --------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.db"


def rewrite(file: Path, change: str) -> None:
    """Change the stored entry as SQL says, and count the version up as a change by a process does."""
    with closing(sqlite3.connect(file, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        database.execute("UPDATE service SET version = version + 1")
        database.execute(f"UPDATE entries SET entry = {change}, version = (SELECT version FROM service)")  # noqa: S608 - of the test
        database.execute("COMMIT")


def test_a_field_of_a_later_release_changes_nothing(
    make: Make, file: Path, external_oms_api: ConfigAPIEmulator
) -> None:
    first = make(store=f"sqlite:///{file}")
    assert first.enabled() is False
    generation = first.invalidate()
    wait_until(lambda: first.state().freshness == "fresh")
    first.shutdown()
    rewrite(file, "json_set(entry, '$.snapshot.region', 'eu', '$.sealed', 1)")
    reads = external_oms_api.reads()
    second = make(store=f"sqlite:///{file}", refresh="lazy")
    state = second.state()
    assert (state.enabled, state.generation, external_oms_api.reads()) == (False, generation, reads)
    assert not list(file.parent.glob("*set-aside*"))


@pytest.mark.parametrize(
    "text",
    ["CAST(x'ff80' AS TEXT)", '\'{"generation": "odd"}\'', "x'00'", "7", "json_set(entry, '$.snapshot.enabled', 'no')"],
)
def test_an_entry_that_cannot_be_decoded_is_reported_once_and_costs_one_read(
    make: Make, file: Path, external_oms_api: ConfigAPIEmulator, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    provider, other = make(store=f"sqlite:///{file}"), make(store=f"sqlite:///{file}")
    assert (provider.enabled(), other.enabled()) == (False, False)
    rewrite(file, text)
    external_oms_api.set_enabled(None, True)
    wait_until(lambda: (provider.state().enabled, other.state().enabled) == (True, True))
    assert not provider.service.store.health().ok or not other.service.store.health().ok
    assert external_oms_api.reads() <= 3
    lines = [record for record in caplog.records if "cannot be decoded" in record.getMessage()]
    assert 1 <= len(lines) <= 2, "at most one for each process"
    assert provider.invalidate() > 0


def test_a_value_that_was_lost_with_the_file_is_read_again_at_once(
    make: Make, file: Path, external_oms_api: ConfigAPIEmulator
) -> None:
    provider = make(store=f"sqlite:///{file}", ttl_seconds=3600.0)
    assert provider.enabled() is False
    for part in file.parent.iterdir():
        part.unlink()
    external_oms_api.set_enabled(None, True)
    # a read that the repair of the loss overtook is stale, and another one follows it
    wait_until(lambda: provider.enabled() and provider.state().freshness == "fresh")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # newer Pythons warn of what is tested here
def test_a_child_that_cannot_verify_a_value_reads_it_and_serves_it_as_fresh(
    make: Make, redis_server: RedisServer, external_oms_api: ConfigAPIEmulator
) -> None:
    provider = make(store=redis_server.url, store_bound_seconds=1.0, ttl_seconds=3600.0, timeout_seconds=1.0)
    assert provider.enabled() is False
    redis_server.freeze()  # the parent has not noticed yet, so the child has nothing but what it inherits
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        code = 1
        try:
            external_oms_api.set_enabled(None, True)  # in the child; the parent answers as before
            state = provider.state()
            wait_until(lambda: provider.refresh().freshness == "fresh")
            code = 0 if state.enabled is False and provider.state().freshness == "fresh" else 2
        finally:
            os._exit(code)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        redis_server.thaw()


ODD = ("[" * 100_000, "{}", "7\n{", '7\n{"generation": 9007199254740992}', '7\n{"paced_until": Infinity}', "\x00", "")


@pytest.mark.parametrize("text", ODD, ids=lambda text: repr(text[:20]))
def test_odd_contents_of_every_key_in_redis_end_no_delivery_and_hide_none(
    make: Make, redis_server: RedisServer, external_oms_api: ConfigAPIEmulator, text: str
) -> None:
    provider = make(store=redis_server.url, store_bound_seconds=1.0)
    assert provider.enabled() is False
    generation = provider.service.operations.deliver("acme-staging", delivery_id="msg_1", actor="webhook").generation
    for key in redis_server.holds():
        redis_server.command("SET", key, text)
    redis_server.command("PUBLISH", "external_oms:2:changes", text)
    external_oms_api.set_enabled(None, True)
    for number in range(3):
        result = provider.service.operations.deliver("acme-staging", delivery_id=f"new_{number}", actor="webhook")
        assert result.generation > generation
        generation = result.generation
    wait_until(lambda: provider.state().freshness == "fresh")
    assert provider.enabled() is True
    assert list(provider.service.operations.history())
    provider.service.store.report([])
    provider.service.store.members()


def test_a_lease_without_an_end_keeps_nobody_from_reading(
    make: Make, redis_server: RedisServer, external_oms_api: ConfigAPIEmulator
) -> None:
    provider = make(store=redis_server.url, store_bound_seconds=1.0, timeout_seconds=1.0, ttl_seconds=1.0)
    assert provider.enabled() is False
    provider.shutdown()
    (key,) = [key for key in redis_server.holds() if key.endswith(":entry")]
    version, _, entry = str(redis_server.command("GET", key)).partition("\n")
    fields: dict[str, Any] = json.loads(entry)
    token = fields["token"] = fields["token"] + 1
    fields["lease"] = {"token": token, "holder": "x", "generation": fields["generation"], "expires_at": 9e10}
    redis_server.command("SET", key, f"{int(version) + 1}\n{json.dumps(fields)}")
    external_oms_api.set_enabled(None, True)
    other = make(store=redis_server.url, store_bound_seconds=1.0, timeout_seconds=1.0, ttl_seconds=1.0)
    wait_until(other.enabled)


# -- threads ----------------------------------------------------------------------------------------------------------


def test_a_read_that_outlasts_the_shutdown_brings_no_thread_back(
    make: Make, redis_server: RedisServer, external_oms_api: ConfigAPIEmulator
) -> None:
    before = threads()
    with requests.Session() as session:
        provider = ExternalOMSProvider(external_oms_api.settings(store=redis_server.url), session=session)
        assert provider.enabled() is False
        reads = external_oms_api.reads()
        external_oms_api.fault(None, Fault(delay_seconds=2.0))
        with ThreadPoolExecutor() as pool:
            refresh = pool.submit(provider.refresh)
            wait_until(lambda: external_oms_api.reads() > reads)
            provider.shutdown()
            with pytest.raises(Unavailable):
                refresh.result(10)
        wait_until(lambda: threads() == before, message="the read ends after the shutdown, and starts a thread")


def test_a_store_made_by_the_caller_serves_others_after_the_first_shutdown(
    make: Make, redis_server: RedisServer, external_oms_api: ConfigAPIEmulator
) -> None:
    store = RedisStore(redis_server.url, bound_seconds=60.0)
    try:
        first, second = make(store=store), make(store=store)
        assert (first.enabled(), second.enabled()) == (False, False)
        first.shutdown()
        external_oms_api.set_enabled(None, True)
        elsewhere = RedisStore(redis_server.url, bound_seconds=60.0)
        make(store=elsewhere).invalidate()
        wait_until(second.enabled, message="the thread that hears of changes has ended")
    finally:
        store.close()
        elsewhere.close()


def test_a_process_without_a_thread_to_spare_evaluates(
    make: Make, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def start_unless_of_redis(thread: threading.Thread) -> None:
        if thread.name == "external-oms-redis":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_unless_of_redis)
    provider = make(store=redis_server.url)
    assert provider.enabled() is False
    assert "thread" in provider.service.store.health().problem
    assert provider.state().freshness == "fresh"
    monkeypatch.undo()
    wait_until(lambda: provider.service.store.health().ok)


def test_reads_that_wait_for_another_process_hold_no_thread_of_the_others(
    file: Path,
) -> None:
    hanging = [f"hangs-{number}" for number in range(4)]
    with ConfigAPIEmulator([*hanging, "works"], enabled=True) as api:
        for tenant in hanging:
            api.fault(tenant, Fault(delay_seconds=60.0, times=None))
        settings = api.settings(*api.tenants, store=f"sqlite:///{file}", timeout_seconds=20.0)
        first = ExternalOMSProvider(settings)
        second = ExternalOMSProvider(settings.replaced(max_concurrent_reads=2))

        def refuse(one: ExternalOMSProvider, name: str) -> None:
            with pytest.raises(Unavailable, match="shut down"):
                one.refresh(name)

        waiting = [threading.Thread(target=refuse, args=(one, name)) for one in (first, second) for name in hanging]
        try:
            for thread in waiting[:4]:
                thread.start()
            wait_until(lambda: all(api.reads(name) for name in hanging))
            for thread in waiting[4:]:
                thread.start()
            with ThreadPoolExecutor() as pool:
                assert pool.submit(second.enabled, "works").result(10) is True
            assert [api.reads(name) for name in hanging] == [1] * 4
        finally:
            first.shutdown()
            second.shutdown()
            for thread in waiting:
                thread.join()


# -- a partition ------------------------------------------------------------------------------------------------------


def test_a_member_that_is_cut_off_serves_no_value_as_fresh_for_longer_than_its_lifetime(
    make: Make, redis_server: RedisServer, external_oms_api: ConfigAPIEmulator
) -> None:
    member = make(store=redis_server.url, store_bound_seconds=0.5, ttl_seconds=3.0, timeout_seconds=1.0)
    assert member.enabled() is False
    redis_server.freeze()
    try:
        external_oms_api.set_enabled(None, True)
        wait_until(lambda: not member.service.store.health().ok)

        def follows() -> bool | None:
            state = member.state()
            assert state.age_seconds is not None
            assert state.freshness != "fresh" or state.age_seconds <= 3.0
            return state.enabled

        wait_until(follows)
    finally:
        redis_server.thaw()
