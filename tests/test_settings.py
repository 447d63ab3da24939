"""Settings: their sources, what is refused, and that no secret is printed."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from external_oms.errors import SettingsError
from external_oms.settings import Settings, TenantSettings, _TomlFile
from external_oms.store_url import check_store_url, mask_passwords
from external_oms.tenants import is_loopback

SECRET = "s3cr3t-do-not-print"
A, B = "a" * 64, "b" * 64
NOTHING = hashlib.sha256(b"").hexdigest()
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


@pytest.mark.parametrize("text", ["webhook-key-1, webhook-key-2,", '["webhook-key-1", "webhook-key-2"]'])
def test_lists_in_the_environment_are_json_or_separated_by_commas(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("EXTERNAL_OMS_WEBHOOK_API_KEYS", text)
    assert [key.get_secret_value() for key in Settings(**ONE).webhook_api_keys] == ["webhook-key-1", "webhook-key-2"]


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
        (ONE | {"ttl_seconds": 0}, "ttl_seconds", "'0' given; must be greater than 0"),
        (ONE | {"ttl_seconds": "inf"}, "ttl_seconds", "finite"),
        (ONE | {"ttl_seconds": "30s"}, "ttl_seconds", "'30s' given; must be seconds, such as 30"),
        (ONE | {"ttl_seconds": 1e10}, "ttl_seconds", "must be 1e+09 or less"),
        (ONE | {"history_rows": "many"}, "history_rows", "'many' given; must be a whole number"),
        (ONE | {"dashboard": "maybe"}, "dashboard", "'maybe' given; must be true or false"),
        (ONE | {"webhook_secret": SECRET}, "webhook_secret", "did you mean `webhook_secrets`?"),
        (ONE | {"external_oms": {"tenant": "acme"}}, "external_oms", "at the top level"),
        ({"tenants": {"b": {"client_secrt": SECRET}}}, "tenants.b.client_secrt", "did you mean `client_secret`?"),
        ({"tenants": "acme"}, "tenants", 'must be JSON, such as {"acme": {'),
        ({"tenant": "acme", "client_id": "i", "client_secret": SECRET + "\n"}, "client_secret", "white space"),
        ({"tenant": "acme", "client_id": "i", "client_secret": "\t" + SECRET}, "client_secret", "white space"),
        ({"tenant": "acme", "client_id": "i\n", "client_secret": SECRET}, "client_id", "white space"),
        ({"tenant": "acme", "client_id": "i", "client_secret": ""}, "client_secret", "is empty"),
        (
            {"tenants": {"b": {"client_id": "i", "client_secret": SECRET + "\r\n"}}},
            "tenants.b.client_secret",
            "white space",
        ),
        (ONE | {"webhook_secrets": ["whsec_x" * 9, SECRET + "\n"]}, "webhook_secrets", "entry 2 begins or ends with"),
        (
            ONE | {"webhook_api_keys": [SECRET + " "]},
            "webhook_api_keys",
            "entry 1 must be printable ASCII without spaces; is there a newline at its end?",
        ),
        (ONE | {"webhook_api_keys": [SECRET, "a"]}, "webhook_api_keys", "entry 2 is shorter than 8"),
        (ONE | {"session_secret": SECRET + "\n"}, "session_secret", "white space"),
        (ONE | {"base_url": "https://h.example\r\nX: y"}, "base_url", "control characters"),
        (ONE | {"base_url": "https://h.example/\x00"}, "base_url", "control characters"),
        (ONE | {"token_url": "https://h.example/a\tb"}, "token_url", "control characters"),
        (ONE | {"config_path": "/a\r\nX: y"}, "config_path", "control characters"),
        (ONE | {"config_path": "/a b"}, "config_path", "white space"),
        (ONE | {"api_keys": [f"ann:admin:{NOTHING}"]}, "api_keys", "entry 1 is the hash of an empty key"),
        (
            ONE | {"api_keys": [f"ann:admin:{A}", f"bob:viewer:{A.upper()}"]},
            "api_keys",
            "entry 2 has the key of another",
        ),
        (ONE | {"api_keys": [f"ann:admin:{A}", f"ann:viewer:{B}"]}, "api_keys", "entry 2 gives a name another role"),
        (ONE | {"stale_if_error_seconds": -1}, "stale_if_error_seconds", "'-1' given; must be 0 or more"),
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
        (ONE | {"store": "sqlite:////var/state.db\n"}, "store", "newline at its end"),
        (ONE | {"store": "redis://h:6379/0\n"}, "store", "newline at its end"),
        (ONE | {"store": f"redis://:{SECRET} @h"}, "store", "white space"),
        (ONE | {"store": "redis://h?foo=bar"}, "store", "`foo` is unknown; known are client_name, db"),
        (ONE | {"store": f"redis://h?pasword={SECRET}"}, "store", "did you mean `password`?"),
        (ONE | {"store": "redis://h?decode_responses=true"}, "store", "`decode_responses` is unknown"),
        (ONE | {"store": f"redis://pa?{SECRET}=1"}, "store", "one of its options is unknown"),
        (ONE | {"store": f"redis://pa?{SECRET}@h"}, "store", "write @ as %40"),
        (ONE | {"store": f"redis://:{SECRET}/x@h"}, "store", "write @ as %40, / as %2F"),
        (ONE | {"store": f"redis://u:{SECRET}#x@h"}, "store", "malformed"),
        (ONE | {"store": f"redis://h#{SECRET}"}, "store", "# as %23"),
        (ONE | {"store": f"redis://u:{SECRET}@h:63x9/0"}, "store", "malformed; such as redis://host:6379/0"),
        (ONE | {"store": "rediss://h:65536"}, "store", "malformed; such as rediss://"),
        (ONE | {"store": "redis://h:0"}, "store", "malformed"),
        (ONE | {"store": "redis://[::1"}, "store", "malformed"),
        (ONE | {"store": "redis://a,b"}, "store", "malformed"),
        (ONE | {"store": "redis://h/zero"}, "store", "not the number of a database"),
        (ONE | {"store": "redis://h/0/1"}, "store", "not the number of a database"),
        (ONE | {"store": "redis://h?db=zero"}, "store", "option `db` must be a whole number"),
        (ONE | {"store": "redis://h?socket_timeout=soon"}, "store", "must be seconds"),
        (ONE | {"store": "redis://h?socket_keepalive=perhaps"}, "store", "must be true or false"),
        (ONE | {"store": "redis://h?ssl_ca_certs=/ca.pem"}, "store", "`ssl_ca_certs` is unknown"),
        (ONE | {"store": "unix://"}, "store", "path of the socket"),
        (ONE | {"store": "unix:///s?socket_keepalive=1"}, "store", "`socket_keepalive` is unknown"),
        (ONE | {"store": "redis+sentinel://h"}, "store", "name of the service"),
        (ONE | {"store": "redis+sentinel://h,:x/m"}, "store", "malformed; such as redis+sentinel://host1"),
        (ONE | {"store": "redis+sentinel://h,/m"}, "store", "malformed"),
        (ONE | {"store": "redis+sentinel://h/m/zero"}, "store", "not the number of a database"),
        (ONE | {"store": "redis+sentinel://h/m?db=1"}, "store", "`db` is unknown"),
        (ONE | {"store": 7}, "store", "must be text"),
        (ONE | {"webhook_secrets": f'["{SECRET}'}, "webhook_secrets", "JSON or separated by commas"),
        (ONE | {"webhook_secrets": {SECRET: 1}}, "webhook_secrets", "must be a list"),
        (ONE | {"webhook_api_keys": "[" * 100_000}, "webhook_api_keys", "JSON or separated by commas"),
        ({"tenants": '{"a":' * 100_000}, "tenants", "must be JSON"),
        (ONE | {"history_rows": 10**30}, "history_rows", "must be 1e+09 or less"),
        (ONE | {"webhook_per_minute": 10**30}, "webhook_per_minute", "must be 1e+09 or less"),
        (ONE | {"ttl_seconds": 10**400}, "ttl_seconds", "must be seconds"),
        (ONE | {"ttl_seconds": float("nan")}, "ttl_seconds", "finite"),
        (ONE | {"store_bound_seconds": 1e-9}, "store_bound_seconds", "must be 0.1 or more"),
        (ONE | {"webhook_tolerance_seconds": 3600}, "webhook_tolerance_seconds", "must be 1800 or less"),
        (ONE | {"base_url": "https://h.example:99999"}, "base_url", "port"),
        (ONE | {"base_url": "https://h.example:http"}, "base_url", "port"),
        (ONE | {"base_url": "https://{tennant}.example"}, "base_url", "{tenant}"),
        (ONE | {"token_url": "https://id.example/{tenant/token"}, "token_url", "{tenant}"),
        (ONE | {"scope": "read\nwrite"}, "scope", "printable ASCII"),
        ({"tenants": {"b": {"access_token": SECRET, "scope": "\ud800"}}}, "tenants.b.scope", "printable ASCII"),
        ({"tenant": "acme", "client_id": "i", "client_secret": SECRET + "\udcff"}, "client_secret", "not UTF-8"),
        (ONE | {"session_secret": SECRET + "\udcff"}, "session_secret", "not UTF-8"),
        ({"tenant": "\uff41cme", "access_token": SECRET}, "tenant", "not a tenant's name"),
        ({"tenant": 5, "access_token": SECRET}, "tenant", "must be text"),
    ],
)
def test_what_is_wrong_is_refused_with_its_name_and_what_is_allowed(
    given: dict[str, Any], setting: str, said: str
) -> None:
    error = _refused(**given)
    assert error.setting == setting
    assert said in str(error)
    assert "do-not-print" not in str(error)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8080/{tenant}", "http://localhost", "http://[::1]:1/", "http://{tenant}.localhost/x/"]
)
def test_plain_http_is_allowed_on_loopback(url: str) -> None:
    assert Settings(**ONE, base_url=url).by_tenant()["acme"].base_url == url.rstrip("/")


@pytest.mark.parametrize(
    "store",
    [
        "sqlite:////var/lib/oms/state.db",
        "sqlite:////var/lib/my oms/state.db",
        "memory://",
        "redis://",
        "redis://h:6379/0",
        "redis://u:p%40%2F%3F%23@h:6379/0?socket_timeout=0.5&client_name=oms",
        "redis://[::1]:6379?db=3&username=u&password=p",
        "rediss://h?ssl_ca_certs=/ca.pem&ssl_cert_reqs=required&ssl_check_hostname=True",
        "unix:///run/redis.sock?db=1&password=p",
        "redis+cluster://h:7000",
        "rediss+cluster://h:7000?ssl_ca_certs=/ca.pem",
        "redis+sentinel://u:p@h1:26379,h2,[::1]:26379/mymaster/2?sentinel_username=s&sentinel_password=p",
    ],
)
def test_the_documented_stores_pass(store: str) -> None:
    assert Settings(**ONE, store=store).store == store


def test_an_unknown_variable_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXTERNAL_OMS_TTL", SECRET)
    assert _refused(**ONE).setting == "EXTERNAL_OMS_TTL"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"tenant = 1\nttl = do-not-print", "it is not TOML at line 2, column 7"),
        (b"\xff", "it is not UTF-8"),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
    ],
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
    assert str(file) in str(error)
    assert said in str(error)
    assert "do-not-print" not in str(error)


def test_an_unknown_name_in_the_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "oms.toml"
    file.write_text('tennant = "acme"\n')
    monkeypatch.setenv("EXTERNAL_OMS_CONFIG_FILE", str(file))
    error = _refused(**ONE)
    assert error.setting == "tennant"
    assert str(error) == f"tennant: no such setting (in {file}, line 1); did you mean `tenant`?"


@pytest.mark.parametrize(
    ("content", "given", "said"),
    [
        ('ttl_seconds = "30s"', {}, "ttl_seconds: '30s' given (in {file}, line 1); must be seconds"),
        ("webhook_secrets = 7", {}, "webhook_secrets: is wrong (in {file}, line 1); must be a list"),
        (
            "[external_oms]\nttl_seconds = 30",
            {},
            "external_oms: no such setting (in {file}, line 1); settings stand at the top",
        ),
        (
            'tenants.b.access_token = "t"\n\n[tenants.a]\n"base-url" = 7',
            {},
            "tenants.a.base-url: no such setting (in {file}, line 4); did you mean `base_url`?",
        ),
        (
            "[tenants.a]\nbase_url = 7\n[tenants.b]\nbase_url = 'https://b'",
            {},
            "tenants.a.base_url: '7' given (in {file}); must be text",
        ),
        ("ttl_seconds = 60", {"ttl_seconds": "30s"}, "ttl_seconds: '30s' given; must be seconds"),
    ],
)
def test_an_error_names_the_file_if_the_setting_comes_from_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, given: dict[str, Any], said: str
) -> None:
    file = tmp_path / "oms.toml"
    file.write_text(content)
    monkeypatch.setenv("EXTERNAL_OMS_CONFIG_FILE", str(file))
    assert said.format(file=file) in str(_refused(**ONE, **given))


LINKS = """
EXTERNAL_OMS_PORT=tcp://10.0.0.11:8080
EXTERNAL_OMS_SERVICE_HOST=10.0.0.11
EXTERNAL_OMS_SERVICE_PORT=8080
EXTERNAL_OMS_SERVICE_PORT_HTTP=8080
EXTERNAL_OMS_PORT_8080_TCP=tcp://10.0.0.11:8080
EXTERNAL_OMS_PORT_8080_TCP_ADDR=10.0.0.11
EXTERNAL_OMS_PORT_8080_TCP_PORT=8080
EXTERNAL_OMS_PORT_8080_TCP_PROTO=tcp
EXTERNAL_OMS_REDIS_SERVICE_HOST=10.0.0.12
EXTERNAL_OMS_REDIS_PORT=tcp://10.0.0.12:6379
EXTERNAL_OMS_REDIS_PORT_6379_TCP_ADDR=10.0.0.12
"""


def test_the_variables_of_kubernetes_services_are_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in LINKS.split():
        monkeypatch.setenv(*line.split("=", 1))
    assert Settings(**ONE).tenant == "acme"


@pytest.mark.parametrize("line", [line for line in LINKS.split() if "REDIS" not in line])
def test_each_variable_of_the_service_is_let_through_alone(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setenv(*line.split("=", 1))
    assert Settings(**ONE).tenant == "acme"


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("EXTERNAL_OMS_WEBHOOK_SECRET", "did you mean `webhook_secrets`?"),
        ("EXTERNAL_OMS_CONFIGFILE", "did you mean `config_file`?"),
        ("EXTERNAL_OMS_FOO", "docs/settings.md"),
        ("EXTERNAL_OMS_SERVER_PORT", "no such setting"),
        ("EXTERNAL_OMS_PORT_TCP", "no such setting"),
        ("EXTERNAL_OMS_PORTS", "no such setting"),
    ],
)
def test_an_unknown_variable_is_refused_with_a_suggestion(
    monkeypatch: pytest.MonkeyPatch, variable: str, said: str
) -> None:
    monkeypatch.setenv(variable, SECRET)
    error = _refused(**ONE)
    assert error.setting == variable
    assert said in str(error)


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
    "given", [{"client_secrt": SECRET}, {"access_token": [SECRET]}, {"base_url": f"http://{SECRET}"}]
)
def test_an_error_of_a_tenants_own_settings_hides_their_secrets(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        TenantSettings(**given)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)


MASKED = [
    (f"redis://:{SECRET}@h:6379/0", "redis://…@h:6379/0"),
    (f"redis://user:{SECRET}@h:6379/0", "redis://…@h:6379/0"),
    (f"redis://h?password={SECRET}", "redis://h?password=…"),
    (f"redis://h?db=1&PassWord={SECRET}&client_name=x", "redis://h?db=1&PassWord=…&client_name=x"),
    (f"redis://h?p%61ssword={SECRET}", "redis://h?p%61ssword=…"),
    (f"unix:///s?password={SECRET}", "unix:///s?password=…"),
    (f"rediss://h?ssl_password={SECRET}&ssl_ca_certs=/ca.pem", "rediss://h?ssl_password=…&ssl_ca_certs=/ca.pem"),
    (
        f"redis+sentinel://u:{SECRET}@h1,h2/m?sentinel_username=s&sentinel_password={SECRET}",
        "redis+sentinel://…@h1,h2/m?sentinel_username=s&sentinel_password=…",
    ),
    (f"redis://u:{SECRET}@h?password={SECRET}", "redis://…@h?password=…"),
    ("sqlite:////var/lib/oms/state.db", "sqlite:////var/lib/oms/state.db"),
    ("memory://", "memory://"),
]


@pytest.mark.parametrize(("store", "shown"), MASKED)
def test_a_stores_password_is_never_printed(store: str, shown: str) -> None:
    known = store.replace("PassWord", "password").replace("p%61ssword", "password")
    settings = Settings(**ONE, store=known)
    printed = [repr(settings), str(settings), repr(dict(settings)), str(dict(settings)), repr(settings.model_dump())]
    printed += [settings.model_dump_json(), f"{settings.store}", f"{settings.store:>9}", repr(vars(settings))]
    printed += [repr([settings.store]), "%s %r" % (settings.store, settings.store), repr(settings.model_copy())]  # noqa: UP031 - as logging does
    assert not [text for text in printed if SECRET in text]
    assert mask_passwords(store) == shown
    assert settings.store == known
    assert settings.replaced(ttl_seconds=60).store == known
    assert Settings(**settings.model_dump()).store == known
    copied = pickle.loads(pickle.dumps(settings))  # noqa: S301 - made a moment ago
    assert copied.store == known
    assert SECRET not in repr(copied)


@given(parts=st.lists(st.sampled_from([*":/?#@&=,%[]", "://", "redis", "h", "password=", SECRET]), max_size=12))
def test_a_masked_url_has_no_user_information_and_no_password_option(parts: list[str]) -> None:
    url = "redis://" + "".join(parts)
    shown = mask_passwords(url)
    assert mask_passwords(shown) == shown
    before, at, _ = shown.partition("://")[2].rpartition("@")
    assert not at or before == "…"
    assert f"password={SECRET}" not in shown.partition("?")[2]


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:pa/{SECRET}@h",
        f"redis://:pa?{SECRET}@h",
        f"redis://:pa#{SECRET}@h",
        f"redis://:pa@{SECRET}@h",
        f"redis://{SECRET}@h",
        f"//u:{SECRET}@h",
        f"u:{SECRET}@h",
        f"h?password={SECRET}",
    ],
)
def test_a_malformed_store_url_is_masked_more_widely(url: str) -> None:
    assert SECRET not in mask_passwords(url)


def test_redis_py_takes_every_option_that_is_allowed() -> None:
    for url in (
        "redis://u:p@h/1?client_name=c&health_check_interval=3&max_connections=9&socket_connect_timeout=1&socket_timeout=1",
        "redis://h?db=1&username=u&password=p&socket_keepalive=true",
        "rediss://h?ssl_ca_certs=a&ssl_ca_data=b&ssl_ca_path=c&ssl_cert_reqs=none&ssl_certfile=d&ssl_check_hostname=no",
        "rediss://h?ssl_ciphers=e&ssl_keyfile=f&ssl_password=g",
        "unix:///s?db=1&client_name=c&health_check_interval=3&max_connections=9&password=p&username=u&socket_timeout=1",
    ):
        check_store_url(url)
        redis.ConnectionPool.from_url(url).make_connection()


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
