from __future__ import annotations

import base64
import http.server
import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from email.utils import formatdate
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_oms.cli.base import ExitCode, load_settings, open_service
from external_oms.cli.doctor import Finding, claims_of, describe_settings, examine
from external_oms.clock import SYSTEM_CLOCK
from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.settings import ENV_PREFIX, Settings
from tests.support.cli import one_line, run

READ, WRITE = "newstore:configuration:read", "newstore:configuration:write"


class Platform(http.server.BaseHTTPRequestHandler):
    """A config API that takes any token, with a clock of its own."""

    ahead_seconds: ClassVar[float | None] = 0.0

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(b'{"enabled": true}')

    def do_HEAD(self) -> None:
        self.send_response_only(200)
        if self.ahead_seconds is not None:
            self.send_header("Date", formatdate(time.time() + self.ahead_seconds, usegmt=True))
        self.end_headers()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing."""


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Platform, "ahead_seconds", 0.0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Platform) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def token_with(claims: Mapping[str, object]) -> str:
    def part(shape: Mapping[str, object]) -> str:
        return base64.urlsafe_b64encode(json.dumps(shape).encode()).decode().rstrip("=")

    return f"{part({'alg': 'RS256'})}.{part(claims)}.c2lnbmF0dXJl"


def findings(settings: Settings) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine(settings, clock=SYSTEM_CLOCK)}


def static(platform: str, token: str, **more: object) -> Settings:
    return Settings(**{"tenant": "acme", "base_url": platform, "access_token": token, **more})


def test_a_healthy_set_up_has_a_line_for_each_setting_and_each_check(
    api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}TTL_SECONDS", "60")
    result = run("doctor")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["ttl_seconds", "60", "environment"] in lines
    assert ["client_secret", "set", "environment"] in lines
    assert ["timeout_seconds", "5", "default"] in lines
    named = {line[0] for line in lines if line}
    assert set(Settings.model_fields) <= named
    checks = {line[1]: line[0] for line in lines if line and line[0] in {"ok", "note", "FAIL"}}
    expected = {
        "token": "ok",
        "scopes": "ok",
        "read": "ok",
        "value": "ok",
        "clock": "ok",
        "store": "ok",
        "server": "note",
    }
    assert checks == expected
    secret = api.tenant_settings().client_secret
    assert secret is not None
    assert secret.get_secret_value() not in result.output


def test_settings_that_are_refused_are_a_finding_and_exit_with_2(
    api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}TTL_SECONDS", "1")
    result = run("doctor")
    assert result.exit_code == ExitCode.REFUSED
    assert result.stdout.startswith("FAIL settings ttl_seconds: 1 is below timeout_seconds")
    result = run("doctor", "--json")
    assert result.exit_code == ExitCode.REFUSED
    document = json.loads(one_line(result.stdout))
    assert (document["ok"], document["settings"]) == (False, {})
    assert document["checks"][0]["message"].startswith("ttl_seconds: 1 is below timeout_seconds")


def test_json_is_one_object_with_every_setting_and_every_check(api: ConfigAPIEmulator) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0
    document = json.loads(one_line(result.stdout))
    assert document["ok"] is True
    assert set(document["settings"]) == set(Settings.model_fields)
    assert document["settings"]["tenant"] == {"value": "acme-staging", "from": "environment"}
    checks = {check["check"]: check["verdict"] for check in document["checks"]}
    assert checks["read"] == checks["value"] == checks["store"] == "ok"
    assert set(document["checks"][0]) == {"check", "verdict", "message", "advice"}
    api.fault(None, Fault(status=503, times=None))
    result = run("doctor", "--json")
    assert result.exit_code == ExitCode.FAILED
    assert json.loads(result.stdout)["ok"] is False


def test_a_stored_value_is_compared_with_what_the_api_answers(
    api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}TTL_SECONDS", "600")
    assert findings(load_settings())["value"] == Finding("value", "ok", "the store has no value, the API off")
    assert run("status").exit_code == 0
    assert findings(load_settings())["value"].message.startswith("the store has off (fresh for another 10.0 min, gener")
    api.set_enabled(None, True)
    result = run("doctor")
    assert result.exit_code == ExitCode.FAILED
    (value,) = [line for line in result.stdout.splitlines() if line.startswith("FAIL value")]
    assert re.search("the store has off .*, but the API answers on", value)
    assert "webhook send" in value
    assert json.loads(run("status", "--json").stdout)["enabled"] is False, "doctor changes nothing"


def test_a_stale_value_that_differs_is_a_note(api: ConfigAPIEmulator) -> None:
    with open_service() as service:
        service.operations.refresh("acme-staging")
        api.set_enabled(None, True)
        service.operations.invalidate("acme-staging", actor="test")
    found = findings(load_settings())["value"]
    assert (found.verdict, found.message) == (
        "note",
        "the store has off (stale, generation 1), but the API answers on",
    )


def test_a_scope_cannot_control_the_terminal(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TENANT", "acme"), ("BASE_URL", platform)):
        monkeypatch.setenv(ENV_PREFIX + name, value)
    monkeypatch.setenv(f"{ENV_PREFIX}ACCESS_TOKEN", token_with({"scope": "\x1b]0;owned\x07 \u202eno"}))
    for arguments in (["doctor"], ["doctor", "--json"]):
        printed = run(*arguments).stdout
        assert r"\u001b]0;owned\u0007" in printed
        assert all(line.isprintable() for line in printed.splitlines())


def test_a_wrong_secret_is_found_at_the_token_and_told_what_to_do(
    api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}CLIENT_SECRET", "wrong-secret")
    result = run("doctor")
    assert result.exit_code == 1
    (token,) = [line for line in result.stdout.splitlines() if line.startswith("FAIL token")]
    assert "check client_id, client_secret" in token
    assert "FAIL read     not tried without a token" in result.stdout
    assert "wrong-secret" not in result.output


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        (Fault(status=503, times=None, where="read"), "check base_url and config_path"),
        (Fault(status=429, retry_after=9, times=None, where="read"), "find out who else reads"),
        (Fault(malformed="html", times=None, where="read"), "a sign-in page, answers there"),
        (Fault(status=403, times=None, where="read"), f"with the scope {READ}"),
    ],
)
def test_a_read_that_fails_is_told_what_to_do(api: ConfigAPIEmulator, fault: Fault, advice: str) -> None:
    api.fault(None, fault)
    found = findings(Settings())
    assert found["token"].verdict == "ok"
    assert found["read"].verdict == "fail"
    assert advice in found["read"].advice


def test_several_tenants_are_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with ConfigAPIEmulator(("acme", "globex")) as emulator:
        emulator.fault("globex", Fault(status=500, times=None, where="read"))
        found = findings(emulator.settings("acme", "globex"))
    assert found["read of acme"].verdict == "ok"
    assert found["read of globex"].verdict == "fail"


def test_the_scopes_of_a_jwt_are_shown_and_said_to_be_unverified(platform: str) -> None:
    token = token_with({"scope": f"{WRITE} {READ}", "exp": time.time() + 100})
    found = findings(static(platform, token))
    assert found["scopes"] == Finding("scopes", "ok", f"{READ} {WRITE} (claimed by the token, not verified)")
    assert found["token"].verdict == "ok"
    assert "expires in" in found["token"].message
    assert found["read"].message.startswith("on, in ")


@pytest.mark.parametrize("claim", [{"scope": WRITE}, {"scp": [READ]}])
def test_a_missing_scope_is_a_note(platform: str, claim: Mapping[str, object]) -> None:
    found = findings(static(platform, token_with(claim)))
    assert found["scopes"].verdict == "note"
    assert "newstore:configuration:" in found["scopes"].advice


@pytest.mark.parametrize(
    "token", ["opaque", "a.b.c", token_with({}), token_with({"exp": True, "scope": 7}), token_with({"exp": 10**400})]
)
def test_a_token_that_tells_nothing_is_no_trouble(platform: str, token: str) -> None:
    found = findings(static(platform, token))
    assert (found["token"].verdict, found["scopes"].verdict) == ("ok", "ok")


def test_a_token_that_has_ended_fails(platform: str) -> None:
    found = findings(static(platform, token_with({"exp": time.time() - 100})))
    assert found["token"].verdict == "fail"
    assert "client_id" in found["token"].advice


@pytest.mark.parametrize(("ahead", "said"), [(120.0, "behind"), (-120.0, "ahead of")])
def test_a_clock_that_is_wrong_fails(platform: str, monkeypatch: pytest.MonkeyPatch, ahead: float, said: str) -> None:
    monkeypatch.setattr(Platform, "ahead_seconds", ahead)
    found = findings(static(platform, "opaque"))["clock"]
    assert found.verdict == "fail"
    assert said in found.message
    assert "NTP" in found.advice


def test_a_clock_that_cannot_be_compared_is_a_note(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Platform, "ahead_seconds", None)
    assert findings(static(platform, "opaque"))["clock"].verdict == "note"
    assert findings(static("http://127.0.0.1:1", "opaque"))["clock"].verdict == "note"


def test_the_memory_store_is_a_note_and_a_place_that_is_none_fails(platform: str, tmp_path: Path) -> None:
    assert findings(static(platform, "opaque"))["store"].verdict == "note"
    shared = static(platform, "opaque", store=f"sqlite:///{tmp_path}/state.db")
    assert findings(shared)["store"].verdict == "ok"
    (tmp_path / "file").write_text("", encoding="utf-8")
    nowhere = static(platform, "opaque", store=f"sqlite:///{tmp_path}/file/state.db")
    assert findings(nowhere)["store"].verdict == "fail"


def test_a_server_with_all_credentials_is_ok(platform: str) -> None:
    given_all = static(platform, "opaque", webhook_api_keys=["webhook-key"], api_keys=[f"ops:admin:{'0' * 64}"])
    assert findings(given_all)["server"].verdict == "ok"


def test_origins_show_no_secret_and_where_each_value_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "oms.toml").write_text('timeout_seconds = 2.5\nstore = "redis://u:secret-1@host/0"\n', encoding="utf-8")
    monkeypatch.setenv(f"{ENV_PREFIX}CONFIG_FILE", str(tmp_path / "oms.toml"))
    monkeypatch.setenv(f"{ENV_PREFIX}TENANT", "acme")
    settings = Settings(
        access_token="secret-2",
        webhook_secrets=["secret-3", "secret-4"],
        webhook_api_keys=["secret-5"],
        ofrep_origins=["https://a.example", "https://b.example"],
    )
    rows = {
        name: (value, origin)
        for name, value, origin in describe_settings(
            settings.replaced(history_rows=7), settings.model_fields_set, {f"{ENV_PREFIX}TENANT": "acme"}
        )
    }
    assert rows["tenant"] == ("acme", "environment")
    assert rows["timeout_seconds"] == ("2.5", "file")
    assert rows["store"] == ("redis://…@host/0", "file")
    assert rows["ttl_seconds"] == ("30", "default")
    assert rows["history_rows"] == ("7", "default"), "neither the file nor the environment has it"
    assert rows["webhook_secrets"][0] == "2 entries"
    assert rows["webhook_api_keys"][0] == "1 entry"
    assert rows["ofrep_origins"][0] == "https://a.example, https://b.example"
    assert rows["dashboard"][0] == "true"
    assert "secret-" not in repr(rows)


@pytest.mark.parametrize(
    "store",
    [
        "redis://127.0.0.1:1?password=secret-1",
        "unix:///s?password=secret-1",
        "redis+sentinel://h/m?sentinel_password=secret-1",
    ],
)
def test_neither_the_settings_nor_a_finding_shows_the_password_of_redis(platform: str, store: str) -> None:
    settings = static(platform, "opaque", store=store)
    found = findings(settings)["store"]
    assert found.verdict == "fail"
    shown = [value for name, value, _ in describe_settings(settings, (), {}) if name == "store"]
    assert shown == [store.replace("secret-1", "…")]
    assert "secret-1" not in repr(found)


@given(st.text() | st.builds(".".join, st.lists(st.text(alphabet="abcXYZ019-_="), min_size=3, max_size=3)))
def test_no_text_whatever_is_more_than_claims_or_none(text: str) -> None:
    claims = claims_of(text)
    assert claims is None or isinstance(claims, dict)
