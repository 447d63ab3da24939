"""Opening a state file: its place, its modes, its boot, and what happens to one that cannot be used."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from external_oms.codec import encode_entry
from external_oms.entry import Entry, is_current
from external_oms.errors import StoreBusy, StoreError
from external_oms.records import Cause, Member
from external_oms.stores.base import DELIVERY_ID_SECONDS
from external_oms.stores.sqlite import SqliteStore
from external_oms.stores.sqlite_file import TABLES, OpenFile, check_place, open_file
from external_oms.stores.versions import VersionTable
from tests.support.clock import FakeClock
from tests.support.contract import TENANT, committed, complete, delivered, event, invalidated, leased, stored

SPAWN = multiprocessing.get_context("spawn")
STAMP = "20260528T202640Z"
"""When `FakeClock` begins."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.db"


def made(path: Path, clock: FakeClock | None = None, **settings: object) -> SqliteStore:
    """Return a store whose file is open."""
    store = SqliteStore(path, clock=clock or FakeClock(), **settings)  # type: ignore[arg-type]  # settings by name
    store.poll()
    return store


def opened(path: Path, clock: FakeClock | None = None, wait_seconds: float = 1.0) -> OpenFile:
    return open_file(path, boot="boot", clock=clock or FakeClock(), mountinfo="", wait_seconds=wait_seconds)


def set_aside(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir() if ".set-aside-" in entry.name)


def databases_set_aside(path: Path) -> list[str]:
    return [name for name in set_aside(path) if not name.endswith(("-wal", "-shm", "-generations"))]


# -- the place ---------------------------------------------------------------------------------------------------------


def test_every_file_is_the_users_alone_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        store = made(path)
        invalidated(store)
    finally:
        os.umask(before)
    modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in path.parent.iterdir()}
    assert modes == dict.fromkeys(
        ["state.db", "state.db-wal", "state.db-shm", "state.db-generations", "state.db.lock"], 0o600
    )
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    store.close()


def test_the_constructor_opens_nothing(path: Path) -> None:
    SqliteStore(path)
    assert list(path.parent.iterdir()) == []


def test_a_directory_whose_parent_is_missing_is_refused_as_a_mistyped_path(path: Path) -> None:
    with pytest.raises(StoreError, match=r"state is missing or not a directory; create it, or correct the path"):
        SqliteStore(path.parent / "deep" / "state.db")
    assert not path.parent.exists()


def test_a_network_file_system_is_refused_with_the_reason(path: Path) -> None:
    mounts = f"1 0 0:1 / / rw - ext4 d rw\n2 1 0:2 / {path.parent.parent.resolve()} rw - nfs4 server:/export rw"
    with pytest.raises(StoreError, match=r"network file system \(nfs4\).*redis://"):
        SqliteStore(path, mountinfo=mounts)
    assert not path.parent.exists()


def test_a_relative_path_is_refused() -> None:
    with pytest.raises(StoreError, match="not an absolute path"):
        check_place(Path("state.db"), "")


@pytest.mark.parametrize("part", ["", "-wal", "-shm", "-generations", ".lock"])
def test_a_symbolic_link_is_refused(path: Path, tmp_path: Path, part: str) -> None:
    path.parent.mkdir(mode=0o700)
    (tmp_path / "elsewhere").touch()
    path.with_name(f"{path.name}{part}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="symbolic link"):
        SqliteStore(path)
    assert (tmp_path / "elsewhere").stat().st_size == 0


@pytest.mark.parametrize("part", ["", "-wal", "-shm", "-generations", ".lock"])
def test_a_file_that_is_open_to_other_users_is_refused(path: Path, part: str) -> None:
    store = made(path)
    invalidated(store)
    beside = path.with_name(f"{path.name}{part}")
    for mode in (0o604, 0o640, 0o602, 0o620):
        beside.chmod(mode)
        with pytest.raises(StoreError, match="chmod 600"):
            SqliteStore(path)
    beside.chmod(0o600)
    store.close()


def test_what_is_no_file_is_refused(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.mkdir()
    with pytest.raises(StoreError, match="not a regular file"):
        SqliteStore(path)


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="not a directory"):
        SqliteStore(tmp_path / "file" / "state.db")
    with pytest.raises(StoreError, match="not a directory"):
        SqliteStore(tmp_path / "file" / "state" / "state.db")


def test_a_directory_or_file_of_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(path).close()
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(StoreError, match="belongs to another user; name a directory"):
        check_place(path, "")
    monkeypatch.undo()
    lstat = Path.lstat

    def of_another(self: Path) -> os.stat_result:
        found = list(lstat(self))
        found[stat.ST_UID] += 1
        return os.stat_result(found)

    monkeypatch.setattr(Path, "lstat", of_another)
    with pytest.raises(StoreError, match="belongs to another user; name a file"):
        check_place(path, "")


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o2770, 0o702])
def test_a_directory_that_others_may_write_is_refused(path: Path, mode: int) -> None:
    path.parent.mkdir()
    path.parent.chmod(mode)
    with pytest.raises(StoreError, match="chmod go-w"):
        SqliteStore(path)
    path.parent.chmod(0o755)
    SqliteStore(path)


# -- what cannot be used -----------------------------------------------------------------------------------------------


def overwritten(path: Path) -> None:
    path.write_bytes(b"no database at all, but a text of some length\n" * 200)


def cut_short(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def scribbled_upon(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(3 * 4096))


def replaced(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as theirs:
        theirs.execute("CREATE TABLE theirs (x)")
        theirs.execute("PRAGMA application_id = 7")
    path.chmod(0o600)


def altered(statement: str) -> Callable[[Path], None]:
    def alter(path: Path) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute(statement)

    return alter


DAMAGES = {
    "overwritten": overwritten,
    "cut short": cut_short,
    "scribbled upon": scribbled_upon,
    "replaced": replaced,
    "a table is missing": altered("DROP TABLE entries"),
    "an index is missing": altered("DROP INDEX delivery_ids_until"),
    "a column is missing": altered("ALTER TABLE history DROP COLUMN event"),
    "the service row is missing": altered("DELETE FROM service"),
    "the counter is a text": altered("UPDATE service SET version = 'x'"),
    "the counter is a blob": altered("UPDATE service SET version = x'ff'"),
    "the counter is at its end": altered("UPDATE service SET version = 9223372036854775807"),
    "the identity is malformed": altered("UPDATE service SET identity = 'zz'"),
    "the identity is short": altered("UPDATE service SET identity = 'ff'"),
    "the identity is a number": altered("UPDATE service SET identity = x'ff00'"),
    "the tables have no version": altered("PRAGMA user_version = 0"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_or_foreign_file_is_set_aside_and_a_new_one_is_made(
    path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    store = made(path, clock)
    committed(store, leased(store), clock)
    store.close()
    damage(path)
    content = path.read_bytes()
    store = made(path, clock)
    assert store.load(TENANT) == Entry()
    assert invalidated(store) == 1
    (row,) = store.history()
    assert row.cause is Cause.STORE
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    aside, *_ = set_aside(path)
    assert aside == f"state.db.set-aside-{STAMP}"
    assert aside in record.getMessage()
    assert aside in row.detail
    assert (path.parent / aside).read_bytes() == content, "what was set aside is what was found"
    assert not store.health().ok
    assert aside in store.health().problem
    clock.advance(61.0)
    assert store.health().ok, "the alarm ends"
    store.close()


def test_a_file_of_version_1_is_set_aside_with_a_clear_message(
    path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir(mode=0o700)
    with closing(sqlite3.connect(path, isolation_level=None)) as old:
        old.execute("PRAGMA journal_mode = WAL")
        old.execute("PRAGMA application_id = 0x784F4D53")
        old.execute("PRAGMA user_version = 1")
        old.execute("CREATE TABLE tenants (tenant TEXT PRIMARY KEY, revision INTEGER NOT NULL)")
        old.execute("INSERT INTO tenants VALUES ('acme-staging', 7)")
    path.chmod(0o600)
    store = made(path, clock)
    assert invalidated(store) == 1
    assert store.health().ok, "an upgrade is no damage"
    assert "has tables of version 1, of an earlier release; it was set aside as state.db.set-aside-" in caplog.text
    with closing(sqlite3.connect(path.with_name(f"state.db.set-aside-{STAMP}"))) as old:
        assert old.execute("SELECT revision FROM tenants").fetchall() == [(7,)]
    store.close()


def test_a_file_of_a_later_version_is_refused_and_left_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = made(path)
    invalidated(store)
    store.close()
    altered("PRAGMA user_version = 99")(path)
    store = SqliteStore(path)
    for use in (store.load, invalidated):
        with pytest.raises(StoreError, match="version 99, and this release knows version 2: run the release"):
            use(store) if use is invalidated else store.load(TENANT)
    assert not store.health().ok
    assert "version 99" in store.health().problem
    assert set_aside(path) == []
    assert caplog.records == []
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM entries").fetchall() == [(1,)]


def test_a_file_of_no_length_is_one_that_a_killed_process_had_begun(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.touch(mode=0o600)
    store = made(path)
    assert invalidated(store) == 1
    assert set_aside(path) == []
    store.close()


def test_a_second_file_set_aside_in_the_same_second_has_a_name_of_its_own(path: Path, clock: FakeClock) -> None:
    for _ in range(3):
        made(path, clock).close()
        overwritten(path)
    made(path, clock).close()
    assert [name for name in set_aside(path) if "-" not in name.partition(STAMP)[2] or name[-1].isdigit()] == [
        f"state.db.set-aside-{STAMP}",
        f"state.db.set-aside-{STAMP}-2",
        f"state.db.set-aside-{STAMP}-3",
    ]


def test_the_log_of_a_database_that_is_gone_is_set_aside_too(path: Path, clock: FakeClock) -> None:
    """SQLite would delete the log when it makes the new database."""
    store = made(path, clock)
    invalidated(store)
    log = path.with_name("state.db-wal").read_bytes()
    path.unlink()
    later = made(path, clock)
    assert invalidated(later) == 1
    assert path.with_name(f"state.db.set-aside-{STAMP}-wal").read_bytes() == log
    store.close()
    later.close()


def table_of_another_database(path: Path) -> None:
    VersionTable.create(path, bytes(16))


def table_cut_short(path: Path) -> None:
    other = path.with_name("short")
    other.write_bytes(path.read_bytes()[:100])
    other.chmod(0o600)
    other.replace(path)


@pytest.mark.parametrize("damage", [table_of_another_database, table_cut_short])
def test_a_foreign_version_table_is_set_aside_and_the_entries_stay(
    path: Path, clock: FakeClock, damage: Callable[[Path], None]
) -> None:
    store = made(path, clock)
    invalidated(store)
    store.close()
    damage(path.with_name("state.db-generations"))
    store = made(path, clock)
    assert store.load(TENANT).generation == 1
    assert set_aside(path) == [f"state.db.set-aside-{STAMP}-generations"]
    assert store.history()[0].cause is Cause.STORE
    store.close()


def test_a_version_table_that_is_missing_is_made(path: Path) -> None:
    store = made(path)
    invalidated(store)
    store.close()
    path.with_name("state.db-generations").unlink()
    store = made(path)
    assert store.load(TENANT).generation == 1
    assert set_aside(path) == []
    store.close()


def test_a_process_that_does_not_finish_opening_is_waited_for_only_so_long(path: Path) -> None:
    made(path).close()
    with path.with_name("state.db.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreBusy, match="another process is opening"):
            opened(path, wait_seconds=0.02)
    opened(path, wait_seconds=0.0)


def test_the_schema_is_stored_as_it_is_written(path: Path) -> None:
    """A file whose tables differ from ours is set aside, so the comparison must not depend on a version of SQLite."""
    made(path).close()
    with closing(sqlite3.connect(path)) as database:
        found = {sql for (sql,) in database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    assert found == {*TABLES, "CREATE TABLE sqlite_sequence(name,seq)"}


def test_tables_that_a_tool_added_are_left_alone(path: Path) -> None:
    """Tools that replicate SQLite files add tables of their own."""
    store = made(path)
    invalidated(store)
    store.close()
    altered("CREATE TABLE _replica (x)")(path)
    store = made(path)
    assert store.load(TENANT).generation == 1
    assert set_aside(path) == []
    store.close()


def test_a_process_that_still_has_the_old_file_open_does_not_remove_the_log_of_the_new_one(path: Path) -> None:
    """SQLite removes a log by its name when the last connection closes; it must not be the log of another file."""
    statement = "INSERT INTO members VALUES (?, 'b', 1, '')"
    old = opened(path).connect(1.0)
    old.execute(statement, ("old",))
    path.rename(path.with_name("aside"))
    for part in ("-wal", "-shm"):
        path.with_name(f"state.db{part}").rename(path.with_name(f"aside{part}"))
    new = opened(path).connect(1.0)
    new.execute(statement, ("new",))
    old.close()
    assert path.with_name("state.db-wal").stat().st_size > 0
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT name FROM members").fetchall() == [("new",)]
    new.close()


def _open_and_invalidate(path: Path, pipe: Connection) -> None:
    pipe.send("ready")
    pipe.recv()
    pipe.send(invalidated(SqliteStore(path)))
    pipe.recv()


def test_three_processes_that_find_the_damage_at_once_set_aside_one_file(path: Path) -> None:
    made(path).close()
    overwritten(path)
    pipes, processes = [], []
    for _ in range(3):
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=_open_and_invalidate, args=(path, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    try:
        for pipe in pipes:
            assert pipe.poll(20)
            pipe.recv()
        for pipe in pipes:
            pipe.send("go")
        generations = []
        for pipe in pipes:
            assert pipe.poll(20)
            generations.append(pipe.recv())
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert sorted(generations) == [1, 2, 3], "all of them share one new file"
    assert len(databases_set_aside(path)) == 1


# -- a boot ------------------------------------------------------------------------------------------------------------


def rebooted(clock: FakeClock, *, down_seconds: float = 3.0) -> FakeClock:
    return FakeClock(monotonic=12.5, wall=clock.wall() + down_seconds)


def test_no_value_is_fresh_after_a_boot(path: Path, clock: FakeClock) -> None:
    store = made(path, clock, boot="one")
    committed(store, leased(store), clock)
    generation = invalidated(store)
    committed(store, leased(store), clock)
    before = word = store.load(TENANT)
    store.close()
    later = rebooted(clock)
    store = made(path, later, boot="two")
    entry = store.load(TENANT)
    assert entry.generation == generation + 1
    assert not is_current(entry)
    assert entry.snapshot is not None
    assert before.snapshot is not None
    assert entry.snapshot == replace(before.snapshot, read_at=later.monotonic() - 3.0)
    assert (entry.stale_since, entry.invalidated_at) == (later.monotonic(), later.monotonic())
    assert entry.token == word.token
    store.close()
    again = made(path, later, boot="two")
    assert again.load(TENANT) == entry, "once per boot"
    again.close()


def test_a_boot_ends_leases_and_back_offs_and_keeps_what_was_stale(path: Path, clock: FakeClock) -> None:
    store = made(path, clock, boot="one")
    entry = complete(clock)
    stored(store, entry)
    store.close()
    later = rebooted(clock)
    store = made(path, later, boot="two")
    found = store.load(TENANT)
    now = later.monotonic()
    assert found.lease is None
    assert found.failure is not None
    assert entry.failure is not None
    assert (found.failure.retry_at, found.failure.server_retry_at) == (now, None)
    assert (found.failure.count, found.failure.since) == (entry.failure.count, entry.failure.since)
    assert found.snapshot is not None
    assert found.snapshot.read_at == now - 15.5
    assert found.stale_since == now - 5.5, "it was stale for 2.5 s before 3 s without power"
    assert leased(store).token == entry.token + 1
    store.close()


def test_a_wall_clock_that_went_back_makes_no_value_younger_than_now(path: Path, clock: FakeClock) -> None:
    store = made(path, clock, boot="one")
    committed(store, leased(store), clock)
    store.close()
    later = rebooted(clock, down_seconds=-86_400.0)
    store = made(path, later, boot="two")
    entry = store.load(TENANT)
    assert entry.snapshot is not None
    assert entry.snapshot.read_at == later.monotonic()
    assert not is_current(entry)
    store.close()


def test_a_boot_forgets_members_and_remembers_delivery_ids_and_history(path: Path, clock: FakeClock) -> None:
    store = made(path, clock, boot="one")
    delivered(store, "msg_1", row=event(clock))
    store.report([Member("host:1", TENANT, 1, True, "fresh", 1.0)])
    store.close()
    later = rebooted(clock, down_seconds=86_400.0)
    store = made(path, later, boot="two")
    assert store.members() == ()
    assert len(store.history()) == 1
    assert delivered(store, "msg_1").duplicate
    later.advance(DELIVERY_ID_SECONDS + 1)
    assert not delivered(store, "msg_1").duplicate
    store.close()


def test_a_boot_leaves_a_malformed_row_for_the_next_change(path: Path, clock: FakeClock) -> None:
    store = made(path, clock, boot="one")
    invalidated(store)
    invalidated(store, "other-tenant")
    store.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("UPDATE entries SET entry = '{' WHERE key = ?", (TENANT,))
        good = database.execute("SELECT entry FROM entries WHERE key = 'other-tenant'").fetchone()[0]
    store = made(path, rebooted(clock), boot="two")
    assert store.load(TENANT) == Entry()
    assert store.load("other-tenant").generation == 2
    assert good != encode_entry(store.load("other-tenant"))
    store.close()


def test_a_field_of_a_later_release_is_no_reason_to_set_the_file_aside(path: Path, clock: FakeClock) -> None:
    """Old and new releases share a file during an upgrade."""
    store = made(path, clock)
    committed(store, leased(store), clock)
    entry = store.load(TENANT)
    store.close()
    altered("UPDATE entries SET entry = json_set(entry, '$.new', 1, '$.snapshot.new', json('[1]'))")(path)
    store = made(path, clock)
    assert store.load(TENANT) == entry
    assert invalidated(store) == 1
    assert set_aside(path) == []
    assert store.health().ok
    store.close()
