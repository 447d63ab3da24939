"""The SQLite store through two handles and the memory store, given the same operations, give the same answers."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from external_oms.entry import Granted, Invalidation, Lease, begin_read, invalidate
from external_oms.records import Member
from external_oms.stores.base import DELIVERY_ID_SECONDS, Store
from external_oms.stores.memory import MemoryStore
from external_oms.stores.sqlite import SqliteStore
from tests.support.clock import FakeClock
from tests.support.contract import committed, event, failed, released, word

TENANTS = ("acme-staging", "acme-prod")
TENANT = st.sampled_from(TENANTS)
QUARTERS = st.integers(min_value=1, max_value=400).map(lambda quarters: quarters / 4)
"""Seconds that binary fractions hold exactly: the two stores need not add up in the same order."""


class Twins(RuleBasedStateMachine):
    leases = Bundle("leases")

    @initialize()
    def begin(self) -> None:
        self.clock = FakeClock()
        self.directory = Path(tempfile.mkdtemp())
        self.memory = MemoryStore(clock=self.clock, history_rows=20)
        self.file = self.opened()
        self.other = self.opened()
        self.words = {tenant: word(self.file, tenant) for tenant in TENANTS}

    def opened(self) -> SqliteStore:
        return SqliteStore(self.directory / "state.db", clock=self.clock, history_rows=20)

    def teardown(self) -> None:
        self.file.close()
        self.other.close()
        shutil.rmtree(self.directory)

    def both(self) -> tuple[Store, Store]:
        return self.file, self.memory

    @rule(seconds=QUARTERS)
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def advance_by_an_hour(self) -> None:
        self.clock.advance(DELIVERY_ID_SECONDS)

    @rule(tenant=TENANT, ids=st.lists(st.sampled_from(["msg_1", "msg_2", None]), min_size=1, max_size=3))
    def deliver(self, tenant: str, ids: list[str | None]) -> None:
        requests = [Invalidation(event(self.clock, tenant, detail=f"{one}"), one) for one in ids]
        known = [one for one in ids if one is not None]
        ours, theirs = (
            store.transact(tenant, partial(invalidate, requests=requests), delivery_ids=known) for store in self.both()
        )
        assert ours == theirs

    @rule(
        target=leases,
        tenant=TENANT,
        holder=st.sampled_from(["host:1", "host:2"]),
        seconds=QUARTERS,
        forced=st.booleans(),
        newer_than=st.sampled_from([0, 1 << 60]),
    )
    def begin_read(self, tenant: str, holder: str, seconds: float, forced: bool, newer_than: int) -> object:
        begin = partial(begin_read, holder=holder, lease_seconds=seconds, newer_than=newer_than, forced=forced)
        ours, theirs = (store.transact(tenant, begin) for store in self.both())
        assert ours == theirs
        return (tenant, ours.lease) if isinstance(ours, Granted) else multiple()

    @rule(held=leases, enabled=st.booleans())
    def commit(self, held: tuple[str, Lease], enabled: bool) -> None:
        tenant, lease = held
        ours, theirs = (committed(store, lease, self.clock, tenant, enabled=enabled) for store in self.both())
        assert ours == theirs

    @rule(held=leases)
    def fail(self, held: tuple[str, Lease]) -> None:
        tenant, lease = held
        ours, theirs = (failed(store, lease, self.clock, tenant) for store in self.both())
        assert ours == theirs

    @rule(held=leases)
    def release(self, held: tuple[str, Lease]) -> None:
        for store in self.both():
            released(store, held[1], held[0])

    @rule(tenant=TENANT, detail=st.text(max_size=20), enabled=st.sampled_from([True, False, None]))
    def append(self, tenant: str, detail: str, enabled: bool | None) -> None:
        row = event(self.clock, tenant, detail=detail.encode("ascii", "replace").decode(), enabled=enabled)
        if row.detail.isprintable():
            for store in self.both():
                store.append(row)

    @rule(tenant=TENANT, name=st.sampled_from(["host:1", "host:2"]), generation=st.integers(0, 9))
    def report(self, tenant: str, name: str, generation: int) -> None:
        for store in self.both():
            store.report([Member(name, tenant, generation, None, "expired", None)])

    @rule()
    def change_places(self) -> None:
        """The next operations come from the other process."""
        self.file, self.other = self.other, self.file

    @rule()
    def begin_again(self) -> None:
        self.file.close()
        self.file = self.opened()

    @rule()
    def poll(self) -> None:
        self.file.poll()
        assert tuple(self.file.poll()) == ()

    @invariant()
    def the_stores_hold_the_same(self) -> None:
        for tenant in TENANTS:
            expected = self.memory.load(tenant)
            before = word(self.other, tenant)
            assert self.file.load(tenant) == self.other.load(tenant) == expected
            assert word(self.other, tenant) == word(self.file, tenant) == before, "to load changes no word"
        assert self.file.history() == self.other.history() == self.memory.history()
        assert sorted(self.file.members(), key=repr) == sorted(self.memory.members(), key=repr)
        assert self.file.health().ok


Twins.TestCase.settings = settings(max_examples=20, stateful_step_count=40)
TestTwins = cast("type", Twins.TestCase)
