"""A request's body is read once, under a cap, and is a JSON object or a problem."""

from __future__ import annotations

import json
from typing import NoReturn

from flask import Request
from werkzeug.exceptions import RequestEntityTooLarge

from external_oms.web.problems import Problem
from external_oms.web.shapes import JSON

__all__ = ["demand_json_type", "json_object", "raw_body"]


def raw_body(asked: Request, *, max_bytes: int) -> bytes:
    """The body's bytes, whether their number was announced or they come in chunks.

    Args:
        asked: The request.
        max_bytes: The most that is read.

    Raises:
        Problem: 413: there are more.
    """
    asked.max_content_length = max_bytes + 1  # of a body in chunks, werkzeug reads so much and drops the rest unseen
    try:
        body = asked.get_data(cache=True, parse_form_data=False)
    except RequestEntityTooLarge as error:
        raise _too_large(max_bytes) from error
    if len(body) > max_bytes:
        raise _too_large(max_bytes)
    return body


def _too_large(max_bytes: int) -> Problem:
    return Problem(413, f"the body is larger than {max_bytes} bytes")


def demand_json_type(asked: Request) -> None:
    """See that the body is announced as JSON.

    Raises:
        Problem: 415.
    """
    announced = asked.mimetype
    if announced != "application/json" and not (announced.startswith("application/") and announced.endswith("+json")):
        raise Problem(415, "send the body as application/json", headers={"Accept": "application/json"})


def json_object(body: bytes) -> dict[str, JSON]:
    """The JSON object that the bytes are.

    Raises:
        Problem: 400: not UTF-8, not JSON (NaN and the like included), not an object, or one with a name twice: two
            readers of such an object may see two different things.
    """
    try:
        parsed: JSON = _DECODER.decode(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Problem(400, "the body is not a JSON object in UTF-8 with each name once") from error
    if not isinstance(parsed, dict):
        raise Problem(400, "the body is JSON, but not an object")
    return parsed


def _named_once(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    named = dict(pairs)
    if len(named) != len(pairs):
        raise ValueError("a name stands twice")
    return named


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_named_once, parse_constant=_refused)
"""Made once: `json.loads` makes one for each call that asks for anything but the plain rules."""
