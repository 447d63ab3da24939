"""The SQLite store against the contract of shared stores, and what it alone promises."""

from __future__ import annotations

import fcntl
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from external_oms.clock import SYSTEM_CLOCK
from external_oms.entry import Busy, Change, Entry, Granted
from external_oms.errors import StoreBusy, StoreError
from external_oms.records import Cause, Member
from external_oms.stores.base import DELIVERY_ID_SECONDS, Store
from external_oms.stores.sqlite import READ_SECONDS, FairLock, SqliteStore, _Channel
from external_oms.stores.sqlite_file import OpenFile, open_file
from external_oms.stores.versions import VersionTable
from tests.support.clock import FakeClock
from tests.support.contract import (
    DEADLINE_SECONDS,
    TENANT,
    MakeElsewhere,
    MakeStore,
    SharedStoreContract,
    committed,
    delivered,
    elsewhere,
    event,
    in_a_fork,
    invalidated,
    leased,
    try_lease,
    word,
)
from tests.support.waiting import wait_until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.db"


class TestSqliteStore(SharedStoreContract):
    @pytest.fixture
    def make_store(self, clock: FakeClock, path: Path) -> Iterator[MakeStore]:
        made: list[Store] = []

        def make(
            *,
            history_rows: int = 10_000,
            history_seconds: float = 30 * 86_400.0,
            keys: Mapping[str, str] | None = None,
        ) -> Store:
            store = SqliteStore(
                path, keys=keys, clock=clock, history_rows=history_rows, history_seconds=history_seconds
            )
            made.append(store)
            return store

        yield make
        for store in made:
            store.close()

    @pytest.fixture
    def make_elsewhere(self, path: Path) -> MakeElsewhere:
        return partial(SqliteStore, path)


def made(path: Path, clock: FakeClock, **settings: object) -> SqliteStore:
    """Return a store whose file is open, and whose poll has nothing to report."""
    store = SqliteStore(path, clock=clock, **settings)  # type: ignore[arg-type]  # settings by name
    store.poll()
    return store


@pytest.fixture
def store(path: Path, clock: FakeClock) -> Iterator[SqliteStore]:
    store = made(path, clock)
    yield store
    store.close()


@pytest.fixture
def other(store: SqliteStore, path: Path, clock: FakeClock) -> Iterator[SqliteStore]:
    """Another handle, as another process has one."""
    other = made(path, clock)
    yield other
    other.close()


@contextmanager
def database(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the file as another program does."""
    with closing(sqlite3.connect(path, isolation_level=None, timeout=20.0)) as connection:
        yield connection


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a writer."""
    with database(path) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def connection(channel: _Channel, store: SqliteStore) -> sqlite3.Connection:
    """Return the connection of a store, which is open."""
    assert store._file is not None
    return channel.connection(store._file)


def set_aside(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir() if ".set-aside-" in entry.name)


# -- poll and version words --------------------------------------------------------------------------------------------


def test_a_poll_does_not_report_the_changes_of_the_own_handle(store: SqliteStore, clock: FakeClock) -> None:
    invalidated(store)
    committed(store, leased(store), clock)
    store.append(event(clock))
    assert tuple(store.poll()) == ()


def test_a_poll_reports_a_change_that_the_own_change_came_after(store: SqliteStore, other: SqliteStore) -> None:
    invalidated(other)
    invalidated(store)
    assert tuple(store.poll()) == (TENANT,)
    assert tuple(store.poll()) == ()


def test_a_poll_leaves_words_alone_that_were_published(store: SqliteStore, other: SqliteStore) -> None:
    invalidated(other)
    before = word(store)
    assert tuple(store.poll()) == (TENANT,)
    assert word(store) == before


def test_a_poll_changes_the_word_of_a_change_that_was_never_published(
    store: SqliteStore, other: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the process that committed it is killed before it publishes."""
    monkeypatch.setattr(VersionTable, "publish", lambda *_: None)
    before = word(store)
    generation = invalidated(other)
    assert word(store) == before
    assert tuple(store.poll()) == (TENANT,)
    assert word(store) != before
    assert store.load(TENANT).generation == generation


def test_two_keys_that_share_a_word_hide_no_change_from_each_other(
    store: SqliteStore, other: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VersionTable, "index", staticmethod(lambda _: 8))
    invalidated(other, "one")
    invalidated(other, "two")
    assert set(store.poll()) == {"one", "two"}
    published = word(store, "one")
    assert tuple(store.poll()) == ()
    assert word(store, "one") == published, "the word has the later version, which is the one of both"
    monkeypatch.setattr(VersionTable, "publish", lambda *_: None)
    invalidated(other, "one")
    store.poll()
    assert word(store, "two") != published


def test_a_poll_reads_nothing_where_nothing_was_committed(store: SqliteStore) -> None:
    statements: list[str] = []
    connection(store._reader, store).set_trace_callback(statements.append)
    store.poll()
    store.poll()
    assert [statement for statement in statements if "entries" in statement] == []


def test_a_loaded_version_word_is_that_of_the_counter_and_never_repeated_by_a_new_file(
    path: Path, clock: FakeClock
) -> None:
    words = set()
    for number in range(20):
        store = made(path.with_name(f"{number}.db"), clock)
        invalidated(store)
        words.add(word(store) >> 32)
        store.close()
    assert len(words) > 15, "each file begins its counter at another place"


# -- rows that cannot be decoded ---------------------------------------------------------------------------------------

MALFORMED = {
    "no JSON": "'{'",
    "a text that is no UTF-8": "CAST(x'7bff7d' AS TEXT)",
    "a blob": "x'00ff'",
    "a number": "7",
    "a generation beyond the range": """'{"generation": 4503599627370496}'""",
    "a value of another type": """'{"snapshot": {"enabled": "no"}}'""",
    "JSON of great depth": "'" + "[" * 50_000 + "'",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_row_that_cannot_be_decoded_counts_as_empty_until_a_change_sets_it_aside(
    store: SqliteStore, other: SqliteStore, path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    invalidated(store)
    store.poll()
    with database(path) as connection:
        connection.execute(f"UPDATE entries SET entry = {text}")  # noqa: S608 - a text of this file
        ((kept,),) = connection.execute("SELECT entry FROM entries").fetchall() if "ff7d" not in text else ((None,),)
    before = word(store)
    for _ in range(50):
        assert store.load(TENANT) == Entry()
        store.poll()
    assert word(store) == before, "nobody is made to load again and again"
    assert len(caplog.records) == 1
    assert TENANT in caplog.text
    assert not store.health().ok
    assert TENANT in store.health().problem
    assert invalidated(store) == 1
    assert store.load(TENANT).generation == other.load(TENANT).generation == 1
    with database(path) as connection:
        ((key, aside),) = connection.execute("SELECT key, CAST(text AS BLOB) FROM set_aside").fetchall()
    assert key == TENANT
    if kept is not None:
        assert aside == (kept if isinstance(kept, bytes) else str(kept).encode())
    assert store.history()[0].cause is Cause.STORE
    assert store.history()[0].tenant == TENANT
    assert not store.health().ok, "for a minute"
    assert other.health().ok


def test_a_version_of_another_type_is_a_row_that_cannot_be_decoded(
    store: SqliteStore, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    invalidated(store)
    with database(path) as connection:
        connection.execute("UPDATE entries SET version = 'x'")
    for _ in range(3):
        store.poll()
        assert store.load(TENANT) == Entry()
    assert len(caplog.records) == 1
    assert invalidated(store) == 1


def test_a_second_malformed_row_is_reported_again(
    store: SqliteStore, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    invalidated(store)
    for version in (1, 2, 2):
        with database(path) as connection:
            connection.execute("UPDATE entries SET entry = '{', version = ?", (version,))
        store.load(TENANT)
    assert len(caplog.records) == 2


def test_a_transition_that_changes_nothing_leaves_a_malformed_row(store: SqliteStore, path: Path) -> None:
    invalidated(store)
    with database(path) as connection:
        connection.execute("UPDATE entries SET entry = '{'")
    store.transact(TENANT, lambda entry, _: Change(entry, None))
    with database(path) as connection:
        assert connection.execute("SELECT entry FROM entries").fetchall() == [("{",)]
        assert connection.execute("SELECT * FROM set_aside").fetchall() == []


def test_rows_of_history_and_members_that_cannot_be_decoded_are_left_out(
    store: SqliteStore, path: Path, clock: FakeClock
) -> None:
    for number in range(300):
        store.append(event(clock, detail=str(number)))
    store.report([Member(f"host:{number}", TENANT, 1, True, "fresh", 1.0) for number in range(4)])
    with database(path) as connection:
        connection.execute("UPDATE history SET event = '{' WHERE id > 20")
        connection.execute("UPDATE history SET event = CAST(x'ff' AS TEXT) WHERE id = 20")
        connection.execute("UPDATE history SET event = 7 WHERE id = 19")
        connection.execute("UPDATE members SET member = '[' WHERE name = 'host:0'")
        connection.execute("UPDATE members SET at = 'x' WHERE name = 'host:1'")
        connection.execute("UPDATE members SET member = 7 WHERE name = 'host:2'")
    assert [row.detail for row in store.history(limit=300)] == [str(number) for number in range(17, -1, -1)]
    assert len(store.history(tenant=TENANT, limit=300)) == 18
    assert [member.name for member in store.members()] == ["host:3"]
    assert [member.name for member in store.members(TENANT)] == ["host:3"]


# -- locks of others ---------------------------------------------------------------------------------------------------


def test_writers_of_others_are_waited_for(store: SqliteStore, path: Path) -> None:
    release, results = threading.Event(), []

    def hold() -> None:
        with locked(path):
            held.set()
            assert release.wait(20)

    held = threading.Event()
    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(20)
    waiting = threading.Thread(target=lambda: results.append(invalidated(store)))
    waiting.start()
    wait_until(lambda: store._writer.owner is not None)
    assert results == []
    release.set()
    waiting.join()
    holder.join()
    assert results == [1]


def test_a_writer_that_never_ends_makes_the_store_busy_and_never_unusable(
    store: SqliteStore, path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("external_oms.stores.sqlite.BUSY_SECONDS", 0.02)
    generation = invalidated(store)
    with locked(path):
        with pytest.raises(StoreBusy, match=r"other processes keep .* locked; try again"):
            invalidated(store)
        assert store.load(TENANT).generation == generation, "readers do not wait for writers"
        assert tuple(store.poll()) == ()
        assert store.health().ok
    assert invalidated(store) == generation + 1
    assert caplog.records == []


def test_a_reader_waits_for_a_process_that_opens_or_closes_the_database(store: SqliteStore, path: Path) -> None:
    invalidated(store)
    store.close()
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with database(path) as connection:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("BEGIN EXCLUSIVE")
            held.set()
            assert release.wait(20)
            connection.execute("ROLLBACK")

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(20)
    with pytest.raises(StoreBusy):
        store.load(TENANT)
    threading.Timer(READ_SECONDS / 4, release.set).start()
    generations: list[int] = []
    until = time.monotonic() + 20
    while not generations and time.monotonic() < until:
        with suppress(StoreBusy):
            generations.append(store.load(TENANT).generation)
    holder.join()
    assert generations == [1]
    assert store.health().ok


def test_a_file_that_another_process_opens_is_busy(path: Path, clock: FakeClock) -> None:
    made(path, clock).close()
    store = SqliteStore(path, clock=clock)
    with path.with_name("state.db.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        words, index = store.version_ref(TENANT)
        remembered = words[index]
        with pytest.raises(StoreBusy, match="another process is opening"):
            store.load(TENANT)
        assert store.health().ok
    assert store.load(TENANT) == Entry()
    assert words[index] != remembered, "a reader of the former place asks again"
    store.close()


def test_the_writers_of_a_process_are_served_in_the_order_of_their_arrival() -> None:
    lock, order = FairLock(), []
    assert lock.acquire(0.0)

    def take(number: int) -> None:
        assert lock.acquire(20.0, first=number == 9)
        order.append(number)
        lock.release()

    threads = []
    for number in range(10):
        threads.append(threading.Thread(target=take, args=(number,)))
        threads[-1].start()
        wait_until(lambda: len(lock._waiting) == len(threads))
    assert not lock.acquire(0.001)
    assert len(lock._waiting) == 10, "a thread that gave up waits no longer"
    lock.release()
    for thread in threads:
        thread.join()
    assert order == [9, 0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert lock.owner is None


def test_a_waiter_that_is_interrupted_takes_no_turn() -> None:
    lock = FairLock()
    assert lock.acquire(0.0)

    class Stop(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    try:
        with pytest.raises(Stop):
            lock.acquire(20.0)
    finally:
        signal.signal(signal.SIGALRM, before)
    lock.release()
    assert lock.owner is None
    assert lock.acquire(0.0)


def test_a_thread_of_the_own_process_that_never_ends_makes_the_store_busy(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("external_oms.stores.sqlite.QUEUE_SECONDS", 0.02)
    inside, leave = threading.Event(), threading.Event()

    def stuck(entry: Entry, _: object) -> Change[None]:
        inside.set()
        assert leave.wait(20)
        return Change(entry, None)

    thread = threading.Thread(target=store.transact, args=(TENANT, stuck))
    thread.start()
    assert inside.wait(20)
    with pytest.raises(StoreBusy, match="other threads of this process"):
        invalidated(store)
    assert store.load(TENANT) == Entry()
    leave.set()
    thread.join()
    assert invalidated(store) == 1


# -- a file that is damaged, removed or replaced under live processes --------------------------------------------------


def overwritten(path: Path) -> None:
    path.write_bytes(b"no database at all, but a text of some length\n" * 2000)


def scribbled_upon(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def removed(path: Path) -> None:
    path.unlink()


def all_removed(path: Path) -> None:
    for entry in path.parent.iterdir():
        entry.unlink()


def moved_away(path: Path) -> None:
    path.rename(path.with_name("elsewhere.db"))


def directory_moved_away(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))


def of_a_later_owner(path: Path) -> None:
    other = path.with_name("other.db")
    with closing(sqlite3.connect(other)) as theirs:
        theirs.execute("CREATE TABLE theirs (x)")
    other.chmod(0o600)
    other.replace(path)


def robbed_of_a_table(path: Path) -> None:
    with database(path) as connection:
        connection.execute("DROP TABLE entries")


@pytest.mark.parametrize(
    "damage",
    [
        overwritten,
        scribbled_upon,
        emptied,
        removed,
        all_removed,
        moved_away,
        directory_moved_away,
        of_a_later_owner,
        robbed_of_a_table,
    ],
)
def test_a_change_that_is_answered_is_in_the_file_that_every_process_uses_afterwards(
    store: SqliteStore, other: SqliteStore, path: Path, clock: FakeClock, damage: Callable[[Path], None]
) -> None:
    committed(store, leased(store), clock)
    other.load(TENANT)
    store.poll()
    other.poll()
    with database(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    damage(path)
    words, index = other.version_ref(TENANT)
    before = words[index]
    generation = 0
    for _ in range(3):  # what fails at first fails once
        with suppress(StoreError):
            generation = invalidated(store)
            break
        clock.advance(1.5)
    assert generation >= 1
    assert words[index] != before, "a process that looks at the old version table learns of it at once"
    fresh = made(path, clock)
    assert fresh.load(TENANT).generation == generation
    polled: set[str] = set()
    for _ in range(3):
        clock.advance(1.5)
        with suppress(StoreError):
            polled.update(other.poll())
    assert polled == {TENANT}
    assert other.load(TENANT).generation == generation
    assert invalidated(other) == generation + 1
    assert store.load(TENANT).generation == generation + 1
    clock.advance(100.0)
    assert store.health().ok, store.health()
    assert other.health().ok, other.health()
    fresh.close()


@pytest.mark.parametrize("damage", [overwritten, removed, of_a_later_owner])
def test_what_is_found_in_the_place_of_the_file_is_set_aside_and_never_deleted(
    store: SqliteStore, path: Path, clock: FakeClock, damage: Callable[[Path], None]
) -> None:
    invalidated(store)
    store.close()
    damage(path)
    content = path.read_bytes() if path.exists() else None
    clock.advance(1.5)
    with suppress(StoreError):
        store.poll()
    clock.advance(1.5)
    store.poll()
    assert store.load(TENANT) == Entry()
    found = {path.with_name(name).read_bytes() for name in set_aside(path)}
    assert content is None or content in found


def test_a_version_table_that_is_removed_is_made_again_within_a_second(
    store: SqliteStore, other: SqliteStore, path: Path, clock: FakeClock
) -> None:
    invalidated(store)
    other.poll()
    words, index = store.version_ref(TENANT)
    before = words[index]
    path.with_name("state.db-generations").unlink()
    clock.advance(1.5)
    store.poll()
    assert store.version_ref(TENANT)[0] is not words
    assert words[index] != before
    generation = invalidated(store)
    remembered = word(other)
    assert tuple(other.poll()) == (TENANT,), "the poll of a process with the old table finds the change"
    assert other.load(TENANT).generation == generation
    assert word(other) != remembered or other.version_ref(TENANT)[0] is not words
    clock.advance(1.5)
    other.poll()
    before = word(store)
    invalidated(other)
    assert word(store) != before, "they share the new table"


def test_a_delivery_while_the_version_table_is_missing_is_carried_out_once(store: SqliteStore, path: Path) -> None:
    invalidated(store)
    path.with_name("state.db-generations").unlink()
    result = delivered(store, "msg_1")
    assert (result.generation, result.duplicate) == (2, False)


def test_a_delivery_while_the_file_is_missing_is_carried_out_in_the_new_file(store: SqliteStore, path: Path) -> None:
    delivered(store, "msg_1")
    path.unlink()
    assert delivered(store, "msg_2").duplicate is False
    assert delivered(store, "msg_2").duplicate is True
    assert store.load(TENANT).generation == 1


def test_a_reader_that_finds_another_file_is_told_to_try_again(
    store: SqliteStore, path: Path, clock: FakeClock
) -> None:
    invalidated(store)
    store.close()
    for entry in path.parent.iterdir():
        entry.unlink()
    later = made(path, clock)
    with pytest.raises(StoreBusy, match="opened anew at the next poll"):
        store.load(TENANT)
    assert tuple(store.poll()) == (TENANT,)
    assert store.load(TENANT) == Entry()
    assert store.health().ok
    later.close()


def test_a_version_table_that_is_overwritten_is_set_aside(store: SqliteStore, path: Path, clock: FakeClock) -> None:
    invalidated(store)
    with path.with_name("state.db-generations").open("r+b") as file:
        file.write(b"x" * 64)
    clock.advance(1.5)
    store.poll()
    assert any(name.endswith("-generations") for name in set_aside(path))
    assert store.load(TENANT).generation == 1
    assert not store.health().ok


def test_a_directory_that_cannot_be_used_is_tried_once_a_second(
    path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir(mode=0o700)
    path.with_name("state.db.lock").mkdir()
    with pytest.raises(StoreError, match="not a regular file"):
        SqliteStore(path, clock=clock)
    path.with_name("state.db.lock").rmdir()
    store = SqliteStore(path, clock=clock)
    path.with_name("state.db.lock").mkdir()
    tries = []
    real = open_file

    def counted(*given: object, **named: object) -> OpenFile:
        tries.append(1)
        return real(*given, **named)  # type: ignore[arg-type]  # what the store passes

    monkeypatch.setattr("external_oms.stores.sqlite.open_file", counted)
    for _ in range(10):
        for use in (lambda: store.load(TENANT), lambda: invalidated(store), store.poll, store.history):
            with pytest.raises(StoreError, match="not a regular file"):
                use()
        store.version_ref(TENANT)
        store.touch(TENANT)
    assert len(tries) == 1
    assert not store.health().ok
    assert "not a regular file" in store.health().problem
    path.with_name("state.db.lock").rmdir()
    clock.advance(1.5)
    assert invalidated(store) == 1
    assert store.health().ok
    store.close()


def test_a_full_disk_is_an_error_of_the_write_alone(store: SqliteStore, path: Path, clock: FakeClock) -> None:
    generation = invalidated(store)
    writer = connection(store._writer, store)
    (pages,) = writer.execute("PRAGMA page_count").fetchone()
    writer.execute(f"PRAGMA max_page_count = {pages}")
    row = event(clock, detail="x" * 9000)
    with pytest.raises(StoreError, match="full") as caught:
        store.transact(TENANT, lambda entry, _: Change(entry, None, events=(row,) * 10))
    assert not isinstance(caught.value, StoreBusy)
    assert store.load(TENANT).generation == generation
    assert "full" in store.health().problem
    clock.advance(1.5)
    store.poll()
    assert set_aside(path) == []
    store.append(row)
    assert store.health().ok


def test_the_log_does_not_fill_a_small_disk(store: SqliteStore, path: Path, clock: FakeClock) -> None:
    """A full disk keeps SQLite from emptying the log, so a log that fills the disk would never be emptied."""
    for number in range(400):
        store.append(event(clock, detail=f"{number} {'x' * 2000}"))
    assert path.with_name("state.db-wal").stat().st_size < 1_000_000


# -- storage keys ------------------------------------------------------------------------------------------------------


def test_a_tenant_without_a_key_is_stored_under_its_name(path: Path, clock: FakeClock) -> None:
    with_keys = made(path, clock, keys={TENANT: "acme@one"})
    without = made(path, clock)
    assert invalidated(without, "acme@one") == 1
    assert with_keys.load(TENANT).generation == 1
    assert invalidated(with_keys, "other") == 1
    assert without.load("other").generation == 1
    assert len({word(with_keys), word(without, "acme@one")}) == 1
    with_keys.close()
    without.close()


def test_a_store_without_keys_lists_the_rows_of_every_key(path: Path, clock: FakeClock) -> None:
    with_keys = made(path, clock, keys={TENANT: "acme@one"})
    without = made(path, clock)
    with_keys.append(event(clock, detail="one"))
    without.append(event(clock, detail="two"))
    without.append(event(clock, "", Cause.STORE, detail="about the store"))
    assert [row.detail for row in without.history()] == ["about the store", "two", "one"]
    assert [row.detail for row in with_keys.history()] == ["about the store", "one"]
    assert [row.detail for row in with_keys.history(tenant=TENANT)] == ["one"]
    with_keys.close()
    without.close()


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_what_the_limits_exclude_is_removed_from_the_file_now_and_then(path: Path, clock: FakeClock) -> None:
    store = made(path, clock, history_rows=10)
    for number in range(130):
        store.append(event(clock, detail=str(number)))
    store.close()
    with database(path) as connection:
        (kept,) = connection.execute("SELECT count(*) FROM history").fetchone()
    assert 10 <= kept <= 10 + 64


def test_delivery_ids_are_removed_once_they_are_forgotten(store: SqliteStore, path: Path, clock: FakeClock) -> None:
    for number in range(5):
        delivered(store, f"msg_{number}")
    clock.advance(DELIVERY_ID_SECONDS + 1)
    delivered(store, "msg_9")
    with database(path) as connection:
        assert connection.execute("SELECT count(*) FROM delivery_ids").fetchone() == (1,)


def test_a_number_beyond_those_of_the_database_is_no_error(store: SqliteStore, clock: FakeClock) -> None:
    store.append(event(clock))
    assert len(store.history(limit=10**30, before=10**30)) == 1
    assert store.history(before=-(10**30)) == ()


def test_a_lease_of_a_process_that_has_ended_is_known_to_be_void(path: Path) -> None:
    store = SqliteStore(path)
    assert in_a_fork(lambda: leased(store, seconds=60.0).token == 1)
    outcome = try_lease(store)
    assert isinstance(outcome, Busy)
    assert store.is_gone(outcome.holder)
    assert isinstance(try_lease(store, dead_holder=outcome.holder), Granted)
    store.close()


def test_close_closes_every_descriptor_of_the_database(store: SqliteStore, path: Path) -> None:
    invalidated(store)
    store.load(TENANT)

    def descriptors() -> list[str]:
        links = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        return [link for link in links if link.startswith(str(path)) and "generations" not in link]

    assert descriptors()
    store.close()
    assert descriptors() == []


def test_the_word_is_read_without_a_system_call_or_a_lock(store: SqliteStore) -> None:
    words, index = store.version_ref(TENANT)
    assert isinstance(words, memoryview)
    with store._reader.use(1.0), store._writer.use(1.0):
        assert words[index] == word(store)
        store.touch(TENANT)
        assert words[index] == word(store)


# -- a storm -----------------------------------------------------------------------------------------------------------


def _storm(make: MakeElsewhere, pipe: Connection, seconds: float, senders: int) -> None:
    """Deliver with many threads as fast as possible, and poll beside it; report generations and errors."""
    store = make()
    generations: list[int] = []
    errors: list[str] = []
    pipe.send("ready")
    pipe.recv()
    until = time.monotonic() + seconds

    def run(work: Callable[[int], None]) -> None:
        number = 0
        while time.monotonic() < until:
            number += 1
            try:
                work(number)
            except Exception as error:  # noqa: BLE001 - the test says what may not happen: anything
                errors.append(repr(error))
                return

    def send(sender: int) -> Callable[[int], None]:
        def deliver(number: int) -> None:
            clock = FakeClock(SYSTEM_CLOCK.monotonic(), SYSTEM_CLOCK.wall())
            result = delivered(store, f"{os.getpid()}-{sender}-{number}", row=event(clock))
            generations.append(result.generation)
            if store.load(TENANT).generation < result.generation:
                errors.append("an answered delivery could not be loaded")

        return deliver

    def look(_: int) -> None:
        store.poll()
        time.sleep(0.025)

    threads = [threading.Thread(target=run, args=(send(sender),)) for sender in range(senders)]
    threads.append(threading.Thread(target=run, args=(look,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send((generations, errors + ([] if store.health().ok else [store.health().problem])))
    store.close()


def storm(path: Path, seconds: float) -> None:
    processes, senders = 4, 50
    make = partial(SqliteStore, path)
    with ExitStack() as stack:
        pipes = [stack.enter_context(elsewhere(_storm, make, seconds, senders))[1] for _ in range(processes)]
        for pipe in pipes:
            assert pipe.poll(DEADLINE_SECONDS)
            pipe.recv()
        for pipe in pipes:
            pipe.send("go")
        results = []
        for pipe in pipes:
            assert pipe.poll(DEADLINE_SECONDS + seconds)
            results.append(pipe.recv())
    assert [errors for _, errors in results] == [[]] * processes
    generations = sorted(generation for some, _ in results for generation in some)
    assert generations == list(range(1, len(generations) + 1)), "each delivery has a generation of its own"
    store = make()
    assert store.load(TENANT).generation == len(generations) >= processes * senders
    store.close()
    with database(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT count(*) FROM delivery_ids").fetchone() == (len(generations),)
    assert set_aside(path) == []


def test_a_storm_of_two_hundred_senders_never_makes_the_store_busy_and_loses_nothing(path: Path) -> None:
    storm(path, 1.0)


@pytest.mark.soak
def test_a_storm_of_two_hundred_senders_for_long(path: Path) -> None:
    storm(path, 15.0)
