"""The version of the tables, and whether a file is ours."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from external_oms.errors import StoreError
from external_oms.stores.sqlite_schema import (
    APPLICATION_ID,
    MIGRATIONS,
    Unusable,
    bring_up,
    identity,
    is_damage,
    migrate,
    transaction,
)
from tests.support.clock import FakeClock


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as made:
        yield made


def make_one(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE TABLE one (x)")
    connection.execute("INSERT INTO one VALUES (1)")


def make_two(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE one ADD COLUMN y")
    connection.execute("UPDATE one SET y = x + 1")


def break_off(connection: sqlite3.Connection) -> None:
    connection.execute("DROP TABLE one")
    raise sqlite3.OperationalError("the disk is full")


def version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def test_tables_of_an_older_version_are_brought_to_the_present_one(connection: sqlite3.Connection) -> None:
    with transaction(connection):
        migrate(connection, [make_one])
    assert version(connection) == 1
    with transaction(connection):
        migrate(connection, [make_one, make_two])
    assert version(connection) == 2
    assert connection.execute("SELECT x, y FROM one").fetchall() == [(1, 2)]
    with transaction(connection):
        migrate(connection, [make_one, make_two])
    assert version(connection) == 2


def test_a_migration_that_breaks_off_leaves_the_tables_as_they_were(connection: sqlite3.Connection) -> None:
    with transaction(connection):
        migrate(connection, [make_one])
    with pytest.raises(sqlite3.OperationalError), transaction(connection):
        migrate(connection, [make_one, break_off])
    assert version(connection) == 1
    assert connection.execute("SELECT x FROM one").fetchall() == [(1,)]


def test_tables_of_a_later_version_are_refused_and_not_called_damaged(
    connection: sqlite3.Connection, clock: FakeClock
) -> None:
    bring_up(connection, boot="boot", clock=clock)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(StoreError, match="version 2 and this program knows version 1: run the version that wrote it"):
        bring_up(connection, boot="boot", clock=clock)


def test_an_empty_file_becomes_a_database_of_ours_that_tells_itself_from_others(
    connection: sqlite3.Connection, clock: FakeClock, tmp_path: Path
) -> None:
    own = bring_up(connection, boot="boot", clock=clock)
    assert bring_up(connection, boot="boot", clock=clock) == own == identity(connection)
    assert len(own) == 16
    assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with closing(sqlite3.connect(tmp_path / "other.db", isolation_level=None)) as other:
        assert bring_up(other, boot="boot", clock=clock) != own


def test_another_programs_database_is_told(connection: sqlite3.Connection, clock: FakeClock) -> None:
    connection.execute("CREATE TABLE theirs (x)")
    with pytest.raises(Unusable, match="another program's"):
        bring_up(connection, boot="boot", clock=clock)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",), "it was not touched"


def test_a_database_without_its_one_row_is_told(connection: sqlite3.Connection, clock: FakeClock) -> None:
    bring_up(connection, boot="boot", clock=clock)
    connection.execute("DELETE FROM service")
    with pytest.raises(Unusable, match="identity"):
        bring_up(connection, boot="boot", clock=clock)


@pytest.mark.parametrize(
    "failure", ["no JSON", "{}", "[]", '{"since": "yesterday"}', '{"since": "2026-01-01", "x": 1}']
)
def test_a_failure_that_is_not_of_ours_makes_the_file_unusable(
    connection: sqlite3.Connection, clock: FakeClock, failure: str
) -> None:
    bring_up(connection, boot="boot", clock=clock)
    connection.execute("INSERT INTO tenants VALUES ('acme', 1, 1, NULL, 1, NULL, '', ?, NULL, 0, '', 5, 0)", (failure,))
    with pytest.raises(Unusable, match="a row"):
        bring_up(connection, boot="boot", clock=clock)


@pytest.mark.parametrize("snapshot", ["7", "no JSON", "{}", "[]", '{"updated_at": null, "fetched_at": "yesterday"}'])
def test_a_row_that_is_not_of_ours_makes_the_file_unusable(
    connection: sqlite3.Connection, clock: FakeClock, snapshot: str
) -> None:
    bring_up(connection, boot="boot", clock=clock)
    connection.execute(
        "INSERT INTO tenants VALUES ('acme', 1, 1, NULL, 1, ?, '', NULL, NULL, 0, '', 5, 0)", (snapshot,)
    )
    with pytest.raises(Unusable, match="a row"):
        bring_up(connection, boot="boot", clock=clock)


def test_a_place_without_a_write_ahead_log_is_refused(clock: FakeClock) -> None:
    with (
        closing(sqlite3.connect(":memory:", isolation_level=None)) as connection,
        pytest.raises(StoreError, match="no shared memory"),
    ):
        bring_up(connection, boot="boot", clock=clock)


def test_a_missing_table_is_damage_and_a_busy_database_is_not(tmp_path: Path) -> None:
    with (
        closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as one,
        closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None, timeout=0)) as two,
    ):
        with pytest.raises(sqlite3.OperationalError) as missing:
            one.execute("SELECT * FROM tenants")
        assert is_damage(missing.value)
        one.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError) as busy:
            two.execute("BEGIN IMMEDIATE")
        assert not is_damage(busy.value)
    assert not is_damage(sqlite3.ProgrammingError("Cannot operate on a closed database."))
