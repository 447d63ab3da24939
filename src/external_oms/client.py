"""The config API over requests: one read or one write, within one deadline, and every way it can fail has a name.

Source: External OMS Config API v0; RFC 9110 §13.1.2 (If-None-Match), §15.5.2 and §15.5.4 (401, 403); RFC 9457.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import requests

from external_oms.auth import TokenSource
from external_oms.clock import Clock
from external_oms.config import Document, Reading, parse_document
from external_oms.errors import (
    MalformedAnswer,
    RateLimited,
    ReadError,
    Unauthorized,
    Unavailable,
    WriteConflict,
    WriteError,
    WriteOutcomeUnknown,
)
from external_oms.settings import TenantSettings
from external_oms.transport import Answer, Call, Transport, parse_retry_after

__all__ = ["READ_SCOPE", "WRITE_SCOPE", "ConfigClient"]

_CODE = re.compile(r"[a-z0-9_.-]{1,64}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_ETAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e]{0,256}"')
"""An entity tag (RFC 9110 §8.8.3) in ASCII; one that is longer or otherwise made is not sent back."""

READ_SCOPE = "newstore:configuration:read"
"""The scope that the platform documents next to this resource for reading it."""

WRITE_SCOPE = "newstore:configuration:write"
"""And for writing it."""


class _Bearer:
    """Puts the access token into a request."""

    __slots__ = ("_token",)

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


class ConfigClient:
    """The config API of one tenant.

    Args:
        tenant: The tenant's name.
        settings: How its API is reached.
        token: Where its access token comes from.
        session: The user's own session, or None: then every part of a call is bounded by its deadline, a server that
            drips headers included. What a user's session cannot promise stands in `Transport`.
        clock: What tells the time.
        timeout_seconds: The whole of one read or write, the token included, > 0.
        retry_after_max_seconds: The most that a Retry-After is believed, in seconds.
    """

    def __init__(
        self,
        *,
        tenant: str,
        settings: TenantSettings,
        token: TokenSource,
        session: requests.Session | None,
        clock: Clock,
        timeout_seconds: float,
        retry_after_max_seconds: float,
    ) -> None:
        self._url = settings.config_url(tenant)
        self._write_method = settings.write_method
        self._token = token
        self._clock = clock
        self._timeout_seconds = timeout_seconds
        self._retry_after_max_seconds = retry_after_max_seconds
        self._subject = f"the config API of tenant {tenant!r}"
        self._transport = Transport(session, subject=self._subject, clock=clock)

    def read(self, etag: str | None = None) -> Reading:
        """What the API says now, or that the snapshot with this validator is still right.

        Args:
            etag: The validator of the stored snapshot, where the API gave one.

        Raises:
            TokenError: No access token could be obtained.
            Unauthorized: 401 or 403, also to a token obtained for this read.
            RateLimited: 429.
            Unavailable: No whole answer within the deadline, a redirect, 5xx, or another status that is no answer.
            MalformedAnswer: A success that is not the API's document.
        """
        headers = {"Accept": "application/json"}
        if etag is not None:
            headers["If-None-Match"] = etag
        with self._transport.call(self._deadline()) as call:
            answer, told = self._authorized(call, "GET", headers, None)
        if answer.status == requests.codes.not_modified and etag is not None:
            return Reading(None, _etag(answer) or etag)
        if answer.status == requests.codes.ok:
            if answer.trouble is not None:
                raise answer.trouble
            return Reading(parse_document(answer.body), _etag(answer))
        if answer.status in range(200, 300):
            raise MalformedAnswer(
                f"{self._subject}: answered {told}, where 200 and a document belong", status=answer.status
            )
        raise self._not_read(answer, told, scope=READ_SCOPE)

    def write(self, enabled: bool) -> Document | None:
        """Write the value.

        Returns:
            The document in the API's answer; None where it took the value and its answer holds none.

        Raises:
            WriteConflict: 409; the value was not taken.
            WriteOutcomeUnknown: Sent, and then no answer or 5xx: read back before you conclude.
            WriteError: Another refusal; the value was not taken.
            TokenError: No access token could be obtained; nothing was written. Likewise
            Unauthorized: (401 or 403, also to a token obtained for this write),
            RateLimited: (429), and
            Unavailable: (no connection, so nothing was sent, or a redirect).
        """
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        with self._transport.call(self._deadline()) as call:
            answer, told = self._authorized(
                call, self._write_method, headers, json.dumps({"enabled": enabled}).encode()
            )
        status = answer.status
        if status in range(200, 300):
            return _document_or_none(answer)
        if status == requests.codes.conflict:
            raise WriteConflict(
                f"{self._subject}: answered {told}; the value cannot be changed in its present state", status=status
            )
        if status >= requests.codes.server_error:
            raise WriteOutcomeUnknown(
                f"{self._subject}: answered {told}; the value may have changed: read it back", status=status
            )
        error = self._not_read(answer, told, scope=WRITE_SCOPE)
        if isinstance(error, Unauthorized | RateLimited) or status in range(300, 400):
            raise error
        advice = "it did not take the value; are config_path and write_method right?"
        raise WriteError(f"{self._subject}: answered {told}; {advice}", status=status)

    def abort(self) -> None:
        """End what is under way, the request for a token included, from any thread; later calls are not touched."""
        self._transport.abort()
        self._token.abort()

    def after_fork(self) -> None:
        """In a child: use no lock and no socket of the parent's."""
        self._transport.after_fork()
        self._token.after_fork()

    def _deadline(self) -> float:
        return self._clock.monotonic() + self._timeout_seconds

    def _authorized(
        self, call: Call, method: str, headers: Mapping[str, str], body: bytes | None
    ) -> tuple[Answer, str]:
        """The answer, to a second token where the first was refused, and how to name it in a message."""
        token = self._token.token(deadline=call.deadline)
        answer = self._sent(call, method, headers, body, token)
        if _refused(answer) and self._token.renews:
            self._token.drop(token)
            token = self._token.token(deadline=call.deadline)
            answer = self._sent(call, method, headers, body, token)
        return answer, _told(answer, token)

    def _sent(self, call: Call, method: str, headers: Mapping[str, str], body: bytes | None, token: str) -> Answer:
        try:
            return self._transport.exchange(call, method, self._url, signer=_Bearer(token), headers=headers, body=body)
        except Unavailable as error:
            if body is not None and call.sent:
                problem = "the value was sent and no answer came; it may have changed: read it back"
                raise WriteOutcomeUnknown(f"{self._subject}: {problem}") from error
            raise

    def _not_read(self, answer: Answer, told: str, *, scope: str) -> ReadError:
        """The error that a status amounts to which is no success."""
        status = answer.status
        wait = parse_retry_after(
            answer.headers.get("Retry-After"),
            now_wall=self._clock.wall(),
            cap_seconds=self._retry_after_max_seconds,
        )
        said = f"{self._subject}: answered {told}"
        if _refused(answer):
            whose = "a token obtained for it" if self._token.renews else "access_token"
            return Unauthorized(f"{said} to {whose}; is it of this tenant, with the scope {scope}?", status=status)
        if status == requests.codes.too_many_requests:
            return RateLimited(said, status=status, retry_after_seconds=wait)
        if status >= requests.codes.server_error:
            return Unavailable(said, status=status, retry_after_seconds=wait)
        if status in range(300, 400):
            said += ", a redirect, which is never followed"
        return Unavailable(f"{said}; are base_url and config_path right?", status=status)


def _refused(answer: Answer) -> bool:
    """Whether the token was refused; the platform answers 403 to one that has expired."""
    return answer.status in {requests.codes.unauthorized, requests.codes.forbidden}


def _etag(answer: Answer) -> str | None:
    etag = answer.headers.get("ETag")
    return etag if etag is not None and _ETAG.fullmatch(etag) else None


def _document_or_none(answer: Answer) -> Document | None:
    """The document in the answer to a write that was taken; whatever else stands there changes nothing about that."""
    if answer.trouble is not None:
        return None
    try:
        return parse_document(answer.body)
    except MalformedAnswer:
        return None


def _told(answer: Answer, token: str) -> str:
    """The status, with the error code and the request's id where the answer names them in a safe form.

    Nothing else of what the server wrote is repeated, and not these where they are made of the token.
    """
    try:
        problem = json.loads(answer.body)
    except (ValueError, RecursionError):
        problem = None
    said = [str(answer.status)]
    if isinstance(problem, dict):
        for name, form in (("error_code", _CODE), ("request_id", _REQUEST_ID)):
            text = problem.get(name)
            if isinstance(text, str) and form.fullmatch(text) and text not in token and token not in text:
                said.append(f"{name} {text}")
    return said[0] if len(said) == 1 else f"{said[0]} ({', '.join(said[1:])})"
