"""Sign deliveries and verify their signatures, in constant time over every configured secret; pure.

Source: Standard Webhooks 1.0 (`webhook-id`, `webhook-timestamp`, `webhook-signature`; secrets are `whsec_` and 24 to 64
bytes in base64).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from external_oms.errors import SignatureError

__all__ = ["Verified", "check_secret", "is_delivery_id", "matching_bearer", "sign", "verify"]

_SECRET_PREFIX = "whsec_"  # noqa: S105 - the public prefix of every secret
_SECRET_BYTES = range(24, 65)

_ID = re.compile(r"[\x21-\x7e]{1,256}")
_TIMESTAMP = re.compile(r"0|[1-9][0-9]{0,10}")
"""Whole seconds since the epoch, in the one form that is signed: without zeros before it. Eleven digits reach the year
5138, and `datetime` still takes them."""

_MAX_SIGNATURES_LENGTH = 4096
"""Characters of `webhook-signature`: a rotation sends two signatures of 47; this leaves room for eighty."""


def is_delivery_id(text: str) -> bool:
    """Return whether a text can be a delivery id: 1 to 256 printable ASCII characters without spaces."""
    return _ID.fullmatch(text) is not None


class Verified(NamedTuple):
    """A genuine delivery.

    Attributes:
        delivery_id: Its id.
        entry: The number of the secret that signed it, from 1.
    """

    delivery_id: str
    entry: int


def verify(
    body: bytes,
    headers: Mapping[str, str],
    *,
    secrets: Sequence[str],
    tolerance_seconds: float,
    now_wall: float,
) -> Verified:
    """Return the id of a genuine delivery, and which secret signed it.

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
    if not is_delivery_id(delivery_id):
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
    entry = 0
    for number, secret in enumerate(secrets, start=1):
        expected = _signature(body, secret, delivery_id, stamp).encode("ascii")
        for candidate in candidates:
            if hmac.compare_digest(expected, candidate):
                entry = entry or number
    if not entry:
        raise SignatureError("no configured secret made any of the signatures")
    return Verified(delivery_id, entry)


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
    if not is_delivery_id(delivery_id):
        raise SignatureError("the delivery id is not 1 to 256 printable ASCII characters without spaces")
    if not 0 <= at_wall < 10**11:  # also false for NaN
        raise SignatureError("the moment of sending is not between 1970 and 5138")
    return {
        "webhook-id": delivery_id,
        "webhook-timestamp": str(int(at_wall)),
        "webhook-signature": _signature(body, secret, delivery_id, str(int(at_wall))),
    }


def matching_bearer(header: str | None, keys: Sequence[str]) -> int:
    """Return the number of the key, from 1, that an Authorization header shows as a bearer; 0 where it shows none.

    Each key is compared, in constant time.

    Args:
        header: The header's text, or None where there is none.
        keys: The keys in force. An empty one matches nothing.
    """
    scheme, _, shown = (header or "").partition(" ")
    digest = _digest(shown.strip())
    entry = 0
    for number, key in enumerate(keys, start=1):
        if hmac.compare_digest(digest, _digest(key)) and key != "":
            entry = number
    return entry if scheme.lower() == "bearer" else 0


def check_secret(secret: str) -> None:
    """Refuse a configured secret that is not `whsec_` and 24 to 64 bytes in base64.

    Raises:
        SignatureError: The message says what is expected and nothing of what was given.
    """
    _key_of(secret)


def _key_of(secret: str) -> bytes:
    expected = "must be whsec_ followed by 24 to 64 bytes in base64"
    if not secret.startswith(_SECRET_PREFIX):
        raise SignatureError(expected)
    encoded = secret.removeprefix(_SECRET_PREFIX).rstrip("=")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):  # without their text, which may quote the secret
        raise SignatureError(expected) from None
    if len(key) not in _SECRET_BYTES:
        raise SignatureError(expected)
    return key


def _header(headers: Mapping[str, str], name: str) -> str:
    for given, value in headers.items():
        if given.lower() == name:
            return value
    raise SignatureError(f"{name} is missing; the delivery is not signed")


def _digest(text: str) -> bytes:
    """Return a digest of the text, so that a comparison does not tell how long a key is."""
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).digest()


def _signature(body: bytes, secret: str, delivery_id: str, stamp: str) -> str:
    """Return `v1,` and the base64 of the HMAC over id, timestamp as it was sent, and body."""
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SignatureError("the body is not UTF-8") from error
    signed = f"{delivery_id}.{stamp}.".encode("ascii") + body
    return "v1," + base64.b64encode(hmac.digest(_key_of(secret), signed, "sha256")).decode("ascii")
