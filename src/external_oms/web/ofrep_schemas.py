"""Answers of OFREP: details or an evaluation in, a JSON object of the protocol out; pure.

The protocol's success reasons are STATIC, TARGETING_MATCH, SPLIT, DISABLED and UNKNOWN: a fresh value is STATIC, every
other UNKNOWN, and `metadata` says more. Clients need more than the protocol requires: `variant` in every success,
`errorDetails` in every failure.

Source: OpenFeature Remote Evaluation Protocol, OpenAPI 0.3.0.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from openfeature.exception import ErrorCode, GeneralError
from openfeature.flag_evaluation import FlagResolutionDetails, Reason

from external_oms.config import FLAG_KEY
from external_oms.errors import NothingToServe
from external_oms.policy import Evaluation, Freshness
from external_oms.problems import JSON
from external_oms.resolution import WhenExpired, details_of, expired_details, metadata_of

__all__ = ["Configuration", "compact", "configuration_of", "failed_flag", "succeeded_flag", "unserved_flag"]

UNSERVED_VARIANT = "default"
"""The variant where no value may be served: `value` is left out, and the client serves its own default."""

_STABLE = frozenset({"tenant", "cache", "stale", "when_expired"})
"""The metadata in a bulk answer: anything that changes at each read, or differs between processes, would change the
ETag."""


def compact(shape: JSON) -> bytes:
    """Return the shape as it is sent."""
    return json.dumps(shape, separators=(",", ":")).encode()


def succeeded_flag(details: FlagResolutionDetails[bool]) -> dict[str, JSON]:
    """Return a success.

    `metadata.cache` is `fresh`, `stale`, or `expired`; then `metadata.when_expired` names the setting that decided.
    """
    metadata: dict[str, JSON] = dict(details.flag_metadata)
    freshness = Freshness.STALE if metadata["stale"] else Freshness.FRESH
    if "when_expired" in metadata:
        freshness = Freshness.EXPIRED
    return {
        "key": FLAG_KEY,
        "value": details.value,
        "reason": Reason.STATIC if details.reason in {Reason.STATIC, Reason.CACHED} else Reason.UNKNOWN,
        "variant": details.variant,
        "metadata": metadata | {"cache": freshness.value},
    }


def unserved_flag(evaluation: Evaluation) -> dict[str, JSON]:
    """Return a success without a value, so that the caller's own default holds. Source: OFREP ADR-0006."""
    metadata: dict[str, JSON] = dict(metadata_of(evaluation))
    return {
        "key": FLAG_KEY,
        "reason": Reason.UNKNOWN,
        "variant": UNSERVED_VARIANT,
        "metadata": metadata | {"cache": Freshness.EXPIRED.value, "when_expired": "default"},
    }


def failed_flag(code: ErrorCode, detail: str, *, key: str | None = None) -> dict[str, JSON]:
    """Return a failure, of one flag or of the whole request.

    Args:
        code: The protocol's code.
        detail: What to do, for people.
        key: The flag's key; None: the whole request failed.
    """
    named: dict[str, JSON] = {} if key is None else {"key": key}
    return named | {"errorCode": code.value, "errorDetails": detail}


@dataclass(frozen=True, slots=True)
class Configuration:
    """A bulk answer.

    Attributes:
        flag: The flag.
        reason: Why, in OpenFeature's words.
        tag: A digest of the flag, the same in every process: letters and digits.
        read_at: When the value was read, in whole seconds since the Unix epoch; 0 without one.
    """

    flag: dict[str, JSON]
    reason: Reason
    tag: str
    read_at: int = 0


def configuration_of(evaluation: Evaluation, when_expired: WhenExpired) -> Configuration:
    """Return the bulk answer for an evaluation. It changes only when the value, or its standing, does."""
    snapshot = evaluation.entry.snapshot
    details = details_of(evaluation)
    reason = Reason.ERROR
    try:
        details = details or expired_details(evaluation, when_expired, NothingToServe(evaluation.tenant, None))
    except GeneralError:
        flag = unserved_flag(evaluation)
    else:
        flag, reason = succeeded_flag(details), Reason(str(details.reason))
    metadata = flag["metadata"]
    kept: dict[str, JSON] = {}
    if isinstance(metadata, dict):
        kept = {name: value for name, value in metadata.items() if name in _STABLE}
    stable = flag | {"metadata": kept}
    # An answer of this call and one of the cache are the same to a client.
    counted = Reason.CACHED if reason is Reason.STATIC else reason
    read_at = 0 if snapshot is None else int(snapshot.fetched_at.timestamp())
    return Configuration(stable, counted, tag_of(stable), read_at)


def tag_of(flag: dict[str, JSON]) -> str:
    """Return the digest of a flag."""
    return hashlib.sha256(compact([flag])).hexdigest()[:32]
