from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from itsdangerous import URLSafeSerializer

from external_oms.errors import SettingsError
from external_oms.problems import PROBLEM_TYPE
from external_oms.web import api
from external_oms.web.access import TOKEN_SLOT_SECONDS
from external_oms.web.keys import APIKeys, Role, new_key
from tests.support.clock import FakeClock
from tests.support.pages import form_token, open_browser
from tests.support.web import ENTRIES, KEYS, TENANT, Server, StartServer, with_key

StopClock = Callable[[], FakeClock]

RANK = {"stranger": -1, "nobody": -1, "viewer": 1, "operator": 2, "admin": 3}
NEEDED = {"viewer": 1, "operator": 2, "admin": 3}

CALLS: list[tuple[str, str, str | None, dict[str, Any]]] = [
    ("GET", "/api/v1/tenants", "viewer", {}),
    ("GET", f"/api/v1/tenants/{TENANT}", "viewer", {}),
    ("PUT", f"/api/v1/tenants/{TENANT}", "admin", {"json": {"enabled": True, "reason": "table"}}),
    ("POST", f"/api/v1/tenants/{TENANT}/refresh", "operator", {}),
    ("GET", "/api/v1/history", "viewer", {}),
    ("GET", "/api/v1/events", "viewer", {"buffered": False}),
    ("POST", "/ofrep/v1/evaluate/flags/external_oms_enabled", "viewer", {"json": {"context": {}}}),
    ("POST", "/ofrep/v1/evaluate/flags", "viewer", {"json": {"context": {}}}),
    ("GET", "/ofrep/v1/events", "viewer", {"buffered": False}),
    ("GET", "/healthz", None, {}),
    ("GET", "/readyz", None, {}),
    ("GET", "/metrics", "viewer", {}),
    ("GET", "/openapi.json", None, {}),
]
"""Every operation with the role that it needs; the webhook has credentials of its own."""


def test_the_table_of_calls_holds_every_documented_operation() -> None:
    documented = {
        (method.upper(), path.format(tenant=TENANT, key="external_oms_enabled"), operation.get("x-role"))
        for path, item in api.documented()["paths"].items()
        for method, operation in item.items()
        if method != "parameters" and path != "/webhooks/external-oms"
    }
    assert documented == {(method, path, role) for method, path, role, _ in CALLS}


@pytest.mark.parametrize("who", RANK)
@pytest.mark.parametrize(("method", "path", "role", "more"), CALLS, ids=lambda part: str(part)[:40])
def test_each_route_answers_each_role_as_the_table_says(
    server: Server, method: str, path: str, role: str | None, more: dict[str, Any], who: str
) -> None:
    answer = server.client.open(path, method=method, headers=with_key(who), **more)
    refused_as = "application/json" if path.startswith("/ofrep") else PROBLEM_TYPE
    if role is None or RANK[who] >= NEEDED[role]:
        assert answer.status_code in {200, 503 if path == "/readyz" else 200}
    elif RANK[who] < 0:
        assert (answer.status_code, answer.mimetype) == (401, refused_as)
        assert answer.headers["WWW-Authenticate"] == 'Bearer realm="external-oms"'
    else:
        assert (answer.status_code, answer.mimetype) == (403, refused_as)
        assert server.api.writes(TENANT) == 0
    answer.close()


def test_no_key_and_a_wrong_key_get_the_same_answer(server: Server) -> None:
    answers = [server.get("/api/v1/tenants", who) for who in ("nobody", "stranger")]
    assert answers[0].data == answers[1].data
    assert answers[0].headers["WWW-Authenticate"] == answers[1].headers["WWW-Authenticate"]


def test_a_key_travels_in_either_header(server: Server) -> None:
    answer = server.client.get("/api/v1/tenants", headers={"X-API-Key": KEYS["viewer"]})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "shown",
    [
        "",
        " ",
        "oms_",
        "x" * 8000,
        "\xe9",
        *ENTRIES,
        *(entry.rsplit(":", 1)[1] for entry in ENTRIES),
        f"{KEYS['admin']} x",
    ],
    ids=count(),  # a name made of chance would be another in each process that tests
)
def test_what_only_looks_like_a_key_is_none(server: Server, shown: str) -> None:
    for headers in ({"X-API-Key": shown}, {"Authorization": f"Bearer {shown}"}):
        assert server.client.get("/api/v1/tenants", headers=headers).status_code == 401


def test_without_keys_the_server_does_not_start_and_names_the_setting(start: StartServer) -> None:
    with pytest.raises(SettingsError, match=r"^api_keys: is not set, so every request to the API"):
        start(api_keys=[])


def test_keys_that_nobody_has_are_counted_in_one_line_a_minute(
    server: Server, stop_clock: StopClock, caplog: pytest.LogCaptureFixture
) -> None:
    clock = stop_clock()
    for _ in range(50):
        server.get("/api/v1/tenants", "stranger")
    lines = [record.getMessage() for record in caplog.records if record.name == "external_oms.access"]
    assert lines == [
        "refused API keys: unknown (the key is in no entry of api_keys; was it removed?); more are counted for a minute"
    ]
    clock.advance(61)
    server.oms.refused_keys.flush()
    assert caplog.records[-1].getMessage().startswith("refused API keys in the last minute: 49 (49 unknown)")


# -- the browser's own credentials -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://oms.example"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "https://oms.example"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://oms.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
    ],
)
def test_a_page_of_another_origin_cannot_act_with_a_session(
    server: Server, headers: dict[str, str], status: int
) -> None:
    base = "https://oms.example"
    page = server.client.get("/login", base_url=base)
    data = {"csrf_token": form_token(page), "key": KEYS["operator"]}
    assert server.client.post("/login", data=data, base_url=base).status_code == 303
    answer = server.client.post(f"/api/v1/tenants/{TENANT}/refresh", headers=headers, base_url=base)
    assert answer.status_code == status


def test_a_wrong_key_is_not_made_good_by_a_session(server: Server) -> None:
    open_browser(server.client, "admin")
    assert server.get("/api/v1/tenants", "nobody").status_code == 200
    assert server.get("/api/v1/tenants", "stranger").status_code == 401


# -- stream tokens -----------------------------------------------------------------------------------------------------


def token_of(server: Server, role: str = "viewer") -> str:
    bulk = server.client.post("/ofrep/v1/evaluate/flags", headers=with_key(role), json={})
    address = bulk.get_json()["eventStreams"][0]["endpoint"]["requestUri"]
    return str(parse_qs(urlsplit(address).query)["token"][0])


def open_stream(server: Server, token: str, path: str = "/ofrep/v1/events") -> int:
    answer = server.client.get(path, query_string={"token": token}, buffered=False)
    status = answer.status_code
    answer.close()
    return status


def test_a_token_opens_streams_and_nothing_else(server: Server) -> None:
    token = token_of(server)
    assert open_stream(server, token) == 200
    assert open_stream(server, token, "/api/v1/tenants") == 401
    assert open_stream(server, token[:-1]) == 401


def test_a_token_ends_with_its_slot_and_with_its_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    now = (time.time() // TOKEN_SLOT_SECONDS) * TOKEN_SLOT_SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: now)
    token = token_of(server)
    monkeypatch.setattr(time, "time", lambda: now + 2 * TOKEN_SLOT_SECONDS - 3)
    assert open_stream(server, token) == 200
    monkeypatch.setattr(time, "time", lambda: now + 2 * TOKEN_SLOT_SECONDS)
    assert open_stream(server, token) == 401
    fresh = token_of(server)
    assert open_stream(server, fresh) == 200
    server.oms.api_keys = APIKeys([new_key("the-viewer", Role.VIEWER)[1]])
    assert open_stream(server, fresh) == 401, "the key was replaced under the same name"


@pytest.mark.parametrize("content", [[], ["x"], ["x", "y"], [1, 2], {"a": 1}, "x", None, ["x", None], [["x"], 10**12]])
def test_a_signed_token_of_another_form_is_refused(server: Server, content: object) -> None:
    forged = URLSafeSerializer(str(server.app.secret_key), salt="external_oms.stream").dumps(content)
    assert open_stream(server, str(forged)) == 401


def test_a_token_is_not_signed_with_the_hashes_of_the_keys(server: Server) -> None:
    fingerprint = server.oms.api_keys._entries[0][1].fingerprint
    secret = "\n".join(sorted(ENTRIES))
    forged = URLSafeSerializer(secret, salt="external_oms.stream").dumps([fingerprint, 10**11])
    assert open_stream(server, str(forged)) == 401


# -- insecure ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "address", "status"),
    [
        ({"Host": "127.0.0.1:8080"}, "127.0.0.1", 200),
        ({"Host": "[::1]:8080"}, "::1", 200),
        ({"Host": "localhost"}, "127.0.0.1", 200),
        ({"Host": "evil.example"}, "127.0.0.1", 403),
        ({"Host": "127.0.0.1"}, "192.0.2.1", 403),
        ({"Host": "["}, "127.0.0.1", 403),
        *(
            ({"Host": "127.0.0.1", name: "x"}, "127.0.0.1", 403)
            for name in ("Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Proto", "X-Real-IP", "CF-Connecting-IP")
        ),
    ],
)
def test_insecure_answers_this_machine_only(
    start: StartServer, headers: dict[str, str], address: str, status: int
) -> None:
    server = start(insecure=True, api_keys=[], webhook_secrets=[], webhook_api_keys=[])
    given = {"headers": headers, "environ_overrides": {"REMOTE_ADDR": address}}
    assert server.client.get("/api/v1/tenants", **given).status_code == status
    answer = server.client.post("/webhooks/external-oms", json={}, **given)
    assert answer.status_code == status


def test_insecure_takes_no_delivery_from_a_page_of_another_origin(start: StartServer) -> None:
    server = start(insecure=True, api_keys=[], webhook_secrets=[], webhook_api_keys=[])
    headers = {"Host": "127.0.0.1", "Origin": "https://evil.example"}
    assert server.client.post("/webhooks/external-oms", json={}, headers=headers).status_code == 403


# -- proxies -----------------------------------------------------------------------------------------------------------

FORWARDED = {
    "X-Forwarded-For": "192.0.2.1",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "oms.example",
    "X-Forwarded-Prefix": "/oms",
}


def test_without_the_setting_forwarding_headers_move_nothing(server: Server) -> None:
    plain = server.client.get("/", headers={"Host": "127.0.0.1"})
    moved = server.client.get("/", headers={"Host": "127.0.0.1", **FORWARDED})
    assert moved.headers["Location"] == plain.headers["Location"] == "/login"


def test_with_the_setting_the_last_proxy_is_believed(start: StartServer) -> None:
    server = start(proxies=1)
    answer = server.client.get("/", headers=FORWARDED)
    assert answer.headers["Location"] == "/oms/login"
    page = server.client.get("/login", headers=FORWARDED)
    (cookie,) = page.headers.getlist("Set-Cookie")
    assert "Path=/oms" in cookie
    assert "Secure" in cookie
