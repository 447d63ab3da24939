"""The file, or memory in its place: how the store leaves the file and how it comes back."""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from external_oms.stores import sqlite_file
from external_oms.stores.base import Cause, Lease, Member, Store
from external_oms.stores.sqlite import SqliteStore
from external_oms.stores.sqlite_file import connect
from external_oms.stores.sqlite_rows import MalformedRow
from tests.stores.contract import TENANT, event, failed, leased, seen, word
from tests.support.clock import FakeClock


class Disk:
    """Connections whose disk can be made read-only or full, as SQLite itself knows it."""

    def __init__(self) -> None:
        self.state = "in order"
        self._made: list[sqlite3.Connection] = []

    def connect(self, path: Path, wait_seconds: float) -> sqlite3.Connection:
        connection = connect(path, wait_seconds)
        self._made.append(connection)
        self._apply(connection)
        return connection

    def become(self, state: str) -> None:
        self.state = state
        for connection in self._made:
            with suppress(sqlite3.ProgrammingError):  # closed meanwhile
                self._apply(connection)

    def _apply(self, connection: sqlite3.Connection) -> None:
        connection.execute(f"PRAGMA query_only = {int(self.state == 'read-only')}")
        connection.execute(f"PRAGMA max_page_count = {1 if self.state == 'full' else 1 << 30}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.db"


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def make(path: Path, clock: FakeClock) -> Iterator[Callable[..., SqliteStore]]:
    made: list[SqliteStore] = []

    def make(**more: object) -> SqliteStore:
        store = SqliteStore(path, **{"clock": clock, **more})  # type: ignore[arg-type]  # each test names its own
        made.append(store)
        return store

    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(make: Callable[..., SqliteStore], disk: Disk) -> SqliteStore:
    return make(connect=disk.connect)


@pytest.fixture
def other(store: SqliteStore, make: Callable[..., SqliteStore]) -> SqliteStore:
    return make()


def served(store: Store, clock: FakeClock, *, enabled: bool = True) -> Lease:
    """A value read and stored now."""
    lease = leased(store)
    assert store.put(lease, seen(lease, clock, enabled=enabled))
    return lease


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["read-only", "full"])
def test_a_disk_that_takes_nothing_leaves_the_store_working_in_memory_until_it_does(
    store: SqliteStore,
    other: SqliteStore,
    disk: Disk,
    clock: FakeClock,
    caplog: pytest.LogCaptureFixture,
    state: str,
) -> None:
    caplog.set_level("INFO")
    served(store, clock)
    store.invalidate(TENANT)
    known = store.load(TENANT)
    disk.become(state)
    store.append(event(clock, detail="x" * 20_000))
    assert not store.health().ok
    assert "nothing is shared" in store.health().problem
    assert store.load(TENANT) == known, "what was last known is served on"
    before = word(store)
    assert store.invalidate(TENANT) == 2
    assert word(store) != before
    assert store.load(TENANT).generation == 2
    assert other.load(TENANT).generation == 1
    clock.advance(5.0)
    store.changed()
    store.append(event(clock, detail="short"))
    assert [record.levelname for record in caplog.records] == ["WARNING"], "said once"
    disk.become("in order")
    remembered, elsewhere = word(store), word(other)
    clock.advance(5.0)
    assert set(store.changed()) == {TENANT}
    assert store.health().ok
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert word(store) != remembered
    assert word(other) != elsewhere
    assert store.load(TENANT).generation == other.load(TENANT).generation == 3, "above what either side had"
    told = [row.detail for row in other.history()]
    assert told == ["the state file can be used again", "short", "x" * 20_000]
    assert other.history()[0].cause is Cause.STORE


def test_the_file_is_not_looked_at_again_within_a_second(store: SqliteStore, disk: Disk, clock: FakeClock) -> None:
    disk.become("read-only")
    store.invalidate(TENANT)
    disk.become("in order")
    clock.advance(0.9)
    store.changed()
    store.invalidate(TENANT)
    store.load(TENANT)
    assert not store.health().ok
    clock.advance(0.2)
    store.load(TENANT)
    assert not store.health().ok, "an evaluation does not open files"
    assert store.invalidate(TENANT) == 4, "2 in memory, 3 by coming back, 4 in the file"
    assert store.health().ok


def test_a_newer_value_that_was_read_meanwhile_is_brought_into_the_file(
    store: SqliteStore, other: SqliteStore, disk: Disk, clock: FakeClock
) -> None:
    served(store, clock, enabled=True)
    disk.become("read-only")
    clock.advance(3.0)
    served(store, clock, enabled=False)
    disk.become("in order")
    clock.advance(2.0)
    store.changed()
    record = other.load(TENANT)
    assert record.snapshot is not None
    assert record.snapshot.enabled is False
    assert record.snapshot.read_at == clock.monotonic() - 2.0
    assert record.generation == 0, "nobody invalidated: it is as fresh as it was"
    assert record.reads == record.snapshot.read_number
    assert leased(store).number > record.reads


def test_a_newer_value_in_the_file_is_not_overwritten_on_return(
    store: SqliteStore, other: SqliteStore, disk: Disk, clock: FakeClock
) -> None:
    served(store, clock, enabled=True)
    disk.become("read-only")
    clock.advance(1.0)
    lease = leased(store)
    store.fail(lease, failed(lease, clock))
    clock.advance(1.0)
    served(other, clock, enabled=False)
    disk.become("in order")
    store.changed()
    record = store.load(TENANT)
    assert record.snapshot is not None
    assert record.snapshot.enabled is False
    assert record.failure is None, "the failure was earlier than the value"


def test_a_failure_meanwhile_is_brought_into_the_file(
    store: SqliteStore, other: SqliteStore, disk: Disk, clock: FakeClock
) -> None:
    served(store, clock)
    disk.become("read-only")
    clock.advance(1.0)
    lease = leased(store)
    store.fail(lease, failed(lease, clock))
    disk.become("in order")
    clock.advance(1.0)
    store.changed()
    record = other.load(TENANT)
    assert record.failure is not None
    assert record.snapshot is not None


def test_invalidations_on_both_sides_are_all_above_what_was_read_before(
    store: SqliteStore, other: SqliteStore, disk: Disk, clock: FakeClock
) -> None:
    disk.become("read-only")
    store.invalidate(TENANT)
    served(store, clock, enabled=True)
    clock.advance(2.0)
    other.invalidate(TENANT)
    disk.become("in order")
    store.changed()
    record = store.load(TENANT)
    assert record.generation == 2
    assert record.snapshot is not None
    assert record.snapshot.generation == 1, "read before the other side's invalidation, so not fresh"


def test_what_others_changed_last_is_read_once_more_before_memory_takes_over(
    store: SqliteStore, other: SqliteStore, disk: Disk, clock: FakeClock
) -> None:
    served(store, clock, enabled=True)
    served(other, clock, enabled=False)
    other.invalidate(TENANT)
    disk.become("read-only")
    store.append(event(clock))
    record = store.load(TENANT)
    assert record.generation == 1
    assert record.snapshot is not None
    assert record.snapshot.enabled is False


def test_a_change_that_can_be_read_no_more_counts_as_an_invalidation(
    store: SqliteStore, other: SqliteStore, disk: Disk, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    served(store, clock)
    served(other, clock)
    disk.become("read-only")

    def unreadable(*_: object, **__: object) -> dict[str, int]:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr("external_oms.stores.sqlite_rows.revisions", unreadable)
    store.append(event(clock))
    assert store.load(TENANT).generation == 1


def test_a_lease_that_was_given_on_the_other_side_is_carried_on_there_and_fenced_off_after_the_return(
    store: SqliteStore, disk: Disk, clock: FakeClock
) -> None:
    lease = leased(store)
    disk.become("read-only")
    assert store.put(lease, seen(lease, clock)) is True, "in memory: nobody came between"
    store.release(leased(store))
    lease = leased(store)
    store.report([Member("host:1", TENANT, 0, True, "fresh", 0.0)])
    assert len(store.members()) == 1
    disk.become("in order")
    clock.advance(1.5)
    store.changed()
    assert store.put(lease, seen(lease, clock)) is False


def test_a_store_that_begins_without_its_file_moves_its_words_when_it_gets_one(
    make: Callable[..., SqliteStore], path: Path, clock: FakeClock
) -> None:
    path.parent.mkdir()
    path.with_name("state.db.lock").mkdir()  # nothing can be opened here
    store = make()
    assert not store.health().ok
    words, slot = store.watch(TENANT)
    before = words[slot]
    assert store.load(TENANT).generation == 0
    assert store.deliver(TENANT, "msg_1", seconds=60.0) == 1
    assert store.deliver(TENANT, "msg_1", seconds=60.0) is None
    between = words[slot]
    path.with_name("state.db.lock").rmdir()
    clock.advance(1.5)
    store.changed()
    assert store.health().ok
    assert len({before, between, words[slot]}) == 3, "whoever looks at the old place asks again"
    before = word(store)
    assert make().invalidate(TENANT) == 3
    assert word(store) != before


# -- a file that is damaged, moved or gone while it is open ------------------------------------------------------------


def test_a_file_that_is_replaced_is_noticed_at_once_and_generations_go_on_rising(
    store: SqliteStore, make: Callable[..., SqliteStore], path: Path, clock: FakeClock
) -> None:
    for _ in range(5):
        store.invalidate(TENANT)
    served(store, clock)
    for part in ("", "-wal", "-shm", "-generations"):
        path.with_name(f"state.db{part}").rename(path.with_name(f"gone{part}"))
    newcomer = make()
    assert newcomer.invalidate(TENANT) == 1
    record = store.load(TENANT)
    assert record.generation == 6
    assert record.snapshot is not None
    assert record.snapshot.generation == 5, "the last known value stays known, and is fresh no more"
    assert newcomer.load(TENANT).generation == 6
    assert newcomer.invalidate(TENANT) == store.load(TENANT).generation == 7
    assert store.health().ok


def test_an_invalidation_that_went_into_a_file_just_moved_is_done_again(
    store: SqliteStore, make: Callable[..., SqliteStore], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.invalidate(TENANT)
    write = sqlite_file.StateFile.write

    def moved_while_committing(self: sqlite_file.StateFile, work: Callable[[sqlite3.Connection], object]) -> object:
        monkeypatch.undo()
        result = write(self, work)
        for part in ("", "-wal", "-shm", "-generations"):
            path.with_name(f"state.db{part}").rename(path.with_name(f"gone{part}"))
        return result

    monkeypatch.setattr(sqlite_file.StateFile, "write", moved_while_committing)
    generation = store.invalidate(TENANT)
    assert generation > 2
    assert make().load(TENANT).generation == generation


def test_a_handle_that_still_has_the_damaged_file_open_comes_over_to_the_new_one(
    store: SqliteStore, other: SqliteStore, path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    served(store, clock)
    for _ in range(3):
        store.invalidate(TENANT)
    other.load(TENANT)
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE tenants")
    words, slot = other.watch(TENANT)
    remembered = words[slot]
    assert store.invalidate(TENANT) > 3, "one of both sets it aside"
    assert words[slot] != remembered, "and the other one's evaluations see at once that something is new"
    assert other.load(TENANT).generation >= 4
    assert other.invalidate(TENANT) == store.load(TENANT).generation
    assert store.health().ok
    assert other.health().ok
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    told = [row for row in other.history() if row.cause is Cause.STORE]
    assert len(told) == 1
    record = other.load(TENANT)
    assert record.snapshot is not None
    assert record.snapshot.generation == 0


def test_an_evaluation_that_meets_the_damage_serves_the_last_known_value_as_not_fresh(
    store: SqliteStore, path: Path, clock: FakeClock
) -> None:
    served(store, clock)
    known = store.load(TENANT)
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("UPDATE tenants SET snapshot = 'scribble'")
    before = word(store)
    record = store.load(TENANT)
    assert record.snapshot == known.snapshot
    assert record.generation == known.generation + 1
    assert word(store) != before, "and the next one looks again"
    acquired = leased(store)
    assert acquired.record.generation == 1
    assert store.health().ok
    assert store.load(TENANT).snapshot == replace(acquired.record.snapshot or pytest.fail("no value"))


def test_a_file_that_stays_damaged_is_given_up_for_memory(
    store: SqliteStore, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    served(store, clock)

    def damaged(*_: object) -> object:
        raise MalformedRow

    monkeypatch.setattr("external_oms.stores.sqlite_rows.invalidate", damaged)
    assert store.invalidate(TENANT) > 0
    assert "stays damaged" in store.health().problem


def test_a_page_that_is_replaced_is_found_by_the_poll(
    store: SqliteStore, make: Callable[..., SqliteStore], path: Path
) -> None:
    store.invalidate(TENANT)
    words, slot = store.watch(TENANT)
    path.with_name("state.db-generations").unlink()
    newcomer = make()
    newcomer.invalidate(TENANT)
    remembered = words[slot]
    assert set(store.changed()) == {TENANT}
    assert words[slot] != remembered
    assert store.load(TENANT).generation == 2
    before = word(store)
    newcomer.invalidate(TENANT)
    assert word(store) != before


# -- others who are slow, or dead --------------------------------------------------------------------------------------


def test_an_evaluation_never_waits_for_a_writer(store: SqliteStore, path: Path, clock: FakeClock) -> None:
    served(store, clock)
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE tenants SET generation = 99")
        assert store.load(TENANT).generation == 0, "and sees nothing that is not committed"
        assert store.health().ok
        writer.execute("ROLLBACK")


def test_a_writer_that_never_ends_is_not_waited_for_for_ever(
    store: SqliteStore, path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_SECONDS", 0.02)
    with closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert store.invalidate(TENANT) == 1
        assert "locked" in store.health().problem
        writer.execute("ROLLBACK")
    clock.advance(1.5)
    store.changed()
    assert store.health().ok
    assert store.load(TENANT).generation >= 1


def test_an_evaluation_does_not_wait_for_a_process_that_opens_the_file(
    store: SqliteStore, path: Path, clock: FakeClock
) -> None:
    served(store, clock)
    known = store.load(TENANT)
    path.with_name("state.db-generations").unlink()
    with path.with_name("state.db.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        record = store.load(TENANT)
        assert record.snapshot == known.snapshot
        assert record.generation == known.generation + 1
        assert store.health().ok
        assert store.changed() == ()
    assert store.load(TENANT) == known


def test_a_process_that_never_finishes_opening_sends_the_others_to_memory(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("external_oms.stores.sqlite_backing.OPENING_SECONDS", 0.02)
    store.invalidate(TENANT)
    path.with_name("state.db-generations").unlink()
    with path.with_name("state.db.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert store.invalidate(TENANT) > 1
        assert "another process" in store.health().problem


def committed_and_died(store: SqliteStore, work: Callable[[SqliteStore], object]) -> None:
    """Do it as a process does that is killed between its commit and its word."""
    words, slot = store.watch(TENANT)
    before = words[slot]
    work(store)
    words[slot] = before  # type: ignore[index]  # the page can be written, whatever evaluations may do


def test_a_change_whose_author_died_before_it_said_so_is_found_by_the_poll(
    store: SqliteStore, other: SqliteStore
) -> None:
    store.watch(TENANT)
    store.changed()
    before = word(store)
    committed_and_died(other, lambda dying: dying.invalidate(TENANT))
    assert word(store) == before
    assert store.changed() == (TENANT,)
    assert word(store) != before
    now = word(store)
    assert store.changed() == ()
    assert word(store) == now


def test_a_duplicate_of_a_delivery_whose_carrier_died_is_answered_when_all_can_see_it(
    store: SqliteStore, other: SqliteStore
) -> None:
    before = word(store)
    committed_and_died(other, lambda dying: dying.deliver(TENANT, "msg_1", seconds=60.0))
    assert word(store) == before
    assert store.deliver(TENANT, "msg_1", seconds=60.0) is None
    assert word(store) != before


def test_own_changes_are_not_told_as_those_of_others(store: SqliteStore, other: SqliteStore) -> None:
    store.invalidate(TENANT)
    store.changed()
    store.invalidate(TENANT)
    assert store.changed() == ()
    other.invalidate(TENANT)
    store.invalidate(TENANT)
    assert store.changed() == (TENANT,)


def test_a_poll_that_meets_damage_has_the_file_set_aside(
    store: SqliteStore, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.invalidate(TENANT)
    store.changed()
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("DROP TABLE tenants")
    store.changed()
    assert store.changed() == (TENANT,)
    assert store.load(TENANT).generation == 2
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_polls_do_not_overlap(store: SqliteStore, other: SqliteStore) -> None:
    other.invalidate(TENANT)
    with store._backing._polling:
        assert store.changed() == ()
    assert store.changed() == (TENANT,)


# -- another boot ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wall", ["an hour later", "set back by a day"])
def test_after_a_boot_nothing_is_fresh_and_leases_and_back_off_are_void(
    make: Callable[..., SqliteStore], clock: FakeClock, wall: str
) -> None:
    before = make(boot="first")
    before.invalidate(TENANT)
    served(before, clock)
    for _ in range(5):
        before.release(leased(before, metered=True))
    before.deliver("other-tenant", "msg_1", seconds=7200.0)
    lease = leased(before)
    before.fail(lease, failed(lease, clock))
    leased(before, seconds=1e6)
    before.report([Member("host:1", TENANT, 1, True, "fresh", 0.0)])
    before.close()
    later = FakeClock(monotonic=12.0, wall=clock.wall() + (3600.0 if wall == "an hour later" else -86_400.0))
    after = make(boot="second", clock=later)
    record = after.load(TENANT)
    assert record.generation == 1
    assert record.invalidated_at == 12.0
    assert record.snapshot is not None
    age = later.monotonic() - record.snapshot.read_at
    assert age == pytest.approx(3600.0 if wall == "an hour later" else 30.001)
    assert age > record.snapshot.lifetime_seconds
    assert record.failure is not None
    assert record.failure.not_before <= later.monotonic()
    assert record.failure.obliged is False
    assert after.members() == ()
    lease = leased(after, metered=True)
    assert after.put(lease, seen(lease, later))
    assert after.deliver("other-tenant", "msg_1", seconds=60.0) is None
    again = make(boot="second", clock=later)
    fresh = again.load(TENANT).snapshot
    assert fresh is not None
    assert fresh.read_at == 12.0, "within one boot nothing is converted"
