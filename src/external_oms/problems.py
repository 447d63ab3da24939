"""Errors as problem details (RFC 9457), and the JSON objects that requests carry; without a web framework.

The `type` of every problem is `about:blank`, so the status says what happened. The extension member `kind` is a stable
word for programs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import NoReturn, TypeAlias

from external_oms.errors import (
    ExternalOMSError,
    NothingToServe,
    RateLimited,
    ReadError,
    StoreError,
    TenantError,
    WriteConflict,
    WriteError,
    WriteOutcomeUnknown,
)

__all__ = [
    "JSON",
    "PROBLEM_TYPE",
    "Problem",
    "check_json_type",
    "json_object",
    "mimetype_of",
    "problem_of",
    "whole_seconds",
]

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

PROBLEM_TYPE = "application/problem+json"

_KINDS: tuple[tuple[type[ExternalOMSError], int, str], ...] = (
    (TenantError, 404, "tenant"),
    (WriteConflict, 409, "write_conflict"),
    (WriteOutcomeUnknown, 504, "write_outcome_unknown"),
    (WriteError, 502, "write_refused"),
    (RateLimited, 503, ""),
    (ReadError, 502, ""),
    (NothingToServe, 503, "nothing_to_serve"),
    (StoreError, 503, "store"),
    (ExternalOMSError, 500, "unforeseen"),
)
"""The status and the kind of each error, subclasses first; a read error brings its own kind."""


class Problem(Exception):
    """A response that says what is wrong.

    Attributes:
        status: The HTTP status, 400 to 599.
        kind: A stable word for programs.
        detail: One or two sentences for people.
        headers: Headers of the response, such as Retry-After.

    Args:
        status: The status.
        detail: The detail.
        kind: The kind; the phrase of the status in lower case unless given.
        headers: The headers.
    """

    def __init__(self, status: int, detail: str, *, kind: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind or HTTPStatus(status).phrase.lower().replace(" ", "_").replace("-", "_")
        self.detail = detail
        self.headers = dict(headers or {})

    @property
    def document(self) -> dict[str, JSON]:
        """The problem details object."""
        title = HTTPStatus(self.status).phrase
        return {
            "type": "about:blank",
            "title": title,
            "status": self.status,
            "detail": self.detail,
            "kind": self.kind,
        }


def whole_seconds(seconds: float | None) -> str:
    """Return the text of a Retry-After header: whole seconds, at least 1.

    A date or a fraction is legal (RFC 9110 section 10.2.3) and breaks the official OFREP clients.

    Args:
        seconds: Float seconds to wait; None where they are not known.
    """
    return str(max(1, math.ceil(seconds or 0.0)))


def problem_of(error: ExternalOMSError | Problem) -> Problem:
    """Return the problem details for an error of this package."""
    if isinstance(error, Problem):
        return error
    status, kind = next((status, kind) for kept, status, kind in _KINDS if isinstance(error, kept))
    if isinstance(error, TenantError) and error.tenant is None:
        status = 400
    if isinstance(error, WriteError) and error.status == HTTPStatus.BAD_REQUEST:
        status = 400
    wait = error.retry_after_seconds if isinstance(error, ReadError) else None
    headers = {"Retry-After": whole_seconds(wait)} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}
    return Problem(status, str(error), kind=error.kind if isinstance(error, ReadError) else kind, headers=headers)


def mimetype_of(content_type: str) -> str:
    """Return the media type of a Content-Type header, in lower case and without parameters."""
    return content_type.partition(";")[0].strip().lower()


def check_json_type(content_type: str) -> None:
    """Refuse a body that is not announced as JSON.

    Raises:
        Problem: 415.
    """
    given = mimetype_of(content_type)
    if given != "application/json" and not (given.startswith("application/") and given.endswith("+json")):
        raise Problem(415, "send the body as application/json", headers={"Accept": "application/json"})


def json_object(body: bytes) -> dict[str, JSON]:
    """Return the JSON object in the body.

    Raises:
        Problem: 400: not UTF-8, not JSON (NaN and the like included), not an object, or an object with a name twice:
            two readers of such an object may see two different things.
    """
    try:
        parsed: JSON = _DECODER.decode(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Problem(400, "the body is not a JSON object in UTF-8 with each name once") from error
    if not isinstance(parsed, dict):
        raise Problem(400, "the body is JSON, but not an object")
    return parsed


def _unique(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    named = dict(pairs)
    if len(named) != len(pairs):
        raise ValueError("a name stands twice")
    return named


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
"""Made once: `json.loads` makes a decoder for each call with options."""
