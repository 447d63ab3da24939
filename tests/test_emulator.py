"""The emulator is as the platform is described, and misbehaves as it is told; asked by urllib, which shares nothing."""

from __future__ import annotations

import base64
import http.client
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from external_oms.config import parse_document
from external_oms.emulator import ConfigAPIEmulator, Fault, Malformed
from external_oms.errors import MalformedAnswer
from external_oms.settings import Settings
from external_oms.signature import check_secret
from external_oms.testing import sign_delivery
from tests.support.waiting import PATIENCE_SECONDS, wait_until

PATH = "/v0/config/external_oms"


@dataclass
class Told:
    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:  # noqa: ANN401 - whatever JSON there is
        return json.loads(self.body)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def _ask(method: str, url: str, body: object = None, **headers: str) -> Told:
    """One request; a form where the body is a string, JSON otherwise."""
    raw = None if body is None else body.encode() if isinstance(body, str) else json.dumps(body).encode()
    kind = "application/x-www-form-urlencoded" if isinstance(body, str) else "application/json"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, raw, {"Content-Type": kind, **named}, method=method)
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=PATIENCE_SECONDS) as answer:
            return Told(answer.status, answer.headers, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Told(error.code, error.headers, error.read())


@pytest.fixture
def api() -> Iterator[ConfigAPIEmulator]:
    with ConfigAPIEmulator(("acme", "globex"), etag=True) as emulator:
        yield emulator


def _url(api: ConfigAPIEmulator, tenant: str = "acme") -> str:
    return api.base_url.replace("{tenant}", tenant) + PATH


def _read(api: ConfigAPIEmulator, tenant: str = "acme", **headers: str) -> Told:
    return _ask("GET", _url(api, tenant), Authorization=f"Bearer {api.access_token(tenant)}", **headers)


def _write(api: ConfigAPIEmulator, body: object, tenant: str = "acme") -> Told:
    return _ask("POST", _url(api, tenant), body, Authorization=f"Bearer {api.access_token(tenant)}")


def _token(api: ConfigAPIEmulator, tenant: str = "acme", *, basic: bool = False, **form: str) -> Told:
    settings = api.tenant_settings(tenant)
    assert settings.client_id is not None
    assert settings.client_secret is not None
    client = (settings.client_id, settings.client_secret.get_secret_value())
    asked = {"grant_type": "client_credentials", **form}
    headers = {}
    if basic:
        headers["Authorization"] = "Basic " + base64.b64encode(":".join(client).encode()).decode()
    else:
        asked = {"client_id": client[0], "client_secret": client[1], **asked}
    return _ask("POST", settings.token_endpoint(tenant), urllib.parse.urlencode(asked), **headers)


# --- honest ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["bare", "wrapped"])
def test_both_shapes_are_answered(shape: Literal["bare", "wrapped"]) -> None:
    with ConfigAPIEmulator(enabled=True, shape=shape) as api:
        told = _read(api, "acme-staging")
    assert told.status == 200
    assert (told.json == {"enabled": True}) is (shape == "bare")
    assert parse_document(told.body).enabled


def test_updated_at_grows_with_every_change_be_they_ever_so_quick(api: ConfigAPIEmulator) -> None:
    seen = [_read(api).json["updated_at"]]
    for enabled in (True, False, False, True):
        api.set_enabled("acme", enabled)
        seen.append(_read(api).json["updated_at"])
    assert seen == sorted(set(seen))
    assert all("." in text and text.endswith("Z") for text in seen)


def test_an_etag_is_validated_until_the_next_change(api: ConfigAPIEmulator) -> None:
    etag = _read(api).headers["ETag"]
    told = _read(api, If_None_Match=etag)
    assert (told.status, told.body, told.headers["ETag"]) == (304, b"", etag)
    api.set_enabled("acme", True)
    assert _read(api, If_None_Match=etag).status == 200


def test_without_the_option_there_is_no_etag() -> None:
    with ConfigAPIEmulator() as api:
        assert _read(api, "acme-staging").headers["ETag"] is None


def test_tenants_are_apart(api: ConfigAPIEmulator) -> None:
    assert _write(api, {"enabled": True}).json["value"] == {"enabled": True}
    assert (api.enabled("acme"), api.enabled("globex"), api.writes("acme"), api.writes("globex")) == (True, False, 1, 0)
    assert api.enabled() is True  # the first tenant is meant where none is named


@pytest.mark.parametrize(
    "body", [None, "enabled=true", {}, {"enabled": "true"}, {"enabled": 1}, [True], {"enabled": None}]
)
def test_a_bad_body_of_a_write_is_400(api: ConfigAPIEmulator, body: object) -> None:
    told = _write(api, body)
    assert (told.status, told.json["error_code"], api.enabled("acme")) == (400, "invalid_body", False)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_only_the_configured_method_writes(method: Literal["POST", "PUT", "PATCH"]) -> None:
    with ConfigAPIEmulator(("acme",), write_method=method) as api:
        statuses = {
            asked: _ask(asked, _url(api), {"enabled": True}, Authorization=f"Bearer {api.access_token()}").status
            for asked in ("POST", "PUT", "PATCH", "DELETE")
        }
    assert statuses == {"POST": 405, "PUT": 405, "PATCH": 405, "DELETE": 405} | {method: 200}


def test_errors_are_problem_documents_with_the_platforms_members(api: ConfigAPIEmulator) -> None:
    told = _ask("GET", _url(api))
    assert told.headers["Content-Type"] == "application/problem+json"
    assert {"type", "title", "status", "detail", "instance", "error_code", "message", "request_id"} <= set(told.json)


@pytest.mark.parametrize(
    ("authorization", "status"), [(None, 401), ("Basic eDp5", 401), ("Bearer ", 401), ("Bearer made-up", 403)]
)
def test_no_token_is_401_and_one_that_is_not_valid_403(
    api: ConfigAPIEmulator, authorization: str | None, status: int
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    assert _ask("GET", _url(api), **headers).status == status
    assert api.reads("acme") == 1


def test_unknown_places_and_tenants_are_404(api: ConfigAPIEmulator) -> None:
    assert _ask("GET", f"{api.origin}/nobody{PATH}").status == 404
    assert _ask("GET", f"{api.origin}/acme/v1/elsewhere").json["error_code"] == "not_found"


# --- tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basic", [False, True])
def test_a_token_is_issued_and_opens_its_own_tenant_only(api: ConfigAPIEmulator, basic: bool) -> None:
    told = _token(api, basic=basic).json
    assert (told["token_type"], told["expires_in"], api.tokens_issued("acme")) == ("Bearer", 300, 1)
    bearer = f"Bearer {told['access_token']}"
    assert _ask("GET", _url(api), Authorization=bearer).status == 200
    assert _ask("GET", _url(api, "globex"), Authorization=bearer).status == 403
    api.expire_tokens("acme")
    assert _ask("GET", _url(api), Authorization=bearer).status == 403


def test_a_token_ends_when_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with ConfigAPIEmulator(("acme",), expires_in=60) as api:
        bearer = f"Bearer {_token(api).json['access_token']}"
        assert _ask("GET", _url(api), Authorization=bearer).status == 200
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 61)
        assert _ask("GET", _url(api), Authorization=bearer).status == 403


@pytest.mark.parametrize(
    ("form", "status", "error"),
    [
        ({"client_secret": "wrong"}, 401, "invalid_client"),
        ({"client_id": "globex-client"}, 401, "invalid_client"),
        ({"grant_type": "password"}, 400, "unsupported_grant_type"),
    ],
)
def test_a_refused_client_is_told_so_as_oauth_says(
    api: ConfigAPIEmulator, form: dict[str, str], status: int, error: str
) -> None:
    told = _token(api, basic=False, **form)
    assert (told.status, told.json, api.tokens_issued("acme")) == (status, {"error": error}, 0)


@pytest.mark.parametrize("life", [None, 5, "soon"])
def test_expires_in_is_sent_as_it_was_set(life: object) -> None:
    with ConfigAPIEmulator(("acme",), expires_in=life) as api:
        assert _token(api).json.get("expires_in") == life


# --- faults ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "statuses"), [(1, [503, 200, 200]), (2, [503, 503, 200]), (None, [503, 503, 503])])
def test_a_fault_befalls_so_many_requests(api: ConfigAPIEmulator, times: int | None, statuses: list[int]) -> None:
    api.fault("acme", Fault(status=503, retry_after=7, times=times))
    told = [_read(api) for _ in range(3)]
    assert [one.status for one in told] == statuses
    assert told[0].headers["Retry-After"] == "7"
    assert _read(api, "globex").status == 200
    api.clear("acme")
    assert _read(api).status == 200


def test_faults_take_their_turns(api: ConfigAPIEmulator) -> None:
    for status in (500, 502, 503):
        api.fault("acme", Fault(status=status))
    assert [_read(api).status for _ in range(4)] == [500, 502, 503, 200]


@pytest.mark.parametrize(
    ("where", "read", "write", "token"),
    [
        ("read", 500, 200, 200),
        ("write", 200, 500, 200),
        ("token", 200, 200, 500),
        ("any", 500, 500, 500),
    ],
)
def test_a_fault_befalls_what_it_is_for(
    api: ConfigAPIEmulator, where: Literal["read", "write", "token", "any"], read: int, write: int, token: int
) -> None:
    api.fault("acme", Fault(status=500, where=where, times=None))
    assert (_read(api).status, _write(api, {"enabled": True}).status, _token(api).status) == (read, write, token)


@pytest.mark.parametrize("kind", ["html", "truncated", "string", "number", "null", "missing"])
def test_a_malformed_answer_is_200_and_no_document(api: ConfigAPIEmulator, kind: Malformed) -> None:
    api.fault("acme", Fault(malformed=kind))
    told = _read(api)
    assert told.status == 200
    with pytest.raises(MalformedAnswer):
        parse_document(told.body)


def test_a_delayed_answer_tells_the_value_of_before(api: ConfigAPIEmulator) -> None:
    api.fault("acme", Fault(delay_seconds=2 * PATIENCE_SECONDS))
    told: list[Told] = []
    thread = threading.Thread(target=lambda: told.append(_read(api)))
    thread.start()
    wait_until(lambda: api.reads("acme"))
    api.set_enabled("acme", True)
    assert _read(api).json["value"] == {"enabled": True}  # another one goes through meanwhile
    api.stop()  # lets go what is held back
    thread.join()
    assert told[0].json["value"] == {"enabled": False}


def test_an_expired_token_is_worth_nothing_from_then_on(api: ConfigAPIEmulator) -> None:
    bearer = f"Bearer {_token(api).json['access_token']}"
    api.fault("acme", Fault(expired_token=True))
    assert [_ask("GET", _url(api), Authorization=bearer).status for _ in range(2)] == [403, 403]
    assert _ask("GET", _url(api), Authorization=f"Bearer {_token(api).json['access_token']}").status == 200


def test_a_lagging_replica_answers_the_whole_old_document_so_many_times(api: ConfigAPIEmulator) -> None:
    api.fault("acme", Fault(lag_reads=2))
    old = _read(api).json
    assert _write(api, {"enabled": True}).json["value"] == {"enabled": True}
    assert [_read(api).json for _ in range(2)] == [old, old]
    new = _read(api).json
    assert new["value"] == {"enabled": True}
    assert new["updated_at"] > old["updated_at"]
    api.set_enabled("acme", False)
    assert _read(api).json["value"] == {"enabled": False}  # one change, one lag


def test_a_replica_may_lag_by_time(api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    api.fault("acme", Fault(lag_seconds=60))
    api.set_enabled("acme", True)
    assert _read(api).json["value"] == {"enabled": False}
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert _read(api).json["value"] == {"enabled": True}


def test_clearing_ends_a_lag_under_way(api: ConfigAPIEmulator) -> None:
    api.fault("acme", Fault(lag_reads=100))
    api.set_enabled("acme", True)
    api.clear("acme")
    assert _read(api).json["value"] == {"enabled": True}


def test_a_dropped_connection_breaks_before_the_headers_or_in_the_body(api: ConfigAPIEmulator) -> None:
    api.fault("acme", Fault(dropped="headers"))
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        _read(api)
    api.fault("acme", Fault(dropped="body"))
    with pytest.raises(http.client.IncompleteRead):
        _read(api)


def test_a_redirect_points_where_it_was_told(api: ConfigAPIEmulator) -> None:
    api.fault("acme", Fault(redirect="https://elsewhere.example/"))
    told = _read(api)
    assert (told.status, told.headers["Location"]) == (307, "https://elsewhere.example/")


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": 200},
        {"malformed": "x"},
        {"dropped": "x"},
        {"where": "x"},
        {"times": 0},
        {"delay_seconds": -1},
        {"lag_reads": -1},
        {"lag_seconds": -1},
    ],
)
def test_a_fault_out_of_its_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Fault(**wrong)


# --- accounts ----------------------------------------------------------------------------------------------------


def test_what_was_asked_is_remembered_without_any_credential(api: ConfigAPIEmulator) -> None:
    token = _token(api).json["access_token"]
    _ask("GET", _url(api), Authorization=f"Bearer {token}", If_None_Match='"x"', User_Agent="me/1")
    _write(api, {})
    seen = api.seen("acme")
    assert [(one.kind, one.method, one.status, one.conditional) for one in seen] == [
        ("token", "POST", 200, False),
        ("read", "GET", 200, True),
        ("write", "POST", 400, False),
    ]
    assert seen[1].user_agent == "me/1"
    assert token not in repr(seen)
    assert api.access_token("acme") not in repr(api._tenants)


def test_settings_of_the_emulator_reach_it(api: ConfigAPIEmulator) -> None:
    one = api.settings(timeout_seconds=2)
    assert (one.tenant, one.timeout_seconds) == ("acme", 2)
    assert one.by_tenant()["acme"].config_url("acme") == _url(api)
    assert api.settings("globex").tenant == "globex"
    assert list(api.settings("acme", "globex").by_tenant()) == ["acme", "globex"]
    static = api.settings(access_token=api.access_token())
    assert static.client_id is None


@pytest.mark.parametrize("tenants", [("acme",), ("acme", "globex")])
def test_its_environment_configures_every_tenant_and_a_webhook(
    tenants: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    api = ConfigAPIEmulator(tenants, config_path="/elsewhere", write_method="PUT")
    for name, value in api.environment().items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.by_tenant() == {name: api.tenant_settings(name) for name in tenants}
    assert [secret.get_secret_value() for secret in settings.webhook_secrets] == [api.webhook_secret]
    check_secret(api.webhook_secret)


def test_a_port_that_is_in_use_is_an_error(api: ConfigAPIEmulator) -> None:
    with pytest.raises(OSError, match="in use"):
        ConfigAPIEmulator(port=int(api.origin.rpartition(":")[2])).start()


def test_a_stopped_emulator_starts_again_where_it_was(api: ConfigAPIEmulator) -> None:
    api.set_enabled("acme", True)
    before = api.origin
    api.stop()
    api.stop()
    with pytest.raises(urllib.error.URLError):
        _read(api)
    api.start()
    assert api.start() is api
    assert api.origin == before
    assert _read(api).json["value"] == {"enabled": True}


# --- by another process ------------------------------------------------------------------------------------------


def test_the_control_routes_do_what_the_methods_do(api: ConfigAPIEmulator) -> None:
    control = f"{api.origin}/_control/tenants"
    assert [one["tenant"] for one in _ask("GET", control).json["tenants"]] == ["acme", "globex"]
    assert _ask("PUT", f"{control}/acme", {"enabled": True}).json["enabled"] is True
    assert api.enabled("acme")
    assert _ask("POST", f"{control}/acme/faults", {"status": 503, "times": None}).status == 200
    assert _read(api).status == 503
    assert _ask("DELETE", f"{control}/acme/faults").status == 200
    assert _read(api).status == 200
    told = _ask("GET", f"{control}/acme").json
    assert (told["reads"], told["writes"], told["tokens_issued"]) == (2, 0, 0)
    assert [one["status"] for one in told["seen"]] == [503, 200]
    assert api.access_token("acme") not in json.dumps(told)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("PUT", "/acme", {"enabled": 1}, 400),
        ("PUT", "/acme", None, 400),
        ("PUT", "/nobody", {"enabled": True}, 404),
        ("GET", "/nobody", None, 404),
        ("POST", "/acme/faults", {"status": 200}, 400),
        ("POST", "/acme/faults", {"made_up": 1}, 400),
        ("POST", "/acme/faults", [1], 400),
        ("POST", "/acme/faults", {"delay_seconds": "x"}, 400),
        ("POST", "/nobody/faults", {"status": 500}, 404),
        ("DELETE", "/nobody/faults", None, 404),
    ],
)
def test_a_bad_command_is_refused(api: ConfigAPIEmulator, method: str, path: str, body: object, status: int) -> None:
    assert _ask(method, f"{api.origin}/_control/tenants{path}", body).status == status


def test_a_signed_delivery_has_an_id_of_its_own_and_the_moment_of_now() -> None:
    secret = "whsec_" + base64.b64encode(b"k" * 32).decode()
    before = int(time.time())
    one, two = sign_delivery("{}", secret), sign_delivery(b"{}", secret, at=5.9, delivery_id="msg_2")
    assert before <= int(one["webhook-timestamp"]) <= time.time()
    assert one["webhook-id"].startswith("msg_")
    assert (two["webhook-id"], two["webhook-timestamp"], two["content-type"]) == ("msg_2", "5", "application/json")
