"""Is this delivery genuine? Every configured key is tried, in constant time, whatever the sender sent.

Pure: the moment is an argument. Source: Standard Webhooks 1.0 (`webhook-id`, `webhook-timestamp`, `webhook-signature`;
secrets are `whsec_` and 24 to 64 bytes in base64).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from external_oms.errors import SignatureError

__all__ = ["bearer_matches", "check_secret", "sign", "verify"]

_SECRET_PREFIX = "whsec_"  # noqa: S105 - the public prefix of every secret
_SECRET_BYTES = range(24, 65)

_ID = re.compile(r"[\x21-\x7e]{1,256}")
_TIMESTAMP = re.compile(r"0|[1-9][0-9]{0,10}")
"""Whole seconds since the epoch, in the one form that is signed: without zeros before it. Eleven digits reach the year
5138, and `datetime` still takes them."""

_MAX_SIGNATURES_LENGTH = 4096
"""Characters of `webhook-signature`: a rotation sends two signatures of 47; this leaves room for eighty."""


def verify(
    body: bytes,
    headers: Mapping[str, str],
    *,
    secrets: Sequence[str],
    tolerance_seconds: float,
    now_wall: float,
) -> str:
    """The id of a genuine delivery.

    Args:
        body: The raw body, as received; its size is bounded by the caller.
        headers: The request's headers; their case does not matter.
        secrets: The `whsec_…` secrets in force; several while one replaces another. Each is tried.
        tolerance_seconds: How far the delivery's timestamp may lie from now, either way; > 0.
        now_wall: The present moment, seconds since the Unix epoch.

    Raises:
        SignatureError: A header is missing, malformed or too long, the timestamp is outside the tolerance, the body is
            not UTF-8, a secret is malformed, or no secret made any of the signatures. Nothing else is raised.
    """
    delivery_id = _header(headers, "webhook-id")
    if not _ID.fullmatch(delivery_id):
        raise SignatureError("webhook-id is not 1 to 256 printable ASCII characters without spaces")
    stamp = _header(headers, "webhook-timestamp")
    if not _TIMESTAMP.fullmatch(stamp):
        raise SignatureError("webhook-timestamp is not a number of whole seconds")
    if abs(int(stamp) - now_wall) > tolerance_seconds:
        raise SignatureError(f"webhook-timestamp is more than {tolerance_seconds:g} s from now; is a clock wrong?")
    shown = _header(headers, "webhook-signature")
    if len(shown) > _MAX_SIGNATURES_LENGTH:
        raise SignatureError(f"webhook-signature is longer than {_MAX_SIGNATURES_LENGTH} characters")
    # Text that is not ASCII was never base64: its stand-in compares unequal, where compare_digest on text would raise.
    candidates = [part.encode("ascii", "backslashreplace") for part in shown.split(" ")]
    genuine = False
    for secret in secrets:
        expected = _signature(body, secret, delivery_id, int(stamp)).encode("ascii")
        for candidate in candidates:
            genuine |= hmac.compare_digest(expected, candidate)
    if not genuine:
        raise SignatureError("no configured secret made any of the signatures")
    return delivery_id


def sign(body: bytes, *, secret: str, delivery_id: str, at_wall: float) -> dict[str, str]:
    """The three headers of a genuine delivery.

    Args:
        body: The body to be sent, UTF-8.
        secret: A `whsec_…` secret.
        delivery_id: The id that stays the same when the delivery is repeated; printable ASCII, at most 256 characters.
        at_wall: The moment of sending, seconds since the Unix epoch, before the year 5138; fractions are cut off.

    Raises:
        SignatureError: The secret, the id or the moment is malformed, or the body is not UTF-8.
    """
    if not _ID.fullmatch(delivery_id):
        raise SignatureError("the delivery id is not 1 to 256 printable ASCII characters without spaces")
    if not 0 <= at_wall < 10**11:  # also false for NaN
        raise SignatureError("the moment of sending is not between 1970 and 5138")
    return {
        "webhook-id": delivery_id,
        "webhook-timestamp": str(int(at_wall)),
        "webhook-signature": _signature(body, secret, delivery_id, int(at_wall)),
    }


def bearer_matches(header: str | None, keys: Sequence[str]) -> bool:
    """Whether an Authorization header shows one of the keys as a bearer; each key is compared, in constant time.

    Args:
        header: The header's text, or None where there is none.
        keys: The keys in force. An empty one matches nothing.
    """
    scheme, _, shown = (header or "").partition(" ")
    digest = _digest(shown.strip())
    matches = False
    for key in keys:
        matches |= hmac.compare_digest(digest, _digest(key)) and key != ""
    return matches and scheme.lower() == "bearer"


def check_secret(secret: str) -> None:
    """Refuse a configured secret that is not `whsec_` and 24 to 64 bytes in base64.

    Raises:
        SignatureError: It is not one; the message says what is expected and nothing of what was given.
    """
    expected = "must be whsec_ followed by 24 to 64 bytes in base64"
    if not secret.startswith(_SECRET_PREFIX):
        raise SignatureError(expected)
    encoded = secret.removeprefix(_SECRET_PREFIX).rstrip("=")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):  # from neither: both may quote the secret
        raise SignatureError(expected) from None
    if len(key) not in _SECRET_BYTES:
        raise SignatureError(expected)


def _header(headers: Mapping[str, str], name: str) -> str:
    for given, value in headers.items():
        if given.lower() == name:
            return value
    raise SignatureError(f"{name} is missing; the delivery is not signed")


def _digest(text: str) -> bytes:
    """The text at a fixed length, so that a comparison does not tell how long a key is."""
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()


def _signature(body: bytes, secret: str, delivery_id: str, seconds: int) -> str:
    """`v1,` and the base64 of the HMAC, by the library; its own `verify` knows one secret and one tolerance only."""
    from standardwebhooks import Webhook  # noqa: PLC0415 - an extra's library: the provider alone runs without it

    check_secret(secret)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SignatureError("the body is not UTF-8") from error
    return Webhook(secret).sign(delivery_id, datetime.fromtimestamp(seconds, tz=UTC), text)
