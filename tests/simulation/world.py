"""A deterministic world: one scheduler owns the clock, the interleaving of threads and every random choice.

Threads are greenlets that give up control only at `World.pause`, `World.sleep` and `World.wait`. Every choice comes
from one sequence of numbers, so that the same sequence gives the same history, and a shorter sequence is a smaller one.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")

SPIN_LIMIT = 3000
"""Switches without any passage of time from which on the code under test spins."""

WALL_OFFSET = 1_700_000_000.0


class Violation(BaseException):
    """An invariant does not hold; not an `Exception`, so that no code under test can catch it."""


class Choices:
    """The source of everything random: given numbers first, then a seeded generator, or zeros.

    Args:
        given: Numbers to start with.
        seed: Seeds what follows them; None gives zeros, which are the plainest choice everywhere.
    """

    def __init__(self, given: Sequence[int] = (), seed: int | None = None) -> None:
        self.made: list[int] = []
        self._given = tuple(given)
        self._random = None if seed is None else random.Random(seed)

    def __deepcopy__(self, memo: dict[int, object]) -> Choices:
        """A forked process draws from the same sequence."""
        return self

    def below(self, bound: int) -> int:
        """Return a number in [0, bound)."""
        place = len(self.made)
        if place < len(self._given):
            number = self._given[place] % bound
        else:
            number = self._random.randrange(bound) if self._random is not None else 0
        self.made.append(number)
        return number

    def chance(self, percent: int) -> bool:
        """Return True so many times in a hundred."""
        return self.below(100) >= 100 - percent

    def unit(self) -> float:
        """Return a number in [0, 1)."""
        return self.below(1 << 16) / (1 << 16)

    def pick(self, options: Sequence[T]) -> T:
        """Return one of the options."""
        return options[self.below(len(options))]


class Task(greenlet):
    """A thread of a process in the world."""

    def __init__(self, world: World, owner: Process, job: Callable[[], None], name: str) -> None:
        super().__init__(job, parent=world.main)
        self.owner = owner
        self.name = name
        self.ready = True
        self.woken = 0


class Process:
    """What tasks belong to: it can be frozen, and killed."""

    def __init__(self) -> None:
        self.alive = True
        self.frozen = False

    def __deepcopy__(self, memo: dict[int, object]) -> Process:
        return Process()


class World:
    """The scheduler."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.main = getcurrent()
        self.now = 1000.0
        self.switches = 0
        self.log: list[str] = []
        self._tasks: list[Task] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._spins = 0

    def __deepcopy__(self, memo: dict[int, object]) -> World:
        return self

    def note(self, line: str) -> None:
        """Add a line to the story of the history."""
        self.log.append(f"{self.now - 1000.0:9.3f}  {line}")

    # -- called by the main greenlet --------------------------------------------------------------------------------

    def spawn(self, owner: Process, job: Callable[[], None], name: str) -> None:
        """Start a task."""
        self._tasks.append(Task(self, owner, job, name))

    def call_at(self, when: float, job: Callable[[], None]) -> None:
        """Call a job on the main greenlet at an instant; it must not wait."""
        heapq.heappush(self._timers, (when, next(self._order), job))

    def run(self, seconds: float, check: Callable[[], None] | None = None) -> None:
        """Let the world go on for so many seconds; call the check from time to time, on the main greenlet."""
        end = self.now + seconds
        while True:
            runnable = [task for task in self._tasks if task.ready and task.owner.alive and not task.owner.frozen]
            if runnable:
                task = runnable[self.choices.below(len(runnable))] if len(runnable) > 1 else runnable[0]
                self._switch(task)
                if check is not None and self.choices.chance(4):
                    check()
                continue
            if not self._timers or self._timers[0][0] > end:
                break
            self._advance(self._timers[0][0])
        self._advance(end)

    def _advance(self, when: float) -> None:
        if when > self.now:
            self.now = when
            self._spins = 0
        while self._timers and self._timers[0][0] <= self.now:
            heapq.heappop(self._timers)[2]()

    def _switch(self, task: Task) -> None:
        self.switches += 1
        self._spins += 1
        if self._spins > SPIN_LIMIT:
            raise Violation(f"the code spins: {SPIN_LIMIT} switches in one instant, the last one to {task.name}")
        task.switch()
        if task.dead:
            self._tasks.remove(task)

    def reap(self, owner: Process) -> None:
        """Kill a process: none of its tasks runs again."""
        owner.alive = False
        self._tasks = [task for task in self._tasks if task.owner is not owner]

    # -- called by tasks ----------------------------------------------------------------------------------------------

    @property
    def task(self) -> Task | None:
        """The task that runs; None on the main greenlet."""
        current = getcurrent()
        return current if isinstance(current, Task) else None

    def pause(self) -> None:
        """Let another task run, perhaps; nothing on the main greenlet."""
        if self.task is not None and self.choices.chance(50):
            self.main.switch()

    def sleep(self, seconds: float) -> None:
        """Let time pass for this task; nothing on the main greenlet."""
        task = self.task
        if task is not None:
            self._park(task, self.now + seconds)

    def _park(self, task: Task, until: float) -> None:
        task.ready = False
        task.woken += 1
        turn = task.woken

        def wake() -> None:
            if task.woken == turn:
                task.ready = True

        self.call_at(until, wake)
        self.main.switch()
        task.woken += 1  # a timer that is left over wakes nobody

    def wait(self, future: Future[Any], seconds: float) -> bool:
        """Wait for a future on a task; return whether it is done."""
        task = self.task
        if task is None:
            raise Violation("the main greenlet must not wait")
        until = self.now + max(0.0, seconds)

        def done(_: object) -> None:
            task.ready = True

        if not future.done() and self.now < until:
            future.add_done_callback(done)
            self._park(task, until)
        return future.done()


class SimulatedClock:
    """The clock of one host: its monotonic clock has an origin of its own, its wall clock is a little wrong."""

    def __init__(self, world: World, offset: float, skew: float) -> None:
        self._world = world
        self.offset = offset
        self._skew = skew

    def monotonic(self) -> float:
        """Return the instant on this host."""
        return self._world.now + self.offset

    def wall(self) -> float:
        """Return seconds since the epoch as this host sees them."""
        return self._world.now + WALL_OFFSET + self._skew


class SimulatedRunner:
    """The scheduler of one process in the world: the seam `Runner`, without threads.

    Args:
        world: The world.
        owner: The process.
        clock: Its clock.
        poll: The poll of the cache.
        poll_seconds: Its interval; None: only after `wake`.

    Attributes:
        waiting: The tasks that wait, by name, and what for.
    """

    WORKERS = 4

    def __init__(
        self,
        world: World,
        owner: Process,
        clock: SimulatedClock,
        poll: Callable[[], None],
        poll_seconds: float | None,
    ) -> None:
        self.world = world
        self.owner = owner
        self.clock = clock
        self.poll = poll
        self.poll_seconds = poll_seconds
        self.on_wait: Callable[[], None] | None = None
        self._forget()

    def _forget(self) -> None:
        self.waiting: list[tuple[str, Future[Any]]] = []
        self._jobs: list[Callable[[], None]] = []
        self._busy = 0
        self._due: dict[Hashable, tuple[float, Callable[[], None]]] = {}
        self._started = False
        self._closing = False
        self._ticking: list[Callable[[], None]] = []
        self._ticks = False

    def submit(self, job: Callable[[], None]) -> None:
        """Run a job on one of a few workers."""
        if self._closing:
            return
        self._jobs.append(job)
        if self._busy < self.WORKERS:
            self._busy += 1
            self.world.spawn(self.owner, self._work, "worker")

    def _work(self) -> None:
        while self._jobs and not self._closing:
            self._jobs.pop(0)()
            self.world.pause()
        self._busy -= 1

    def at(self, key: Hashable, when: float, job: Callable[[], None]) -> None:
        """Run a job on the timer at an instant."""
        if self._closing:
            return
        entry = (when, job)
        self._due[key] = entry

        def due() -> None:
            if self._due.get(key) is entry and self.owner.alive:
                del self._due[key]
                self._tick(job)

        self.world.call_at(max(self.world.now, when - self.clock.offset), due)

    def _tick(self, job: Callable[[], None]) -> None:
        """Run a job on the timer task, one after the other."""
        self._ticking.append(job)
        if not self._ticks:
            self._ticks = True
            self.world.spawn(self.owner, self._timer, "timer")

    def _timer(self) -> None:
        while self._ticking:
            self._ticking.pop(0)()
            self.world.pause()
        self._ticks = False

    def wait(self, future: Future[Any], seconds: float) -> bool:
        """Wait for a future."""
        if self.on_wait is not None and not future.done():
            self.on_wait()
        waiting = (self.world.task.name if self.world.task is not None else "", future)
        self.waiting.append(waiting)
        try:
            return self.world.wait(future, seconds)
        finally:
            if waiting in self.waiting:
                self.waiting.remove(waiting)

    def wake(self) -> None:
        """Poll now."""
        if not self._closing:
            self._tick(self.poll)

    def start(self) -> None:
        """Begin to poll."""
        if self._started or self._closing or self.poll_seconds is None:
            return
        self._started = True
        self._next_poll()

    def _next_poll(self) -> None:
        if self.owner.alive and not self._closing and self._started:
            self._tick(self.poll)
            self.world.call_at(self.world.now + (self.poll_seconds or 0.0), self._next_poll)

    def after_fork(self) -> None:
        """Forget everything."""
        self._forget()

    def reopen(self) -> None:
        """Take jobs again."""
        self._closing = False

    def close(self, seconds: float) -> None:
        """Drop every job."""
        self._closing = True
        self._due.clear()
        self._jobs.clear()
