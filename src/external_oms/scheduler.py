"""Background work of one process: a timer thread, and a bounded number of worker threads. All of them are daemons."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from operator import itemgetter
from typing import Any, Protocol

from external_oms.clock import Clock

__all__ = ["Runner", "Scheduler"]

logger = logging.getLogger("external_oms")

SHORTAGE_SECONDS = 1.0
"""How long until a thread is tried for again where the system has none to give, in seconds."""


class Runner(Protocol):
    """Runs jobs now or later, and waits for results: the seam at which tests replace threads and time."""

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job on a worker thread as soon as one is free."""
        ...

    def at(self, key: Hashable, when: float, job: Callable[[], None]) -> None:
        """Run a job on the timer thread at an instant, in place of the last one of that key; it must not block."""
        ...

    def wait(self, future: Future[Any], seconds: float) -> bool:
        """Block until the future is done, for at most so many seconds; return whether it is done."""
        ...

    def wake(self) -> None:
        """Run the poll now; callable from any thread."""
        ...

    def start(self) -> None:
        """Start the timer thread; idempotent and cheap."""
        ...

    def after_fork(self) -> None:
        """Forget the threads, locks and jobs of the parent."""
        ...

    def reopen(self) -> None:
        """Take jobs again after `close`."""
        ...

    def close(self, seconds: float) -> None:
        """Drop every job and end the threads within so many seconds; idempotent."""
        ...


class _Pool:
    """The state of the threads between one start and one close, changed only under its lock.

    A worker that a job still blocks when the pool closes keeps this object, and cannot affect a reopened pool.
    """

    __slots__ = ("closing", "due", "jobs", "lock", "poll_now", "timer", "wakeup", "workers")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.wakeup = threading.Condition(self.lock)
        self.due: dict[Hashable, tuple[float, Callable[[], None]]] = {}
        self.jobs: deque[Callable[[], None]] = deque()
        self.timer: threading.Thread | None = None
        self.workers: set[threading.Thread] = set()
        self.poll_now = False
        self.closing = False


class Scheduler:
    """The threads of one process.

    Args:
        workers: The most worker threads at once, >= 1.
        clock: Tells the time.
        poll: Called on the timer thread every `poll_seconds` and after `wake`; must not block.
        poll_seconds: Seconds between two polls, > 0; None: only after `wake`.
    """

    def __init__(self, *, workers: int, clock: Clock, poll: Callable[[], None], poll_seconds: float | None) -> None:
        self._most = workers
        self._clock = clock
        self._poll = poll
        self._poll_seconds = poll_seconds
        self._pool = _Pool()

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job on a worker thread; drop it after `close`."""
        pool = self._pool
        with pool.lock:
            if pool.closing:
                return
            pool.jobs.append(job)
            shortage = len(pool.workers) < self._most and not self._start_worker(pool)
        if shortage:
            logger.warning("the system has no thread to give; reads wait until it has")
            self.at(_SHORTAGE, self._clock.monotonic() + SHORTAGE_SECONDS, self._retry_worker)

    def _start_worker(self, pool: _Pool) -> bool:
        worker = threading.Thread(target=self._work, args=(pool,), name="external-oms-worker", daemon=True)
        try:
            worker.start()
        except RuntimeError:
            return bool(pool.workers)  # a worker that runs takes the job when it is done
        pool.workers.add(worker)
        return True

    def _retry_worker(self) -> None:
        pool = self._pool
        with pool.lock:
            needed = bool(pool.jobs) and not pool.workers
            shortage = needed and not self._start_worker(pool)
        if shortage:
            self.at(_SHORTAGE, self._clock.monotonic() + SHORTAGE_SECONDS, self._retry_worker)

    def _work(self, pool: _Pool) -> None:
        while True:
            with pool.lock:
                if pool.closing or not pool.jobs:
                    pool.workers.discard(threading.current_thread())
                    return
                job = pool.jobs.popleft()
            _run(job)

    def at(self, key: Hashable, when: float, job: Callable[[], None]) -> None:
        """Run a job on the timer thread at an instant; drop it after `close`."""
        pool = self._pool
        with pool.lock:
            if not pool.closing:
                pool.due[key] = when, job
                self._start_timer(pool)
                pool.wakeup.notify()

    def wait(self, future: Future[Any], seconds: float) -> bool:
        """Block until the future is done, for at most so many seconds; return whether it is done."""
        try:
            future.exception(max(0.0, min(seconds, threading.TIMEOUT_MAX)))  # does not raise what the future holds
        except FutureTimeoutError:
            return False
        return True

    def wake(self) -> None:
        """Run the poll now."""
        pool = self._pool
        with pool.lock:
            pool.poll_now = True
            pool.wakeup.notify()

    def start(self) -> None:
        """Start the timer thread."""
        pool = self._pool
        if pool.timer is None:  # an outdated look costs one lock
            with pool.lock:
                self._start_timer(pool)

    def _start_timer(self, pool: _Pool) -> None:
        if pool.timer is None and not pool.closing:
            timer = threading.Thread(target=self._keep_time, args=(pool,), name="external-oms-timer", daemon=True)
            try:
                timer.start()
            except RuntimeError:
                return  # the next call tries again
            pool.timer = timer

    def _keep_time(self, pool: _Pool) -> None:
        next_poll = self._clock.monotonic()
        while True:
            with pool.lock:
                if pool.closing:
                    return
                now = self._clock.monotonic()
                ready: list[tuple[float, Callable[[], None]]] = []
                wake_at = next_poll if self._poll_seconds is not None else float("inf")
                for key, due in tuple(pool.due.items()):
                    if due[0] <= now:
                        ready.append(pool.due.pop(key))
                    else:
                        wake_at = min(wake_at, due[0])
                ready.sort(key=itemgetter(0))
                if pool.poll_now or now >= wake_at:
                    pool.poll_now = False
                    next_poll = now + (self._poll_seconds or 0.0)
                    ready.append((now, self._poll))
                if not ready:  # a lifetime may be longer than the system can wait for
                    pool.wakeup.wait(min(wake_at - now, threading.TIMEOUT_MAX))
            for _, job in ready:
                _run(job)

    def after_fork(self) -> None:
        """Start from nothing, as in a new process."""
        self._pool = _Pool()

    def reopen(self) -> None:
        """Take jobs again after `close`."""
        if self._pool.closing:
            self._pool = _Pool()

    def close(self, seconds: float) -> None:
        """Drop every job and end the threads within so many seconds."""
        pool = self._pool
        with pool.lock:
            pool.closing = True
            pool.jobs.clear()
            pool.due.clear()
            pool.wakeup.notify_all()
            threads = [thread for thread in (pool.timer, *pool.workers) if thread is not None]
        until = self._clock.monotonic() + seconds
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - self._clock.monotonic()))


_SHORTAGE = "thread shortage"


def _run(job: Callable[[], None]) -> None:
    try:
        job()
    except Exception:  # the threads serve every tenant, and one job must not end them
        logger.exception("a background job failed; this is a bug in external_oms, please report it")
