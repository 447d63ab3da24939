"""What a fleet on Redis costs: `python -m tests.simulation.costs` prints the tables of docs/scale.md.

The members are the real cache, fallback and heartbeat over the simulated world, without faults. Their store follows
`RedisStore` command by command: a transition reads and then stores by compare-and-set; a change sends one message to
every subscriber, its sender included; a member pulls its entries after a message that is news, and every
`store_bound_seconds` x 0.5 to 0.7, together with a PING over the subscription. Redis is one processor that serves one
command after the other and takes so long for each as was measured. A command that is not answered within a second
fails, as the client of redis-py does.

Counts follow from the code. Times follow from the measured costs of commands, and are those of an idle network.
"""

from __future__ import annotations

import argparse
import gc
import logging
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from external_oms.cache import Cache
from external_oms.codec import encode_entry
from external_oms.config import Document, Reading
from external_oms.entry import Entry, Invalidation, Moment, Transition, shift
from external_oms.errors import StoreBusy, StoreError
from external_oms.heartbeat import MAX_INTERVAL_SECONDS, Heartbeat
from external_oms.policy import Windows
from external_oms.records import Member as Report
from external_oms.stores.fallback import Fallback
from external_oms.stores.redis import PAUSE_SECONDS, RedisStore
from external_oms.stores.redis_sync import PULL, timeout_of
from tests.simulation.shared import Handle, Server
from tests.simulation.world import Choices, Process, SimulatedClock, SimulatedRunner, Task, World

__all__ = ["Costs", "Fleet", "cold_start", "delivery", "steady", "tables"]

T = TypeVar("T")

TENANT = "acme"
TTL_SECONDS = 30.0
BOUND_SECONDS = 5.0
TIMEOUT_SECONDS = 5.0
WINDOWS = Windows(TTL_SECONDS, 30.0, 3600.0)
READ_SECONDS = 0.1
"""How long the config API takes."""

NETWORK_SECONDS = 0.00025
"""From a member to Redis, and back."""

SETTLED_SECONDS = 65.0
"""After a delivery: until the reads that follow it have the whole lifetime again, and one lifetime more."""

CONNECT, PING, PULL_ONE, READ, SET, REPORT, PUSH = (one / 1e6 for one in (44, 16, 37, 46, 46, 37, 6))
"""Processor time of Redis 7.0 per command in seconds, by `INFO cpu` over thousands of each; on a virtual x86-64 server
with two cores, over loopback. PUSH is one message to one subscriber."""

PULL_MORE, REPORT_MORE = 4.4 / 1e6, 2.9 / 1e6
"""The same for each further tenant of a pull, whose commands are one pipeline, and of a heartbeat."""

CHANGE_SECONDS = 0.5
"""The longest that one change should keep Redis at work, with a message to each member and a pull by each: other
commands wait meanwhile, and a client gives up after a second."""

SMALL = (1, 10, 100)
"""Sizes that the tests print too."""

SIZES = (*SMALL, 1_000, 10_000)

MOST_AT_ONCE = 1_000
"""The largest fleet whose members start in the same instant in the table. One Redis needs a second for the connections
of 10,000 members alone, and a client waits no longer."""

ROLLOUT_SECONDS = 10.0
"""Within which time the members of a larger fleet start."""


class Draws(Choices):
    """Random numbers that are not recorded."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self._draw = random.Random(seed)

    def below(self, bound: int) -> int:
        """Return a number in [0, bound)."""
        return self._draw.randrange(bound)

    def unit(self) -> float:
        """Return a number in [0, 1)."""
        return self._draw.random()


class Crowd(World):
    """A world of many tasks, which run in the order in which they become ready until they wait."""

    def __init__(self, seed: int) -> None:
        super().__init__(Draws(seed))
        self._ready: deque[Task] = deque()

    def spawn(self, owner: Process, job: Callable[[], None], name: str) -> None:
        """Start a task."""
        self._ready.append(Task(self, owner, job, name))

    def run(self, seconds: float, check: Callable[[], None] | None = None) -> None:
        """Let so many seconds pass."""
        end = self.now + seconds
        while True:
            while self._ready:
                self.switches += 1
                self._ready.popleft().switch()
            if not self._timers or self._timers[0][0] > end:
                break
            self._advance(self._timers[0][0])
        self._advance(end)

    def pause(self) -> None:
        """Go on: no other task has to run here."""

    def _park(self, task: Task, until: float, future: Future[Any] | None = None) -> None:
        task.woken += 1
        turn = task.woken

        def wake(_: object = None) -> None:
            if task.woken == turn:
                task.woken += 1
                self._ready.append(task)

        if future is not None:
            future.add_done_callback(wake)
        self.call_at(until, wake)
        self.main.switch()

    def wait(self, future: Future[Any], seconds: float) -> bool:
        """Wait for a future on a task; return whether it is done."""
        task = self.task
        assert task is not None
        if not future.done() and seconds > 0:
            self._park(task, self.now + seconds, future)
        return future.done()


@dataclass
class CountingServer(Server):
    """A Redis that counts its commands and serves one after the other.

    Attributes:
        counts: Commands and messages by kind.
        work: Seconds of processor time so far.
    """

    counts: Counter[str] = field(default_factory=Counter)
    work: float = 0.0
    _queue: deque[tuple[float, Callable[[], float]]] = field(default_factory=deque)
    _is_working: bool = False

    def send(self, kind: str, seconds: float, execute: Callable[[], float]) -> None:
        """Take a command.

        Args:
            kind: What is counted.
            seconds: How long it takes.
            execute: Called when it has run; returns for how many seconds more it keeps the server at work.
        """
        self.counts[kind] += 1

        def arrive() -> None:
            self._queue.append((seconds, execute))
            if not self._is_working:
                self._next()

        self.world.call_at(self.world.now + NETWORK_SECONDS, arrive)

    def _next(self) -> None:
        self._is_working = bool(self._queue)
        if self._queue:
            seconds, execute = self._queue.popleft()
            self.work += seconds
            self.world.call_at(self.world.now + seconds, partial(self._executed, execute))

    def _executed(self, execute: Callable[[], float]) -> None:
        seconds = execute()
        self.work += seconds
        if seconds:
            self.world.call_at(self.world.now + seconds, self._next)
        else:
            self._next()

    def broadcast(self, version: int) -> float:
        """Send a message to every subscriber, one after the other; return how long that takes."""
        seconds = 0.0
        for handle in self.handles:
            if handle._running:
                seconds += PUSH
                self.counts["message"] += 1
                assert isinstance(handle, CountedHandle)
                self.world.call_at(self.world.now + seconds + NETWORK_SECONDS, partial(handle.told, version))
        return seconds


Found = tuple[int, Entry, frozenset[str], float]
"""Version, entry on the clock of the server, known delivery ids, and time of the server."""


class CountedHandle(Handle):
    """The store of one member, as `RedisStore` works, for one tenant.

    Args:
        server: The server.
        owner: The process.
        clock: Its clock.
        name: Its name for leases.
        learned: Called with every entry that this member learns.
        bound_seconds: As of `RedisStore`.
    """

    def __init__(
        self,
        server: CountingServer,
        owner: Process,
        clock: SimulatedClock,
        name: str,
        learned: Callable[[Entry], None],
        bound_seconds: float,
    ) -> None:
        super().__init__(server, owner, clock, name, RedisStore.poll_seconds or 0.0)
        self.spread_seconds = RedisStore.spread_seconds
        self._redis = server
        self._learned = learned
        self._bound_seconds = bound_seconds
        self._changed: set[str] = set()
        self._writing = 0
        self._is_pulling = False
        self._has_news = False

    # -- commands -----------------------------------------------------------------------------------------------------

    def _send(self, kind: str, seconds: float, execute: Callable[[], tuple[T, float]]) -> T:
        """Send a command and wait for its reply on a task."""
        world, reply = self._server.world, Future[T]()

        def executed() -> float:
            found, more = execute()
            world.call_at(world.now + more + NETWORK_SECONDS, partial(reply.set_result, found))
            return more

        self._redis.send(kind, seconds, executed)
        if not world.wait(reply, timeout_of(self._bound_seconds)):
            self._redis.counts["timeout"] += 1
            raise StoreError("the simulated Redis does not answer in time")
        return reply.result(0)

    def _look(self) -> Found:
        row = self._server.row(TENANT)
        return row.version, self._server.entry(TENANT), row.ids, self._server.time()

    def _compare_and_set(
        self, expected: int, version: int, text: str, ids: frozenset[str]
    ) -> tuple[Found | None, float]:
        row = self._server.row(TENANT)
        if row.version != expected:
            return self._look(), 0.0
        row.version, row.text, row.ids = version, text, row.ids | ids
        return None, self._redis.broadcast(version)

    def transact(self, tenant: str, transition: Transition[T], *, delivery_ids: Sequence[str] = ()) -> T:
        """Apply a transition: one command where it changes nothing, two where it does, more after a conflict."""
        choices = self._server.world.choices
        found = self._send("read", READ, lambda: (self._look(), 0.0))
        for conflicts in range(100):
            version, stored, ids, server_time = found
            now = self._clock.monotonic()
            entry = shift(stored, now - server_time)
            self._learn(version, entry)
            seen = frozenset(one for one in delivery_ids if one in ids)
            change = transition(entry, Moment(now, int(server_time * 1000), seen))
            if change.entry is entry and not change.events and not change.claims:
                return change.result
            new = max(version + 1 + len(change.events), int(server_time * 1e6))
            text = encode_entry(shift(change.entry, server_time - now))
            self._writing = new
            conflict = self._send(
                "set", SET, partial(self._compare_and_set, version, new, text, frozenset(change.claims))
            )
            if conflict is None:
                self._learn(new, change.entry)
                return change.result
            self._redis.counts["conflict"] += 1
            found = conflict
            if conflicts:
                self._server.world.sleep(PAUSE_SECONDS * choices.unit())
                found = self._send("read", READ, lambda: (self._look(), 0.0))
        raise StoreBusy("the simulated Redis: too many conflicts")

    def report(self, members: Sequence[Report]) -> None:
        """Send a heartbeat."""
        self._send("report", REPORT, lambda: (None, 0.0))

    # -- replica ------------------------------------------------------------------------------------------------------

    def _learn(self, version: int, entry: Entry) -> None:
        known, _ = self._replica.get(TENANT, (0, None))
        if version <= known:
            return
        self._replica[TENANT] = version, entry
        self._words.setdefault(TENANT, [0])[0] += 1
        self._learned(entry)
        if version != self._writing:
            self._changed.add(TENANT)
            self._wake()

    def told(self, version: int) -> None:
        """Take a message: pull the entry, unless the message is no news."""
        if version == self._replica.get(TENANT, (0, None))[0]:
            return
        self._has_news = True
        if not self._is_pulling:
            self._pull(everything=False)

    def _pull(self, *, everything: bool) -> None:
        if self._is_pulling:  # the thread pulls one time after the other
            self._server.world.call_at(
                self._server.world.now + 2 * NETWORK_SECONDS, partial(self._pull, everything=True)
            )
            return
        self._is_pulling, self._has_news = True, False
        known, _ = self._replica.get(TENANT, (0, None))
        sent, world = self._server.world.now, self._server.world

        def execute() -> float:
            version = self._server.row(TENANT).version
            entry = shift(self._server.entry(TENANT), self._delta(sent)) if version != known else None
            world.call_at(world.now + NETWORK_SECONDS, partial(self._pulled, version, entry, everything))
            return 0.0

        if everything:
            self._redis.counts["ping"] += 1
        self._redis.send("pull", PULL_ONE + PING * everything, execute)

    def _pulled(self, version: int, entry: Entry | None, everything: bool) -> None:
        world = self._server.world
        self._is_pulling = False
        if entry is not None:
            self._learn(version, entry)
        if everything:
            pause = self._bound_seconds * (PULL[0] + (PULL[1] - PULL[0]) * world.choices.unit())
            world.call_at(world.now + pause, partial(self._pull, everything=True))
        if self._has_news:
            self._pull(everything=False)

    def start(self) -> None:
        """Subscribe, and pull from then on."""
        if self._running:
            return
        self._running = True

        def subscribed() -> float:
            world = self._server.world
            world.call_at(world.now + NETWORK_SECONDS, partial(self._pull, everything=True))
            return 0.0

        self._redis.send("connect", 2 * CONNECT, subscribed)  # one connection for commands, one for messages

    @property
    def has_changes(self) -> bool:
        """Whether `poll` would return something."""
        return bool(self._changed)

    def poll(self) -> Collection[str]:
        """Return what changed; asks nobody."""
        changed, self._changed = self._changed, set()
        return changed


class CountedRunner(SimulatedRunner):
    """A runner that leaves out polls that have nothing to do, which are most of them.

    Attributes:
        is_idle: Returns whether a poll has nothing to do.
    """

    is_idle: Callable[[], bool]

    def _next_poll(self) -> None:
        if self.is_idle():
            self.world.call_at(self.world.now + (self.poll_seconds or 0.0), self._next_poll)
        else:
            super()._next_poll()


# -- the fleet --------------------------------------------------------------------------------------------------------


class FleetMember(Process):
    """One process: the real cache, fallback and heartbeat."""

    def __init__(self, fleet: Fleet, number: int) -> None:
        super().__init__()
        world = fleet.world
        clock = SimulatedClock(world, 10.0 * number, 0.0)
        learned = partial(fleet.learned, number)
        self.handle = CountedHandle(fleet.server, self, clock, f"m{number}.", learned, fleet.bound_seconds)
        draw = world.choices.unit
        store = Fallback(self.handle, clock=clock, random=draw)
        self.cache = Cache(
            tenants=[TENANT],
            store=store,
            source=fleet.read,
            windows=WINDOWS,
            timeout_seconds=TIMEOUT_SECONDS,
            clock=clock,
            random=draw,
            background=fleet.background,
            waits_after_failure=False,
            max_waiters=3,
            runner=lambda poll, poll_seconds: CountedRunner(world, self, clock, poll, poll_seconds),
        )
        assert isinstance(self.cache.runner, CountedRunner)
        self.cache.runner.is_idle = lambda: store.health().ok and not (self.handle.has_changes or store._known.owed)
        self.heartbeat = Heartbeat(cache=self.cache, store=store, clock=clock, random=draw, name=lambda: f"m{number}")


class Fleet:
    """Members over one Redis and one tenant.

    Args:
        size: How many members.
        seed: Seeds every random choice.
        bound_seconds: The setting `store_bound_seconds`.
        background: Whether members read without an evaluation: the setting `refresh`.

    Attributes:
        reads: How many reads of the config API began.
        most_at_once: The most of them that were under way at once.
        first_seen: When each member first learned the present value, since the value last changed.
    """

    def __init__(
        self, size: int, *, seed: int = 20_261_124, bound_seconds: float = BOUND_SECONDS, background: bool = True
    ) -> None:
        self.bound_seconds = bound_seconds
        self.background = background
        self.world = Crowd(seed)
        self.server = CountingServer(self.world, "fleet")
        self.value = True
        self.reads = 0
        self.at_once = 0
        self.most_at_once = 0
        self.first_seen: dict[int, float] = {}
        self.members = [FleetMember(self, number) for number in range(size)]

    def read(self, tenant: str, etag: str | None) -> Reading:
        """Answer a read of the config API."""
        self.reads += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.world.sleep(READ_SECONDS)
        self.at_once -= 1
        return Reading(Document(self.value, None), etag)

    def learned(self, number: int, entry: Entry) -> None:
        """Note that a member learned an entry."""
        if entry.snapshot is not None and entry.snapshot.enabled is self.value:
            self.first_seen.setdefault(number, self.world.now)

    def start(self, *, over_seconds: float) -> None:
        """Start the members within so many seconds, and let each evaluate once."""
        for member in self.members:
            when = self.world.now + over_seconds * self.world.choices.unit()
            self.world.call_at(when, partial(self.world.spawn, member, partial(self._begin, member), "start"))

    def _begin(self, member: FleetMember) -> None:
        member.heartbeat.start()
        member.cache.start()
        member.cache.lookup(TENANT)

    def measure(self, seconds: float) -> Costs:
        """Let so many seconds pass, and return what they cost."""
        counts, work, reads = self.server.counts.copy(), self.server.work, self.reads
        self.world.run(seconds)
        spent = self.server.counts - counts
        return Costs(len(self.members), seconds, self.reads - reads, spent, self.server.work - work)


@dataclass(frozen=True)
class Costs:
    """What some seconds cost.

    Attributes:
        members: How many members there are.
        seconds: How many seconds.
        reads: How many reads of the config API began.
        counts: Commands of all members by kind, messages, conflicts and timeouts.
        work: Processor time of Redis in seconds.
    """

    members: int
    seconds: float
    reads: int
    counts: Counter[str]
    work: float

    @property
    def commands(self) -> int:
        """Commands of all members."""
        return sum(self.counts[kind] for kind in ("connect", "ping", "pull", "read", "set", "report"))

    @property
    def messages(self) -> int:
        """Messages to all members."""
        return self.counts["message"]

    @property
    def lifetimes(self) -> float:
        """The seconds as freshness lifetimes."""
        return self.seconds / TTL_SECONDS

    def __sub__(self, other: Costs) -> Costs:
        """Return what it cost more than the other, over the same time."""
        part = self.seconds / other.seconds
        counts = Counter({kind: round(self.counts[kind] - other.counts[kind] * part) for kind in self.counts})
        return Costs(
            self.members, self.seconds, round(self.reads - other.reads * part), counts, self.work - other.work * part
        )


def steady(size: int) -> tuple[Fleet, Costs]:
    """Return a fleet in a steady state, and what some lifetimes of it cost."""
    fleet = Fleet(size)
    fleet.start(over_seconds=TTL_SECONDS)
    fleet.world.run(2 * TTL_SECONDS)
    return fleet, fleet.measure(TTL_SECONDS * (20 if size <= max(SMALL) else 3))


@dataclass(frozen=True)
class Delivered:
    """A delivery, and its times in seconds since it arrived.

    Attributes:
        costs: What it cost beyond the steady state, with the reads that follow until the value has settled.
        answered: When it was answered.
        half: When half of the members served the new value.
        last: When the last one did.
    """

    costs: Costs
    answered: float
    half: float
    last: float


def delivery(fleet: Fleet, usual: Costs) -> Delivered:
    """Change the value, deliver that to one member, and return what follows."""
    world, member = fleet.world, fleet.members[0]
    fleet.value = not fleet.value
    fleet.first_seen.clear()
    began, answered = world.now, Future[float]()

    def deliver() -> None:
        result, shared = member.cache.invalidate(TENANT, Invalidation(None, "msg_1"))
        assert shared
        assert member.cache.wait_for_generation(TENANT, result.generation) is not None
        answered.set_result(world.now - began)

    world.spawn(member, deliver, "delivery")
    costs = fleet.measure(SETTLED_SECONDS) - usual
    times = sorted(when - began for when in fleet.first_seen.values())
    assert len(times) == len(fleet.members)
    return Delivered(costs, answered.result(0), times[len(times) // 2], times[-1])


@dataclass(frozen=True)
class Started:
    """All members began, and nothing was stored.

    Attributes:
        costs: What it cost until five seconds after the last start.
        last: When the last member had a value, in seconds.
    """

    costs: Costs
    last: float


def cold_start(size: int, *, over_seconds: float = 0.0) -> Started:
    """Start all members over an empty Redis within so many seconds."""
    fleet = Fleet(size)
    began = fleet.world.now
    fleet.start(over_seconds=over_seconds)
    costs = fleet.measure(over_seconds + 5.0)
    assert len(fleet.first_seen) == size
    return Started(costs, max(fleet.first_seen.values()) - began)


# -- the tables -------------------------------------------------------------------------------------------------------


def _table(name: str, head: str, rows: Sequence[str]) -> str:
    rule = "|" + " ---: |" * head.count("|")
    return "\n".join([f"<!-- {name} -->", "", f"| {head} |", rule + " ---: |", *(f"| {row} |" for row in rows)])


def _per(count: float, size: float) -> str:
    return f"{count / size:.1f}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"


def tables(sizes: Sequence[int] = SIZES) -> Iterator[str]:
    """Yield the tables as Markdown, for fleets of these sizes."""
    rows: dict[str, list[str]] = {"steady": [], "delivery": [], "cold start": []}
    for size in sizes:
        fleet, costs = steady(size)
        each = size * costs.lifetimes
        rows["steady"].append(
            f"{size:,} | {costs.reads / costs.lifetimes:.2f} | {_per(costs.commands, each)} | "
            f"{_per(costs.messages, each)} | {costs.commands / costs.seconds:,.1f} | {costs.work / costs.seconds:.2%}"
        )
        told = delivery(fleet, costs)
        rows["delivery"].append(
            f"{size:,} | {told.costs.reads} | {_per(told.costs.commands, size)} | {_per(told.costs.messages, size)} | "
            f"{_milliseconds(told.answered)} | {_milliseconds(told.half)} | {_milliseconds(told.last)}"
        )
        over_seconds = 0.0 if size <= MOST_AT_ONCE else ROLLOUT_SECONDS
        started = cold_start(size, over_seconds=over_seconds)
        rows["cold start"].append(
            f"{size:,} | {over_seconds:.0f} s | {started.costs.reads} | {_per(started.costs.commands, size)} | "
            f"{_per(started.costs.messages, size)} | {started.costs.counts['timeout']:,} | "
            f"{_milliseconds(started.last)}"
        )
    yield _table(
        "steady",
        "members | reads per lifetime | commands per member and lifetime | messages per member and lifetime | "
        "commands/s | Redis at work",
        rows["steady"],
    )
    yield _table(
        "delivery",
        "members | reads | commands per member | messages per member | answered | half serve it | all serve it",
        rows["delivery"],
    )
    yield _table(
        "cold start",
        "members | start within | reads | commands per member | messages per member | commands without an answer | "
        "all serve it",
        rows["cold start"],
    )


def share(members: int, tenants: int, bound_seconds: float) -> float:
    """Return the part of its time for which Redis works in a steady state: arithmetic over the measured costs."""
    pulls = 1 / (bound_seconds * (PULL[0] + PULL[1]) / 2)
    beats = 1 / (MAX_INTERVAL_SECONDS * 0.9)
    changes = 2 * tenants / TTL_SECONDS  # a lease and a value per lifetime
    more = tenants - 1
    each = pulls * (PULL_ONE + PING + more * PULL_MORE) + beats * (REPORT + more * REPORT_MORE)
    return members * (each + changes * (PUSH + PULL_ONE)) + changes * (READ + SET)


def most_members(tenants: int, bound_seconds: float) -> int:
    """Return how many members one Redis carries, to two digits.

    Redis is then at work for half of its time, or for `CHANGE_SECONDS` with one change, whichever comes first.
    """
    alone = share(0, tenants, bound_seconds)
    most = max(0.0, 0.5 - alone) / (share(1, tenants, bound_seconds) - alone)
    most = min(most, CHANGE_SECONDS / (PUSH + PULL_ONE))
    digits = len(str(int(most))) - 2
    return int(most / 10**digits) * 10**digits if digits > 0 else int(most)


def ends() -> str:
    """Return the table of where one Redis ends."""
    return _table(
        "ends",
        "tenants | members, `store_bound_seconds` 5 | members, `store_bound_seconds` 30",
        [f"{count:,} | {most_members(count, 5.0):,} | {most_members(count, 30.0):,}" for count in (1, 10, 100, 1_000)],
    )


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.costs", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="how many members")
    logging.disable(logging.CRITICAL)
    gc.disable()  # a full collection of 10,000 members takes seconds
    for table in (*tables(parser.parse_args().sizes), ends()):
        print(f"{table}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
