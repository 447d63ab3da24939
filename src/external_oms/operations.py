"""Operations on a tenant by people and deliveries: invalidate, refresh, write. Each leaves a history row."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from external_oms.cache import Cache
from external_oms.clock import Clock
from external_oms.config import Document
from external_oms.entry import Invalidated, Invalidation
from external_oms.errors import ReadError, StoreError, WriteError, WriteOutcomeUnknown
from external_oms.policy import State, state_of
from external_oms.records import Cause, Event
from external_oms.signals import Signal
from external_oms.stores.base import Store

__all__ = ["DeliveryResult", "HistoryPage", "Operations", "Writer"]

logger = logging.getLogger("external_oms")

READ_BACK_PAUSES_SECONDS = (0.0, 0.5, 1.0)
"""The pauses before each read after a write: a replica may lag, and an endpoint may allow one read a second."""

UNKNOWN_PAUSES_SECONDS = (*READ_BACK_PAUSES_SECONDS, 2.0)
"""The pauses before each read after a write that was not answered: an API that fails for a moment works again within
seconds."""

READ_BACK_SECONDS = 20.0
"""After how many seconds no further read begins: the caller waits for the answer, behind proxies that wait 30 to 60."""

SCAN_ROWS = 500
"""How many rows of history a filter asks the store for at once."""

MAX_SCANNED_ROWS = 10_000
"""How many rows of history one filtered page looks through at most; the next page goes on from there."""

_READ_BACK = {
    True: "written and read back",
    False: "written; the API still answers the old value",
    None: "written; it could not be read back yet",
}


class Writer(Protocol):
    """Writes a value to the config API."""

    def write(self, enabled: bool) -> Document | None:
        """Write the value; return the value that the API confirms, where it does."""
        ...


@dataclass(frozen=True, slots=True)
class DeliveryResult:
    """The result of a delivery.

    Attributes:
        tenant: The tenant.
        generation: The generation of the tenant now.
        duplicate: Whether the id of the delivery was seen before; then it changed nothing.
        refreshed: Whether a value that was read after the delivery is stored.
        enabled: The last known value.
    """

    tenant: str
    generation: int
    duplicate: bool
    refreshed: bool
    enabled: bool | None


@dataclass(frozen=True, slots=True)
class HistoryPage:
    """A page of history.

    Attributes:
        events: The rows, newest first.
        next: What `before` is for the following page; None where there are no older rows.
    """

    events: Sequence[Event]
    next: int | None


class Operations:
    """Operations on some tenants.

    Args:
        cache: The cache of the tenants.
        store: The store under it, for the history.
        writers: Write to the config API of each tenant.
        clock: Tells the time.
        pause: Waits so many seconds between two reads after a write.

    Attributes:
        deliveries: Sent after every delivery that was taken.
    """

    def __init__(
        self,
        *,
        cache: Cache,
        store: Store,
        writers: Mapping[str, Writer],
        clock: Clock,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._cache = cache
        self._store = store
        self._writers = writers
        self._clock = clock
        self._pause = pause
        self.deliveries: Signal[DeliveryResult] = Signal()

    def deliver(self, tenant: str, *, delivery_id: str | None, actor: str) -> DeliveryResult:
        """Invalidate, wait for the read that follows, and return the result; a repeated id changes nothing.

        Args:
            tenant: A configured tenant.
            delivery_id: The id of the delivery; None where the sender gives none, and then every delivery counts.
            actor: Who sent it, for the history.

        Raises:
            StoreError: The shared store could not take the delivery, so that other processes do not see it yet. This
                process has invalidated all the same, and repeats the invalidation to the store; the sender repeats too.
        """
        invalidated, shared = self._invalidate(tenant, Cause.DELIVERY, actor=actor, delivery_id=delivery_id)
        if not shared:
            raise StoreError("the shared store could not take the delivery; send it again in a moment")
        evaluation = None
        if not invalidated.duplicate:
            evaluation = self._cache.wait_for_generation(tenant, invalidated.generation)
        now = self._clock.monotonic()
        state = state_of(evaluation or self._cache.peek(tenant), now=now)
        result = DeliveryResult(
            tenant,
            max(invalidated.generation, state.generation),
            invalidated.duplicate,
            evaluation is not None,
            state.enabled,
        )
        self.deliveries.send(result)
        return result

    def invalidate(self, tenant: str, *, actor: str) -> int:
        """Raise the generation of a tenant and return it; a read follows.

        Where the shared store fails, the invalidation holds in this process and is repeated to the store.
        """
        return self._invalidate(tenant, Cause.INVALIDATED, actor=actor)[0].generation

    def _invalidate(
        self, tenant: str, cause: Cause, *, actor: str, delivery_id: str | None = None
    ) -> tuple[Invalidated, bool]:
        event = Event(self._now(), tenant, cause, actor=actor, delivery_id=delivery_id or "")
        return self._cache.invalidate(tenant, Invalidation(event, delivery_id))

    def refresh(self, tenant: str) -> State:
        """Read the API now.

        Raises:
            ReadError: The read failed; the last value is served as its age allows.
        """
        return state_of(self._cache.refresh(tenant), now=self._clock.monotonic())

    def set_enabled(self, tenant: str, *, enabled: bool, actor: str, reason: str = "") -> State:
        """Write a value to the config API, invalidate, and read back.

        Returns:
            The state afterwards. Its `enabled` is the last answer of the API: the old value, where the API took the
            write and answers the old value for longer than the few reads that are tried.

        Raises:
            WriteConflict: The API answered 409.
            WriteOutcomeUnknown: No answer came, and the reads after it did not show the new value.
            WriteError: The API refused the value.
            ReadError: The write was not sent: no token, no connection, or the API asked to wait.
        """
        began, asked = self._clock.monotonic(), "on" if enabled else "off"
        unknown: WriteOutcomeUnknown | None = None
        try:
            self._writers[tenant].write(enabled)
        except WriteOutcomeUnknown as error:
            unknown = error
        except (WriteError, ReadError) as error:
            self._wrote(tenant, None, actor, reason, began, f"{asked} was not written: {error}")
            raise
        self._cache.invalidate(tenant, Invalidation())
        pauses = READ_BACK_PAUSES_SECONDS if unknown is None else UNKNOWN_PAUSES_SECONDS
        shows = self._read_back(tenant, pauses, enabled=enabled)
        if unknown is not None and not shows:
            self._wrote(tenant, None, actor, reason, began, f"whether {asked} was written is unknown: no answer came")
            raise unknown
        self._wrote(tenant, enabled, actor, reason, began, _READ_BACK[shows])
        return self._cache.state(tenant)

    def _read_back(self, tenant: str, pauses: Sequence[float], *, enabled: bool) -> bool | None:
        """Return whether one of a few reads shows the value; None where none of them succeeded."""
        shows: bool | None = None
        until = self._clock.monotonic() + READ_BACK_SECONDS
        for seconds in pauses:
            if seconds:
                self._pause(seconds)
            if self._clock.monotonic() >= until:
                break
            try:
                shows = self.refresh(tenant).enabled is enabled
            except ReadError as error:
                logger.debug("tenant %s: reading back failed: %s", tenant, error)
            if shows:
                return True
        return shows

    def history(self, *, tenant: str | None = None, limit: int = 100, before: int | None = None) -> Sequence[Event]:
        """Return rows of history, newest first.

        Args:
            tenant: Only of this tenant.
            limit: The most rows, >= 1.
            before: Only rows with a lower id than this.
        """
        return self._store.history(tenant=tenant, limit=limit, before=before)

    def search_history(
        self,
        *,
        tenant: str | None = None,
        limit: int = 100,
        before: int | None = None,
        cause: Cause | None = None,
        actor: str = "",
    ) -> HistoryPage:
        """Return a page of history, newest first, with only the rows that match.

        Args:
            tenant: Only of this tenant.
            limit: The most rows, >= 1. A page with fewer rows may have a following page all the same, because at most
                `MAX_SCANNED_ROWS` rows are looked through.
            before: Only rows with a lower id than this.
            cause: Only rows of this cause.
            actor: Only rows whose actor contains this text; case does not matter.
        """
        events: list[Event] = []
        wanted, scanned = actor.casefold(), 0
        size = SCAN_ROWS if cause or wanted else limit + 1
        while True:
            rows = self._store.history(tenant=tenant, limit=size, before=before)
            for row in rows:
                if (cause is None or row.cause is cause) and wanted in row.actor.casefold():
                    if len(events) == limit:
                        return HistoryPage(events, events[-1].id)
                    events.append(row)
            scanned += len(rows)
            if len(rows) < size:
                return HistoryPage(events, None)
            before = rows[-1].id
            if scanned >= MAX_SCANNED_ROWS:
                return HistoryPage(events, before)

    def _wrote(self, tenant: str, enabled: bool | None, actor: str, reason: str, began: float, outcome: str) -> None:
        self._store.append(
            Event(
                self._now(),
                tenant,
                Cause.WRITE,
                enabled=enabled,
                actor=actor,
                latency_seconds=self._clock.monotonic() - began,
                detail=f"{outcome}; reason: {reason}" if reason else outcome,
            )
        )

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock.wall(), UTC)
