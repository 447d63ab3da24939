from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from werkzeug.test import TestResponse

from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.problems import PROBLEM_TYPE
from tests.support.clock import FakeClock
from tests.support.waiting import wait_until
from tests.support.web import TENANT, Server, StartServer, with_key

ONE = f"/api/v1/tenants/{TENANT}"


def put(server: Server, body: object, role: str = "admin", path: str = ONE) -> TestResponse:
    return server.client.put(path, json=body, headers=with_key(role))


def refresh(server: Server, path: str = f"{ONE}/refresh") -> TestResponse:
    return server.client.post(path, headers=with_key("operator"))


def history(server: Server, **query: object) -> dict[str, Any]:
    answer = server.client.get("/api/v1/history", query_string=query, headers=with_key("viewer"))
    assert answer.status_code == 200
    found: dict[str, Any] = answer.get_json()
    return found


# -- states ------------------------------------------------------------------------------------------------------------


def test_the_state_is_the_providers_own(server: Server) -> None:
    server.api.set_enabled(TENANT, True)
    assert refresh(server).status_code == 200
    shown = server.get(ONE).get_json()
    state = server.oms.provider.state()
    assert (shown["tenant"], shown["enabled"], shown["freshness"], shown["generation"]) == (TENANT, True, "fresh", 0)
    assert 0 <= shown["age_seconds"] <= (state.age_seconds or 0) + 0.001  # what is shown is rounded
    assert (shown["source"], shown["last_error"], shown["failures"]) == ("memory", None, 0)
    assert state.fetched_at is not None
    assert abs((datetime.fromisoformat(shown["fetched_at"]) - state.fetched_at).total_seconds()) < 0.001
    assert shown["updated_at"].endswith("Z")


def test_all_tenants_are_listed_in_the_order_of_the_settings(two: Server) -> None:
    shown = two.get("/api/v1/tenants").get_json()["tenants"]
    assert [state["tenant"] for state in shown] == [TENANT, "globex"]


@pytest.mark.parametrize("name", ["nobody", "Acme", "..", "%2e%2e", "a%20b", "\u00e9", "x" * 500])
def test_an_unknown_tenant_is_not_found(server: Server, name: str) -> None:
    answer = server.get(f"/api/v1/tenants/{name}")
    assert (answer.status_code, answer.mimetype) == (404, PROBLEM_TYPE)


def test_nothing_that_the_api_answers_may_be_stored_by_others(server: Server) -> None:
    for path in (ONE, "/api/v1/history", "/healthz"):
        assert server.get(path).headers["Cache-Control"] == "no-store"


# -- refreshing --------------------------------------------------------------------------------------------------------


def test_a_refresh_reads_the_api_now(server: Server) -> None:
    refresh(server)
    reads = server.api.reads(TENANT)
    server.api.set_enabled(TENANT, True)
    answer = refresh(server)
    assert answer.get_json()["enabled"] is True
    assert answer.get_json()["source"] == "api"
    assert server.api.reads(TENANT) == reads + 1


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        (Fault(status=500, times=None), 502, "unavailable"),
        (Fault(status=403, times=None), 502, "unauthorized"),
        (Fault(status=429, retry_after=7, times=None), 503, "rate_limited"),
        (Fault(malformed="html", times=None), 502, "malformed"),
        (Fault(dropped="headers", times=None), 502, "unavailable"),
        (Fault(status=400, times=None, where="token"), 502, "token"),
    ],
    ids=["500", "403", "429", "html", "dropped", "token"],
)
def test_a_refresh_that_fails_says_why_and_claims_nothing(
    start: StartServer,
    api: ConfigAPIEmulator,
    stop_clock: Callable[[], FakeClock],
    fault: Fault,
    status: int,
    kind: str,
) -> None:
    stop_clock()
    api.fault(TENANT, fault)
    answer = refresh(start(refresh="lazy"))
    assert (answer.status_code, answer.mimetype, answer.get_json()["kind"]) == (status, PROBLEM_TYPE, kind)
    if status == 503:
        assert answer.headers["Retry-After"] == "7"
    assert "Traceback" not in answer.text


def test_the_end_of_an_outage_is_logged_as_loud_as_its_beginning(
    start: StartServer, api: ConfigAPIEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    server = start(refresh="lazy")
    assert refresh(server).status_code == 200
    api.fault(TENANT, Fault(status=503, times=None))
    for _ in range(3):
        assert refresh(server).status_code == 502
    api.clear(TENANT)
    assert refresh(server).status_code == 200
    wait_until(lambda: len(caplog.records) == 2)  # another thread may be publishing the change
    first, last = caplog.records
    assert (first.levelname, last.levelname) == ("WARNING", "WARNING")
    assert "config API reads are failing" in first.getMessage()
    assert last.getMessage() == f"tenant {TENANT}: config API reads succeed again after 3 failed reads"


def test_a_refresh_of_an_unknown_tenant_is_not_found(server: Server) -> None:
    assert refresh(server, "/api/v1/tenants/nobody/refresh").status_code == 404


# -- switching ---------------------------------------------------------------------------------------------------------


def test_a_switch_reaches_the_api_and_leaves_who_and_why(server: Server) -> None:
    answer = put(server, {"enabled": True, "reason": "partner is back, OPS-7"})
    assert answer.status_code == 200
    assert answer.get_json()["enabled"] is True
    assert server.api.enabled(TENANT) is True
    written = next(event for event in history(server)["events"] if event["cause"] == "write")
    assert (written["actor"], written["enabled"], written["tenant"]) == ("the-admin", True, TENANT)
    assert "partner is back, OPS-7" in written["detail"]


def test_a_reason_may_be_left_out(server: Server) -> None:
    assert put(server, {"enabled": True}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"{}", 400),
        (b'{"enabled": 1}', 400),
        (b'{"enabled": "true"}', 400),
        (b'{"enabled": null}', 400),
        (b'{"enabled": true, "enabled": false}', 400),
        (b'{"enabled": true, "reason": 5}', 400),
        (b'{"enabled": true, "reason": null}', 400),
        (b'{"enabled": true, "reason": "two\\nlines"}', 400),
        (b'{"enabled": true, "reason": "\\ud800"}', 400),
        (b'{"enabled": true, "reason": "' + b"x" * 501 + b'"}', 400),
        (b'{"enabled": true, "tenant": "globex"}', 400),
        (b'{"enabled": true, "reason": "' + b"x" * 9000 + b'"}', 413),
    ],
    ids=lambda part: repr(part)[:50],
)
def test_a_malformed_switch_writes_nothing(server: Server, body: bytes, status: int) -> None:
    answer = server.client.put(ONE, data=body, content_type="application/json", headers=with_key("admin"))
    assert (answer.status_code, answer.mimetype, server.api.writes(TENANT)) == (status, PROBLEM_TYPE, 0)


def test_a_switch_that_is_not_json_is_refused(server: Server) -> None:
    answer = server.client.put(ONE, data=b'{"enabled": true}', content_type="text/plain", headers=with_key("admin"))
    assert (answer.status_code, server.api.writes(TENANT)) == (415, 0)


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        (Fault(status=409, times=None, where="write"), 409, "write_conflict"),
        (Fault(status=400, times=None, where="write"), 400, "write_refused"),
        (Fault(status=422, times=None, where="write"), 502, "write_refused"),
        (Fault(status=429, retry_after=9, times=None, where="write"), 503, "rate_limited"),
        (Fault(status=403, times=None, where="write"), 502, "unauthorized"),
        (Fault(status=400, times=None, where="token"), 502, "token"),
    ],
    ids=["409", "400", "422", "429", "403", "token"],
)
def test_a_switch_that_fails_says_in_words_what_became_of_it(
    start: StartServer, api: ConfigAPIEmulator, fault: Fault, status: int, kind: str
) -> None:
    api.fault(TENANT, fault)
    answer = put(start(refresh="lazy"), {"enabled": True})
    assert (answer.status_code, answer.mimetype, answer.get_json()["kind"]) == (status, PROBLEM_TYPE, kind)
    assert len(answer.get_json()["detail"]) > 20
    assert api.enabled(TENANT) is False


def test_a_switch_whose_outcome_stays_unknown_says_so(start: StartServer, api: ConfigAPIEmulator) -> None:
    api.fault(TENANT, Fault(dropped="headers", times=None, where="write"))
    api.fault(TENANT, Fault(status=500, times=None, where="read"))
    answer = put(start(refresh="lazy"), {"enabled": True})
    assert (answer.status_code, answer.get_json()["kind"]) == (504, "write_outcome_unknown")


def test_a_switch_whose_answer_was_lost_is_read_back(start: StartServer, api: ConfigAPIEmulator) -> None:
    api.fault(TENANT, Fault(dropped="headers", times=1, where="write"))
    answer = put(start(refresh="lazy"), {"enabled": True})
    assert (answer.status_code, answer.get_json()["enabled"]) == (200, True)


def test_switches_and_refreshes_are_limited_by_name(start: StartServer) -> None:
    server = start(writes_per_minute=2)
    acts: list[Callable[[], TestResponse]] = [lambda: put(server, {"enabled": True}), lambda: refresh(server)]
    for act in acts:
        answers = [act() for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert 1 <= int(answers[-1].headers["Retry-After"]) <= 60


# -- history -----------------------------------------------------------------------------------------------------------


def test_history_comes_newest_first_and_in_pages(start: StartServer) -> None:
    server = start(refresh="lazy")  # so that nothing is added between two pages
    for number in range(7):
        server.deliver(delivery_id=f"msg_{number}")
    whole = history(server, limit=500)["events"]
    ids = [event["id"] for event in whole]
    assert ids == sorted(ids, reverse=True)
    assert len({event["delivery_id"] for event in whole if event["cause"] == "delivery"}) == 7
    paged: list[dict[str, Any]] = []
    page = history(server, limit=3)
    while True:
        assert len(page["events"]) <= 3
        paged += page["events"]
        if page["next"] is None:
            break
        page = history(server, limit=3, before=page["next"])
    assert paged == whole


def test_a_page_that_holds_the_rest_exactly_is_the_last(server: Server) -> None:
    server.deliver()
    whole = history(server)["events"]
    assert history(server, limit=len(whole))["next"] is None


def test_history_can_be_that_of_one_tenant(two: Server) -> None:
    two.deliver({"tenant": "globex"})
    two.deliver({"tenant": TENANT})
    assert {event["tenant"] for event in history(two, tenant="globex")["events"]} == {"globex"}
    assert two.get("/api/v1/history?tenant=nobody").status_code == 404


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=501",
        "limit=-1",
        "limit=x",
        "limit=",
        "limit=1e2",
        "before=0",
        "before=\u0661",
        f"before={'9' * 19}",
    ],
)
def test_a_malformed_page_is_refused(server: Server, query: str) -> None:
    answer = server.get(f"/api/v1/history?{query}")
    assert (answer.status_code, answer.mimetype) == (400, PROBLEM_TYPE)


# -- events ------------------------------------------------------------------------------------------------------------


def next_state(stream: Any) -> dict[str, Any]:  # noqa: ANN401 - the chunks of a test client's answer
    for chunk in stream:
        event = chunk.decode()
        if event.startswith(("id:", "event:")):
            assert "event: state\n" in event
            found: dict[str, Any] = json.loads(event.split("data: ", 1)[1])
            return found
    raise AssertionError("the stream ended")


def test_the_event_stream_tells_what_is_so_and_then_each_change(server: Server) -> None:
    refresh(server)
    answer = server.client.get("/api/v1/events", headers=with_key("viewer"), buffered=False)
    assert answer.mimetype == "text/event-stream"
    stream = answer.iter_encoded()
    first = next_state(stream)
    assert (first["change"], first["state"]["enabled"], first["state"]["generation"]) == (None, False, 0)
    server.api.set_enabled(TENANT, True)
    server.deliver()
    while not (told := next_state(stream))["state"]["enabled"]:
        assert told["state"]["generation"] in {0, 1}
    assert told["state"]["generation"] == 1
    assert len(server.oms.broker) == 1
    answer.close()
    assert len(server.oms.broker) == 0


def test_as_many_streams_as_there_may_be_and_no_more(start: StartServer) -> None:
    server = start(max_streams=1)
    held = server.client.get("/api/v1/events", headers=with_key("viewer"), buffered=False)
    refused = server.client.get("/api/v1/events", headers=with_key("viewer"))
    assert (held.status_code, refused.status_code, refused.mimetype) == (200, 503, PROBLEM_TYPE)
    assert refused.headers["Retry-After"] == "10"
    held.close()
    again = server.client.get("/api/v1/events", headers=with_key("viewer"), buffered=False)
    assert again.status_code == 200
    again.close()
