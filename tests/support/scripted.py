"""What the tests of the core share: a source that does as told, a runner moved by hand."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any

from external_oms.cache import Cache, CacheStore
from external_oms.clock import Clock
from external_oms.config import Document, Reading
from external_oms.errors import Unavailable
from external_oms.policy import Windows
from external_oms.scheduler import Runner, Scheduler
from external_oms.stores.memory import MemoryStore
from tests.support.clock import FakeClock

__all__ = ["SOON", "TENANT", "WINDOWS", "Hand", "Held", "Source", "make_cache"]

TENANT = "acme"
SOON = 10.0
"""When a test that waits for a thread gives up; none comes near it."""

WINDOWS = Windows(ttl_seconds=30.0, stale_while_revalidate_seconds=30.0, stale_if_error_seconds=3600.0)


class Held:
    """A read that has begun and has not been answered."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self._outcome: Reading | Exception | None = None
        self._answered = threading.Event()

    def answer(self, outcome: bool | Reading | Exception) -> None:
        """Let it end so."""
        self._outcome = Reading(Document(outcome)) if isinstance(outcome, bool) else outcome
        self._answered.set()

    def wait(self) -> Reading:
        assert self._answered.wait(SOON), "the test left a read without an answer"
        if isinstance(self._outcome, Exception):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome


class Source:
    """The config API as the test has it: a value, an error, or reads that are held until answered one by one.

    Attributes:
        says: What a read gives or raises.
        holding: The tenants whose reads are held.
        reads: The tenant of every read so far, in the order of their beginning.
        at: When each of them began, on the clock.
    """

    def __init__(self, clock: Clock) -> None:
        self.says: bool | Reading | Exception = True
        self.holding: set[str] = set()
        self.reads: list[str] = []
        self.at: list[float] = []
        self._clock = clock
        self._changed = threading.Condition()
        self._held: list[Held] = []

    def __call__(self, tenant: str, etag: str | None) -> Reading:
        with self._changed:
            self.reads.append(tenant)
            self.at.append(self._clock.monotonic())
            held = Held(tenant)
            if tenant in self.holding:
                self._held.append(held)
                self._changed.notify_all()
            else:
                held.answer(self.says)
        return held.wait()

    def held(self, tenant: str = TENANT) -> Held:
        """The next read that is held, once it has begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(held.tenant == tenant for held in self._held), SOON)
            held = next(held for held in self._held if held.tenant == tenant)
            self._held.remove(held)
            return held

    def release(self) -> None:
        """Hold nothing any more, and let whatever is held fail."""
        with self._changed:
            self.holding.clear()
            for held in self._held:
                held.answer(Unavailable("the test is over"))
            self._held.clear()


class Hand:
    """A runner without threads: a job runs when it is submitted, a due one when the test lets time pass.

    Attributes:
        poll: What `wake` calls; set by `make_cache`.
    """

    def __init__(self, clock: FakeClock) -> None:
        self.poll: Callable[[], None] | None = None
        self._clock = clock
        self._order = itertools.count()
        self._due: dict[Hashable, tuple[float, int, Callable[[], None]]] = {}

    def submit(self, job: Callable[[], None]) -> None:
        job()

    def at(self, key: Hashable, when: float, job: Callable[[], None]) -> None:
        self._due[key] = when, next(self._order), job

    def wait(self, future: Future[Any], seconds: float) -> bool:
        """Let time pass until the future is done, at most so much."""
        until = self._clock.monotonic() + max(0.0, seconds)
        while not future.done():
            if not self._run_next(until):
                self._clock.advance(until - self._clock.monotonic())
                break
        return future.done()

    def advance(self, seconds: float) -> None:
        """Let so much time pass, and run what falls due meanwhile at its time."""
        until = self._clock.monotonic() + seconds
        while self._run_next(until):
            pass
        self._clock.advance(max(0.0, until - self._clock.monotonic()))

    def _run_next(self, until: float) -> bool:
        key = min(self._due, key=lambda key: self._due[key][:2], default=None)
        if key is None or self._due[key][0] > until:
            return False
        when, _, job = self._due.pop(key)
        self._clock.advance(max(0.0, when - self._clock.monotonic()))
        job()
        return True

    def drop(self) -> None:
        """Forget what is due, as a forked child does."""
        self._due.clear()

    def wake(self) -> None:
        if self.poll is not None:
            self.poll()

    def start(self) -> None:
        """There is no thread to start."""

    def after_fork(self) -> None:
        self.drop()

    def reopen(self) -> None:
        """Always open."""

    def close(self, seconds: float) -> None:
        self.drop()


def make_cache(
    source: Source,
    clock: Clock,
    *,
    runner: Runner | None = None,
    store: CacheStore | None = None,
    tenants: tuple[str, ...] = (TENANT,),
    windows: Windows = WINDOWS,
    timeout_seconds: float = 5.0,
    background: bool = True,
    waits_after_failure: bool = False,
    max_waiters: int = 16,
    random: Callable[[], float] = lambda: 0.5,
) -> Cache:
    """Return a cache over a memory store; with threads of its own, or with the runner given."""

    def make_runner(poll: Callable[[], None], poll_seconds: float | None) -> Runner:
        if isinstance(runner, Hand):
            runner.poll = poll
        return Scheduler(workers=16, clock=clock, poll=poll, poll_seconds=poll_seconds) if runner is None else runner

    return Cache(
        tenants=tenants,
        store=MemoryStore(clock=clock) if store is None else store,
        source=source,
        windows=windows,
        timeout_seconds=timeout_seconds,
        clock=clock,
        random=random,
        background=background,
        waits_after_failure=waits_after_failure,
        max_waiters=max_waiters,
        runner=make_runner,
    )
