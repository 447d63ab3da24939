"""The simulated shared store: a server that may fail, lose data and answer late, and the handles of its processes.

Two kinds: `file` stands for one host, where version words are in shared memory and entries are loaded from the file;
`fleet` stands for several hosts, where each process has a replica that messages and polls keep up to date.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import TypeVar

from external_oms.codec import decode_entry, encode_entry
from external_oms.entry import Entry, Moment, Transition, shift
from external_oms.errors import StoreBusy, StoreError
from external_oms.records import Event, Member
from external_oms.stores.base import Health
from tests.simulation.world import Process, SimulatedClock, World

T = TypeVar("T")

_decode = lru_cache(maxsize=4096)(decode_entry)
"""Each text is decoded once: an entry is a value."""

LATENCY_SECONDS = 0.002
"""The longest that a command takes without a fault."""


@dataclass
class Row:
    """What the server holds of a tenant."""

    version: int = 0
    text: str = ""
    ids: frozenset[str] = frozenset()


@dataclass
class Server:
    """The shared state, and its faults.

    Attributes:
        kind: `file` or `fleet`.
        rows: The rows by tenant.
        words: The version words that processes of one host share.
        down: Whether every command fails.
        busy: Whether others keep the store for themselves.
        slow: Whether commands take up to half a second.
        deaf: Whether messages are lost.
        healing: Whether no further fault begins.
        losses: How often data was lost.
        commands: How many commands were served.
        messages: How many messages were delivered.
    """

    world: World
    kind: str
    rows: dict[str, Row] = field(default_factory=dict)
    words: dict[str, list[int]] = field(default_factory=dict)
    past: list[dict[str, Row]] = field(default_factory=list)
    down: bool = False
    busy: bool = False
    slow: bool = False
    deaf: bool = False
    healing: bool = False
    losses: int = 0
    commands: int = 0
    messages: int = 0
    handles: list[Handle] = field(default_factory=list)
    on_fault: Callable[[], None] = lambda: None
    on_commit: Callable[[str, Entry, Entry], None] = lambda tenant, before, after: None

    def __deepcopy__(self, memo: dict[int, object]) -> Server:
        return self

    def time(self) -> float:
        """The server's own clock."""
        return self.world.now + 5_000_000.0

    def row(self, tenant: str) -> Row:
        """Return the row of a tenant."""
        return self.rows.setdefault(tenant, Row())

    def word(self, tenant: str) -> list[int]:
        """Return the version word of a tenant, in a list of its own."""
        return self.words.setdefault(tenant, [0])

    def entry(self, tenant: str) -> Entry:
        """Return the entry of a tenant, in the server's time."""
        text = self.row(tenant).text
        return _decode(text) if text else Entry()

    def remember(self) -> None:
        """Keep the present state, for `rewind`."""
        self.past.append({tenant: replace(row) for tenant, row in self.rows.items()})

    def flush(self) -> None:
        """Lose everything."""
        self._lose({})

    def rewind(self) -> None:
        """Go back to an earlier state."""
        if self.past:
            self._lose(self.world.choices.pick(self.past))

    def _lose(self, rows: dict[str, Row]) -> None:
        self.losses += 1
        self.rows = {tenant: replace(row) for tenant, row in rows.items()}
        if self.kind == "file":  # another file is in its place: every word changes
            for tenant in set(self.words) | set(self.rows):
                self.word(tenant)[0] += 1_000_000

    def publish(self, tenant: str, sender: Handle) -> None:
        """Tell the other processes of a fleet that a tenant changed."""
        for handle in self.handles:
            if handle is not sender and handle._owner.alive and not self.deaf and not handle.cut_off:
                self.messages += 1
                delay = LATENCY_SECONDS * (1 + self.world.choices.below(4))
                self.world.call_at(self.world.now + delay, partial(handle.hear, tenant))


class Handle:
    """The store of one process over the server: implements the store protocol.

    Args:
        server: The server.
        owner: The process.
        clock: Its clock.
        name: Its name for leases.
        poll_seconds: How often it polls.
    """

    spread_seconds = 0.0

    def __init__(self, server: Server, owner: Process, clock: SimulatedClock, name: str, poll_seconds: float) -> None:
        self.kind = "sqlite" if server.kind == "file" else "redis"
        self.poll_seconds: float | None = poll_seconds
        if server.kind == "fleet":
            self.spread_seconds = 0.5
        self._server = server
        self._owner = owner
        self._clock = clock
        self._name = name
        self.cut_off = False
        self._replica: dict[str, tuple[int, Entry]] = {}
        self._words: dict[str, list[int]] = {}
        self._dirty: set[str] = set()
        self._polled: dict[str, int] = {}
        self._wake: Callable[[], None] = lambda: None
        self._verified = True
        self._running = False
        server.handles.append(self)

    # -- the seam to the server -------------------------------------------------------------------------------------

    def _command(self, *, writes: bool = True) -> None:
        """Travel to the server: time passes, and the server may not answer, or be busy with the writes of others."""
        server, world = self._server, self._server.world
        server.commands += 1
        if server.kind == "fleet" or server.slow:
            longest = 0.5 if server.slow else LATENCY_SECONDS
            world.sleep(longest * world.choices.unit())
        else:
            world.pause()
        if server.down or self.cut_off:
            raise StoreError("the simulated store does not answer")
        if server.busy and writes:
            raise StoreBusy("the simulated store is busy")

    def _delta(self, at: float, answered: float | None = None) -> float:
        """Return what is added to an instant of the server to get one of this host.

        Args:
            at: When the process read its own clock: before it asked, so that a value that it loads is older rather
                than younger, or when it had the answer, so that what it stores is.
            answered: When the server read its clock; None for now.
        """
        if self._server.kind == "file":
            return self._clock.offset - 5_000_000.0
        late = 0.0 if answered is None else self._server.world.now - answered
        return at + self._clock.offset - (self._server.time() - late)

    @property
    def holder(self) -> str:
        """The name of this process."""
        return self._name

    def is_gone(self, holder: str) -> bool:
        """Return whether the process of that name has ended, where one host can tell."""
        if self._server.kind == "fleet":
            return False
        owners = {handle._name: handle._owner for handle in self._server.handles}
        return holder in owners and not owners[holder].alive

    def version_ref(self, tenant: str) -> tuple[Sequence[int], int]:
        """Return the place of the version word."""
        if self._server.kind == "file":
            if self._server.down and tenant not in self._server.words:
                raise StoreError("the simulated file cannot be opened")
            return self._server.word(tenant), 0
        return self._words.setdefault(tenant, [0]), 0

    def load(self, tenant: str) -> Entry:
        """Return the entry, from the file or from the replica."""
        world = self._server.world
        if self._server.kind == "fleet":
            if not self._verified:
                world.sleep(0.1)
            _, entry = self._replica.get(tenant, (0, Entry()))
            return entry if self._verified else replace(entry, verified=False)
        world.pause()
        if self._server.down or self.cut_off:
            raise StoreError("the simulated file cannot be read")
        if self._server.busy and world.choices.chance(20):
            raise StoreBusy("the simulated file is busy")
        entry = shift(self._server.entry(tenant), self._delta(0.0))
        world.pause()
        return entry

    def transact(self, tenant: str, transition: Transition[T], *, delivery_ids: Sequence[str] = ()) -> T:
        """Run a transition: atomically for a file, by compare-and-set for a fleet."""
        server = self._server
        for _ in range(50):
            sent = server.world.now
            self._command()
            row = server.row(tenant)
            version, ids = row.version, row.ids
            stored, answered = server.entry(tenant), server.world.now
            early = self._delta(sent)
            floor = int(server.time() * 1000) if server.kind == "fleet" else 0
            if server.kind == "fleet":
                server.world.sleep(LATENCY_SECONDS * server.world.choices.unit())  # the answer travels back
                self._adopt(tenant, version, shift(stored, early))
            late = self._delta(server.world.now, answered)
            entry = shift(stored, late)
            seen = frozenset(one for one in delivery_ids if one in ids)
            change = transition(entry, Moment(self._clock.monotonic(), floor, seen))
            if change.entry is entry and not change.claims:
                return change.result
            if server.kind == "fleet":
                self._command()
                row = server.row(tenant)
                if row.version != version:
                    continue
            row.version = max(row.version + 1, int(server.time() * 1e6) if server.kind == "fleet" else 0)
            row.text = encode_entry(shift(change.entry, -late))
            row.ids = ids | frozenset(change.claims)
            server.on_commit(tenant, stored, server.entry(tenant))
            if server.kind == "file":
                server.world.pause()  # a process that is killed here has committed, and published nothing
                server.word(tenant)[0] = max(server.word(tenant)[0] + 1, row.version)
            else:
                self._adopt(tenant, row.version, shift(change.entry, early - late))
                server.publish(tenant, self)
                if not server.healing and server.world.choices.chance(4):
                    server.on_fault()
                    raise StoreError("the answer of the simulated store was lost")
            return change.result
        raise StoreBusy("the simulated store: too many conflicts")

    def _adopt(self, tenant: str, version: int, entry: Entry, *, again: bool = False) -> None:
        known, _ = self._replica.get(tenant, (-1, Entry()))
        if version > known or again:
            self._replica[tenant] = version, entry
            self._words.setdefault(tenant, [0])[0] += 1

    def touch(self, tenant: str) -> None:
        """Change the version word."""
        words, index = self.version_ref(tenant)
        words[index] += 1  # type: ignore[index]  # ours are lists

    # -- following ----------------------------------------------------------------------------------------------------

    def hear(self, tenant: str) -> None:
        """Take a message."""
        if self._owner.alive and self._running:
            self._dirty.add(tenant)
            self._wake()

    def poll(self) -> Collection[str]:
        """Return what changed; a fleet's process pulls every tenant that it knows."""
        server = self._server
        sent = server.world.now
        self._command(writes=False)
        changed = []
        if server.kind == "file":
            for tenant, row in sorted(server.rows.items()):
                if self._polled.get(tenant) != row.version:
                    self._polled[tenant] = row.version
                    # perhaps its writer died before it published
                    server.word(tenant)[0] = max(server.word(tenant)[0], row.version)
                    changed.append(tenant)
            return changed
        self._dirty.clear()
        pulled = [
            (tenant, server.row(tenant).version, shift(server.entry(tenant), self._delta(sent)))
            for tenant in sorted(set(self._replica) | set(server.rows))
        ]
        for tenant, version, entry in pulled:
            if self._replica.get(tenant, (-1, None))[0] != version:
                changed.append(tenant)
                self._adopt(tenant, version, entry, again=True)
        if not self._verified:
            self._verified = True
            for tenant in sorted(self._replica):
                self._words.setdefault(tenant, [0])[0] += 1
                changed.append(tenant)
        return changed

    def attach(self, wake: Callable[[], None]) -> None:
        """Have `wake` called when a message arrives."""
        self._wake = wake

    def append(self, event: Event) -> None:
        """Forget the row: histories are not simulated."""
        self._command()

    def history(self, *, tenant: str | None = None, limit: int = 100, before: int | None = None) -> Sequence[Event]:
        """Return nothing."""
        return ()

    def report(self, members: Sequence[Member]) -> None:
        """Forget the reports."""

    def members(self, tenant: str | None = None) -> Sequence[Member]:
        """Return nobody."""
        return ()

    def health(self) -> Health:
        """Return that it works: the fallback knows better."""
        return Health()

    def start(self) -> None:
        """Follow the messages from now on."""
        self._running = True

    def fork(self, owner: Process, name: str) -> None:
        """Become the handle of a forked child; called on the copy of the parent's."""
        self._owner = owner
        self._name = name
        self._server.handles.append(self)

    def after_fork(self) -> None:
        """Follow nothing, and verify nothing, until the first poll."""
        self._running = False
        self._dirty = set()
        self._verified = self._server.kind == "file"

    def close(self) -> None:
        """Follow nothing any more."""
        self._running = False
