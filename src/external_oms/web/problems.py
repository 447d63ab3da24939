"""Every error is an answer of `application/problem+json`: what happened, in our words, and what to do.

Source: RFC 9457. The type is `about:blank` (the status says what kind of problem it is); the extension member `kind`
is one stable word for programs.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from flask import Blueprint, Flask, Response
from werkzeug.exceptions import HTTPException

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

__all__ = ["PROBLEM_TYPE", "Problem", "problem_of", "report_problems", "resource", "whole_seconds"]

PROBLEM_TYPE = "application/problem+json"

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
_LOST_HEADERS = ("Allow", "Retry-After", "WWW-Authenticate")

_OURS: tuple[tuple[type[ExternalOMSError], int, str], ...] = (
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
"""Our errors as statuses, the narrower one first; a read error brings its own `kind`."""

_logger = logging.getLogger(__name__)


class Problem(HTTPException):
    """An answer that says what is wrong; raise it from a view.

    Attributes:
        status: The HTTP status, 400 to 599.
        kind: One stable word for programs; the status' own phrase in small letters where nothing says more.
        detail: One or two sentences for people.
        answer: The answer itself.

    Args:
        status: The status.
        detail: The detail.
        kind: The kind.
        headers: Headers of the answer, such as Retry-After.
    """

    def __init__(self, status: int, detail: str, *, kind: str = "", headers: Mapping[str, str] | None = None) -> None:
        phrase = HTTPStatus(status).phrase
        self.status = status
        self.kind = kind or phrase.lower().replace(" ", "_").replace("-", "_")
        self.detail = detail
        body = {"type": "about:blank", "title": phrase, "status": status, "detail": detail, "kind": self.kind}
        answer = Response(json.dumps(body), status, dict(headers or {}), content_type=PROBLEM_TYPE)
        answer.headers.setdefault("Cache-Control", "no-store")
        self.answer = answer
        super().__init__(detail, response=answer)
        self.code = status


def whole_seconds(seconds: float | None) -> str:
    """The text of a Retry-After header: whole seconds, at least 1, as every client can read it.

    Args:
        seconds: Float seconds to wait, or None where nobody knows.

    Source: RFC 9110 §10.2.3; a date or a fraction breaks the official OFREP clients.
    """
    return str(max(1, math.ceil(seconds or 0.0)))


def problem_of(error: Exception) -> Problem:
    """The problem that an error is; one that nobody foresaw is logged here and answered as 500 without its text."""
    match error:
        case Problem():
            return error
        case HTTPException():
            return _of_http(error)
        case ExternalOMSError():
            return _of_ours(error)
    _logger.error("an error that nobody foresaw was answered with 500", exc_info=error)
    return Problem(500, "the service failed in a way that nobody foresaw; its log has the rest", kind="unforeseen")


def _of_http(error: HTTPException) -> Problem:
    answer = error.get_response()
    kept = {name: answer.headers[name] for name in _LOST_HEADERS if name in answer.headers}
    status = error.code or 500
    return Problem(status, error.description or HTTPStatus(status).phrase, headers=kept)


def _of_ours(error: ExternalOMSError) -> Problem:
    status, kind = next((status, kind) for ours, status, kind in _OURS if isinstance(error, ours))
    if isinstance(error, TenantError) and error.tenant is None:
        status = 400
    if isinstance(error, WriteError) and error.status == HTTPStatus.BAD_REQUEST:
        status = 400
    wait = error.retry_after_seconds if isinstance(error, ReadError) else None
    headers = {"Retry-After": whole_seconds(wait)} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}
    return Problem(status, str(error), kind=error.kind if isinstance(error, ReadError) else kind, headers=headers)


def report_problems(mounted: Flask | Blueprint) -> None:
    """Have every error of an app, or of a blueprint and its children, answered as a problem."""

    def answer(error: Exception) -> Response:  # Flask itself lets redirects and answers that were made pass
        return problem_of(error).answer

    mounted.register_error_handler(Exception, answer)


def resource(blueprint: Blueprint, rule: str, **views: Callable[..., Any]) -> None:
    """Add a route that answers each of its methods by its view, and every other with 405 and what is allowed.

    The router's own 405 belongs to no blueprint, so it would be answered by the application that we are mounted on.

    Args:
        blueprint: Where the route is added.
        rule: The path, with converters as Flask has them.
        views: Method to view: `GET=…, PUT=…`; GET answers HEAD as well.
    """
    answered = set(views) | ({"HEAD"} if "GET" in views else set()) | {"OPTIONS"}
    allowed = ", ".join(method for method in _METHODS if method in answered)
    for method, view in views.items():
        blueprint.add_url_rule(rule, view.__name__, view, methods=[method], provide_automatic_options=False)

    def other(**_: object) -> Response:
        raise Problem(405, f"this resource answers {allowed}", headers={"Allow": allowed})

    def options(**_: object) -> Response:
        return Response(status=204, headers={"Allow": allowed})

    rest = [method for method in _METHODS if method not in answered]
    name = "_".join(sorted(view.__name__ for view in views.values()))
    blueprint.add_url_rule(rule, f"not_{name}", other, methods=rest, provide_automatic_options=False)
    if "OPTIONS" not in views:
        blueprint.add_url_rule(rule, f"options_{name}", options, methods=["OPTIONS"], provide_automatic_options=False)
