"""An emulator of the config API and of its token endpoint: a real HTTP server on loopback, with faults on command.

It behaves as the published descriptions of the platform say. It keeps everything in memory. It is a tool for tests and
trials: its control routes (`/_control/…`) require no credentials.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import socket
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from types import TracebackType
from typing import Literal, Self, get_args

from flask import Blueprint, Flask, Response, request
from werkzeug.exceptions import HTTPException, NotFound
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from external_oms.config import Document, format_instant
from external_oms.settings import ENV_PREFIX, Settings, TenantSettings
from external_oms.tenants import DEFAULT_CONFIG_PATH

__all__ = ["ConfigAPIEmulator", "Fault", "Kind", "Malformed", "RecordedRequest", "Target"]

_DEFAULT_EXPIRES_IN = 300.0
"""Seconds that a token is valid if `expires_in` is no number."""

_MAX_RECORDED = 1000
"""Requests recorded per tenant."""

Kind = Literal["read", "write", "token"]
"""A read or a write of the configuration, or a request for a token."""

Target = Literal["read", "write", "token", "any"]
"""The kind of requests that a fault applies to."""

Malformed = Literal["html", "truncated", "string", "number", "null", "missing"]
"""Which malformed document is answered, with status 200."""

_MALFORMED: dict[Malformed, tuple[str, bytes]] = {
    "html": ("text/html", b"<!doctype html><title>Sign in</title><p>Please sign in."),
    "truncated": ("application/json", b'{"enabled": tr'),
    "string": ("application/json", b'{"enabled": "true"}'),
    "number": ("application/json", b'{"enabled": 1}'),
    "null": ("application/json", b'{"enabled": null}'),
    "missing": ("application/json", b"{}"),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. Fields that are left out change nothing, so a delay can be used alone or with any other field.

    Attributes:
        status: Answer with this status, 400 to 599, and a problem document.
        retry_after: The Retry-After header of that response: seconds, or any text.
        delay_seconds: Hold the response back for so long after it was determined: a delayed read answers the value
            from before the delay, and a delayed write has been stored.
        malformed: Answer 200 with a document that is malformed in this way.
        expired_token: Answer 403, and invalidate the token of the request.
        lag_reads: After the next change, answer so many reads with the document from before the change.
        lag_seconds: After the next change, answer reads for so long with the document from before the change.
        dropped: Close the connection before the `headers`, or in the middle of the `body`; a write has been stored.
        redirect: Answer 307 to this address.
        times: How many requests (for a lag: changes) the fault applies to, >= 1; None: to all, until it is cleared.
        where: The kind of requests it applies to; a lag always applies to reads.

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
    where: Target = "read"

    def __post_init__(self) -> None:
        if self.status is not None and self.status not in range(400, 600):
            raise ValueError("status must be 400 to 599")
        if self.malformed is not None and self.malformed not in _MALFORMED:
            raise ValueError(f"malformed must be one of {', '.join(_MALFORMED)}")
        if self.dropped not in {None, "headers", "body"}:
            raise ValueError("dropped must be headers or body")
        if self.where not in get_args(Target):
            raise ValueError(f"where must be one of {', '.join(get_args(Target))}")
        if self.times is not None and self.times < 1:
            raise ValueError("times must be at least 1, or None for all until cleared")
        if min(self.delay_seconds, self.lag_reads, self.lag_seconds) < 0:
            raise ValueError("delay_seconds, lag_reads and lag_seconds must not be negative")

    @property
    def is_lag(self) -> bool:
        """Whether the fault begins with a change of the value instead of a request."""
        return self.lag_reads > 0 or self.lag_seconds > 0

    def applies_to(self, kind: Kind) -> bool:
        """Return whether the fault applies to a request of this kind."""
        return not self.is_lag and self.where in {kind, "any"}


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """A request that the emulator answered, without its credentials.

    Attributes:
        kind: `read`, `write` or `token`.
        method: The HTTP method.
        status: The status of the response.
        conditional: Whether the request had an If-None-Match header.
        user_agent: Its User-Agent.
        at_wall: When it was answered, in seconds since the Unix epoch.
    """

    kind: Kind
    method: str
    status: int
    conditional: bool
    user_agent: str
    at_wall: float


@dataclass(slots=True)
class _Replica:
    """The document from before a change, and how long reads still get it."""

    document: Document
    reads: int
    until: float


@dataclass(slots=True)
class _Tenant:
    """The state of one tenant; changed only under the lock of the emulator."""

    client_id: str
    client_secret: str = field(repr=False)
    access_token: str = field(repr=False)
    document: Document
    replica: _Replica | None = None
    tokens: dict[str, float] = field(default_factory=dict, repr=False)
    faults: list[Fault] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    recorded: deque[RecordedRequest] = field(default_factory=lambda: deque(maxlen=_MAX_RECORDED))

    def change(self, enabled: bool) -> None:
        """Set the value, with an `updated_at` later than the last one, if only by a microsecond."""
        lag = self.take_fault(lambda fault: fault.is_lag)
        if lag is not None:
            self.replica = _Replica(self.document, lag.lag_reads, time.monotonic() + lag.lag_seconds)
        before, now = self.document.updated_at, datetime.now(UTC)
        self.document = Document(enabled, now if before is None else max(now, before + timedelta(microseconds=1)))

    def read(self) -> Document:
        """Return the document that a read gets now: that of the replica while it lags."""
        replica = self.replica
        if replica is not None and replica.reads > 0:
            replica.reads -= 1
            return replica.document
        if replica is not None and time.monotonic() < replica.until:
            return replica.document
        self.replica = None
        return self.document

    def take_fault(self, applies: Callable[[Fault], bool]) -> Fault | None:
        """Return the first fault that applies, and count it down."""
        for index, fault in enumerate(self.faults):
            if applies(fault):
                if fault.times == 1:
                    del self.faults[index]
                elif fault.times is not None:
                    self.faults[index] = replace(fault, times=fault.times - 1)
                return fault
        return None

    def refuse(self) -> Response | None:
        """Return 401 for a request without a token and 403 for an invalid token, as the platform does."""
        token = _bearer()
        if not token:
            return _problem(HTTPStatus.UNAUTHORIZED, "missing_token")
        if token != self.access_token and time.monotonic() >= self.tokens.get(token, 0.0):
            return _problem(HTTPStatus.FORBIDDEN, "invalid_token")
        return None


class ConfigAPIEmulator:
    """The config API of some tenants and their token endpoint, over real HTTP on 127.0.0.1.

    Use it as a context manager, or with `start` and `stop`. Every method may be called from any thread. A method that
    takes a tenant means the first tenant when it is given None.

    Args:
        tenants: The names of the tenants.
        enabled: The value that each tenant starts with.
        shape: The shape of the responses: `bare` is `{"enabled": …}`, `wrapped` has `value` and `updated_at`.
        etag: Whether responses have an ETag, and If-None-Match is respected.
        expires_in: The `expires_in` of tokens, in seconds; None leaves it out; anything else is sent as it is.
        config_path: The path of the configuration.
        write_method: The method that writes it.
        port: The port; 0 takes a free one.

    Attributes:
        webhook_secret: A secret for the application under test and for the sender of its deliveries. The emulator
            itself sends no delivery.
    """

    def __init__(
        self,
        tenants: Sequence[str] = ("acme-staging",),
        *,
        enabled: bool = False,
        shape: Literal["bare", "wrapped"] = "wrapped",
        etag: bool = False,
        expires_in: object = 300,
        config_path: str = DEFAULT_CONFIG_PATH,
        write_method: Literal["POST", "PUT", "PATCH"] = "POST",
        port: int = 0,
    ) -> None:
        self.webhook_secret = f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"
        self._config_path = config_path
        self._write_method = write_method
        self._port = port
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._server: BaseWSGIServer | None = None
        self._thread: threading.Thread | None = None
        self._tenants = {
            name: _Tenant(
                client_id=f"{name}-client",
                client_secret=secrets.token_urlsafe(24),
                access_token=secrets.token_urlsafe(24),
                document=Document(enabled, datetime.now(UTC)),
            )
            for name in tenants
        }
        self._first = next(iter(self._tenants))
        api = _API(
            self._tenants, self._lock, self._stopping, wrapped=shape == "wrapped", etag=etag, expires_in=expires_in
        )
        self._app = _create_app(self, api, config_path, write_method)

    def start(self) -> Self:
        """Listen, and answer from a daemon thread.

        Raises:
            OSError: The port is in use.
        """
        if self._server is None:
            self._stopping.clear()
            # A socket of our own, since werkzeug ends the process where a port is in use.
            with socket.create_server(("127.0.0.1", self._port), backlog=128) as listening:
                self._port = listening.getsockname()[1]
                self._server = make_server(
                    "127.0.0.1",
                    self._port,
                    self._app,
                    threaded=True,
                    request_handler=_QuietHandler,
                    fd=listening.fileno(),
                )
            self._thread = threading.Thread(
                target=self._server.serve_forever, args=(0.02,), name="external-oms-emulator", daemon=True
            )
            self._thread.start()
        return self

    def stop(self) -> None:
        """Stop listening, and send delayed responses at once. Values, counts and the port remain for another start."""
        server, thread = self._server, self._thread
        self._server = self._thread = None
        self._stopping.set()
        if server is not None and thread is not None:
            server.shutdown()
            thread.join()
            server.server_close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def origin(self) -> str:
        """The scheme, the address and the port."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def base_url(self) -> str:
        """The value for the setting `base_url`, with a literal `{tenant}` in it."""
        return f"{self.origin}/{{tenant}}"

    @property
    def token_url(self) -> str:
        """The value for the setting `token_url`, with a literal `{tenant}` in it."""
        return f"{self.origin}{_TOKEN_PATH.format(tenant='{tenant}')}"

    @property
    def tenants(self) -> tuple[str, ...]:
        """The names of the tenants."""
        return tuple(self._tenants)

    def settings(self, *tenants: str, **more: object) -> Settings:
        """Return settings that reach this emulator with client credentials.

        Args:
            tenants: None: for the first tenant; one: for it; several: settings with `tenants`.
            more: Further settings, which take precedence.
        """
        if len(tenants) > 1:
            by_tenant = {name: self.tenant_settings(name) for name in tenants}
            return Settings(**{**self._address(), "tenants": by_tenant, **more})
        name = tenants[0] if tenants else self._first
        credentials = {} if "access_token" in more else self._credentials(name)
        return Settings(**{**self._address(), "tenant": name, **credentials, **more})

    def tenant_settings(self, tenant: str | None = None) -> TenantSettings:
        """Return how one tenant is reached here, with client credentials."""
        return TenantSettings.model_validate({**self._address(), **self._credentials(tenant or self._first)})

    def environment(self) -> dict[str, str]:
        """Return environment variables with which an application, with its webhook, runs against this emulator.

        They configure every tenant of the emulator, secrets included.
        """
        given = {**self._address(), "webhook_secrets": self.webhook_secret}
        if len(self._tenants) == 1:
            given |= {"tenant": self._first, **self._credentials(self._first)}
        else:
            given["tenants"] = json.dumps({name: self._credentials(name) for name in self._tenants})
        return {f"{ENV_PREFIX}{name.upper()}": value for name, value in given.items()}

    def _address(self) -> dict[str, str]:
        given = {"base_url": self.base_url, "token_url": self.token_url}
        return given | {"config_path": self._config_path, "write_method": self._write_method}

    def _credentials(self, tenant: str) -> dict[str, str]:
        state = self._tenants[tenant]
        return {"client_id": state.client_id, "client_secret": state.client_secret}

    def access_token(self, tenant: str | None = None) -> str:
        """Return a static access token of the tenant, which never expires."""
        return self._of(tenant).access_token

    def set_enabled(self, tenant: str | None, enabled: bool) -> None:
        """Change the value, as another client of the API does."""
        with self._lock:
            self._of(tenant).change(enabled)

    def enabled(self, tenant: str | None = None) -> bool:
        """Return the stored value, whatever a lagging replica answers."""
        return self._of(tenant).document.enabled

    def updated_at(self, tenant: str | None = None) -> datetime | None:
        """Return when the value was last changed, in UTC."""
        return self._of(tenant).document.updated_at

    def fault(self, tenant: str | None, fault: Fault) -> None:
        """Add a fault; of several faults for the same kind of request, the first one added applies first."""
        with self._lock:
            self._of(tenant).faults.append(fault)

    def clear(self, tenant: str | None = None) -> None:
        """Remove every fault of the tenant, also a lag that has begun."""
        with self._lock:
            self._of(tenant).faults.clear()
            self._of(tenant).replica = None

    def expire_tokens(self, tenant: str | None = None) -> None:
        """Invalidate every token that was issued so far."""
        with self._lock:
            self._of(tenant).tokens.clear()

    def reads(self, tenant: str | None = None) -> int:
        """Return the number of reads, refused and faulty ones included."""
        return self._of(tenant).counts["read"]

    def writes(self, tenant: str | None = None) -> int:
        """Return the number of writes, refused and faulty ones included."""
        return self._of(tenant).counts["write"]

    def tokens_issued(self, tenant: str | None = None) -> int:
        """Return the number of tokens issued."""
        return self._of(tenant).counts["issued"]

    def seen(self, tenant: str | None = None) -> tuple[RecordedRequest, ...]:
        """Return the last thousand requests, oldest first."""
        with self._lock:
            return tuple(self._of(tenant).recorded)

    def _of(self, tenant: str | None) -> _Tenant:
        return self._tenants[tenant or self._first]


_TOKEN_PATH = "/auth/realms/{tenant}/protocol/openid-connect/token"  # noqa: S105 - a path


@dataclass(frozen=True, slots=True)
class _API:
    """Answers what the platform answers.

    Attributes:
        tenants: The tenants by name.
        lock: Held around every access to them.
        stopping: Set when the server stops; ends every delay.
        wrapped: Whether responses have `value` and `updated_at`.
        etag: Whether responses have an ETag.
        expires_in: The `expires_in` of tokens.
    """

    tenants: Mapping[str, _Tenant]
    lock: threading.RLock
    stopping: threading.Event
    wrapped: bool
    etag: bool
    expires_in: object

    def answer(self, tenant: str, kind: Kind, normal: Callable[[_Tenant], Response]) -> Response:
        """Answer one request: as the fault says that applies to it, otherwise normally."""
        state = self.tenants.get(tenant)
        if state is None:
            return _problem(HTTPStatus.NOT_FOUND, "unknown_tenant")
        request.get_data(parse_form_data=True)  # outside the lock, so that a slow sender does not delay others
        with self.lock:
            state.counts[kind] += 1
            fault = state.take_fault(lambda fault: fault.applies_to(kind)) or Fault()
            response = _faulty(fault, state) or normal(state)
            conditional, agent = "If-None-Match" in request.headers, request.user_agent.string
            state.recorded.append(
                RecordedRequest(kind, request.method, response.status_code, conditional, agent, time.time())
            )
        if fault.delay_seconds > 0:
            self.stopping.wait(fault.delay_seconds)
        return response if fault.dropped is None else _dropped(response, fault.dropped)

    def read(self, state: _Tenant) -> Response:
        return state.refuse() or self._document(state.read())

    def write(self, state: _Tenant) -> Response:
        refusal, enabled = state.refuse(), _enabled_in_body()
        if refusal is not None:
            return refusal
        if enabled is None:
            return _problem(HTTPStatus.BAD_REQUEST, "invalid_body")
        state.change(enabled)
        return self._document(state.document)

    def _document(self, document: Document) -> Response:
        """Return the document in the configured shape, or 304 if the client has it."""
        body: dict[str, object] = {"enabled": document.enabled}
        since = "" if document.updated_at is None else document.updated_at.isoformat(timespec="microseconds")
        if self.wrapped:
            body = {"value": body, "updated_at": since.replace("+00:00", "Z")}
        response = _json(body)
        if self.etag:
            response.set_etag(hashlib.sha256(since.encode()).hexdigest()[:16])
            response.make_conditional(request)
        return response

    def issue_token(self, state: _Tenant) -> Response:
        """Issue a token by RFC 6749 §4.4; the client authenticates by Basic authentication or in the form."""
        form, basic = request.form, request.authorization
        client = (form.get("client_id", ""), form.get("client_secret", ""))
        if basic is not None and basic.type == "basic":
            client = (basic.username or "", basic.password or "")
        if form.get("grant_type") != "client_credentials":
            return _json({"error": "unsupported_grant_type"}, HTTPStatus.BAD_REQUEST)
        if client != (state.client_id, state.client_secret):
            return _json({"error": "invalid_client"}, HTTPStatus.UNAUTHORIZED)
        token = secrets.token_urlsafe(32)
        valid_seconds = self.expires_in if isinstance(self.expires_in, int | float) else _DEFAULT_EXPIRES_IN
        state.tokens[token] = time.monotonic() + valid_seconds
        state.counts["issued"] += 1
        body: dict[str, object] = {"access_token": token, "token_type": "Bearer"}
        if self.expires_in is not None:
            body["expires_in"] = self.expires_in
        return _json(body)


def _create_app(emulator: ConfigAPIEmulator, api: _API, config_path: str, write_method: str) -> Flask:
    app = Flask("external_oms.emulator", static_folder=None)

    @app.get(f"/<tenant>{config_path}")
    def read(tenant: str) -> Response:
        return api.answer(tenant, "read", api.read)

    @app.route(f"/<tenant>{config_path}", methods=[write_method])
    def write(tenant: str) -> Response:
        return api.answer(tenant, "write", api.write)

    @app.post(_TOKEN_PATH.format(tenant="<tenant>"))
    def token(tenant: str) -> Response:
        return api.answer(tenant, "token", api.issue_token)

    @app.errorhandler(HTTPException)
    def refuse(error: HTTPException) -> Response:
        return _problem(error.code or HTTPStatus.INTERNAL_SERVER_ERROR, error.name.lower().replace(" ", "_"))

    app.register_blueprint(_control(emulator))
    return app


def _control(emulator: ConfigAPIEmulator) -> Blueprint:
    """Return the routes that do what the methods of the emulator do, for other processes."""
    control = Blueprint("control", __name__, url_prefix="/_control/tenants")

    @control.before_request
    def refuse_unknown() -> None:
        if (request.view_args or {}).get("tenant", emulator.tenants[0]) not in emulator.tenants:
            raise NotFound

    @control.get("")
    def list_tenants() -> Response:
        return _json({"tenants": [_describe(emulator, tenant) for tenant in emulator.tenants]})

    @control.get("/<tenant>")
    def get_tenant(tenant: str) -> Response:
        return _json(_describe(emulator, tenant))

    @control.put("/<tenant>")
    def put_tenant(tenant: str) -> Response:
        enabled = _enabled_in_body()
        if enabled is None:
            return _problem(HTTPStatus.BAD_REQUEST, "invalid_body")
        emulator.set_enabled(tenant, enabled)
        return get_tenant(tenant)

    @control.post("/<tenant>/faults")
    def add_fault(tenant: str) -> Response:
        try:
            fault = Fault(**(request.get_json(silent=True) or {}))
        except (TypeError, ValueError):  # an unknown field, or a value out of its range
            return _problem(HTTPStatus.BAD_REQUEST, "invalid_fault")
        emulator.fault(tenant, fault)
        return get_tenant(tenant)

    @control.delete("/<tenant>/faults")
    def clear_faults(tenant: str) -> Response:
        emulator.clear(tenant)
        return get_tenant(tenant)

    return control


def _describe(emulator: ConfigAPIEmulator, tenant: str) -> dict[str, object]:
    updated_at = emulator.updated_at(tenant)
    return {
        "tenant": tenant,
        "enabled": emulator.enabled(tenant),
        "updated_at": None if updated_at is None else format_instant(updated_at),
        "reads": emulator.reads(tenant),
        "writes": emulator.writes(tenant),
        "tokens_issued": emulator.tokens_issued(tenant),
        "seen": [asdict(recorded) for recorded in emulator.seen(tenant)],
    }


def _enabled_in_body() -> bool | None:
    given = request.get_json(silent=True)
    enabled = given.get("enabled") if isinstance(given, dict) else None
    return enabled if isinstance(enabled, bool) else None


def _bearer() -> str:
    authorization = request.authorization
    return authorization.token or "" if authorization is not None and authorization.type == "bearer" else ""


def _json(body: object, status: int = HTTPStatus.OK) -> Response:
    return Response(json.dumps(body), status, mimetype="application/json")


def _problem(status: int, error_code: str) -> Response:
    """Return a problem document by RFC 9457, with the members that the platform adds."""
    title = HTTPStatus(status).phrase if status in set(HTTPStatus) else "Error"
    body = {"type": "about:blank", "title": title, "status": status, "detail": title, "instance": request.path}
    body |= {"error_code": error_code, "message": title, "messages": [], "request_id": str(uuid.uuid4())}
    return Response(json.dumps(body), status, mimetype="application/problem+json")


def _faulty(fault: Fault, state: _Tenant) -> Response | None:
    """Return the response that a fault gives in place of the normal one, if it does."""
    if fault.expired_token:
        state.tokens.pop(_bearer(), None)
        return _problem(HTTPStatus.FORBIDDEN, "expired_token")
    if fault.redirect is not None:
        return Response(status=HTTPStatus.TEMPORARY_REDIRECT, headers={"Location": fault.redirect})
    if fault.status is not None:
        response = _problem(fault.status, "fault")
        if fault.retry_after is not None:
            response.headers["Retry-After"] = str(fault.retry_after)
        return response
    if fault.malformed is not None:
        mimetype, body = _MALFORMED[fault.malformed]
        return Response(body, mimetype=mimetype)
    return None


def _dropped(response: Response, where: Literal["headers", "body"]) -> Response:
    """Close the connection before the headers, or let the body end before its announced length."""
    if where == "headers":
        connection: socket.socket = request.environ["werkzeug.socket"]
        connection.shutdown(socket.SHUT_RDWR)
        return response
    body = response.get_data()
    half = Response(body[: len(body) // 2], response.status_code, mimetype=response.mimetype)
    half.headers["Content-Length"] = str(len(body))
    return half


class _QuietHandler(WSGIRequestHandler):
    """Logs no requests: `seen` has them."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Do nothing."""
