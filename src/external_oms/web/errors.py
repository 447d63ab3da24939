"""Request bodies under a limit, and errors as responses of `application/problem+json`."""

from __future__ import annotations

import json
import logging
from http import HTTPStatus

from flask import Response, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from external_oms.errors import ExternalOMSError
from external_oms.problems import PROBLEM_TYPE, Problem, problem_of

__all__ = ["Error", "problem_response", "read_body", "to_problem"]

Error = HTTPException | ExternalOMSError | Problem
"""The errors that are answered; any other exception is a crash, which Flask reports and answers with 500."""

_KEPT_HEADERS = ("Allow", "Retry-After", "WWW-Authenticate")

logger = logging.getLogger("external_oms.web")


def read_body(max_bytes: int) -> bytes:
    """Return the body of the request, whether its length was announced or it comes in chunks.

    Args:
        max_bytes: The most bytes that are read.

    Raises:
        Problem: 413: there are more; 400: the body ended early, came too slowly, or its chunks are malformed.
    """
    request.max_content_length = max_bytes + 1  # of a body in chunks, werkzeug reads so much and drops the rest
    try:
        body = request.get_data(cache=True, parse_form_data=False)
    except RequestEntityTooLarge as error:
        raise Problem(413, f"the body is larger than {max_bytes} bytes") from error
    except Exception as error:  # the server's own errors about the body: gunicorn's, a socket's, a timeout
        logger.debug("a body could not be read", exc_info=error)
        raise Problem(400, "the body could not be read", headers={"Connection": "close"}) from error
    if len(body) > max_bytes:
        raise Problem(413, f"the body is larger than {max_bytes} bytes")
    return body


def to_problem(error: Error) -> Problem:
    """Return the problem details for an error of Flask or of this package; a crash is 500 without its text."""
    if not isinstance(error, HTTPException):
        return problem_of(error)
    response = error.get_response()
    headers = {name: response.headers[name] for name in _KEPT_HEADERS if name in response.headers}
    status = error.code or 500
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        return Problem(500, "internal server error; the log of the server says more", kind="unforeseen")
    return Problem(status, error.description or HTTPStatus(status).phrase, headers=headers)


def problem_response(problem: Problem) -> Response:
    """Return a problem as a response of `application/problem+json`."""
    return Response(json.dumps(problem.document), problem.status, problem.headers, content_type=PROBLEM_TYPE)
