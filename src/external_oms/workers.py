"""Threads, all daemons: one that keeps due times, and a bounded few that read; gone within a second of `close`."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from external_oms.clock import Clock

__all__ = ["Runner", "Workers"]

logger = logging.getLogger("external_oms")

IDLE_SECONDS = 10.0
"""How long a reader thread stays without work: longer than most waits between two reads of one settling tenant."""

SHORT_SECONDS = 1.0
"""How long until a reader is tried for again where the system had no thread to give."""


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


class _Crew:
    """The threads from one beginning to one end, and what they share; changed only under its lock.

    A thread belongs to its crew for life: one that a hanging job keeps beyond the end has no part in what comes after.
    """

    __slots__ = (
        "closing",
        "due",
        "idle",
        "jobs",
        "lock",
        "reader_wakes",
        "short",
        "threads",
        "timer",
        "timer_wakes",
        "woken",
    )

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.timer_wakes = threading.Condition(self.lock)
        self.reader_wakes = threading.Condition(self.lock)
        self.due: list[tuple[float, int, Callable[[], None]]] = []
        self.jobs: deque[Callable[[], None]] = deque()
        self.threads: set[threading.Thread] = set()
        self.timer: threading.Thread | None = None
        self.idle = 0
        self.woken = False
        self.short = False
        self.closing = False


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
        self._crew = _Crew()

    def after_fork(self) -> None:
        """Start from nothing, as in a new process."""
        self._crew = _Crew()

    def start(self) -> None:
        """Make sure that the thread that keeps due times runs."""
        crew = self._crew
        if crew.timer is None:  # a stale look costs one lock
            with crew.lock:
                self._start_timer(crew)

    def _start_timer(self, crew: _Crew) -> None:
        if crew.timer is None and not crew.closing:
            crew.timer = self._spawn(crew, self._keep_due_times, "external-oms-due")

    def _spawn(self, crew: _Crew, target: Callable[[_Crew], None], name: str) -> threading.Thread | None:
        """A thread of the crew, or None where the system has none to give now: who needs it tries again."""
        thread = threading.Thread(target=target, args=(crew,), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            crew.short = True
            return None
        crew.threads.add(thread)
        return thread

    def submit(self, job: Callable[[], None]) -> None:
        """Run the job on a reader thread; after `close`, not at all."""
        crew = self._crew
        with crew.lock:
            if crew.closing:
                return
            crew.jobs.append(job)
            if crew.idle >= len(crew.jobs):
                crew.reader_wakes.notify()
            else:
                self._start_reader(crew)
            short, crew.short = crew.short, False
        if short:
            logger.warning("the system has no thread to give; reads wait until it has")

    def _start_reader(self, crew: _Crew) -> None:
        readers = len(crew.threads) - (crew.timer is not None)
        if crew.closing or not crew.jobs or readers >= self._most:
            return
        if self._spawn(crew, self._read, "external-oms-read") is None and readers == 0:
            self._push(crew, self._clock.monotonic() + SHORT_SECONDS, partial(self._try_again, crew))

    def _try_again(self, crew: _Crew) -> None:
        with crew.lock:
            self._start_reader(crew)

    def at(self, when: float, job: Callable[[], None]) -> None:
        """Run the job at that monotonic instant; after `close`, not at all."""
        crew = self._crew
        with crew.lock:
            if not crew.closing:
                self._push(crew, when, job)

    def _push(self, crew: _Crew, when: float, job: Callable[[], None]) -> None:
        heapq.heappush(crew.due, (when, next(self._order), job))
        self._start_timer(crew)
        if crew.due[0][0] >= when:
            crew.timer_wakes.notify()

    def wake(self) -> None:
        """Poll now."""
        crew = self._crew
        with crew.lock:
            crew.woken = True
            crew.timer_wakes.notify()

    def _keep_due_times(self, crew: _Crew) -> None:
        next_poll = self._clock.monotonic()
        while True:
            jobs, next_poll, closing = self._next_due(crew, next_poll)
            if closing:
                break
            for job in jobs:
                _run(job)
        with crew.lock:
            crew.threads.discard(threading.current_thread())

    def _next_due(self, crew: _Crew, next_poll: float) -> tuple[list[Callable[[], None]], float, bool]:
        with crew.lock:
            while not crew.closing:
                now = self._clock.monotonic()
                ready = []
                while crew.due and crew.due[0][0] <= now:
                    ready.append(heapq.heappop(crew.due)[2])
                polls = self._poll_seconds is not None and now >= next_poll
                if crew.woken or polls:
                    crew.woken = False
                    next_poll = now + (self._poll_seconds or 0.0)
                    ready.append(self._poll)
                if ready:
                    return ready, next_poll, False
                moments = [crew.due[0][0]] if crew.due else []
                if self._poll_seconds is not None:
                    moments.append(next_poll)
                # a lifetime may be longer than the system can wait for
                crew.timer_wakes.wait(min(min(moments) - now, threading.TIMEOUT_MAX) if moments else None)
            return [], next_poll, True

    def _read(self, crew: _Crew) -> None:
        while True:
            with crew.lock:
                crew.idle += 1
                found = crew.reader_wakes.wait_for(lambda: crew.jobs or crew.closing, IDLE_SECONDS)
                crew.idle -= 1
                if not found or crew.closing:
                    crew.threads.discard(threading.current_thread())
                    return
                job = crew.jobs.popleft()
            _run(job)

    def close(self, seconds: float) -> None:
        """End every thread within so many seconds; after it, `submit` and `at` do nothing until a fork or `reopen`."""
        crew = self._crew
        with crew.lock:
            crew.closing = True
            crew.jobs.clear()
            crew.due.clear()
            crew.timer_wakes.notify_all()
            crew.reader_wakes.notify_all()
            threads = [thread for thread in crew.threads if thread is not threading.current_thread()]
        until = self._clock.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, until - self._clock.monotonic()))

    def reopen(self) -> None:
        """Take jobs again after `close`."""
        if self._crew.closing:
            self._crew = _Crew()


def _run(job: Callable[[], None]) -> None:
    try:
        job()
    except Exception:  # the thread serves every tenant; one job's mistake must not end it
        logger.exception("a background job failed; this is a defect of external_oms, please report it")
