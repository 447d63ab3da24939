"""Single flight: at most one read of the config API per tenant, shared by all callers that need it.

A `Flight` is one read that several callers wait for. In this process a `Slot` holds the flight of a tenant that is
under way and the one that follows; between processes the lease in the store admits one reader.

Any caller may join a flight whose read has not started. A flight whose read has started serves only callers that do
not force a new read and that know no newer generation than the read; the others share the next flight.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from external_oms.clock import Clock
from external_oms.config import Reading
from external_oms.entry import (
    BackedOff,
    Busy,
    Entry,
    Failure,
    Granted,
    Lease,
    Paced,
    Satisfied,
    Snapshot,
    begin_read,
    commit,
    fail,
    release,
)
from external_oms.errors import ReadError, StoreError, Unavailable
from external_oms.policy import Windows, backoff_seconds, error_of, lease_poll_seconds
from external_oms.signals import Signal
from external_oms.stores.base import Store

__all__ = ["Flight", "ReadEnd", "Reader", "Slot", "Source", "join"]

logger = logging.getLogger("external_oms")

LEASE_GRACE_SECONDS = 2.0
"""How much longer than a read a lease lives: time to store the result."""

STORE_RETRY_SECONDS = 0.05
"""The pause after a store could not run a transition because others use it."""

LOST_LEASE_SECONDS = 1.0
"""The pause after the store lost a lease: the API is read again at most once a second, however much the store loses."""

NO_STORED_RESULT = sys.maxsize
"""The `newer_than` of a forced read: no result that is stored now will do, whatever this process knows of it."""

_BUG = "unexpected error while reading the config API; this is a bug in external_oms, please report it"

Source = Callable[[str, str | None], Reading]
"""Reads the API for a tenant, `(tenant, etag) -> Reading`; raises `ReadError`."""


@dataclass(frozen=True, slots=True)
class ReadEnd:
    """A read by this process ended and its result is stored.

    Attributes:
        tenant: The tenant.
        before: The entry under which the read ran.
        outcome: The snapshot or failure that was stored.
        latency_seconds: How long the read took, >= 0.
    """

    tenant: str
    before: Entry
    outcome: Snapshot | Failure
    latency_seconds: float


class Flight:
    """One read, and what its callers require of it.

    Attributes:
        forced: Whether only a read that starts after the last caller joined will do.
        newer_than: The fencing token that a result must exceed.
        generation: The generation under which the read runs; None until it starts.
        token: The fencing token of the read, where this process makes it.
        until: The instant at which the flight gives up.
        contended_since: When it first found that another process holds the lease.
        dead_holder: A holder of the lease that has ended.
        parked: Whether it waits for the lease, the pace or the store.
        done: The error with which the flight ended, or None.
        served: Done when the flight ends, and as soon as a value may be served meanwhile: by another read, for example
            one that was overtaken by an invalidation. Evaluations wait for it.
    """

    __slots__ = (
        "contended_since",
        "dead_holder",
        "done",
        "forced",
        "generation",
        "newer_than",
        "parked",
        "served",
        "token",
        "until",
    )

    def __init__(self, *, forced: bool, newer_than: int, until: float) -> None:
        self.forced = forced
        self.newer_than = newer_than
        self.generation: int | None = None
        self.token: int | None = None
        self.until = until
        self.contended_since: float | None = None
        self.dead_holder: str | None = None
        self.parked = False
        self.done: Future[ReadError | None] = Future()
        self.served: Future[None] = Future()

    def end(self, error: ReadError | None) -> None:
        """Wake the waiters, unless the flight has ended before."""
        with suppress(InvalidStateError):
            self.done.set_result(error)
        self.serve()

    def serve(self) -> None:
        """Wake the evaluations that wait; those wait on that require a result of the flight."""
        with suppress(InvalidStateError):
            self.served.set_result(None)


class Slot:
    """The flights of one tenant.

    Attributes:
        tenant: The tenant.
        lock: Guards everything in the slot.
        flight: The flight under way.
        next_flight: The flight that starts after it.
    """

    __slots__ = ("flight", "lock", "next_flight", "tenant")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.lock = threading.Lock()
        self.flight: Flight | None = None
        self.next_flight: Flight | None = None

    @property
    def flights(self) -> list[Flight]:
        """The flights that have not ended; read it under the lock."""
        return [flight for flight in (self.flight, self.next_flight) if flight is not None]

    def detach(self, flight: Flight) -> Flight | None:
        """Remove a flight that has ended, and return the flight that starts now; call it under the lock."""
        if self.flight is not flight:
            return None
        self.flight, self.next_flight = self.next_flight, None
        return self.flight


def join(slot: Slot, *, generation: int, newer_than: int, forced: bool, until: float) -> tuple[Flight, bool]:
    """Return the flight that meets the requirements, and whether the caller has to start it; call it under the lock.

    Args:
        slot: The slot of the tenant.
        generation: The generation that the caller knows; the read must run under it or a later one.
        newer_than: The fencing token that a result must exceed.
        forced: Whether only a read that starts after this call will do.
        until: The instant at which a new flight gives up.
    """
    if forced:
        newer_than = NO_STORED_RESULT
    flight = slot.flight
    if flight is None:
        slot.flight = Flight(forced=forced, newer_than=newer_than, until=until)
        return slot.flight, True
    ended = flight.done.done()  # and is not detached yet: its result is older than this call
    if flight.generation is not None or ended:
        if flight.generation is not None and not (forced or ended) and flight.generation >= generation:
            return flight, False
        if slot.next_flight is None:
            slot.next_flight = Flight(forced=forced, newer_than=newer_than, until=until)
            return slot.next_flight, False
        flight = slot.next_flight
    flight.forced = flight.forced or forced
    flight.newer_than = max(flight.newer_than, newer_than)
    flight.until = max(flight.until, until)
    return flight, False


class Reader:
    """Takes flights to their end: lease, read, commit.

    Args:
        store: Holds entries and leases.
        source: Reads the API.
        clock: Tells the time.
        random: Returns numbers in [0, 1).
        windows: How long a value may be served.
        timeout_seconds: The longest that one read lasts, > 0.

    Attributes:
        ended: Sent after a read by this process ended and its result is stored.
        lease_waits: Sent with the tenant when a flight first finds that another process holds the lease.
    """

    def __init__(
        self,
        *,
        store: Store,
        source: Source,
        clock: Clock,
        random: Callable[[], float],
        windows: Windows,
        timeout_seconds: float,
    ) -> None:
        self.ended: Signal[ReadEnd] = Signal()
        self.lease_waits: Signal[str] = Signal()
        self._store = store
        self._source = source
        self._clock = clock
        self._random = random
        self._windows = windows
        self._timeout_seconds = timeout_seconds

    def attempt(self, slot: Slot, flight: Flight) -> float | None:
        """Make progress with a flight; may read the API.

        Returns:
            Seconds to wait before the next attempt; None where the flight has ended.
        """
        try:
            while not flight.done.done():
                pause = self._attempt_once(slot, flight)
                if pause is None or pause > 0:
                    return pause
        except Exception as error:  # the flight must end, or its waiters wait until their deadline
            logger.exception(_BUG)
            flight.end(_bug(error))
        return None

    def _attempt_once(self, slot: Slot, flight: Flight) -> float | None:
        with slot.lock:
            newer_than, forced = flight.newer_than, flight.forced
        try:
            outcome = self._store.transact(
                slot.tenant,
                partial(
                    begin_read,
                    holder=self._store.holder,
                    lease_seconds=self._timeout_seconds + LEASE_GRACE_SECONDS,
                    newer_than=newer_than,
                    forced=forced,
                    dead_holder=flight.dead_holder,
                ),
            )
        except StoreError as error:
            return self._park(flight, STORE_RETRY_SECONDS, f"the store could not grant the read: {error}")
        if isinstance(outcome, Granted):
            with slot.lock:
                flight.generation, flight.token = outcome.lease.generation, outcome.lease.token
            return self._read(slot, flight, outcome)
        if isinstance(outcome, Satisfied | BackedOff):
            failure = outcome.failure
            with slot.lock:
                if (flight.newer_than, flight.forced) != (newer_than, forced):
                    return 0.0  # a caller joined meanwhile and requires more
                flight.end(error_of(failure, now=self._clock.monotonic()) if failure is not None else None)
            return None
        if isinstance(outcome, Paced):
            return self._park(flight, outcome.wait_seconds, "invalidations cause more reads than the pace allows")
        return self._wait_for_lease(slot, flight, outcome)

    def _wait_for_lease(self, slot: Slot, flight: Flight, busy: Busy) -> float | None:
        if flight.dead_holder != busy.holder and self._store.is_gone(busy.holder):
            flight.dead_holder = busy.holder
            return 0.0
        now = self._clock.monotonic()
        first = flight.contended_since is None
        with slot.lock:
            if flight.contended_since is None:
                flight.contended_since = now
            if flight.newer_than == NO_STORED_RESULT:  # the read that holds the lease may have begun before the call
                flight.newer_than = busy.token
        if first:
            self.lease_waits.send(slot.tenant)
        waited_seconds = now - (flight.contended_since or now)
        pause = lease_poll_seconds(waited_seconds, busy.remaining_seconds, self._store.spread_seconds, self._random())
        return self._park(flight, pause, "another process holds the lease and did not end its read in time")

    def _park(self, flight: Flight, pause_seconds: float, reason: str) -> float | None:
        if self._clock.monotonic() >= flight.until:
            flight.end(Unavailable(reason))
            return None
        return max(pause_seconds, 0.001)

    def _read(self, slot: Slot, flight: Flight, granted: Granted) -> float | None:
        lease, before = granted.lease, granted.entry
        # the age counts from here, before the request leaves (RFC 9111 section 4.2.3)
        read_at, fetched_at = self._clock.monotonic(), datetime.fromtimestamp(self._clock.wall(), UTC)
        reading, error = self._call_source(slot.tenant, before)
        latency_seconds = self._clock.monotonic() - read_at
        stored: Snapshot | Failure | None = None
        try:
            if flight.done.done() and error is not None:  # a shutdown broke it off, which says nothing of the API
                self._store.transact(slot.tenant, partial(release, lease=lease))
                return None
            if reading is not None:
                try:
                    stored = self._store.transact(
                        slot.tenant,
                        partial(
                            commit,
                            lease=lease,
                            reading=reading,
                            read_at=read_at,
                            fetched_at=fetched_at,
                            ttl_seconds=self._windows.ttl_seconds,
                            hard_limit_seconds=self._windows.hard_limit_seconds,
                            tenant=slot.tenant,
                            latency_seconds=latency_seconds,
                        ),
                    )
                except ReadError as refused:
                    error = refused
            if error is not None:
                stored = self._store_failure(slot.tenant, lease, before, error, latency_seconds)
        except StoreError as store_error:
            with slot.lock:
                flight.generation = None
            return self._park(flight, LOST_LEASE_SECONDS, f"the result of the read could not be stored: {store_error}")
        if stored is None:  # a later lease replaced this one, or the store lost it
            with slot.lock:
                flight.generation = None
            return self._park(flight, LOST_LEASE_SECONDS, "the lease was lost before the result could be stored")
        flight.end(error_of(stored, now=self._clock.monotonic()) if isinstance(stored, Failure) else None)
        self.ended.send(ReadEnd(slot.tenant, before, stored, latency_seconds))
        return None

    def _call_source(self, tenant: str, before: Entry) -> tuple[Reading | None, ReadError | None]:
        etag = before.snapshot.etag if before.snapshot is not None else None
        try:
            return self._source(tenant, etag), None
        except ReadError as error:
            return None, error
        except Exception as error:  # it counts and backs off like any other failure
            logger.exception(_BUG)
            return None, _bug(error)

    def _store_failure(
        self, tenant: str, lease: Lease, before: Entry, error: ReadError, latency_seconds: float
    ) -> Failure | None:
        failures = before.failure.count + 1 if before.failure is not None else 1
        return self._store.transact(
            tenant,
            partial(
                fail,
                lease=lease,
                kind=error.kind,
                message=str(error),
                status=error.status,
                backoff_seconds=backoff_seconds(failures, self._windows.ttl_seconds, self._random()),
                server_wait_seconds=error.retry_after_seconds,
                wall=self._clock.wall(),
                tenant=tenant,
                latency_seconds=latency_seconds,
            ),
        )


def _bug(error: Exception) -> Unavailable:
    failure = Unavailable("the read failed because of a bug in external_oms; the log has the traceback")
    failure.__cause__ = error
    return failure
