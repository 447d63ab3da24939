"""The config API of one tenant: one read or one write, within one deadline, and an error for each way it can fail.

Source: External OMS Config API v0; RFC 9110 §13.1.2 (If-None-Match), §15.5.2 and §15.5.4 (401, 403); RFC 9457.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http import HTTPStatus

import requests

from external_oms.auth import TokenSource
from external_oms.clock import Clock
from external_oms.config import ETAG, Reading, parse_document
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
from external_oms.transport import Deadline, Response, Transport, parse_retry_after

__all__ = ["READ_SCOPE", "WRITE_SCOPE", "ConfigClient"]

_ERROR_CODE = re.compile(r"(?=.{1,64}\Z)[a-z]+(?:[._-][a-z]+)*")
_REQUEST_ID = re.compile(
    r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-7][0-9a-hjkmnp-tv-z]{25}", re.ASCII | re.IGNORECASE
)
"""A UUID (RFC 9562) or a ULID: too short and too regular for a server's text."""


READ_SCOPE = "newstore:configuration:read"
"""The scope that the platform documents for reading resources of this family."""

WRITE_SCOPE = "newstore:configuration:write"
"""The scope for writing them."""


class ConfigClient:
    """The config API of one tenant.

    Args:
        tenant: The tenant's name.
        settings: The URLs and the write method.
        token: The source of its access tokens.
        session: The application's session, or None: then the deadline bounds every part of a call, including a server
            that drips headers. `Transport` says what cannot be promised for the application's session.
        clock: The clock.
        timeout_seconds: The limit of one read or write, obtaining a token included, > 0.
        retry_after_max_seconds: The longest Retry-After that is obeyed, in seconds.
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
        self._transport = Transport(session, subject=self._subject, url_setting="base_url", clock=clock)

    def read(self, etag: str | None = None) -> Reading:
        """Read the document, or learn that the snapshot with this validator is still current.

        Args:
            etag: The validator of the stored snapshot, if the API gave one.

        Raises:
            TokenError: No access token could be obtained.
            Unauthorized: 401 or 403, also with a token obtained for this read.
            RateLimited: 429.
            Unavailable: No complete response within the deadline, a redirect, 5xx, or another unexpected status.
            MalformedAnswer: A success that is not the API's document.
        """
        headers = {"Accept": "application/json"}
        if etag is not None:
            headers["If-None-Match"] = etag
        with self._transport.deadline(self._deadline_at()) as deadline:
            response = self._authorized(deadline, "GET", headers, None)
        status = response.status
        if status == HTTPStatus.NOT_MODIFIED and etag is not None:
            return Reading(None, _etag(response) or etag)
        if status == HTTPStatus.OK:
            if response.body_error is not None:
                raise response.body_error
            return Reading(parse_document(response.body), _etag(response))
        if status in range(200, 300):
            advice = "only 200 comes with a document; check config_path"
            raise MalformedAnswer(f"{self._answered(response)}; {advice}", status=status)
        raise self._error_for(response, scope=READ_SCOPE)

    def write(self, enabled: bool) -> None:
        """Write the value.

        Raises:
            WriteConflict: 409; the value was not written.
            WriteOutcomeUnknown: The request was sent, and then no response came, or 5xx: read the value back.
            WriteError: Another refusal; the value was not written.
            TokenError: No access token could be obtained; nothing was written. Likewise
            Unauthorized: (401 or 403, also with a token obtained for this write),
            RateLimited: (429), and
            Unavailable: (no connection, so nothing was sent, or a redirect).
        """
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        with self._transport.deadline(self._deadline_at()) as deadline:
            body = json.dumps({"enabled": enabled}).encode()
            response = self._authorized(deadline, self._write_method, headers, body)
        status = response.status
        if status in range(200, 300):
            return  # whatever the body says: the next read tells what the API now answers
        answered = self._answered(response)
        if status == HTTPStatus.CONFLICT:
            raise WriteConflict(f"{answered}; the value cannot be changed in its present state", status=status)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise WriteOutcomeUnknown(f"{answered}; the value may have changed: read it back", status=status)
        error = self._error_for(response, scope=WRITE_SCOPE)
        if isinstance(error, Unauthorized | RateLimited) or status in range(300, 400):
            raise error
        advice = "the value was not written; check config_path and write_method"
        raise WriteError(f"{answered}; {advice}", status=status)

    def abort(self) -> None:
        """End every call in progress, token requests included, from any thread; later calls are not affected."""
        self._transport.abort()
        self._token.abort()

    def after_fork(self) -> None:
        """Replace the parent's locks and connections in a forked child."""
        self._transport.after_fork()
        self._token.after_fork()

    def _deadline_at(self) -> float:
        return self._clock.monotonic() + self._timeout_seconds

    def _authorized(self, deadline: Deadline, method: str, headers: Mapping[str, str], body: bytes | None) -> Response:
        """Send a request, again with a new token if the first was refused, and return the response."""
        token = self._token.token(deadline=deadline.at)
        response = self._send(deadline, method, headers, body, token)
        if _refused(response) and self._token.renews:
            self._token.drop(token)
            token = self._token.token(deadline=deadline.at)
            response = self._send(deadline, method, headers, body, token)
        return response

    def _answered(self, response: Response) -> str:
        return f"{self._subject}: answered {_described(response, self._token)}"

    def _send(
        self, deadline: Deadline, method: str, headers: Mapping[str, str], body: bytes | None, token: str
    ) -> Response:
        try:
            return self._transport.send(deadline, method, self._url, headers=headers, token=token, body=body)
        except Unavailable as error:
            if body is not None and deadline.sent:
                problem = "the value was sent and no response came; it may have changed: read it back"
                raise WriteOutcomeUnknown(f"{self._subject}: {problem}") from error
            raise

    def _error_for(self, response: Response, *, scope: str) -> ReadError:
        """Return the error for a status that is not a success; it carries the Retry-After of 429 and 5xx."""
        status, answered = response.status, self._answered(response)
        wait = parse_retry_after(
            response.headers.get("Retry-After"),
            now_wall=self._clock.wall(),
            cap_seconds=self._retry_after_max_seconds,
        )
        if _refused(response):
            which = "a new token" if self._token.renews else "access_token"
            return Unauthorized(f"{answered} to {which}; is it of this tenant, with the scope {scope}?", status=status)
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            return RateLimited(answered, status=status, retry_after_seconds=wait)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return Unavailable(answered, status=status, retry_after_seconds=wait)
        redirect = ", a redirect, which is not followed" if status in range(300, 400) else ""
        return Unavailable(f"{answered}{redirect}; check base_url and config_path", status=status)


def _refused(response: Response) -> bool:
    """Return whether the token was refused; the platform answers 403 to an expired one."""
    return response.status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}


def _etag(response: Response) -> str | None:
    etag = response.headers.get("ETag")
    return etag if etag is not None and ETAG.fullmatch(etag) else None


def _described(response: Response, token: TokenSource) -> str:
    """Return the status, and the error code and request id of the problem details if they have a safe form.

    Nothing else that the server wrote is repeated, and these are not if a part of a secret may be in them.
    """
    try:
        problem = json.loads(response.body)
    except (ValueError, RecursionError):
        problem = None
    said = []
    if isinstance(problem, dict):
        for name, form in (("error_code", _ERROR_CODE), ("request_id", _REQUEST_ID)):
            text = problem.get(name)
            if isinstance(text, str) and form.fullmatch(text) and not token.reveals(text):
                said.append(f"{name} {text}")
    return f"{response.status} ({', '.join(said)})" if said else str(response.status)
