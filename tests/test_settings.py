"""Settings: where they come from, what is refused, and that no secret is ever printed."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from external_oms.errors import SettingsError
from external_oms.settings import Settings, TenantSettings, _TomlFile
from external_oms.tenants import is_loopback

SECRET = "s3cr3t-do-not-print"
ONE = {"tenant": "acme", "access_token": SECRET}


def _refused(**given: object) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        Settings(**given)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value.__cause__)
    return caught.value


def test_the_least_settings_are_a_tenant_and_its_token() -> None:
    settings = Settings(tenant="acme-staging", access_token=SECRET)
    reached = settings.by_tenant()["acme-staging"]
    assert reached.config_url("acme-staging") == "https://acme-staging.p.newstore.net/v0/config/external_oms"
    assert reached.token_endpoint("acme-staging") == (
        "https://id.p.newstore.net/auth/realms/acme-staging/protocol/openid-connect/token"
    )
    assert (settings.ttl_seconds, settings.timeout_seconds, settings.store) == (30, 5, "memory://")
    assert (settings.windows.ttl_seconds, settings.windows.stale_if_error_seconds) == (30, 3600)


def test_a_keyword_wins_over_the_environment_and_that_over_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "oms.toml"
    file.write_text(f'tenant = "from-file"\naccess_token = "{SECRET}"\nttl_seconds = 60\ntimeout_seconds = 3\n')
    monkeypatch.setenv("EXTERNAL_OMS_CONFIG_FILE", str(file))
    monkeypatch.setenv("EXTERNAL_OMS_TTL_SECONDS", "50")
    monkeypatch.setenv("EXTERNAL_OMS_TENANT", "from-environment")
    settings = Settings(tenant="from-keyword")
    assert (settings.tenant, settings.ttl_seconds, settings.timeout_seconds) == ("from-keyword", 50, 3)


@pytest.mark.parametrize("text", ["k1, k2,", '["k1", "k2"]'])
def test_lists_in_the_environment_are_json_or_separated_by_commas(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("EXTERNAL_OMS_WEBHOOK_API_KEYS", text)
    assert [key.get_secret_value() for key in Settings(**ONE).webhook_api_keys] == ["k1", "k2"]


def test_tenants_in_the_environment_are_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXTERNAL_OMS_TENANTS", json.dumps({"acme": {"access_token": SECRET}}))
    assert list(Settings().by_tenant()) == ["acme"]


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXTERNAL_OMS_TTL_SECONDS", "")
    assert Settings(**ONE).ttl_seconds == 30


def test_each_tenant_takes_what_it_leaves_out_from_the_top_but_never_credentials() -> None:
    settings = Settings(
        base_url="https://{tenant}.example.com",
        write_method="PUT",
        tenants={"a": {"access_token": "ta"}, "b": {"client_id": "i", "client_secret": "s", "write_method": "PATCH"}},
    )
    a, b = settings.by_tenant()["a"], settings.by_tenant()["b"]
    assert a.config_url("a") == "https://a.example.com/v0/config/external_oms"
    assert (a.write_method, b.write_method) == ("PUT", "PATCH")
    assert b.access_token is None


@pytest.mark.parametrize(
    ("given", "setting", "said"),
    [
        ({}, "tenant", "is not set"),
        ({"tenant": "acme"}, "access_token", "no credentials"),
        ({"tenant": "acme", "client_id": "i"}, "client_secret", "a pair"),
        ({"tenant": "acme", "client_secret": SECRET}, "client_id", "a pair"),
        (ONE | {"client_id": "i", "client_secret": SECRET}, "access_token", "not both"),
        (ONE | {"client_id": "i"}, "access_token", "not both"),
        ({"tenant": "acme", "access_token": ""}, "access_token", "printable ASCII"),
        ({"tenant": "acme", "access_token": SECRET + "\n"}, "access_token", "newline"),
        ({"tenant": "acme", "access_token": SECRET + "é"}, "access_token", "printable ASCII"),
        ({"tenant": "Acme", "access_token": SECRET}, "tenant", "not a tenant's name"),
        ({"tenant": "-acme", "access_token": SECRET}, "tenant", "not a tenant's name"),
        ({"tenant": "a.evil.example/", "access_token": SECRET}, "tenant", "not a tenant's name"),
        ({"tenant": "a" * 64, "access_token": SECRET}, "tenant", "not a tenant's name"),
        (ONE | {"tenants": {"b": {"access_token": SECRET}}}, "tenant", "set one of them"),
        ({"access_token": SECRET, "tenants": {"b": {"access_token": SECRET}}}, "tenants", "inside its entry"),
        ({"tenants": {"b": {}}}, "tenants.b.access_token", "no credentials"),
        ({"tenants": {"B": {"access_token": SECRET}}}, "tenants.B", "not a tenant's name"),
        ({"tenants": {"b": {"token": SECRET}}}, "tenants.b.token", "no such setting"),
        ({"tenants": {"b": {"base_url": "http://b.example.com"}}}, "tenants.b.base_url", "must be https"),
        ({"tenants": f'{{"b": {{"access_token": "{SECRET}"'}, "tenants", "JSON"),
        ({"tenants": SECRET}, "tenants", "JSON"),
        (ONE | {"ttl_seconds": 4}, "ttl_seconds", "below timeout_seconds"),
        (ONE | {"ttl_seconds": 0}, "ttl_seconds", "'0' given; "),
        (ONE | {"ttl_seconds": "inf"}, "ttl_seconds", "finite"),
        (ONE | {"stale_if_error_seconds": -1}, "stale_if_error_seconds", "greater than or equal to 0"),
        (ONE | {"ttl": 5}, "ttl", "no such setting"),
        (ONE | {"when_expired": "maybe"}, "when_expired", "'default', 'on', 'off' or 'last'"),
        (ONE | {"write_method": "DELETE"}, "write_method", "'POST', 'PUT' or 'PATCH'"),
        (ONE | {"base_url": "http://acme.example.com"}, "base_url", "must be https"),
        (ONE | {"base_url": "acme.example.com"}, "base_url", "absolute URL"),
        (ONE | {"base_url": "https://acme.example.com?x=1"}, "base_url", "without query"),
        (ONE | {"base_url": f"https://user:{SECRET}@acme.example.com"}, "base_url", "credentials"),
        (ONE | {"token_url": "ftp://id.example.com"}, "token_url", "must be https"),
        (ONE | {"config_path": "v0/config"}, "config_path", "absolute path"),
        (ONE | {"config_path": "//evil.example/"}, "config_path", "absolute path"),
        (ONE | {"config_path": "/v0/../admin"}, "config_path", "absolute path"),
        (ONE | {"store": "postgres://db"}, "store", "not one of those allowed"),
        (ONE | {"store": f"postgres://u:{SECRET}@db"}, "store", "not one of those allowed"),
        (ONE | {"store": "memory"}, "store", "not one of those allowed"),
        (ONE | {"store": "memory://x"}, "store", "takes no path"),
        (ONE | {"store": "sqlite://state.db"}, "store", "absolute path"),
        (ONE | {"store": 7}, "store", "valid string"),
        (ONE | {"webhook_secrets": f'["{SECRET}'}, "webhook_secrets", "JSON or separated by commas"),
        (ONE | {"webhook_secrets": {SECRET: 1}}, "webhook_secrets", "valid tuple"),
    ],
)
def test_what_is_wrong_is_refused_with_its_name_and_what_is_allowed(
    given: dict[str, Any], setting: str, said: str
) -> None:
    error = _refused(**given)
    assert error.setting == setting
    assert said in str(error)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8080/{tenant}", "http://localhost", "http://[::1]:1/", "http://{tenant}.localhost/x/"]
)
def test_plain_http_is_allowed_on_loopback(url: str) -> None:
    assert Settings(**ONE, base_url=url).by_tenant()["acme"].base_url == url.rstrip("/")


@pytest.mark.parametrize("store", ["sqlite:////var/lib/oms/state.db", "redis://h:6379/0", "rediss://h", "memory://"])
def test_the_stores_of_the_design_pass(store: str) -> None:
    assert Settings(**ONE, store=store).store == store


def test_an_unknown_variable_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXTERNAL_OMS_TTL", SECRET)
    assert _refused(**ONE).setting == "EXTERNAL_OMS_TTL"


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), (b"tenant = ", "not UTF-8 TOML"), (b"\xff", "TOML")]
)
def test_a_file_that_cannot_be_read_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, said: str
) -> None:
    file = tmp_path / "oms.toml"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("EXTERNAL_OMS_CONFIG_FILE", str(file))
    error = _refused()
    assert error.setting == "config_file"
    assert said in str(error)


def test_an_unknown_name_in_the_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "oms.toml"
    file.write_text('tennant = "acme"\n')
    monkeypatch.setenv("EXTERNAL_OMS_CONFIG_FILE", str(file))
    assert _refused(**ONE).setting == "tennant"


def test_no_secret_is_printed() -> None:
    settings = Settings(
        tenants={"a": {"access_token": SECRET}, "b": {"client_id": "i", "client_secret": SECRET}},
        webhook_secrets=[SECRET],
        webhook_api_keys=[SECRET],
        session_secret=SECRET,
    )
    for shown in (repr(settings), str(settings), settings.model_dump_json(), repr(settings.by_tenant())):
        assert SECRET not in shown


def test_settings_are_frozen_and_survive_pickling() -> None:
    settings = Settings(**ONE)
    with pytest.raises(ValidationError, match="frozen"):
        settings.ttl_seconds = 5  # type: ignore[misc]  # the very point
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301 - made a moment ago


def test_replaced_settings_are_checked_anew() -> None:
    settings = Settings(**ONE, ttl_seconds=60)
    changed = settings.replaced(timeout_seconds=50)
    assert (changed.ttl_seconds, changed.timeout_seconds, changed.tenant) == (60, 50, "acme")
    with pytest.raises(SettingsError, match="below timeout_seconds"):
        settings.replaced(timeout_seconds=61)


def test_a_tenants_own_settings_hide_their_secrets() -> None:
    assert SECRET not in repr(TenantSettings(access_token=SecretStr(SECRET)))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (None, False),
        ("localhost", True),
        ("a.localhost", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
        ("2130706433", False),
    ],
)
def test_loopback_is_known(host: str | None, expected: bool) -> None:
    assert is_loopback(host) is expected


@given(name=st.text(max_size=70))
def test_no_tenants_name_leaves_the_host_it_is_put_into(name: str) -> None:
    try:
        settings = Settings(tenant=name, access_token=SECRET)
    except SettingsError:
        return
    assert settings.by_tenant()[name].config_url(name) == f"https://{name}.p.newstore.net/v0/config/external_oms"
    assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789-")


@given(url=st.text(max_size=40) | st.text(max_size=20).map(lambda rest: f"https://{rest}"))
def test_any_base_url_is_https_or_refused(url: str) -> None:
    try:
        settings = Settings(**ONE, base_url=url)
    except SettingsError:
        return
    assert settings.base_url.lower().lstrip().startswith(("https://", "http://"))


def test_the_file_is_read_whole_and_not_by_fields() -> None:
    assert _TomlFile(Settings).get_field_value(None, "tenant") == (None, "tenant", False)


def test_two_tenants_at_one_address_are_refused() -> None:
    tenants = {"acme": {"access_token": "a"}, "globex": {"access_token": "b"}}
    refused = _refused(tenants=tenants, base_url="https://gateway.example.com")
    assert refused.setting == "tenants.globex.base_url"
    assert "acme" in str(refused)


def test_a_tenant_may_have_a_path_of_its_own() -> None:
    settings = Settings(tenants={"acme": {"access_token": "a", "config_path": "/v1/oms"}})
    assert settings.by_tenant()["acme"].config_url("acme") == "https://acme.p.newstore.net/v1/oms"
