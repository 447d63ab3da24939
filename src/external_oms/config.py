"""The config API's document, and the values made of it: strict parsing, frozen results, no I/O.

Source: External OMS Config API v0 (`{"enabled": true}`) and its revision 0.1.0
(`{"value": {"enabled": false}, "updated_at": "2021-07-13T20:18:25Z"}`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime

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
    """What the API said: the value, and since when where it says so."""

    enabled: bool
    updated_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What one read of the API gave.

    Attributes:
        document: The document, or None where the API answered 304: the stored snapshot was validated.
        etag: The validator for the next conditional read, where the API gave one.
    """

    document: Document | None
    etag: str | None = None


def parse_document(body: bytes) -> Document:
    """The document in the body of a 200 answer.

    Args:
        body: The raw body; its size is bounded by the caller.

    Raises:
        MalformedAnswer: The body is not JSON, not an object, `enabled` is missing or not a JSON boolean, or
            `updated_at` is there and not an RFC 3339 instant.
    """
    try:
        top = json.loads(body)
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


def parse_instant(text: str) -> datetime:
    """The moment that an RFC 3339 text names, in UTC.

    Raises:
        ValueError: It is not one, or it has no offset from UTC.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"no offset from UTC in {text[:40]!r}")
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise ValueError(f"out of range: {text[:40]!r}") from error


def format_instant(moment: datetime) -> str:
    """The RFC 3339 text of a moment, in UTC, to the millisecond."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
