"""The stream that says when to ask again, and the token that opens it."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from werkzeug.test import TestResponse

from external_oms.emulator import Fault
from tests.support.waiting import wait_until
from tests.support.web import TENANT, Server, StartServer, with_key

EVENTS = "/ofrep/v1/events"


def bulk(server: Server, role: str = "viewer", tenant: str = TENANT) -> TestResponse:
    asked = {"context": {"tenant": tenant}}
    answer = server.client.post("/ofrep/v1/evaluate/flags", json=asked, headers=with_key(role))
    assert answer.status_code == 200
    return answer


def address(server: Server, role: str = "viewer") -> str:
    (stream,) = bulk(server, role).get_json()["eventStreams"]
    found: str = stream["endpoint"]["requestUri"]
    return found


def query_of(uri: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(uri).query).items()}


Open = Callable[..., "Listener"]


class Listener:
    """One open stream."""

    def __init__(self, answer: TestResponse) -> None:
        self.answer = answer
        self._chunks: Iterator[bytes] = answer.iter_encoded()

    def chunk(self) -> dict[str, str]:
        """The next thing on the wire, by its fields."""
        return dict(line.split(": ", 1) for line in next(self._chunks).decode().strip().split("\n"))

    def event(self) -> dict[str, Any]:
        """The next event, its id beside its data."""
        while "data" not in (said := self.chunk()):
            pass
        assert said["event"] == "message"
        return {**json.loads(said["data"]), "id": said["id"]}


@pytest.fixture
def listen() -> Iterator[Open]:
    held: list[TestResponse] = []

    def opened(server: Server, uri: str = EVENTS, **headers: str) -> Listener:
        answer = server.client.get(uri, headers=headers, buffered=False)
        held.append(answer)
        assert answer.status_code == 200, answer.get_data()
        assert answer.content_type == "text/event-stream; charset=utf-8"
        return Listener(answer)

    yield opened
    for answer in held:
        answer.close()


def flip(server: Server, enabled: bool) -> None:
    server.api.set_enabled(TENANT, enabled)
    assert server.deliver().status_code == 200


# -- what it says ------------------------------------------------------------------------------------------------------


def test_a_flip_is_told_by_the_tag_of_the_answer_to_come(server: Server, listen: Open) -> None:
    stream = listen(server, address(server))
    assert stream.chunk() == {"retry": "2000"}
    for enabled in (True, False):
        flip(server, enabled)
        event = stream.event()
        assert event["type"] == "refetchEvaluation"
        answer = bulk(server)
        assert (event["etag"], event["id"]) == (answer.headers["ETag"], answer.headers["ETag"].strip('"').split(".")[0])
        fetched_at = server.oms.cache.state(TENANT).fetched_at
        assert fetched_at is not None
        assert event["lastModified"] == int(fetched_at.timestamp())
        assert answer.get_json()["flags"][0]["value"] is enabled


def test_a_delivery_that_changes_nothing_is_not_told(server: Server, listen: Open) -> None:
    stream = listen(server, address(server))
    for _ in range(3):
        assert server.deliver().status_code == 200
        server.oms.provider.refresh()
    flip(server, True)
    assert stream.event()["etag"] == bulk(server).headers["ETag"]


def test_between_an_invalidation_and_its_read_nothing_is_told(start: StartServer, listen: Open) -> None:
    server = start(refresh="lazy")  # so that the read comes when the test says so
    stream = listen(server, address(server))
    heard: queue.Queue[dict[str, Any]] = queue.Queue()

    def listen_twice() -> None:
        for _ in range(2):
            heard.put(stream.event())

    listening = threading.Thread(target=listen_twice)
    listening.start()

    def taken() -> None:
        """The stream has looked at everything that happened so far."""
        (held,) = server.oms.broker._subscriptions
        waiters = held._news._waiters  # type: ignore[attr-defined]  # who waits for the condition
        wait_until(lambda: not held._waiting and waiters)

    taken()
    before = bulk(server).headers["ETag"]
    server.oms.provider.invalidate()
    taken()
    server.oms.provider.refresh()  # the same value again
    taken()
    flip(server, True)
    assert heard.get(timeout=10)["etag"] == bulk(server).headers["ETag"] != before
    flip(server, False)
    assert heard.get(timeout=10)["etag"] == before
    listening.join(10)


def test_that_the_value_is_no_longer_authoritative_is_told_once_and_its_end_too(server: Server, listen: Open) -> None:
    stream = listen(server, address(server))
    before = bulk(server).headers["ETag"]
    server.api.fault(TENANT, Fault(status=500, times=None))
    assert server.deliver().status_code == 202
    stale = stream.event()
    assert bulk(server).headers["ETag"] == stale["etag"] != before
    server.api.clear(TENANT)
    server.oms.provider.refresh()
    assert stream.event()["etag"] == before


def test_who_connects_after_a_change_is_told_at_once(server: Server, listen: Open) -> None:
    uri = address(server)
    flip(server, True)
    assert listen(server, uri).event()["etag"] == bulk(server).headers["ETag"]


def test_the_last_event_id_counts_more_than_what_stands_in_the_address(server: Server, listen: Open) -> None:
    uri = address(server)
    flip(server, True)
    now = listen(server, uri).event()["id"]
    again = listen(server, uri, **{"Last-Event-ID": now})
    flip(server, False)
    assert again.event()["id"] == query_of(uri)["since"]
    assert listen(server, uri, **{"Last-Event-ID": "of another process"}).event()["id"] == query_of(uri)["since"]


def test_who_says_nothing_of_what_it_has_gets_an_id_to_come_back_with(server: Server, listen: Open) -> None:
    uri = address(server)
    stream = listen(server, EVENTS, **with_key("viewer"))
    assert stream.chunk() == {"retry": "2000"}
    assert stream.chunk() == {"id": query_of(uri)["since"]}
    flip(server, True)
    assert stream.event()["id"] != query_of(uri)["since"]


def test_another_tenants_change_is_not_told(two: Server, listen: Open) -> None:
    stream = listen(two, address(two))
    two.api.set_enabled("globex", True)
    assert two.deliver({"tenant": "globex"}).status_code == 200
    flip(two, True)
    assert stream.event()["etag"] == bulk(two).headers["ETag"]


@pytest.mark.parametrize("query", ["", "?tenant=nobody"])
def test_a_stream_of_no_tenant_is_refused_in_the_protocols_shape(two: Server, query: str) -> None:
    answer = two.client.get(f"{EVENTS}{query}", headers=with_key("viewer"))
    assert (answer.status_code, answer.get_json()["errorCode"]) == (400, "INVALID_CONTEXT")
    assert len(two.oms.broker) == 0


def test_one_stream_too_many_is_refused_in_the_protocols_shape(start: StartServer, listen: Open) -> None:
    server = start(max_streams=1)
    held = listen(server, address(server))
    refused = server.client.get(address(server))
    assert (refused.status_code, refused.get_json()["errorCode"]) == (503, "GENERAL")
    assert "max_streams" in refused.get_json()["errorDetails"]
    assert refused.headers["Retry-After"] == "10"
    held.answer.close()
    listen(server, address(server))


@pytest.mark.parametrize("path", [EVENTS, "/api/v1/events"])
def test_asking_for_the_head_alone_opens_no_stream(server: Server, path: str) -> None:
    answer = server.client.head(path, headers=with_key("viewer"))
    assert (answer.status_code, answer.mimetype) == (200, "text/event-stream")
    assert len(server.oms.broker) == 0


# -- what opens it -----------------------------------------------------------------------------------------------------


def test_the_token_opens_streams_and_nothing_else(server: Server, listen: Open) -> None:
    token = query_of(address(server, "admin"))["token"]
    listen(server, f"{EVENTS}?token={token}")
    listen(server, f"/api/v1/events?token={token}")
    for method, path in (
        ("GET", "/api/v1/tenants"),
        ("POST", f"/api/v1/tenants/{TENANT}/refresh"),
        ("PUT", f"/api/v1/tenants/{TENANT}"),
        ("POST", "/ofrep/v1/evaluate/flags"),
        ("POST", "/ofrep/v1/evaluate/flags/events"),
    ):
        refused = server.client.open(f"{path}?token={token}", method=method, json={"enabled": True})
        assert refused.status_code == 401, path


def test_without_a_token_or_with_one_that_is_none_no_stream_opens(server: Server) -> None:
    token = query_of(address(server))["token"]
    for wrong in ("", "x", token[:-1], f"{token}x", token.swapcase(), "W10.x", "\x00", "é"):
        answer = server.client.get(f"{EVENTS}?{urlencode({'token': wrong})}")
        assert (answer.status_code, answer.get_json()["errorCode"]) == (401, "GENERAL")
    assert server.client.get(EVENTS).status_code == 401
    shown = server.client.get(f"{EVENTS}?token={token}", headers=with_key("stranger"))
    assert shown.status_code == 401, "a wrong key is not made good by a token"


def test_a_token_is_in_no_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    uri = address(server)
    with caplog.at_level(logging.DEBUG):
        server.client.get(uri, buffered=False).close()
        server.client.get(f"{uri}x")
        server.client.post(uri)
    assert query_of(uri)["token"] not in caplog.text
