"""Access tokens, each tenant's by itself: renewed before they end, by one caller at a time, whom the others wait for.

Source: RFC 6749 §4.4 (client credentials grant), §5.1 and §5.2 (answers of a token endpoint).
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlencode

import requests
from cachetools import TLRUCache
from pydantic import SecretStr

from external_oms.clock import Clock
from external_oms.errors import MalformedAnswer, RateLimited, ReadError, TokenError, Unavailable
from external_oms.transport import Answer, Call, Transport, parse_retry_after

__all__ = ["ClientCredentials", "StaticToken", "TokenSource", "renewal_margin_seconds"]

DEFAULT_LIFE_SECONDS = 300.0
"""The life of a token whose answer leaves `expires_in` out, as RFC 6749 §5.1 lets it; Keycloak's own default."""

MAX_TOKEN_LENGTH = 16_384
"""Characters; no server that we know takes a longer header."""

RENEWAL_PAUSE_SECONDS = 5.0
"""The least time between two tries to renew a token that is still valid: a dead endpoint must not slow every read."""


def renewal_margin_seconds(life_seconds: float) -> float:
    """How many seconds before its end a token is renewed: a tenth of its life, 5 to 60, and never more than half of it.

    Args:
        life_seconds: Its whole life, > 0.
    """
    return min(max(life_seconds / 10, 5.0), 60.0, life_seconds / 2)


class TokenSource(Protocol):
    """Where the access token of one tenant comes from."""

    @property
    def renews(self) -> bool:
        """Whether another token can be had in place of one that was refused."""
        ...  # pragma: no cover - a Protocol's body never runs

    def token(self, *, deadline: float | None = None) -> str:
        """A token that is valid as far as is known, obtained or renewed if need be.

        Args:
            deadline: When to give up, seconds on the monotonic clock; None: after the source's own timeout.

        Raises:
            TokenError: The token endpoint refused, or answered with no usable token.
            RateLimited: It answered 429.
            Unavailable: It gave no whole answer in time, or answered 5xx.
        """
        ...  # pragma: no cover - a Protocol's body never runs

    def drop(self, token: str) -> None:
        """Forget this token, and no other."""
        ...  # pragma: no cover - a Protocol's body never runs

    def abort(self) -> None:
        """End what is under way, from any thread."""
        ...  # pragma: no cover - a Protocol's body never runs

    def after_fork(self) -> None:
        """In a child: use no lock and no socket of the parent's."""
        ...  # pragma: no cover - a Protocol's body never runs


class StaticToken:
    """A token that was configured; there is no other.

    Args:
        token: The access token.
    """

    renews = False

    def __init__(self, token: SecretStr) -> None:
        self._token = token

    def token(self, *, deadline: float | None = None) -> str:  # noqa: ARG002 - nothing here takes time
        """The token."""
        return self._token.get_secret_value()

    def drop(self, token: str) -> None:
        """Keep it: there is no other."""

    def abort(self) -> None:
        """Nothing is ever under way."""

    def after_fork(self) -> None:
        """Nothing belongs to the parent."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A token and its times, seconds on the monotonic clock, counted from the *start* of the request for it."""

    text: str = field(repr=False)
    renew_at: float
    expires_at: float


class ClientCredentials:
    """Tokens by the client credentials grant; each object keeps its own, so no two tenants can share one.

    A token is renewed a little before its end. Where the renewal fails and the old token is still valid, the old one is
    used on. No refresh token is ever used: RFC 6749 §4.4.3 gives none for this grant.

    Args:
        tenant: Whose tokens these are.
        endpoint: The address of the token endpoint.
        client_id: The client's id.
        client_secret: Its secret, sent in the form as the platform documents it.
        scope: The scopes to ask for, separated by spaces; empty asks for the client's own.
        session: The user's session, or None.
        clock: What tells the time.
        timeout_seconds: How long a caller that names no deadline waits, > 0.
        retry_after_max_seconds: The most that a Retry-After is believed, in seconds.
        obtained: Told of every try to obtain a token, with its failure where it failed; must not block.
    """

    renews = True

    def __init__(  # noqa: PLR0913 - the grant has five parts, and the seams are four
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
        obtained: Callable[[ReadError | None], None] = lambda _: None,
    ) -> None:
        self._tenant = tenant
        self._endpoint = endpoint
        self._client_id = client_id
        self._client_secret = client_secret
        self._scope = scope
        self._clock = clock
        self._timeout_seconds = timeout_seconds
        self._retry_after_max_seconds = retry_after_max_seconds
        self._obtained = obtained
        self._subject = f"the token endpoint of tenant {tenant!r}"
        self._transport = Transport(session, subject=self._subject, clock=clock)
        self._not_before = 0.0
        self._refusal: ReadError | None = None
        self._renew_locks()
        self._held = self._new_cache()
        # Imported by the thread that makes the provider, not by the reader that wants the first token: a fork in the
        # middle of an import leaves the module's lock held for ever in the child, and its reader with it.
        importlib.import_module("authlib.oauth2.client")

    def _renew_locks(self) -> None:
        self._lock = threading.Lock()
        self._flight: Future[str] | None = None

    def _new_cache(self) -> TLRUCache[ClientCredentials, _Held]:
        """Room for one token, keyed by this very object: another's is not to be found here."""
        return TLRUCache(maxsize=1, ttu=lambda _source, held, _now: held.expires_at, timer=self._clock.monotonic)

    def token(self, *, deadline: float | None = None) -> str:
        """A token; see `TokenSource.token`. One caller obtains it, those who come meanwhile share what comes of it."""
        now = self._clock.monotonic()
        until = now + self._timeout_seconds if deadline is None else deadline
        with self._lock:
            held = self._held.get(self)
            if held is not None and now < max(held.renew_at, self._not_before):
                return held.text
            if held is None and self._refusal is not None and now < self._not_before:
                raise _again(self._refusal, self._not_before - now)
            flight, mine = self._flight, self._flight is None
            if flight is None:
                flight = self._flight = Future()
        if mine:
            self._fly(flight, held, until)
        elif held is not None:
            return held.text
        return self._landed(flight, until)

    def drop(self, token: str) -> None:
        """Forget this token if it is the one held; a newer one stays."""
        with self._lock:
            held = self._held.get(self)
            if held is not None and held.text == token:
                del self._held[self]

    def abort(self) -> None:
        """End a request under way, from any thread."""
        self._transport.abort()

    def after_fork(self) -> None:
        """In a child: new locks and no connection of the parent's; a valid token is kept."""
        held = self._held.get(self)  # a cache copied in the middle of a change answers None at worst
        self._renew_locks()
        self._transport.after_fork()
        self._held = self._new_cache()
        if held is not None:
            self._held[self] = held

    def _fly(self, flight: Future[str], held: _Held | None, until: float) -> None:
        """Obtain a token for everyone who waits, and let them have it, or the failure, whatever happens."""
        now = self._clock.monotonic()
        if held is not None:
            until = now + (until - now) / 2  # the other half is for the read, which can go on with the old token
        outcome: _Held | ReadError = Unavailable(f"{self._subject}: the renewal was interrupted")
        try:
            outcome = self._obtain(until)
        except ReadError as error:
            outcome = error
        finally:
            self._land(flight, outcome)
            self._obtained(outcome if isinstance(outcome, ReadError) else None)

    def _land(self, flight: Future[str], outcome: _Held | ReadError) -> None:
        now = self._clock.monotonic()
        with self._lock:
            self._flight = None
            if isinstance(outcome, _Held):
                self._held[self] = outcome
                self._refusal, self._not_before = None, 0.0
                flight.set_result(outcome.text)
                return
            old = self._held.get(self)
            asked = outcome.retry_after_seconds
            self._refusal = outcome if asked else None
            self._not_before = now + max(asked or 0.0, RENEWAL_PAUSE_SECONDS if old is not None else 0.0)
            if old is not None:
                flight.set_result(old.text)
            else:
                flight.set_exception(outcome)

    def _landed(self, flight: Future[str], until: float) -> str:
        try:
            return flight.result(timeout=max(0.0, until - self._clock.monotonic()))
        except ReadError as error:
            raise _again(error, error.retry_after_seconds) from error
        except TimeoutError as error:
            raise Unavailable(f"{self._subject}: another caller's renewal did not end in time") from error

    def _obtain(self, until: float) -> _Held:
        started = self._clock.monotonic()
        with self._transport.call(until) as call:
            given = self._granted(call)
        text, kind, life = given.get("access_token"), given.get("token_type", "Bearer"), _life_seconds(given)
        if not (isinstance(text, str) and len(text) <= MAX_TOKEN_LENGTH and _TOKEN.fullmatch(text)):
            raise TokenError(f"{self._subject}: its answer has no usable access_token; is token_url right?")
        if not (isinstance(kind, str) and kind.lower() == "bearer"):
            raise TokenError(f"{self._subject}: what it issues is no bearer token; is token_url right?")
        if life is None:
            raise TokenError(f"{self._subject}: `expires_in` in its answer is not a number of seconds above 0")
        return _Held(text, started + life - renewal_margin_seconds(life), started + life)

    def _granted(self, call: Call) -> Mapping[str, object]:
        """The JSON object with a token in it; everything that Authlib may raise is wrapped here."""
        from authlib.oauth2 import OAuth2Error  # noqa: PLC0415 - a static token needs no Authlib
        from authlib.oauth2.client import OAuth2Client  # noqa: PLC0415 - likewise

        endpoint = _Endpoint(self._transport, call, self._refuse)
        client = OAuth2Client(
            endpoint,
            client_id=self._client_id,
            client_secret=self._client_secret.get_secret_value(),
            token_endpoint_auth_method="client_secret_post",  # noqa: S106 - the method's name
            scope=self._scope or None,
        )
        try:
            given: Mapping[str, object] = client.fetch_token(self._endpoint, grant_type="client_credentials")
        except ReadError:
            raise
        except OAuth2Error as error:
            advice = _advice(error.error)
            # From None: the foreign error quotes the server's own words.
            raise TokenError(f"{self._subject}: {advice}", status=endpoint.status) from None
        except Exception as error:
            problem = "its answer is not a token's; is token_url right?"
            raise TokenError(f"{self._subject}: {problem}", status=endpoint.status or None) from error
        if endpoint.status not in range(200, 300):
            problem = f"answered {endpoint.status}; is token_url right?"
            raise TokenError(f"{self._subject}: {problem}", status=endpoint.status)
        return given

    def _refuse(self, answer: Answer) -> None:
        """Raise for an answer that says nothing about the client."""
        status = answer.status
        wait = parse_retry_after(
            answer.headers.get("Retry-After"),
            now_wall=self._clock.wall(),
            cap_seconds=self._retry_after_max_seconds,
        )
        if status == requests.codes.too_many_requests:
            raise RateLimited(f"{self._subject}: answered 429", status=status, retry_after_seconds=wait)
        if status >= requests.codes.server_error:
            raise Unavailable(f"{self._subject}: answered {status}", status=status, retry_after_seconds=wait)
        if status in range(300, 400):
            raise Unavailable(f"{self._subject}: answered {status}, a redirect; is token_url right?", status=status)
        if isinstance(answer.trouble, MalformedAnswer):
            raise TokenError(str(answer.trouble), status=status) from answer.trouble
        if answer.trouble is not None:
            raise answer.trouble


@dataclass(frozen=True, slots=True)
class _Granting:
    """What Authlib takes for a response."""

    status_code: int
    body: bytes = field(repr=False)

    def json(self) -> object:
        return json.loads(self.body)

    def raise_for_status(self) -> None:
        """Authlib calls this where the body is no JSON object."""
        raise ValueError(f"status {self.status_code} without a JSON object")


class _Endpoint:
    """What Authlib takes for a session: one POST, made by our transport."""

    def __init__(self, transport: Transport, call: Call, refuse: Callable[[Answer], None]) -> None:
        self._transport = transport
        self._call = call
        self._refuse = refuse
        self.status = 0

    def post(self, url: str, *, data: Mapping[str, str], headers: Mapping[str, str], auth: _ClientAuth) -> _Granting:
        url, signed, form = auth.prepare("POST", url, dict(headers), urlencode(data))
        answer = self._transport.exchange(
            self._call,
            "POST",
            url,
            signer=lambda request: request,  # signed already; and no ~/.netrc is asked
            headers=signed,
            body=form.encode("utf-8"),
        )
        self.status = answer.status
        self._refuse(answer)
        return _Granting(answer.status, answer.body)


class _ClientAuth(Protocol):
    """Authlib's way of putting the client's credentials into a request."""

    def prepare(self, method: str, uri: str, headers: dict[str, str], body: str) -> tuple[str, dict[str, str], str]: ...


_TOKEN = re.compile(r"[\x21-\x7e]+")
_ADVICE = {
    "invalid_client": "refused the client; check client_id and client_secret",
    "unauthorized_client": "does not let this client use client credentials; check client_id and the client's grants",
    "invalid_scope": "refused the scopes; check scope",
    "invalid_request": "refused the request; check token_url, client_id and scope",
}


def _advice(code: object) -> str:
    """What to do about an error code of RFC 6749 §5.2; another code is the server's text, and not repeated."""
    default = "refused to issue a token; check token_url, client_id and client_secret"
    return _ADVICE.get(code, default) if isinstance(code, str) else default


def _life_seconds(given: Mapping[str, object]) -> float | None:
    """The life that the answer gives the token; None where it is not one."""
    life = given.get("expires_in")
    if life is None:
        return DEFAULT_LIFE_SECONDS
    if isinstance(life, bool) or not isinstance(life, int | float):
        return None
    return float(life) if 0 < life < math.inf else None


def _again(error: ReadError, retry_after_seconds: float | None) -> ReadError:
    """The same failure for another caller: one exception raised in several threads would collect all their traces."""
    again = copy.copy(error)
    again.retry_after_seconds = retry_after_seconds
    return again
