"""What OFREP answers look like: an answer or details in, a JSON object of the protocol out. Pure.

Source: OpenFeature Remote Evaluation Protocol, OpenAPI 0.3.0. Its success reasons are STATIC, TARGETING_MATCH, SPLIT,
DISABLED and UNKNOWN: so STATIC is said of what is authoritative, UNKNOWN of the rest, and what we know beyond that
stands in `metadata`. Clients need more than it requires: `variant` in every success, `errorDetails` in every failure.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TypeAlias

from openfeature.exception import ErrorCode, GeneralError
from openfeature.flag_evaluation import FlagResolutionDetails, Reason

from external_oms.config import FLAG_KEY
from external_oms.errors import NothingToServe
from external_oms.policy import Evaluation, Freshness
from external_oms.resolution import WhenExpired, details_of, expired_details, metadata_of
from external_oms.web.shapes import JSON

__all__ = [
    "Configuration",
    "Flag",
    "compact",
    "configuration_of",
    "evaluated",
    "failed",
    "flag_of",
    "reason_of",
    "unserved",
]

Flag: TypeAlias = dict[str, JSON]
"""One flag of an answer: a success or a failure."""

UNSERVED_VARIANT = "default"
"""The variant where nothing may be served: the protocol leaves `value` out, and the client takes its own default."""

_AUTHORITATIVE = frozenset({Reason.STATIC, Reason.CACHED})

_STEADY = frozenset({"tenant", "cache", "stale", "when_expired"})
"""What of the metadata goes into a bulk answer: what changes at each read, or from process to process, would give each
answer another ETag."""


def compact(shape: JSON) -> bytes:
    """The shape on the wire."""
    return json.dumps(shape, separators=(",", ":")).encode()


def evaluated(details: FlagResolutionDetails[bool]) -> Flag:
    """A success.

    `metadata.cache` is `fresh`, `stale`, or `expired`; in the last case `metadata.when_expired` says which setting
    decided.
    """
    metadata: dict[str, JSON] = dict(details.flag_metadata)
    worth = (
        Freshness.EXPIRED if "when_expired" in metadata else Freshness.STALE if metadata["stale"] else Freshness.FRESH
    )
    return {
        "key": FLAG_KEY,
        "value": details.value,
        "reason": Reason.STATIC if details.reason in _AUTHORITATIVE else Reason.UNKNOWN,
        "variant": details.variant,
        "metadata": metadata | {"cache": worth.value},
    }


def unserved(evaluation: Evaluation) -> Flag:
    """A success without a value: nothing may be served, so the caller's own default holds. Source: OFREP ADR-0006."""
    metadata: dict[str, JSON] = dict(metadata_of(evaluation))
    return {
        "key": FLAG_KEY,
        "reason": Reason.UNKNOWN,
        "variant": UNSERVED_VARIANT,
        "metadata": metadata | {"cache": Freshness.EXPIRED.value, "when_expired": "default"},
    }


def failed(code: ErrorCode, detail: str, *, key: str | None = None) -> Flag:
    """A failure, of one flag or of the whole request.

    Args:
        code: What kind.
        detail: What to do about it, for people.
        key: The flag's key; None: the failure is the whole request's.
    """
    named: Flag = {} if key is None else {"key": key}
    return named | {"errorCode": code.value, "errorDetails": detail}


def flag_of(evaluation: Evaluation, when_expired: WhenExpired) -> Flag:
    """What a bulk answer says of the flag: a success whose metadata changes only when something does."""
    details = details_of(evaluation)
    if details is None:
        try:
            details = expired_details(evaluation, when_expired, NothingToServe(evaluation.tenant, None))
        except GeneralError:
            return _steady(unserved(evaluation))
    return _steady(evaluated(details))


def reason_of(flag: Flag) -> Reason:
    """Why a success says what it says, in OpenFeature's words, of which the protocol knows only some."""
    metadata = flag["metadata"]
    told = metadata if isinstance(metadata, dict) else {}
    if told.get("when_expired") is not None:
        return Reason.ERROR if told["when_expired"] == "default" else Reason.DEFAULT
    return Reason.CACHED if told.get("cache") == Freshness.FRESH.value else Reason.STALE


def _steady(flag: Flag) -> Flag:
    metadata = flag["metadata"]
    kept = {name: value for name, value in metadata.items() if name in _STEADY} if isinstance(metadata, dict) else {}
    return flag | {"metadata": kept}


@dataclass(frozen=True, slots=True)
class Configuration:
    """What all the flags of a bulk answer say together.

    Attributes:
        flags: The flags.
        tag: A digest of them, the same in every process: letters and digits.
        read_at: When the value was read, whole seconds since the Unix epoch; 0 without one.
    """

    flags: tuple[Flag, ...]
    tag: str
    read_at: int


def configuration_of(flags: tuple[Flag, ...], evaluation: Evaluation | None = None) -> Configuration:
    """The configuration that these flags are.

    Args:
        flags: The flags.
        evaluation: What they were made of, where they were made of one.
    """
    snapshot = evaluation.entry.snapshot if evaluation is not None else None
    digest = hashlib.sha256(compact(list(flags))).hexdigest()[:32]
    return Configuration(flags, digest, 0 if snapshot is None else int(snapshot.fetched_at.timestamp()))
