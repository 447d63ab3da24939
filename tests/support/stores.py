"""A shared store whose calls fail as the test says, and a fallback that is polled as the cache of a provider does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from random import Random
from typing import TypeVar

from external_oms.clock import SYSTEM_CLOCK, Clock
from external_oms.entry import Entry, Transition
from external_oms.records import Event, Member
from external_oms.stores.base import Health, Store
from external_oms.stores.fallback import Fallback
from external_oms.stores.memory import MemoryStore

__all__ = ["FaultyStore", "PolledStore"]

T = TypeVar("T")


class FaultyStore:
    """One member's view of a store that several members share.

    Args:
        clock: Tells the time.
        data: What the members share; a store of its own where None.
        holder: The name of the member.

    Attributes:
        data: What the members share.
        fault: What every call raises; None where the store works.
        calls: The names of the methods that were called, in order.
        ended: The holders that have ended.
    """

    kind = "faulty"
    spread_seconds = 0.0

    def __init__(
        self, clock: Clock = SYSTEM_CLOCK, *, data: MemoryStore | None = None, holder: str = "member-1"
    ) -> None:
        self.poll_seconds: float | None = 0.01
        self.data = MemoryStore(clock=clock) if data is None else data
        self.fault: Exception | None = None
        self.calls: list[str] = []
        self.ended: set[str] = set()
        self.closed = False
        self._holder = holder
        self._seen: dict[str, int] = {}

    @property
    def holder(self) -> str:
        return self._holder

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.fault is not None:
            raise self.fault

    def is_gone(self, holder: str) -> bool:
        return holder in self.ended

    def version_ref(self, tenant: str) -> tuple[Sequence[int], int]:
        self._seen.setdefault(tenant, -1)
        return self.data.version_ref(tenant)

    def load(self, tenant: str) -> Entry:
        self._call("load")
        return self.data.load(tenant)

    def transact(self, tenant: str, transition: Transition[T], *, delivery_ids: Sequence[str] = ()) -> T:
        self._call("transact")
        return self.data.transact(tenant, transition, delivery_ids=delivery_ids)

    def touch(self, tenant: str) -> None:
        self.data.touch(tenant)

    def poll(self) -> Collection[str]:
        self._call("poll")
        changed = []
        for tenant, seen in self._seen.items():
            versions, index = self.data.version_ref(tenant)
            if versions[index] != seen:
                self._seen[tenant] = versions[index]
                changed.append(tenant)
        return changed

    def attach(self, wake: Callable[[], None]) -> None:
        """The members poll."""

    def append(self, event: Event) -> None:
        self._call("append")
        self.data.append(event)

    def history(self, *, tenant: str | None = None, limit: int = 100, before: int | None = None) -> Sequence[Event]:
        self._call("history")
        return self.data.history(tenant=tenant, limit=limit, before=before)

    def report(self, members: Sequence[Member]) -> None:
        self._call("report")
        self.data.report(members)

    def members(self, tenant: str | None = None) -> Sequence[Member]:
        self._call("members")
        return self.data.members(tenant)

    def health(self) -> Health:
        return Health()

    def start(self) -> None:
        """The store has no threads."""

    def after_fork(self) -> None:
        self._holder = f"{self._holder}+"

    def close(self) -> None:
        self.closed = True


class PolledStore(Fallback):
    """A fallback with a thread that polls it, and loads what has changed."""

    def __init__(self, shared: Store, *, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__(shared, clock=clock, random=Random(1).random)
        self._due, self._closed = threading.Event(), False
        self.attach(self._due.set)
        self._thread = threading.Thread(target=self._follow_store, daemon=True)
        self.start()
        self._thread.start()

    def _follow_store(self) -> None:
        while not self._closed:
            self._due.wait(0.05)
            self._due.clear()
            for tenant in self.poll():
                self.load(tenant)

    def close(self) -> None:
        self._closed = True
        self._thread.join()
        super().close()
