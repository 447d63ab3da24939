"""The whole server in this process, and the keys and secrets that all servers under test know."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from time import time
from typing import TYPE_CHECKING

from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from external_oms import signature
from external_oms.emulator import ConfigAPIEmulator
from external_oms.web.keys import Role, new_key
from external_oms.web.state import OMS

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = [
    "BEARER",
    "ENTRIES",
    "HOOK",
    "KEYS",
    "MALFORMED",
    "OLD_SECRET",
    "SECRET",
    "TENANT",
    "Server",
    "StartServer",
    "Threaded",
    "with_key",
]

TENANT = "acme-staging"
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
OLD_SECRET = "whsec_" + base64.b64encode(bytes(range(32, 64))).decode()
BEARER = "a-bearer-key-of-the-sender"
HOOK = "/webhooks/external-oms"

KEYS: dict[str, str] = {}
ENTRIES: list[str] = []
for _role in Role:
    KEYS[_role.word], _entry = new_key(f"the-{_role.word}", _role)
    ENTRIES.append(_entry)

MALFORMED: tuple[bytes, ...] = (
    b"",
    b"{",
    b"null",
    b"[]",
    b'"acme-staging"',
    b"1e999",
    b"{}{}",
    b'{"tenant": NaN}',
    b'{"tenant": null}',
    b'{"tenant": 5}',
    b'{"tenant": true}',
    b'{"tenant": ["acme-staging"]}',
    b'{"tenant": ""}',
    b'{"tenant": "Acme Staging"}',
    b'{"tenant": "\\ud800"}',
    b'{"tenant": "acme-staging\\n"}',
    b'{"tenant": "acme-staging", "tenant": "acme-staging"}',
    b'{"tenant": "acme-staging", "data": {"tenant": "globex"}}',
    b'{"data": {"tenant": 5}}',
    b'{"data": []}',
    b'{"data": "x"}',
    b"[" * 30_000,
    b'{"a": ' * 5_000,
    b'{"a": ' + b"9" * 5_000 + b"}",
)
"""Bodies that no genuine sender sends."""

_ids = count(1)


def with_key(role: str) -> dict[str, str]:
    """The header of a holder of that role's key; `nobody` shows none, `stranger` a wrong one."""
    if role == "nobody":
        return {}
    return {"Authorization": f"Bearer {KEYS.get(role, 'oms_not-a-key')}"}


@dataclass(frozen=True)
class Threaded:
    """An application as a server with threads calls it; the test client says that there are none."""

    app: WSGIApplication

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return self.app(environ | {"wsgi.multithread": True}, start_response)


@dataclass(frozen=True)
class Server:
    """One app, a client of it, and the config API behind it."""

    app: Flask
    client: FlaskClient
    api: ConfigAPIEmulator
    oms: OMS

    def deliver(
        self,
        body: object = None,
        *,
        delivery_id: str = "",
        secret: str = SECRET,
        at: float | None = None,
        **more: object,
    ) -> TestResponse:
        """A signed delivery of a JSON value, or of bytes as they are."""
        raw = body if isinstance(body, bytes) else json.dumps({"tenant": TENANT} if body is None else body).encode()
        named = delivery_id or f"msg_{next(_ids)}"
        headers = signature.sign(raw, secret=secret, delivery_id=named, at_wall=time() if at is None else at)
        given = {"data": raw, "headers": headers, "content_type": "application/json", **more}
        return self.client.post(HOOK, **given)

    def get(self, path: str, role: str = "viewer") -> TestResponse:
        return self.client.get(path, headers=with_key(role))

    def generation(self, tenant: str = TENANT) -> int:
        return self.oms.cache.state(tenant).generation


StartServer = Callable[..., Server]
