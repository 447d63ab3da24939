"""Our values as JSON: the one place that says how a state and a row of history look outside Python."""

from __future__ import annotations

from datetime import datetime
from typing import TypeAlias

from external_oms.config import format_instant
from external_oms.policy import State
from external_oms.records import Event

__all__ = ["JSON", "event_shape", "state_shape"]

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"


def _instant(moment: datetime | None) -> str | None:
    return None if moment is None else format_instant(moment)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def state_shape(state: State) -> dict[str, JSON]:
    """A tenant's state as a JSON object: instants in RFC 3339, durations in float seconds to the millisecond."""
    return {
        "tenant": state.tenant,
        "enabled": state.enabled,
        "freshness": state.freshness.value,
        "age_seconds": _rounded(state.age_seconds),
        "generation": state.generation,
        "fetched_at": _instant(state.fetched_at),
        "updated_at": _instant(state.updated_at),
        "source": state.source.value,
        "last_error": state.last_error,
        "fresh_seconds": _rounded(state.fresh_seconds),
        "failing_since": _instant(state.failing_since),
        "failures": state.failures,
        "retry_seconds": _rounded(state.retry_seconds),
    }


def event_shape(event: Event) -> dict[str, JSON]:
    """A row of history as a JSON object."""
    return {
        "id": event.id,
        "at": format_instant(event.at),
        "tenant": event.tenant,
        "cause": event.cause.value,
        "enabled": event.enabled,
        "actor": event.actor,
        "delivery_id": event.delivery_id,
        "latency_seconds": _rounded(event.latency_seconds),
        "detail": event.detail,
    }
