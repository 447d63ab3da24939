"""The store protocol: one entry per tenant, changed by transitions, shared by every process that uses the store.

A store guarantees three things:

1. **Transitions are atomic.** `transact` runs a pure transition over the present entry and stores its result, its
   events and its claimed delivery ids in one step; no other process sees or changes anything in between. When
   `transact` returns, the change survives the death of any process.
2. **The version follows the entry.** Every change of an entry changes the version word to which `version_ref` points,
   *after* the change can be loaded. Reading the word takes no lock, no system call and no I/O. A reader remembers the
   word that it saw *before* it loaded the entry; so a change never goes unseen.
3. **Loading is local.** `load` never touches a socket and never waits for another process.

Where a store cannot do what it is asked, it raises `StoreError`; `fallback` decides what follows.

Instants in entries are seconds on the clock of this process. A store that spans hosts, or outlives a boot, converts
them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from external_oms.entry import Entry, Transition
from external_oms.records import Event, Member

__all__ = ["DELIVERY_ID_SECONDS", "Health", "Store"]

DELIVERY_ID_SECONDS = 3600.0
"""How long a store remembers a delivery id, in seconds. A signed delivery can be replayed for twice the tolerance of
five minutes; senders repeat for longer, and a repetition after an hour costs one read."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a store works as configured.

    Attributes:
        ok: Whether it does.
        problem: In one sentence what is wrong and what to do; empty where nothing is.
    """

    ok: bool = True
    problem: str = ""


class Store(Protocol):
    """Where the entries live. Every method may be called from any thread and, after a fork, from the child.

    A tenant that the store does not know has the empty entry `Entry()`.
    """

    kind: str
    """`memory`, `sqlite` or `redis`."""

    poll_seconds: float | None
    """How often `poll` wants to be called, in seconds; None where no other process can change anything."""

    spread_seconds: float
    """Over how many seconds the members spread their reaction to what all of them learn at once; 0 where they are
    few."""

    @property
    def holder(self) -> str:
        """The name of this process for leases and snapshots: unique among all processes that ever use the store."""
        ...

    def is_gone(self, holder: str) -> bool:
        """Return whether the process of that name is known to have ended; False where that cannot be told."""
        ...

    def version_ref(self, tenant: str) -> tuple[Sequence[int], int]:
        """Return where the version word of a tenant stands: a sequence, and the index in it.

        The place may change, as when a file is replaced. The word at the old place changes then for the last time, so
        a reader that sees any change asks for the place again.
        """
        ...

    def load(self, tenant: str) -> Entry:
        """Return the entry as this process sees it, without waiting.

        Raises:
            StoreError: It cannot be read.
        """
        ...

    def transact(self, tenant: str, transition: Transition[T], *, delivery_ids: Sequence[str] = ()) -> T:
        """Apply a transition atomically and return its result; may wait for the store, for a bounded time.

        Args:
            tenant: The tenant.
            transition: A pure function; it may be called more than once, and its last result is stored.
            delivery_ids: The ids of which the transition wants to know whether the store holds them.

        Raises:
            StoreError: Nothing was stored, as far as can be told; an unanswered write may have been stored.
            Exception: Whatever the transition raises; nothing was stored then.
        """
        ...

    def touch(self, tenant: str) -> None:
        """Change the version word, so that every reader loads the entry again."""
        ...

    def poll(self) -> Collection[str]:
        """Return the tenants whose entry another process changed since the last call; also does maintenance.

        Raises:
            StoreError: The store cannot be used.
        """
        ...

    def attach(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, from any thread, when `poll` has something before its time."""
        ...

    def append(self, event: Event) -> None:
        """Add a history row that belongs to no transition.

        Raises:
            StoreError: It could not be added.
        """
        ...

    def history(self, *, tenant: str | None = None, limit: int = 100, before: int | None = None) -> Sequence[Event]:
        """Return rows of history, newest first.

        Args:
            tenant: Only rows of this tenant; None: of every tenant that the store was made for.
            limit: The most rows, >= 1.
            before: Only rows with a lower id than this.

        Raises:
            StoreError: The rows cannot be read.
        """
        ...

    def report(self, members: Sequence[Member]) -> None:
        """Store the heartbeats of this process, which are listed for `MEMBER_SECONDS`.

        Raises:
            StoreError: They could not be stored.
        """
        ...

    def members(self, tenant: str | None = None) -> Sequence[Member]:
        """Return the heartbeats of all processes.

        Raises:
            StoreError: They cannot be read.
        """
        ...

    def health(self) -> Health:
        """Return whether the store works as configured; never waits."""
        ...

    def start(self) -> None:
        """Start the threads of the store, if it has any; idempotent and cheap."""
        ...

    def after_fork(self) -> None:
        """Forget the sockets, locks and threads of the parent; called in a forked child before anything else."""
        ...

    def close(self) -> None:
        """End threads and handles within a second; idempotent. A later use begins anew."""
        ...
