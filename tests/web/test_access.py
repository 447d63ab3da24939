from __future__ import annotations

import hashlib
import hmac
from itertools import count
from typing import Any

import pytest
from flask import Request
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.datastructures import Headers
from werkzeug.test import EnvironBuilder

from external_oms.errors import SettingsError
from external_oms.web import openapi
from external_oms.web.access import Identity, Keyring, Role, Via, new_key
from external_oms.problems import PROBLEM_TYPE
from tests.support.web import ENTRIES, KEYS, TENANT, Server, StartServer, with_key

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
    ("GET", "/flagd/flags.json", "viewer", {}),
    ("GET", "/healthz", None, {}),
    ("GET", "/readyz", None, {}),
    ("GET", "/metrics", "viewer", {}),
    ("GET", "/openapi.json", None, {}),
]
"""Every operation with the role that it needs; the webhook has credentials of its own."""


def test_the_table_of_calls_holds_every_documented_operation() -> None:
    documented = {
        (method.upper(), path.format(tenant=TENANT, key="external_oms_enabled"), operation.get("x-role"))
        for path, item in openapi.document()["paths"].items()
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
    assert sorted(answers[0].headers) == sorted(answers[1].headers)


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


# -- keys --------------------------------------------------------------------------------------------------------------


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", fullmatch=True), st.sampled_from(Role))
def test_a_new_key_is_recognised_by_its_entry_which_does_not_hold_it(name: str, role: Role) -> None:
    key, entry = new_key(name, role)
    assert key.startswith("oms_")
    assert key not in entry
    assert entry == f"{name}:{role.word}:{hashlib.sha256(key.encode()).hexdigest()}"
    assert Keyring([*ENTRIES, entry]).identity(key) == Identity(name, role, Via.KEY)
    assert Keyring(ENTRIES).identity(key) is None


def test_keys_differ() -> None:
    assert len({new_key("same", Role.VIEWER)[0] for _ in range(100)}) == 100


@pytest.mark.parametrize("name", ["", ":", "a:b", " a", "-a", "a" * 65, "caf\u00e9", "a\n"])
def test_a_key_needs_a_plain_name(name: str) -> None:
    with pytest.raises(ValueError, match="a key's name is"):
        new_key(name, Role.VIEWER)


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "oms_a-key-itself",
        "a:viewer",
        f"a:root:{'0' * 64}",
        f"a:viewer:{'0' * 63}",
        f":viewer:{'0' * 64}",
        "a:viewer:x:y",
    ],
)
def test_a_malformed_entry_is_refused_and_not_quoted(entry: str) -> None:
    with pytest.raises(SettingsError, match=r"^api_keys: entry 4") as refused:
        Keyring([*ENTRIES, entry])
    assert not entry or entry not in str(refused.value)


def test_without_keys_the_server_does_not_start_and_names_the_setting(start: StartServer) -> None:
    with pytest.raises(SettingsError, match=r"^api_keys: is not set, and api.* would be closed"):
        start(api_keys=[])


def test_one_key_may_be_listed_among_many_and_each_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison goes on after a match: neither the place of an entry nor a match shows in its number."""
    compared: list[bytes] = []
    original = hmac.compare_digest

    def counted(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return original(one, other)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    ring = Keyring(ENTRIES)
    for key in (*KEYS.values(), "oms_wrong"):
        compared.clear()
        ring.identity(key)
        assert len(compared) == len(ENTRIES)


# -- proxies, sessions, and who made the browser ask -------------------------------------------------------------------

PROXIED = {"api_keys": [], "trusted_proxies": ["10.0.0.0/8", "::1"], "identity_role": "operator"}


@pytest.mark.parametrize(
    ("address", "name", "status"),
    [
        ("10.1.2.3", "ann@example.com", 200),
        ("::1", "ann", 200),
        ("192.0.2.1", "ann", 401),
        ("", "ann", 401),
        ("10.1.2.3", "", 401),
        ("10.1.2.3", "ann\tann", 401),
        ("10.1.2.3", "a" * 129, 401),
    ],
)
def test_a_name_is_believed_from_a_trusted_proxy_only(start: StartServer, address: str, name: str, status: int) -> None:
    answer = start(**PROXIED).client.get(
        "/api/v1/tenants", headers={"X-Forwarded-User": name}, environ_overrides={"REMOTE_ADDR": address}
    )
    assert answer.status_code == status


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
        ({"Origin": "null"}, 403),
    ],
)
def test_a_foreign_page_cannot_act_by_an_identity_that_the_browser_sends_along(
    start: StartServer, headers: dict[str, str], status: int
) -> None:
    answer = start(**PROXIED).client.post(
        f"/api/v1/tenants/{TENANT}/refresh",
        headers={"X-Forwarded-User": "ann", "Host": "oms.example", **headers},
        environ_overrides={"REMOTE_ADDR": "10.1.2.3"},
    )
    assert answer.status_code == status


def test_a_wrong_key_is_not_made_good_by_another_way_to_be_recognised(server: Server) -> None:
    server.oms.access.recognise_by(lambda _: Identity("ann", Role.ADMIN, Via.SESSION))
    assert server.get("/api/v1/tenants", "nobody").status_code == 200
    assert server.get("/api/v1/tenants", "stranger").status_code == 401


def test_a_malformed_proxy_is_refused_at_start(start: StartServer) -> None:
    with pytest.raises(SettingsError, match=r"^trusted_proxies: 'the-proxy' is not an address"):
        start(trusted_proxies=["the-proxy"])


def test_a_request_without_an_address_comes_from_no_proxy(server: Server) -> None:
    asked = Request(EnvironBuilder(headers=Headers({"X-Forwarded-User": "ann"})).get_environ())
    assert server.oms.access.identity(asked) is None
