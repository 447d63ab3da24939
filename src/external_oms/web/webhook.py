"""A delivery is a hint, never a value: genuine, it invalidates and has the API read; anything else changes nothing.

The checks stand in this order: size, authenticity (over the raw bytes), content type, JSON, tenant. So who cannot sign
learns nothing but 401, always the same one.

Source: Standard Webhooks 1.0.0; the platform's envelope `{"tenant", "name", "published_at", "payload"}`.
"""

from __future__ import annotations

import logging
import re
from http import HTTPStatus

from flask import Blueprint, Request, Response, jsonify, request

from external_oms import signature
from external_oms.errors import ExternalOMSError, SignatureError
from external_oms.operations import DeliveryResult
from external_oms.web.bodies import demand_json_type, json_object, raw_body
from external_oms.web.parts import Parts
from external_oms.web.problems import Problem, problem_of, resource
from external_oms.web.shapes import JSON

__all__ = ["ACTOR", "PATH", "blueprint"]

PATH = "/webhooks/external-oms"

ACTOR = "webhook"
"""Who stands in the history for a delivery."""

_ID = re.compile(r"[!-~]{1,256}")
_UNSAFE_IN_LOG = re.compile(r"[^A-Za-z0-9._:@-]")
_TENANT = re.compile(r"[a-z0-9-]{1,63}")
_SHOWN_ID_LENGTH = 64

_logger = logging.getLogger(__name__)


def blueprint(parts: Parts) -> Blueprint:
    """The webhook of one app."""
    mounted = Blueprint("webhook", __name__)

    def deliver() -> tuple[Response, int]:
        try:
            result = _received(parts, request)
        except (Problem, ExternalOMSError) as error:
            refused = problem_of(error)
            why = error.__cause__ if isinstance(error.__cause__, SignatureError) else refused.detail
            _log(refused.status, request, str(why))
            parts.refused.send(refused.kind)
            if refused is error:
                raise
            raise refused from error
        status = HTTPStatus.OK if result.refreshed or result.duplicate else HTTPStatus.ACCEPTED
        _log(
            status,
            request,
            "duplicate" if result.duplicate else f"{result.tenant} is at generation {result.generation}",
        )
        return jsonify(_shape(result)), status

    resource(mounted, PATH, POST=deliver)
    return mounted


def _received(parts: Parts, asked: Request) -> DeliveryResult:
    """Take a delivery, and return what came of it.

    Only what was taken and is no duplicate counts toward the tenant's limit: replays must not keep out genuine
    deliveries, and the sender of a delivery that the store could not take sends it again.
    """
    body = raw_body(asked, max_bytes=parts.settings.webhook_max_bytes)
    delivery_id = _genuine(parts, asked, body)
    demand_json_type(asked)
    tenant = parts.service.cache.tenant_of(_tenant_in(json_object(body)))
    per_minute = parts.settings.webhook_per_minute
    parts.limits.check("delivery", tenant, per_minute=per_minute)
    result = parts.service.operations.deliver(tenant, delivery_id=delivery_id, actor=ACTOR)
    if not result.duplicate:
        parts.limits.count("delivery", tenant, per_minute=per_minute)
    return result


def _genuine(parts: Parts, asked: Request, body: bytes) -> str | None:
    """The delivery's id, once it is known to be genuine; None where it has none.

    Raises:
        Problem: 401, one and the same for every reason; 429 for an address that sends too many of these.
    """
    settings = parts.settings
    if not (settings.webhook_secrets or settings.webhook_api_keys):  # then the settings say `insecure`, see mount
        return _sane_id(asked)
    signed = _signed_id(parts, asked, body)
    keys = [key.get_secret_value() for key in settings.webhook_api_keys]
    keyed = signature.bearer_matches(asked.headers.get("Authorization"), keys)  # whatever the signature said
    if isinstance(signed, str):
        return signed
    if keyed:
        return _sane_id(asked)
    parts.limits.take("refused", asked.remote_addr or "", per_minute=settings.webhook_per_minute)
    challenge = {"WWW-Authenticate": 'Bearer realm="external-oms"'}
    raise Problem(401, "the delivery is not genuine", headers=challenge) from signed


def _signed_id(parts: Parts, asked: Request, body: bytes) -> str | SignatureError:
    try:
        return signature.verify(
            body,
            dict(asked.headers),
            secrets=[secret.get_secret_value() for secret in parts.settings.webhook_secrets],
            tolerance_seconds=parts.settings.webhook_tolerance_seconds,
            now_wall=parts.service.clock.wall(),
        )
    except SignatureError as error:
        return error


def _sane_id(asked: Request) -> str | None:
    given = asked.headers.get("webhook-id", "")
    return given if _ID.fullmatch(given) else None


def _tenant_in(delivery: dict[str, JSON]) -> str | None:
    """The tenant that a delivery names, in either envelope; None where it names none.

    Raises:
        Problem: 400: what stands in its place is no tenant's name, or the two places differ.
    """
    inner = delivery.get("data", {})
    if not isinstance(inner, dict):
        if "tenant" not in delivery:
            raise Problem(400, "`data` must be a JSON object")
        inner = {}
    named = [holder["tenant"] for holder in (delivery, inner) if "tenant" in holder]
    for name in named:
        if not isinstance(name, str) or not _TENANT.fullmatch(name):
            raise Problem(400, "`tenant` must be a tenant's name: [a-z0-9-], 1 to 63 characters")
        if name != named[0]:
            raise Problem(400, "`tenant` and `data.tenant` differ")
    return str(named[0]) if named else None


def _shape(result: DeliveryResult) -> dict[str, JSON]:
    return {
        "tenant": result.tenant,
        "generation": result.generation,
        "duplicate": result.duplicate,
        "refreshed": result.refreshed,
        "enabled": result.enabled,
    }


def _log(status: int, asked: Request, what: str) -> None:
    given = asked.headers.get("webhook-id", "-")
    shown = _UNSAFE_IN_LOG.sub("?", given[:_SHOWN_ID_LENGTH])
    level = logging.INFO if status < HTTPStatus.BAD_REQUEST else logging.WARNING
    _logger.log(level, "delivery %s: %d, %s", shown, status, what)
