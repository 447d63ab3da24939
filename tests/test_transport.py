"""Calls against servers that mean harm: every one ends in time, within its limits, and leaves nothing behind."""

from __future__ import annotations

import gzip
import os
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import requests
from pydantic import SecretStr
from requests.adapters import BaseAdapter, HTTPAdapter

from external_oms.auth import ClientCredentials
from external_oms.config import Document
from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.errors import (
    MalformedAnswer,
    RateLimited,
    Unavailable,
    WriteOutcomeUnknown,
)
from tests.support.clock import SkipClock
from tests.support.hostile import Hostile, Line
from tests.support.ports import free_port
from tests.support.reaching import (
    DEADLINE,
    DOCUMENT,
    SLACK,
    TOKEN,
    answer,
    client_at,
    descriptors,
    nothing_left_behind,
    own_or_users,
    recording,
    script_of,
    silence,
)
from tests.support.tls import certificate
from tests.support.waiting import PATIENCE_SECONDS, wait_until


@pytest.fixture
def api() -> Iterator[ConfigAPIEmulator]:
    with ConfigAPIEmulator(("acme", "globex")) as emulator:
        yield emulator


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture(params=["own", "user's"])
def session(request: pytest.FixtureRequest) -> Iterator[requests.Session | None]:
    """None, for connections of the client's own; and a session of the user's."""
    with own_or_users(request.param) as session:
        yield session


# --- one deadline for all of it --------------------------------------------------------------------------------


def _drip_head(line: Line) -> None:
    line.request()
    line.drip(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 10_000)


def _drip_endless_continues(line: Line) -> None:
    line.request()
    while not line.over.wait(0.01):
        line.send(b"HTTP/1.1 100 Continue\r\n\r\n")


def _drip_body(line: Line) -> None:
    line.request()
    line.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n")
    line.drip(b" " * 10_000)


def _drip_chunks(line: Line) -> None:
    line.request()
    line.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    line.drip(b"1\r\n \r\n" * 2_000)


def _whole_body_without_end(line: Line) -> None:
    line.request()
    line.send(b"HTTP/1.0 200 OK\r\n\r\n" + DOCUMENT)
    line.hold()


def _whole_chunk_without_end(line: Line) -> None:
    line.request()
    line.send(b"HTTP/1.0 200 OK\r\n\r\n" + DOCUMENT.ljust(16_384))  # as much as is read at once
    line.hold()


@pytest.mark.serial
@pytest.mark.parametrize(
    "script",
    [
        _drip_head,
        _drip_endless_continues,
        _drip_body,
        _drip_chunks,
        _whole_body_without_end,
        _whole_chunk_without_end,
        silence,
    ],
)
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_read_ends_at_its_deadline_however_the_server_drips(
    script: Callable[[Line], None], tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = None
    if tls:
        context, bundle = certificate(tmp_path)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
    with Hostile(script, context=context) as server:
        client = client_at(server.url, timeout_seconds=DEADLINE)
        before, began = set(threading.enumerate()), time.monotonic()
        with pytest.raises(Unavailable, match=r"within 0\.4 s"):
            client.read()
        assert DEADLINE * 0.9 <= time.monotonic() - began < DEADLINE + SLACK
        assert [t for t in set(threading.enumerate()) - before if isinstance(t, threading.Timer)] == []


@pytest.mark.serial
def test_a_server_that_never_shakes_hands_is_left_at_the_deadline(tmp_path: Path) -> None:
    with Hostile(silence) as server:
        client = client_at(server.url.replace("http://", "https://"), timeout_seconds=DEADLINE)
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"within 0\.4 s"):
            client.read()
        assert time.monotonic() - began < DEADLINE + SLACK


@contextmanager
def _full(host: str, port: int = 0) -> Iterator[int]:
    """A port whose queue is full: it answers no connection, as a host does that is gone."""
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server((host, port), backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        yield int(full.getsockname()[1])


@pytest.mark.serial
def test_a_host_that_takes_no_connection_is_left_at_the_deadline() -> None:
    with _full("127.0.0.1") as port:
        began = time.monotonic()
        with pytest.raises(Unavailable):
            client_at(f"http://127.0.0.1:{port}", timeout_seconds=DEADLINE).read()
        assert DEADLINE * 0.9 <= time.monotonic() - began < DEADLINE + SLACK


def test_a_host_is_reached_by_the_second_of_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack, Hostile(script_of(answer(DOCUMENT))) as server:
        port = int(server.url.rsplit(":", 1)[1])
        stack.enter_context(_full("127.0.0.3", port))
        addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.3", "127.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_more: addresses)
        assert client_at(server.url, timeout_seconds=3.0).read().document == Document(True)


def test_the_token_and_the_read_share_one_deadline() -> None:
    clock = SkipClock()

    def script(line: Line) -> None:
        if line.request().startswith(b"POST"):
            clock.skip(59.5)
            line.send(answer(b'{"access_token": "t", "expires_in": 300}', b"Connection: close"))
        else:
            line.hold()  # half a minute, and then the connection ends

    with Hostile(script) as server:
        token = ClientCredentials(
            tenant="acme",
            endpoint=server.url,
            client_id="acme-client",
            client_secret=SecretStr(TOKEN),
            scope="",
            session=None,
            clock=clock,
            timeout_seconds=60,
            retry_after_max_seconds=300,
        )
        with pytest.raises(Unavailable, match="within 60 s"):
            client_at(server.url, token=token, timeout_seconds=60, clock=clock).read()


@pytest.mark.parametrize("script", [_drip_head, _drip_body, silence])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_an_abort_ends_a_read_under_way_and_no_later_one(
    script: Callable[[Line], None], tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()

    def once(line: Line) -> None:
        if asked.is_set():
            line.request()
            line.send(answer(DOCUMENT))
            return
        asked.set()
        script(line)

    context = None
    if tls:
        context, bundle = certificate(tmp_path)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
    with Hostile(once, context=context) as server, ThreadPoolExecutor(1) as pool:
        client = client_at(server.url, timeout_seconds=30)
        reading = pool.submit(client.read)
        assert asked.wait(PATIENCE_SECONDS)
        client.abort()
        with pytest.raises(Unavailable, match="ended from outside"):
            reading.result(PATIENCE_SECONDS)
        assert client.read().document == Document(True)


def test_an_abort_ends_a_connection_in_the_making() -> None:
    with _full("127.0.0.1") as port, ThreadPoolExecutor(1) as pool:
        client = client_at(f"http://127.0.0.1:{port}", timeout_seconds=30)
        before = descriptors()
        reading = pool.submit(client.read)
        wait_until(lambda: descriptors() >= before + 2)  # the socket and its duplicate
        client.abort()
        with pytest.raises(Unavailable, match="ended from outside"):
            reading.result(PATIENCE_SECONDS)


def test_an_abort_ends_a_token_request_too(api: ConfigAPIEmulator) -> None:
    api.fault("acme", Fault(delay_seconds=30, where="token"))
    client = client_at(api, timeout_seconds=30)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(client.read)
        wait_until(lambda: api.seen("acme"))
        client.abort()
        with pytest.raises(Unavailable, match="ended from outside"):
            reading.result(PATIENCE_SECONDS)
        assert api.reads("acme") == 0


# --- bounded answers -------------------------------------------------------------------------------------------


def _endless(line: Line) -> None:
    line.request()
    line.send(b"HTTP/1.1 200 OK\r\n\r\n")
    while not line.over.is_set():
        line.send(b" " * 65_536)


def test_an_endless_answer_is_malformed_after_64_kib() -> None:
    with Hostile(_endless) as server, pytest.raises(MalformedAnswer, match="longer than 65536 bytes"):
        client_at(server.url).read()


@pytest.mark.parametrize("length", [65_536, 65_537])
def test_the_limit_is_64_kib_to_the_byte(length: int) -> None:
    with Hostile(script_of(answer(DOCUMENT.ljust(length)))) as server:
        if length == 65_536:
            assert client_at(server.url).read().document == Document(True)
        else:
            with pytest.raises(MalformedAnswer, match="longer than"):
                client_at(server.url).read()


@pytest.mark.parametrize("layers", [1, 2])
def test_a_compression_bomb_never_unfolds(layers: int, session: requests.Session | None) -> None:
    bomb = b" " * (64 << 20)
    for _ in range(layers):
        bomb = gzip.compress(bomb, 9)
    encoding = b"Content-Encoding: " + b", ".join([b"gzip"] * layers)
    with Hostile(script_of(answer(bomb, encoding))) as server:
        client = client_at(server.url, session=session, timeout_seconds=100)  # byte by byte, on a busy machine, traced
        tracemalloc.start()
        try:
            with pytest.raises(MalformedAnswer, match="longer than"):
                client.read()
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()


def test_a_compressed_document_is_read_though_none_was_asked_for() -> None:
    with Hostile(script_of(answer(gzip.compress(DOCUMENT), b"Content-Encoding: gzip"))) as server:
        assert client_at(server.url).read().document == Document(True)


@pytest.mark.parametrize(
    "content",
    [
        answer(DOCUMENT, length=100),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n11\r\n" + DOCUMENT,
        answer(b"not gzip", b"Content-Encoding: gzip"),
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    ],
)
def test_an_answer_that_is_not_whole_or_not_http_is_unavailable(content: bytes) -> None:
    with Hostile(script_of(content)) as server, pytest.raises(Unavailable, match="broke before the answer was whole"):
        client_at(server.url).read()


@pytest.mark.parametrize("where", ["headers", "body"])
def test_a_dropped_connection_is_unavailable(api: ConfigAPIEmulator, where: Literal["headers", "body"]) -> None:
    api.fault("acme", Fault(dropped=where))
    with pytest.raises(Unavailable, match="broke"):
        client_at(api).read()


def test_a_status_counts_though_its_body_never_comes() -> None:
    head = b"HTTP/1.1 429 Slow Down\r\nRetry-After: 9\r\nContent-Length: 50\r\n\r\n"
    with Hostile(script_of(head)) as server, pytest.raises(RateLimited) as caught:
        client_at(server.url).read()
    assert caught.value.retry_after_seconds == 9


# --- the way there ---------------------------------------------------------------------------------------------


def test_a_closed_port_and_an_unknown_name_are_told_apart() -> None:
    port = free_port()
    with pytest.raises(Unavailable, match="no connection; is the address right"):
        client_at(f"http://127.0.0.1:{port}").read()
    with pytest.raises(Unavailable, match="its host name cannot be resolved"):
        client_at("https://{tenant}.invalid").read()


def test_a_certificate_that_is_not_trusted_is_said_to_be(tmp_path: Path) -> None:
    context, _ = certificate(tmp_path)
    with Hostile(silence, context=context) as server, pytest.raises(Unavailable, match="TLS failed"):
        client_at(server.url).read()


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    with Hostile(recording(seen)) as server:
        monkeypatch.setenv("HTTP_PROXY", server.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert client_at("http://api.localhost").read().document == Document(True)
    assert seen[0].startswith(b"GET http://api.localhost/v0/config/external_oms HTTP/1.1")


def test_a_proxy_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
    with pytest.raises(Unavailable, match="HTTPS_PROXY"):
        client_at("https://{tenant}.example.com").read()


def test_no_cookie_of_a_server_comes_back(session: requests.Session | None) -> None:
    seen: list[bytes] = []
    if session is not None:
        session.cookies.set("mine", "2")
    with Hostile(recording(seen, b"Set-Cookie: server=1; Path=/")) as server:
        client = client_at(server.url, session=session)
        client.read()
        client.read()
    assert not any(b"server=1" in request for request in seen)
    assert all((b"mine=2" in request) is (session is not None) for request in seen)
    assert session is None or session.cookies.get_dict() == {"mine": "2"}


# --- a session of the user's -----------------------------------------------------------------------------------


class _Counting(HTTPAdapter):
    """An adapter of a user's, with an attribute that no copy by names would carry."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def send(self, *args: Any, **more: Any) -> requests.Response:  # noqa: ANN401 - passed on
        self.sent += 1
        return super().send(*args, **more)


class _Unconnected(BaseAdapter):
    """An adapter that has no connections which a child would have to leave to its parent."""

    def close(self) -> None:
        """Nothing."""


def test_a_users_session_keeps_its_adapters_headers_and_hooks(api: ConfigAPIEmulator) -> None:
    answered: list[int] = []
    with requests.Session() as session:
        adapter = _Counting()
        session.mount("http://", adapter)
        session.mount("file://", _Unconnected())
        session.headers["X-Gateway"] = "yes"
        session.hooks["response"].append(lambda response, **_: answered.append(response.status_code))
        assert client_at(api, session=session).read().document is not None
        assert adapter.sent == 2  # the token and the read
        assert answered == [200, 200]
        assert session.get_adapter("http://x") is adapter
        client = client_at(api, session=session)
        client.after_fork()
        assert client.read().document is not None
        assert adapter.sent == 4


@pytest.mark.serial
def test_the_body_of_a_users_session_ends_at_the_deadline() -> None:
    with Hostile(_drip_body) as server, requests.Session() as session:
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"within 0\.4 s"):
            client_at(server.url, session=session, timeout_seconds=DEADLINE).read()
        assert time.monotonic() - began < DEADLINE + SLACK


class _Raising(requests.Session):
    def request(self, *_args: Any, **_more: Any) -> requests.Response:  # noqa: ANN401 - passed on
        raise LookupError(TOKEN)


def test_whatever_a_users_session_raises_becomes_ours() -> None:
    client = client_at("https://{tenant}.example.com", session=_Raising())
    with pytest.raises(Unavailable) as caught:
        client.read()
    assert TOKEN not in str(caught.value)
    with pytest.raises(WriteOutcomeUnknown):
        client.write(True)


# --- a fork ----------------------------------------------------------------------------------------------------


def test_a_child_reads_over_connections_of_its_own(session: requests.Session | None) -> None:
    def keep_alive(line: Line) -> None:
        while line.request():
            line.send(answer(DOCUMENT))

    with Hostile(keep_alive) as server:
        client = client_at(server.url, session=session)
        client.read()
        before = server.connections
        child = os.fork()
        if child == 0:
            client.after_fork()
            os._exit(0 if client.read().document == Document(True) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert server.connections == before + 1
        client.read()  # what the child did has not shut the parent's connection
        assert server.connections == before + (2 if session is None else 1)


def test_a_child_forked_in_the_middle_of_a_read_leaves_the_parents_read_alone(api: ConfigAPIEmulator) -> None:
    client = client_at(api, timeout_seconds=30)
    client.read()
    api.fault("acme", Fault(delay_seconds=60))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(client.read)
        wait_until(lambda: api.reads("acme") == 2)
        child = os.fork()
        if child == 0:
            client.after_fork()
            client.abort()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not reading.done()
        api.stop()  # lets go what is held back
        assert reading.result(PATIENCE_SECONDS).document is not None
