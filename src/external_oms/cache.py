"""The heart: answers that never wait while one may be served; what is seen, what is noticed, what is due.

How a value travels::

    lookup ── servable? ── yes ──> answer at once; not fresh: a flight starts behind the caller's back
                           no  ──> join the flight, wait with a deadline, judge again

Threads meet here and in `flights`. No lock is held across I/O, a callback or an emit. The record is one reference,
replaced whole, and the word remembered beside it was seen *before* it was loaded, so whoever races finds a word that
differs and loads again.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import replace
from functools import partial

from external_oms.clock import Clock
from external_oms.errors import NothingToServe, TenantError, Unavailable
from external_oms.flights import Flight, Flights, ReadEnd
from external_oms.flights import Source as ReadSource
from external_oms.freshness import Freshness, Windows
from external_oms.judgement import Answer, Source, State, blocked_until, due_at, error_of, last_number, state_of
from external_oms.seats import Change, ChangeKind, Seats, Warrant
from external_oms.signals import Signal
from external_oms.stores.base import Record, Store
from external_oms.workers import Runner

__all__ = ["Cache", "Change", "ChangeKind"]

WAIT_GRACE_SECONDS = 0.25
"""How much longer than a read may last its waiters wait: so that they get its failure, not their own deadline."""


class Cache:
    """The snapshots of some tenants, over one store and one source.

    Args:
        tenants: Their names.
        store: Where records live.
        source: Reads the API for a tenant: `(tenant, etag) -> Reading`; raises `ReadError` and nothing else.
        windows: How long a value lives.
        timeout_seconds: The longest that one read lasts, > 0.
        clock: What tells the time.
        random: Gives numbers in [0, 1).
        background: Whether values are read again before they grow stale, without an evaluation asking.
        runner: Makes the threads, given the poll and its interval.

    Attributes:
        tenants: The names of the configured tenants.
        polls: Told after each look for changes by others, on the thread that keeps due times.
    """

    def __init__(  # noqa: PLR0913 - the seams of the heart, each named at the one place that makes it
        self,
        *,
        tenants: Iterable[str],
        store: Store,
        source: ReadSource,
        windows: Windows,
        timeout_seconds: float,
        clock: Clock,
        random: Callable[[], float],
        background: bool,
        runner: Callable[[Callable[[], None], float | None], Runner],
    ) -> None:
        self.tenants = tuple(tenants)
        self._known = frozenset(self.tenants)
        self.polls: Signal[None] = Signal()
        self._store = store
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._random = random
        self._background = background
        self._runner = runner(self._poll, store.poll_seconds)
        self._flights = Flights(
            tenants=self.tenants,
            store=store,
            source=source,
            runner=self._runner,
            clock=clock,
            random=random,
            ttl_seconds=windows.ttl_seconds,
            timeout_seconds=timeout_seconds,
            landed=self._catch_up,
        )
        self._seats = Seats(self.tenants, store=store, windows=windows, clock=clock)
        self._plans: dict[str, Record] = {}
        self._planning = threading.Lock()  # guards the plans
        store.attach(self._runner.wake)

    @property
    def changes(self) -> Signal[Change]:
        """Told whenever something changed, in this process or another."""
        return self._seats.changes

    @property
    def reads(self) -> Signal[ReadEnd]:
        """Told whenever a read by this process ended and its outcome was stored."""
        return self._flights.ended

    @property
    def lease_waits(self) -> Signal[str]:
        """Told the tenant when a read finds that another process is at it, and waits for its result."""
        return self._flights.waits

    # -- asking ---------------------------------------------------------------------------------------------------

    def tenant_of(self, name: object) -> str:
        """The configured tenant that a call means by this name, or by None.

        Raises:
            TenantError: No such tenant is configured, or none is named where several are.
        """
        if name is None:
            if len(self.tenants) == 1:
                return self.tenants[0]
            raise TenantError(None, "several tenants are configured and the call names none; name it as `tenant`")
        if isinstance(name, str) and name in self._known:
            return name
        raise TenantError(str(name)[:80], f"tenant {str(name)[:80]!r} is not configured")

    def warrant(self, answer: Answer) -> Warrant:
        """Until when, and while which word stands where, a fresh answer may be given again without asking."""
        return self._seats.warrant(answer)

    @staticmethod
    def remembered(answer: Answer) -> Answer:
        """The answer as it is given again: from this process's memory, unless another process read it."""
        return replace(answer, source=Source.STORE if answer.record.foreign else Source.MEMORY)

    def peek(self, tenant: str) -> Answer:
        """What may be served now, without waiting and without starting a read."""
        return self._seats.judge(tenant)

    def lookup(self, tenant: str) -> Answer:
        """What may be served now; waits for a read, with a deadline, only where nothing may be served without."""
        answer, flight = self._board(tenant)
        if flight is None:
            return answer
        until = self._deadline()
        while flight is not None:
            try:
                flight.done.result(max(0.0, until - self._clock.monotonic()))
            except FutureTimeoutError:
                return self._seats.judge(tenant, failing=True)
            answer, flight = self._land(tenant, flight, until)
        return answer

    async def lookup_async(self, tenant: str) -> Answer:
        """As `lookup`; waits without holding the event loop, and shares the flights of threads."""
        answer, flight = self._board(tenant)
        if flight is None:
            return answer
        until, loop = self._deadline(), asyncio.get_running_loop()
        while flight is not None:
            # a future of the waiter's own: cancelled, it does not cancel the flight of the others
            landing: asyncio.Future[None] = loop.create_future()
            flight.done.add_done_callback(partial(_wake, loop, landing))
            try:
                await asyncio.wait_for(landing, max(0.0, until - self._clock.monotonic()))
            except TimeoutError:
                return self._seats.judge(tenant, failing=True)
            answer, flight = self._land(tenant, flight, until)
        return answer

    def _board(self, tenant: str) -> tuple[Answer, Flight | None]:
        """The answer, and the flight to wait for where the answer alone will not do."""
        self._runner.start()
        answer = self._seats.judge(tenant)
        if answer.freshness is Freshness.FRESH:
            self._schedule(tenant, answer.record)
            return answer, None
        blocked = blocked_until(answer.record) > self._clock.monotonic()
        if blocked or (answer.servable and self._background):
            self._schedule(tenant, answer.record)
            return answer, None
        flight = self._flights.join(tenant, generation=answer.record.generation, newer_than=last_number(answer.record))
        return answer, None if answer.servable else flight

    def _land(self, tenant: str, flight: Flight, until: float) -> tuple[Answer, Flight | None]:
        """The answer after a flight has ended, and the next one to wait for where an invalidation overtook it."""
        error = flight.done.result(0)
        answer = self._seats.judge(tenant, failing=error is not None)
        snapshot = answer.servable
        if snapshot is not None:
            own = flight.read_number is not None and snapshot.read_number == flight.read_number
            return (replace(answer, source=Source.API) if own else answer), None
        if error is not None or self._clock.monotonic() >= until:
            return answer, None
        return self._board(tenant)

    def failure(self, answer: Answer) -> NothingToServe:
        """The error that says why there is nothing to serve."""
        failure = answer.record.failure
        return NothingToServe(answer.tenant, error_of(failure, now=self._clock.monotonic()) if failure else None)

    def state(self, tenant: str) -> State:
        """What is known of a tenant; never waits."""
        return state_of(self.peek(tenant), now=self._clock.monotonic())

    # -- changing -------------------------------------------------------------------------------------------------

    def refresh(self, tenant: str) -> Answer:
        """Read the API now: a read that begins after this call, whatever is under way.

        Raises:
            ReadError: It failed; what is served otherwise stays as it was.
        """
        self._runner.start()
        now = self._clock.monotonic()
        record = self._store.load(tenant)
        if record.failure is not None and record.failure.obliged and blocked_until(record) > now:
            raise error_of(record.failure, now=now)
        flight = self._flights.join(tenant, generation=record.generation, newer_than=record.reads, forced=True)
        try:
            error = flight.done.result(2 * self._timeout_seconds + WAIT_GRACE_SECONDS)
        except FutureTimeoutError as late:
            raise Unavailable("the read did not end within its deadline; another process's read may be stuck") from late
        if error is not None:
            raise error
        answer = self._seats.judge(tenant)
        own = answer.record.snapshot is not None and answer.record.snapshot.read_number == flight.read_number
        return replace(answer, source=Source.API) if own else answer

    def invalidate(self, tenant: str) -> int:
        """Raise the generation: nothing read before this call is served as fresh after it; a read follows.

        Returns:
            The new generation.
        """
        generation = self._store.invalidate(tenant)
        self.follow(tenant)
        return generation

    def deliver(self, tenant: str, delivery_id: str, *, seconds: float) -> int | None:
        """As `invalidate`, once per delivery id; None where the id was seen within so many seconds."""
        generation = self._store.deliver(tenant, delivery_id, seconds=seconds)
        if generation is not None:
            self.follow(tenant)
        return generation

    def follow(self, tenant: str) -> None:
        """Take note of a change made to the store just now and have a read follow an invalidation."""
        self._runner.start()
        answer = self._seats.judge(tenant)
        if self._background and answer.freshness is not Freshness.FRESH:
            self._schedule(tenant, answer.record)

    def validate(self, tenant: str, generation: int) -> Answer | None:
        """An answer read at this generation or a later one, waiting as long as one read lasts; None where none came.

        Comes back at once where the API asked to wait. Where the bucket is empty, one caller waits for the read that
        was put off, by a second at the most, and the others come back at once: a storm must not hold every thread of
        the server, and deliveries that come one by one are all answered after their read.
        """
        until = self._deadline()
        while True:
            answer = self._seats.judge(tenant)
            record, now = answer.record, self._clock.monotonic()
            if record.snapshot is not None and record.snapshot.generation >= generation:
                return answer
            if blocked_until(record) > now or now >= until:
                return None
            flight = self._flights.join(tenant, generation=record.generation, newer_than=last_number(record))
            try:
                if not flight.heard.result(until - now) and not flight.claim_patience():
                    return None
                if flight.done.result(max(0.0, until - self._clock.monotonic())) is not None:
                    return None
            except FutureTimeoutError:
                return None

    # -- due times ------------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        for tenant in self._store.changed():
            if tenant in self._known:
                self._catch_up(tenant)
        self.polls.tell(None)

    def _catch_up(self, tenant: str) -> None:
        """Take note of the record as it stands, and of when it is due."""
        self._schedule(tenant, self._seats.judge(tenant).record)

    def start(self) -> None:
        """Begin to read every tenant in the background, where that is wanted; idempotent."""
        self._runner.start()
        for tenant in self.tenants:
            self._catch_up(tenant)

    def _schedule(self, tenant: str, record: Record) -> None:
        """Plan the next read by a record, once: each draw of the dice would make it a little earlier."""
        if not self._background:
            return
        with self._planning:
            if self._plans.get(tenant) is record:
                return
            self._plans[tenant] = record
        when = due_at(
            record, now=self._clock.monotonic(), random=self._random(), spread_seconds=self._store.spread_seconds
        )
        self._runner.at(when, partial(self._fall_due, tenant, record))

    def _fall_due(self, tenant: str, planned: Record, *, apart: bool = False) -> None:
        parting = 0.0 if apart else self._seats.parting_seconds(planned, self._random())
        with self._planning:
            if self._plans.get(tenant) is not planned:
                return  # the plan was made anew, by a later record
            if not parting:
                del self._plans[tenant]
        if parting:
            self._runner.at(self._clock.monotonic() + parting, partial(self._fall_due, tenant, planned, apart=True))
            return
        record = self._seats.judge(tenant).record
        if record is planned:
            self._flights.join(tenant, generation=record.generation, newer_than=last_number(record))
        else:
            self._schedule(tenant, record)

    def _deadline(self) -> float:
        return self._clock.monotonic() + self._timeout_seconds + WAIT_GRACE_SECONDS

    def warm(self) -> list[Answer]:
        """What may be served of each tenant, after a read where need be; waits no longer than one read may last."""
        self.start()
        until = self._deadline()
        boarded = [(tenant, *self._board(tenant)) for tenant in self.tenants]
        answers = []
        for tenant, answer, flight in boarded:
            if flight is None:
                answers.append(answer)
                continue
            try:
                flight.done.result(max(0.0, until - self._clock.monotonic()))
            except FutureTimeoutError:
                answers.append(self._seats.judge(tenant, failing=True))
            else:
                answers.append(self._land(tenant, flight, until)[0])
        return answers

    def after(self, seconds: float, job: Callable[[], None]) -> None:
        """Run a job that does not block, so many seconds from now."""
        self._runner.at(self._clock.monotonic() + seconds, job)

    # -- beginning and end ----------------------------------------------------------------------------------------

    def run(self, job: Callable[[], None]) -> None:
        """Run a job on a reader thread."""
        self._runner.submit(job)

    def after_fork(self) -> None:
        """In a forked child: new locks, no flight of the parent, threads on first use; the warm values stay."""
        self._runner.after_fork()
        self._store.after_fork()
        self._flights.after_fork()
        self._seats.after_fork()
        self._forget_plans()

    def _forget_plans(self) -> None:
        self._plans, self._planning = {}, threading.Lock()

    def reopen(self) -> None:
        """Take up work again after `close`."""
        self._forget_plans()  # what fell due meanwhile was dropped
        self._runner.reopen()
        self._flights.reopen()

    def close(self, seconds: float = 1.0, *, abort: Callable[[], None] | None = None) -> None:
        """Wake every waiter and end the threads, within so many seconds; until `reopen` no read begins.

        Args:
            seconds: The longest that it may take.
            abort: Ends the reads under way, from outside of their threads.
        """
        self._flights.close()  # first: whatever is broken off from here on is no failure of the API
        if abort is not None:
            abort()
        self._runner.close(seconds)
        self._store.close()


def _wake(loop: asyncio.AbstractEventLoop, landing: asyncio.Future[None], _done: object) -> None:
    """Wake a waiter from the thread in which its flight ended; where its loop is closed, nobody waits."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(_set, landing)


def _set(landing: asyncio.Future[None]) -> None:
    if not landing.done():
        landing.set_result(None)
