"""The cache of one process: serves entries from memory, refreshes them in the background, coalesces reads.

::

    lookup ── servable? ── yes ──> return at once; where it is not fresh, a read starts in the background
                           no  ──> join the flight, wait with a deadline, evaluate again

Everything that this process holds about a tenant is in one `_Tenant`, guarded by one lock. The lock is never held
across I/O or a callback. The entry at hand is one reference, replaced whole, together with the version word that was
seen *before* the entry was loaded; a reader that finds another word loads again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import NamedTuple, Protocol

from external_oms.clock import Clock
from external_oms.entry import Entry, Invalidated, Invalidation, last_token, retry_at
from external_oms.errors import NothingToServe, ReadError, StoreError, TenantError, Unavailable
from external_oms.policy import (
    Evaluation,
    Freshness,
    Source,
    State,
    Windows,
    degraded_jitter_seconds,
    error_of,
    evaluate,
    refresh_at,
    state_of,
)
from external_oms.scheduler import Runner
from external_oms.signals import Signal
from external_oms.singleflight import Flight, ReadEnd, Reader, Slot, join
from external_oms.singleflight import Source as ReadSource
from external_oms.stores.base import Store

__all__ = ["Cache", "CacheStore", "Change", "ChangeKind", "Validity"]

WAIT_GRACE_SECONDS = 0.25
"""How much longer than a read its callers wait, so that they get its error and not a deadline of their own."""

REFRESH_PAUSE_SECONDS = 0.05
"""The least time between two refreshes of a tenant that the background starts: a store that does not agree with this
process must not make it ask without a pause."""

BATCH_SECONDS = 30.0
"""How long an invalidation waits for the store: several times the deadline of every store, which ends the wait."""

_RANK = {Freshness.FRESH: 0, Freshness.STALE: 1, Freshness.EXPIRED: 2}

Validity = tuple[float, Sequence[int], int, int | None]
"""Until when, and while which version word stands at which place, an evaluation may be served again."""


class CacheStore(Store, Protocol):
    """A store as the cache uses it: one that keeps working when a shared store fails."""

    def invalidate(self, tenant: str, requests: Sequence[Invalidation]) -> tuple[tuple[Invalidated, ...], bool]:
        """Invalidate; return the results, and whether all who share the store see the invalidation."""
        ...

    def is_own(self, writer: str) -> bool:
        """Return whether this process wrote under that name."""
        ...


class ChangeKind(StrEnum):
    """What changed."""

    VALUE = "value"
    """The value."""
    STATE = "state"
    """The generation, the freshness or the failure."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a tenant, made by this process or by another one."""

    tenant: str
    kind: ChangeKind
    evaluation: Evaluation


class _Loaded(NamedTuple):
    """An entry, and the version word that was seen before it was loaded.

    `number` counts loads in the order in which they started; of two that run at once the later one is kept.
    """

    number: int
    versions: Sequence[int]
    place: int
    version: int | None
    entry: Entry


class _Batch:
    """Invalidations of one tenant that become one transition."""

    __slots__ = ("done", "requests")

    def __init__(self) -> None:
        self.requests: list[Invalidation] = []
        self.done: Future[tuple[tuple[Invalidated, ...], bool]] = Future()


class _Tenant(Slot):
    """Everything that this process holds about a tenant.

    Attributes:
        loaded: The entry at hand.
        loads: How many loads were started.
        published: The evaluation that subscribers know.
        enabled: The value that they know.
        planned: The entry for which a refresh is planned.
        refreshed_at: When the background last started one.
        waiters: How many callers of `wait_for_generation` wait.
        batch: The invalidations that are under way, or were last.
        next_batch: The invalidations that follow them.
    """

    __slots__ = ("batch", "enabled", "loaded", "loads", "next_batch", "planned", "published", "refreshed_at", "waiters")

    def __init__(self, tenant: str) -> None:
        super().__init__(tenant)
        self.loaded = _Loaded(0, (0,), 0, None, Entry())
        self.loads = 0
        self.published: Evaluation | None = None
        self.enabled: bool | None = None
        self.planned: Entry | None = None
        self.refreshed_at = float("-inf")
        self.waiters = 0
        self.batch: _Batch | None = None
        self.next_batch: _Batch | None = None


class Cache:
    """The values of some tenants.

    Args:
        tenants: The names of the tenants.
        store: Holds the entries.
        source: Reads the API for a tenant, `(tenant, etag) -> Reading`; raises `ReadError`.
        windows: How long a value may be served.
        timeout_seconds: The longest that one read lasts, > 0.
        clock: Tells the time.
        random: Returns numbers in [0, 1).
        background: Whether values are refreshed without an evaluation that asks for them.
        waits_after_failure: Whether an evaluation waits for a read although the last read failed and nothing may be
            served: right where nothing reads in the background and no answer is configured for that case.
        max_waiters: The most callers of `wait_for_generation` per tenant that wait at once, >= 0.
        runner: Makes the runner, from the poll and its interval in seconds.

    Attributes:
        tenants: The names of the tenants.
        changes: Sent after a change, by this process or another one.
        reads: Sent after a read by this process ended.
        lease_waits: Sent with the tenant when a read finds that another process is reading.
    """

    def __init__(  # noqa: PLR0913 - the seams of the cache, named at the one place that makes it
        self,
        *,
        tenants: Iterable[str],
        store: CacheStore,
        source: ReadSource,
        windows: Windows,
        timeout_seconds: float,
        clock: Clock,
        random: Callable[[], float],
        background: bool,
        waits_after_failure: bool,
        max_waiters: int,
        runner: Callable[[Callable[[], None], float | None], Runner],
    ) -> None:
        self.tenants = tuple(tenants)
        self.changes: Signal[Change] = Signal()
        self._states = {tenant: _Tenant(tenant) for tenant in self.tenants}
        self._store = store
        self._windows = windows
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._random = random
        self._background = background
        self._waits_after_failure = waits_after_failure
        self._max_waiters = max_waiters
        self._closed = False
        self._started = False
        self._reader = Reader(
            store=store, source=source, clock=clock, random=random, windows=windows, timeout_seconds=timeout_seconds
        )
        self.runner = runner(self._poll, store.poll_seconds)
        store.attach(self.runner.wake)

    @property
    def reads(self) -> Signal[ReadEnd]:
        """Sent after a read by this process ended."""
        return self._reader.ended

    @property
    def lease_waits(self) -> Signal[str]:
        """Sent with the tenant when a read finds that another process is reading."""
        return self._reader.lease_waits

    def tenant_of(self, name: object) -> str:
        """Return the configured tenant of that name; the only one for None.

        Raises:
            TenantError: No such tenant is configured, or None is given and several are.
        """
        if isinstance(name, str) and name in self._states:
            return name
        if name is None:
            if len(self.tenants) == 1:
                return self.tenants[0]
            raise TenantError(None, "several tenants are configured and the call names none; name it as `tenant`")
        if not isinstance(name, str):  # its text may be long, or may raise
            raise TenantError(None, f"a tenant's name is a text, and not of type {type(name).__name__}")
        raise TenantError(name[:80], f"tenant {name[:80]!r} is not configured")

    # -- evaluate ---------------------------------------------------------------------------------------------------

    def lookup(self, tenant: str) -> Evaluation:
        """Return what may be served now; wait for a read, with a deadline, only where nothing may be served."""
        state = self._states[tenant]
        evaluation, flight = self._evaluate_or_join(state)
        until = self._deadline()
        while flight is not None:
            if not self.runner.wait(flight.served, until - self._clock.monotonic()):
                return self._evaluate(state, failing=True)
            evaluation, flight = self._after_wait(state, flight, until)
        return evaluation

    async def lookup_async(self, tenant: str) -> Evaluation:
        """Return what `lookup` returns, without blocking the event loop; shares the flights of threads."""
        state = self._states[tenant]
        evaluation, flight = self._evaluate_or_join(state)
        until = self._deadline()
        while flight is not None:
            if not await _wait_async(flight.served, until - self._clock.monotonic()):
                return self._evaluate(state, failing=True)
            evaluation, flight = self._after_wait(state, flight, until)
        return evaluation

    def peek(self, tenant: str) -> Evaluation:
        """Return what may be served now, without waiting and without starting a read."""
        return self._evaluate(self._states[tenant])

    def state(self, tenant: str) -> State:
        """Return what is known of a tenant; never waits."""
        return state_of(self.peek(tenant), now=self._clock.monotonic())

    def failure(self, evaluation: Evaluation) -> NothingToServe:
        """Return the error that says why nothing may be served."""
        failure = evaluation.entry.failure
        return NothingToServe(evaluation.tenant, error_of(failure, now=self._clock.monotonic()) if failure else None)

    def validity(self, evaluation: Evaluation) -> Validity:
        """Return how long a fresh evaluation may be served again without asking."""
        loaded = self._states[evaluation.tenant].loaded
        # where a later entry is at hand, the version is one that never stands, and the evaluation is served once
        version = loaded.version if loaded.entry is evaluation.entry else None
        return evaluation.fresh_until, loaded.versions, loaded.place, version

    def _evaluate_or_join(self, state: _Tenant) -> tuple[Evaluation, Flight | None]:
        """Return the evaluation, and the flight to wait for where the evaluation has nothing to serve."""
        self._start()
        evaluation = self._evaluate(state)
        entry = evaluation.entry
        if evaluation.freshness is Freshness.FRESH or retry_at(entry) > self._clock.monotonic():
            self._plan(state)
            return evaluation, None
        answered = evaluation.servable is not None or (entry.failure is not None and not self._waits_after_failure)
        if answered and self._background:
            self._plan(state)
            return evaluation, None
        flight = self._join(state, generation=entry.generation, newer_than=last_token(entry))
        if not answered and not flight.done.done() and state.loaded.entry is not entry:  # published a moment ago
            evaluation = self._evaluate(state)
            answered = evaluation.servable is not None
        return evaluation, None if answered else flight

    def _after_wait(self, state: _Tenant, flight: Flight, until: float) -> tuple[Evaluation, Flight | None]:
        """Return the evaluation, and the flight to wait for where there is still nothing to serve."""
        error = flight.done.result(0) if flight.done.done() else None
        evaluation = self._evaluate(state, failing=error is not None)
        if evaluation.servable is not None:
            return self._from_api(evaluation, flight), None
        if error is not None or self._clock.monotonic() >= until:
            return evaluation, None
        return self._evaluate_or_join(state)

    @staticmethod
    def _from_api(evaluation: Evaluation, flight: Flight) -> Evaluation:
        snapshot = evaluation.entry.snapshot
        own = snapshot is not None and flight.token is not None and snapshot.token == flight.token
        return replace(evaluation, source=Source.API) if own else evaluation

    def _evaluate(self, state: _Tenant, *, failing: bool = False) -> Evaluation:
        entry, now = self._load(state), self._clock.monotonic()
        published = state.published
        if published is not None and published.entry is entry and now < published.fresh_until and not failing:
            return published  # it was fresh, and still is
        evaluation = evaluate(
            state.tenant,
            entry,
            now=now,
            windows=self._windows,
            source=Source.STORE if self._is_foreign(entry) else Source.MEMORY,
            failing=failing,
        )
        if published is None:
            changed = entry.snapshot is not None or entry.failure is not None
        else:
            changed = published.entry is not entry or published.freshness is not evaluation.freshness
        if changed and not failing:
            self._publish(state, evaluation)
        return evaluation

    def _is_foreign(self, entry: Entry) -> bool:
        return entry.snapshot is not None and not self._store.is_own(entry.snapshot.writer)

    def _load(self, state: _Tenant) -> Entry:
        """Return the entry at hand, loaded again where its version word has changed."""
        loaded = state.loaded
        if loaded.version is not None and loaded.versions[loaded.place] == loaded.version:
            return loaded.entry
        with state.lock:
            number = state.loads = state.loads + 1
        versions, place = self._store.version_ref(state.tenant)
        version: int | None = versions[place]
        entry = self._store.load(state.tenant)
        if not entry.verified or not _is_at(self._store.version_ref(state.tenant), versions, place):
            version = None  # it is loaded again at the next look
        with state.lock:
            if number > state.loaded.number:
                if entry == state.loaded.entry:
                    entry = state.loaded.entry
                state.loaded = _Loaded(number, versions, place, version, entry)
            return state.loaded.entry

    def _publish(self, state: _Tenant, evaluation: Evaluation) -> None:
        """Tell the subscribers of a change, and serve the evaluations that wait."""
        with state.lock:
            before = state.published
            if evaluation.entry is not state.loaded.entry:
                return  # the thread that loaded the later entry publishes it
            if (
                before is not None
                and before.entry is evaluation.entry
                and _RANK[before.freshness] >= _RANK[evaluation.freshness]
            ):
                return  # an entry only loses freshness with time, and another thread has published as much
            state.published = evaluation
            had, snapshot = state.enabled, evaluation.entry.snapshot
            changed = had is not None and snapshot is not None and had is not snapshot.enabled
            if snapshot is not None:  # a store that lost the value does not change it
                state.enabled = snapshot.enabled
            self.changes.enqueue(Change(state.tenant, ChangeKind.VALUE if changed else ChangeKind.STATE, evaluation))
            flights = state.flights if evaluation.servable is not None else []
        for flight in flights:
            flight.serve()
        self.changes.flush()

    # -- read -------------------------------------------------------------------------------------------------------

    def _deadline(self) -> float:
        return self._clock.monotonic() + self._timeout_seconds + WAIT_GRACE_SECONDS

    def _join(self, state: _Tenant, *, generation: int, newer_than: int, forced: bool = False) -> Flight:
        until = self._clock.monotonic() + 2 * self._timeout_seconds
        with state.lock:
            flight, starts = join(state, generation=generation, newer_than=newer_than, forced=forced, until=until)
            if self._closed:
                state.flight = state.next_flight = None
                flight.end(_shut_down())
                return flight
            if flight.served.done() and not flight.done.done():
                flight.served = Future()  # the value that was served meanwhile may be served no longer
        if starts:
            self.runner.submit(partial(self._fly, state, flight))
        return flight

    def _fly(self, state: _Tenant, flight: Flight) -> None:
        """Make progress with a flight, on a worker thread; later again where it has to wait."""
        with state.lock:
            flight.parked = False
        pause = self._reader.attempt(state, flight)
        if pause is not None:
            with state.lock:
                flight.parked = True
            self.runner.at((state.tenant, "flight"), self._clock.monotonic() + pause, partial(self._resume, state))
        else:
            with state.lock:
                following = state.detach(flight)
            if following is not None:
                self.runner.submit(partial(self._fly, state, following))
        self._sync(state)

    def _resume(self, state: _Tenant) -> None:
        with state.lock:
            flight = state.flight
            if flight is None or not flight.parked:
                return
            flight.parked = False
        self.runner.submit(partial(self._fly, state, flight))

    def refresh(self, tenant: str) -> Evaluation:
        """Read the API by a read that begins after this call, and return the evaluation after it.

        Raises:
            ReadError: The read failed; the value that is served otherwise stays as it was.
        """
        self._start()
        state = self._states[tenant]
        entry = self._load(state)
        now = self._clock.monotonic()
        failure = entry.failure
        if failure is not None and failure.server_retry_at is not None and failure.server_retry_at > now:
            raise error_of(failure, now=now)
        flight = self._join(state, generation=entry.generation, newer_than=0, forced=True)
        if not self.runner.wait(flight.done, 2 * self._timeout_seconds + WAIT_GRACE_SECONDS):
            raise Unavailable("the read did not end within its deadline; the read of another process may hang")
        error = flight.done.result(0)
        if error is not None:
            raise error
        return self._from_api(self._evaluate(state), flight)

    # -- invalidate -------------------------------------------------------------------------------------------------

    def invalidate(self, tenant: str, request: Invalidation) -> tuple[Invalidated, bool]:
        """Serve nothing that was read before this call as fresh; where the background reads, a read begins.

        Invalidations of one tenant that arrive while one is under way become one transition.

        Returns:
            The result, and whether all who share the store see the invalidation.
        """
        self._start()
        state = self._states[tenant]
        result, shared = self._invalidate_together(state, request)
        if not result.duplicate:
            evaluation = self._evaluate(state)
            entry = evaluation.entry
            if self._background and retry_at(entry) <= self._clock.monotonic():
                self._join(state, generation=result.generation, newer_than=last_token(entry))
        return result, shared

    def _invalidate_together(self, state: _Tenant, request: Invalidation) -> tuple[Invalidated, bool]:
        """Add a request to the batch that runs next; the caller that opened the batch runs it."""
        with state.lock:
            leads = state.next_batch is None
            batch = state.next_batch = state.next_batch or _Batch()
            place = len(batch.requests)
            batch.requests.append(request)
            before = state.batch
        if leads:
            if before is not None:
                self.runner.wait(before.done, BATCH_SECONDS)
            with state.lock:
                state.batch, state.next_batch = batch, None  # closed: a later request opens the next one
            try:
                batch.done.set_result(self._store.invalidate(state.tenant, batch.requests))
            except BaseException as error:
                batch.done.set_exception(error)
                raise
        elif not self.runner.wait(batch.done, BATCH_SECONDS):
            raise StoreError("the store did not take the invalidation in time")
        results, shared = batch.done.result(0)
        return results[place], shared

    def wait_for_generation(self, tenant: str, generation: int) -> Evaluation | None:
        """Return an evaluation of a value that was read under this generation or a later one; None where none came.

        Waits as long as one read may last. Returns None at once where a failed read forbids another one for now, or
        where as many callers wait for this tenant as may: a series of deliveries for a tenant whose API hangs must not
        occupy every thread of a server.
        """
        state = self._states[tenant]
        with state.lock:
            may_wait = state.waiters < self._max_waiters
            state.waiters += may_wait
        try:
            until = self._deadline()
            while True:
                evaluation = self._evaluate(state)
                entry, now = evaluation.entry, self._clock.monotonic()
                if entry.snapshot is not None and entry.snapshot.generation >= generation:
                    return evaluation
                if not may_wait or retry_at(entry) > now or now >= until:
                    return None
                flight = self._join(state, generation=generation, newer_than=last_token(entry))
                if not self.runner.wait(flight.done, until - now) or flight.done.result(0) is not None:
                    return None
        finally:
            with state.lock:
                state.waiters -= may_wait

    # -- background -------------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        for tenant in self._store.poll():
            state = self._states.get(tenant)
            if state is not None:
                self._sync(state)
                self._resume(state)  # a flight that waits for the lease of another process may go on

    def _sync(self, state: _Tenant) -> None:
        """Publish the entry as it stands, and plan its next refresh."""
        self._evaluate(state)
        self._plan(state)

    def _plan(self, state: _Tenant) -> None:
        """Plan the next refresh of the entry at hand, once: each draw of the jitter would bring it forward a little."""
        if not self._background or state.planned is state.loaded.entry:
            return
        with state.lock:
            entry = state.loaded.entry
            if state.planned is entry:
                return
            state.planned = entry
        when = refresh_at(
            entry,
            now=self._clock.monotonic(),
            random=self._random(),
            spread_seconds=self._store.spread_seconds,
            foreign=self._is_foreign(entry),
        )
        if not self._store.health().ok:
            when += degraded_jitter_seconds(
                entry, random=self._random(), windows=self._windows, foreign=self._is_foreign(entry)
            )
        when = max(when, state.refreshed_at + REFRESH_PAUSE_SECONDS)
        self.runner.at((state.tenant, "refresh"), when, partial(self._refresh_due, state, entry))

    def _refresh_due(self, state: _Tenant, planned: Entry) -> None:
        with state.lock:
            if state.planned is not planned:
                return
            state.planned = None
        entry = self._evaluate(state).entry
        if entry is planned:
            state.refreshed_at = self._clock.monotonic()
            self._join(state, generation=entry.generation, newer_than=last_token(entry))
        else:
            self._plan(state)

    # -- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads of the store and of the background; idempotent."""
        self._start()
        self._sync_all()

    def _start(self) -> None:
        self._started = True
        if not self._closed:
            self._store.start()
            if self._closed:  # another thread did it meanwhile, and the thread of the store must not outlive that
                self._store.close()  # type: ignore[unreachable]  # mypy knows of no other thread
        self.runner.start()

    def _sync_all(self) -> None:
        for state in self._states.values():
            self._sync(state)

    def warm(self) -> list[Evaluation]:
        """Return what may be served of each tenant, after a read where that is needed; waits as long as one read."""
        self.start()
        until = self._deadline()
        evaluations = []
        for state, (evaluation, flight) in [(one, self._evaluate_or_join(one)) for one in self._states.values()]:
            if flight is not None:
                ended = self.runner.wait(flight.done, until - self._clock.monotonic())
                failing = not ended or flight.done.result(0) is not None
                evaluations.append(self._from_api(self._evaluate(state, failing=failing), flight))
            else:
                evaluations.append(evaluation)
        return evaluations

    def after_fork(self) -> None:
        """Forget the flights, locks and threads of the parent in a forked child; the values stay.

        The child follows the store from now on and not from its first evaluation: one that is idle for minutes must
        not answer with a value that was invalidated meanwhile.
        """
        self.runner.after_fork()
        self._store.after_fork()
        self.changes.after_fork()
        known = self._states
        self._states = {tenant: _Tenant(tenant) for tenant in known}
        for tenant, state in self._states.items():
            state.enabled = known[tenant].enabled
        if self._started and not self._closed:
            self._start()
            self.runner.at("after fork", self._clock.monotonic(), self._sync_all)  # not here: a load may wait

    def reopen(self) -> None:
        """Work again after `close`."""
        self._closed = False
        for state in self._states.values():
            state.planned = None  # what was due meanwhile was dropped
        self.runner.reopen()

    def close(self, seconds: float = 1.0, *, abort: Callable[[], None] | None = None) -> None:
        """Wake every waiter and end the threads within so many seconds; until `reopen` no read begins.

        Args:
            seconds: The longest that it may take, > 0.
            abort: Ends the reads that are under way, from another thread.
        """
        self._closed = True
        for state in self._states.values():
            with state.lock:
                flights = state.flights
                state.flight = state.next_flight = None
            for flight in flights:  # first: a read that is broken off from here on says nothing of the API
                flight.end(_shut_down())
        if abort is not None:
            abort()
        self.runner.close(seconds)
        self._store.close()


def _is_at(ref: tuple[Sequence[int], int], versions: Sequence[int], place: int) -> bool:
    """Return whether a version word still stands where it was found.

    Where it moved meanwhile, the word at the old place may have changed for the last time before it was read.
    """
    return ref[0] is versions and ref[1] == place


def _shut_down() -> ReadError:
    return Unavailable("the provider was shut down")


def _set(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)


async def _wait_async(future: Future[None], seconds: float) -> bool:
    """Wait for a future without blocking the event loop; a cancelled waiter does not cancel the flight."""
    loop = asyncio.get_running_loop()
    woken: asyncio.Future[None] = loop.create_future()

    def wake(_: object) -> None:
        with suppress(RuntimeError):  # the loop is closed, so there is no waiter
            loop.call_soon_threadsafe(_set, woken)

    future.add_done_callback(wake)
    try:
        await asyncio.wait_for(woken, max(0.0, seconds))
    except TimeoutError:
        return future.done()
    return True
