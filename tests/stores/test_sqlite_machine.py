"""The file store and the memory store, given the same operations, are never told apart."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from external_oms.stores.base import Lease, Member, Record
from external_oms.stores.memory import MemoryStore
from external_oms.stores.sqlite import SqliteStore
from tests.stores.contract import event, failed, seen
from tests.support.clock import FakeClock

TENANTS = st.sampled_from(["acme-staging", "acme-prod"])
QUARTERS = st.integers(min_value=0, max_value=400).map(lambda quarters: quarters / 4)
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

    def opened(self) -> SqliteStore:
        return SqliteStore(self.directory / "state.db", clock=self.clock, history_rows=20)

    def teardown(self) -> None:
        self.file.close()
        self.other.close()
        shutil.rmtree(self.directory)

    @rule(seconds=QUARTERS)
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(tenant=TENANTS)
    def invalidate(self, tenant: str) -> None:
        assert self.file.invalidate(tenant) == self.memory.invalidate(tenant)

    @rule(tenant=TENANTS, delivery_id=st.sampled_from(["msg_1", "msg_2"]), seconds=QUARTERS)
    def deliver(self, tenant: str, delivery_id: str, seconds: float) -> None:
        told = self.memory.deliver(tenant, delivery_id, seconds=seconds)
        assert self.file.deliver(tenant, delivery_id, seconds=seconds) == told

    @rule(target=leases, tenant=TENANTS, seconds=QUARTERS, metered=st.booleans())
    def acquire(self, tenant: str, seconds: float, metered: bool) -> object:
        theirs = self.memory.acquire(tenant, seconds=seconds, metered=metered)
        ours = self.file.acquire(tenant, seconds=seconds, metered=metered)
        if isinstance(theirs, Lease):
            assert isinstance(ours, Lease)
            assert ours.number == theirs.number
            assert alike(ours.record) == alike(theirs.record)
            return ours
        assert ours == theirs
        return multiple()

    @rule(lease=leases, enabled=st.booleans())
    def put(self, lease: Lease, enabled: bool) -> None:
        snapshot = seen(lease, self.clock, enabled=enabled)
        assert self.file.put(lease, snapshot) == self.memory.put(lease, snapshot)

    @rule(lease=leases, count=st.integers(1, 9))
    def fail(self, lease: Lease, count: int) -> None:
        failure = failed(lease, self.clock, count=count)
        assert self.file.fail(lease, failure) == self.memory.fail(lease, failure)

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        self.file.release(lease)
        self.memory.release(lease)

    @rule(
        tenant=TENANTS,
        detail=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        enabled=st.sampled_from([True, False, None]),
    )
    def append(self, tenant: str, detail: str, enabled: bool | None) -> None:
        row = event(self.clock, tenant, detail=detail, enabled=enabled)
        self.file.append(row)
        self.memory.append(row)

    @rule(tenant=TENANTS, name=st.sampled_from(["host:1", "host:2"]), generation=st.integers(0, 9))
    def report(self, tenant: str, name: str, generation: int) -> None:
        told = [Member(name, tenant, generation, None, "expired", None)]
        self.file.report(told)
        self.memory.report(told)

    @rule()
    def change_places(self) -> None:
        """What one process did the next goes on with."""
        self.file, self.other = self.other, self.file

    @rule()
    def begin_again(self) -> None:
        self.file.close()
        self.file = self.opened()

    @invariant()
    def nobody_can_tell_them_apart(self) -> None:
        for tenant in ("acme-staging", "acme-prod"):
            expected = alike(self.memory.load(tenant))
            assert alike(self.file.load(tenant)) == alike(self.other.load(tenant)) == expected
        assert self.file.history() == self.memory.history()
        assert sorted(self.file.members(), key=repr) == sorted(self.memory.members(), key=repr)
        assert self.file.health().ok


def alike(record: Record) -> Record:
    return replace(record, foreign=False)


Twins.TestCase.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
TestTwins = cast("type", Twins.TestCase)
