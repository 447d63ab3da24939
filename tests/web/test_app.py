from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask_wtf.csrf import CSRFProtect

from external_oms.errors import SettingsError
from external_oms.web import ExternalOMS, create_app
from tests.support.web import HOOK, SECRET, TENANT, Server, StartServer


def test_without_credentials_for_deliveries_the_server_does_not_start(start: StartServer) -> None:
    with pytest.raises(SettingsError, match=r"^webhook_secrets: is not set"):
        start(webhook_secrets=[], webhook_api_keys=[])


@pytest.mark.parametrize("secret", ["whsec_", "whsec_c2hvcnQ=", "not-one", "whsec_%%%"])
def test_a_malformed_secret_is_refused_at_start_and_not_quoted(start: StartServer, secret: str) -> None:
    with pytest.raises(SettingsError, match=r"^webhook_secrets: entry 2 must be whsec_") as refused:
        start(webhook_secrets=[SECRET, secret])
    assert secret.removeprefix("whsec_") in {"", "%%%"} or secret not in str(refused.value)


@pytest.mark.parametrize("key", ["", " ", "two words", "t\u00e9l\u00e9", "tab\t"])
def test_a_malformed_key_is_refused_at_start(start: StartServer, key: str) -> None:
    with pytest.raises(SettingsError, match=r"^webhook_api_keys: entry 1 must be printable ASCII"):
        start(webhook_api_keys=[key])


INSECURE = {"insecure": True, "webhook_secrets": [], "webhook_api_keys": [], "api_keys": []}


@pytest.mark.parametrize(
    ("environ", "headers", "status"),
    [
        ({"REMOTE_ADDR": "127.0.0.1"}, {"Host": "localhost:8080"}, 200),
        ({"REMOTE_ADDR": "127.8.8.8"}, {"Host": "127.0.0.1"}, 200),
        ({"REMOTE_ADDR": "::1"}, {"Host": "[::1]:8080"}, 200),
        ({"REMOTE_ADDR": "192.0.2.7"}, {"Host": "localhost"}, 403),
        ({"REMOTE_ADDR": ""}, {"Host": "localhost"}, 403),
        ({"REMOTE_ADDR": "127.0.0.1"}, {"Host": "evil.example"}, 403),
        ({"REMOTE_ADDR": "127.0.0.1"}, {"Host": "127.0.0.1.evil.example"}, 403),
        ({"REMOTE_ADDR": "127.0.0.1"}, {"Host": "[::1"}, 403),
        ({"REMOTE_ADDR": "127.0.0.1"}, {"Host": "localhost", "X-Forwarded-For": "192.0.2.7"}, 403),
        ({"REMOTE_ADDR": "127.0.0.1"}, {"Host": "localhost", "Forwarded": "for=192.0.2.7"}, 403),
    ],
)
def test_insecure_answers_this_machine_only(
    start: StartServer, environ: dict[str, str], headers: dict[str, str], status: int
) -> None:
    server = start(**INSECURE)
    body: dict[str, Any] = {"json": {"tenant": TENANT}, "environ_overrides": environ, "headers": headers}
    assert server.client.post(HOOK, **body).status_code == status
    seen = server.client.get("/api/v1/tenants", environ_overrides=environ, headers=headers)
    assert seen.status_code == status


def test_insecure_opens_nothing_that_has_credentials(start: StartServer) -> None:
    server = start(insecure=True)
    assert server.client.post(HOOK, json={}, headers={"Host": "localhost"}).status_code == 401
    assert server.client.get("/api/v1/tenants", headers={"Host": "localhost"}).status_code == 401


@pytest.mark.parametrize("csrf_first", [True, False])
def test_an_apps_own_csrf_protection_lets_deliveries_through(server: Server, csrf_first: bool) -> None:

    app = Flask("of-the-user")
    app.config |= {"SECRET_KEY": "x", "WTF_CSRF_ENABLED": True}
    app.add_url_rule("/form", "form", lambda: "taken", methods=["POST"])
    steps: list[Callable[[], object]] = [
        lambda: CSRFProtect(app),
        lambda: ExternalOMS(app, provider=server.oms.provider, domain="csrf"),
    ]
    for step in steps if csrf_first else steps[::-1]:
        step()
    theirs = Server(app, app.test_client(), server.api, server.parts)
    assert theirs.deliver().status_code == 200
    assert app.test_client().post("/form").status_code == 400


def test_create_app_without_settings_reads_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXTERNAL_OMS_TENANT", TENANT)
    monkeypatch.setenv("EXTERNAL_OMS_ACCESS_TOKEN", server.api.access_token(TENANT))
    monkeypatch.setenv("EXTERNAL_OMS_BASE_URL", server.api.base_url)
    monkeypatch.setenv("EXTERNAL_OMS_WEBHOOK_SECRETS", SECRET)
    monkeypatch.setenv("EXTERNAL_OMS_API_KEYS", ",".join(server.oms.settings.api_keys))
    app = create_app()
    theirs = Server(app, app.test_client(), server.api, app.extensions["external_oms"])
    try:
        assert theirs.deliver().status_code == 200
    finally:
        theirs.oms.provider.shutdown()
