"""OFREP 0.3.0: evaluate one flag or all flags, and stream when to evaluate again.

The answer for a fresh value is made once and sent until the provider gives other details. Source: OpenFeature Remote
Evaluation Protocol, OpenAPI 0.3.0 and ADR-0002 to ADR-0008; WHATWG Fetch, "CORS protocol".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from urllib.parse import urlencode

from flask import Blueprint, Response, g, request
from openfeature.evaluation_context import EvaluationContext
from openfeature.exception import (
    ErrorCode,
    FlagNotFoundError,
    GeneralError,
    InvalidContextError,
    OpenFeatureError,
    ProviderNotReadyError,
)
from openfeature.flag_evaluation import Reason
from werkzeug.exceptions import HTTPException, NotFound

from external_oms.cache import ChangeKind
from external_oms.config import FLAG_KEY
from external_oms.errors import ExternalOMSError, SettingsError, TenantError
from external_oms.policy import Freshness
from external_oms.problems import JSON, Problem, check_json_type, json_object
from external_oms.web.access import require_role, stream_token
from external_oms.web.errors import Error, read_body, to_problem
from external_oms.web.keys import Role
from external_oms.web.ofrep_schemas import (
    Configuration,
    compact,
    configuration_of,
    failed_flag,
    succeeded_flag,
    tag_of,
    unserved_flag,
)
from external_oms.web.sse import Message, stream_response
from external_oms.web.state import Answer, Evaluation, get_oms

__all__ = ["PREFIX", "bp", "check_origins", "error_response"]

PREFIX = "/ofrep/"
"""The paths that answer in the protocol's shapes, errors included."""

BODY_BYTES = 65_536
"""The largest body, in bytes: a context has some attributes of a caller, not documents."""

PREFLIGHT_SECONDS = 600
"""How long a browser remembers a preflight, in seconds: an origin that was removed is out ten minutes later."""

_JSON = "application/json"
_FLAGS = "/ofrep/v1/evaluate/flags/"
_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(:[0-9]{1,5})?")
_ALLOWED_HEADERS = "Authorization, Cache-Control, Content-Type, If-None-Match, Last-Event-ID, X-API-Key"

bp = Blueprint("ofrep", __name__)


@bp.post("/ofrep/v1/evaluate/flags/<path:key>")
@require_role(Role.VIEWER)
def evaluate(key: str) -> Response:
    """Evaluate one flag."""
    oms = get_oms()
    tenant = _context().get("tenant")
    context = EvaluationContext(attributes={"tenant": tenant}) if tenant is not None else None  # type: ignore[dict-item]  # any JSON; the provider refuses what is no tenant's name
    try:
        details = oms.provider.resolve_boolean_details(key, False, context)
    except GeneralError:
        name = oms.cache.tenant_of(tenant)
        oms.evaluated.send(Evaluation(name, Reason.ERROR.value, "ofrep", "none"))
        return Response(compact(unserved_flag(oms.cache.peek(name))), content_type=_JSON)
    answer = oms.answers.get(tenant)
    if answer is None or answer.details is not details:
        event = Evaluation(str(details.flag_metadata["tenant"]), str(details.reason), "ofrep", str(details.variant))
        # The tenant was resolved, so it is configured; there are no more answers than tenants.
        answer = oms.answers[tenant] = Answer(details, compact(succeeded_flag(details)), event)
    oms.evaluated.send(answer.event)
    return Response(answer.body, content_type=_JSON)


@bp.post("/ofrep/v1/evaluate/flags")
@require_role(Role.VIEWER)
def evaluate_all() -> Response:
    """Evaluate all flags, which is one, and name the event stream."""
    oms = get_oms()
    try:
        name = oms.cache.tenant_of(_context().get("tenant"))
    except TenantError as error:
        flag = failed_flag(ErrorCode.INVALID_CONTEXT, str(error), key=FLAG_KEY)
        return _bulk({"flags": [flag]}, etag=f'"{tag_of(flag)}"')
    now = configuration_of(oms.cache.lookup(name), oms.settings.when_expired)
    oms.evaluated.send(Evaluation(name, now.reason.value, "ofrep", str(now.flag.get("variant", "none"))))
    token = stream_token(g.identity)
    query = {"tenant": name, "since": now.tag} | ({} if token is None else {"token": token})
    address = f"{request.script_root}/ofrep/v1/events?{urlencode(query)}"
    streams: list[JSON] = [{"type": "sse", "endpoint": {"requestUri": address}}]
    return _bulk({"flags": [now.flag], "eventStreams": streams}, etag=_etag(now, token))


@bp.get("/ofrep/v1/events")
@require_role(Role.VIEWER)
def events() -> Response:
    """Stream an event whenever the flags change; it says to evaluate again, not what the value is.

    The id of an event is the digest of the flags, the same in every process: a client that connects again, to any
    worker, sends the last id and learns whether it missed something.
    """
    oms = get_oms()
    try:
        tenant = oms.cache.tenant_of(request.args.get("tenant"))
    except TenantError as error:
        raise InvalidContextError(str(error)) from error
    token = stream_token(g.identity)
    known = request.headers.get("Last-Event-ID") or request.args.get("since")

    def news() -> Iterable[Message]:
        nonlocal known
        evaluation = oms.cache.peek(tenant)
        if evaluation.entry.failure is None and evaluation.freshness is not Freshness.FRESH:
            return  # a read is under way and brings news of its own: a delivery that changes nothing is no event
        now = configuration_of(evaluation, oms.settings.when_expired)
        if known is None:
            yield Message("", "", id=now.tag)
        elif now.tag != known:
            event = {"type": "refetchEvaluation", "etag": _etag(now, token), "lastModified": now.read_at}
            yield Message("message", json.dumps(event), id=now.tag)
        known = now.tag

    def render(name: str, _: ChangeKind) -> Iterable[Message]:
        return news() if name == tenant else ()

    return stream_response(oms.broker, render, first=news, owner=g.identity.name)


def _context() -> dict[str, JSON]:
    """Return the context of this request; some clients leave an empty one out.

    Raises:
        Problem: 413, 415, or 400: no JSON object.
        InvalidContextError: The context is none.
    """
    body = read_body(BODY_BYTES)
    check_json_type(request.content_type or "")
    context = json_object(body).get("context", {})
    if not isinstance(context, dict):
        raise InvalidContextError("`context` must be a JSON object")
    if not isinstance(context.get("targetingKey", ""), str):
        raise InvalidContextError("`context.targetingKey` must be text")
    return context


def _bulk(shape: dict[str, JSON], *, etag: str) -> Response:
    if request.if_none_match.contains_weak(etag.strip('"')):
        return Response(status=HTTPStatus.NOT_MODIFIED, headers={"ETag": etag})
    return Response(compact(shape), content_type=_JSON, headers={"ETag": etag})


def _etag(now: Configuration, token: str | None) -> str:
    """Return a strong validator: another token is another answer, so no client keeps a token that has ended."""
    seal = "" if token is None else "." + hashlib.sha256(token.encode()).hexdigest()[:8]
    return f'"{now.tag}{seal}"'


# -- errors ------------------------------------------------------------------------------------------------------------


@bp.errorhandler(HTTPException)
@bp.errorhandler(ExternalOMSError)
@bp.errorhandler(Problem)
@bp.errorhandler(OpenFeatureError)
def error_response(error: Error | OpenFeatureError) -> Response:
    """Return an error in the protocol's shape."""
    code, problem = _problem(error)
    key = request.path.removeprefix(_FLAGS) if request.path.startswith(_FLAGS) else None
    body = compact(failed_flag(code, problem.detail, key=key))
    return Response(body, problem.status, problem.headers, content_type=_JSON)


def _problem(error: Error | OpenFeatureError) -> tuple[ErrorCode, Problem]:
    is_unrouted_key = isinstance(error, NotFound) and request.method == "POST" and request.path.startswith(_FLAGS)
    if isinstance(error, FlagNotFoundError) or is_unrouted_key:
        return ErrorCode.FLAG_NOT_FOUND, Problem(404, f"this server evaluates {FLAG_KEY} only")
    if isinstance(error, InvalidContextError | TenantError):
        detail = error.error_message if isinstance(error, InvalidContextError) else str(error)
        return ErrorCode.INVALID_CONTEXT, Problem(400, detail or "the context is not valid")
    if isinstance(error, ProviderNotReadyError):
        return ErrorCode.GENERAL, Problem(503, "this process is shutting down", headers={"Retry-After": "1"})
    if isinstance(error, OpenFeatureError):
        return ErrorCode.GENERAL, Problem(500, "internal server error", kind="unforeseen")
    problem = to_problem(error)
    is_malformed = problem.status == HTTPStatus.BAD_REQUEST
    return ErrorCode.PARSE_ERROR if is_malformed else ErrorCode.GENERAL, problem


# -- pages of other origins --------------------------------------------------------------------------------------------


def check_origins(origins: Sequence[str]) -> None:
    """Refuse an entry that is not an origin as a browser sends it: in small letters, with nothing after the host.

    Raises:
        SettingsError: One is not.
    """
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            advice = f"{origin[:80]!r} is not an origin, such as https://shop.example, with nothing after it"
            raise SettingsError("ofrep_origins", advice)


@bp.after_app_request
def allow_origins(response: Response) -> Response:
    """Let pages of the configured origins read the answers of OFREP, errors included.

    `Access-Control-Allow-Credentials` is never sent: keys travel in headers that a page sets itself, never in cookies.
    """
    if not request.path.startswith(PREFIX):
        return response
    origins = get_oms().settings.ofrep_origins
    if not origins:
        return response
    if "*" not in origins:
        response.vary.add("Origin")
    origin = request.headers.get("Origin", "")
    if not origin or ("*" not in origins and origin not in origins):
        return response
    response.headers["Access-Control-Allow-Origin"] = "*" if "*" in origins else origin
    response.headers["Access-Control-Expose-Headers"] = "ETag, Retry-After"
    if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
        response.headers["Access-Control-Allow-Methods"] = "GET, POST"
        response.headers["Access-Control-Allow-Headers"] = _ALLOWED_HEADERS
        response.headers["Access-Control-Max-Age"] = str(PREFLIGHT_SECONDS)
    return response
