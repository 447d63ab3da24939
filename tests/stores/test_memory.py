"""The memory store against the contract, and what it alone promises."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from external_oms.entry import Entry
from external_oms.stores.base import Store
from external_oms.stores.memory import MemoryStore
from tests.support.clock import FakeClock
from tests.support.contract import TENANT, MakeStore, StoreContract, invalidated, leased


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def make_store(self, clock: FakeClock) -> MakeStore:
        made: list[Store] = []

        def make(
            *,
            history_rows: int = 10_000,
            history_seconds: float = 30 * 86_400.0,
            keys: Mapping[str, str] | None = None,
        ) -> Store:
            assert keys is None
            if not made:
                made.append(MemoryStore(clock=clock, history_rows=history_rows, history_seconds=history_seconds))
            return made[0]

        return make


def test_it_starts_from_the_entries_that_it_is_given(clock: FakeClock) -> None:
    known = Entry(generation=7, token=3)
    store = MemoryStore(clock=clock, entries={TENANT: known})
    assert store.load(TENANT) == known
    assert invalidated(store) == 8
    assert leased(store).token == 4


def test_no_other_process_can_change_it_so_it_needs_no_poll(clock: FakeClock) -> None:
    store = MemoryStore(clock=clock)
    store.attach(lambda: pytest.fail("nothing can wake a process that shares with no other"))
    invalidated(store)
    assert store.poll_seconds is None
    assert store.poll() == ()


def test_the_lease_of_the_parent_ends_in_a_forked_child(clock: FakeClock) -> None:
    store = MemoryStore(clock=clock)
    lease = leased(store)
    store.after_fork()
    assert store.is_gone(lease.holder)
