"""Threads, all daemons: one that keeps due times, and a bounded few that read; gone within a second of `close`."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from external_oms.clock import Clock

__all__ = ["Runner", "Workers"]

logger = logging.getLogger("external_oms")

IDLE_SECONDS = 10.0
"""How long a reader thread stays without work: longer than most waits between two reads of one settling tenant."""


class Runner(Protocol):
    """What the cache needs of threads; tests hand in one that runs jobs when told to."""

    def submit(self, job: Callable[[], None]) -> None:
        """Run the job on a reader thread, as soon as one is free."""
        ...

    def at(self, when: float, job: Callable[[], None]) -> None:
        """Run the job on the thread that keeps due times, at that monotonic instant; it must not block."""
        ...

    def wake(self) -> None:
        """Run the poll now; callable from any thread."""
        ...

    def start(self) -> None:
        """Make sure that the thread that keeps due times runs; cheap where it does."""
        ...

    def after_fork(self) -> None:
        """Forget the parent's threads, locks and jobs."""
        ...

    def reopen(self) -> None:
        """Take jobs again after `close`."""
        ...

    def close(self, seconds: float) -> None:
        """End every thread within so many seconds; idempotent."""
        ...


class Workers:
    """The threads of one process.

    Args:
        readers: The most reader threads at once, >= 1.
        clock: What tells the time.
        poll: Called on the thread that keeps due times, every `poll_seconds` and after `wake`; must not block.
        poll_seconds: Seconds between two polls; None polls only after `wake`.
    """

    def __init__(self, *, readers: int, clock: Clock, poll: Callable[[], None], poll_seconds: float | None) -> None:
        self._most = readers
        self._clock = clock
        self._poll = poll
        self._poll_seconds = poll_seconds
        self._order = itertools.count()
        self.after_fork()

    def after_fork(self) -> None:
        """Start from nothing, as in a new process."""
        self._lock = threading.Lock()
        self._timer_wakes = threading.Condition(self._lock)
        self._reader_wakes = threading.Condition(self._lock)
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._jobs: deque[Callable[[], None]] = deque()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._timer: threading.Thread | None = None
        self._woken = False
        self._closing = False

    def start(self) -> None:
        """Make sure that the thread that keeps due times runs."""
        if self._timer is None:  # a stale look costs one lock
            with self._lock:
                self._start_timer()

    def _start_timer(self) -> None:
        if self._timer is None and not self._closing:
            self._timer = self._spawn(self._keep_due_times, "external-oms-due")

    def _spawn(self, target: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.add(thread)
        thread.start()
        return thread

    def submit(self, job: Callable[[], None]) -> None:
        """Run the job on a reader thread; after `close`, not at all."""
        with self._lock:
            if self._closing:
                return
            self._jobs.append(job)
            if self._idle >= len(self._jobs):
                self._reader_wakes.notify()
            elif sum(thread is not self._timer for thread in self._threads) < self._most:
                self._spawn(self._read, "external-oms-read")

    def at(self, when: float, job: Callable[[], None]) -> None:
        """Run the job at that monotonic instant."""
        with self._lock:
            heapq.heappush(self._due, (when, next(self._order), job))
            self._start_timer()
            if self._due[0][0] >= when:
                self._timer_wakes.notify()

    def wake(self) -> None:
        """Poll now."""
        with self._lock:
            self._woken = True
            self._timer_wakes.notify()

    def _keep_due_times(self) -> None:
        next_poll = self._clock.monotonic()
        while True:
            jobs, next_poll, closing = self._next_due(next_poll)
            if closing:
                break
            for job in jobs:
                _run(job)
        with self._lock:
            self._threads.discard(threading.current_thread())

    def _next_due(self, next_poll: float) -> tuple[list[Callable[[], None]], float, bool]:
        with self._lock:
            while not self._closing:
                now = self._clock.monotonic()
                ready = []
                while self._due and self._due[0][0] <= now:
                    ready.append(heapq.heappop(self._due)[2])
                polls = self._poll_seconds is not None and now >= next_poll
                if self._woken or polls:
                    self._woken = False
                    next_poll = now + (self._poll_seconds or 0.0)
                    ready.append(self._poll)
                if ready:
                    return ready, next_poll, False
                moments = [self._due[0][0]] if self._due else []
                if self._poll_seconds is not None:
                    moments.append(next_poll)
                self._timer_wakes.wait(min(moments) - now if moments else None)
            return [], next_poll, True

    def _read(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
                found = self._reader_wakes.wait_for(lambda: self._jobs or self._closing, IDLE_SECONDS)
                self._idle -= 1
                if not found or self._closing:
                    self._threads.discard(threading.current_thread())
                    return
                job = self._jobs.popleft()
            _run(job)

    def close(self, seconds: float) -> None:
        """End every thread within so many seconds; after it, `submit` and `at` do nothing until a fork or `reopen`."""
        with self._lock:
            self._closing = True
            self._jobs.clear()
            self._due.clear()
            self._timer_wakes.notify_all()
            self._reader_wakes.notify_all()
            threads = [thread for thread in self._threads if thread is not threading.current_thread()]
        until = self._clock.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, until - self._clock.monotonic()))

    def reopen(self) -> None:
        """Take jobs again after `close`."""
        if self._closing:
            self.after_fork()


def _run(job: Callable[[], None]) -> None:
    try:
        job()
    except Exception:  # the thread serves every tenant; one job's mistake must not end it
        logger.exception("a background job failed; this is a defect of external_oms, please report it")
