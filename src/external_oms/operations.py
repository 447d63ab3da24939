"""What people and deliveries do to a tenant: invalidate, read, write; each leaves a row of history."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from external_oms.cache import Cache
from external_oms.clock import Clock
from external_oms.config import Document, Failure
from external_oms.errors import ReadError, WriteError, WriteOutcomeUnknown
from external_oms.flights import ReadEnd
from external_oms.judgement import State, state_of
from external_oms.signals import Signal
from external_oms.stores.base import Cause, Event, Store

__all__ = ["Delivered", "Operations", "Writer"]

logger = logging.getLogger("external_oms")

DELIVERY_MEMORY_SECONDS = 86_400.0
"""How long a delivery id is remembered: the platform sends late by minutes, its senders retry for hours."""

READ_BACK_PAUSES_SECONDS = (0.0, 0.5, 1.0)
"""The pauses before each read after a write: a replica may lag, and an endpoint may allow one read a second."""

UNKNOWN_PAUSES_SECONDS = (*READ_BACK_PAUSES_SECONDS, 2.0)
"""The pauses after a write that nobody answered: an API that stumbles is back in seconds, or not for a while."""

READ_BACK_SECONDS = 20.0
"""After so long no other read is begun: somebody waits for the answer, behind proxies that wait 30 to 60 seconds."""

_READ_BACK = {
    True: "written and read back",
    False: "written; the API still answers the old value",
    None: "written; it could not be read back yet",
}


class Writer(Protocol):
    """What writes a value to the config API."""

    def write(self, enabled: bool) -> Document | None:
        """Write it; the API's echo, where it gives one."""
        ...


@dataclass(frozen=True, slots=True)
class Delivered:
    """What came of a delivery.

    Attributes:
        tenant: The tenant.
        generation: Its generation now.
        duplicate: Whether the delivery's id was seen before; then nothing else happened.
        refreshed: Whether a value read after the delivery is stored.
        enabled: The last known value.
    """

    tenant: str
    generation: int
    duplicate: bool
    refreshed: bool
    enabled: bool | None


class Operations:
    """The changes of some tenants.

    Args:
        cache: Their cache.
        store: The store under it, for the history.
        writers: What writes to each tenant's config API.
        clock: What tells the time.
        pause: Waits so many seconds between two reads after a write.

    Attributes:
        deliveries: Told of every delivery, once it is known what came of it.
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
        self.deliveries: Signal[Delivered] = Signal()
        cache.reads.listen(self._read_ended)

    def deliver(self, tenant: str, *, delivery_id: str | None, actor: str) -> Delivered:
        """Invalidate, read again, and say what came of it; a repeated id does nothing.

        Args:
            tenant: A configured tenant.
            delivery_id: The delivery's id; None for a sender that gives none, whose every delivery counts.
            actor: Who sent it, for the history.
        """
        began = self._clock.monotonic()
        if delivery_id is None:
            generation: int | None = self._cache.invalidate(tenant)
        else:
            generation = self._cache.deliver(tenant, delivery_id, seconds=DELIVERY_MEMORY_SECONDS)
        duplicate = generation is None
        answer = None if generation is None else self._cache.validate(tenant, generation)
        state = self._cache.state(tenant) if answer is None else state_of(answer, now=self._clock.monotonic())
        refreshed = answer is not None
        outcome = "a duplicate" if duplicate else "read again" if refreshed else "not read yet; a read follows"
        self._append(
            tenant,
            Cause.DELIVERY,
            enabled=state.enabled,
            actor=actor,
            delivery_id=delivery_id or "",
            latency_seconds=self._clock.monotonic() - began,
            detail=outcome,
        )
        delivered = Delivered(tenant, generation or state.generation, duplicate, refreshed, state.enabled)
        self.deliveries.tell(delivered)
        return delivered

    def invalidate(self, tenant: str, *, actor: str) -> int:
        """Raise the tenant's generation; a read follows. Returns the generation."""
        generation = self._cache.invalidate(tenant)
        self._append(tenant, Cause.INVALIDATED, actor=actor, detail=f"generation {generation}")
        return generation

    def refresh(self, tenant: str) -> State:
        """Read the API now.

        Raises:
            ReadError: It failed; the last value goes on being served as its age allows.
        """
        answer = self._cache.refresh(tenant)
        return state_of(answer, now=self._clock.monotonic())

    def set_enabled(self, tenant: str, *, enabled: bool, actor: str, reason: str = "") -> State:
        """Write a value to the config API, make everybody read again, and read back.

        Returns:
            The state after it. Its `enabled` is what the API answered last, which is the old value where the API took
            the write and goes on answering the old one for longer than the few reads that are tried.

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
        self._cache.invalidate(tenant)
        pauses = READ_BACK_PAUSES_SECONDS if unknown is None else UNKNOWN_PAUSES_SECONDS
        shows = self._read_back(tenant, pauses, enabled=enabled)
        if unknown is not None and not shows:
            self._wrote(tenant, None, actor, reason, began, f"whether {asked} was written is unknown: no answer came")
            raise unknown
        self._wrote(tenant, enabled, actor, reason, began, _READ_BACK[shows])
        return self._cache.state(tenant)

    def _read_back(self, tenant: str, pauses: Sequence[float], *, enabled: bool) -> bool | None:
        """Whether one of a few reads shows the value; None where none of them succeeded."""
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
        """Rows of history, newest first.

        Args:
            tenant: Only of this tenant.
            limit: The most rows, >= 1.
            before: The id of a row to go on from.
        """
        return self._store.history(tenant=tenant, limit=limit, before=before)

    def _wrote(self, tenant: str, enabled: bool | None, actor: str, reason: str, began: float, outcome: str) -> None:
        self._append(
            tenant,
            Cause.WRITE,
            enabled=enabled,
            actor=actor,
            latency_seconds=self._clock.monotonic() - began,
            detail=f"{outcome}; reason: {reason}" if reason else outcome,
        )

    def _read_ended(self, end: ReadEnd) -> None:
        """The rows that a read leaves: a changed value, the first failure of a row, the end of one."""
        before, tenant = end.lease.record, end.lease.tenant
        if isinstance(end.outcome, Failure):
            if before.failure is None:
                self._append(tenant, Cause.FAILED, latency_seconds=end.latency_seconds, detail=end.outcome.message)
            return
        enabled = end.outcome.enabled
        if before.failure is not None:
            count = before.failure.count
            detail = f"after {count} failed read{'' if count == 1 else 's'}"
            self._append(tenant, Cause.RECOVERED, enabled=enabled, latency_seconds=end.latency_seconds, detail=detail)
        if before.snapshot is None or before.snapshot.enabled is not enabled:
            detail = "first value" if before.snapshot is None else "another value than before"
            self._append(tenant, Cause.CHANGED, enabled=enabled, latency_seconds=end.latency_seconds, detail=detail)

    def _append(
        self,
        tenant: str,
        cause: Cause,
        *,
        enabled: bool | None = None,
        actor: str = "",
        delivery_id: str = "",
        latency_seconds: float | None = None,
        detail: str = "",
    ) -> None:
        at = datetime.fromtimestamp(self._clock.wall(), UTC)
        self._store.append(Event(at, tenant, cause, enabled, actor, delivery_id, latency_seconds, detail))
