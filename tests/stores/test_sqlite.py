"""The file store against the contract of shared stores."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from external_oms.stores.base import Store
from external_oms.stores.sqlite import SqliteStore
from tests.stores.contract import MakeElsewhere, MakeStore, SharedStoreContract, event, word
from tests.support.clock import FakeClock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.db"


class TestSqliteStore(SharedStoreContract):
    @pytest.fixture
    def make_store(self, clock: FakeClock, path: Path) -> Iterator[MakeStore]:
        made: list[Store] = []

        def make(*, history_rows: int = 10_000, history_seconds: float = 30 * 86_400.0) -> Store:
            store = SqliteStore(path, clock=clock, history_rows=history_rows, history_seconds=history_seconds)
            assert store.health().ok, store.health().problem
            made.append(store)
            return store

        yield make
        for store in made:
            store.close()

    @pytest.fixture
    def make_elsewhere(self, path: Path) -> MakeElsewhere:
        return partial(SqliteStore, path)


def test_what_the_caps_exclude_is_removed_from_the_file_now_and_then(path: Path, clock: FakeClock) -> None:
    store = SqliteStore(path, clock=clock, history_rows=10)
    for number in range(130):
        store.append(event(clock, detail=str(number)))
    store.close()
    with closing(sqlite3.connect(path)) as database:
        (kept,) = database.execute("SELECT count(*) FROM history").fetchone()
    assert 10 <= kept <= 10 + 64


def test_wait_looks_often_at_first_and_then_less(path: Path, clock: FakeClock) -> None:
    slept: list[float] = []
    store = SqliteStore(path, clock=clock, sleep=slept.append)
    store.wait("acme-staging", word(store), 0.05)
    assert slept == pytest.approx([0.002, 0.004, 0.008, 0.010, 0.010, 0.010, 0.006])
    store.close()
