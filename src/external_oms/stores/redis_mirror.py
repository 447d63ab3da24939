"""The copy of Redis that a process answers from: reading it takes no socket; what comes in can only move it forward.

The mirror is a `MemoryStore` that is kept in step. While Redis answers, scripts decide and the mirror follows what
they say; while it does not, the mirror decides alone, as the store of one process, and remembers what it owes:
invalidations that the others have not heard of, and snapshots that may be newer than what Redis holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from external_oms.clock import Clock
from external_oms.config import Failure, Snapshot
from external_oms.stores.base import Lease, Record
from external_oms.stores.memory import MemoryStore
from external_oms.stores.redis_wire import Remote, Stamp

__all__ = ["Debt", "Mirror", "Verdict", "supersedes"]

ROWS_AT_HAND = 1000
"""Own rows of history kept in the process, to be shown while Redis is away."""


class Verdict(StrEnum):
    """What a state of the record, seen in Redis, is to the mirror."""

    ADOPTED = "adopted"
    """It is newer; the mirror has it now."""
    SAME = "same"
    """It is what the mirror has, or older and merely late."""
    LOST = "lost"
    """Redis has lost writes: its record must be raised above what this process knows."""
    ASK = "ask"
    """It cannot be told without asking Redis again."""


@dataclass(frozen=True, slots=True)
class Debt:
    """What this process knows and owes at the moment at which it asks Redis.

    Attributes:
        stamp: The state of the record that it knows; the generation is its own, owed invalidations included.
        reads: The highest lease number that it knows.
        owes: Whether it invalidated while Redis was away.
        offer: The snapshot that Redis may not have, where there is one.
    """

    stamp: Stamp
    reads: int
    owes: bool
    offer: Snapshot | None


@dataclass(slots=True)
class _Tie:
    """How a tenant's cell is tied to its record in Redis; changed only under the store's lock."""

    epoch: str = ""
    revision: int = 0
    owes: bool = False
    offers: bool = False


def supersedes(ours: Snapshot, theirs: Snapshot | None) -> bool:
    """Whether our snapshot is the newer one, so that theirs must not take its place.

    A snapshot of an older generation never is. Where both say when the value was changed upstream, that decides;
    else, and between equals, the later read.
    """
    if theirs is None:
        return True
    if ours.generation < theirs.generation:
        return False
    if ours.updated_at is not None and theirs.updated_at is not None and ours.updated_at != theirs.updated_at:
        return ours.updated_at > theirs.updated_at
    return ours.read_at > theirs.read_at


class Mirror(MemoryStore):
    """The records as this process knows them.

    Args:
        tenants: Their names.
        bound_seconds: How long after a look at Redis the mirror counts as verified.
        clock: What tells the time.
        history_seconds: How long rows of history and delivery ids are kept.
    """

    def __init__(self, tenants: Sequence[str], *, bound_seconds: float, clock: Clock, history_seconds: float) -> None:
        super().__init__(
            clock=clock,
            history_rows=ROWS_AT_HAND,
            history_seconds=history_seconds,
            records=[(tenant, Record()) for tenant in tenants],
        )
        self._bound_seconds = bound_seconds
        self._ties: dict[int, _Tie] = {}
        self._alone: set[tuple[str, int]] = set()
        self._told: set[str] = set()
        self._wakes: list[Callable[[], None]] = []
        self._inherited = False
        self.verified_until = float("-inf")

    # -- knowing --------------------------------------------------------------------------------------------------

    @property
    def tenants(self) -> tuple[str, ...]:
        """Every tenant that was ever asked for."""
        with self._lock:
            return tuple(self._cells)

    def _tie(self, slot: int) -> _Tie:
        tie = self._ties.get(slot)
        if tie is None:
            tie = self._ties[slot] = _Tie()
        return tie

    def knows(self, tenant: str) -> bool:
        """Whether this tenant was ever asked for."""
        return tenant in self._cells

    def debt(self, tenant: str, *, offering: bool = False) -> Debt:
        """What is known and owed of a tenant now; with `offering`, its snapshot is offered whether owed or not."""
        with self._lock:
            cell = self._cell(tenant)
            tie, record = self._tie(cell.slot), cell.record
            return Debt(
                stamp=Stamp(tie.epoch, record.generation, tie.revision),
                reads=record.reads,
                owes=tie.owes,
                offer=record.snapshot if tie.offers or offering else None,
            )

    def record(self, tenant: str) -> Record:
        """The record as it stands, also where it is not verified."""
        return super().load(tenant)

    def load(self, tenant: str) -> Record:
        """The record for an evaluation: as it stands, but nothing in it is fresh that a fork left unverified.

        The mirror of a child that was idle for longer than the bound may have missed an invalidation. Until its first
        look at Redis has ended, the record reads as if one had come just now: the warm value is served as stale.
        """
        record = super().load(tenant)
        now = self._clock.monotonic()
        if not self._inherited or record.snapshot is None or now < self.verified_until:
            return record
        older = replace(record.snapshot, generation=min(record.snapshot.generation, record.generation - 1))
        return replace(record, snapshot=older, invalidated_at=now)

    def verify(self) -> None:
        """A look at Redis has ended and everything that differed was adopted."""
        self.verified_until = self._clock.monotonic() + self._bound_seconds
        self.trust()

    def trust(self) -> None:
        """A child's first look at Redis has ended, well or not: from now on it judges by its own knowledge."""
        with self._lock:
            if self._inherited:
                self._inherited = False
                self._change_all()

    def _change_all(self) -> None:
        for cell in self._cells.values():
            self._change(cell, cell.record)

    # -- following ------------------------------------------------------------------------------------------------

    def settle(
        self, tenant: str, remote: Remote, asked: Debt | None, *, own: Snapshot | Failure | None = None
    ) -> Verdict:
        """Judge a state of the record seen in Redis, and move forward to it where it is newer.

        Args:
            tenant: The tenant.
            remote: The state.
            asked: What was known when Redis was asked for it; None for a message, which may be late.
            own: What this process has just stored: it is exact, what came back went through two clocks.
        """
        with self._lock:
            cell = self._cell(tenant)
            tie = self._tie(cell.slot)
            known = Stamp(tie.epoch, cell.record.generation, tie.revision)
            verdict = _verdict(remote.stamp, known, asked.stamp if asked else None)
            refused = (
                verdict is Verdict.SAME
                and asked is not None
                and asked.offer is not None
                and asked.offer is cell.record.snapshot
                and remote.stamp == known
            )
            # an answer to our own change, made to what we knew, brings nothing that others did
            ours_alone = asked is not None and remote.was == tie.revision
            news = verdict is Verdict.ADOPTED and not ours_alone
            if verdict is Verdict.ADOPTED or refused:
                _pay(tie, cell.record, asked)
                lost = bool(tie.epoch) and (remote.stamp.epoch != tie.epoch or remote.was < tie.revision)
                tie.epoch, tie.revision = remote.stamp.epoch, remote.stamp.revision
                ours = cell.record.snapshot
                merged = _merged(cell.record, remote.record, own, keep=tie.offers or lost)
                tie.offers = (
                    ours is not None and merged.snapshot is ours and not _is_same_read(ours, remote.record.snapshot)
                )
                self._change(cell, merged)
            elif verdict is Verdict.SAME:
                cell.record = replace(cell.record, reads=max(cell.record.reads, remote.record.reads))
            if news:
                self._told.add(tenant)
        if news:
            for wake in self._wakes:
                wake()
        return verdict

    def changed(self) -> Sequence[str]:
        """The tenants whose record another process changed since the last call."""
        if not self._told:  # the usual case costs no lock; whoever adds one calls `wake` after it
            return ()
        with self._lock:
            told, self._told = tuple(self._told), set()
            return told

    def attach(self, wake: Callable[[], None]) -> None:
        """Have `wake` called when another process has changed a record."""
        self._wakes.append(wake)

    # -- deciding alone -------------------------------------------------------------------------------------------

    def invalidate(self, tenant: str) -> int:
        """Raise the generation alone; Redis is told when it is there."""
        generation = super().invalidate(tenant)
        self._owe(tenant)
        return generation

    def deliver(self, tenant: str, delivery_id: str, *, seconds: float) -> int | None:
        """As `invalidate`, once per delivery id that came while Redis was away."""
        generation = super().deliver(tenant, delivery_id, seconds=seconds)
        if generation is not None:
            self._owe(tenant)
        return generation

    def _owe(self, tenant: str) -> None:
        with self._lock:
            self._tie(self._cell(tenant).slot).owes = True

    def hold(self, lease: Lease) -> None:
        """Remember that this lease was given by this process alone, not by Redis."""
        with self._lock:
            self._alone.add((lease.tenant, lease.number))

    def let_go(self, lease: Lease) -> bool:
        """Whether this lease was given by this process alone; it ends now."""
        with self._lock:
            key = (lease.tenant, lease.number)
            held = key in self._alone
            self._alone.discard(key)
            return held

    def put(self, lease: Lease, snapshot: Snapshot) -> bool:
        """Store alone what a read gave, and offer it to Redis when it is there."""
        stored = super().put(lease, snapshot)
        if stored:
            with self._lock:
                self._tie(self._cell(lease.tenant).slot).offers = True
        return stored

    def after_fork(self) -> None:
        """New locks, no debts but invalidations, and every word changed: whoever remembers a record looks again."""
        super().after_fork()
        self._alone = set()
        self._told = set()
        self._inherited = True
        with self._lock:
            for tie in self._ties.values():
                tie.offers = False  # the parent offers it
            self._change_all()


def _verdict(seen: Stamp, known: Stamp, asked: Stamp | None) -> Verdict:
    """What a state seen is, given the one known now and the one known when Redis was asked."""
    if seen.epoch == known.epoch:
        if seen.revision <= known.revision:
            return Verdict.SAME  # or late; had Redis gone back, the script would have raised it above what was known
        return Verdict.LOST if seen.generation < known.generation else Verdict.ADOPTED
    if not known.epoch:
        return Verdict.LOST if seen.generation < known.generation else Verdict.ADOPTED
    if asked is None or asked.epoch != known.epoch:
        return Verdict.ASK  # of two epochs, only an answer asked for under the known one is surely the later
    return Verdict.LOST if seen.generation <= known.generation else Verdict.ADOPTED


def _pay(tie: _Tie, record: Record, asked: Debt | None) -> None:
    """Strike out what Redis was told with the question that this state answers, unless more has come since."""
    if asked is None:
        return
    if asked.owes and asked.stamp.generation == record.generation:
        tie.owes = False
    if asked.offer is not None and asked.offer is record.snapshot:
        tie.offers = False


def _merged(ours: Record, theirs: Record, own: Snapshot | Failure | None, *, keep: bool) -> Record:
    """The record in Redis, with what is better known here.

    Args:
        ours: The record as this process knew it.
        theirs: The record in Redis.
        own: What this process has just stored there.
        keep: Whether our snapshot is one that Redis may not have.
    """
    merged = replace(theirs, reads=max(ours.reads, theirs.reads))
    if ours.generation == theirs.generation and ours.invalidated_at is not None:
        merged = replace(merged, invalidated_at=ours.invalidated_at)
    if isinstance(own, Snapshot) and not theirs.foreign and _is_same_read(own, theirs.snapshot):
        return replace(merged, snapshot=own)
    if isinstance(own, Failure) and _is_same_failure(own, theirs.failure):
        merged = replace(merged, failure=own)
    elif ours.failure is not None and _is_same_failure(ours.failure, theirs.failure):
        merged = replace(merged, failure=ours.failure)
    if ours.snapshot is None:
        return merged
    if _is_same_read(ours.snapshot, theirs.snapshot):
        return replace(merged, snapshot=ours.snapshot)  # an instant that was converted once is not converted again
    if theirs.snapshot is None or (keep and supersedes(ours.snapshot, theirs.snapshot)):
        return replace(merged, snapshot=ours.snapshot, foreign=ours.foreign)
    return merged


def _is_same_read(ours: Snapshot, theirs: Snapshot | None) -> bool:
    return theirs is not None and replace(theirs, read_at=ours.read_at) == ours


def _is_same_failure(ours: Failure, theirs: Failure | None) -> bool:
    return theirs is not None and ours == replace(theirs, failed_at=ours.failed_at, not_before=ours.not_before)
