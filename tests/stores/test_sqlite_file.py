"""Opening a state file: where, with which modes, and what becomes of one that cannot be used."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from external_oms.errors import StoreError
from external_oms.stores.base import Cause
from external_oms.stores.page import Page
from external_oms.stores.sqlite import SqliteStore
from external_oms.stores.sqlite_file import BeingOpened, check_place, open_state
from tests.stores.contract import TENANT, leased, seen
from tests.support.clock import FakeClock

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.db"


def asides(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir() if ".set-aside-" in entry.name)


# -- the place ---------------------------------------------------------------------------------------------------------


def test_every_file_is_the_users_alone_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:
        store = SqliteStore(path.parent / "deep" / "state.db")
        store.invalidate(TENANT)
    finally:
        os.umask(before)
    directory = path.parent / "deep"
    modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in directory.iterdir()}
    assert modes == dict.fromkeys(
        ["state.db", "state.db-wal", "state.db-shm", "state.db-generations", "state.db.lock"], 0o600
    )
    assert stat.S_IMODE(directory.stat().st_mode) == stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    store.close()


def test_a_network_file_system_is_refused_with_the_reason(path: Path) -> None:
    mounts = f"1 0 0:1 / / rw - ext4 d rw\n2 1 0:2 / {path.parent.parent.resolve()} rw - nfs4 server:/export rw"
    with pytest.raises(StoreError, match=r"network file system \(nfs4\).*redis://"):
        SqliteStore(path, mountinfo=mounts)
    assert not path.parent.exists()


def test_a_relative_path_is_refused() -> None:
    with pytest.raises(StoreError, match="not an absolute path"):
        check_place(Path("state.db"), "")


def test_a_symbolic_link_is_refused(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    (tmp_path / "elsewhere.db").touch()
    path.symlink_to(tmp_path / "elsewhere.db")
    with pytest.raises(StoreError, match="symbolic link"):
        SqliteStore(path)
    assert (tmp_path / "elsewhere.db").stat().st_size == 0


def test_what_is_no_file_is_refused(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(StoreError, match="not a regular file"):
        SqliteStore(path)


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="not a directory"):
        SqliteStore(tmp_path / "file" / "state.db")


def test_a_directory_or_file_of_somebody_else_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SqliteStore(path).close()
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(StoreError, match="belongs to another user; name a directory"):
        check_place(path, "")
    with pytest.raises(StoreError, match="belongs to another user; name a file"):
        open_state(path, boot="boot", clock=FakeClock(), wait_seconds=0.0)


def test_a_directory_that_everybody_may_write_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.parent.chmod(0o777)
    with pytest.raises(StoreError, match="chmod o-w"):
        SqliteStore(path)
    path.parent.chmod(0o1777)
    SqliteStore(path).close()


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


def robbed_of_a_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE tenants")


def falsified(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("UPDATE tenants SET snapshot = '{\"enabled\": 1}'")


DAMAGES = [overwritten, cut_short, scribbled_upon, replaced, robbed_of_a_table, falsified]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_is_set_aside_and_the_service_goes_on(
    path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    store = SqliteStore(path, clock=clock)
    lease = leased(store)
    store.put(lease, seen(lease, clock))
    store.close()
    damage(path)
    content = path.read_bytes()
    store = SqliteStore(path, clock=clock)
    assert store.health().ok
    assert store.load(TENANT).snapshot is None
    assert store.invalidate(TENANT) == 1
    (row,) = store.history()
    assert row.cause is Cause.STORE
    (told,) = [record for record in caplog.records if record.levelname == "ERROR"]
    (aside, _) = asides(path)
    assert aside == "state.db.set-aside-20260528T202640Z"
    assert aside in told.getMessage()
    assert aside in row.detail
    assert (path.parent / aside).read_bytes() == content, "what was set aside is what was found"
    store.close()


def test_a_file_of_no_length_is_a_new_one_that_a_killed_process_left(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    store = SqliteStore(path)
    assert store.invalidate(TENANT) == 1
    assert asides(path) == []
    store.close()


def test_a_second_one_set_aside_in_the_same_second_has_a_name_of_its_own(path: Path, clock: FakeClock) -> None:
    for _ in range(3):
        SqliteStore(path, clock=clock).close()
        overwritten(path)
    SqliteStore(path, clock=clock).close()
    assert [name for name in asides(path) if not name.endswith("-generations")] == [
        "state.db.set-aside-20260528T202640Z",
        "state.db.set-aside-20260528T202640Z-2",
        "state.db.set-aside-20260528T202640Z-3",
    ]


def page_of_another_database(path: Path) -> None:
    Page.create(path, bytes(16))


def page_cut_short(path: Path) -> None:
    other = path.with_name("short")
    other.write_bytes(path.read_bytes()[:100])
    other.replace(path)


@pytest.mark.parametrize("damage", [page_of_another_database, page_cut_short])
def test_a_foreign_page_is_set_aside_and_the_records_stay(
    path: Path, clock: FakeClock, damage: Callable[[Path], None]
) -> None:
    store = SqliteStore(path, clock=clock)
    store.invalidate(TENANT)
    store.close()
    damage(path.with_name("state.db-generations"))
    store = SqliteStore(path, clock=clock)
    assert store.load(TENANT).generation == 1
    assert asides(path) == ["state.db.set-aside-20260528T202640Z-generations"]
    assert store.history()[0].cause is Cause.STORE
    store.close()


def test_a_page_that_is_missing_is_made(path: Path) -> None:
    store = SqliteStore(path)
    store.invalidate(TENANT)
    store.close()
    path.with_name("state.db-generations").unlink()
    store = SqliteStore(path)
    assert store.load(TENANT).generation == 1
    assert asides(path) == []
    store.close()


def test_tables_of_a_later_version_are_left_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = SqliteStore(path)
    store.invalidate(TENANT)
    store.close()
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")
    store = SqliteStore(path)
    assert not store.health().ok
    assert "version 99" in store.health().problem
    assert store.invalidate(TENANT) == 1, "it goes on in memory"
    assert asides(path) == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT generation FROM tenants").fetchall() == [(1,)]
    store.close()


def test_a_process_that_does_not_finish_opening_is_not_waited_for(path: Path, clock: FakeClock) -> None:
    SqliteStore(path).close()
    with path.with_name("state.db.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BeingOpened, match="being opened by another process"):
            open_state(path, boot="boot", clock=clock, wait_seconds=0.02)
    open_state(path, boot="boot", clock=clock, wait_seconds=0.0).file.close()


def test_whoever_still_has_the_old_file_open_does_not_remove_the_new_files_log(path: Path, clock: FakeClock) -> None:
    """SQLite removes a log by its name when the last connection closes; it must not be the log of another file."""
    path.parent.mkdir()
    old = open_state(path, boot="boot", clock=clock, wait_seconds=1.0).file
    old.write(lambda on: on.execute("INSERT INTO members VALUES ('a', 'b', 1, 1, 'fresh', 1, 1)"))
    path.rename(path.with_name("aside"))
    for part in ("-wal", "-shm"):
        path.with_name(f"state.db{part}").rename(path.with_name(f"aside{part}"))
    new = open_state(path, boot="boot", clock=clock, wait_seconds=1.0).file
    new.write(lambda on: on.execute("INSERT INTO members VALUES ('new', 'b', 1, 1, 'fresh', 1, 1)"))
    assert old.moved()
    old.close()
    assert path.with_name("state.db-wal").stat().st_size > 0
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT name FROM members").fetchall() == [("new",)]
    new.close()


def _open_and_invalidate(path: Path, tell: Connection) -> None:
    tell.send("ready")
    tell.recv()
    store = SqliteStore(path)
    tell.send((store.invalidate(TENANT), store.health().ok))
    tell.recv()


def test_two_processes_that_find_the_damage_at_once_set_aside_one_file(path: Path) -> None:
    SqliteStore(path).close()
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
        told = []
        for pipe in pipes:
            assert pipe.poll(20)
            told.append(pipe.recv())
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert sorted(told) == [(1, True), (2, True), (3, True)], "all of them share one new file"
    assert len([name for name in asides(path) if not name.endswith("-generations")]) == 1
