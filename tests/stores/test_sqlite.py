"""The file store against the contract of shared stores."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from external_oms.stores.base import Store
from external_oms.stores.sqlite import SqliteStore
from tests.conftest import FakeClock
from tests.stores.contract import MakeElsewhere, MakeStore, SharedStoreContract


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
