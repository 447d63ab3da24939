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
import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import NamedTuple

from external_oms.clock import Clock
from external_oms.errors import NothingToServe, TenantError, Unavailable
from external_oms.flights import Flight, Flights, ReadEnd
from external_oms.flights import Source as ReadSource
from external_oms.freshness import Freshness, Windows
from external_oms.judgement import Answer, Source, State, blocked_until, due_at, error_of, judge, last_number, state_of
from external_oms.signals import Signal
from external_oms.stores.base import Record, Store
from external_oms.workers import Runner

__all__ = ["Cache", "Change", "ChangeKind"]

WAIT_GRACE_SECONDS = 0.25
"""How much longer than a read may last its waiters wait: so that they get its failure, not their own deadline."""

_WORTH = (Freshness.FRESH, Freshness.STALE, Freshness.EXPIRED)


class ChangeKind(StrEnum):
    """What changed."""

    VALUE = "value"
    """The value itself."""
    STATE = "state"
    """Anything else: generation, freshness, failure."""


@dataclass(frozen=True, slots=True)
class Change:
    """Something changed for a tenant, in this process or in another that shares the store."""

    tenant: str
    kind: ChangeKind
    answer: Answer


class _Seen(NamedTuple):
    """A record and the word that stood *before* it was loaded: one reference, so that the two never part.

    The ticket is older than the word: of two threads that load at once, the later ticket's record stays. Should it be
    the older record, its word no longer stands, and the next look loads again.
    """

    ticket: int
    words: Sequence[int]
    slot: int
    word: int | None
    record: Record


class _Seat:
    """What one process keeps of one tenant; the lock guards only which record is at hand and what was noticed."""

    __slots__ = ("lock", "noticed", "planned", "seen", "tenant")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.seen = _Seen(0, (0,), 0, None, Record())
        self.noticed: Answer | None = None
        self.planned: Record | None = None
        self.lock = threading.Lock()

    def after_fork(self) -> None:
        """A lock that nobody holds, and no plan: the parent's thread keeps its own."""
        self.lock = threading.Lock()
        self.planned = None


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
        changes: Told whenever something changed, in this process or another.
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
        self.changes: Signal[Change] = Signal()
        self._store = store
        self._windows = windows
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
        self._tickets = itertools.count(1)
        self._seats = {tenant: _Seat(tenant) for tenant in self.tenants}
        store.attach(self._runner.wake)

    @property
    def reads(self) -> Signal[ReadEnd]:
        """Told whenever a read by this process ended and its outcome was stored."""
        return self._flights.ended

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
        if isinstance(name, str) and name in self._seats:
            return name
        raise TenantError(str(name)[:80], f"tenant {str(name)[:80]!r} is not configured")

    def warrant(self, answer: Answer) -> tuple[float, Sequence[int], int, int | None]:
        """Until when, and while which word stands where, a fresh answer may be given again without asking."""
        seen = self._seats[answer.tenant].seen
        # where the record has moved on, the answer gets a word that never stands: it is given once
        return answer.fresh_until, seen.words, seen.slot, seen.word if seen.record is answer.record else None

    @staticmethod
    def remembered(answer: Answer) -> Answer:
        """The answer as it is given again: from this process's memory, unless another process read it."""
        return replace(answer, source=Source.STORE if answer.record.foreign else Source.MEMORY)

    def peek(self, tenant: str) -> Answer:
        """What may be served now, without waiting and without starting a read."""
        return self._judge(self._seats[tenant])

    def lookup(self, tenant: str) -> Answer:
        """What may be served now; waits for a read, with a deadline, only where nothing may be served without.

        Args:
            tenant: A configured tenant.
        """
        seat = self._seats[tenant]
        answer, flight = self._board(seat)
        if flight is None:
            return answer
        until = self._deadline()
        while flight is not None:
            try:
                flight.done.result(max(0.0, until - self._clock.monotonic()))
            except FutureTimeoutError:
                return self._judge(seat, failing=True)
            answer, flight = self._land(seat, flight, until)
        return answer

    async def lookup_async(self, tenant: str) -> Answer:
        """As `lookup`; waits without holding the event loop, and shares the flights of threads."""
        seat = self._seats[tenant]
        answer, flight = self._board(seat)
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
                return self._judge(seat, failing=True)
            answer, flight = self._land(seat, flight, until)
        return answer

    def _board(self, seat: _Seat) -> tuple[Answer, Flight | None]:
        """The answer, and the flight to wait for where the answer alone will not do."""
        self._runner.start()
        answer = self._judge(seat)
        if answer.freshness is Freshness.FRESH:
            self._schedule(seat, answer.record)
            return answer, None
        blocked = blocked_until(answer.record) > self._clock.monotonic()
        if blocked or (answer.servable and self._background):
            self._schedule(seat, answer.record)
            return answer, None
        flight = self._flights.join(
            seat.tenant, generation=answer.record.generation, newer_than=last_number(answer.record)
        )
        return answer, None if answer.servable else flight

    def _land(self, seat: _Seat, flight: Flight, until: float) -> tuple[Answer, Flight | None]:
        """The answer after a flight has ended, and the next one to wait for where an invalidation overtook it."""
        error = flight.done.result(0)
        answer = self._judge(seat, failing=error is not None)
        snapshot = answer.servable
        if snapshot is not None:
            own = flight.read_number is not None and snapshot.read_number == flight.read_number
            return (replace(answer, source=Source.API) if own else answer), None
        if error is not None or self._clock.monotonic() >= until:
            return answer, None
        return self._board(seat)

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
        seat = self._seats[tenant]
        now = self._clock.monotonic()
        record = self._store.load(tenant)
        if record.failure is not None and record.failure.obliged and blocked_until(record) > now:
            raise error_of(record.failure, now=now)
        flight = self._flights.join(seat.tenant, generation=record.generation, newer_than=record.reads, forced=True)
        try:
            error = flight.done.result(2 * self._timeout_seconds + WAIT_GRACE_SECONDS)
        except FutureTimeoutError as late:
            raise Unavailable("the read did not end within its deadline; another process's read may be stuck") from late
        if error is not None:
            raise error
        answer = self._judge(seat)
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
        seat = self._seats[tenant]
        answer = self._judge(seat)
        if self._background and answer.freshness is not Freshness.FRESH:
            self._schedule(seat, answer.record)

    def validate(self, tenant: str, generation: int) -> Answer | None:
        """An answer read at this generation or a later one, waiting as long as one read lasts; None where none came.

        Comes back at once where the API asked to wait. Where the bucket is empty, one caller waits for the read that
        was put off, by a second at the most, and the others come back at once: a storm must not hold every thread of
        the server, and deliveries that come one by one are all answered after their read.
        """
        seat = self._seats[tenant]
        until = self._deadline()
        while True:
            answer = self._judge(seat)
            record, now = answer.record, self._clock.monotonic()
            if record.snapshot is not None and record.snapshot.generation >= generation:
                return answer
            if blocked_until(record) > now or now >= until:
                return None
            flight = self._flights.join(seat.tenant, generation=record.generation, newer_than=last_number(record))
            try:
                if not flight.heard.result(until - now) and not flight.claim_patience():
                    return None
                if flight.done.result(max(0.0, until - self._clock.monotonic())) is not None:
                    return None
            except FutureTimeoutError:
                return None

    # -- noticing -------------------------------------------------------------------------------------------------

    def _look(self, seat: _Seat) -> _Seen:
        """The record as it stands: the one at hand, or loaded where its word no longer stands."""
        seen = seat.seen
        if seen.words[seen.slot] == seen.word:
            return seen
        ticket = next(self._tickets)
        words, slot = self._store.watch(seat.tenant)
        word = words[slot]
        record = self._store.load(seat.tenant)
        with seat.lock:
            if ticket > seat.seen.ticket:
                seat.seen = _Seen(ticket, words, slot, word, record)
            return seat.seen

    def _judge(self, seat: _Seat, *, failing: bool = False) -> Answer:
        record = self._look(seat).record
        answer = judge(seat.tenant, record, now=self._clock.monotonic(), windows=self._windows, failing=failing)
        noticed = seat.noticed
        if not failing and (
            noticed is None or noticed.record is not record or noticed.freshness is not answer.freshness
        ):
            self._notice(seat, answer)
        return answer

    def _notice(self, seat: _Seat, answer: Answer) -> None:
        with seat.lock:
            before = seat.noticed
            if answer.record is not seat.seen.record:
                return  # a later record is at hand; whoever judges by it will notice
            if before is not None and before.record is answer.record and _worth(before) >= _worth(answer):
                return  # another thread noticed as much, or more: by age alone a snapshot only loses worth
            seat.noticed = answer
            had = before.record.snapshot if before is not None else None
            has = answer.record.snapshot
            changed = had is not None and has is not None and had.enabled is not has.enabled
            self.changes.line_up(Change(seat.tenant, ChangeKind.VALUE if changed else ChangeKind.STATE, answer))
        self.changes.tell_all()

    def _poll(self) -> None:
        for tenant in self._store.changed():
            if tenant in self._seats:
                self._catch_up(tenant)

    def _catch_up(self, tenant: str) -> None:
        """Take note of the record as it stands, and of when it is due."""
        seat = self._seats[tenant]
        self._schedule(seat, self._judge(seat).record)

    # -- due times ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to read every tenant in the background, where that is wanted; idempotent."""
        self._runner.start()
        for seat in self._seats.values():
            self._schedule(seat, self._judge(seat).record)

    def _schedule(self, seat: _Seat, record: Record) -> None:
        """Plan the next read by a record, once: each draw of the dice would make it a little earlier."""
        if not self._background:
            return
        with seat.lock:
            if seat.planned is record:
                return
            seat.planned = record
        when = due_at(
            record, now=self._clock.monotonic(), random=self._random(), spread_seconds=self._store.spread_seconds
        )
        self._runner.at(when, partial(self._fall_due, seat, record))

    def _fall_due(self, seat: _Seat, planned: Record) -> None:
        with seat.lock:
            if seat.planned is not planned:
                return  # the plan was made anew, by a later record
            seat.planned = None
        record = self._judge(seat).record
        if record is planned:
            self._flights.join(seat.tenant, generation=record.generation, newer_than=last_number(record))
        else:
            self._schedule(seat, record)

    def _deadline(self) -> float:
        return self._clock.monotonic() + self._timeout_seconds + WAIT_GRACE_SECONDS

    def warm(self) -> list[Answer]:
        """What may be served of each tenant, after a read where need be; waits no longer than one read may last."""
        self.start()
        until = self._deadline()
        boarded = [(seat, *self._board(seat)) for seat in self._seats.values()]
        answers = []
        for seat, answer, flight in boarded:
            if flight is None:
                answers.append(answer)
                continue
            try:
                flight.done.result(max(0.0, until - self._clock.monotonic()))
            except FutureTimeoutError:
                answers.append(self._judge(seat, failing=True))
            else:
                answers.append(self._land(seat, flight, until)[0])
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
        self.changes.after_fork()
        for seat in self._seats.values():
            seat.after_fork()

    def reopen(self) -> None:
        """Take up work again after `close`."""
        for seat in self._seats.values():
            seat.planned = None  # what fell due meanwhile was dropped
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


def _worth(answer: Answer) -> int:
    return _WORTH.index(answer.freshness)
