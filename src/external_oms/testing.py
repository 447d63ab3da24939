"""For users' tests: an emulator of the config API, signed deliveries, and the flag set to what a test needs."""

from __future__ import annotations

import time
import uuid

from external_oms.emulator import ConfigAPIEmulator, Fault, RecordedRequest
from external_oms.override import override_enabled
from external_oms.signature import sign

__all__ = ["ConfigAPIEmulator", "Fault", "RecordedRequest", "override_enabled", "sign_delivery"]


def sign_delivery(
    body: bytes | str, secret: str, *, delivery_id: str | None = None, at: float | None = None
) -> dict[str, str]:
    """Return the headers of a genuine delivery by Standard Webhooks, its content type included.

    Args:
        body: The body, as it will be sent.
        secret: A `whsec_…` secret.
        delivery_id: The `webhook-id`, the same for a repeated delivery; None generates one.
        at: The time of sending, in seconds since the Unix epoch; None: now.

    Raises:
        SignatureError: The secret, the id or the time is malformed.
    """
    raw = body.encode("utf-8") if isinstance(body, str) else body
    headers = sign(
        raw,
        secret=secret,
        delivery_id=delivery_id or f"msg_{uuid.uuid4().hex}",
        at_wall=time.time() if at is None else at,
    )
    return {"content-type": "application/json", **headers}
