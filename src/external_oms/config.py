"""The config API's document, parsed strictly, and the values made of it; pure.

Source: External OMS Config API v0 (`{"enabled": true}`) and its revision 0.1.0
(`{"value": {"enabled": false}, "updated_at": "2021-07-13T20:18:25Z"}`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from external_oms.errors import MalformedAnswer

__all__ = [
    "ETAG",
    "FLAG_KEY",
    "Document",
    "Reading",
    "format_instant",
    "parse_document",
    "parse_instant",
]

FLAG_KEY = "external_oms_enabled"
"""The one flag that this package resolves."""

ETAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e]{0,256}"')
"""An entity tag (RFC 9110 section 8.8.3), without the characters that a header must not repeat."""


@dataclass(frozen=True, slots=True)
class Document:
    """The value, and when it was last changed, if the API says so."""

    enabled: bool
    updated_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """The result of one read of the API.

    Attributes:
        document: The document, or None if the API answered 304: the stored snapshot is still current.
        etag: The validator for the next conditional read, if the API gave one.
    """

    document: Document | None
    etag: str | None = None


def parse_document(body: bytes) -> Document:
    """Return the document in the body of a 200 response.

    Args:
        body: The raw body; its size is bounded by the caller.

    Raises:
        MalformedAnswer: The body is not JSON, not an object, an object has two members of one name, `enabled` is
            missing or not a JSON boolean, or `updated_at` is there and not an RFC 3339 instant.
    """
    try:
        top = json.loads(body, object_pairs_hook=_members)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise MalformedAnswer("the config API's answer is not JSON; is config_path right?") from error
    if not isinstance(top, dict):
        raise MalformedAnswer("the config API's answer is not a JSON object")
    holder = top.get("value", top)
    if not isinstance(holder, dict):
        raise MalformedAnswer("the config API's answer has a `value` that is not a JSON object")
    enabled = holder.get("enabled")
    if not isinstance(enabled, bool):
        found = "missing" if "enabled" not in holder else f"a JSON {_json_type(enabled)}"
        raise MalformedAnswer(f"`enabled` in the config API's answer must be true or false; it is {found}")
    return Document(enabled=enabled, updated_at=_updated_at(top.get("updated_at")))


def _members(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):  # readers disagree on which of them counts (RFC 8259 section 4)
        raise MalformedAnswer("the config API's answer has two members of one name")
    return members


def _updated_at(given: object) -> datetime | None:
    if given is None:
        return None
    if not isinstance(given, str):
        raise MalformedAnswer(f"`updated_at` in the config API's answer is a JSON {_json_type(given)}, not an instant")
    try:
        return parse_instant(given)
    except ValueError as error:
        raise MalformedAnswer("`updated_at` in the config API's answer is not an RFC 3339 instant") from error


def _json_type(value: object) -> str:
    names: dict[type, str] = {
        bool: "boolean",
        int: "number",
        float: "number",
        str: "string",
        list: "array",
        dict: "object",
    }
    return names.get(type(value), "null")


_INSTANT = re.compile(
    r"(?P<minute>[0-9]{4}-[0-9]{2}-[0-9]{2}T(?:[01][0-9]|2[0-3]):[0-9]{2}):(?P<second>[0-9]{2})(?P<fraction>\.[0-9]+)?"
    r"(?P<offset>Z|[+-][0-9]{2}:[0-9]{2})",
    re.IGNORECASE,
)


def parse_instant(text: str) -> datetime:
    """Return the instant that an RFC 3339 text names, in UTC; a leap second is the first second after it.

    Source: RFC 3339 §5.6 (grammar; `datetime.fromisoformat` accepts far more of ISO 8601), §5.7 (leap seconds).

    Raises:
        ValueError: The text is something else, or not an instant between the years 1 and 9999.
    """
    found = _INSTANT.fullmatch(text)
    if found is None:
        raise ValueError(f"not an RFC 3339 instant: {text[:40]!r}")
    minute, second, fraction, offset = found.group("minute", "second", "fraction", "offset")
    leap = second == "60"
    plain = f"{minute}:{'59' if leap else second}{'' if leap else fraction or ''}{offset}".upper()
    try:
        moment = datetime.fromisoformat(plain).astimezone(UTC)
        if not leap:
            return moment
        after = moment + timedelta(seconds=1)
    except OverflowError as error:
        raise ValueError(f"out of range: {text[:40]!r}") from error
    if (after.day, after.hour, after.minute) != (1, 0, 0):
        raise ValueError(f"a leap second only ends a month, in UTC: {text[:40]!r}")
    return after


def format_instant(moment: datetime) -> str:
    """Return the RFC 3339 text of an instant, in UTC, to the millisecond."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
