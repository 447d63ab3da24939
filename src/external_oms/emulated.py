"""What the emulated platform is made of: its tenants, what they answer, and what goes wrong on command."""

from __future__ import annotations

import hashlib
import json
import secrets
import socket
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Literal, get_args

from flask import Response, request
from werkzeug.exceptions import HTTPException

from external_oms.config import Document

__all__ = [
    "MALFORMED",
    "EmulatedTenant",
    "Fault",
    "Kind",
    "Malformed",
    "Routes",
    "Seen",
    "Where",
    "json_answer",
    "problem_answer",
    "problem_of",
]

_DEFAULT_LIFE_SECONDS = 300.0
"""How long a token is good here whose `expires_in` says nothing usable."""

_LOG_LENGTH = 1000
"""Requests remembered per tenant."""

Kind = Literal["read", "write", "token"]
"""What a request to the emulator is: a read or a write of the configuration, or a request for a token."""

Where = Literal["read", "write", "token", "any"]
"""Which requests a fault befalls."""

Malformed = Literal["html", "truncated", "string", "number", "null", "missing"]
"""Which malformed document is answered, with status 200."""

MALFORMED: dict[Malformed, tuple[str, bytes]] = {
    "html": ("text/html", b"<!doctype html><title>Sign in</title><p>Please sign in."),
    "truncated": ("application/json", b'{"enabled": tr'),
    "string": ("application/json", b'{"enabled": "true"}'),
    "number": ("application/json", b'{"enabled": 1}'),
    "null": ("application/json", b'{"enabled": null}'),
    "missing": ("application/json", b"{}"),
}
"""The malformed documents: their content type and their bytes."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One misbehaviour; what is left out stays as it is, so a delay can stand alone or beside any other.

    Attributes:
        status: Answer this status, 400 to 599, with a problem document.
        retry_after: The Retry-After header of that answer: seconds, or any text.
        delay_seconds: Work out the answer first, then hold it back so long: a read tells the value of before, a write
            has been taken.
        malformed: Answer 200 with a document that is none.
        expired_token: Answer 403, and let the token of that request be worth nothing from then on.
        lag_reads: After the next change, answer so many reads with the document of before the change.
        lag_seconds: After the next change, answer reads so long with the document of before the change.
        dropped: Break the connection before the `headers`, or in the middle of the `body`; a write has been taken.
        redirect: Answer 307 to this address.
        times: How many requests (for a lag: changes) it befalls, >= 1; None: all until cleared.
        where: Which requests it befalls; a lag is about reads always.

    Raises:
        ValueError: A field is out of its range.
    """

    status: int | None = None
    retry_after: int | str | None = None
    delay_seconds: float = 0.0
    malformed: Malformed | None = None
    expired_token: bool = False
    lag_reads: int = 0
    lag_seconds: float = 0.0
    dropped: Literal["headers", "body"] | None = None
    redirect: str | None = None
    times: int | None = 1
    where: Where = "read"

    def __post_init__(self) -> None:
        if self.status is not None and self.status not in range(400, 600):
            raise ValueError("status is 400 to 599")
        if self.malformed is not None and self.malformed not in MALFORMED:
            raise ValueError(f"malformed is one of {', '.join(MALFORMED)}")
        if self.dropped not in {None, "headers", "body"}:
            raise ValueError("dropped is headers or body")
        if self.where not in get_args(Where):
            raise ValueError(f"where is one of {', '.join(get_args(Where))}")
        if self.times is not None and self.times < 1:
            raise ValueError("times is at least 1, or None for all until cleared")
        if min(self.delay_seconds, self.lag_reads, self.lag_seconds) < 0:
            raise ValueError("delay_seconds, lag_reads and lag_seconds are not negative")

    @property
    def lags(self) -> bool:
        """Whether it waits for a change instead of a request."""
        return self.lag_reads > 0 or self.lag_seconds > 0

    def befalls(self, kind: Kind) -> bool:
        """Whether a request of this kind meets it."""
        return not self.lags and self.where in {kind, "any"}


@dataclass(frozen=True, slots=True)
class Seen:
    """One request that the emulator answered; no credential of it is kept.

    Attributes:
        kind: `read`, `write` or `token`.
        method: The HTTP method.
        status: The status answered.
        conditional: Whether it carried If-None-Match.
        user_agent: Its User-Agent.
        at_wall: When, seconds since the Unix epoch.
    """

    kind: Kind
    method: str
    status: int
    conditional: bool
    user_agent: str
    at_wall: float


@dataclass(slots=True)
class _Replica:
    """The document of before a change, and how long reads still get it."""

    document: Document
    reads: int
    until: float


@dataclass(slots=True)
class EmulatedTenant:
    """One tenant of the emulator; whoever changes it holds the emulator's lock."""

    client_id: str
    client_secret: str = field(repr=False)
    access_token: str = field(repr=False)
    document: Document
    replica: _Replica | None = None
    tokens: dict[str, float] = field(default_factory=dict, repr=False)
    faults: list[Fault] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    seen: deque[Seen] = field(default_factory=lambda: deque(maxlen=_LOG_LENGTH))
    expires_in: object = 300

    def take(self, kind: Kind) -> Fault | None:
        """The fault that this request meets, one time less of it left."""
        return self._spend(lambda fault: fault.befalls(kind))

    def change(self, enabled: bool) -> None:
        """Another value, with an `updated_at` that is later than the last one, if only by a microsecond."""
        lag = self._spend(lambda fault: fault.lags)
        if lag is not None:
            until = time.monotonic() + lag.lag_seconds
            self.replica = _Replica(self.document, lag.lag_reads, until)
        before = self.document.updated_at
        now = datetime.now(UTC)
        self.document = Document(enabled, now if before is None else max(now, before + timedelta(microseconds=1)))

    def shown(self) -> Document:
        """The document that a read gets now."""
        replica = self.replica
        if replica is None:
            return self.document
        if replica.reads > 0:
            replica.reads -= 1
            return replica.document
        if time.monotonic() < replica.until:
            return replica.document
        self.replica = None
        return self.document

    def _spend(self, meets: Callable[[Fault], bool]) -> Fault | None:
        for place, fault in enumerate(self.faults):
            if meets(fault):
                if fault.times == 1:
                    del self.faults[place]
                elif fault.times is not None:
                    self.faults[place] = replace(fault, times=fault.times - 1)
                return fault
        return None


class Routes:
    """What the platform answers.

    Args:
        tenants: The tenants by name.
        lock: Held around every look at them.
        stopping: Set when the server stops: what is held back goes out.
        wrapped: Whether answers have `value` and `updated_at` around.
        etag: Whether they carry an ETag.
    """

    def __init__(
        self,
        tenants: Mapping[str, EmulatedTenant],
        lock: threading.RLock,
        stopping: threading.Event,
        *,
        wrapped: bool,
        etag: bool,
    ) -> None:
        self._tenants = tenants
        self._lock = lock
        self._stopping = stopping
        self._wrapped = wrapped
        self._etag = etag

    def configuration(self, tenant: str) -> Response:
        """Read or write the tenant's configuration."""
        if request.method in {"GET", "HEAD"}:
            return self._answered(tenant, "read", self._read)
        return self._answered(tenant, "write", self._write)

    def token(self, tenant: str) -> Response:
        """Issue a token."""
        return self._answered(tenant, "token", self._issue)

    def _answered(self, tenant: str, kind: Kind, honest: Callable[[EmulatedTenant], Response]) -> Response:
        reached = self._tenants.get(tenant)
        if reached is None:
            return problem_answer(HTTPStatus.NOT_FOUND, "unknown_tenant")
        request.get_data(parse_form_data=True)  # before the lock: a slow sender holds up nobody else
        with self._lock:
            reached.counts[kind] += 1
            fault = reached.take(kind) or Fault()
            response = _faulty(fault, reached) or honest(reached)
            conditional = "If-None-Match" in request.headers
            reached.seen.append(
                Seen(kind, request.method, response.status_code, conditional, request.user_agent.string, time.time())
            )
        if fault.delay_seconds > 0:
            self._stopping.wait(fault.delay_seconds)
        return response if fault.dropped is None else _dropped(response, fault.dropped)

    def _read(self, reached: EmulatedTenant) -> Response:
        refusal = _refusal(reached)
        if refusal is not None:
            return refusal
        return self._shown(reached.shown())

    def _write(self, reached: EmulatedTenant) -> Response:
        refusal = _refusal(reached)
        if refusal is not None:
            return refusal
        given = request.get_json(silent=True)
        if not isinstance(given, dict) or not isinstance(given.get("enabled"), bool):
            return problem_answer(HTTPStatus.BAD_REQUEST, "invalid_body")
        reached.change(given["enabled"])
        return self._shown(reached.document)

    def _shown(self, document: Document) -> Response:
        """The document in the configured shape; 304 where the caller has it."""
        body: dict[str, object] = {"enabled": document.enabled}
        since = "" if document.updated_at is None else document.updated_at.isoformat(timespec="microseconds")
        if self._wrapped:
            body = {"value": body, "updated_at": since.replace("+00:00", "Z")}
        response = json_answer(body)
        if self._etag:
            response.set_etag(hashlib.sha256(since.encode()).hexdigest()[:16])
            response.make_conditional(request)
        return response

    def _issue(self, reached: EmulatedTenant) -> Response:
        """A token, by RFC 6749 §4.4; the client names itself by Basic authentication or in the form."""
        form, basic = request.form, request.authorization
        shown = (form.get("client_id", ""), form.get("client_secret", ""))
        if basic is not None and basic.type == "basic":
            shown = (basic.username or "", basic.password or "")
        if form.get("grant_type") != "client_credentials":
            return json_answer({"error": "unsupported_grant_type"}, HTTPStatus.BAD_REQUEST)
        if shown != (reached.client_id, reached.client_secret):
            return json_answer({"error": "invalid_client"}, HTTPStatus.UNAUTHORIZED)
        token = secrets.token_urlsafe(32)
        life = reached.expires_in if isinstance(reached.expires_in, int | float) else _DEFAULT_LIFE_SECONDS
        reached.tokens[token] = time.monotonic() + life
        reached.counts["issued"] += 1
        answer: dict[str, object] = {"access_token": token, "token_type": "Bearer"}
        if reached.expires_in is not None:
            answer["expires_in"] = reached.expires_in
        return json_answer(answer)


def json_answer(body: object, status: int = HTTPStatus.OK) -> Response:
    """An answer in JSON."""
    return Response(json.dumps(body), status, mimetype="application/json")


def problem_answer(status: int, error_code: str) -> Response:
    """A problem document by RFC 9457, with the platform's own members."""
    title = HTTPStatus(status).phrase if status in set(HTTPStatus) else "Error"
    request_id = str(uuid.uuid4())
    body = {"type": "about:blank", "title": title, "status": status, "detail": title, "instance": request.path}
    body |= {"error_code": error_code, "message": title, "messages": [], "request_id": request_id}
    return Response(json.dumps(body), status, mimetype="application/problem+json")


def problem_of(error: HTTPException) -> Response:
    """The problem document for what Flask refused by itself."""
    return problem_answer(error.code or HTTPStatus.INTERNAL_SERVER_ERROR, error.name.lower().replace(" ", "_"))


def _presented() -> str:
    authorization = request.authorization
    return authorization.token or "" if authorization is not None and authorization.type == "bearer" else ""


def _refusal(reached: EmulatedTenant) -> Response | None:
    """401 without a token, 403 to one that is worth nothing here, as the platform has it."""
    token = _presented()
    if not token:
        return problem_answer(HTTPStatus.UNAUTHORIZED, "missing_token")
    if token != reached.access_token and time.monotonic() >= reached.tokens.get(token, 0.0):
        return problem_answer(HTTPStatus.FORBIDDEN, "invalid_token")
    return None


def _faulty(fault: Fault, reached: EmulatedTenant) -> Response | None:
    """The answer that a fault gives in place of an honest one, if it does."""
    if fault.expired_token:
        reached.tokens.pop(_presented(), None)
        return problem_answer(HTTPStatus.FORBIDDEN, "expired_token")
    if fault.redirect is not None:
        return Response(status=HTTPStatus.TEMPORARY_REDIRECT, headers={"Location": fault.redirect})
    if fault.status is not None:
        response = problem_answer(fault.status, "fault")
        if fault.retry_after is not None:
            response.headers["Retry-After"] = str(fault.retry_after)
        return response
    if fault.malformed is not None:
        mimetype, body = MALFORMED[fault.malformed]
        return Response(body, mimetype=mimetype)
    return None


def _dropped(response: Response, where: Literal["headers", "body"]) -> Response:
    """Break the connection under the answer."""
    if where == "headers":
        line: socket.socket = request.environ["werkzeug.socket"]
        line.shutdown(socket.SHUT_RDWR)
        return response
    body = response.get_data()
    half = Response(body[: len(body) // 2], response.status_code, mimetype=response.mimetype)
    half.headers["Content-Length"] = str(len(body))  # and then the server closes
    return half
