from __future__ import annotations

import logging
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from time import monotonic

import pytest
from limits.errors import StorageError
from limits.storage import MemoryStorage

from external_oms.problems import Problem
from external_oms.settings import Settings
from external_oms.web.limits import REDIS_SECONDS, FileStorage, Limits
from tests.support.ports import free_port
from tests.support.redis import RedisServer


def settings(store: str = "memory://") -> Settings:
    return Settings(tenant="acme", access_token="x", store=store)


def allowed(limits: Limits, number: int, *, who: str = "ann", per_minute: int = 3) -> int:
    """How many of so many attempts are let through."""
    return sum(refusal(limits, who, per_minute) is None for _ in range(number))


def refusal(limits: Limits, who: str, per_minute: int) -> Problem | None:
    try:
        limits.hit("switch", who, per_minute=per_minute)
    except Problem as refused:
        return refused
    return None


def test_a_refusal_tells_how_long_to_wait_in_whole_seconds() -> None:
    limits = Limits(settings())
    assert refusal(limits, "ann", 1) is None
    refused = refusal(limits, "ann", 1)
    assert refused is not None
    assert (refused.status, refused.kind) == (429, "too_many_requests")
    assert 1 <= int(refused.headers["Retry-After"]) <= 60


def test_what_exceeds_the_number_is_refused_for_who_exceeds_it_alone() -> None:
    limits = Limits(settings())
    assert allowed(limits, 5) == 3
    assert allowed(limits, 2, who="bob") == 2
    limits.hit("refresh", "ann", per_minute=3)


def test_one_thread_at_a_time_counts_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that count at once may start one timer of the library twice, which is an error in both."""
    inside, overlaps, incr = threading.Lock(), [], MemoryStorage.incr

    def slow_incr(storage: MemoryStorage, key: str, expiry: float, amount: int = 1) -> int:
        entered = inside.acquire(blocking=False)
        overlaps.append(not entered)
        try:
            time.sleep(0.001)
            return incr(storage, key, expiry, amount)
        finally:
            if entered:
                inside.release()

    monkeypatch.setattr(MemoryStorage, "incr", slow_incr)
    limits = Limits(settings())
    with ThreadPoolExecutor(8) as pool:
        counted = list(pool.map(lambda _: allowed(limits, 5, per_minute=30), range(8)))
    assert (sum(counted), any(overlaps)) == (30, False)


def test_a_check_counts_nothing() -> None:
    limits = Limits(settings())
    for _ in range(5):
        limits.check("switch", "ann", per_minute=1)
    limits.hit("switch", "ann", per_minute=1)
    with pytest.raises(Problem):
        limits.check("switch", "ann", per_minute=1)


def test_an_ended_session_is_known_in_this_process(caplog: pytest.LogCaptureFixture) -> None:
    limits = Limits(settings())
    assert not limits.is_revoked("one")
    limits.revoke("one")
    assert limits.is_revoked("one")
    assert not limits.is_revoked("two")


def test_an_ended_session_is_known_to_the_fleet_over_redis(redis_server: RedisServer) -> None:
    here, there = (Limits(settings(redis_server.url)) for _ in range(2))
    here.revoke("one")
    assert there.is_revoked("one")


def test_with_a_file_store_the_processes_of_a_host_count_logins_and_ended_sessions_together(tmp_path: Path) -> None:
    here, there = (Limits(settings(f"sqlite:///{tmp_path}/state.db")) for _ in range(2))
    assert [allowed(member, 1) for member in (here, there) * 3] == [1, 1, 1, 0, 0, 0]
    refused = refusal(there, "ann", 3)
    assert refused is not None
    assert 1 <= int(refused.headers["Retry-After"]) <= 61
    here.revoke("one")
    assert (there.is_revoked("one"), there.is_revoked("two")) == (True, False)
    (file,) = tmp_path.iterdir()
    assert (file.name, file.stat().st_mode & 0o777) == ("state.db-limits", 0o600)


def test_the_counts_of_a_file_begin_anew_with_each_window(tmp_path: Path) -> None:
    now = [time.time()]
    limits = Limits(settings(f"sqlite:///{tmp_path}/state.db"), wall=lambda: now[0])
    assert allowed(limits, 5) == 3
    now[0] += 61
    assert allowed(limits, 5) == 3


def test_many_processes_count_exactly_in_a_file(tmp_path: Path) -> None:
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            os._exit(allowed(Limits(settings(f"sqlite:///{tmp_path}/state.db")), 10, per_minute=15))
        children.append(child)
    passed = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sum(passed) == 15


def test_a_file_that_cannot_be_used_costs_one_line_and_each_process_counts_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state.db-limits").write_bytes(b"no database" * 100)
    assert allowed(Limits(settings(f"sqlite:///{tmp_path}/state.db")), 5) == 3
    assert len(caplog.records) == 1


def test_redis_that_counts_again_is_told_at_the_level_of_its_failure(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [time.time()]
    limits = Limits(settings(redis_server.url), wall=lambda: now[0])
    shared = limits._ready()[0]
    assert shared is not None
    with monkeypatch.context() as broken:
        broken.setattr(shared, "incr", failing)
        limits.hit("switch", "ann", per_minute=3)
        limits.hit("switch", "ann", per_minute=3)
    now[0] += 11
    limits.hit("switch", "ann", per_minute=3)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "rate limits are counted per process: the shared counter does not answer"),
        ("WARNING", "rate limits are counted together again"),
    ]


def failing(*_: object, **__: object) -> int:
    raise StorageError(OSError("no Redis"))


def test_each_app_counts_for_itself() -> None:
    assert [allowed(Limits(settings()), 5) for _ in range(2)] == [3, 3]


@pytest.fixture
def deaf() -> Iterator[int]:
    """The port of something that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as server:
        yield server.getsockname()[1]


def test_over_redis_all_members_of_a_fleet_count_together(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    members = [Limits(settings(redis_server.url)) for _ in range(2)]
    passed = [allowed(member, 1) for member in members * 3]
    assert passed == [1, 1, 1, 0, 0, 0]
    assert caplog.records == []


def test_a_dead_redis_costs_little_and_each_process_counts_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="external_oms")
    limits = Limits(settings(f"redis://:secret-of-redis@127.0.0.1:{free_port()}/0"))
    assert allowed(limits, 5) == 3
    assert len(caplog.records) == 1, "Redis was asked once"
    assert "secret-of-redis" not in caplog.text


def test_what_another_program_puts_in_the_place_of_a_count_is_not_counted_on(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="external_oms")
    limits = Limits(settings(redis_server.url))
    assert allowed(limits, 1) == 1
    with redis_server.client() as client:
        (count,) = client.keys("external_oms:limits*")
        client.set(count, "[" * 100_000)
    limits.check("switch", "ann", per_minute=3)
    assert allowed(limits, 5) == 3
    assert len(caplog.records) == 1


@pytest.mark.serial
def test_a_deaf_redis_holds_one_request_up_and_no_other(deaf: int, caplog: pytest.LogCaptureFixture) -> None:
    limits = Limits(settings(f"redis://127.0.0.1:{deaf}/0"))
    began = monotonic()
    assert allowed(limits, 5) == 3
    assert monotonic() - began < 5 * REDIS_SECONDS  # promised is REDIS_SECONDS
    assert len(caplog.records) == 1, "Redis was asked once"


def test_redis_is_asked_again_after_a_rest(deaf: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="external_oms")
    now = [1_000_000.0]
    limits = Limits(settings(f"redis://127.0.0.1:{deaf}/0"), wall=lambda: now[0])
    limits.hit("switch", "ann", per_minute=100)
    limits.hit("switch", "ann", per_minute=100)
    assert len(caplog.records) == 1
    now[0] += 11
    limits.hit("switch", "ann", per_minute=100)
    assert limits._failed_at == now[0]
    assert len(caplog.records) == 1, "one line for one failure, however long it lasts"


@pytest.mark.parametrize("store", ["rediss+cluster://127.0.0.1:1", "unix:///nowhere/redis.sock"])
def test_a_form_of_redis_that_cannot_be_used_counts_alone(store: str) -> None:
    assert allowed(Limits(settings(store)), 5) == 3


@pytest.mark.filterwarnings(
    "ignore:.*multi-threaded.*:DeprecationWarning"
)  # forking under threads is this test's subject
def test_a_forked_child_counts_on_its_own_without_waiting_for_its_parents_locks() -> None:
    limits = Limits(settings())
    allowed(limits, 3)
    with limits._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if allowed(limits, 5) == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_session_is_looked_up_while_another_process_writes_the_file(tmp_path: Path) -> None:
    limits = Limits(settings(f"sqlite:///{tmp_path}/state.db"))
    assert not limits.is_revoked("before"), "there is no file yet"
    limits.revoke("ended")
    with closing(sqlite3.connect(tmp_path / "state.db-limits", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        other = Limits(settings(f"sqlite:///{tmp_path}/state.db"))
        assert [other.is_revoked("ended"), other.is_revoked("open")] == [True, False]
        assert other._failed_at is None


def test_a_file_of_counts_is_a_storage_as_the_library_knows_it(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path / "counts", wall=time.time)
    assert storage.check()
    assert [storage.incr("a", 60), storage.incr("a", 60), storage.incr("b", 60)] == [1, 2, 1]
    storage.clear("a")
    assert [storage.get("a"), storage.get("b")] == [0, 1]
    assert storage.get_expiry("a") <= time.time() < storage.get_expiry("b")
    storage.reset()
    assert storage.get("b") == 0
