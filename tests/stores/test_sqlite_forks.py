"""The file store across forks: nothing of the parent is used in the child, and nothing that the child does is lost."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from external_oms.stores import gate, sqlite_file
from external_oms.stores.base import Busy
from external_oms.stores.sqlite import SqliteStore
from tests.stores.contract import TENANT, event, in_a_fork, leased, seen, word
from tests.support.clock import FakeClock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.db"


@pytest.fixture
def store(path: Path, clock: FakeClock) -> Iterator[SqliteStore]:
    store = SqliteStore(path, clock=clock)
    yield store
    store.close()


def connections(store: SqliteStore) -> list[sqlite3.Connection]:
    file = store._backing._file
    assert file is not None
    pools = (file._readers, file._writers, file._poller)
    return [one for pool in pools for one in (*pool._idle, *pool._lent.values())]


def locks_held(path: Path) -> int:
    """How many locks this process holds on the database and its shared memory, as the kernel counts them."""
    inodes = {path.stat().st_ino, path.with_name(f"{path.name}-shm").stat().st_ino}
    lines = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
    held = [line for line in lines if "->" not in line and line[4] == str(os.getpid())]
    return sum(int(line[5].rpartition(":")[2]) in inodes for line in held)


def test_no_connection_of_the_parent_reaches_the_child(store: SqliteStore) -> None:
    store.invalidate(TENANT)
    store.changed()
    assert connections(store)
    assert in_a_fork(lambda: connections(store) == [])
    assert store.invalidate(TENANT) == 2


def test_the_childs_connections_hold_locks_of_their_own(store: SqliteStore, path: Path) -> None:
    """A child that opens a database which its parent had open at the fork believes that it has locks, and has none."""
    store.invalidate(TENANT)

    def child() -> bool:
        store.load(TENANT)
        return locks_held(path) >= 2

    assert in_a_fork(child)
    store.load(TENANT)
    assert locks_held(path) >= 2


def test_a_child_sees_its_parents_invalidations_and_the_parent_its_childs(store: SqliteStore) -> None:
    ours, theirs = os.pipe(), os.pipe()
    before = word(store)

    def child() -> bool:
        os.read(ours[0], 1)
        heard = word(store) != before and store.load(TENANT).generation == 1
        store.invalidate(TENANT)
        os.write(theirs[1], b"x")
        return heard

    forked = threading.Thread(target=lambda: results.append(in_a_fork(child)))
    results: list[bool] = []
    forked.start()
    store.invalidate(TENANT)
    remembered = word(store)
    os.write(ours[1], b"x")
    os.read(theirs[0], 1)
    assert word(store) != remembered
    assert store.load(TENANT).generation == 2
    forked.join()
    assert results == [True]


def test_what_the_parent_stored_is_foreign_to_the_child_and_its_lease_is_not_the_childs(
    store: SqliteStore, clock: FakeClock
) -> None:
    lease = leased(store)
    store.put(lease, seen(lease, clock))
    leased(store, seconds=60.0)

    def child() -> bool:
        return store.load(TENANT).foreign and isinstance(store.acquire(TENANT, seconds=1.0, metered=False), Busy)

    assert in_a_fork(child)
    assert not store.load(TENANT).foreign


def test_a_child_that_dies_with_the_lease_leaves_it_free(store: SqliteStore) -> None:
    assert in_a_fork(lambda: leased(store, seconds=1e6).number == 1)
    assert leased(store).number == 2


def test_forks_at_any_moment_lose_nothing(store: SqliteStore, path: Path) -> None:
    """Threads invalidate, load and poll while children are forked, each of which invalidates once."""
    forks, stop = 20, threading.Event()
    counts = [0, 0]

    def invalidate(number: int) -> None:
        while not stop.is_set():
            store.invalidate(TENANT)
            counts[number] += 1

    def look() -> None:
        while not stop.is_set():
            store.load(TENANT)
            store.changed()

    threads = [threading.Thread(target=invalidate, args=(number,)) for number in range(2)]
    threads.append(threading.Thread(target=look))
    for thread in threads:
        thread.start()
    try:
        done = [
            in_a_fork(lambda: store.invalidate(TENANT) <= store.load(TENANT).generation and store.health().ok)
            for _ in range(forks)
        ]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert done == [True] * forks
    assert store.load(TENANT).generation == sum(counts) + forks
    assert store.health().ok
    store.close()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_child_forked_while_the_store_works_in_memory_goes_on_in_memory(
    path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir()
    path.with_name("state.db.lock").mkdir()
    store = SqliteStore(path, clock=clock)
    store.invalidate(TENANT)
    assert in_a_fork(lambda: store.load(TENANT).generation == 1 and store.invalidate(TENANT) == 2)
    path.with_name("state.db.lock").rmdir()
    clock.advance(2.0)

    def child() -> bool:
        store.changed()
        return store.health().ok and store.load(TENANT).generation == 2

    assert in_a_fork(child)
    store.append(event(clock))
    assert store.load(TENANT).generation == 3, "above the 2 of the child and the 1 of the parent"
    store.close()


def test_a_connection_that_is_still_in_use_at_the_fork_is_never_touched_by_the_child(
    store: SqliteStore, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "WAIT_SECONDS", 0.01)
    inside, leave = threading.Event(), threading.Event()

    def slow(_: sqlite3.Connection) -> None:
        inside.set()
        assert leave.wait(20)

    writer = threading.Thread(
        target=lambda: store._backing.read(slow, lambda _: pytest.fail("the file is in order")), daemon=True
    )
    writer.start()
    assert inside.wait(20)

    def child() -> bool:
        unused = sqlite_file._leaked != []
        return unused and store.invalidate(TENANT) == 1 and store.load(TENANT).generation == 1

    try:
        assert in_a_fork(child)
    finally:
        leave.set()
        writer.join()
    assert store.load(TENANT).generation == 1
