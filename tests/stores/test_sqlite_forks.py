"""The SQLite store across forks: a child uses nothing of its parent's, and nothing that either does is lost."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from external_oms.entry import Busy, Change, Entry, Granted, Moment
from external_oms.errors import StoreBusy, StoreError
from external_oms.stores import sqlite
from external_oms.stores.sqlite import SqliteStore
from tests.support.clock import FakeClock
from tests.support.contract import TENANT, committed, in_a_fork, invalidated, leased, try_lease, word
from tests.support.waiting import wait_until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.db"


@pytest.fixture
def store(path: Path, clock: FakeClock) -> Iterator[SqliteStore]:
    store = SqliteStore(path, clock=clock)
    yield store
    store.close()


def open_channels(store: SqliteStore) -> int:
    return sum(channel.is_open for channel in (store._writer, store._reader))


def locks_held(path: Path) -> int:
    """Return how many locks this process holds on the database and its shared memory, as the kernel counts them."""
    inodes = {path.stat().st_ino, path.with_name(f"{path.name}-shm").stat().st_ino}
    lines = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
    held = [line for line in lines if "->" not in line and line[4] == str(os.getpid())]
    return sum(int(line[5].rpartition(":")[2]) in inodes for line in held)


def test_no_connection_of_the_parent_reaches_the_child(store: SqliteStore) -> None:
    invalidated(store)
    store.poll()
    assert open_channels(store) == 2
    assert in_a_fork(lambda: open_channels(store) == 0)
    assert invalidated(store) == 2


def test_the_connections_of_the_child_hold_locks_of_their_own(store: SqliteStore, path: Path) -> None:
    """A child that opens a database which its parent had open at the fork believes that it has locks, and has none."""
    invalidated(store)

    def child() -> bool:
        store.load(TENANT)
        return locks_held(path) >= 2

    assert in_a_fork(child)
    store.load(TENANT)
    assert locks_held(path) >= 2


def test_parent_and_child_see_each_others_invalidations_at_once(store: SqliteStore) -> None:
    ours, theirs = os.pipe(), os.pipe()
    before = word(store)
    results: list[bool] = []

    def child() -> bool:
        os.read(ours[0], 1)
        seen = word(store) != before and store.load(TENANT).generation == 1
        invalidated(store)
        os.write(theirs[1], b"x")
        return seen

    forked = threading.Thread(target=lambda: results.append(in_a_fork(child)))
    forked.start()
    invalidated(store)
    remembered = word(store)
    os.write(ours[1], b"x")
    os.read(theirs[0], 1)
    assert word(store) != remembered
    assert store.load(TENANT).generation == 2
    forked.join()
    assert results == [True]
    for pipe in (*ours, *theirs):
        os.close(pipe)


def test_an_idle_child_sees_an_invalidation_through_the_word_that_it_inherited(
    store: SqliteStore, clock: FakeClock
) -> None:
    """A child that does nothing after the fork, as under gunicorn --preload, finds the word changed when it looks."""
    committed(store, leased(store), clock)
    words, index = store.version_ref(TENANT)
    remembered = words[index]
    ours = os.pipe()
    results: list[bool] = []

    def child() -> bool:
        os.read(ours[0], 1)
        return words[index] != remembered and store.version_ref(TENANT)[0] is words

    forked = threading.Thread(target=lambda: results.append(in_a_fork(child)))
    forked.start()
    invalidated(store)
    os.write(ours[1], b"x")
    forked.join()
    assert results == [True]
    for end in ours:
        os.close(end)


def test_the_lease_of_the_parent_is_not_that_of_the_child(store: SqliteStore) -> None:
    leased(store, seconds=60.0)

    def child() -> bool:
        outcome = try_lease(store, seconds=60.0)
        return isinstance(outcome, Busy) and not store.is_gone(outcome.holder) and outcome.holder != store.holder

    assert in_a_fork(child)


def test_a_child_that_dies_with_the_lease_is_known_to_be_gone(store: SqliteStore) -> None:
    assert in_a_fork(lambda: leased(store, seconds=60.0).token == 1)
    outcome = try_lease(store, seconds=60.0)
    assert isinstance(outcome, Busy)
    assert store.is_gone(outcome.holder)
    assert isinstance(try_lease(store, dead_holder=outcome.holder), Granted)


def test_forks_at_any_moment_lose_nothing(store: SqliteStore, path: Path) -> None:
    """Threads invalidate, load and poll while children are forked, each of which invalidates once."""
    forks, stop = 20, threading.Event()
    counts = [0, 0]

    def invalidate(number: int) -> None:
        while not stop.is_set():
            invalidated(store)
            counts[number] += 1

    def look() -> None:
        while not stop.is_set():
            with suppress(StoreBusy):  # a fork of a busy process may take longer than a reader waits
                store.load(TENANT)
                store.poll()

    threads = [threading.Thread(target=invalidate, args=(number,)) for number in range(2)]
    threads.append(threading.Thread(target=look))
    for thread in threads:
        thread.start()
    try:
        done = [
            in_a_fork(lambda: invalidated(store) <= store.load(TENANT).generation and store.health().ok)
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


def test_forks_of_many_threads_at_once_do_not_block_each_other(store: SqliteStore) -> None:
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.append(in_a_fork(lambda: invalidated(store) >= 1))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 6
    assert store.load(TENANT).generation == 6


def test_after_fork_is_idempotent_and_nothing_in_the_parent(store: SqliteStore) -> None:
    invalidated(store)
    holder = store.holder
    store.after_fork()
    assert store.holder == holder
    assert open_channels(store) == 1

    def child() -> bool:
        name, generation = store.holder, invalidated(store)
        store.after_fork()
        return store.holder == name and open_channels(store) == 1 and generation == 2

    assert in_a_fork(child)


def test_a_signal_handler_that_forks_in_the_middle_of_a_transaction_ends_it_and_blocks_nothing(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "FORK_SECONDS", 600.0)  # longer than a test may last: the fork must not wait for it
    children: list[int] = []
    parent = os.getpid()

    def fork(*_: object) -> None:
        children.append(os.fork())

    def transition(entry: Entry, _: Moment) -> Change[None]:
        signal.raise_signal(signal.SIGUSR1)
        return Change(replace(entry, generation=100), None)

    before = signal.signal(signal.SIGUSR1, fork)
    how = signal.SIGUSR2
    try:
        with pytest.raises(StoreBusy, match="a signal handler forked"):
            store.transact(TENANT, transition)
        if os.getpid() != parent and invalidated(store) == 1 and open_channels(store) == 1:
            how = signal.SIGKILL
    finally:
        if os.getpid() != parent:
            os.kill(os.getpid(), how)
        signal.signal(signal.SIGUSR1, before)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == -signal.SIGKILL
    assert store._writer.owner is None
    assert store.load(TENANT).generation == 1
    assert invalidated(store) == 2
    assert locks_held(path) >= 2


def test_a_fork_waits_for_a_transaction_of_another_thread_and_goes_before_others_in_the_queue(
    store: SqliteStore,
) -> None:
    inside, leave = threading.Event(), threading.Event()

    def slow(entry: Entry, _: Moment) -> Change[None]:
        inside.set()
        assert leave.wait(20)
        return Change(entry, None)

    writer = threading.Thread(target=store.transact, args=(TENANT, slow))
    writer.start()
    assert inside.wait(20)
    queued = [threading.Thread(target=invalidated, args=(store,)) for _ in range(5)]
    for thread in queued:
        thread.start()
    wait_until(lambda: len(store._writer._waiting) == 5)
    results: list[bool] = []
    forker = threading.Thread(
        target=lambda: results.append(in_a_fork(lambda: open_channels(store) == 0 and invalidated(store) >= 1))
    )
    forker.start()
    wait_until(lambda: len(store._writer._waiting) == 6)
    assert store._writer._waiting[0][0] == forker.ident
    leave.set()
    for thread in (writer, forker, *queued):
        thread.join()
    assert results == [True]
    assert store.load(TENANT).generation == 6


def test_a_child_forked_in_the_middle_of_a_transaction_that_does_not_end_refuses_the_file(
    store: SqliteStore, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "FORK_SECONDS", 0.01)
    inside, leave = threading.Event(), threading.Event()

    def slow(entry: Entry, _: Moment) -> Change[None]:
        inside.set()
        assert leave.wait(20)
        return Change(entry, None)

    writer = threading.Thread(target=store.transact, args=(TENANT, slow))
    writer.start()
    assert inside.wait(20)

    def child() -> bool:
        for use in (lambda: store.load(TENANT), lambda: invalidated(store), store.poll):
            with pytest.raises(StoreError, match="forked while another thread used the state file"):
                use()
        return sqlite._abandoned != [] and not store.health().ok

    try:
        assert in_a_fork(child)
    finally:
        leave.set()
        writer.join()
    assert invalidated(store) == 1


def test_a_fork_that_python_did_not_make_leaves_the_locks_of_the_parent_alone(store: SqliteStore, path: Path) -> None:
    """Some servers, such as uWSGI, fork in C and run only what Python runs in the child after a fork."""
    invalidated(store)
    store.load(TENANT)
    libc, after = ctypes.CDLL(None), ctypes.pythonapi.PyOS_AfterFork_Child
    held = locks_held(path)
    assert held >= 2
    pid = libc.fork()
    if pid == 0:
        signal.alarm(20)
        how = signal.SIGUSR2
        try:
            after()
            if open_channels(store) == 0 and invalidated(store) == 2 and locks_held(path) >= 2:
                how = signal.SIGUSR1
        finally:
            os.kill(os.getpid(), how)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGUSR1
    assert locks_held(path) == held
    assert store.load(TENANT).generation == 2
    assert invalidated(store) == 3
    store.close()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_processes_of_multiprocessing_share_the_store_of_its_parent(store: SqliteStore) -> None:
    invalidated(store)
    context = multiprocessing.get_context("fork")
    processes, pipes = [], []
    for _ in range(3):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=lambda pipe: pipe.send([invalidated(store) for _ in range(20)]), args=(sender,)
        )
        process.start()
        processes.append(process)
        pipes.append(receiver)
    results = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join(20)
    generations = [generation for some in results for generation in some]
    assert sorted(generations) == list(range(2, 62))
    assert store.load(TENANT).generation == 61
