"""The whole server over the emulated config API, and how a sender of deliveries and a holder of keys speak to it."""

from __future__ import annotations

import base64
import fcntl
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from time import time

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from external_oms import signature
from external_oms.emulator import ConfigAPIEmulator
from external_oms.provider import ExternalOMSProvider
from external_oms.settings import Settings
from external_oms.web import create_app
from external_oms.web.access import Role, new_key
from external_oms.web.parts import Parts, parts_of

TENANT = "acme-staging"
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
OLD_SECRET = "whsec_" + base64.b64encode(bytes(range(32, 64))).decode()
BEARER = "a-bearer-key-of-the-sender"
HOOK = "/webhooks/external-oms"
NODE = Path(__file__).parent / "node"

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
class Server:
    """One app, a client of it, and the config API behind it."""

    app: Flask
    client: FlaskClient
    api: ConfigAPIEmulator
    parts: Parts

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
        return self.parts.service.cache.state(tenant).generation


StartServer = Callable[..., Server]


@pytest.fixture
def api() -> Iterator[ConfigAPIEmulator]:
    with ConfigAPIEmulator([TENANT, "globex"]) as emulator:
        yield emulator


@pytest.fixture
def start(api: ConfigAPIEmulator) -> Iterator[StartServer]:
    """Starts servers; ends what they started."""
    providers: list[ExternalOMSProvider] = []

    def started(*tenants: str, **more: object) -> Server:
        credentials = {"webhook_secrets": [SECRET], "webhook_api_keys": [BEARER], "api_keys": ENTRIES}
        quick = {"ttl_seconds": 30.0, "timeout_seconds": 5.0}
        settings: Settings = api.settings(*tenants, **{**credentials, **quick, **more})
        app = create_app(settings)
        parts = parts_of(app)
        assert parts is not None
        providers.append(parts.provider)
        return Server(app, app.test_client(), api, parts)

    yield started
    for provider in providers:
        provider.shutdown()


@pytest.fixture
def server(start: StartServer) -> Server:
    return start()


@pytest.fixture
def two(start: StartServer) -> Server:
    """A server of two tenants."""
    return start(TENANT, "globex")


@pytest.fixture(scope="session")
def installed() -> Path:
    """The clients, as the lock file names them; installed once, and again where the lock file is newer."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not on the PATH")
    done, lock = NODE / "node_modules" / ".package-lock.json", NODE / "package-lock.json"
    with (NODE / "package.json").open() as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # tests may run in several processes
        if not done.exists() or done.stat().st_mtime < lock.stat().st_mtime:
            install = ["npm", "ci", "--no-audit", "--no-fund", "--loglevel=error"]
            ended = subprocess.run(install, cwd=NODE, capture_output=True, text=True, timeout=180, check=False)
            if ended.returncode != 0:
                pytest.skip(f"npm could not install the clients: {ended.stderr[-500:]}")
            done.touch()
    return NODE
