from __future__ import annotations

from pathlib import Path

import pytest

from external_oms import web
from external_oms.errors import SettingsError
from external_oms.web import create_app
from tests.support.web import HOOK, SECRET, TENANT, Server, StartServer

WEB = Path(web.__file__).parent


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


def test_insecure_opens_nothing_that_has_credentials(start: StartServer) -> None:
    server = start(insecure=True)
    assert server.client.post(HOOK, json={}, headers={"Host": "localhost"}).status_code == 401
    assert server.client.get("/api/v1/tenants", headers={"Host": "localhost"}).status_code == 401


def test_a_provider_that_was_made_from_other_settings_is_refused(server: Server) -> None:
    with pytest.raises(SettingsError, match=r"^provider: was made from other settings"):
        create_app(server.oms.settings.replaced(ttl_seconds=77), provider=server.oms.provider)


def test_without_the_dashboard_there_are_no_pages(start: StartServer) -> None:
    server = start(dashboard=False)
    for path in ("/", "/login", f"/tenants/{TENANT}"):
        assert server.client.get(path, headers={"Accept": "text/html"}).status_code == 404


def test_pages_have_every_security_header_and_the_rest_those_that_it_needs(server: Server) -> None:
    page, data = server.client.get("/login"), server.get("/api/v1/tenants")
    lost = server.client.get("/", environ_overrides={"PATH_INFO": "//tenants//x"})
    assert (lost.status_code, lost.headers["X-Content-Type-Options"]) == (404, "nosniff"), "no redirect by the Host"
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert (page.headers["X-Frame-Options"], page.headers["Cache-Control"]) == ("DENY", "no-store")
    assert (data.headers["X-Content-Type-Options"], data.headers["Cache-Control"]) == ("nosniff", "no-store")


def test_every_view_is_found_by_its_path_in_the_source(server: Server) -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in WEB.glob("*.py"))
    for rule in server.app.url_map.iter_rules():
        if not rule.endpoint.endswith("static"):
            assert f'("{rule.rule}")' in source, rule.rule
            view = server.app.view_functions[rule.endpoint]
            assert view.__name__ == rule.endpoint.rpartition(".")[2]


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
