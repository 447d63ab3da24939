from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from external_oms.cache import Change, ChangeKind
from external_oms.problems import Problem
from external_oms.web.sse import Broker, Message, stream_response
from tests.support.web import TENANT, Server, StartServer


@pytest.fixture
def server(start: StartServer) -> Server:
    """One that reads only when asked, so that nothing happens but what a test does."""
    return start(refresh="lazy")


@pytest.fixture
def broker(server: Server) -> Iterator[Broker]:
    made = Broker(server.oms.cache, max_streams=2)
    yield made
    made.close()


def change(server: Server, kind: ChangeKind, tenant: str = TENANT) -> Change:
    return Change(tenant, kind, replace(server.oms.cache.peek(TENANT), tenant=tenant))


@pytest.mark.parametrize(
    ("message", "wire"),
    [
        (Message("state", "{}"), b"event: state\ndata: {}\n\n"),
        (Message("message", "two\nlines", id="7"), b"id: 7\nevent: message\ndata: two\ndata: lines\n\n"),
        (Message("", "", id="7"), b"id: 7\n\n"),
        (Message("e", "\u00e9"), b"event: e\ndata: \xc3\xa9\n\n"),
    ],
)
def test_a_message_on_the_wire(message: Message, wire: bytes) -> None:
    assert message.encode() == wire


def test_a_stream_hears_what_happens_after_it_was_opened(server: Server, broker: Broker) -> None:
    stream = broker.subscribe()
    server.oms.cache.changes.send(change(server, ChangeKind.STATE))
    assert stream.get(10) == {TENANT: ChangeKind.STATE}
    assert stream.get(0) == {}


def test_a_stream_that_lags_is_told_once_per_tenant_and_never_less_than_happened(
    server: Server, broker: Broker
) -> None:
    stream = broker.subscribe()
    for _ in range(1000):
        for tenant in ("a", "b"):
            server.oms.cache.changes.send(change(server, ChangeKind.VALUE, tenant))
            server.oms.cache.changes.send(change(server, ChangeKind.STATE, tenant))
    assert stream.get(0) == {"a": ChangeKind.VALUE, "b": ChangeKind.VALUE}


def test_a_waiting_stream_wakes_when_something_happens_and_when_it_ends(server: Server, broker: Broker) -> None:
    stream = broker.subscribe()
    heard: queue.Queue[dict[str, ChangeKind] | None] = queue.Queue()

    def listen() -> None:
        while (news := stream.get(30)) is not None:
            heard.put(news)
        heard.put(None)

    waiting = threading.Thread(target=listen)
    waiting.start()
    server.oms.cache.changes.send(change(server, ChangeKind.VALUE))
    assert heard.get(timeout=10) == {TENANT: ChangeKind.VALUE}
    broker.close()
    assert heard.get(timeout=10) is None
    waiting.join()


def test_there_are_no_more_streams_than_allowed_and_an_ended_one_makes_room(broker: Broker) -> None:
    streams = [broker.subscribe(), broker.subscribe()]
    with pytest.raises(Problem) as refused:
        broker.subscribe()
    assert (refused.value.status, refused.value.kind) == (503, "too_many_streams")
    streams[0].close()
    streams[0].close()
    assert len(broker) == 1
    broker.subscribe()


def test_a_closed_broker_opens_no_more_streams(broker: Broker) -> None:
    broker.close()
    with pytest.raises(Problem) as refused:
        broker.subscribe()
    assert (refused.value.status, refused.value.headers["Retry-After"]) == (503, "1")


def test_a_closed_broker_hears_nothing_more(server: Server, broker: Broker) -> None:
    stream = broker.subscribe()
    broker.close()
    server.oms.cache.changes.send(change(server, ChangeKind.VALUE))
    assert stream.get(0) is None
    assert stream._waiting == {}


def test_silence_is_broken_by_comments(server: Server, broker: Broker) -> None:
    with server.app.test_request_context(environ_overrides={"wsgi.multithread": True}):
        answer = stream_response(broker, lambda *_: [], first=lambda: [Message("a", "b")], heartbeat_seconds=0.001)
        chunks = answer.iter_encoded()
        assert [next(chunks) for _ in range(4)] == [b"retry: 2000\n\n", b"event: a\ndata: b\n\n", b":\n\n", b":\n\n"]
        assert answer.headers["X-Accel-Buffering"] == "no"
        answer.close()
    assert len(broker) == 0


def test_an_answer_that_nobody_ever_read_gives_its_place_back(server: Server, broker: Broker) -> None:
    with server.app.test_request_context(environ_overrides={"wsgi.multithread": True}):
        stream_response(broker, lambda *_: [], first=list).close()
    assert len(broker) == 0


def test_nothing_falls_between_what_is_so_and_what_changes(server: Server, broker: Broker) -> None:
    def first() -> list[Message]:
        server.oms.cache.changes.send(change(server, ChangeKind.VALUE))
        return []

    with server.app.test_request_context(environ_overrides={"wsgi.multithread": True}):
        answer = stream_response(
            broker, lambda tenant, kind: [Message(kind, tenant)], first=first, heartbeat_seconds=10
        )
        chunks = answer.iter_encoded()
        assert next(chunks).startswith(b"retry")
        assert next(chunks) == f"event: value\ndata: {TENANT}\n\n".encode()
        answer.close()


@pytest.mark.filterwarnings(
    "ignore:.*multi-threaded.*:DeprecationWarning"
)  # forking under threads is this test's subject
def test_a_forked_child_has_no_streams_of_its_parent_and_can_open_its_own(broker: Broker) -> None:
    broker.subscribe()
    with broker._lock:  # another thread of the parent holds it at the moment of the fork
        child = os.fork()
        if child == 0:
            ok = len(broker) == 0 and broker.subscribe() is not None and len(broker) == 1
            os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(broker) == 1


def test_a_server_that_answers_one_request_at_a_time_opens_no_stream(server: Server, broker: Broker) -> None:
    with server.app.test_request_context(), pytest.raises(Problem) as refused:
        stream_response(broker, lambda *_: [], first=list)
    assert (refused.value.status, refused.value.kind, refused.value.headers["Retry-After"]) == (503, "no_threads", "60")
    assert len(broker) == 0


def test_one_caller_cannot_take_every_stream(server: Server) -> None:
    broker = Broker(server.oms.cache, max_streams=20)
    for _ in range(18):
        broker.subscribe("greedy")
    with pytest.raises(Problem) as refused:
        broker.subscribe("greedy")
    assert refused.value.kind == "too_many_streams"
    broker.subscribe("modest")
    broker.subscribe("other")
    with pytest.raises(Problem):
        broker.subscribe("third")
    broker.close()


def test_a_stream_ends_when_the_login_that_opened_it_does(server: Server, broker: Broker) -> None:
    valid = True
    with server.app.test_request_context(environ_overrides={"wsgi.multithread": True}):
        answer = stream_response(broker, lambda *_: [], first=list, is_valid=lambda: valid, heartbeat_seconds=0.01)
        chunks = answer.iter_encoded()
        assert next(chunks).startswith(b"retry")
        assert next(chunks) == b":\n\n"
        valid = False
        assert list(chunks) == []
        answer.close()
    assert len(broker) == 0
