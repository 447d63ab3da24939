"""Requests to hostile servers: each ends at its deadline, within its limits, and leaves no thread or descriptor."""

from __future__ import annotations

import gzip
import math
import os
import socket
import ssl
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from email.utils import format_datetime
from importlib.metadata import requires
from pathlib import Path
from typing import Any, Literal

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from pydantic import SecretStr
from requests.adapters import BaseAdapter, HTTPAdapter

from external_oms.auth import ClientCredentials
from external_oms.clock import SYSTEM_CLOCK
from external_oms.config import Document
from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.errors import (
    MalformedAnswer,
    RateLimited,
    Unavailable,
    WriteOutcomeUnknown,
)
from external_oms.transport import Transport, parse_retry_after
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
def test_a_read_ends_at_its_deadline_if_the_server_never_shakes_hands(tmp_path: Path) -> None:
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
def test_a_read_ends_at_its_deadline_if_the_host_accepts_no_connection() -> None:
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
        with pytest.raises(Unavailable, match="aborted"):
            reading.result(PATIENCE_SECONDS)
        assert client.read().document == Document(True)


def test_an_abort_ends_an_attempt_to_connect() -> None:
    with _full("127.0.0.1") as port, ThreadPoolExecutor(1) as pool:
        client = client_at(f"http://127.0.0.1:{port}", timeout_seconds=30)
        before = descriptors()
        reading = pool.submit(client.read)
        wait_until(lambda: descriptors() >= before + 2)  # the socket and its duplicate
        client.abort()
        with pytest.raises(Unavailable, match="aborted"):
            reading.result(PATIENCE_SECONDS)


def test_an_abort_ends_a_token_request_too(api: ConfigAPIEmulator) -> None:
    api.fault("acme", Fault(delay_seconds=30, where="token"))
    client = client_at(api, timeout_seconds=30)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(client.read)
        wait_until(lambda: api.seen("acme"))
        client.abort()
        with pytest.raises(Unavailable, match="aborted"):
            reading.result(PATIENCE_SECONDS)
        assert api.reads("acme") == 0


def test_requests_that_share_a_session_keep_their_own_deadlines() -> None:
    held = threading.Event()

    def script(line: Line) -> None:
        path = line.request().split()[1]
        if path == b"/held":
            held.set()
            line.hold()
        line.send(answer(DOCUMENT))

    with Hostile(script) as server, ThreadPoolExecutor(1) as pool:
        transport = Transport(None, subject="it", url_setting="base_url", clock=SYSTEM_CLOCK)

        def hang() -> None:
            with transport.deadline(SYSTEM_CLOCK.monotonic() + DEADLINE) as deadline:
                transport.send(deadline, "GET", f"{server.url}/held", headers={})

        hanging = pool.submit(hang)
        assert held.wait(5)
        with transport.deadline(SYSTEM_CLOCK.monotonic() + 30) as deadline:
            assert transport.send(deadline, "GET", server.url, headers={}).body == DOCUMENT
            with pytest.raises(Unavailable, match=r"within 0\.4 s"):
                hanging.result(5)
            assert transport.send(deadline, "GET", server.url, headers={}).body == DOCUMENT


# --- what a read costs -------------------------------------------------------------------------------------------


def test_a_client_makes_its_session_once_and_a_process_reads_a_ca_bundle_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, bundle = certificate(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
    made: Counter[str] = Counter()

    class Session(requests.Session):
        def __init__(self) -> None:
            made["sessions"] += 1
            super().__init__()

    load = ssl.SSLContext.load_verify_locations

    def counted(*args: Any, **more: Any) -> None:  # noqa: ANN401 - passed on
        made["bundles"] += 1
        load(*args, **more)

    monkeypatch.setattr(requests, "Session", Session)
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", counted)
    with Hostile(script_of(answer(DOCUMENT)), context=context) as server:
        clients = [client_at(server.url) for _ in range(2)]
        for client in clients * 2:
            assert client.read().document == Document(True)
    assert made == {"sessions": 2, "bundles": 1}


def test_a_ca_bundle_that_is_replaced_on_disk_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    (old, bundle), (new, renewed) = certificate(tmp_path / "old"), certificate(tmp_path / "new")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
    with (
        Hostile(script_of(answer(DOCUMENT)), context=old) as before,
        Hostile(script_of(answer(DOCUMENT)), context=new) as after,
    ):
        client_at(before.url).read()
        client = client_at(after.url)
        with pytest.raises(Unavailable, match="TLS"):
            client.read()
        bundle.write_bytes(renewed.read_bytes())
        os.utime(bundle, ns=(1, 1))  # a time of its own, however coarse the clock of the file system is
        assert client.read().document == Document(True)


def test_a_connection_is_closed_after_its_request_although_the_server_keeps_it_open() -> None:
    closed: list[bool] = []

    def keep_alive(line: Line) -> None:
        while line.request():
            line.send(answer(DOCUMENT))
        closed.append(True)

    with Hostile(keep_alive) as server:
        client = client_at(server.url)
        before = descriptors()
        client.read()
        client.read()
        assert wait_until(lambda: len(closed) == 2)
        assert server.connections == 2
        assert wait_until(lambda: descriptors() <= before)


# --- bounded responses -------------------------------------------------------------------------------------------


def _endless(line: Line) -> None:
    line.request()
    line.send(b"HTTP/1.1 200 OK\r\n\r\n")
    while not line.over.is_set():
        line.send(b" " * 65_536)


def test_an_endless_response_is_malformed_after_64_kib() -> None:
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
def test_a_response_that_is_incomplete_or_not_http_is_unavailable(content: bytes) -> None:
    with (
        Hostile(script_of(content)) as server,
        pytest.raises(Unavailable, match="broke before the response was complete"),
    ):
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


def test_the_error_names_the_host_and_the_setting_if_there_is_no_connection() -> None:
    port = free_port()
    with pytest.raises(Unavailable, match=r"no connection to 127\.0\.0\.1; check base_url"):
        client_at(f"http://127.0.0.1:{port}").read()
    with pytest.raises(Unavailable, match=r"the host name acme\.invalid cannot be resolved; check base_url"):
        client_at("https://{tenant}.invalid").read()


def test_the_error_says_that_a_certificate_is_not_trusted(tmp_path: Path) -> None:
    context, _ = certificate(tmp_path)
    with Hostile(silence, context=context) as server, pytest.raises(Unavailable, match=r"TLS with 127\.0\.0\.1 failed"):
        client_at(server.url).read()


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    with Hostile(recording(seen)) as server:
        monkeypatch.setenv("HTTP_PROXY", server.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert client_at("http://api.localhost").read().document == Document(True)
    assert seen[0].startswith(b"GET http://api.localhost/v0/config/external_oms HTTP/1.1")


def _proxy(line: Line) -> None:
    """Connect to the host of a CONNECT request, and pass on what either side sends."""
    host, port = line.request().split()[1].decode().split(":")
    with socket.create_connection((host, int(port))) as server:
        line.send(b"HTTP/1.1 200 Connected\r\n\r\n")
        back = threading.Thread(target=_pass_on, args=(server.recv, line.send))
        back.start()
        _pass_on(line.receive, server.sendall)
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        back.join(10)


def _pass_on(receive: Callable[[int], bytes], send: Callable[[bytes], None]) -> None:
    with suppress(OSError):
        while received := receive(65_536):
            send(received)


@pytest.mark.parametrize("drips", [False, True])
def test_a_read_through_a_proxy_is_encrypted_to_the_api_and_ends_at_its_deadline(
    drips: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, bundle = certificate(tmp_path)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
    monkeypatch.delenv("NO_PROXY", raising=False)
    script = _drip_body if drips else script_of(answer(DOCUMENT))
    with Hostile(_proxy) as proxy, Hostile(script, context=context) as server:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        client = client_at(server.url, timeout_seconds=DEADLINE if drips else 5.0)
        if drips:
            with pytest.raises(Unavailable, match=r"within 0\.4 s"):
                client.read()
        else:
            assert client.read().document == Document(True)
        assert (proxy.connections, server.connections) == (1, 1)


def test_a_proxy_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
    with pytest.raises(Unavailable, match="HTTPS_PROXY"):
        client_at("https://{tenant}.example.com").read()


def test_no_cookie_that_a_server_sets_is_sent_back(session: requests.Session | None) -> None:
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


# --- the application's session -----------------------------------------------------------------------------------


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


def test_the_applications_session_keeps_its_adapters_headers_and_hooks(api: ConfigAPIEmulator) -> None:
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
def test_a_body_in_the_applications_session_ends_at_the_deadline() -> None:
    with Hostile(_drip_body) as server, requests.Session() as session:
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"within 0\.4 s"):
            client_at(server.url, session=session, timeout_seconds=DEADLINE).read()
        assert time.monotonic() - began < DEADLINE + SLACK


class _Raising(requests.Session):
    def request(self, *_args: Any, **_more: Any) -> requests.Response:  # noqa: ANN401 - passed on
        raise LookupError(TOKEN)


def test_an_error_of_the_applications_session_becomes_ours() -> None:
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


# -- Retry-After ----------------------------------------------------------------------------------------------------

NOW = 1_780_000_000.0


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("0", 0.0),
        ("-5", 0.0),
        (" 7 ", 7.0),
        ("1.5", 1.5),
        ("1e400", 300.0),
        ("inf", 300.0),
        ("99999999", 300.0),
        (format_datetime(datetime.fromtimestamp(NOW + 20, UTC), usegmt=True), 20.0),
        (format_datetime(datetime.fromtimestamp(NOW - 20, UTC), usegmt=True), 0.0),
        ("Wed, 21 Oct 2099 07:28:00 GMT", 300.0),
        ("Thu, 28 May 2026 20:26:50 -0000", 10.0),  # no zone known: read as UTC
        ("Wed, 21 Oct 99999 07:28:00 GMT", None),
    ],
)
def test_a_retry_after_is_seconds_or_a_date_and_is_capped(header: str | None, expected: float | None) -> None:
    assert parse_retry_after(header, now_wall=NOW, cap_seconds=300) == expected


@given(header=st.text(), now=st.floats(-1e11, 1e11), cap=st.floats(1e-3, 1e9))
def test_no_retry_after_raises_or_leaves_its_bounds(header: str, now: float, cap: float) -> None:
    wait = parse_retry_after(header, now_wall=now, cap_seconds=cap)
    assert wait is None or (0 <= wait <= cap and not math.isnan(wait))


def test_no_release_of_requests_is_allowed_whose_adapters_do_not_ask_for_a_watched_connection() -> None:
    """requests calls `get_connection_with_tls_context` from 2.32.2 on; before that no deadline would hold."""
    assert hasattr(HTTPAdapter, "get_connection_with_tls_context")
    needed = [Requirement(line) for line in requires("openfeature-provider-external-oms") or ()]
    (allowed,) = [one.specifier for one in needed if one.name == "requests" and one.marker is None]
    assert not any(allowed.contains(version) for version in ("2.31.0", "2.32.0", "2.32.1"))
