"""Processes that are killed at any moment lose nothing that was answered and leave nothing stuck."""

from __future__ import annotations

import os
import random
import select
import signal
import sqlite3
import struct
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from external_oms.clock import SYSTEM_CLOCK
from external_oms.config import Snapshot
from external_oms.stores.base import Lease
from external_oms.stores.sqlite import SqliteStore
from tests.stores.contract import TENANT, seen
from tests.support.clock import FakeClock

ANSWER = struct.Struct("=Q")
LIFE_SECONDS = 0.5
WORKERS = 3


def work(path: Path, answers: int) -> None:
    """What a worker does all day, as fast as it can; each generation is told once it was answered."""
    store = SqliteStore(path)
    number = 0
    while True:
        os.write(answers, ANSWER.pack(store.invalidate(TENANT)))
        acquired = store.acquire(TENANT, seconds=LIFE_SECONDS, metered=False)
        if isinstance(acquired, Lease):
            store.put(acquired, read_now(acquired))
        number += 1
        raised = store.deliver(TENANT, f"{os.getpid()}-{number}", seconds=60.0)
        assert raised is not None
        os.write(answers, ANSWER.pack(raised))


def read_now(lease: Lease) -> Snapshot:
    return seen(lease, FakeClock(SYSTEM_CLOCK.monotonic(), SYSTEM_CLOCK.wall()))


def started(path: Path, answers: int) -> int:
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            work(path, answers)
        os._exit(1)
    return pid


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.db"


@pytest.fixture
def workers() -> Iterator[list[int]]:
    pids: list[int] = []
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def collected(answers: int, least: int) -> list[int]:
    """At least so many answered generations, and all that are there."""
    told: list[int] = []
    while len(told) < least:
        assert select.select([answers], [], [], 20.0)[0], "the workers answer no more"
        told += [number for (number,) in ANSWER.iter_unpack(os.read(answers, ANSWER.size * 4096))]
    return told


def kill_in_rounds(path: Path, workers: list[int], rounds: int) -> None:
    chance = random.Random(rounds)
    store = SqliteStore(path)
    answered, tell = os.pipe()
    workers += [started(path, tell) for _ in range(WORKERS)]
    words, slot = store.watch(TENANT)
    for _ in range(rounds):
        collected(answered, chance.randrange(1, 40))
        killed = workers.pop(chance.randrange(WORKERS))
        time.sleep(chance.random() / 500)  # not to wait for anything: to kill at any point of a cycle
        os.kill(killed, signal.SIGKILL)
        os.waitpid(killed, 0)
        highest = max(collected(answered, 1))
        remembered = words[slot]
        assert store.load(TENANT).generation >= highest, "an answered invalidation was lost"
        follow(store)
        assert store.health().ok, store.health().problem
        workers.append(started(path, tell))
        assert words is store.watch(TENANT)[0] or words[slot] != remembered
    while workers:
        pid = workers.pop()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    follow(store)
    store.changed()  # whatever was committed and not said is found by one poll
    followed = store.load(TENANT)
    store.close()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("SELECT generation FROM tenants").fetchone() == (followed.generation,)
    os.close(answered)
    os.close(tell)


def follow(store: SqliteStore) -> None:
    """Get the lease within the life of whoever may hold it, in spite of those who compete for it."""
    until = time.monotonic() + LIFE_SECONDS + 5.0
    while time.monotonic() < until:
        acquired = store.acquire(TENANT, seconds=LIFE_SECONDS, metered=False)
        if isinstance(acquired, Lease):
            store.release(acquired)
            return
    pytest.fail("a lease is stuck")


def test_kill_9_at_any_moment(path: Path, workers: list[int]) -> None:
    kill_in_rounds(path, workers, 30)


@pytest.mark.soak
def test_kill_9_at_any_moment_for_long(path: Path, workers: list[int]) -> None:
    kill_in_rounds(path, workers, 100)
