from __future__ import annotations

import io
import json
import logging
from time import time
from typing import Any

import pytest
from werkzeug.datastructures import Headers
from werkzeug.test import EnvironBuilder, TestResponse, run_wsgi_app

from external_oms import signature
from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.errors import StoreBusy, StoreError
from external_oms.problems import PROBLEM_TYPE
from external_oms.records import Member
from tests.support.redis import RedisServer
from tests.support.stores import FaultyStore
from tests.support.waiting import wait_until
from tests.support.web import BEARER, HOOK, MALFORMED, OLD_SECRET, SECRET, TENANT, Server, StartServer, with_key

LOGGER = "external_oms"


def refusal(answer: TestResponse) -> tuple[int, bytes, list[tuple[str, str]]]:
    return answer.status_code, answer.data, sorted(answer.headers)


def keyed(server: Server, body: object = None, **headers: str) -> TestResponse:
    return server.client.post(
        HOOK, json=body or {"tenant": TENANT}, headers={"Authorization": f"Bearer {BEARER}", **headers}
    )


def history(server: Server) -> list[dict[str, Any]]:
    answer = server.get("/api/v1/history").json
    assert answer is not None
    events: list[dict[str, Any]] = answer["events"]
    return events


# -- what a genuine delivery does --------------------------------------------------------------------------------------


def test_a_signed_delivery_is_answered_with_the_value_read_after_it(server: Server) -> None:
    assert server.oms.provider.enabled() is False
    server.api.set_enabled(TENANT, True)
    answer = server.deliver()
    assert answer.status_code == 200
    assert answer.json == {"tenant": TENANT, "generation": 1, "duplicate": False, "refreshed": True, "enabled": True}
    assert server.oms.provider.enabled() is True


def test_a_delivery_with_a_key_does_the_same(server: Server) -> None:
    server.api.set_enabled(TENANT, True)
    answer = keyed(server)
    assert answer.status_code == 200
    assert answer.json is not None
    assert answer.json["enabled"] is True


def test_the_platforms_envelope_and_that_of_standard_webhooks_both_name_the_tenant(two: Server) -> None:
    platform = {"tenant": "globex", "name": "changed", "published_at": "2026-11-23T09:30:00Z", "payload": {"a": [1]}}
    standard = {"type": "changed", "timestamp": "2026-11-23T09:30:00Z", "data": {"tenant": "globex"}}
    assert [two.deliver(body).status_code for body in (platform, standard)] == [200, 200]
    assert (two.generation("globex"), two.generation(TENANT)) == (2, 0)


@pytest.mark.parametrize("inner", [None, 5, "x", [], {}, {"tenant": TENANT}])
def test_beside_a_tenant_the_data_may_be_anything_that_names_no_other(server: Server, inner: object) -> None:
    assert server.deliver({"tenant": TENANT, "data": inner}).status_code == 200


@pytest.mark.parametrize("body", [{}, {"data": {}}, {"name": "x", "payload": {"tenant": "globex"}}])
def test_with_one_tenant_its_name_may_be_left_out(server: Server, body: object) -> None:
    assert server.deliver(body).status_code == 200
    assert server.generation() == 1


def test_a_repeated_id_is_a_duplicate_and_changes_nothing_at_all(server: Server) -> None:
    first = server.deliver(delivery_id="msg_same")
    versions, index = server.oms.store.version_ref(TENANT)
    before = (server.api.reads(TENANT), history(server), versions[index])
    again = server.deliver(delivery_id="msg_same")
    assert (first.status_code, again.status_code) == (200, 200)
    assert again.json == {"tenant": TENANT, "generation": 1, "duplicate": True, "refreshed": False, "enabled": False}
    assert (server.api.reads(TENANT), history(server), versions[index]) == before


def test_a_repeated_id_is_a_duplicate_however_short_the_history_is_kept(start: StartServer) -> None:
    server = start(history_seconds=1e-3)
    assert server.deliver(delivery_id="msg_same").status_code == 200
    wait_until(lambda: history(server) == [])
    again = server.deliver(delivery_id="msg_same").json
    assert again is not None
    assert (again["duplicate"], again["generation"]) == (True, 1)


def test_a_delivery_leaves_a_row_with_its_generation_and_the_read_after_it_rows_of_its_own(server: Server) -> None:
    assert server.oms.provider.enabled() is False
    server.api.set_enabled(TENANT, True)
    server.deliver(delivery_id="msg_flip")
    changed, delivery, first = history(server)
    assert (first["cause"], first["detail"]) == ("changed", "first value")
    assert {name: delivery[name] for name in ("cause", "actor", "delivery_id", "enabled", "latency_seconds")} == {
        "cause": "delivery",
        "actor": "webhook secret 1",
        "delivery_id": "msg_flip",
        "enabled": None,
        "latency_seconds": None,
    }
    assert delivery["detail"] == "generation 1"
    assert (changed["cause"], changed["enabled"]) == ("changed", True)
    assert changed["latency_seconds"] > 0


def test_an_id_beside_a_key_is_used_against_repetition_only_if_it_is_one(server: Server) -> None:
    assert keyed(server, **{"webhook-id": "sane"}).json != keyed(server, **{"webhook-id": "sane"}).json
    assert server.generation() == 1
    for _ in range(2):
        assert keyed(server, **{"webhook-id": "not sane" + "x" * 300}).status_code == 200
    assert server.generation() == 3


def test_while_secrets_are_rotated_both_are_taken(start: StartServer) -> None:
    server = start(webhook_secrets=[SECRET, OLD_SECRET])
    assert [server.deliver(secret=secret).status_code for secret in (SECRET, OLD_SECRET)] == [200, 200]


def test_a_delivery_whose_read_fails_is_accepted_and_says_so(start: StartServer, api: ConfigAPIEmulator) -> None:
    api.fault(TENANT, Fault(status=500, times=None))
    answer = start().deliver()
    assert answer.status_code == 202
    assert answer.json == {"tenant": TENANT, "generation": 1, "duplicate": False, "refreshed": False, "enabled": None}


def test_a_delivery_after_the_provider_was_shut_down_still_invalidates(start: StartServer) -> None:
    server = start(timeout_seconds=0.2)
    server.oms.provider.shutdown()
    assert server.deliver().status_code == 202
    assert server.generation() == 1


# -- a store that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [StoreError("connection refused"), StoreBusy("in use"), ValueError("a defect")])
def test_a_delivery_that_the_shared_store_cannot_take_is_never_called_taken(
    start: StartServer, fault: Exception
) -> None:
    """No other process would hear of it; the sender repeats it, and then it counts as the first."""
    store = FaultyStore()
    server = start(shared=store)
    assert server.oms.provider.enabled() is False
    server.api.set_enabled(TENANT, True)
    store.fault = fault
    refused = server.deliver(delivery_id="msg_down")
    assert (refused.status_code, refused.mimetype) == (503, PROBLEM_TYPE)
    assert int(refused.headers["Retry-After"]) >= 1
    assert store.data.load(TENANT).generation == 0
    assert server.get(f"/api/v1/tenants/{TENANT}").json != {}, "whoever asks is answered meanwhile"
    store.fault = None
    wait_until(lambda: store.data.load(TENANT).generation > 0, message="this process repeats it to the store")

    def taken() -> TestResponse | None:
        answer = server.deliver(delivery_id="msg_down")
        return answer if answer.status_code == 200 else None

    again = wait_until(taken)
    assert again.json is not None
    assert (again.json["duplicate"], again.json["enabled"]) == (False, True)


def test_a_delivery_while_redis_does_not_answer_is_refused_and_taken_when_it_does(
    start: StartServer, redis_server: RedisServer
) -> None:
    server = start(store=redis_server.url, store_bound_seconds=1.0)
    assert server.oms.provider.enabled() is False
    server.api.set_enabled(TENANT, True)
    redis_server.freeze()
    try:
        refused = server.deliver(delivery_id="msg_frozen")
    finally:
        redis_server.thaw()
    assert (refused.status_code, refused.mimetype) == (503, PROBLEM_TYPE)
    assert int(refused.headers["Retry-After"]) >= 1

    def taken() -> TestResponse | None:
        answer = server.deliver(delivery_id="msg_frozen")
        return answer if answer.status_code == 200 else None

    again = wait_until(taken)
    assert again.json is not None
    assert (again.json["duplicate"], again.json["enabled"]) == (False, True)


def test_a_process_whose_store_fails_serves_no_value_from_before_the_delivery_as_fresh(start: StartServer) -> None:
    store = FaultyStore()
    server = start(shared=store, refresh="lazy")
    assert server.oms.provider.enabled() is False
    server.api.fault(TENANT, Fault(status=500, times=None))
    store.fault = StoreError("connection refused")
    assert server.deliver().status_code == 503
    state = server.get(f"/api/v1/tenants/{TENANT}").json
    assert state is not None
    assert (state["enabled"], state["freshness"]) == (False, "stale")


@pytest.mark.parametrize("fault", [StoreError("connection refused"), StoreBusy("in use")])
@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        ("GET", "/api/v1/tenants", "viewer"),
        ("GET", "/api/v1/history", "viewer"),
        ("POST", f"/api/v1/tenants/{TENANT}/refresh", "operator"),
        ("GET", "/metrics", "viewer"),
        ("GET", "/readyz", "nobody"),
        ("GET", "/", "viewer"),
        ("POST", "/ofrep/v1/evaluate/flags", "viewer"),
    ],
)
def test_a_store_that_fails_is_answered_for_or_is_a_503_with_retry_after(
    start: StartServer, method: str, path: str, role: str, fault: Exception
) -> None:
    store = FaultyStore()
    server = start(shared=store, timeout_seconds=0.2)
    wait_until(lambda: server.oms.cache.state(TENANT).enabled is not None)
    store.fault = fault
    answer = server.client.open(path, method=method, headers=with_key(role), json={} if method == "POST" else None)
    assert answer.status_code in {200, 502, 503}
    if answer.status_code == 503:
        assert int(answer.headers["Retry-After"]) >= 1


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '7\n{"generation": 9007199254740992}', '{"at": Infinity}', "\x00"], ids=len
)
def test_what_another_program_leaves_in_redis_is_no_500(
    start: StartServer, redis_server: RedisServer, text: str
) -> None:
    server = start(store=redis_server.url, store_bound_seconds=1.0)
    assert server.deliver().status_code == 200
    server.oms.store.report([Member("host:1", TENANT, 1, True, "fresh", 1.0)])
    for key in redis_server.holds():
        redis_server.command("SET", key, text)
    server.api.set_enabled(TENANT, True)
    answer = server.deliver().json
    assert answer is not None
    assert (answer["duplicate"], answer["enabled"]) == (False, True)
    assert [server.get(path).status_code for path in ("/", "/metrics", "/api/v1/history", "/api/v1/tenants")] == [
        200
    ] * 4


# -- what is refused ---------------------------------------------------------------------------------------------------


def forgeries() -> dict[str, dict[str, Any]]:
    body = b'{"tenant": "acme-staging"}'
    good = signature.sign(body, secret=SECRET, delivery_id="msg", at_wall=time())
    old = signature.sign(body, secret=SECRET, delivery_id="msg", at_wall=time() - 310)
    early = signature.sign(body, secret=SECRET, delivery_id="msg", at_wall=time() + 310)
    foreign = signature.sign(body, secret=OLD_SECRET, delivery_id="msg", at_wall=time())
    return {
        "nothing": {"headers": {}},
        "too old": {"headers": old},
        "from the future": {"headers": early},
        "another secret": {"headers": foreign},
        "another id": {"headers": {**good, "webhook-id": "other"}},
        "another moment": {"headers": {**good, "webhook-timestamp": str(int(time()) - 1)}},
        "a zero before the moment": {"headers": {**good, "webhook-timestamp": f"0{good['webhook-timestamp']}"}},
        "another body": {"headers": good, "data": body + b" "},
        "no signature": {"headers": {name: good[name] for name in ("webhook-id", "webhook-timestamp")}},
        "not base64": {"headers": {**good, "webhook-signature": "v1,%%%"}},
        "not ASCII": {"headers": {**good, "webhook-signature": "v1,\xe9\xe9"}},
        "no version": {"headers": {**good, "webhook-signature": good["webhook-signature"].removeprefix("v1,")}},
        "wrong key": {"headers": {"Authorization": "Bearer wrong"}},
        "empty key": {"headers": {"Authorization": "Bearer "}},
        "basic": {"headers": {"Authorization": f"Basic {BEARER}"}},
        "key elsewhere": {"headers": {"X-API-Key": BEARER}},
        "not ASCII key": {"headers": {"Authorization": "Bearer \xe9"}},
        "secret as key": {"headers": {"Authorization": f"Bearer {SECRET}"}},
        "not UTF-8": {"headers": good, "data": b"\xff\xfe"},
        "not JSON either": {"headers": {}, "data": b"{", "content_type": "text/plain"},
    }


def test_whatever_is_not_genuine_gets_one_and_the_same_401(server: Server) -> None:
    given = {"data": b'{"tenant": "acme-staging"}', "content_type": "application/json"}
    answers = {name: server.client.post(HOOK, **{**given, **forgery}) for name, forgery in forgeries().items()}
    assert {name: answer.status_code for name, answer in answers.items()} == dict.fromkeys(answers, 401)
    assert len({(answer.data, tuple(sorted(answer.headers))) for answer in answers.values()}) == 1
    assert server.generation() == 0


def test_the_same_request_is_genuine_without_the_forgery(server: Server) -> None:
    body = b'{"tenant": "acme-staging"}'
    headers = signature.sign(body, secret=SECRET, delivery_id="msg", at_wall=time())
    assert server.client.post(HOOK, data=body, headers=headers, content_type="application/json").status_code == 200


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_a_body_that_is_not_announced_as_json_is_refused(server: Server, content_type: str) -> None:
    answer = server.deliver(content_type=content_type)
    assert (answer.status_code, answer.mimetype, server.generation()) == (415, PROBLEM_TYPE, 0)


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "application/cloudevents+json"])
def test_json_with_a_parameter_or_a_suffix_is_json(server: Server, content_type: str) -> None:
    assert server.deliver(content_type=content_type).status_code == 200


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: repr(body[:30]))
def test_a_genuine_delivery_that_is_malformed_is_refused(server: Server, body: bytes) -> None:
    answer = server.deliver(body)
    assert (answer.status_code, answer.mimetype, server.generation()) == (400, PROBLEM_TYPE, 0)


def test_an_unknown_tenant_is_not_found(server: Server) -> None:
    answer = server.deliver({"tenant": "nobody"})
    assert (answer.status_code, answer.mimetype) == (404, PROBLEM_TYPE)


def test_with_several_tenants_none_named_is_malformed(two: Server) -> None:
    assert two.deliver({}).status_code == 400


def test_a_body_above_the_cap_is_refused_before_it_is_believed(start: StartServer) -> None:
    server = start(webhook_max_bytes=100)
    for headers in ({}, signature.sign(b"x" * 101, secret=SECRET, delivery_id="m", at_wall=time())):
        answer = server.client.post(HOOK, data=b"x" * 101, headers=headers, content_type="application/json")
        assert (answer.status_code, answer.mimetype) == (413, PROBLEM_TYPE)
    body = json.dumps({"tenant": TENANT, "pad": "x" * 63}).encode()
    assert len(body) == 100
    assert server.deliver(body).status_code == 200


def chunked(server: Server, body: bytes) -> int:
    """Post a body of which no length is announced, as a server hands on what came in chunks."""
    headers = signature.sign(body, secret=SECRET, delivery_id="chunks", at_wall=time())
    builder = EnvironBuilder(HOOK, method="POST", headers=Headers(headers), content_type="application/json")
    environ = builder.get_environ()
    environ.pop("CONTENT_LENGTH", None)
    environ |= {"wsgi.input": io.BytesIO(body), "wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"}
    return int(run_wsgi_app(server.app.wsgi_app, environ)[1][:3])


def test_the_cap_holds_for_a_body_in_chunks(start: StartServer) -> None:
    server = start(webhook_max_bytes=100)
    assert chunked(server, b'{"tenant": "acme-staging"}') == 200
    assert chunked(server, b'{"tenant": "acme-staging", "pad": "' + b"x" * 100 + b'"}') == 413
    assert server.generation() == 1


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "TRACE"])
def test_only_a_post_is_a_delivery(server: Server, method: str) -> None:
    answer = server.client.open(HOOK, method=method)
    assert (answer.status_code, answer.mimetype) == (405, PROBLEM_TYPE)
    assert set(answer.headers["Allow"].split(", ")) == {"POST", "OPTIONS"}


def test_too_many_deliveries_wait_in_whole_seconds_and_forgers_lock_nobody_out(start: StartServer) -> None:
    server = start(webhook_per_minute=3)
    forged = [server.client.post(HOOK, data=b"{}") for _ in range(4)]
    assert [answer.status_code for answer in forged] == [401, 401, 401, 429]
    genuine = [server.deliver() for _ in range(4)]
    assert [answer.status_code for answer in genuine] == [200, 200, 200, 429]
    for answer in (forged[-1], genuine[-1]):
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
    assert server.generation() == 3


def test_replays_use_up_nothing_of_the_limit_of_genuine_deliveries(start: StartServer) -> None:
    server = start(webhook_per_minute=3)
    assert server.deliver(delivery_id="msg_first").status_code == 200
    replays = [server.deliver(delivery_id="msg_first") for _ in range(10)]
    assert [answer.status_code for answer in replays] == [200] * 10
    assert [server.deliver().status_code for _ in range(3)] == [200, 200, 429]
    assert server.generation() == 3


@pytest.mark.parametrize("host", ["[::1", "a b", "a/../b", "\xe9", "evil.example:port"])
def test_a_malformed_host_is_a_problem_too(server: Server, host: str) -> None:
    answer = server.deliver(environ_overrides={"HTTP_HOST": host})
    assert answer.status_code in {200, 400}
    assert answer.mimetype in {"application/json", PROBLEM_TYPE}


# -- what is logged ----------------------------------------------------------------------------------------------------


def test_deliveries_leave_a_line_and_refused_ones_are_counted_in_one_line_a_minute(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="external_oms.webhook")
    server.deliver({"tenant": TENANT, "payload": "do-not-log-me"}, delivery_id="msg_logged")
    server.deliver({"tenant": TENANT, "payload": "do-not-log-me"}, delivery_id="msg_logged")
    for _ in range(100):
        server.client.post(HOOK, data=b"do-not-log-me", headers={"webhook-id": "evil\x1b[31m id" + "y" * 100})
    server.deliver(b"{}{}")
    server.oms.webhook.refusals.flush()
    lines = [record.getMessage() for record in caplog.records if record.name == "external_oms.webhook"]
    taken, first, later = lines
    assert taken == f"tenant {TENANT}: delivery, generation 1"
    assert first.startswith("refused deliveries: unauthorized (webhook-id is not 1 to 256 printable ASCII characters")
    assert later.startswith("refused deliveries in the last minute: 100 (99 unauthorized, 1 bad_request); last: ")
    assert "do-not-log-me" not in caplog.text


def test_behind_a_proxy_refused_deliveries_are_limited_by_the_address_before_it(start: StartServer) -> None:
    server = start(webhook_per_minute=1, proxies=1)

    def refused(address: str) -> int:
        return server.client.post(HOOK, json={}, headers={"X-Forwarded-For": address}).status_code

    assert [refused("192.0.2.1"), refused("192.0.2.2"), refused("192.0.2.1")] == [401, 401, 429]
