"""The memory store against the contract, and what it alone promises."""

from __future__ import annotations

import pytest

from external_oms.stores.base import Record, Store
from external_oms.stores.memory import MemoryStore
from tests.stores.contract import TENANT, MakeStore, StoreContract, leased
from tests.support.clock import FakeClock


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def make_store(self, clock: FakeClock) -> MakeStore:
        made: list[Store] = []

        def make(*, history_rows: int = 10_000, history_seconds: float = 30 * 86_400.0) -> Store:
            if not made:
                made.append(MemoryStore(clock=clock, history_rows=history_rows, history_seconds=history_seconds))
            return made[0]

        return make


def test_it_starts_from_the_records_that_it_is_given(clock: FakeClock) -> None:
    known = Record(generation=7, reads=3)
    store = MemoryStore(clock=clock, records=[(TENANT, known)])
    assert store.load(TENANT) == known
    assert store.invalidate(TENANT) == 8
    assert leased(store).number == 4


def test_nobody_else_can_change_anything_so_it_never_asks_to_be_polled(clock: FakeClock) -> None:
    store = MemoryStore(clock=clock)
    store.attach(lambda: pytest.fail("nothing can wake a process that shares with nobody"))
    store.invalidate(TENANT)
    assert store.poll_seconds is None
    assert store.changed() == ()
