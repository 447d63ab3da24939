"""OFREP 0.3.0 over the provider: one flag, all flags, and when to ask again; the last error has the protocol's shape.

What is asked on every order, one fresh flag, is answered with bytes made once. Source: OpenFeature Remote Evaluation
Protocol, OpenAPI 0.3.0 and ADR-0002 to ADR-0008.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple

from flask import Blueprint, Response, request
from openfeature.evaluation_context import EvaluationContext
from openfeature.exception import (
    ErrorCode,
    FlagNotFoundError,
    GeneralError,
    InvalidContextError,
    ProviderNotReadyError,
)
from openfeature.flag_evaluation import FlagResolutionDetails, Reason
from werkzeug.routing import BaseConverter

from external_oms.config import FLAG_KEY
from external_oms.errors import TenantError
from external_oms.web.access import Identity, Role, demand
from external_oms.web.bodies import demand_json_type, json_object, raw_body
from external_oms.web.events import Tickets, instant_of, refetch_stream, stream_address
from external_oms.web.hooks import Evaluated, Via
from external_oms.web.ofrep_shapes import (
    Configuration,
    Flag,
    compact,
    configuration_of,
    evaluated,
    failed,
    flag_of,
    reason_of,
    unserved,
)
from external_oms.web.origins import allow_origins
from external_oms.web.parts import Parts
from external_oms.web.problems import Problem, problem_of
from external_oms.web.shapes import JSON

__all__ = ["EVENTS_PATH", "Refusal", "blueprint"]

EVENTS_PATH = "/ofrep/v1/events"

BODY_BYTES = 65_536
"""The largest body: a context holds some attributes of a caller, not documents."""

CATCH_UP_SECONDS = 1.0
"""How long a request that knows of a newer configuration waits for it to reach this process: in a fleet, news travels
in milliseconds; where it was lost on its way, the listener's next event or poll finds it."""

_JSON = "application/json"
_PATHS = {"v1/evaluate/flags": "POST", "v1/events": "GET, HEAD"}
_FLAG = "v1/evaluate/flags/"
_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+){1,8}")


class Refusal(Problem):
    """An answer that says what is wrong, with the protocol's own code."""

    def __init__(self, status: int, code: ErrorCode, detail: str) -> None:
        super().__init__(status, detail)
        self.error_code = code


class _Anything(BaseConverter):
    """The rest of a path, whatever it is: keys may hold slashes, several in a row, and line breaks."""

    part_isolating = False
    regex = "(?s:.*)"
    weight = 1000


def blueprint(parts: Parts) -> Blueprint:
    """OFREP on one app."""
    mounted = Blueprint("ofrep", __name__, url_prefix="/ofrep")
    mounted.record_once(lambda state: state.app.url_map.converters.update(external_oms_anything=_Anything))
    mounted.register_error_handler(Exception, _refused)
    allow_origins(mounted, parts.settings.ofrep_origins)
    tickets = Tickets(parts.settings, parts.access.keyring, parts.service.clock.wall)
    parts.access.recognise_by(tickets.identity)
    evaluation, bulk = _Evaluation(parts), _Bulk(parts, tickets)

    def everything() -> Response:
        return bulk.answer(_admitted(parts))

    def events() -> Response:
        return bulk.stream(demand(Role.VIEWER))

    def one(key: str) -> Response:
        _admitted(parts)
        return evaluation.answer(key)

    def elsewhere(rest: str) -> Response:
        allowed = "POST" if rest.startswith(_FLAG) else _PATHS.get(rest)
        if allowed is None:
            raise Refusal(HTTPStatus.NOT_FOUND, ErrorCode.GENERAL, "OFREP has no such resource; is the base URL right?")
        headers = {"Allow": f"{allowed}, OPTIONS"}
        if request.method == "OPTIONS":
            return Response(status=HTTPStatus.NO_CONTENT, headers=headers)
        raise Problem(HTTPStatus.METHOD_NOT_ALLOWED, f"this resource answers {allowed}", headers=headers)

    def add(rule: str, view: Callable[..., Response], *methods: str) -> None:
        mounted.add_url_rule(
            rule, view_func=view, methods=methods, provide_automatic_options=False, merge_slashes=False
        )

    add("/v1/evaluate/flags", everything, "POST")
    add("/v1/events", events, "GET")
    add(f"/{_FLAG}<external_oms_anything:key>", one, "POST")
    add("/<external_oms_anything:rest>", elsewhere, "GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
    return mounted


def _admitted(parts: Parts) -> Identity:
    """Who asks, having asked not too often.

    Raises:
        Problem: 401, 403 or 429.
    """
    who = demand(Role.VIEWER)
    parts.limits.take_here("evaluate", who.name, per_minute=parts.settings.evaluations_per_minute)
    return who


def _context() -> dict[str, JSON]:
    """The context of this request; one that is left out is empty, as some clients do.

    Raises:
        Problem: 413, 415, or 400: no JSON object, or a context that is none.
    """
    body = raw_body(request, max_bytes=BODY_BYTES)
    demand_json_type(request)
    context = json_object(body).get("context", {})
    if not isinstance(context, dict):
        raise Refusal(400, ErrorCode.INVALID_CONTEXT, "`context` must be a JSON object")
    if not isinstance(context.get("targetingKey", ""), str):
        raise Refusal(400, ErrorCode.INVALID_CONTEXT, "`context.targetingKey` must be text")
    return context


class _Evaluation:
    """One flag at a time."""

    def __init__(self, parts: Parts) -> None:
        self._provider = parts.provider
        self._cache = parts.service.cache
        self._evaluated = parts.evaluated
        self._made: dict[object, _Made] = {}

    def answer(self, key: str) -> Response:
        context = _context()
        tenant = context.get("tenant")
        asked = EvaluationContext(attributes={"tenant": tenant}) if tenant is not None else None  # type: ignore[dict-item]  # any JSON; the provider refuses what is no tenant's name
        try:
            details = self._provider.resolve_boolean_details(key, False, asked)
        except GeneralError:
            name = self._cache.tenant_of(tenant)
            self._evaluated.send(Evaluated(name, Reason.ERROR.value, Via.OFREP))
            return Response(compact(unserved(self._cache.peek(name))), content_type=_JSON)
        made = self._made.get(tenant)
        if made is None or made.details is not details:
            told = Evaluated(str(details.flag_metadata["tenant"]), str(details.reason), Via.OFREP)
            # resolved, so the tenant is a configured one: there are no more of them than of those
            made = self._made[tenant] = _Made(details, compact(evaluated(details)), told)
        self._evaluated.send(made.told)
        return Response(made.body, content_type=_JSON)


class _Made(NamedTuple):
    """What is answered, and told, as long as the provider gives these very details."""

    details: FlagResolutionDetails[bool]
    body: bytes
    told: Evaluated


class _Bulk:
    """All flags, which is one, and the stream of events that says when to ask for them again."""

    def __init__(self, parts: Parts, tickets: Tickets) -> None:
        self._parts = parts
        self._cache = parts.service.cache
        self._tickets = tickets

    def answer(self, who: Identity) -> Response:
        tenant = _context().get("tenant")
        try:
            name = self._cache.tenant_of(tenant)
        except TenantError as error:
            flags = (failed(ErrorCode.INVALID_CONTEXT, str(error), key=FLAG_KEY),)
            return self._shaped(configuration_of(flags), {}, etag=f'"{configuration_of(flags).tag}"')
        now = self._caught_up(name)
        self._parts.evaluated.send(Evaluated(name, reason_of(now.flags[0]).value, Via.OFREP))
        ticket = self._tickets.ticket(who)
        address = stream_address(self._stream_path(), tenant=name, since=now.tag, ticket=ticket)
        streams: JSON = [{"type": "sse", "endpoint": {"requestUri": address}}]
        return self._shaped(now, {"eventStreams": streams}, etag=self._etag(now, ticket))

    @staticmethod
    def _shaped(now: Configuration, more: Flag, *, etag: str) -> Response:
        if request.if_none_match.contains_weak(etag.strip('"')):
            return Response(status=HTTPStatus.NOT_MODIFIED, headers={"ETag": etag})
        shape: Flag = {"flags": list(now.flags), **more}
        return Response(compact(shape), content_type=_JSON, headers={"ETag": etag})

    def stream(self, who: Identity) -> Response:
        try:
            tenant = self._cache.tenant_of(request.args.get("tenant"))
        except TenantError as error:
            raise Refusal(400, ErrorCode.INVALID_CONTEXT, str(error)) from error
        ticket = self._tickets.ticket(who)
        return refetch_stream(
            self._parts.hub,
            self._cache,
            self._parts.settings,
            tenant=tenant,
            known=request.headers.get("Last-Event-ID") or request.args.get("since"),
            etag_of=lambda now: self._etag(now, ticket),
        )

    def _stream_path(self) -> str:
        """The stream's path as the client sees it; a proxy that takes a prefix off says so in X-Forwarded-Prefix.

        Anybody may send that header: it forms a path in an answer to who sent it, on the host that was asked.
        """
        before = request.headers.get("X-Forwarded-Prefix", "").rstrip("/")
        outside = before if _PREFIX.fullmatch(before) else ""
        return f"{outside}{request.root_path.rstrip('/')}{self._parts.url_prefix}{EVENTS_PATH}"

    @staticmethod
    def _etag(now: Configuration, ticket: str | None) -> str:
        """A strong validator: other flags or another ticket, another tag; so nobody keeps a ticket that has ended."""
        seal = "" if ticket is None else "." + hashlib.sha256(ticket.encode()).hexdigest()[:8]
        return f'"{now.tag}{seal}"'

    def _configuration(self, tenant: str) -> Configuration:
        evaluation = self._cache.lookup(tenant)
        return configuration_of((flag_of(evaluation, self._parts.settings.when_expired),), evaluation)

    def _caught_up(self, tenant: str) -> Configuration:
        """What the flags say; where the request knows of something newer, after waiting a moment for it."""
        now = self._configuration(tenant)
        wanted = request.args.get("flagConfigEtag", "").removeprefix("W/").strip('"').partition(".")[0]
        since = instant_of(request.args.get("flagConfigLastModified"))
        if not wanted or since is None or wanted == now.tag or now.read_at > since:
            return now
        clock = self._parts.service.clock
        until = clock.monotonic() + CATCH_UP_SECONDS
        news = threading.Event()
        forget = self._cache.changes.subscribe(lambda _: news.set())
        try:
            while now.tag != wanted and now.read_at <= since and news.wait(max(0.0, until - clock.monotonic())):
                news.clear()
                now = self._configuration(tenant)
        finally:
            forget()
        return now


def _refused(error: Exception) -> Response:
    """Any error of these routes in the protocol's shape."""
    known = _known(error)
    problem = problem_of(known)
    code = known.error_code if isinstance(known, Refusal) else ErrorCode.GENERAL
    if problem.status == HTTPStatus.BAD_REQUEST and not isinstance(known, Refusal):
        code = ErrorCode.PARSE_ERROR
    given = request.view_args or {}
    rest = str(given.get("rest", ""))
    key = given.get("key", rest.removeprefix(_FLAG) if rest.startswith(_FLAG) else None)
    headers = {name: value for name, value in problem.answer.headers if name not in {"Content-Type", "Content-Length"}}
    return Response(compact(failed(code, problem.detail, key=key)), problem.status, headers, content_type=_JSON)


def _known(error: Exception) -> Exception:
    match error:
        case FlagNotFoundError():
            return Refusal(404, ErrorCode.FLAG_NOT_FOUND, f"this server evaluates {FLAG_KEY} only")
        case InvalidContextError() | TenantError():
            detail = error.error_message if isinstance(error, InvalidContextError) else str(error)
            return Refusal(400, ErrorCode.INVALID_CONTEXT, detail or "the context is not valid")
        case ProviderNotReadyError():
            return Problem(503, "this process is shutting down; ask again", headers={"Retry-After": "1"})
    return error
