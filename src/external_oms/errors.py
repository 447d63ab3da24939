"""The errors of this package. Each message says what to do; none contains a secret or text that a server wrote.

::

    ExternalOMSError
    ├── SettingsError            a setting is unknown, malformed or contradicts another     .setting
    ├── TenantError              the call names no tenant, or one that is not configured    .tenant
    ├── ReadError                the config API was not read      .kind .status .retry_after_seconds
    │   ├── TokenError           no access token could be obtained
    │   ├── Unauthorized         401 or 403, also with a token obtained a moment ago
    │   ├── RateLimited          429; not before `retry_after_seconds` from now
    │   ├── Unavailable          no connection, no response in time, or 5xx
    │   ├── MalformedAnswer      a response that is not the API's document
    │   └── LaggingAnswer        a response older than one already seen
    ├── WriteError               the config API did not take the value                      .status
    │   ├── WriteConflict        409
    │   └── WriteOutcomeUnknown  sent, but no response: read the value back
    ├── NothingToServe           no value may be served for this tenant                     .tenant .failure
    ├── SignatureError           a delivery is not genuine
    └── StoreError               the shared store cannot be used
        └── StoreBusy            others use the shared store at this moment; try again
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "READ_ERRORS",
    "ExternalOMSError",
    "LaggingAnswer",
    "MalformedAnswer",
    "NothingToServe",
    "RateLimited",
    "ReadError",
    "SettingsError",
    "SignatureError",
    "StoreBusy",
    "StoreError",
    "TenantError",
    "TokenError",
    "Unauthorized",
    "Unavailable",
    "WriteConflict",
    "WriteError",
    "WriteOutcomeUnknown",
]


class ExternalOMSError(Exception):
    """The base of all errors that this package raises on purpose. They can be copied and pickled."""

    def __reduce__(self) -> tuple[object, ...]:
        # by its text and attributes: the constructors of some errors make the text of other arguments
        return _restored, (type(self), self.args), self.__dict__


def _restored(kind: type[ExternalOMSError], args: tuple[object, ...]) -> ExternalOMSError:
    return kind.__new__(kind, *args)


class SettingsError(ExternalOMSError):
    """A setting is unknown, malformed or contradicts another; the service refuses to start.

    Attributes:
        setting: The setting's name as in `Settings`.
    """

    def __init__(self, setting: str, problem: str) -> None:
        super().__init__(f"{setting}: {problem}")
        self.setting = setting


class TenantError(ExternalOMSError):
    """The call names no tenant although several are configured, or one that is not configured.

    Attributes:
        tenant: The name in the call, or None.
    """

    def __init__(self, tenant: str | None, problem: str) -> None:
        super().__init__(problem)
        self.tenant = tenant


class ReadError(ExternalOMSError):
    """The config API was not read.

    Attributes:
        kind: A stable word for logs, metrics and the store.
        status: The HTTP status, if there was a response.
        retry_after_seconds: The Retry-After of the response in seconds, capped, >= 0; None if it had none. This is the
            server's wish alone: back-off of our own is never added to it.
    """

    kind: ClassVar[str] = "error"

    def __init__(self, message: str, *, status: int | None = None, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_seconds = retry_after_seconds


class TokenError(ReadError):
    """No access token could be obtained from the token endpoint."""

    kind = "token"


class Unauthorized(ReadError):
    """The API answered 401 or 403, also with a token obtained for this read."""

    kind = "unauthorized"


class RateLimited(ReadError):
    """The API answered 429."""

    kind = "rate_limited"


class Unavailable(ReadError):
    """No connection, no complete response within the deadline, a redirect, or a 5xx."""

    kind = "unavailable"


class MalformedAnswer(ReadError):
    """The API answered 200 with something that is not its document, and never treated as a value."""

    kind = "malformed"


class LaggingAnswer(ReadError):
    """The API answered with an older `updated_at` than one already seen, for a whole freshness lifetime."""

    kind = "lagging"


READ_ERRORS: dict[str, type[ReadError]] = {
    error.kind: error
    for error in (ReadError, TokenError, Unauthorized, RateLimited, Unavailable, MalformedAnswer, LaggingAnswer)
}
"""The read errors by kind: a failure that another process stored becomes an error again."""


class WriteError(ExternalOMSError):
    """The config API did not take the value.

    Attributes:
        status: The HTTP status, if there was a response.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class WriteConflict(WriteError):
    """The API answered 409: the value cannot be changed in its present state."""


class WriteOutcomeUnknown(WriteError):
    """The request was sent and no response came, or a 5xx: the value may have changed, or not."""


class NothingToServe(ExternalOMSError):
    """No value may be served: none was ever read, or the last one is older than every window allows.

    Attributes:
        tenant: The tenant asked for.
        failure: The error of the last read, or None if no read has ended yet.
    """

    def __init__(self, tenant: str, failure: ReadError | None) -> None:
        because = f"{failure}" if failure is not None else "the first read has not ended within its deadline"
        super().__init__(f"no value of external_oms_enabled may be served for tenant {tenant!r}: {because}")
        self.tenant = tenant
        self.failure = failure


class SignatureError(ExternalOMSError):
    """A delivery is not genuine. The message is for the log; the sender is not told the reason."""


class StoreError(ExternalOMSError):
    """The shared store cannot be used; the message says where it is, what is wrong, and what to do."""


class StoreBusy(StoreError):
    """Others use the shared store at this moment; try again."""
