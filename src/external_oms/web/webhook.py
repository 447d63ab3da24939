"""The webhook as a Flask blueprint; `external_oms.webhook` decides."""

from __future__ import annotations

from flask import Blueprint, Response, current_app, request

from external_oms.problems import Problem
from external_oms.web.access import require_loopback
from external_oms.web.errors import read_body
from external_oms.web.state import get_oms

__all__ = ["bp"]

bp = Blueprint("external_oms_webhook", __name__)


@bp.post("/webhooks/external-oms")
def deliver() -> Response:
    """Take a delivery."""
    oms = get_oms()
    if oms.store.kind == "memory" and request.environ.get("wsgi.multiprocess"):
        oms.warn_once(
            "this server has several processes, and with store = memory:// a delivery reaches only the one that takes "
            "it; the others serve the old value until its ttl_seconds (%g) have passed. Set store to "
            "sqlite:////path/state.db, which all processes of a host share, or to redis://",
            oms.settings.ttl_seconds,
        )
    try:
        if oms.settings.insecure:
            require_loopback()
        body = read_body(oms.webhook.max_bytes)
    except Problem as problem:
        response = oms.webhook.refuse(problem)
    else:
        response = oms.webhook.receive(dict(request.headers), body, address=request.remote_addr or "")
    return Response(response.body, response.status, dict(response.headers) | {"X-Content-Type-Options": "nosniff"})


@bp.url_value_preprocessor
def exempt_from_csrf(endpoint: str | None, values: object) -> None:  # noqa: ARG001 - the form of Flask
    """Exempt the webhook from the application's CSRFProtect, which runs after this and for this route only.

    A delivery has a signature in the place of a form token.
    """
    guard = current_app.extensions.get("csrf")
    if guard is not None:
        guard.exempt(bp)
