"""Turns an evaluation into the resolution details of the SDK, or into its error. Pure functions."""

from __future__ import annotations

from typing import Literal, NoReturn

from openfeature.exception import FlagNotFoundError, GeneralError, TypeMismatchError
from openfeature.flag_evaluation import FlagMetadata, FlagResolutionDetails, Reason

from external_oms.config import FLAG_KEY, format_instant
from external_oms.errors import NothingToServe
from external_oms.policy import Evaluation, Freshness, Source

__all__ = [
    "VARIANTS",
    "SharedDetails",
    "WhenExpired",
    "details_of",
    "expired_details",
    "metadata_of",
    "refuse_key",
    "refuse_type",
]

WhenExpired = Literal["default", "on", "off", "last"]

VARIANTS = {True: "on", False: "off"}
"""The flag's variants by value."""


class SharedDetails(FlagResolutionDetails[bool]):
    """Resolution details that many evaluations share, and that no caller can change for the others.

    The SDK passes `flag_metadata` on to callers and hooks by reference; here every access returns a new copy. The other
    fields cannot be assigned; `dataclasses.replace` makes changed details.
    """

    def __init__(
        self,
        value: bool,
        error_code: None = None,
        error_message: None = None,
        reason: str | Reason | None = None,
        variant: str | None = None,
        flag_metadata: FlagMetadata | None = None,
    ) -> None:
        self.__dict__.update(
            value=value,
            error_code=error_code,
            error_message=error_message,
            reason=reason,
            variant=variant,
            _metadata=dict(flag_metadata or {}),
        )

    @property
    def flag_metadata(self) -> FlagMetadata:  # type: ignore[override]  # a copy, where the SDK has an attribute to set
        """The metadata of the evaluation, in a dictionary that belongs to the caller."""
        return self._metadata.copy()

    _metadata: dict[str, bool | int | float | str]

    def as_cached(self) -> SharedDetails:
        """Return the details as later evaluations get them: read by this process, and not for them."""
        metadata = self._metadata | {"source": str(Source.MEMORY)}
        return SharedDetails(self.value, reason=Reason.CACHED, variant=self.variant, flag_metadata=metadata)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"these details are shared by many evaluations; use dataclasses.replace to change {name}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FlagResolutionDetails):
            return NotImplemented
        return _fields(self) == _fields(other)

    __hash__ = None  # type: ignore[assignment]  # as the SDK's own dataclass, which compares by value


def _fields(details: FlagResolutionDetails[bool]) -> tuple[object, ...]:
    return (
        details.value,
        details.error_code,
        details.error_message,
        details.reason,
        details.variant,
        dict(details.flag_metadata),
    )


def metadata_of(evaluation: Evaluation) -> dict[str, bool | int | float | str]:
    """The flag metadata of an evaluation.

    `generation` is that of the value: lower than the tenant's where an invalidation has come after its read.
    """
    snapshot = evaluation.entry.snapshot
    metadata: dict[str, bool | int | float | str] = {
        "tenant": evaluation.tenant,
        "generation": evaluation.entry.generation if snapshot is None else snapshot.generation,
        "source": str(evaluation.source),
        "stale": evaluation.freshness is not Freshness.FRESH,
    }
    if snapshot is not None:
        metadata["fetched_at"] = format_instant(snapshot.fetched_at)
        if snapshot.updated_at is not None:
            metadata["updated_at"] = format_instant(snapshot.updated_at)
    return metadata


def details_of(evaluation: Evaluation) -> SharedDetails | None:
    """Return the details of an evaluation; None where it has no value that may be served."""
    snapshot = evaluation.servable
    if snapshot is None:
        return None
    if evaluation.freshness is Freshness.STALE:
        reason = Reason.STALE
    else:
        reason = Reason.STATIC if evaluation.source is Source.API else Reason.CACHED
    return SharedDetails(
        snapshot.enabled, reason=reason, variant=VARIANTS[snapshot.enabled], flag_metadata=metadata_of(evaluation)
    )


def expired_details(evaluation: Evaluation, when_expired: WhenExpired, failure: NothingToServe) -> SharedDetails:
    """Return the details that the setting `when_expired` prescribes where no value may be served.

    `on` and `off` are that value with the reason DEFAULT; `last` is the last value, however old, with the reason STALE.
    The metadata names the setting.

    Raises:
        GeneralError: The setting is `default`, or `last` and no value was ever read. The SDK then serves the default of
            the caller.
    """
    snapshot = evaluation.entry.snapshot
    metadata = metadata_of(evaluation) | {"when_expired": when_expired}
    if when_expired in {"on", "off"}:
        value = when_expired == "on"
        return SharedDetails(value, reason=Reason.DEFAULT, variant=when_expired, flag_metadata=metadata)
    if when_expired == "last" and snapshot is not None:
        enabled = snapshot.enabled
        return SharedDetails(enabled, reason=Reason.STALE, variant=VARIANTS[enabled], flag_metadata=metadata)
    raise GeneralError(str(failure)) from failure


def refuse_key(flag_key: str) -> None:
    """Check that the key is the one that this provider resolves.

    Raises:
        FlagNotFoundError: The key is another.
    """
    if flag_key != FLAG_KEY:
        raise FlagNotFoundError(f"this provider resolves {FLAG_KEY!r} only, not {str(flag_key)[:80]!r}")


def refuse_type(flag_key: str, asked: str) -> NoReturn:
    """Refuse a resolution of another type than boolean.

    An integer is refused here because the SDK would accept True for one: `bool` is a subclass of `int`.

    Raises:
        FlagNotFoundError: The key is another.
        TypeMismatchError: The key is ours.
    """
    refuse_key(flag_key)
    raise TypeMismatchError(f"{FLAG_KEY} is a boolean; it was asked for as {asked}")
