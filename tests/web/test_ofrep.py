"""The protocol as its clients need it: values, reasons, ETags, and a shape for everything that goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from urllib.parse import quote

import pytest
from flask import Flask, Response
from flask.testing import FlaskClient
from werkzeug.exceptions import HTTPException
from werkzeug.test import TestResponse

from external_oms import FLAG_KEY, ExternalOMSProvider
from external_oms.emulator import Fault
from external_oms.errors import StoreError
from external_oms.web import ExternalOMS, access, ofrep
from tests.support.web import KEYS, TENANT, Server, StartServer, with_key

ONE = f"/ofrep/v1/evaluate/flags/{FLAG_KEY}"
ALL = "/ofrep/v1/evaluate/flags"


@pytest.fixture(autouse=True)
def _one_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tickets, and with them ETags, change every ten minutes; not while a test compares them."""
    monkeypatch.setattr(access, "TOKEN_SLOT_SECONDS", 10**10)


def ask(server: Server, path: str = ONE, context: object = None, **headers: str) -> TestResponse:
    return server.client.post(path, json={"context": context or {}}, headers={**with_key("viewer"), **headers})


def bulk(server: Server, context: object = None, query: str = "", **headers: str) -> TestResponse:
    return ask(server, f"{ALL}{query}", context, **{name.replace("_", "-"): value for name, value in headers.items()})


def shape(answer: TestResponse) -> dict[str, object]:
    assert answer.mimetype == "application/json"
    found = answer.get_json()
    assert isinstance(found, dict)
    return found


def metadata(flag: dict[str, object]) -> dict[str, object]:
    found = flag["metadata"]
    assert isinstance(found, dict)
    return found


def only(answer: TestResponse) -> dict[str, object]:
    """The one flag of a bulk answer."""
    flags = shape(answer)["flags"]
    assert isinstance(flags, list)
    assert len(flags) == 1
    found: dict[str, object] = flags[0]
    return found


def silent(server: Server) -> None:
    """Let the config API fail from now on."""
    server.api.fault(TENANT, Fault(status=500, times=None))


# -- one flag ----------------------------------------------------------------------------------------------------------


def test_a_fresh_value_is_static_and_says_where_it_comes_from(server: Server) -> None:
    server.api.set_enabled(TENANT, True)
    assert server.deliver().status_code == 200
    answer = ask(server)
    said = shape(answer)
    assert answer.status_code == 200
    assert (said["key"], said["value"], said["reason"], said["variant"]) == (FLAG_KEY, True, "STATIC", "on")
    about = metadata(said)
    assert {"tenant": TENANT, "generation": 1, "stale": False, "cache": "fresh"}.items() <= about.items()
    assert {"fetched_at", "updated_at", "source"} <= about.keys()


def test_a_fresh_value_costs_no_read(server: Server) -> None:
    ask(server)
    reads = server.api.reads(TENANT)
    for _ in range(50):
        assert ask(server).status_code == 200
    assert server.api.reads(TENANT) == reads


def test_a_flip_shows_at_the_next_evaluation_after_its_delivery(server: Server) -> None:
    for enabled in (True, False, True):
        server.api.set_enabled(TENANT, enabled)
        server.deliver()
        assert shape(ask(server))["value"] is enabled


def test_a_stale_value_is_served_and_not_called_authoritative(server: Server) -> None:
    assert shape(ask(server))["value"] is False
    silent(server)
    assert server.deliver().status_code == 202
    said = shape(ask(server))
    assert (said["value"], said["reason"], said["variant"]) == (False, "UNKNOWN", "off")
    assert (metadata(said)["cache"], metadata(said)["stale"]) == ("stale", True)


@pytest.mark.parametrize(("when_expired", "value"), [("on", True), ("off", False)])
def test_a_value_decided_by_the_setting_says_so(start: StartServer, when_expired: str, value: bool) -> None:
    server = start(when_expired=when_expired, base_url="http://127.0.0.1:9/{tenant}")
    said = shape(ask(server))
    assert (said["value"], said["reason"], said["variant"]) == (value, "UNKNOWN", when_expired)
    assert (metadata(said)["cache"], metadata(said)["when_expired"]) == ("expired", when_expired)
    flag = only(bulk(server))
    assert flag["value"] is value


def test_where_nothing_may_be_served_there_is_no_value_and_the_callers_own_holds(start: StartServer) -> None:
    server = start(base_url="http://127.0.0.1:9/{tenant}")
    answer = ask(server)
    said = shape(answer)
    assert answer.status_code == 200
    assert "value" not in said
    assert (said["key"], said["reason"], said["variant"]) == (FLAG_KEY, "UNKNOWN", "default")
    assert metadata(said)["cache"] == "expired"
    flag = only(bulk(server))
    assert "value" not in flag
    assert flag["variant"] == "default"


@pytest.mark.parametrize(
    "key",
    [
        "other",
        "a/b",
        "a//b",
        "/",
        "a/",
        "",
        "100%",
        "%2F",
        "a b",
        "ключ",
        "🚚",
        "a\nb",
        "a?b#c",
        ".",
        "x" * 500,
        "\x00",
    ],
)
def test_any_other_key_is_not_found_by_its_own_name(server: Server, key: str) -> None:
    answer = ask(server, f"{ALL}/{quote(key, safe='')}")
    said = shape(answer)
    assert (answer.status_code, said["errorCode"], said["key"]) == (404, "FLAG_NOT_FOUND", key)
    assert said["errorDetails"]


@pytest.mark.parametrize(
    "body", [{}, {"context": {}}, {"context": {"targetingKey": "", "n": None, "deep": {"a": [1]}}}]
)
def test_a_context_may_be_empty_or_hold_anything(server: Server, body: object) -> None:
    for path in (ONE, ALL):
        assert server.client.post(path, json=body, headers=with_key("viewer")).status_code == 200


@pytest.mark.parametrize(
    "body",
    [{"context": None}, {"context": []}, {"context": "a"}, {"context": {"targetingKey": 7}}],
)
def test_a_context_that_is_none_is_refused(server: Server, body: object) -> None:
    for path in (ONE, ALL):
        answer = server.client.post(path, json=body, headers=with_key("viewer"))
        assert (answer.status_code, shape(answer)["errorCode"]) == (400, "INVALID_CONTEXT")
        assert (shape(answer).get("key") == FLAG_KEY) is (path == ONE)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"context": NaN}', b'{"context":{},"context":{}}']
)
def test_a_body_that_is_no_json_object_is_refused(server: Server, body: bytes) -> None:
    for path in (ONE, ALL):
        answer = server.client.post(path, data=body, content_type="application/json", headers=with_key("viewer"))
        assert (answer.status_code, shape(answer)["errorCode"]) == (400, "PARSE_ERROR")
        assert shape(answer)["errorDetails"]


# -- several tenants ---------------------------------------------------------------------------------------------------


def test_the_context_chooses_the_tenant(two: Server) -> None:
    two.api.set_enabled("globex", True)
    two.deliver({"tenant": "globex"})
    for tenant, enabled in ((TENANT, False), ("globex", True)):
        said = shape(ask(two, context={"tenant": tenant}))
        assert (said["value"], metadata(said)["tenant"]) == (enabled, tenant)
        flag = only(bulk(two, {"tenant": tenant}))
        assert flag["value"] is enabled


@pytest.mark.parametrize("tenant", [None, "nobody", 7, ["acme-staging"], {"a": 1}, True])
def test_no_tenant_or_an_unknown_one_is_an_invalid_context(two: Server, tenant: object) -> None:
    context = {} if tenant is None else {"tenant": tenant}
    answer = ask(two, context=context)
    said = shape(answer)
    assert (answer.status_code, said["key"], said["errorCode"]) == (400, FLAG_KEY, "INVALID_CONTEXT")
    together = bulk(two, context)
    flag = only(together)
    assert together.status_code == 200
    assert (flag["key"], flag["errorCode"]) == (FLAG_KEY, "INVALID_CONTEXT")
    assert flag["errorDetails"]
    assert bulk(two, context, If_None_Match=together.headers["ETag"]).status_code == 304


# -- all flags, and their ETag -----------------------------------------------------------------------------------------


def test_the_bulk_answer_stays_the_same_while_the_flag_does(server: Server) -> None:
    first = bulk(server)
    assert first.headers["ETag"].startswith('"')
    server.deliver()  # another generation, another read, the same value
    server.oms.provider.refresh()
    again = bulk(server)
    assert (again.headers["ETag"], again.data) == (first.headers["ETag"], first.data)


def test_another_value_and_another_standing_have_another_etag(server: Server) -> None:
    tags = [bulk(server).headers["ETag"]]
    server.api.set_enabled(TENANT, True)
    server.deliver()
    tags.append(bulk(server).headers["ETag"])
    silent(server)
    server.deliver()
    tags.append(bulk(server).headers["ETag"])
    server.api.clear(TENANT)
    server.api.set_enabled(TENANT, False)
    server.oms.provider.refresh()
    tags.append(bulk(server).headers["ETag"])
    assert len(set(tags[:3])) == 3
    assert tags[3] == tags[0]


def test_every_process_with_the_same_settings_answers_the_same(start: StartServer) -> None:
    one, other = bulk(start()), bulk(start())
    assert (one.headers["ETag"], one.data) == (other.headers["ETag"], other.data)


@pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}', "*"])
def test_what_the_client_has_is_not_sent_again(server: Server, form: str) -> None:
    tag = bulk(server).headers["ETag"]
    answer = bulk(server, If_None_Match=form.format(tag))
    assert (answer.status_code, answer.data, answer.headers["ETag"]) == (304, b"", tag)
    server.api.set_enabled(TENANT, True)
    server.deliver()
    assert bulk(server, If_None_Match=form.format(tag)).status_code == (304 if form == "*" else 200)


@pytest.mark.parametrize("modified", ["0", "1771622898", "2026-01-01T00:00:00Z", "yesterday", "", "9" * 400, "\u0661"])
def test_a_request_that_knows_of_something_newer_does_not_wait(
    server: Server, monkeypatch: pytest.MonkeyPatch, modified: str
) -> None:
    waited: list[object] = []
    changes = server.oms.cache.changes
    monkeypatch.setattr(changes, "subscribe", waited.append)
    assert bulk(server, query=f"?flagConfigEtag=x&flagConfigLastModified={quote(modified)}").status_code == 200
    assert bulk(server, query="?flagConfigEtag=x").status_code == 200
    assert waited == []


# -- who, and how often ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [ONE, ALL])
def test_a_key_in_either_header_lets_in_and_nothing_else_does(server: Server, path: str) -> None:
    for header in ({"X-API-Key": KEYS["viewer"]}, {"Authorization": f"Bearer {KEYS['admin']}"}):
        assert server.client.post(path, json={"context": {}}, headers=header).status_code == 200
    for role in ("nobody", "stranger"):
        refused = server.client.post(path, json={"context": {}}, headers=with_key(role))
        assert (refused.status_code, shape(refused)["errorCode"]) == (401, "GENERAL")
        assert shape(refused)["errorDetails"]
        assert refused.headers["WWW-Authenticate"].startswith("Bearer")


# -- what goes wrong has the protocol's shape --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "key"),
    [
        ("GET", ONE, 405, FLAG_KEY),
        ("PUT", f"{ALL}/a/b", 405, "a/b"),
        ("GET", ALL, 405, None),
        ("POST", "/ofrep/v1/events", 405, None),
        ("POST", "/ofrep/v1/configuration", 404, None),
        ("GET", "/ofrep/", 404, None),
        ("GET", "/ofrep/v1//evaluate\n", 404, None),
    ],
)
def test_another_method_or_path_is_refused_in_the_same_shape(
    server: Server, method: str, path: str, status: int, key: str | None
) -> None:
    answer = server.client.open(quote(path), method=method, headers=with_key("viewer"))
    said = shape(answer)
    assert (answer.status_code, said["errorCode"], said.get("key")) == (status, "GENERAL", key)
    assert said["errorDetails"]
    assert ("Allow" in answer.headers) is (status == 405)


def test_a_body_of_another_type_or_size_is_refused_in_the_same_shape(server: Server) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = server.client.post(ONE, data=b"{}", content_type=content_type, headers=with_key("viewer"))
        assert (answer.status_code, shape(answer)["key"]) == (415, FLAG_KEY)
    large = b'{"context": {"a": "%s"}}' % (b"x" * ofrep.BODY_BYTES)
    answer = server.client.post(ONE, data=large, content_type="application/json", headers=with_key("viewer"))
    assert (answer.status_code, shape(answer)["errorCode"]) == (413, "GENERAL")


def break_by(error: Exception) -> Callable[..., None]:
    def broken(*_: object, **__: object) -> None:
        raise error

    return broken


def test_a_defect_is_answered_with_key_and_code_and_without_its_text(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    defect = break_by(RuntimeError("a secret inside"))
    monkeypatch.setattr(server.oms.provider, "resolve_boolean_details", defect)
    monkeypatch.setattr(server.oms.cache, "lookup", defect)
    answer, together = ask(server), bulk(server)
    assert (answer.status_code, shape(answer)["key"], shape(answer)["errorCode"]) == (500, FLAG_KEY, "GENERAL")
    assert (together.status_code, shape(together)["errorCode"]) == (500, "GENERAL")
    assert b"secret" not in answer.data + together.data


def test_a_store_that_cannot_be_used_is_no_defect(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.oms.cache, "lookup", break_by(StoreError("the file is gone")))
    answer = bulk(server)
    assert (answer.status_code, shape(answer)["errorCode"]) == (503, "GENERAL")
    assert int(answer.headers["Retry-After"]) >= 1


def test_a_process_that_is_ending_says_so(server: Server) -> None:
    server.oms.provider.shutdown()
    answer = ask(server)
    assert (answer.status_code, shape(answer)["errorCode"], answer.headers["Retry-After"]) == (503, "GENERAL", "1")


# -- on another app, and behind a proxy --------------------------------------------------------------------------------


def mounted(server: Server) -> FlaskClient:
    """OFREP under a prefix of an app that has opinions about errors."""
    app = Flask("shop")

    def opinion(error: HTTPException) -> Response:
        return Response("<h1>Oops</h1>", error.code or 500, content_type="text/html")

    for code in (400, 401, 404, 405, 415):
        app.register_error_handler(code, opinion)
    app.register_error_handler(HTTPException, opinion)
    provider: ExternalOMSProvider = server.oms.provider
    ExternalOMS(app, provider=provider, mount="/oms", domain="test_ofrep")
    return app.test_client()


def test_the_app_around_it_has_no_say_in_its_errors(server: Server) -> None:
    client = mounted(server)
    key = with_key("viewer")
    answers = [
        client.post(f"/oms{ALL}/nobody", json={"context": {}}, headers=key),
        client.post(f"/oms{ALL}", json={"context": {}}),
        client.get(f"/oms{ONE}", headers=key),
        client.post("/oms/ofrep/v1/nothing", headers=key),
        client.post(f"/oms{ONE}", data=b"x", headers=key),
        client.post(f"/oms{ONE}", data=b"x", headers=key, content_type="application/json"),
    ]
    assert [answer.status_code for answer in answers] == [404, 401, 405, 404, 415, 400]
    assert all(shape(answer)["errorCode"] for answer in answers)
    assert client.get("/elsewhere").data == b"<h1>Oops</h1>"


def test_the_stream_is_named_by_the_path_that_the_client_sees(server: Server) -> None:
    client = mounted(server)
    asked = {"json": {"context": {}}, "headers": with_key("viewer")}
    answer = client.post(f"/oms{ALL}", environ_overrides={"SCRIPT_NAME": "/proxied"}, **asked)
    (stream,) = answer.get_json()["eventStreams"]
    assert stream["endpoint"]["requestUri"].startswith("/proxied/oms/ofrep/v1/events?")
    (stream,) = bulk(server).get_json()["eventStreams"]
    assert stream["type"] == "sse"
    assert stream["endpoint"]["requestUri"].startswith("/ofrep/v1/events?")
    assert KEYS["viewer"] not in json.dumps(stream)


@pytest.mark.parametrize(
    ("said", "prefix"),
    [
        ("/oms", "/oms"),
        ("/a/b/", "/a/b"),
        ("", ""),
        ("//evil.example", None),
        ("evil", None),
        ("/a?b", None),
        ("/" + "a/" * 99, None),
    ],
)
def test_a_proxy_that_takes_a_prefix_off_can_say_so(start: StartServer, said: str, prefix: str | None) -> None:
    server = start(proxies=1)
    answer = ask(server, ALL, **{"X-Forwarded-Prefix": said})
    if prefix is None:
        assert answer.status_code == 400
        return
    (stream,) = answer.get_json()["eventStreams"]
    assert stream["endpoint"]["requestUri"].startswith(f"{prefix}/ofrep/v1/events?")


@pytest.mark.parametrize(("policy", "reason"), [("default", "ERROR"), ("on", "DEFAULT"), ("last", "STALE")])
def test_all_flags_count_with_the_reason_that_the_sdk_gives(start: StartServer, policy: str, reason: str) -> None:
    server = start(when_expired=policy, refresh="lazy", stale_while_revalidate_seconds=0, stale_if_error_seconds=0)
    server.oms.provider.refresh()
    server.api.fault(TENANT, Fault(status=500, times=None))
    server.deliver()
    seen: list[str] = []
    server.oms.evaluated.subscribe(lambda event: seen.append(event.reason))
    assert bulk(server).status_code == 200
    assert ask(server).status_code == 200
    assert seen == [reason, reason]
