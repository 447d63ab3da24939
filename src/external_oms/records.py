"""Rows that a store keeps beside the cache entries: history events and the reports of its member processes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

__all__ = ["FIRST_VALUE", "MEMBER_SECONDS", "Cause", "Event", "Member"]

MEMBER_SECONDS = 60.0
"""How long a store lists a member after its last report, in seconds: six reports of 10 s may get lost."""

FIRST_VALUE = "first value"
"""The detail of a `CHANGED` event before which no value was known."""


class Cause(StrEnum):
    """What a history event records."""

    CHANGED = "changed"
    """A read returned another value than the read before it."""
    DELIVERY = "delivery"
    """A webhook delivery invalidated the tenant."""
    INVALIDATED = "invalidated"
    """A caller invalidated the tenant without a delivery."""
    WRITE = "write"
    """A caller wrote a value to the config API; `detail` has the outcome."""
    FAILED = "failed"
    """Reads began to fail."""
    RECOVERED = "recovered"
    """Reads succeed again."""
    STORE = "store"
    """The store was set aside, lost or recovered."""


@dataclass(frozen=True, slots=True)
class Event:
    """One row of history.

    Attributes:
        at: When it happened, on the wall clock, in UTC.
        tenant: The tenant.
        cause: What happened.
        enabled: The value after the event, where it is known.
        actor: The name of the caller: an API key's name, `webhook`, `application`; empty for the service itself.
        delivery_id: The `webhook-id` of a delivery, where it has one.
        latency_seconds: The duration in seconds, >= 0, where the event has one.
        detail: One sentence for people.
        id: The row's number in the store, rising; 0 before the row is stored.
    """

    at: datetime
    tenant: str
    cause: Cause
    enabled: bool | None = None
    actor: str = ""
    delivery_id: str = ""
    latency_seconds: float | None = None
    detail: str = ""
    id: int = 0


@dataclass(frozen=True, slots=True)
class Member:
    """The heartbeat of one process: the value that it serves for one tenant.

    Attributes:
        name: `host:pid`.
        tenant: The tenant.
        generation: The generation of the value that the process serves.
        enabled: That value, or None where it serves none.
        freshness: `fresh`, `stale` or `expired`.
        age_seconds: The age of the value in seconds at the time of the report, >= 0; None without a value.
        seen_seconds: Seconds since the report, >= 0.
    """

    name: str
    tenant: str
    generation: int
    enabled: bool | None
    freshness: str
    age_seconds: float | None
    seen_seconds: float = 0.0
