"""Entries, events and members as JSON: one codec for every store.

Decoding trusts nothing. Every field is checked for its type and range, because another version, another program or a
damaged medium may have written it. A field that this version does not know is ignored, so that old and new versions
share a store during an upgrade; a field that is missing takes its default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from external_oms.config import ETAG
from external_oms.entry import Entry, Failure, Lease, Snapshot
from external_oms.records import Cause, Event, Member

__all__ = [
    "MAX_COUNTER",
    "MAX_NUMBER",
    "MalformedError",
    "decode_entry",
    "decode_event",
    "decode_member",
    "encode_entry",
    "encode_event",
    "encode_member",
]

MAX_NUMBER = 1 << 52
"""The largest generation, token or id: JSON readers in other languages hold numbers up to 2^53 exactly, and a number of
milliseconds since 1970 stays below it for 140,000 years."""

MAX_COUNTER = MAX_NUMBER >> 1
"""The end of an entry's generation and token. No count of ours comes near it; an entry with a number that was forged is
given up when that reaches the end, and its numbers begin again."""

MAX_INSTANT_SECONDS = 1e11
"""The largest instant, in seconds from zero: three thousand years, with microseconds to spare in a float."""

MAX_DURATION_SECONDS = 1e9
"""The largest duration, as in the settings."""

MAX_TEXT = 10_000
"""The longest text of a field, in characters; our own texts stay far below it."""

T = TypeVar("T")

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
"""Control characters, and halves of surrogate pairs, which JSON can name and UTF-8 cannot."""


class MalformedError(ValueError):
    """The stored text is not an entry, event or member of ours."""


def encode_entry(entry: Entry) -> str:
    """Return an entry as JSON text."""
    snapshot, failure, lease = entry.snapshot, entry.failure, entry.lease
    return _dumps(
        {
            "generation": entry.generation,
            "invalidated_at": entry.invalidated_at,
            "stale_since": entry.stale_since,
            "token": entry.token,
            "paced_until": entry.paced_until,
            "snapshot": snapshot
            and {
                "enabled": snapshot.enabled,
                "updated_at": _text_of(snapshot.updated_at),
                "etag": snapshot.etag,
                "generation": snapshot.generation,
                "token": snapshot.token,
                "read_at": snapshot.read_at,
                "fetched_at": _text_of(snapshot.fetched_at),
                "lifetime_seconds": snapshot.lifetime_seconds,
                "writer": snapshot.writer,
            },
            "failure": failure
            and {
                "kind": failure.kind,
                "message": _printable(failure.message),
                "status": failure.status,
                "count": failure.count,
                "generation": failure.generation,
                "token": failure.token,
                "failed_at": failure.failed_at,
                "since": _text_of(failure.since),
                "retry_at": failure.retry_at,
                "server_retry_at": failure.server_retry_at,
            },
            "lease": lease
            and {
                "token": lease.token,
                "holder": lease.holder,
                "generation": lease.generation,
                "expires_at": lease.expires_at,
                "overtaken_at": lease.overtaken_at,
            },
        }
    )


def decode_entry(text: str | bytes) -> Entry:
    """Return the entry that a JSON text holds.

    Raises:
        MalformedError: The text is not JSON, or a field has another type or is out of range.
    """
    fields = _object(text)
    entry = Entry(
        generation=_number(fields, "generation", end=MAX_COUNTER),
        invalidated_at=_optional(fields, "invalidated_at", _instant),
        stale_since=_optional(fields, "stale_since", _instant),
        token=_number(fields, "token", end=MAX_COUNTER),
        paced_until=_instant(fields, "paced_until", 0.0),
        snapshot=_part(fields, "snapshot", _snapshot),
        failure=_part(fields, "failure", _failure),
        lease=_part(fields, "lease", _lease),
    )
    for part in (entry.snapshot, entry.failure, entry.lease):
        if part is not None and (part.generation > entry.generation or part.token > entry.token):
            raise MalformedError("a part is ahead of its entry")
    return entry


def _snapshot(fields: Mapping[str, Any]) -> Snapshot:
    etag = _optional(fields, "etag", _string)
    if etag is not None and not ETAG.fullmatch(etag):
        raise MalformedError("etag is not an entity tag")
    lifetime_seconds = _duration(fields, "lifetime_seconds")
    if lifetime_seconds <= 0:
        raise MalformedError("lifetime_seconds is not above 0")
    return Snapshot(
        enabled=_boolean(fields, "enabled"),
        updated_at=_optional(fields, "updated_at", _datetime),
        etag=etag,
        generation=_number(fields, "generation"),
        token=_number(fields, "token"),
        read_at=_instant(fields, "read_at"),
        fetched_at=_datetime(fields, "fetched_at"),
        lifetime_seconds=lifetime_seconds,
        writer=_string(fields, "writer", ""),
    )


def _failure(fields: Mapping[str, Any]) -> Failure:
    return Failure(
        kind=_string(fields, "kind"),
        message=_string(fields, "message"),
        status=_optional(fields, "status", _number),
        count=max(1, _number(fields, "count", 1)),
        generation=_number(fields, "generation"),
        token=_number(fields, "token"),
        failed_at=_instant(fields, "failed_at"),
        since=_datetime(fields, "since"),
        retry_at=_instant(fields, "retry_at"),
        server_retry_at=_optional(fields, "server_retry_at", _instant),
    )


def _lease(fields: Mapping[str, Any]) -> Lease:
    return Lease(
        token=_number(fields, "token"),
        holder=_string(fields, "holder"),
        generation=_number(fields, "generation"),
        expires_at=_instant(fields, "expires_at"),
        overtaken_at=_optional(fields, "overtaken_at", _instant),
    )


def encode_event(event: Event) -> str:
    """Return an event as JSON text, without its id."""
    return _dumps(
        {
            "at": _text_of(event.at),
            "tenant": event.tenant,
            "cause": event.cause.value,
            "enabled": event.enabled,
            "actor": _printable(event.actor),
            "delivery_id": _printable(event.delivery_id),
            "latency_seconds": event.latency_seconds,
            "detail": _printable(event.detail),
        }
    )


def decode_event(text: str | bytes, *, number: int) -> Event:
    """Return the event that a JSON text holds.

    Args:
        text: The JSON text.
        number: The id of the row, which the store counts.

    Raises:
        MalformedError: The text is not an event.
    """
    fields = _object(text)
    try:
        cause = Cause(_string(fields, "cause"))
    except ValueError as error:
        raise MalformedError("cause is unknown") from error
    return Event(
        at=_datetime(fields, "at"),
        tenant=_string(fields, "tenant"),
        cause=cause,
        enabled=_optional(fields, "enabled", _boolean),
        actor=_string(fields, "actor", ""),
        delivery_id=_string(fields, "delivery_id", ""),
        latency_seconds=_optional(fields, "latency_seconds", _duration),
        detail=_string(fields, "detail", ""),
        id=number,
    )


def encode_member(member: Member) -> str:
    """Return the report of a member as JSON text, without the time since the report."""
    return _dumps(
        {
            "name": member.name,
            "tenant": member.tenant,
            "generation": member.generation,
            "enabled": member.enabled,
            "freshness": member.freshness,
            "age_seconds": member.age_seconds,
        }
    )


def decode_member(text: str | bytes, *, seen_seconds: float) -> Member:
    """Return the report that a JSON text holds.

    Args:
        text: The JSON text.
        seen_seconds: Seconds since the report, >= 0, which the store knows.

    Raises:
        MalformedError: The text is not the report of a member.
    """
    fields = _object(text)
    freshness = _string(fields, "freshness")
    if freshness not in {"fresh", "stale", "expired"}:
        raise MalformedError("freshness is unknown")
    return Member(
        name=_string(fields, "name"),
        tenant=_string(fields, "tenant"),
        generation=_number(fields, "generation"),
        enabled=_optional(fields, "enabled", _boolean),
        freshness=freshness,
        age_seconds=_optional(fields, "age_seconds", _duration),
        seen_seconds=seen_seconds,
    )


# -- fields ---------------------------------------------------------------------------------------------------------

_REQUIRED: Any = object()


def _dumps(fields: Mapping[str, object]) -> str:
    return json.dumps(fields, separators=(",", ":"), allow_nan=False)


def _refuse_constant(name: str) -> float:
    raise MalformedError(f"{name} is not a number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _object(text: str | bytes) -> Mapping[str, Any]:
    try:
        found = _DECODER.decode(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:
        raise MalformedError("the text is not JSON") from error
    if not isinstance(found, dict):
        raise MalformedError("the text is not a JSON object")
    return found


def _part(fields: Mapping[str, Any], name: str, decode: Callable[[Mapping[str, Any]], T]) -> T | None:
    found = fields.get(name)
    if found is None:
        return None
    if not isinstance(found, dict):
        raise MalformedError(f"{name} is not an object")
    return decode(found)


def _optional(fields: Mapping[str, Any], name: str, check: Callable[[Mapping[str, Any], str], T]) -> T | None:
    return None if fields.get(name) is None else check(fields, name)


def _get(fields: Mapping[str, Any], name: str, default: Any) -> Any:  # noqa: ANN401 - any JSON value, checked by the caller
    found = fields.get(name, default)
    if found is _REQUIRED:
        raise MalformedError(f"{name} is missing")
    return found


def _number(fields: Mapping[str, Any], name: str, default: int = 0, end: int = MAX_NUMBER) -> int:
    found = _get(fields, name, default)
    if type(found) is not int or not 0 <= found < end:
        raise MalformedError(f"{name} is not a whole number below {end}")
    return found


def _float(fields: Mapping[str, Any], name: str, default: Any, most: float) -> float:  # noqa: ANN401 - as `_get`
    found = _get(fields, name, default)
    if type(found) not in {int, float}:
        raise MalformedError(f"{name} is not a number")
    if not abs(found) <= most:  # also false for NaN
        raise MalformedError(f"{name} is out of range")
    return float(found)


def _instant(fields: Mapping[str, Any], name: str, default: Any = _REQUIRED) -> float:  # noqa: ANN401 - as `_get`
    return _float(fields, name, default, MAX_INSTANT_SECONDS)


def _duration(fields: Mapping[str, Any], name: str) -> float:
    found = _float(fields, name, _REQUIRED, MAX_DURATION_SECONDS)
    if found < 0:
        raise MalformedError(f"{name} is negative")
    return found


def _boolean(fields: Mapping[str, Any], name: str) -> bool:
    found = _get(fields, name, _REQUIRED)
    if not isinstance(found, bool):
        raise MalformedError(f"{name} is not true or false")
    return found


def _string(fields: Mapping[str, Any], name: str, default: Any = _REQUIRED) -> str:  # noqa: ANN401 - as `_get`
    found = _get(fields, name, default)
    if not isinstance(found, str) or len(found) > MAX_TEXT or _UNPRINTABLE.search(found):
        raise MalformedError(f"{name} is not a text of at most {MAX_TEXT} printable characters")
    return found


def _printable(text: str) -> str:
    """Return the text as decoding accepts it: what we store must not count as damaged when it is loaded."""
    return _UNPRINTABLE.sub("\ufffd", text[:MAX_TEXT])


def _text_of(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).isoformat()


def _datetime(fields: Mapping[str, Any], name: str) -> datetime:
    text = _string(fields, name)
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise MalformedError(f"{name} has no offset from UTC")
        return moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise MalformedError(f"{name} is not a moment") from error
