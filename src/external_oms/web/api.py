"""The JSON API: what is known of each tenant, what happened, and the switch. A view reads, asks, shapes; no more."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from flask import Blueprint, Request, Response, jsonify, request

from external_oms.cache import ChangeKind
from external_oms.web.access import Role, demand, require
from external_oms.web.bodies import demand_json_type, json_object, raw_body
from external_oms.web.parts import Parts
from external_oms.web.problems import Problem, resource
from external_oms.web.shapes import event_shape, state_shape
from external_oms.web.streams import Message, stream_response

__all__ = ["HISTORY_LIMIT", "REASON_LENGTH", "Switch", "blueprint", "switch_asked"]

HISTORY_LIMIT = 500
"""The most rows of one page."""

REASON_LENGTH = 500
"""The longest reason, in characters: a sentence or a ticket's address, not a document."""

_PAGE = 100
_BODY_BYTES = 8192
_DIGITS = 18  # any number of so many digits fits a store's 64-bit integer


@dataclass(frozen=True, slots=True)
class Switch:
    """What somebody asks a tenant's flag to become, and why."""

    enabled: bool
    reason: str


def switch_asked(asked: Request) -> Switch:
    """The switch that a request's body asks for.

    Raises:
        Problem: 413, 415, or 400: not `{"enabled": bool, "reason": string?}` and nothing else.
    """
    body = raw_body(asked, max_bytes=_BODY_BYTES)
    demand_json_type(asked)
    given = json_object(body)
    enabled, reason = given.get("enabled"), given.get("reason", "")
    if not isinstance(enabled, bool):
        raise Problem(400, "`enabled` must be true or false")
    if not isinstance(reason, str) or len(reason) > REASON_LENGTH or not reason.isprintable():
        raise Problem(400, f"`reason` must be one line of text, {REASON_LENGTH} characters at most")
    unknown = sorted(set(given) - {"enabled", "reason"})
    if unknown:
        raise Problem(400, "the body holds names other than `enabled` and `reason`")
    return Switch(enabled, reason)


def blueprint(parts: Parts) -> Blueprint:
    """The JSON API of one app."""
    mounted = Blueprint("api", __name__, url_prefix="/api/v1")
    cache, operations = parts.service.cache, parts.service.operations

    @require(Role.VIEWER)
    def tenants() -> Response:
        return jsonify({"tenants": [state_shape(cache.state(name)) for name in cache.tenants]})

    @require(Role.VIEWER)
    def tenant(tenant: str) -> Response:
        return jsonify(state_shape(cache.state(cache.tenant_of(tenant))))

    def switch(tenant: str) -> Response:
        who = demand(Role.ADMIN)
        parts.limits.take("switch", who.name, per_minute=parts.settings.writes_per_minute)
        asked = switch_asked(request)
        name = cache.tenant_of(tenant)
        return jsonify(
            state_shape(operations.set_enabled(name, enabled=asked.enabled, actor=who.name, reason=asked.reason))
        )

    def refresh(tenant: str) -> Response:
        who = demand(Role.OPERATOR)
        parts.limits.take("refresh", who.name, per_minute=parts.settings.writes_per_minute)
        return jsonify(state_shape(operations.refresh(cache.tenant_of(tenant))))

    @require(Role.VIEWER)
    def history() -> Response:
        named = request.args.get("tenant")
        limit = _number("limit", default=_PAGE, least=1, most=HISTORY_LIMIT)
        before = _number("before", default=None, least=1, most=10**_DIGITS)
        found = operations.history(
            tenant=None if named is None else cache.tenant_of(named), limit=(limit or _PAGE) + 1, before=before
        )
        page = found[:limit]
        following = page[-1].id if len(found) > len(page) else None
        return jsonify({"events": [event_shape(event) for event in page], "next": following})

    def changed(name: str, kind: ChangeKind | None = None) -> Iterable[Message]:
        state = cache.state(name)
        data = {"change": kind.value if kind else None, "state": state_shape(state)}
        yield Message("state", json.dumps(data), id=str(state.generation))

    @require(Role.VIEWER)
    def events() -> Response:
        named = request.args.get("tenant")
        wanted = cache.tenants if named is None else (cache.tenant_of(named),)

        def news(name: str, kind: ChangeKind) -> Iterable[Message]:
            return changed(name, kind) if named is None or name == named else ()

        return stream_response(parts.hub, news, first=lambda: (message for name in wanted for message in changed(name)))

    resource(mounted, "/tenants", GET=tenants)
    resource(mounted, "/tenants/<tenant>", GET=tenant, PUT=switch)
    resource(mounted, "/tenants/<tenant>/refresh", POST=refresh)
    resource(mounted, "/history", GET=history)
    resource(mounted, "/events", GET=events)
    return mounted


def _number(name: str, *, default: int | None, least: int, most: int) -> int | None:
    """A whole number out of the query.

    Raises:
        Problem: 400: it is not one, or out of bounds.
    """
    given = request.args.get(name)
    if given is None:
        return default
    if not (given.isascii() and given.isdigit() and len(given) <= _DIGITS and least <= int(given) <= most):
        raise Problem(400, f"`{name}` must be a whole number from {least} to {most}")
    return int(given)
