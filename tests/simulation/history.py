"""One history: processes, deliveries, faults and time, and the promises that hold after each step."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from external_oms.cache import Cache, CacheStore, Change, ChangeKind
from external_oms.config import Document, Reading
from external_oms.entry import Entry, Invalidation, is_current
from external_oms.errors import RateLimited, ReadError, Unavailable
from external_oms.policy import Evaluation, Freshness, Windows
from external_oms.stores.fallback import Fallback
from external_oms.stores.memory import MemoryStore
from tests.simulation.shared import Handle, Server
from tests.simulation.world import WALL_OFFSET, Choices, Process, SimulatedClock, SimulatedRunner, Violation, World

__all__ = ["History", "play"]

TENANTS = ("acme", "beta")
TIMEOUT_SECONDS = 1.0
POLL_SECONDS = 0.5
SETTLE_SECONDS = 9.0
EPSILON = 1e-6

_LOCK = type(threading.Lock())
_CONDITION = threading.Condition
copy._deepcopy_dispatch[_LOCK] = lambda lock, memo: threading.Lock()  # type: ignore[attr-defined]  # a fork copies memory
copy._deepcopy_dispatch[Future] = lambda future, memo: Future()  # type: ignore[attr-defined]  # nobody ends it in the child


@dataclass
class Read:
    """One read of the API: the truth about a value."""

    number: int
    tenant: str
    started: float
    member: Member
    value: bool | None = None
    ended: float | None = None


@dataclass
class Delivery:
    """An invalidation that was answered.

    Attributes:
        effect: When the generation rose.
        deadline: From when no other process may serve an earlier value as fresh.
        member: Who took it: from the answer on it serves no earlier value as fresh.
        shared: Whether the store has it.
    """

    tenant: str
    effect: float
    answered: float
    deadline: float
    member: Member
    shared: bool
    others: bool = True


@dataclass
class Api:
    """The config API of one tenant."""

    value: bool = True
    changed_at: float = 0.0
    mode: str = "ok"
    latency: float = 0.1
    flips: list[tuple[float, bool]] = field(default_factory=lambda: [(0.0, True)])
    not_before: float = 0.0
    lag: float = 0.0


class Member(Process):
    """One process."""

    def __init__(self, history: History, number: int) -> None:
        super().__init__()
        self.history = history
        self.number = number
        self.world = history.world
        choices = history.world.choices
        host = 0 if history.kind != "fleet" else number
        self.clock = SimulatedClock(history.world, 100.0 * host + 50.0, 0.2 * (choices.below(5) - 2))
        self.degraded_until = 0.0
        self.idle = False
        self.store: CacheStore
        self.handle: Handle | None = None
        if history.kind == "memory":
            self.store = MemoryStore(clock=self.clock, holder=f"m{number}")
        else:
            self.handle = Handle(history.server, self, self.clock, f"m{number}.", POLL_SECONDS)
            self.store = Fallback(self.handle, clock=self.clock, random=choices.unit)
        self.events: list[bool] = []
        self.cache = Cache(
            tenants=history.tenants,
            store=self.store,
            source=self.read,
            windows=history.windows,
            timeout_seconds=TIMEOUT_SECONDS,
            clock=self.clock,
            random=choices.unit,
            background=history.background,
            waits_after_failure=not history.background,
            max_waiters=3,
            runner=lambda poll, poll_seconds: SimulatedRunner(self.world, self, self.clock, poll, poll_seconds),
        )
        self.hot: dict[str, tuple[float, Sequence[int], int, int | None, Evaluation]] = {}
        self.generations: dict[str, int] = {}
        self.values: dict[str, bool] = {}
        self.taken: set[str] = set()
        self.cache.changes.subscribe(self.changed)

    def __deepcopy__(self, memo: dict[int, object]) -> Member:
        child = Member.__new__(Member)
        memo[id(self)] = child
        child.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return child

    def read(self, tenant: str, etag: str | None) -> Reading:
        """Read the API of a tenant; the etag carries the number of the read."""
        return self.history.read(self, tenant, etag)

    def changed(self, change: Change) -> None:
        """Check the events: a change of value is said once, and only where the value changed."""
        snapshot = change.evaluation.entry.snapshot
        if change.kind is ChangeKind.VALUE:
            if snapshot is None or self.values.get(change.tenant) is snapshot.enabled:
                raise Violation(f"{self}: an event says that the value changed, and it did not")
        elif snapshot is not None and self.values.get(change.tenant, snapshot.enabled) is not snapshot.enabled:
            raise Violation(f"{self}: the value changed, and the event does not say so")
        if snapshot is not None:
            self.values[change.tenant] = snapshot.enabled

    def evaluate(self, tenant: str, *, wait: bool = True) -> Evaluation:
        """Evaluate as the provider does: from the hot entry where it holds."""
        hot = self.hot.get(tenant)
        if hot is not None:
            until, versions, index, version, evaluation = hot
            if self.clock.monotonic() < until and versions[index] == version:
                return evaluation
        evaluation = self.cache.lookup(tenant) if wait else self.cache.peek(tenant)
        if evaluation.freshness is Freshness.FRESH:
            self.hot[tenant] = (*self.cache.validity(evaluation), evaluation)
        return evaluation

    @property
    def degraded(self) -> bool:
        """Whether it works alone."""
        return isinstance(self.store, Fallback) and self.store._local is not None

    def __repr__(self) -> str:
        return f"m{self.number}"


class History:
    """A world with processes, and the truth about it.

    Args:
        choices: Where everything random comes from.
    """

    def __init__(self, choices: Choices) -> None:
        self.world = World(choices)
        self.kind: str = choices.pick(("memory", "file", "file", "fleet", "fleet"))
        self.tenants = TENANTS[: 1 + choices.chance(25)]
        ttl = choices.pick((2.0, 6.0))
        self.windows = Windows(ttl, choices.pick((0.5, 2.0, 6.0)), choices.pick((4.0, 20.0)))
        self.background = not choices.chance(15)
        self.server = Server(self.world, "file" if self.kind == "memory" else self.kind)
        self.server.on_commit = self.committed
        self.server.on_fault = self.disturb
        self.apis = {tenant: Api() for tenant in self.tenants}
        self.reads: list[Read] = []
        self.in_flight: dict[str, list[Read]] = {tenant: [] for tenant in self.tenants}
        self.deliveries: list[Delivery] = []
        self.raised: dict[tuple[str, int], float] = {}
        self.disturbed = False
        self.slowed = False
        self.forced: list[float] = []
        self.storm = False
        self.ids = 0
        self.started_deliveries = 0
        self.delivering: dict[str, int] = dict.fromkeys(self.tenants, 0)
        self.taken: set[str] = set()
        self.attempts: dict[str | None, int] = {}
        self.members: list[Member] = []
        for _ in range(1 if self.kind == "memory" else 2 + choices.chance(25)):
            self.join()

    def __deepcopy__(self, memo: dict[int, object]) -> History:
        return self

    def disturb(self) -> None:
        """Remember that a fault may have made processes work alone: some promises then hold for each of them only."""
        self.disturbed = True

    def join(self) -> Member:
        """Start a process."""
        member = Member(self, len(self.members) + 1)
        self.members.append(member)
        self.watch(member)
        self.world.spawn(member, member.cache.start, f"{member} start")
        return member

    def watch(self, member: Member) -> None:
        """Check that evaluations wait only where they may."""
        runner = member.cache.runner
        assert isinstance(runner, SimulatedRunner)

        def on_wait() -> None:
            task = self.world.task
            if task is None or not task.name.startswith("evaluate "):
                return
            entry = member.cache._states[task.name.split()[1]].loaded.entry
            evaluation = member.cache.peek(task.name.split()[1])
            known = evaluation.servable is not None or (entry.failure is not None and self.background)
            if evaluation.entry is entry and known:
                raise Violation(f"P6: {member} waits for a read although an answer is known ({evaluation.freshness})")

        runner.on_wait = on_wait

    # -- the truth ----------------------------------------------------------------------------------------------------

    def read(self, member: Member, tenant: str, etag: str | None) -> Reading:
        """Answer a read, after a while, with the value of some moment of it."""
        world, api = self.world, self.apis[tenant]
        read = Read(len(self.reads), tenant, world.now, member)
        self.reads.append(read)
        self._check_start(read, api)
        flights = self.in_flight[tenant]
        flights.append(read)
        try:
            return self._answer(read, api, etag)
        finally:
            flights.remove(read)
            read.ended = world.now

    def _check_start(self, read: Read, api: Api) -> None:
        others = [
            one
            for one in self.in_flight[read.tenant]
            if one.member.alive and (self.kind != "memory" or one.member is read.member)
        ]
        if others and not self.disturbed:
            raise Violation(f"P5: {read.member} reads while {others[0].member} reads")
        alone = self.kind == "memory" and len(self.members) > 1  # each of them was asked to wait for itself
        if not self.disturbed and not alone and self.world.now < api.not_before - 0.01:
            raise Violation(f"P5: {read.member} reads {api.not_before - self.world.now:.3f} s before Retry-After ends")
        if not self.disturbed and not self.forced:
            recent = [
                one
                for one in self.reads
                if one.tenant == read.tenant
                and one.started > self.world.now - 1.0
                and (self.kind != "memory" or one.member is read.member)
            ]
            if len(recent) > 6:
                raise Violation(f"P5: {len(recent)} reads within a second")

    def _answer(self, read: Read, api: Api, etag: str | None) -> Reading:
        world, choices = self.world, self.world.choices
        if api.mode == "hang":
            world.sleep(TIMEOUT_SECONDS)
            raise Unavailable("no answer in time")
        world.sleep(api.latency * choices.unit())
        if api.mode == "error":
            raise Unavailable("503", status=503)
        if api.mode == "limit":
            wait = choices.pick((0.5, 3.0))
            api.not_before = world.now + wait
            raise RateLimited("429", status=429, retry_after_seconds=wait)
        moment = world.now - (api.lag if choices.chance(50) else 0.0)
        since, value = next((at, value) for at, value in reversed(api.flips) if at <= moment or at == 0.0)
        updated_at = datetime.fromtimestamp(since + WALL_OFFSET, UTC) if api.mode != "plain" else None
        if api.mode == "absurd":
            updated_at = datetime.fromtimestamp(world.now + WALL_OFFSET, UTC) + timedelta(days=400)
        world.sleep(api.latency * choices.unit())
        read.value = value
        return Reading(Document(value, updated_at), f'"r{read.number}"')

    def committed(self, tenant: str, before: Entry, after: Entry) -> None:
        """Check what a process stored, at the moment at which it did."""
        if after.generation != before.generation:
            self.raised[tenant, after.generation] = self.world.now
        if after.failure is not None and after.failure != before.failure and after.failure.token < before.token:
            raise Violation("P3: the failure of a lease that was replaced is stored")
        snapshot = after.snapshot
        if snapshot is None or snapshot == before.snapshot:
            return
        if before.snapshot is not None and snapshot.token < before.snapshot.token:
            raise Violation("P3: the value of a lease that was replaced is stored")
        read = self._read_of(snapshot.etag)
        raised = self.raised.get((tenant, after.generation), 0.0)
        if is_current(after) and read.started < raised - EPSILON and not self.server.losses:
            raise Violation(f"P3: a read of {read.started:.3f} is stored as current, invalidated at {raised:.3f}")
        if (
            is_current(after)
            and raised
            and not self.server.losses
            and snapshot.lifetime_seconds > max(1.0, read.started - raised) + 2 * self.clock_error
            and snapshot.token != before.token + 1_000_000
            and (before.snapshot is None or snapshot.etag != before.snapshot.etag)
        ):
            raise Violation(f"P4: {snapshot.lifetime_seconds:.3f} s of lifetime, {read.started - raised:.3f} s after")
        limit = datetime.fromtimestamp(self.world.now + WALL_OFFSET, UTC) + timedelta(minutes=6)
        if snapshot.updated_at is not None and snapshot.updated_at > limit:
            raise Violation("P4: an absurd updated_at is stored")
        had = before.snapshot
        if had is not None and had.updated_at and snapshot.updated_at and snapshot.updated_at < had.updated_at:
            age = self.world.now - self._read_of(had.etag).started
            if age < self.windows.hard_limit_seconds - 0.1:
                raise Violation("P4: an older updated_at replaced a newer one")

    def _read_of(self, etag: str | None) -> Read:
        assert etag is not None
        return self.reads[int(etag[2:-1])]

    # -- the promises -------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check what every process would answer now."""
        for member in self.members:
            if member.alive and not member.frozen and not member.idle:
                for tenant in self.tenants:
                    evaluation = member.evaluate(tenant, wait=False)
                    self.check_answer(member, tenant, evaluation)
                    self._check_waits(member, tenant, evaluation)

    def _check_waits(self, member: Member, tenant: str, evaluation: Evaluation) -> None:
        """Check that no evaluation goes on waiting once a value may be served."""
        runner = member.cache.runner
        assert isinstance(runner, SimulatedRunner)
        for name, future in runner.waiting:
            if name == f"evaluate {tenant}" and evaluation.servable is not None and not future.done():
                raise Violation(f"P6: {member} goes on waiting for a read although a value may be served")

    def check_answer(self, member: Member, tenant: str, evaluation: Evaluation, *, waited: bool = False) -> None:
        """Check an answer that a process gives now."""
        now, entry = self.world.now, evaluation.entry
        if member.degraded or (member.handle is not None and (member.handle.cut_off or self.server.down)):
            member.degraded_until = now
        known = member.generations.get(tenant, 0)
        # a delivery that is not yet answered may show or not: not where the entry is not the one at hand
        hot = entry is not member.cache._states[tenant].loaded.entry
        if entry.generation < known and not hot:
            raise Violation(f"P2: the generation of {member} fell from {known} to {entry.generation}")
        member.generations[tenant] = max(known, entry.generation)
        snapshot = evaluation.servable
        if snapshot is None:
            return
        read = self._read_of(snapshot.etag)
        age = now - read.started
        if evaluation.freshness is Freshness.FRESH:
            if age > self.windows.ttl_seconds + self.clock_error:
                raise Violation(f"P1: {member} serves a value of {age:.3f} s as fresh")
            for delivery in self.deliveries:
                if delivery.tenant == tenant and read.started < delivery.effect - EPSILON:
                    self._check_delivery(member, delivery, read, now)
            return
        windows = self.windows
        limit = windows.ttl_seconds + (
            max(windows.stale_while_revalidate_seconds, windows.stale_if_error_seconds)
            if entry.failure is not None or waited
            else windows.stale_while_revalidate_seconds
        )
        if not self.disturbed and entry.verified and self.kind != "memory":
            raised = [
                at
                for (of, generation), at in self.raised.items()
                if of == tenant and snapshot.generation < generation <= entry.generation and at > read.started
            ]
            if raised and now - min(raised) > limit - windows.ttl_seconds + 2 * self.clock_error:
                raise Violation(f"P1: {member} serves a value {now - min(raised):.3f} s after it was invalidated")
        if age > limit + self.clock_error and entry.verified:
            raise Violation(f"P1: {member} serves a value of {age:.3f} s as stale; the limit is {limit:.3f} s")

    def _check_delivery(self, member: Member, delivery: Delivery, read: Read, now: float) -> None:
        if member is delivery.member:
            raise Violation(
                f"P2: {member} took a delivery at {delivery.effect:.3f} and serves a read of {read.started:.3f}"
            )
        cut_off = member.degraded_until + 3 * POLL_SECONDS
        if delivery.shared and delivery.others and now > max(delivery.deadline, cut_off):
            raise Violation(
                f"P2: {member} serves a read of {read.started:.3f} as fresh at {now:.3f}, "
                f"after the delivery of {delivery.effect:.3f} was answered at {delivery.answered:.3f}"
            )

    # -- what happens -------------------------------------------------------------------------------------------------

    @property
    def clock_error(self) -> float:
        """The error of an instant that travelled through the store: one round trip of a fleet."""
        return 0.01 if self.kind != "fleet" else 0.51 if self.slowed else 0.02

    @property
    def bound(self) -> float:
        """How long an invalidation takes to reach every process."""
        return 0.0 if self.kind != "fleet" else 2.5 * POLL_SECONDS + 0.5

    def evaluate(self, member: Member, tenant: str, answers: dict[tuple[int, str], Evaluation] | None = None) -> None:
        """Have a process evaluate, in a task."""

        def job() -> None:
            started = self.world.now
            healthy = self.is_healthy(tenant)
            evaluation = member.evaluate(tenant)
            waited = self.world.now - started
            wide = self.windows.stale_while_revalidate_seconds >= 2.0  # longer than the pace keeps a read waiting
            if wide and waited > 1.2 and healthy and self.is_healthy(tenant) and self.apis[tenant].changed_at < started:
                raise Violation(f"P6: an evaluation of {member} waited {waited:.3f} s though everything works")
            self.check_answer(member, tenant, evaluation, waited=self.world.now > started)
            if answers is not None:
                answers[member.number, tenant] = evaluation
            if self.world.now - started > TIMEOUT_SECONDS + 1.0 and not self.server.slow and not self.disturbed:
                raise Violation(f"P6: an evaluation of {member} took {self.world.now - started:.3f} s")

        self.world.spawn(member, job, f"evaluate {tenant}")

    def deliver(self, member: Member, tenant: str, delivery_id: str | None) -> None:
        """Have a process take a delivery, in a task."""

        def job() -> None:
            called, losses = self.world.now, self.server.losses
            generation, alone = self.server.entry(tenant).generation, self.delivering[tenant] == 0
            self.started_deliveries += 1
            started, self.delivering[tenant] = self.started_deliveries, self.delivering[tenant] + 1
            before = member.evaluate(tenant, wait=False)
            kept = self._is_kept(tenant, before)
            # from here on the store may take it, and its answer may be lost
            self.attempts[delivery_id] = self.attempts.get(delivery_id, 0) + 1
            result, shared = member.cache.invalidate(tenant, Invalidation(delivery_id=delivery_id))
            effect = (
                self.raised.get((tenant, result.generation), called) if shared and self.kind != "memory" else called
            )
            self.delivering[tenant] -= 1
            taken = member.taken if self.kind == "memory" else self.taken
            if result.duplicate:
                if delivery_id not in taken and self.attempts[delivery_id] == 1:
                    raise Violation(f"P2: the delivery {delivery_id} counts as a duplicate, and was never taken")
                alone = alone and started == self.started_deliveries and not self.delivering[tenant]
                if alone and not self.disturbed and self.server.entry(tenant).generation != generation:
                    raise Violation(f"P2: the duplicate {delivery_id} raised the generation")
                return
            if shared and delivery_id is not None:
                if delivery_id in taken and not self.server.losses:
                    raise Violation(f"P2: the delivery {delivery_id} was taken twice")
                taken.add(delivery_id)
            answered = self.world.now
            self.deliveries.append(
                Delivery(
                    tenant,
                    max(called, min(effect, answered)),
                    answered,
                    answered + self.bound,
                    member,
                    shared,
                    others=self.kind != "memory",
                )
            )
            after = member.evaluate(tenant, wait=False)
            fresh = before.freshness is Freshness.FRESH and before.fresh_until > member.clock.monotonic()
            stale_left = self.windows.stale_while_revalidate_seconds > answered - called
            lost = not kept or self.server.losses != losses
            if fresh and stale_left and after.servable is None and not lost and not self.slowed:
                raise Violation(f"P1: an invalidation made the fresh value of {member} expire")
            if shared:
                found = member.cache.wait_for_generation(tenant, result.generation)
                if found is not None:
                    snapshot = found.entry.snapshot
                    if snapshot is None or self._read_of(snapshot.etag).started < called - EPSILON:
                        raise Violation(f"P2: {member} answered a delivery as refreshed with a value read before it")

        self.world.spawn(member, job, f"deliver {tenant}")

    def _is_kept(self, tenant: str, evaluation: Evaluation) -> bool:
        """Return whether the store has the value of a process or a later one: processes see a loss only later."""
        had, stored = evaluation.servable, self.server.entry(tenant).snapshot
        return not self.server.losses or had is None or (stored is not None and stored.token >= had.token)

    def is_healthy(self, tenant: str) -> bool:
        """Return whether nothing has failed so far, and the API of a tenant answers."""
        api = self.apis[tenant]
        return not self.disturbed and api.mode == "ok" and not api.lag and self.world.now > api.not_before

    def refresh(self, member: Member, tenant: str) -> None:
        """Have a process refresh, in a task."""
        self.forced.append(self.world.now)

        def job() -> None:
            called = self.world.now
            healthy, api = self.is_healthy(tenant), self.apis[tenant]
            lagging = api.lag > 0.0
            try:
                evaluation = member.cache.refresh(tenant)
            except ReadError as error:
                if healthy and self.is_healthy(tenant) and self.apis[tenant].changed_at < called:
                    raise Violation(f"P5: {member}: refresh() failed though everything works: {error}") from error
                return
            snapshot = evaluation.entry.snapshot
            lagging = lagging or api.lag > 0.0 or api.mode == "absurd" or member.degraded
            if snapshot is None or (
                self._read_of(snapshot.etag).started < called - EPSILON and not lagging and not self.server.losses
            ):
                raise Violation(
                    f"{member}: refresh() at {called:.3f} returned {snapshot and snapshot.etag}, read before it"
                )

        self.world.spawn(member, job, f"refresh {tenant}")

    def crash(self, member: Member) -> None:
        """Kill a process."""
        self.disturbed = True
        self.world.reap(member)
        for flights in self.in_flight.values():
            flights[:] = [read for read in flights if read.member is not member]
        if self.server.losses:  # what only this process knew is lost with it
            for delivery in self.deliveries:
                if delivery.member is member:
                    delivery.others = False

    def freeze(self, member: Member) -> None:
        """Stop a process, or let it go on; then it has missed what the others said meanwhile."""
        member.frozen = not member.frozen
        member.degraded_until = self.world.now

    def fork(self, parent: Member) -> Member:
        """Fork a process: the child has a copy of its memory, and none of its threads."""
        child = copy.deepcopy(parent)
        child.number = len(self.members) + 1
        child.alive, child.frozen = True, False
        runner = child.cache.runner
        assert isinstance(runner, SimulatedRunner)
        runner.owner = child
        child.hot = {}
        child.idle = self.world.choices.chance(50)
        if child.handle is not None:
            child.handle.fork(child, f"m{child.number}.")
        child.cache.after_fork()
        if isinstance(child.store, MemoryStore):
            child.store._holder = f"m{child.number}"  # random otherwise, and a history is to be repeatable
        self.members.append(child)
        self.watch(child)
        return child

    def lose(self, how: Callable[[], None]) -> None:
        """Have the store lose data. Who knows of an invalidation repeats it within the bound."""
        self.disturbed = True
        how()
        for delivery in self.deliveries:
            delivery.deadline = max(delivery.deadline, self.world.now + 3 * POLL_SECONDS + self.bound)
            if not delivery.member.alive or delivery.member.frozen or delivery.member.degraded:
                delivery.others = False


def play(choices: Choices, begun: Callable[[History], object] = lambda history: None) -> History:
    """Play one history.

    Args:
        choices: Where everything random comes from.
        begun: Called with the history when it begins.

    Raises:
        Violation: A promise was broken.
    """
    history = History(choices)
    begun(history)
    world, server = history.world, history.server
    world.run(0.5, history.check)
    steps = choices.pick((3, 3, 3, 5, 5, 8, 16))
    for _ in range(steps):
        _step(history, choices)
        world.run(choices.pick((0.0, 0.0, 0.005, 0.05, 0.3, 1.1, 2.5, 7.0)), history.check)
        if choices.chance(50):
            history.check()
    idle = any(member.idle for member in history.members)
    if not idle and choices.chance(60):
        return history
    # faults end, time passes, and everybody is right again
    server.healing = True
    server.down = server.busy = server.slow = server.deaf = False
    for handle in server.handles:
        handle.cut_off = False
    for api in history.apis.values():
        api.mode, api.lag = "ok", 0.0
    for member in history.members:
        if member.frozen:
            history.freeze(member)
    world.run(history.windows.ttl_seconds + SETTLE_SECONDS, history.check)
    for member in history.members:
        for tenant in history.tenants:
            value = history.apis[tenant].value
            if not (member.alive and member.idle and history.background and member.cache._started):
                continue  # the child of a process that evaluated nothing has nothing old to serve
            if member.values.get(tenant) is not value:
                raise Violation(f"P7: {member}, a forked child, did not follow the store while it was idle")
    last: dict[tuple[int, str], Evaluation] = {}
    for member in history.members:
        if member.alive:
            for tenant in history.tenants:
                history.evaluate(member, tenant, last)
    world.run(TIMEOUT_SECONDS + 0.5, history.check)
    _check_end(history, last)
    return history


def _step(history: History, choices: Choices) -> None:
    living = [member for member in history.members if member.alive]
    if not living:
        living = [history.join()]
    member, tenant = choices.pick(living), choices.pick(history.tenants)
    server, api, world = history.server, history.apis[tenant], history.world
    what = choices.below(35)
    if what < 7:
        world.note(f"{member} evaluates {tenant}")
        history.evaluate(member, tenant)
    elif what < 13:
        if what == 12 and history.ids:
            name = f"d{choices.below(history.ids)}"
        else:
            name = f"d{history.ids}"
            history.ids += 1
        world.note(f"{member} takes delivery {name} for {tenant}")
        history.deliver(member, tenant, f"{tenant}:{name}")
    elif what == 13:
        world.note(f"a storm of deliveries for {tenant} at {member}")
        for _ in range(12):
            history.deliver(member, tenant, None)
            world.run(0.07, history.check)
    elif what == 14:
        world.note(f"{member} refreshes {tenant}")
        history.refresh(member, tenant)
    elif what < 18:
        api.value = not api.value
        api.flips.append((world.now, api.value))
        world.note(f"the API of {tenant} changes to {api.value}")
    elif what < 22:
        api.mode = choices.pick(("ok", "ok", "error", "hang", "limit", "absurd", "plain"))
        api.latency = choices.pick((0.02, 0.1, 0.4))
        api.lag = choices.pick((0.0, 0.0, 1.5, 10.0))
        api.changed_at = world.now
        world.note(f"the API of {tenant}: {api.mode}, latency {api.latency}, lag {api.lag}")
    elif what in {30, 33, 34}:
        world.note(f"{member} refreshes {tenant}, everybody evaluates it, and another process takes a delivery")
        history.refresh(member, tenant)
        world.run(choices.pick((0.0, 0.01, 0.1, 0.3)))
        for _ in range(2):
            for one in living:
                history.evaluate(one, tenant)
            history.deliver(choices.pick(living), tenant, None)
            for one in living:
                history.evaluate(one, tenant)
            world.run(choices.pick((0.0, 0.0, 0.05, 0.3)), history.check)
            history.check()
    elif what == 31:
        api.flips.append((world.now, not api.value))
        api.value, api.lag, api.changed_at = not api.value, choices.pick((1.5, 10.0)), world.now
        world.note(f"the API of {tenant} changes to {api.value}, and a replica lags by {api.lag}")
        history.deliver(member, tenant, None)
        world.run(0.2, history.check)
        history.deliver(member, tenant, None)
    elif history.kind == "memory":
        if what == 22:
            _fork(history, member, tenant)
        return
    elif what == 22:
        if len(living) < 5:
            _fork(history, member, tenant)
    elif what == 23:
        world.note(f"{member} is killed")
        history.crash(member)
        history.join()
    elif what == 24:
        history.disturbed = True
        readers = [one.member for flights in history.in_flight.values() for one in flights if one.member.alive]
        member = choices.pick(readers) if readers and not member.frozen else member
        history.freeze(member)
        world.note(f"{member} is {'frozen' if member.frozen else 'thawed'}")
    elif what == 25:
        history.disturbed = True
        server.down = not server.down
        world.note(f"the store is {'down' if server.down else 'up'}")
    elif what == 26:
        history.disturbed = True
        if member.handle is not None and history.kind == "fleet":
            member.handle.cut_off = not member.handle.cut_off
            world.note(f"{member} is {'cut off' if member.handle.cut_off else 'connected'}")
    elif what == 27:
        history.disturbed = True
        fault = choices.pick(("busy", "slow", "deaf"))
        setattr(server, fault, not getattr(server, fault))
        history.slowed = history.slowed or server.slow
        world.note(f"the store: {fault} {getattr(server, fault)}")
    elif what == 28:
        server.remember()
    elif what == 32:
        reading = [one for flights in history.in_flight.values() for one in flights if one.member.alive]
        if reading:
            read: Read = choices.pick(reading)
            world.note(f"{read.member} is killed while it reads")
            history.crash(read.member)
            world.run(0.1, history.check)
            _check_dead_lease(history, read)
    else:
        world.note("the store loses data")
        history.lose(choices.pick((server.flush, server.rewind)))


def _fork(history: History, parent: Member, tenant: str) -> None:
    """Fork a process; perhaps the value changes directly afterwards, and the child is idle."""
    history.world.note(f"{parent} forks")
    child = history.fork(parent)
    if history.world.choices.chance(50):
        child.idle = True
        api = history.apis[tenant]
        api.value = not api.value
        api.flips.append((history.world.now, api.value))
        history.world.note(f"the API of {tenant} changes to {api.value}, and {parent} takes a delivery")
        history.deliver(parent, tenant, None)


def _check_dead_lease(history: History, read: Read) -> None:
    """Check that one host finds the lease of a process that ended before its time."""
    server = history.server
    living = [member for member in history.members if member.alive and not member.frozen and not member.idle]
    entry = server.entry(read.tenant)
    faults = server.down or server.busy or server.slow or server.losses or entry.failure is not None
    idle = history.windows.ttl_seconds > 2.0  # the value is fresh for longer than the lease, and nobody wants to read
    late = history.world.now > read.started + 0.6  # the others ask less and less often for a lease that is held long
    if history.kind != "file" or not history.background or not living or faults or late or idle:
        return
    history.world.run(read.started + 2.7 - history.world.now, history.check)
    lease = server.entry(read.tenant).lease
    if lease is not None and lease.holder == read.member.handle.holder:  # type: ignore[union-attr]  # it has one
        raise Violation(f"P5: {read.member} ended, and its lease still keeps the others from reading")


def _check_end(history: History, last: dict[tuple[int, str], Evaluation]) -> None:
    """Check that everybody serves the truth, freshly, once faults have ended."""
    for member in history.members:
        if not member.alive:
            continue
        for tenant in history.tenants:
            evaluation = last.get((member.number, tenant))
            if evaluation is None:
                raise Violation(f"P6: an evaluation of {member} for {tenant} does not end")
            snapshot = evaluation.servable
            if snapshot is None:
                raise Violation(f"P6: {member} serves nothing for {tenant} though every fault has ended")
            if history.background and evaluation.freshness is not Freshness.FRESH:
                age = history.world.now - history._read_of(snapshot.etag).started
                if age > history.windows.ttl_seconds + 2.5:
                    raise Violation(f"P1: {member} serves {age:.3f} s old {evaluation.freshness} though faults ended")
            quiet = all(one.effect < history.world.now - 8.0 for one in history.deliveries)
            age = history.world.now - history._read_of(snapshot.etag).started
            early = age < history.windows.ttl_seconds - 0.7
            if history.background and quiet and evaluation.freshness is not Freshness.FRESH and early:
                raise Violation(
                    f"P1: {member} serves a value of {age:.3f} s as {evaluation.freshness} though faults ended"
                )
            if history.background and snapshot.enabled is not history.apis[tenant].value:
                raise Violation(f"P1: {member} serves {snapshot.enabled} for {tenant}; the API says otherwise")
            if member.degraded:
                raise Violation(f"P9: {member} still works alone though the store works")
