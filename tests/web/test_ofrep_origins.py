from __future__ import annotations

import pytest
from werkzeug.test import TestResponse

from external_oms.errors import SettingsError
from external_oms.web.ofrep import check_origins
from tests.support.web import Server, StartServer, with_key

ALL = "/ofrep/v1/evaluate/flags"
SHOP = "https://shop.example"

PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "content-type,if-none-match,x-api-key",
}


def cors(answer: TestResponse) -> dict[str, str]:
    return {name: value for name, value in answer.headers if name.startswith("Access-Control-")}


def ask(server: Server, origin: str | None, role: str = "viewer") -> TestResponse:
    headers = with_key(role) | ({} if origin is None else {"Origin": origin})
    return server.client.post(ALL, json={"context": {}}, headers=headers)


@pytest.fixture
def open_to_shop(start: StartServer) -> Server:
    return start(ofrep_origins=[SHOP, "http://localhost:3000"])


def test_no_origin_is_allowed_until_one_is_named(server: Server) -> None:
    answer = ask(server, SHOP)
    assert (answer.status_code, cors(answer)) == (200, {})
    preflight = server.client.options(ALL, headers={"Origin": SHOP, **PREFLIGHT})
    assert (preflight.status_code, cors(preflight)) == (200, {})


@pytest.mark.parametrize("origin", [SHOP, "http://localhost:3000"])
def test_a_named_origin_may_read_the_answer_and_its_etag(open_to_shop: Server, origin: str) -> None:
    answer = ask(open_to_shop, origin)
    assert answer.headers["Access-Control-Allow-Origin"] == origin
    assert "ETag" in answer.headers["Access-Control-Expose-Headers"]
    assert "Origin" in answer.headers["Vary"]


@pytest.mark.parametrize(
    "origin",
    ["https://shop.example.evil.example", "https://SHOP.example", "http://shop.example", "null", "*", "", None],
)
def test_no_other_origin_may(open_to_shop: Server, origin: str | None) -> None:
    answer = ask(open_to_shop, origin)
    assert (answer.status_code, cors(answer)) == (200, {})
    assert "Origin" in answer.headers["Vary"], "a shared cache must not give one origin's answer to another"


def test_a_preflight_needs_no_key_and_allows_what_the_clients_send(open_to_shop: Server) -> None:
    for path in (ALL, f"{ALL}/external_oms_enabled", "/ofrep/v1/events"):
        answer = open_to_shop.client.options(path, headers={"Origin": SHOP, **PREFLIGHT})
        allowed = answer.headers["Access-Control-Allow-Headers"].lower().split(", ")
        assert answer.status_code == 200
        assert {"authorization", "content-type", "if-none-match", "x-api-key", "last-event-id"} <= set(allowed)
        assert answer.headers["Access-Control-Allow-Methods"] == "GET, POST"
        assert int(answer.headers["Access-Control-Max-Age"]) <= 600


def test_refusals_are_readable_too(open_to_shop: Server) -> None:
    refused = ask(open_to_shop, SHOP, role="nobody")
    assert (refused.status_code, refused.headers["Access-Control-Allow-Origin"]) == (401, SHOP)
    lost = open_to_shop.client.get("/ofrep/v1/nothing", headers={"Origin": SHOP})
    assert (lost.status_code, lost.headers["Access-Control-Allow-Origin"]) == (404, SHOP)


def test_a_stream_may_be_read_by_a_named_origin(open_to_shop: Server) -> None:
    answer = open_to_shop.client.get("/ofrep/v1/events", headers={"Origin": SHOP, **with_key("viewer")}, buffered=False)
    assert answer.headers["Access-Control-Allow-Origin"] == SHOP
    answer.close()


def test_a_browser_is_never_told_to_send_cookies_along(open_to_shop: Server, start: StartServer) -> None:
    for server in (open_to_shop, start(ofrep_origins=["*"])):
        for answer in (
            ask(server, SHOP),
            server.client.options(ALL, headers={"Origin": SHOP, **PREFLIGHT}),
        ):
            assert "Access-Control-Allow-Credentials" not in answer.headers
            assert answer.headers["Access-Control-Allow-Origin"] in {SHOP, "*"}


def test_what_is_not_ofrep_stays_closed_to_other_origins(open_to_shop: Server) -> None:
    for path in ("/api/v1/tenants", "/openapi.json"):
        assert cors(open_to_shop.client.get(path, headers={"Origin": SHOP, **with_key("viewer")})) == {}


@pytest.mark.parametrize(
    "origin",
    ["shop.example", "https://shop.example/", "https://shop.example/a", "https://a@b", "ftp://a", "", "https://"],
)
def test_what_is_no_origin_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(SettingsError, match=r"^ofrep_origins"):
        check_origins([SHOP, origin])


@pytest.mark.parametrize("origin", ["https://shop.example", "http://localhost:3000", "http://[::1]:8080", "*"])
def test_what_a_browser_sends_is_an_origin(origin: str) -> None:
    check_origins([origin])
