"""What one process has at hand of each tenant: the record, the word that stood before it, and what was noticed of it.

The record is one reference, replaced whole, and the word remembered beside it was seen *before* it was loaded, so
whoever races finds a word that differs and loads again. Changes are told in their order, with no lock held.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from external_oms.clock import Clock
from external_oms.freshness import Freshness, Windows
from external_oms.judgement import Answer, judge, parting_seconds
from external_oms.signals import Signal
from external_oms.stores.base import Record, Store

__all__ = ["Change", "ChangeKind", "Seats", "Warrant"]

_WORTH = (Freshness.FRESH, Freshness.STALE, Freshness.EXPIRED)

Warrant = tuple[float, Sequence[int], int, int | None]
"""Until when, and while which word stands where, an answer may be given again without asking."""


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
    """One tenant's; the lock guards only which record is at hand and what was noticed."""

    __slots__ = ("lock", "noticed", "seen")

    def __init__(self) -> None:
        self.seen = _Seen(0, (0,), 0, None, Record())
        self.noticed: Answer | None = None
        self.lock = threading.Lock()


class Seats:
    """What is at hand of some tenants.

    Args:
        tenants: Their names.
        store: Where records live.
        windows: How long a value lives.
        clock: What tells the time.

    Attributes:
        changes: Told whenever something changed, in this process or another.
    """

    def __init__(self, tenants: Iterable[str], *, store: Store, windows: Windows, clock: Clock) -> None:
        self.changes: Signal[Change] = Signal()
        self._store = store
        self._windows = windows
        self._clock = clock
        self._tickets = itertools.count(1)
        self._seats = {tenant: _Seat() for tenant in tenants}

    def judge(self, tenant: str, *, failing: bool = False) -> Answer:
        """What may be said of a tenant now; whoever listens is told where that is news.

        Args:
            tenant: The tenant.
            failing: Whether to take reads for failing though the record does not say so: the caller waited in vain.
        """
        seat = self._seats[tenant]
        record = self._look(tenant, seat).record
        answer = judge(tenant, record, now=self._clock.monotonic(), windows=self._windows, failing=failing)
        noticed = seat.noticed
        if not failing and (
            noticed is None or noticed.record is not record or noticed.freshness is not answer.freshness
        ):
            self._notice(seat, answer)
        return answer

    def parting_seconds(self, record: Record, random: float) -> float:
        """How much longer a read that is due waits because its store is away; 0 where it is there."""
        return 0.0 if self._store.health().ok else parting_seconds(record, random=random, windows=self._windows)

    def warrant(self, answer: Answer) -> Warrant:
        """What a fresh answer may be given again by."""
        seen = self._seats[answer.tenant].seen
        # where the record has moved on, the answer gets a word that never stands: it is given once
        return answer.fresh_until, seen.words, seen.slot, seen.word if seen.record is answer.record else None

    def _look(self, tenant: str, seat: _Seat) -> _Seen:
        """The record as it stands: the one at hand, or loaded where its word no longer stands."""
        seen = seat.seen
        if seen.words[seen.slot] == seen.word:
            return seen
        ticket = next(self._tickets)
        words, slot = self._store.watch(tenant)
        word = words[slot]
        record = self._store.load(tenant)
        with seat.lock:
            if ticket > seat.seen.ticket:
                seat.seen = _Seen(ticket, words, slot, word, record)
            return seat.seen

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
            self.changes.line_up(Change(answer.tenant, ChangeKind.VALUE if changed else ChangeKind.STATE, answer))
        self.changes.tell_all()

    def after_fork(self) -> None:
        """In a forked child: locks that nobody holds; the warm values stay."""
        self.changes.after_fork()
        for seat in self._seats.values():
            seat.lock = threading.Lock()


def _worth(answer: Answer) -> int:
    return _WORTH.index(answer.freshness)
