"""Access tokens, static or by the OAuth 2.0 client credentials grant; each tenant has a source of its own.

Source: RFC 6749 §4.4 (client credentials grant), §5.1 and §5.2 (responses of a token endpoint).
"""

from __future__ import annotations

import copy
import json
import math
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Protocol
from urllib.parse import urlencode

import requests
from pydantic import SecretStr

from external_oms.clock import Clock
from external_oms.errors import MalformedAnswer, RateLimited, ReadError, TokenError, Unavailable
from external_oms.transport import Response, Transport, parse_retry_after

__all__ = ["ClientCredentials", "StaticToken", "TokenSource", "renewal_margin_seconds"]

DEFAULT_LIFE_SECONDS = 300.0
"""The life of a token whose response has no `expires_in`, as RFC 6749 §5.1 allows; the default of Keycloak."""

MAX_LIFE_SECONDS = 1e9
"""The longest life that is believed, thirty years: some servers send 2^63 for a token without an end."""

MAX_TOKEN_LENGTH = 16_384
"""Characters; no server that we know accepts a longer header."""

RENEWAL_PAUSE_SECONDS = 5.0
"""The least time between two attempts to renew a valid token: a dead endpoint must not slow every read."""

_SHARED = 8
"""A text that has so many letters and digits in a row in common with a secret may be made of it."""


def renewal_margin_seconds(life_seconds: float) -> float:
    """Return how many seconds before its end a token is renewed: a tenth of its life, 5 to 60, at most half of it.

    Args:
        life_seconds: Its whole life, > 0.
    """
    return min(max(life_seconds / 10, 5.0), 60.0, life_seconds / 2)


class TokenSource(Protocol):
    """Gives the access tokens of one tenant."""

    @property
    def renews(self) -> bool:
        """Whether another token can be obtained in place of one that was refused."""
        ...  # pragma: no cover - a Protocol's body never runs

    def token(self, *, deadline: float | None = None) -> str:
        """Return a token that is valid as far as is known, obtaining or renewing it if necessary.

        Args:
            deadline: When to give up, seconds on the monotonic clock; None: after the source's own timeout.

        Raises:
            TokenError: The token endpoint refused, or answered without a usable token.
            RateLimited: It answered 429.
            Unavailable: It gave no complete response in time, or answered 5xx.
        """
        ...  # pragma: no cover - a Protocol's body never runs

    def drop(self, token: str) -> None:
        """Forget this token, and no other."""
        ...  # pragma: no cover - a Protocol's body never runs

    def reveals(self, text: str) -> bool:
        """Return whether the text may contain a part of the token or of the client's secret."""
        ...  # pragma: no cover - a Protocol's body never runs

    def abort(self) -> None:
        """End a request in progress, from any thread."""
        ...  # pragma: no cover - a Protocol's body never runs

    def after_fork(self) -> None:
        """Replace the parent's locks and connections in a forked child."""
        ...  # pragma: no cover - a Protocol's body never runs


class StaticToken:
    """A configured token, which cannot be renewed.

    Args:
        token: The access token.
    """

    renews = False

    def __init__(self, token: SecretStr) -> None:
        self._token = token

    def token(self, *, deadline: float | None = None) -> str:  # noqa: ARG002 - takes no time
        """Return the token."""
        return self._token.get_secret_value()

    def drop(self, token: str) -> None:
        """Keep the token: there is no other."""

    def reveals(self, text: str) -> bool:
        """Return whether the text may contain a part of the token."""
        return _share(text, self._token.get_secret_value())

    def abort(self) -> None:
        """Do nothing: no request is ever in progress."""

    def after_fork(self) -> None:
        """Do nothing: there is no lock and no connection."""


@dataclass(slots=True)
class _CachedToken:
    """A token and its times, seconds on the monotonic clock, counted from the *start* of the request for it."""

    text: str = field(repr=False)
    renew_at: float
    expires_at: float


class ClientCredentials:
    """Tokens by the client credentials grant; every object has its own, so two tenants can never share one.

    A token is renewed a little before its end. While that fails, the old token is used as long as it is valid. One
    caller at a time calls the token endpoint. Callers that hold no valid token wait for it, each until its own
    deadline, and share its token or its failure. Refresh tokens are not used: RFC 6749 §4.4.3 has none for this grant.

    Args:
        tenant: The tenant, for messages.
        endpoint: The URL of the token endpoint.
        client_id: The client's id.
        client_secret: Its secret, sent in the form, as the platform documents it.
        scope: The scopes to ask for, separated by spaces; empty asks for the client's own.
        session: The application's session, or None.
        clock: The clock.
        timeout_seconds: How long a caller without a deadline waits, > 0.
        retry_after_max_seconds: The longest Retry-After that is obeyed, in seconds.
        on_renewal: Called after every attempt to obtain a token, with its error or None; must not block.
    """

    renews = True

    def __init__(  # noqa: PLR0913 - five parameters of the grant, and what calls and limits need
        self,
        *,
        tenant: str,
        endpoint: str,
        client_id: str,
        client_secret: SecretStr,
        scope: str,
        session: requests.Session | None,
        clock: Clock,
        timeout_seconds: float,
        retry_after_max_seconds: float,
        on_renewal: Callable[[ReadError | None], None] = lambda _: None,
    ) -> None:
        self._endpoint = endpoint
        self._client_id = client_id
        self._client_secret = client_secret
        self._scope = scope
        self._clock = clock
        self._timeout_seconds = timeout_seconds
        self._retry_after_max_seconds = retry_after_max_seconds
        self._on_renewal = on_renewal
        self._subject = f"the token endpoint of tenant {tenant!r}"
        self._transport = Transport(session, subject=self._subject, url_setting="token_url", clock=clock)
        self._renewing = threading.Lock()
        # An attribute and not a cache: other threads read it without a lock while one of them renews it.
        self._cached: _CachedToken | None = None
        self._attempts = 0
        self._failure: ReadError | None = None
        self._not_before = -math.inf

    def token(self, *, deadline: float | None = None) -> str:
        """Return a token; see `TokenSource.token`."""
        now, seen = self._clock.monotonic(), self._attempts
        until = now + self._timeout_seconds if deadline is None else deadline
        valid = self._valid(now)
        if valid is not None and now < valid.renew_at:
            return valid.text
        if not self._renewing.acquire(timeout=max(0.0, until - now) if valid is None else 0.0):
            if valid is not None:
                return valid.text
            raise Unavailable(f"{self._subject}: another caller's request for a token did not end in time")
        attempted = False
        try:
            outcome = self._outcome_since(seen)
            if outcome is None:
                outcome, attempted = self._renew(until), True
        finally:
            self._renewing.release()
        if attempted:
            self._on_renewal(outcome if isinstance(outcome, ReadError) else None)
        if isinstance(outcome, _CachedToken):
            return outcome.text
        now = self._clock.monotonic()
        valid = self._valid(now)
        if valid is not None:
            return valid.text
        raise outcome if attempted else _copy_for_caller(outcome, self._not_before - now)

    def drop(self, token: str) -> None:
        """Forget this token if it is the cached one; a newer one stays."""
        cached = self._cached
        if cached is not None and cached.text == token:
            cached.expires_at = -math.inf

    def reveals(self, text: str) -> bool:
        """Return whether the text may contain a part of the token or of the client's secret."""
        cached = self._cached
        return _share(text, self._client_secret.get_secret_value()) or (
            cached is not None and _share(text, cached.text)
        )

    def abort(self) -> None:
        """End a request in progress, from any thread."""
        self._transport.abort()

    def after_fork(self) -> None:
        """Replace the parent's lock and connections in a forked child; a valid token is kept."""
        self._renewing = threading.Lock()
        self._transport.after_fork()

    def _valid(self, now: float) -> _CachedToken | None:
        cached = self._cached
        return cached if cached is not None and now < cached.expires_at else None

    def _outcome_since(self, seen: int) -> _CachedToken | ReadError | None:
        """Return what other callers' attempts came to; None if this caller has to make one.

        Args:
            seen: How many attempts had ended when this caller arrived: it shares the failure of a later one.
        """
        now = self._clock.monotonic()
        valid = self._valid(now)
        if valid is not None and now < valid.renew_at:
            return valid
        if self._failure is not None and (self._attempts != seen or now < self._not_before):
            return valid or self._failure
        return None

    def _renew(self, until: float) -> _CachedToken | ReadError:
        now = self._clock.monotonic()
        valid = self._valid(now)
        try:
            # A caller with a valid token leaves half of its time to the read, which can still use that token.
            obtained = self._obtain(until if valid is None else now + (until - now) / 2)
        except ReadError as error:
            now, asked = self._clock.monotonic(), error.retry_after_seconds or 0.0
            self._failure, self._not_before = copy.copy(error), now + asked  # the copy has no traceback to keep alive
            if valid is not None:
                valid.renew_at = now + max(asked, RENEWAL_PAUSE_SECONDS)
            self._attempts += 1
            return error
        self._cached, self._failure, self._not_before = obtained, None, -math.inf
        self._attempts += 1
        return obtained

    def _obtain(self, until: float) -> _CachedToken:
        started = self._clock.monotonic()
        form = {
            "grant_type": "client_credentials",
            "client_id": self._client_id,
            "client_secret": self._client_secret.get_secret_value(),
        }
        if self._scope:
            form["scope"] = self._scope
        headers = {"Accept": "application/json", "Content-Type": "application/x-www-form-urlencoded"}
        with self._transport.deadline(until) as deadline:
            response = self._transport.send(
                deadline, "POST", self._endpoint, headers=headers, body=urlencode(form).encode()
            )
        granted = self._granted(response)
        text, kind = granted.get("access_token"), granted.get("token_type", "Bearer")
        if not (isinstance(text, str) and len(text) <= MAX_TOKEN_LENGTH and _TOKEN.fullmatch(text)):
            raise TokenError(f"{self._subject}: its response has no usable access_token; check token_url")
        if not (isinstance(kind, str) and kind.lower() == "bearer"):
            raise TokenError(f"{self._subject}: it does not issue bearer tokens; check token_url")
        life = _life_seconds(granted.get("expires_in"))
        if life is None:
            raise TokenError(f"{self._subject}: `expires_in` in its response is not a number of seconds above 0")
        return _CachedToken(text, started + life - renewal_margin_seconds(life), started + life)

    def _granted(self, response: Response) -> Mapping[str, object]:
        """Return the JSON object of a success.

        Raises:
            ReadError: The response is something else.
        """
        status = response.status
        wait = parse_retry_after(
            response.headers.get("Retry-After"),
            now_wall=self._clock.wall(),
            cap_seconds=self._retry_after_max_seconds,
        )
        answered = f"{self._subject}: answered {status}"
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            raise RateLimited(answered, status=status, retry_after_seconds=wait)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise Unavailable(answered, status=status, retry_after_seconds=wait)
        if status in range(300, 400):
            raise Unavailable(f"{answered}, a redirect, which is not followed; check token_url", status=status)
        if isinstance(response.body_error, MalformedAnswer):
            raise TokenError(str(response.body_error), status=status) from response.body_error
        if response.body_error is not None:
            raise response.body_error
        try:
            granted = json.loads(response.body)
        except (ValueError, RecursionError):
            granted = None
        if isinstance(granted, dict) and granted.get("error") is not None:
            raise TokenError(f"{self._subject}: {_advice(granted['error'])}", status=status)
        if status not in range(200, 300):
            advice = "check token_url, and that its realm is the tenant's name"
            raise TokenError(f"{answered}; {advice}", status=status)
        if not isinstance(granted, dict):
            raise TokenError(f"{self._subject}: its response is not a JSON object; check token_url", status=status)
        return granted


_TOKEN = re.compile(r"[\x21-\x7e]+")
_ADVICE = {
    "invalid_client": "refused the client; check client_id and client_secret",
    "unauthorized_client": "does not let this client use client credentials; check client_id and the client's grants",
    "invalid_scope": "refused the scopes; check scope",
    "invalid_request": "refused the request; check token_url, client_id and scope",
}


def _advice(code: object) -> str:
    """Return what to do about an error code of RFC 6749 §5.2; other codes are the server's text, and not repeated."""
    default = "refused to issue a token; check token_url, client_id and client_secret"
    return _ADVICE.get(code, default) if isinstance(code, str) else default


def _life_seconds(given: object) -> float | None:
    """Return the life that the response gives the token; None if it is not one."""
    if given is None:
        return DEFAULT_LIFE_SECONDS
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < math.inf:
        return None
    return float(min(given, MAX_LIFE_SECONDS))  # an integer of 400 digits is no float


def _share(text: str, secret: str) -> bool:
    """Return whether two texts have `_SHARED` letters and digits in a row in common, whatever stands between them."""
    text, secret = ("".join(filter(str.isalnum, one.casefold())) for one in (text, secret))
    length = min(_SHARED, len(secret))
    return length > 0 and any(text[at : at + length] in secret for at in range(len(text) - length + 1))


def _copy_for_caller(error: ReadError, wait_seconds: float) -> ReadError:
    """Return the same failure for another caller: one exception raised in several threads would collect all traces."""
    again = copy.copy(error)
    if error.retry_after_seconds is not None:
        again.retry_after_seconds = max(0.0, wait_seconds)
    return again
