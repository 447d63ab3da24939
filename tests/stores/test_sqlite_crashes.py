"""Processes that are killed at any moment lose nothing that was answered and leave nothing stuck."""

from __future__ import annotations

import os
import random
import select
import signal
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from external_oms.clock import SYSTEM_CLOCK
from external_oms.entry import Busy, Change, Entry, Granted, Moment
from external_oms.stores import sqlite_file
from external_oms.stores.sqlite import SqliteStore
from external_oms.stores.versions import VersionTable
from tests.support.clock import FakeClock
from tests.support.contract import TENANT, committed, delivered, event, invalidated, released, try_lease, word

ANSWER = struct.Struct("=Q")
LEASE_SECONDS = 0.5
WORKERS = 3
HISTORY_ROWS = 1_000_000
"""More than are written, so that the history has a row of each delivery at the end."""


def work(path: Path, answers: int) -> None:
    """Invalidate and read as fast as possible; each generation is reported once it was answered."""
    store = SqliteStore(path, history_rows=HISTORY_ROWS)
    number = 0
    while True:
        os.write(answers, ANSWER.pack(invalidated(store)))
        outcome = try_lease(store, seconds=LEASE_SECONDS)
        if isinstance(outcome, Granted):
            committed(store, outcome.lease, now())
        number += 1
        result = delivered(store, f"{os.getpid()}-{number}", row=event(now()))
        assert not result.duplicate
        os.write(answers, ANSWER.pack(result.generation))


def now() -> FakeClock:
    return FakeClock(SYSTEM_CLOCK.monotonic(), SYSTEM_CLOCK.wall())


def forked(do: Callable[[], object]) -> int:
    """Run the work in a child and return its PID."""
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            do()
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
    """Return at least so many answered generations, and all that are there."""
    generations: list[int] = []
    while len(generations) < least:
        assert select.select([answers], [], [], 20.0)[0], "the workers answer no more"
        generations += [number for (number,) in ANSWER.iter_unpack(os.read(answers, ANSWER.size * 4096))]
    return generations


def kill_in_rounds(path: Path, workers: list[int], rounds: int) -> None:
    chance = random.Random(rounds)
    store = SqliteStore(path, history_rows=HISTORY_ROWS)
    answered, answers = os.pipe()
    workers += [forked(lambda: work(path, answers)) for _ in range(WORKERS)]
    for _ in range(rounds):
        collected(answered, chance.randrange(1, 40))
        killed = workers.pop(chance.randrange(WORKERS))
        time.sleep(chance.random() / 500)  # not to wait for anything: to kill at any point of a cycle
        os.kill(killed, signal.SIGKILL)
        os.waitpid(killed, 0)
        highest = max(collected(answered, 1))
        assert store.load(TENANT).generation >= highest, "an answered invalidation was lost"
        get_the_lease(store)
        assert store.health().ok, store.health().problem
        workers.append(forked(lambda: work(path, answers)))
    while workers:
        pid = workers.pop()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    before = word(store)
    changed = tuple(store.poll())
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        ((version,),) = database.execute("SELECT version FROM entries").fetchall()
        (rows,) = database.execute("SELECT count(*) FROM history WHERE event LIKE '%invalidated%'").fetchone()
        (ids,) = database.execute("SELECT count(*) FROM delivery_ids").fetchone()
    assert rows == ids, "a delivery and its history row are stored together or not at all"
    assert before == version or word(store) != before or changed == (), "one poll finds what was never published"
    store.close()
    os.close(answered)
    os.close(answers)


def get_the_lease(store: SqliteStore) -> None:
    """Get the lease soon after the process that holds it has ended, in spite of those who compete for it."""
    until = time.monotonic() + LEASE_SECONDS + 10.0
    outcome = try_lease(store, seconds=LEASE_SECONDS)
    while time.monotonic() < until:
        if isinstance(outcome, Granted):
            released(store, outcome.lease)
            return
        assert isinstance(outcome, Busy)
        dead = outcome.holder if store.is_gone(outcome.holder) else None
        outcome = try_lease(store, seconds=LEASE_SECONDS, dead_holder=dead)
    pytest.fail("a lease is stuck")


def test_kill_9_at_any_moment(path: Path, workers: list[int]) -> None:
    kill_in_rounds(path, workers, 30)


@pytest.mark.soak
def test_kill_9_at_any_moment_for_long(path: Path, workers: list[int]) -> None:
    kill_in_rounds(path, workers, 200)


# -- at a given point --------------------------------------------------------------------------------------------------


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def died(do: Callable[[], object]) -> bool:
    """Return whether the work was killed in a child, as it should be."""
    pid = forked(do)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_a_process_killed_between_commit_and_publication_hides_no_invalidation(path: Path) -> None:
    store = SqliteStore(path)
    generation = invalidated(store)
    store.poll()
    seen = word(store)

    def child() -> None:
        VersionTable.publish = die  # type: ignore[method-assign]  # in this child alone
        invalidated(store)

    assert died(child)
    assert word(store) == seen, "nobody has published the change"
    assert tuple(store.poll()) == (TENANT,)
    assert word(store) != seen
    assert store.load(TENANT).generation == generation + 1
    store.close()


def test_a_process_killed_before_the_commit_changes_nothing_and_holds_no_lock(path: Path) -> None:
    store = SqliteStore(path)
    generation = delivered(store, "msg_1").generation
    seen = word(store)

    def child() -> None:
        def transition(entry: Entry, _: Moment) -> Change[None]:
            die()
            return Change(entry, None)

        store.transact(TENANT, transition, delivery_ids=["msg_2"])

    assert died(child)
    assert word(store) == seen
    assert store.load(TENANT).generation == generation
    assert not delivered(store, "msg_2").duplicate
    store.close()


@pytest.mark.parametrize("where", ["_make_tables", "_service", "_rebase_after_boot"])
def test_a_process_killed_while_it_makes_the_file_leaves_one_that_can_be_used(
    path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def child() -> None:
        setattr(sqlite_file, where, die)
        invalidated(SqliteStore(path))

    assert died(child)
    store = SqliteStore(path)
    assert invalidated(store) == 1
    assert store.health().ok, store.health()
    store.close()


def test_a_process_killed_before_it_makes_the_version_table_leaves_a_file_that_can_be_used(path: Path) -> None:
    def child() -> None:
        VersionTable.create = die  # type: ignore[assignment, method-assign]  # in this child alone
        invalidated(SqliteStore(path))

    assert died(child)
    store = SqliteStore(path)
    assert invalidated(store) == 1
    assert store.health().ok
    store.close()


@pytest.mark.parametrize("renames", [1, 2, 4])
def test_a_process_killed_while_it_sets_a_file_aside_deletes_nothing(path: Path, renames: int) -> None:
    store = SqliteStore(path)
    invalidated(store)
    store.close()
    found = {"": b"no database at all, but a text of some length\n" * 2000, "-wal": b"a log"}
    for part, content in found.items():
        beside = path.with_name(f"state.db{part}")
        beside.write_bytes(content)
        beside.chmod(0o600)
    rename, left = Path.rename, iter(range(renames))

    def child() -> None:
        def counted(self: Path, target: Path) -> Path:
            renamed = rename(self, target)
            if next(left) == renames - 1:
                die()
            return renamed

        Path.rename = counted  # type: ignore[assignment, method-assign]  # in this child alone
        invalidated(SqliteStore(path))

    assert died(child)
    later = SqliteStore(path)
    assert invalidated(later) == 1
    kept = [entry.read_bytes() for entry in path.parent.iterdir() if ".set-aside-" in entry.name]
    assert all(content in kept for content in found.values())
    later.close()
