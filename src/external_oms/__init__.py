"""Re-exports of the public names; what belongs to an extra is imported when it is used."""

from __future__ import annotations

from external_oms.config import FLAG_KEY
from external_oms.errors import (
    ExternalOMSError,
    LaggingAnswer,
    MalformedAnswer,
    NothingToServe,
    RateLimited,
    ReadError,
    SettingsError,
    SignatureError,
    StoreError,
    TenantError,
    TokenError,
    Unauthorized,
    Unavailable,
    WriteConflict,
    WriteError,
    WriteOutcomeUnknown,
)
from external_oms.judgement import State
from external_oms.provider import ExternalOMSProvider
from external_oms.settings import Settings, TenantSettings

__all__ = [
    "FLAG_KEY",
    "ExternalOMSError",
    "ExternalOMSProvider",
    "LaggingAnswer",
    "MalformedAnswer",
    "NothingToServe",
    "RateLimited",
    "ReadError",
    "Settings",
    "SettingsError",
    "SignatureError",
    "State",
    "StoreError",
    "TenantError",
    "TenantSettings",
    "TokenError",
    "Unauthorized",
    "Unavailable",
    "WriteConflict",
    "WriteError",
    "WriteOutcomeUnknown",
    "__version__",
]

__version__: str


def __getattr__(name: str) -> str:
    """The version of the installed distribution: looked up when asked for, since that reads the disk."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version  # noqa: PLC0415 - at the top its name would be one of the face's

    return version("openfeature-provider-external-oms")
