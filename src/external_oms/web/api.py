"""The JSON API: the state of each tenant, the history, the switch, the event stream, and the description of it all."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache, partial
from importlib.resources import files
from typing import Any, TypedDict
from urllib.parse import urlencode

from flask import Blueprint, Flask, Response, current_app, g, jsonify, request, session

from external_oms.cache import ChangeKind
from external_oms.config import format_instant
from external_oms.errors import ExternalOMSError
from external_oms.policy import State
from external_oms.problems import JSON, Problem, check_json_type, json_object
from external_oms.records import Cause, Event
from external_oms.web.access import is_session_valid, require_role
from external_oms.web.errors import read_body
from external_oms.web.keys import Role, Via
from external_oms.web.sse import Message, stream_response
from external_oms.web.state import current_oms, get_oms

__all__ = [
    "CSV_TYPE",
    "HISTORY_LIMIT",
    "MAX_DIGITS",
    "REASON_LENGTH",
    "HistoryFilter",
    "bp",
    "csv_header",
    "description",
    "documented",
    "event_csv",
    "event_shape",
    "history_filter",
    "read_now",
    "routed_paths",
    "state_shape",
    "write_enabled",
]

HISTORY_LIMIT = 500
"""The most rows of one page of history."""

REASON_LENGTH = 500
"""The longest reason, in characters."""

_PAGE = 100
_ACTOR_LENGTH = 128
_BODY_BYTES = 8192
MAX_DIGITS = 18
"""Any number of so many digits fits a store's 64-bit integer."""
_CONVERTER = re.compile(r"<(?:[^:<>]+:)?([^<>]+)>")

bp = Blueprint("api", __name__)

logger = logging.getLogger("external_oms.web")


@bp.get("/api/v1/tenants")
@require_role(Role.VIEWER)
def tenants() -> Response:
    """Return the state of every tenant."""
    return jsonify({"tenants": [state_shape(current_oms.cache.state(name)) for name in current_oms.cache.tenants]})


@bp.get("/api/v1/tenants/<tenant>")
@require_role(Role.VIEWER)
def tenant(tenant: str) -> Response:
    """Return the state of one tenant."""
    return jsonify(state_shape(current_oms.cache.state(current_oms.cache.tenant_of(tenant))))


@bp.put("/api/v1/tenants/<tenant>")
@require_role(Role.ADMIN)
def switch(tenant: str) -> Response:
    """Write the flag."""
    body = read_body(_BODY_BYTES)
    check_json_type(request.content_type or "")
    enabled, reason = _switch_in(json_object(body))
    return jsonify(state_shape(write_enabled(current_oms.cache.tenant_of(tenant), enabled=enabled, reason=reason)))


@bp.post("/api/v1/tenants/<tenant>/refresh")
@require_role(Role.OPERATOR)
def refresh(tenant: str) -> Response:
    """Have the config API read now."""
    return jsonify(state_shape(read_now(current_oms.cache.tenant_of(tenant))))


@bp.get("/api/v1/history")
@require_role(Role.VIEWER)
def history() -> Response:
    """Return a page of history, newest first."""
    limit = _number("limit", least=1, most=HISTORY_LIMIT) or _PAGE
    before = _number("before", least=1, most=10**MAX_DIGITS)
    form = request.args.get("format", "json")
    if form not in {"json", "csv"}:
        raise Problem(400, "`format` must be json or csv")
    page = current_oms.operations.search_history(**history_filter(), limit=limit, before=before)
    if form == "json":
        return jsonify({"events": [event_shape(event) for event in page.events], "next": page.next})
    response = Response([csv_header(), *map(event_csv, page.events)], content_type=CSV_TYPE)
    if page.next is not None:
        query = {**request.args, "before": page.next}
        response.headers["Link"] = f'<{request.script_root}{request.path}?{urlencode(query)}>; rel="next"'
    return response


@bp.get("/api/v1/events")
@require_role(Role.VIEWER)
def events() -> Response:
    """Stream the states: each at once, then every change."""
    oms = get_oms()
    named = request.args.get("tenant")
    wanted = oms.cache.tenants if named is None else (oms.cache.tenant_of(named),)

    def changed(name: str, kind: ChangeKind | None = None) -> Iterable[Message]:
        if name in wanted:
            state = oms.cache.state(name)
            data = {"change": kind.value if kind else None, "state": state_shape(state)}
            yield Message("state", json.dumps(data), id=str(state.generation))

    is_valid = None
    if g.identity.via is Via.SESSION:
        until = session["at"] + oms.settings.session_seconds
        is_valid = partial(is_session_valid, oms, str(session["id"]), g.identity.fingerprint, until)
    return stream_response(
        oms.broker,
        changed,
        first=lambda: (message for name in wanted for message in changed(name)),
        owner=g.identity.name,
        is_valid=is_valid,
    )


@bp.get("/openapi.json")
def openapi() -> Response:
    """Return the description of the routes of this application."""
    return jsonify(description(current_app))


# -- what the dashboard's forms do as well -----------------------------------------------------------------------------


def write_enabled(tenant: str, *, enabled: bool, reason: str) -> State:
    """Write the flag for the caller in `g.identity`, and log it.

    Raises:
        Problem: 429.
        WriteError: As `Operations.set_enabled`, and ReadError.
    """
    name, value = g.identity.name, "on" if enabled else "off"
    current_oms.limits.hit("switch", name, per_minute=current_oms.settings.writes_per_minute)
    try:
        state = current_oms.operations.set_enabled(tenant, enabled=enabled, actor=name, reason=reason)
    except ExternalOMSError as error:
        logger.warning("tenant %s: %s could not switch it %s: %s", tenant, name, value, error)
        raise
    logger.warning("tenant %s: %s switched it %s", tenant, name, value)
    return state


def read_now(tenant: str) -> State:
    """Have the config API read for the caller in `g.identity`.

    Raises:
        Problem: 429.
        ReadError: The read failed.
    """
    current_oms.limits.hit("refresh", g.identity.name, per_minute=current_oms.settings.writes_per_minute)
    return current_oms.operations.refresh(tenant)


# -- shapes ------------------------------------------------------------------------------------------------------------


def _instant(moment: datetime | None) -> str | None:
    return None if moment is None else format_instant(moment)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def state_shape(state: State) -> dict[str, JSON]:
    """Return a tenant's state as JSON: instants in RFC 3339, durations in float seconds to the millisecond."""
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
    """Return a row of history as JSON."""
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


_COLUMNS = ("id", "at", "tenant", "cause", "enabled", "actor", "delivery_id", "latency_seconds", "detail")

CSV_TYPE = "text/csv; charset=utf-8; header=present"


def csv_header() -> str:
    """Return the first line of a history in CSV."""
    return _csv_line(_COLUMNS)


def event_csv(event: Event) -> str:
    """Return a row of history as a line of CSV (RFC 4180)."""
    shape = event_shape(event)
    return _csv_line(["" if shape[name] is None else _csv_cell(shape[name]) for name in _COLUMNS])


def _csv_line(cells: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerow(cells)
    return buffer.getvalue()


def _csv_cell(value: JSON) -> str:
    """Return the text of a cell. A spreadsheet would run text that looks like a formula, so an apostrophe precedes it.

    Source: OWASP, "CSV Injection".
    """
    if not isinstance(value, str):
        return json.dumps(value)
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else value


class HistoryFilter(TypedDict):
    """Which rows of history a request asks for, as `Operations.search_history` takes it."""

    tenant: str | None
    cause: Cause | None
    actor: str


def history_filter() -> HistoryFilter:
    """Return the filter in the query of this request.

    Raises:
        TenantError: The tenant is not configured.
        Problem: 400: the cause is none, or the actor is too long.
    """
    tenant, cause, actor = (request.args.get(name) for name in ("tenant", "cause", "actor"))
    if cause and cause not in set(Cause):
        raise Problem(400, f"`cause` must be one of {', '.join(Cause)}")
    if actor and len(actor) > _ACTOR_LENGTH:
        raise Problem(400, f"`actor` must have {_ACTOR_LENGTH} characters at most")
    return HistoryFilter(
        tenant=None if tenant is None else current_oms.cache.tenant_of(tenant),
        cause=Cause(cause) if cause else None,
        actor=actor or "",
    )


def _switch_in(given: Mapping[str, JSON]) -> tuple[bool, str]:
    """Return value and reason of a body `{"enabled": bool, "reason": string?}`.

    Raises:
        Problem: 400: it is not of that form.
    """
    enabled, reason = given.get("enabled"), given.get("reason", "")
    if not isinstance(enabled, bool):
        raise Problem(400, "`enabled` must be true or false")
    if not isinstance(reason, str) or len(reason) > REASON_LENGTH or not reason.isprintable():
        raise Problem(400, f"`reason` must be one line of text, {REASON_LENGTH} characters at most")
    if set(given) - {"enabled", "reason"}:
        raise Problem(400, "the body has names other than `enabled` and `reason`")
    return enabled, reason


def _number(name: str, *, least: int, most: int) -> int | None:
    """Return a whole number of the query; None where it is not given.

    Raises:
        Problem: 400: it is not one, or out of bounds.
    """
    given = request.args.get(name)
    if given is None:
        return None
    if not (given.isascii() and given.isdigit() and len(given) <= MAX_DIGITS and least <= int(given) <= most):
        raise Problem(400, f"`{name}` must be a whole number from {least} to {most}")
    return int(given)


# -- the description ---------------------------------------------------------------------------------------------------


@cache
def _description() -> str:
    return files("external_oms.web").joinpath("openapi.json").read_text(encoding="utf-8")


def routed_paths(app: Flask) -> frozenset[str]:
    """Return the paths of an application's routes as OpenAPI writes them."""
    return frozenset(_CONVERTER.sub(r"{\1}", rule.rule) for rule in app.url_map.iter_rules())


def documented() -> dict[str, Any]:
    """Return the whole OpenAPI document, a new one each time."""
    document: dict[str, Any] = json.loads(_description())
    return document


def description(app: Flask) -> dict[str, Any]:
    """Return the OpenAPI document, with the routes that the application has."""
    document = documented()
    there = routed_paths(app)
    document["paths"] = {path: item for path, item in document["paths"].items() if path in there}
    document["servers"] = [{"url": request.script_root or "/"}]
    return document
