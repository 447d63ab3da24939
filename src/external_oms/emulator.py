"""The config API and its token endpoint on a real loopback server: what a person or a test cannot ask the platform for.

It behaves as the platform's published descriptions say, and misbehaves on command. It keeps everything in memory and
listens on loopback only. It is a test's tool: its control routes ask for no credentials.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from http import HTTPStatus
from types import TracebackType
from typing import Literal, Self

from flask import Flask, Response, request
from werkzeug.exceptions import HTTPException, NotFound
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from external_oms.config import Document, format_instant
from external_oms.emulated import EmulatedTenant, Fault, Routes, Seen, json_answer, problem_answer, problem_of
from external_oms.settings import Settings, TenantSettings
from external_oms.tenants import DEFAULT_CONFIG_PATH

__all__ = ["ConfigAPIEmulator", "Fault", "Seen"]


class ConfigAPIEmulator:
    """The config API of some tenants, and their token endpoint, over real HTTP on 127.0.0.1.

    Use it as a context manager, or by `start` and `stop`. Every method may be called from any thread.

    Args:
        tenants: The tenants' names; the first is the one that methods mean when they are given none.
        enabled: The value that each tenant starts with.
        shape: The answer's shape: `bare` is `{"enabled": …}`, `wrapped` has `value` and `updated_at`.
        etag: Whether answers carry an ETag, and If-None-Match is heeded.
        expires_in: The `expires_in` of tokens issued, in seconds; None leaves it out; anything else is sent as it is.
        config_path: The path of the configuration.
        write_method: The method that writes it.
        port: The port; 0 takes a free one.
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
        self._shape = shape
        self._etag = etag
        self._config_path = config_path
        self._write_method = write_method
        self._port = port
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._server: BaseWSGIServer | None = None
        self._thread: threading.Thread | None = None
        self._tenants = {
            name: EmulatedTenant(
                client_id=f"{name}-client",
                client_secret=secrets.token_urlsafe(24),
                access_token=secrets.token_urlsafe(24),
                document=Document(enabled, datetime.now(UTC)),
                expires_in=expires_in,
            )
            for name in tenants
        }
        self._first = next(iter(self._tenants))

    def start(self) -> Self:
        """Listen, and answer from a daemon thread."""
        if self._server is None:
            self._stopping.clear()
            self._server = make_server(
                "127.0.0.1", self._port, self._app(), threaded=True, request_handler=_QuietHandler
            )
            self._port = self._server.server_port
            self._thread = threading.Thread(
                target=self._server.serve_forever, args=(0.02,), name="external-oms-emulator", daemon=True
            )
            self._thread.start()
        return self

    def stop(self) -> None:
        """Stop listening; answers held back go out at once. Values, counts and the port stay for another start."""
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
        """Scheme, address and port."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def base_url(self) -> str:
        """What goes into the setting `base_url`, with a literal `{tenant}` in it."""
        return f"{self.origin}/{{tenant}}"

    @property
    def token_url(self) -> str:
        """What goes into the setting `token_url`, with a literal `{tenant}` in it."""
        return f"{self.origin}/auth/realms/{{tenant}}/protocol/openid-connect/token"

    @property
    def tenants(self) -> tuple[str, ...]:
        """The tenants' names."""
        return tuple(self._tenants)

    def settings(self, *tenants: str, **more: object) -> Settings:
        """Settings that work here, with client credentials: for the first tenant, or for those named.

        Args:
            tenants: None: the first tenant; one; or several, which makes settings with `tenants`.
            more: Further settings, which win.
        """
        reached: dict[str, object] = {"config_path": self._config_path, "write_method": self._write_method}
        reached |= {"base_url": self.base_url, "token_url": self.token_url}
        if len(tenants) > 1:
            return Settings(**{**reached, "tenants": {name: self.tenant_settings(name) for name in tenants}, **more})
        name = tenants[0] if tenants else self._first
        credentials = {} if "access_token" in more else self._credentials(name)
        return Settings(**{**reached, "tenant": name, **credentials, **more})

    def tenant_settings(self, tenant: str | None = None) -> TenantSettings:
        """How one tenant is reached here, with client credentials."""
        name = tenant or self._first
        return TenantSettings.model_validate(
            {
                "base_url": self.base_url,
                "config_path": self._config_path,
                "write_method": self._write_method,
                "token_url": self.token_url,
                **self._credentials(name),
            }
        )

    def _credentials(self, tenant: str) -> dict[str, object]:
        reached = self._tenants[tenant]
        return {"client_id": reached.client_id, "client_secret": reached.client_secret}

    def access_token(self, tenant: str | None = None) -> str:
        """A static access token of the tenant, which never ends."""
        return self._of(tenant).access_token

    def set_enabled(self, tenant: str | None, enabled: bool) -> None:
        """Change the value behind everybody's back, as another client of the API would."""
        with self._lock:
            self._of(tenant).change(enabled)

    def enabled(self, tenant: str | None = None) -> bool:
        """The value as it truly is, whatever a lagging replica answers."""
        return self._of(tenant).document.enabled

    def updated_at(self, tenant: str | None = None) -> datetime | None:
        """When the value was last changed, in UTC."""
        return self._of(tenant).document.updated_at

    def fault(self, tenant: str | None, fault: Fault) -> None:
        """Let the tenant's API misbehave; faults that meet the same request take their turns."""
        with self._lock:
            self._of(tenant).faults.append(fault)

    def clear(self, tenant: str | None = None) -> None:
        """End every fault of the tenant, a lag under way included."""
        with self._lock:
            self._of(tenant).faults.clear()
            self._of(tenant).replica = None

    def expire_tokens(self, tenant: str | None = None) -> None:
        """Let every token issued so far be worth nothing."""
        with self._lock:
            self._of(tenant).tokens.clear()

    def reads(self, tenant: str | None = None) -> int:
        """How many GETs arrived, refused and faulty ones included."""
        return self._of(tenant).counts["read"]

    def writes(self, tenant: str | None = None) -> int:
        """How many writes arrived, refused and faulty ones included."""
        return self._of(tenant).counts["write"]

    def tokens_issued(self, tenant: str | None = None) -> int:
        """How many tokens were issued."""
        return self._of(tenant).counts["issued"]

    def seen(self, tenant: str | None = None) -> tuple[Seen, ...]:
        """The last thousand requests, oldest first."""
        with self._lock:
            return tuple(self._of(tenant).seen)

    def _of(self, tenant: str | None) -> EmulatedTenant:
        return self._tenants[tenant or self._first]

    def _app(self) -> Flask:
        app = Flask("external_oms.emulator", static_folder=None)
        routes = Routes(self._tenants, self._lock, self._stopping, wrapped=self._shape == "wrapped", etag=self._etag)
        realm = "/auth/realms/<tenant>/protocol/openid-connect/token"
        methods = ["GET", self._write_method]
        app.add_url_rule(f"/<tenant>{self._config_path}", view_func=routes.configuration, methods=methods)
        app.add_url_rule(realm, view_func=routes.token, methods=["POST"])
        control = _Control(self)
        app.add_url_rule("/_control/tenants", view_func=control.every)
        app.add_url_rule("/_control/tenants/<tenant>", view_func=control.one)
        app.add_url_rule("/_control/tenants/<tenant>", view_func=control.put, methods=["PUT"])
        app.add_url_rule("/_control/tenants/<tenant>/faults", view_func=control.misbehave, methods=["POST"])
        app.add_url_rule("/_control/tenants/<tenant>/faults", view_func=control.behave, methods=["DELETE"])
        app.register_error_handler(HTTPException, problem_of)
        return app


class _Control:
    """How another process commands the emulator: what the object's methods do, in JSON."""

    def __init__(self, emulator: ConfigAPIEmulator) -> None:
        self._emulator = emulator

    def every(self) -> Response:
        return json_answer({"tenants": [self._account(tenant) for tenant in self._emulator.tenants]})

    def one(self, tenant: str) -> Response:
        return json_answer(self._account(self._known(tenant)))

    def put(self, tenant: str) -> Response:
        given = request.get_json(silent=True)
        if not isinstance(given, dict) or not isinstance(given.get("enabled"), bool):
            return problem_answer(HTTPStatus.BAD_REQUEST, "invalid_body")
        self._emulator.set_enabled(self._known(tenant), given["enabled"])
        return self.one(tenant)

    def misbehave(self, tenant: str) -> Response:
        given = request.get_json(silent=True)
        try:
            fault = Fault(**(given or {}))
        except (TypeError, ValueError):  # another field, or a value out of its range
            return problem_answer(HTTPStatus.BAD_REQUEST, "invalid_fault")
        self._emulator.fault(self._known(tenant), fault)
        return self.one(tenant)

    def behave(self, tenant: str) -> Response:
        self._emulator.clear(self._known(tenant))
        return self.one(tenant)

    def _known(self, tenant: str) -> str:
        if tenant not in self._emulator.tenants:
            raise NotFound
        return tenant

    def _account(self, tenant: str) -> dict[str, object]:
        emulator = self._emulator
        updated_at = emulator.updated_at(tenant)
        return {
            "tenant": tenant,
            "enabled": emulator.enabled(tenant),
            "updated_at": None if updated_at is None else format_instant(updated_at),
            "reads": emulator.reads(tenant),
            "writes": emulator.writes(tenant),
            "tokens_issued": emulator.tokens_issued(tenant),
            "seen": [asdict(seen) for seen in emulator.seen(tenant)],
        }


class _QuietHandler(WSGIRequestHandler):
    """Writes no line per request: what was asked stands in `seen`."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing."""
