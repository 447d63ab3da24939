"""At most one read in flight per tenant and store: who may join it, who must wait for the next, how it ends.

A flight goes through::

    begin ── the record already holds what it is for ──────────> end, without a read
          ── another process has the lease ──> wait for its result, begin again
          ── the bucket is empty ──> put off; begins again by itself
          ── lease ──> read the API ──> complete ── stored ────> end
                                                 ── fenced off: an invalidation came; begin again

One that has not begun will do for everybody, for its read starts later than now. One that has begun will do for those
who know no newer generation and force nothing; the others share the one that follows. No lock is held across I/O.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from external_oms.clock import Clock
from external_oms.config import Failure, Reading, Snapshot
from external_oms.errors import ReadError, Unavailable
from external_oms.freshness import follow_seconds
from external_oms.judgement import error_of, failure_after, is_metered, snapshot_after, verdict
from external_oms.signals import Signal
from external_oms.stores.base import Busy, Lease, Metered, Record, Store
from external_oms.workers import Runner

__all__ = ["Flight", "Flights", "Pause", "ReadEnd", "Source"]

logger = logging.getLogger("external_oms")

LEASE_GRACE_SECONDS = 2.0
"""How much longer than a read may last its lease lives, should the holder die: time to store the result."""

_DEFECT = "a read raised what it must not; this is a defect of external_oms, please report it"

T = TypeVar("T")

Source = Callable[[str, str | None], Reading]
"""Reads the API for a tenant: `(tenant, etag) -> Reading`; raises `ReadError` and nothing else."""


@dataclass(frozen=True, slots=True)
class ReadEnd:
    """A read by this process ended.

    Attributes:
        lease: The lease under which it ran; its record is the one before the read.
        outcome: What was stored.
        latency_seconds: How long the read took.
    """

    lease: Lease
    outcome: Snapshot | Failure
    latency_seconds: float


@dataclass(frozen=True, slots=True)
class Pause:
    """A flight cannot go on yet.

    Attributes:
        word: The tenant's word as it was; another word ends the pause early.
        seconds: The longest that it lasts.
        metered: Whether the bucket is empty, so that nobody's result is coming meanwhile.
    """

    word: int
    seconds: float
    metered: bool = False


class Flight:
    """One read on its way, whose result or failure serves all who wait for it.

    Attributes:
        forced: Whether only a read that began after the flight was asked for will do.
        newer_than: The number that the read must exceed.
        generation: The generation of the lease; None until the read has begun, and whoever comes may still join.
        read_number: The number of the read that this process made itself; None where it took another's result.
        until: When it gives up, on the monotonic clock.
        heard: Ends when the read is put off by the bucket (False), or with the flight (True).
        done: Ends with the flight: the read's failure, or None.
    """

    __slots__ = (
        "_patient",
        "denied_at",
        "done",
        "forced",
        "generation",
        "heard",
        "newer_than",
        "read_number",
        "tenant",
        "until",
    )

    def __init__(self, tenant: str, *, forced: bool, newer_than: int) -> None:
        self.tenant = tenant
        self.forced = forced
        self.newer_than = newer_than
        self.generation: int | None = None
        self.read_number: int | None = None
        self.until = float("inf")
        self.denied_at: float | None = None
        self.heard: Future[bool] = Future()
        self.done: Future[ReadError | None] = Future()
        self._patient = threading.Lock()

    def claim_patience(self) -> bool:
        """Whether the caller is the first to want to wait for a read that was put off."""
        return self._patient.acquire(blocking=False)

    def strengthen(self, *, forced: bool, newer_than: int) -> None:
        """Take on a need beside those it has."""
        self.forced = self.forced or forced
        self.newer_than = max(self.newer_than, newer_than)


class _Lane:
    """Which flight of a tenant is under way, and which follows; the lock guards nothing else."""

    __slots__ = ("flight", "following", "lock")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.flight: Flight | None = None
        self.following: Flight | None = None

    def detach(self, flight: Flight) -> Flight | None:
        """Take a flight that has ended away; returns the one that now has to start. The caller holds the lock."""
        if self.flight is not flight:
            return None
        self.flight, self.following = self.following, None
        return self.flight


class Flights:
    """The reads of some tenants.

    Args:
        store: Where records and leases live.
        source: Reads the API.
        clock: What tells the time.
        random: Gives numbers in [0, 1).
        ttl_seconds: The whole freshness lifetime, > 0.
        timeout_seconds: The longest that one read lasts, > 0.
        landed: Called with the tenant after a flight has ended and its waiters are awake.

    Attributes:
        ended: Told whenever a read by this process ended and its outcome was stored.
        waits: Told the tenant when a flight finds that another process has the lease, once for each flight.
    """

    def __init__(  # noqa: PLR0913 - the seams of a flight, each named at the one place that makes it
        self,
        *,
        tenants: Iterable[str],
        store: Store,
        source: Source,
        runner: Runner,
        clock: Clock,
        random: Callable[[], float],
        ttl_seconds: float,
        timeout_seconds: float,
        landed: Callable[[str], None],
    ) -> None:
        self.ended: Signal[ReadEnd] = Signal()
        self.waits: Signal[str] = Signal()
        self._store = store
        self._source = source
        self._runner = runner
        self._clock = clock
        self._random = random
        self._ttl_seconds = ttl_seconds
        self._timeout_seconds = timeout_seconds
        self._landed = landed
        self._closed = False
        self._lanes = {tenant: _Lane() for tenant in tenants}

    def join(self, tenant: str, *, generation: int, newer_than: int, forced: bool = False) -> Flight:
        """The flight whose read will do for this need; a new one where none is under way.

        Args:
            tenant: The tenant.
            generation: The generation that the caller knows; the read must belong to it or a later one.
            newer_than: The number that the read must exceed: of the last whose outcome the caller knows.
            forced: Whether only a read will do that begins after this call.
        """
        lane = self._lanes[tenant]
        with lane.lock:
            if self._closed:
                return _unheard(Flight(tenant, forced=forced, newer_than=newer_than))
            flight = lane.flight
            if flight is not None and flight.generation is not None:
                if not forced and flight.generation >= generation:
                    return flight
                flight = lane.following
                if flight is None:
                    lane.following = flight = Flight(tenant, forced=forced, newer_than=newer_than)
                    return flight
            if flight is not None:
                flight.strengthen(forced=forced, newer_than=newer_than)
                return flight
            lane.flight = flight = Flight(tenant, forced=forced, newer_than=newer_than)
        self._runner.submit(partial(self.fly, flight))
        return flight

    def fly(self, flight: Flight) -> None:
        """Carry a flight to its end, or to where it is put off; on a reader thread."""
        try:
            self._carry(flight)
        except Exception as error:  # whatever happens it must end, or its waiters and followers starve
            logger.exception(_DEFECT)
            self._end(self._lanes[flight.tenant], flight, _defect(error))

    def _carry(self, flight: Flight) -> None:
        flight.until = self._clock.monotonic() + 2 * self._timeout_seconds
        while not flight.done.done():  # a shutdown ends it from outside
            began = self.begin(flight)
            if began is None:
                return
            if isinstance(began, Pause):
                if began.metered:
                    again = partial(self._runner.submit, partial(self.fly, flight))
                    self._runner.at(self._clock.monotonic() + began.seconds, again)
                    return
                self._store.wait(flight.tenant, began.word, began.seconds)
                continue
            # the age of what comes is counted from here, before the request leaves (RFC 9111 §4.2.3)
            read_at, read_at_wall = self._clock.monotonic(), self._clock.wall()
            outcome = self._read(began)
            if self.complete(flight, began, outcome, read_at=read_at, read_at_wall=read_at_wall):
                return

    def begin(self, flight: Flight) -> Lease | Pause | None:
        """Try to begin the read: the lease under which it runs, a pause to wait out, or None where the flight ended.

        It ends without a read where the record already holds what it is for, or forbids one.
        """
        lane = self._lanes[flight.tenant]
        words, slot = self._store.watch(flight.tenant)
        word = words[slot]
        record = self._store.load(flight.tenant)
        if self._end_by(lane, flight, record):
            return None
        if self._clock.monotonic() >= flight.until:
            self._end(lane, flight, Unavailable("another process holds the read and did not end it in time"))
            return None
        life = self._timeout_seconds + LEASE_GRACE_SECONDS
        acquired = self._store.acquire(flight.tenant, seconds=life, metered=is_metered(record) and not flight.forced)
        if isinstance(acquired, Metered):
            _resolve(flight.heard, result=False)
            return Pause(word, acquired.wait_seconds, metered=True)
        if isinstance(acquired, Busy):
            now = self._clock.monotonic()
            if flight.denied_at is None:
                self.waits.tell(flight.tenant)
            with lane.lock:
                if flight.forced and flight.denied_at is None:
                    # the read under way began before this one was asked for, as far as anybody can tell
                    flight.newer_than = max(flight.newer_than, acquired.number)
                since = flight.denied_at = now if flight.denied_at is None else flight.denied_at
            left = acquired.remaining_seconds
            return Pause(word, follow_seconds(now - since, left, self._store.spread_seconds, self._random()))
        if self._end_by(lane, flight, acquired.record, began=acquired):
            self._store.release(acquired)
            return None
        return acquired

    def _end_by(self, lane: _Lane, flight: Flight, record: Record, *, began: Lease | None = None) -> bool:
        """End the flight if the record already holds what it is for; else, with a lease, close it to newcomers."""
        now = self._clock.monotonic()
        with lane.lock:  # a newcomer either strengthens the flight before this look, or finds it ended or begun
            ended, error = verdict(record, newer_than=flight.newer_than, forced=flight.forced, now=now)
            follows = lane.detach(flight) if ended else None
            if began is not None and not ended:
                flight.generation = began.record.generation
        if ended:
            self._finish(flight, error, follows)
        return ended

    def _read(self, lease: Lease) -> Reading | ReadError:
        known = lease.record.snapshot
        try:
            return self._source(lease.tenant, known.etag if known is not None else None)
        except ReadError as error:
            return error
        except Exception as error:  # the failure is told and backs off like any other
            logger.exception(_DEFECT)
            return _defect(error)

    def complete(
        self, flight: Flight, lease: Lease, outcome: Reading | ReadError, *, read_at: float, read_at_wall: float
    ) -> bool:
        """Store what a read gave and end the flight; False where an invalidation overtook it and it begins again."""
        lane = self._lanes[flight.tenant]
        if flight.done.done() and isinstance(outcome, ReadError):
            self._store.release(lease)  # broken off by a shutdown, which says nothing of the API
            return True
        stored = self._stored(lease, outcome, read_at=read_at, read_at_wall=read_at_wall)
        latency_seconds = self._clock.monotonic() - read_at
        if isinstance(stored, Failure):
            kept = self._store.fail(lease, stored)
            if not kept and stored.obliged:  # no invalidation ends a wait that the API asked for
                kept = self._store.fail(replace(lease, record=self._store.load(lease.tenant)), stored)
            error: ReadError | None = error_of(stored, now=self._clock.monotonic())
        else:
            kept, error = self._store.put(lease, stored), None
            if kept:
                flight.read_number = lease.number
            elif self._clock.monotonic() < flight.until:
                with lane.lock:
                    flight.generation = None  # whoever comes may join again
                return False
            else:
                error = Unavailable("invalidations overtook every read within its deadline")
        self._end(lane, flight, error)
        if kept:
            self.ended.tell(ReadEnd(lease, stored, latency_seconds))
        return True

    def _stored(
        self, lease: Lease, outcome: Reading | ReadError, *, read_at: float, read_at_wall: float
    ) -> Snapshot | Failure:
        """What the store is to keep of a read."""
        if not isinstance(outcome, ReadError):
            try:
                return snapshot_after(
                    lease, outcome, read_at=read_at, fetched_at_wall=read_at_wall, ttl_seconds=self._ttl_seconds
                )
            except ReadError as error:
                outcome = error
        return failure_after(
            lease,
            outcome,
            now=self._clock.monotonic(),
            now_wall=self._clock.wall(),
            cap_seconds=self._ttl_seconds,
            random=self._random(),
        )

    def _end(self, lane: _Lane, flight: Flight, error: ReadError | None) -> None:
        with lane.lock:
            follows = lane.detach(flight)
        self._finish(flight, error, follows)

    def _finish(self, flight: Flight, error: ReadError | None, follows: Flight | None) -> None:
        """Wake the waiters, let the next flight go, take note of what changed."""
        _resolve(flight.done, error)
        _resolve(flight.heard, result=True)
        if follows is not None:
            self._runner.submit(partial(self.fly, follows))
        self._landed(flight.tenant)

    def after_fork(self) -> None:
        """In a forked child: no flight of the parent, and locks that nobody holds."""
        self._lanes = {tenant: _Lane() for tenant in self._lanes}

    def close(self) -> None:
        """Wake every waiter, now and until `reopen`; whatever is still under way ends unheard."""
        self._closed = True
        lanes, self._lanes = self._lanes, {tenant: _Lane() for tenant in self._lanes}
        for lane in lanes.values():
            with lane.lock:
                left = [flight for flight in (lane.flight, lane.following) if flight is not None]
            for flight in left:
                _unheard(flight)

    def reopen(self) -> None:
        """Take flights again after `close`."""
        self._closed = False


def _defect(error: Exception) -> Unavailable:
    """The failure that an error amounts to which nothing should have raised."""
    failure = Unavailable("the read failed by a defect of external_oms; the log has its traceback")
    failure.__cause__ = error
    return failure


def _unheard(flight: Flight) -> Flight:
    """The flight, ended by a shutdown."""
    _resolve(flight.done, Unavailable("the provider was shut down"))
    _resolve(flight.heard, result=False)
    return flight


def _resolve(future: Future[T], result: T) -> None:
    """Give a future its result, unless it has one: a flight may end by itself and by a shutdown at once."""
    with suppress(InvalidStateError):
        future.set_result(result)
