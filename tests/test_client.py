"""Reads and writes against the emulator over real HTTP, and against servers that mean harm."""

from __future__ import annotations

import gzip
import json
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
from requests.adapters import HTTPAdapter

from external_oms.auth import ClientCredentials, StaticToken, TokenSource
from external_oms.client import ConfigClient
from external_oms.clock import SYSTEM_CLOCK
from external_oms.config import Document, Reading
from external_oms.emulated import Malformed
from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.errors import (
    MalformedAnswer,
    RateLimited,
    ReadError,
    TokenError,
    Unauthorized,
    Unavailable,
    WriteConflict,
    WriteError,
    WriteOutcomeUnknown,
)
from external_oms.settings import TenantSettings
from tests.hostile import Hostile, Line, certificate

TOKEN = "t0ken-do-not-print"
DOCUMENT = b'{"enabled": true}'
DEADLINE = 0.4
SLACK = 1.5


@pytest.fixture
def api() -> Iterator[ConfigAPIEmulator]:
    with ConfigAPIEmulator(("acme", "globex")) as emulator:
        yield emulator


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """After each test: the threads and the descriptors of before it."""
    threads, descriptors = set(threading.enumerate()), _descriptors()
    yield
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:  # a server's thread may still be on its way out
        if set(threading.enumerate()) <= threads and _descriptors() <= descriptors:
            return
        threading.Event().wait(0.01)
    pytest.fail(f"left behind: {set(threading.enumerate()) - threads}, or descriptors")


@pytest.fixture(params=["own", "user's"])
def session(request: pytest.FixtureRequest) -> Iterator[requests.Session | None]:
    """None, for connections of the client's own; and a session of the user's."""
    if request.param == "own":
        yield None
        return
    with requests.Session() as session:
        yield session


def _at(
    api: ConfigAPIEmulator | str,
    *,
    tenant: str = "acme",
    token: TokenSource | None = None,
    session: requests.Session | None = None,
    timeout_seconds: float = 5.0,
) -> ConfigClient:
    """A client of the emulator with client credentials, or of the server at an address with a static token."""
    if isinstance(api, str):
        settings = TenantSettings(base_url=api)
        token = token or StaticToken(SecretStr(TOKEN))
    else:
        settings = api.tenant_settings(tenant)
        assert settings.client_id is not None
        assert settings.client_secret is not None
        token = token or ClientCredentials(
            tenant=tenant,
            endpoint=settings.token_endpoint(tenant),
            client_id=settings.client_id,
            client_secret=settings.client_secret,
            scope=settings.scope,
            session=session,
            clock=SYSTEM_CLOCK,
            timeout_seconds=timeout_seconds,
            retry_after_max_seconds=300,
        )
    return ConfigClient(
        tenant=tenant,
        settings=settings,
        token=token,
        session=session,
        clock=SYSTEM_CLOCK,
        timeout_seconds=timeout_seconds,
        retry_after_max_seconds=300,
    )


def _answer(body: bytes, *headers: bytes, status: bytes = b"200 OK", length: int | None = None) -> bytes:
    lines = [b"HTTP/1.1 " + status, *headers, b"Content-Length: %d" % (len(body) if length is None else length)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _recording(seen: list[bytes], *headers: bytes) -> Callable[[Line], None]:
    """Answers with the document, and keeps what was asked."""

    def script(line: Line) -> None:
        seen.append(line.request())
        line.send(_answer(DOCUMENT, *headers))

    return script


def _script(content: bytes) -> Callable[[Line], None]:
    def script(line: Line) -> None:
        line.request()
        line.send(content)

    return script


# --- what the API says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["bare", "wrapped"])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_read_gives_what_the_api_says(shape: Literal["bare", "wrapped"], enabled: bool) -> None:
    with ConfigAPIEmulator(("acme",), shape=shape, enabled=enabled) as api:
        since = api.updated_at("acme") if shape == "wrapped" else None
        assert _at(api).read() == Reading(Document(enabled, since), None)
        assert api.seen("acme")[-1].user_agent.startswith("external-oms/")


def test_a_validator_saves_the_document_until_it_changes() -> None:
    with ConfigAPIEmulator(("acme",), etag=True) as api:
        client = _at(api)
        first = client.read()
        assert first.etag is not None
        assert client.read(first.etag) == Reading(None, first.etag)
        api.set_enabled("acme", True)
        changed = client.read(first.etag)
        assert changed.document is not None
        assert changed.document.enabled
        assert changed.etag not in {None, first.etag}


@pytest.mark.parametrize("etag", [b"unquoted", b'"' + b"x" * 300 + b'"', b'"a" "b"', "\u00e9".encode()])
def test_a_validator_that_is_none_is_not_kept(etag: bytes) -> None:
    with Hostile(_script(_answer(DOCUMENT, b"ETag: " + etag))) as server:
        assert _at(server.url).read() == Reading(Document(True), None)


def test_304_to_a_read_without_a_validator_is_no_answer() -> None:
    with Hostile(_script(b"HTTP/1.1 304 Not Modified\r\n\r\n")) as server, pytest.raises(Unavailable, match="304"):
        _at(server.url).read()


@pytest.mark.parametrize("kind", ["html", "truncated", "string", "number", "null", "missing"])
def test_what_is_no_document_is_malformed_and_never_a_value(api: ConfigAPIEmulator, kind: Malformed) -> None:
    api.fault("acme", Fault(malformed=kind))
    with pytest.raises(MalformedAnswer):
        _at(api).read()


@pytest.mark.parametrize("status", [b"201 Created", b"204 No Content", b"206 Partial Content"])
def test_a_success_other_than_200_is_malformed(status: bytes) -> None:
    body = b"" if status.startswith(b"204") else DOCUMENT
    with Hostile(_script(_answer(body, status=status))) as server, pytest.raises(MalformedAnswer, match="where 200"):
        _at(server.url).read()


@pytest.mark.parametrize(
    ("fault", "error", "status", "wait"),
    [
        (Fault(status=400), Unavailable, 400, None),
        (Fault(status=404), Unavailable, 404, None),
        (Fault(status=429), RateLimited, 429, None),
        (Fault(status=429, retry_after=7), RateLimited, 429, 7.0),
        (Fault(status=429, retry_after=86_400), RateLimited, 429, 300.0),
        (Fault(status=429, retry_after="Wed, 21 Oct 2099 07:28:00 GMT"), RateLimited, 429, 300.0),
        (Fault(status=429, retry_after="soon"), RateLimited, 429, None),
        (Fault(status=500), Unavailable, 500, None),
        (Fault(status=503, retry_after=2), Unavailable, 503, 2.0),
        (Fault(redirect="http://127.0.0.1:9/"), Unavailable, 307, None),
    ],
)
def test_a_status_becomes_its_error_at_once(
    api: ConfigAPIEmulator, fault: Fault, error: type[ReadError], status: int, wait: float | None
) -> None:
    api.fault("acme", fault)
    began = time.monotonic()
    with pytest.raises(error) as caught:
        _at(api).read()
    assert (type(caught.value), caught.value.status, caught.value.retry_after_seconds) == (error, status, wait)
    assert time.monotonic() - began < SLACK  # a Retry-After is reported, not slept on


def test_a_redirect_is_not_followed_and_the_message_names_the_settings(session: requests.Session | None) -> None:
    with Hostile(_script(_answer(DOCUMENT))) as elsewhere:
        location = b"Location: " + elsewhere.url.encode()
        with Hostile(_script(_answer(b"", location, status=b"302 Found"))) as server:
            client = _at(server.url, session=session)
            with pytest.raises(Unavailable, match=r"a redirect.*base_url and config_path"):
                client.read()
        assert elsewhere.connections == 0


def test_nothing_that_a_server_writes_is_repeated_but_safe_codes(api: ConfigAPIEmulator) -> None:
    problem = {
        "title": "do-not-print",
        "detail": "do-not-print",
        "message": "do-not-print",
        "error_code": "config.locked",
        "request_id": "Ab-12",
    }
    content = _answer(json.dumps(problem).encode(), status=b"500 do-not-print")
    with Hostile(_script(content)) as server, pytest.raises(Unavailable) as caught:
        _at(server.url).read()
    assert "answered 500 (error_code config.locked, request_id Ab-12)" in str(caught.value)
    assert "do-not-print" not in str(caught.value)


@pytest.mark.parametrize("echo", [TOKEN, f"x-{TOKEN}", TOKEN[:6], "two words", "x" * 65, "UPPER", 7, None])
def test_a_code_that_is_unsafe_or_made_of_the_token_is_not_repeated(echo: object) -> None:
    body = json.dumps({"error_code": echo}).encode()
    with Hostile(_script(_answer(body, status=b"500 No"))) as server, pytest.raises(Unavailable) as caught:
        _at(server.url).read()
    assert str(caught.value).endswith("answered 500")


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


def _silence(line: Line) -> None:
    line.hold()


@pytest.mark.parametrize(
    "script", [_drip_head, _drip_endless_continues, _drip_body, _drip_chunks, _whole_body_without_end, _silence]
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
        client = _at(server.url, timeout_seconds=DEADLINE)
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"within 0\.4 s"):
            client.read()
        assert DEADLINE * 0.9 <= time.monotonic() - began < DEADLINE + SLACK
        assert [t for t in threading.enumerate() if isinstance(t, threading.Timer)] == []


def test_a_server_that_never_shakes_hands_is_left_at_the_deadline(tmp_path: Path) -> None:
    with Hostile(_silence) as server:
        client = _at(server.url.replace("http://", "https://"), timeout_seconds=DEADLINE)
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


def test_a_host_that_takes_no_connection_is_left_at_the_deadline() -> None:
    with _full("127.0.0.1") as port:
        began = time.monotonic()
        with pytest.raises(Unavailable):
            _at(f"http://127.0.0.1:{port}", timeout_seconds=DEADLINE).read()
        assert DEADLINE * 0.9 <= time.monotonic() - began < DEADLINE + SLACK


def test_a_host_is_reached_by_the_second_of_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack, Hostile(_script(_answer(DOCUMENT))) as server:
        port = int(server.url.rsplit(":", 1)[1])
        stack.enter_context(_full("127.0.0.3", port))
        addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.3", "127.0.0.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_more: addresses)
        assert _at(server.url, timeout_seconds=DEADLINE).read().document == Document(True)


def test_the_token_and_the_read_share_one_deadline(api: ConfigAPIEmulator) -> None:
    api.fault("acme", Fault(delay_seconds=0.25, where="token"))
    api.fault("acme", Fault(delay_seconds=0.25, where="read"))
    client = _at(api, timeout_seconds=DEADLINE)
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"within 0\.4 s"):
        client.read()
    assert time.monotonic() - began < DEADLINE + SLACK
    assert api.reads("acme") == 1


@pytest.mark.parametrize("script", [_drip_head, _drip_body, _silence])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_an_abort_ends_a_read_under_way_and_no_later_one(
    script: Callable[[Line], None], tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Event()

    def once(line: Line) -> None:
        if asked.is_set():
            line.request()
            line.send(_answer(DOCUMENT))
            return
        asked.set()
        script(line)

    context = None
    if tls:
        context, bundle = certificate(tmp_path)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
    with Hostile(once, context=context) as server, ThreadPoolExecutor(1) as pool:
        client = _at(server.url, timeout_seconds=30)
        reading = pool.submit(client.read)
        assert asked.wait(5)
        began = time.monotonic()
        client.abort()
        with pytest.raises(Unavailable, match="ended from outside"):
            reading.result(5)
        assert time.monotonic() - began < 1
        assert client.read().document == Document(True)


def test_an_abort_ends_a_connection_in_the_making() -> None:
    with _full("127.0.0.1") as port, ThreadPoolExecutor(1) as pool:
        client = _at(f"http://127.0.0.1:{port}", timeout_seconds=30)
        before = _descriptors()
        reading = pool.submit(client.read)
        while _descriptors() < before + 2:  # the socket and its duplicate
            threading.Event().wait(0.005)
        client.abort()
        with pytest.raises(Unavailable, match="ended from outside"):
            reading.result(5)


def test_an_abort_ends_a_token_request_too(api: ConfigAPIEmulator) -> None:
    api.fault("acme", Fault(delay_seconds=30, where="token"))
    client = _at(api, timeout_seconds=30)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(client.read)
        while not api.seen("acme"):
            threading.Event().wait(0.005)
        client.abort()
        with pytest.raises(Unavailable, match="ended from outside"):
            reading.result(5)
        assert api.reads("acme") == 0


# --- bounded answers -------------------------------------------------------------------------------------------


def _endless(line: Line) -> None:
    line.request()
    line.send(b"HTTP/1.1 200 OK\r\n\r\n")
    while not line.over.is_set():
        line.send(b" " * 65_536)


def test_an_endless_answer_is_malformed_after_64_kib() -> None:
    with Hostile(_endless) as server, pytest.raises(MalformedAnswer, match="longer than 65536 bytes"):
        _at(server.url).read()


@pytest.mark.parametrize("length", [65_536, 65_537])
def test_the_limit_is_64_kib_to_the_byte(length: int) -> None:
    with Hostile(_script(_answer(DOCUMENT.ljust(length)))) as server:
        if length == 65_536:
            assert _at(server.url).read().document == Document(True)
        else:
            with pytest.raises(MalformedAnswer, match="longer than"):
                _at(server.url).read()


@pytest.mark.parametrize("layers", [1, 2])
def test_a_compression_bomb_never_unfolds(layers: int, session: requests.Session | None) -> None:
    bomb = b" " * (64 << 20)
    for _ in range(layers):
        bomb = gzip.compress(bomb, 9)
    encoding = b"Content-Encoding: " + b", ".join([b"gzip"] * layers)
    with Hostile(_script(_answer(bomb, encoding))) as server:
        client = _at(server.url, session=session)
        tracemalloc.start()
        try:
            with pytest.raises(MalformedAnswer, match="longer than"):
                client.read()
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()


def test_a_compressed_document_is_read_though_none_was_asked_for() -> None:
    with Hostile(_script(_answer(gzip.compress(DOCUMENT), b"Content-Encoding: gzip"))) as server:
        assert _at(server.url).read().document == Document(True)


@pytest.mark.parametrize(
    "content",
    [
        _answer(DOCUMENT, length=100),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n11\r\n" + DOCUMENT,
        _answer(b"not gzip", b"Content-Encoding: gzip"),
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    ],
)
def test_an_answer_that_is_not_whole_or_not_http_is_unavailable(content: bytes) -> None:
    with Hostile(_script(content)) as server, pytest.raises(Unavailable, match="broke before the answer was whole"):
        _at(server.url).read()


@pytest.mark.parametrize("where", ["headers", "body"])
def test_a_dropped_connection_is_unavailable(api: ConfigAPIEmulator, where: Literal["headers", "body"]) -> None:
    api.fault("acme", Fault(dropped=where))
    with pytest.raises(Unavailable, match="broke"):
        _at(api).read()


def test_a_status_counts_though_its_body_never_comes() -> None:
    head = b"HTTP/1.1 429 Slow Down\r\nRetry-After: 9\r\nContent-Length: 50\r\n\r\n"
    with Hostile(_script(head)) as server, pytest.raises(RateLimited) as caught:
        _at(server.url).read()
    assert caught.value.retry_after_seconds == 9


# --- tokens ----------------------------------------------------------------------------------------------------


def test_a_refused_token_is_replaced_once_and_the_read_tried_once_more(api: ConfigAPIEmulator) -> None:
    client = _at(api)
    client.read()
    api.expire_tokens("acme")
    assert client.read().document is not None
    assert (api.reads("acme"), api.tokens_issued("acme")) == (3, 2)


@pytest.mark.parametrize("status", [401, 403])
def test_a_second_refusal_is_reported(api: ConfigAPIEmulator, status: int) -> None:
    api.fault("acme", Fault(status=status, times=None))
    with pytest.raises(Unauthorized, match="newstore:configuration:read") as caught:
        _at(api).read()
    assert caught.value.status == status
    assert (api.reads("acme"), api.tokens_issued("acme")) == (2, 2)


def test_a_refused_static_token_is_not_tried_twice() -> None:
    with Hostile(_script(_answer(b"", status=b"403 Forbidden"))) as server:
        with pytest.raises(Unauthorized, match="to access_token"):
            _at(server.url).read()
        assert server.connections == 1


def test_a_static_token_works(api: ConfigAPIEmulator) -> None:
    assert _at(api, token=StaticToken(SecretStr(api.access_token("acme")))).read().document is not None


def test_a_token_of_another_tenant_is_refused(api: ConfigAPIEmulator) -> None:
    with pytest.raises(Unauthorized):
        _at(api, token=StaticToken(SecretStr(api.access_token("globex")))).read()


def test_no_token_means_no_read(api: ConfigAPIEmulator) -> None:
    api.fault("acme", Fault(malformed="html", where="token"))
    with pytest.raises(TokenError):
        _at(api).read()
    assert api.reads("acme") == 0


def test_a_netrc_never_replaces_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    seen: list[bytes] = []
    with Hostile(_recording(seen)) as server:
        _at(server.url).read()
    assert f"Authorization: Bearer {TOKEN}".encode() in seen[0]


# --- the way there ---------------------------------------------------------------------------------------------


def test_a_closed_port_and_an_unknown_name_are_told_apart() -> None:
    port = _closed_port()
    with pytest.raises(Unavailable, match="no connection; is the address right"):
        _at(f"http://127.0.0.1:{port}").read()
    with pytest.raises(Unavailable, match="its host name cannot be resolved"):
        _at("https://{tenant}.invalid").read()


def test_a_certificate_that_is_not_trusted_is_said_to_be(tmp_path: Path) -> None:
    context, _ = certificate(tmp_path)
    with Hostile(_silence, context=context) as server, pytest.raises(Unavailable, match="TLS failed"):
        _at(server.url).read()


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    with Hostile(_recording(seen)) as server:
        monkeypatch.setenv("HTTP_PROXY", server.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert _at("http://api.localhost").read().document == Document(True)
    assert seen[0].startswith(b"GET http://api.localhost/v0/config/external_oms HTTP/1.1")


def test_a_proxy_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = _closed_port()
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
    with pytest.raises(Unavailable, match="HTTPS_PROXY"):
        _at("https://{tenant}.example.com").read()


def test_no_cookie_of_a_server_comes_back(session: requests.Session | None) -> None:
    seen: list[bytes] = []
    if session is not None:
        session.cookies.set("mine", "2")
    with Hostile(_recording(seen, b"Set-Cookie: server=1; Path=/")) as server:
        client = _at(server.url, session=session)
        client.read()
        client.read()
    assert not any(b"server=1" in request for request in seen)
    assert all((b"mine=2" in request) is (session is not None) for request in seen)
    assert session is None or session.cookies.get_dict() == {"mine": "2"}


# --- writes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_a_write_gives_what_the_api_then_says(method: Literal["POST", "PUT", "PATCH"]) -> None:
    with ConfigAPIEmulator(("acme",), write_method=method) as api:
        assert _at(api).write(True) == Document(True, api.updated_at("acme"))
        assert api.enabled("acme")
        assert [seen.method for seen in api.seen("acme") if seen.kind == "write"] == [method]


@pytest.mark.parametrize(
    "content",
    [_answer(b"", status=b"204 No Content"), _answer(b"ok"), _answer(DOCUMENT, length=99), _answer(b" " * 70_000)],
)
def test_a_write_that_was_taken_is_taken_whatever_the_answer_holds(content: bytes) -> None:
    with Hostile(_script(content)) as server:
        assert _at(server.url).write(True) is None


@pytest.mark.parametrize(
    ("fault", "error", "applied"),
    [
        (Fault(status=400), WriteError, False),
        (Fault(status=404), WriteError, False),
        (Fault(status=409), WriteConflict, False),
        (Fault(status=429, retry_after=3), RateLimited, False),
        (Fault(status=500), WriteOutcomeUnknown, False),
        (Fault(status=503, retry_after=3), WriteOutcomeUnknown, False),
        (Fault(redirect="http://127.0.0.1:9/"), Unavailable, False),
        (Fault(status=403, times=None), Unauthorized, False),
        (Fault(dropped="headers"), WriteOutcomeUnknown, True),
        (Fault(delay_seconds=5), WriteOutcomeUnknown, True),
    ],
)
def test_a_write_that_fails_says_what_is_known(
    api: ConfigAPIEmulator, fault: Fault, error: type[Exception], applied: bool
) -> None:
    fault = Fault(**{name: getattr(fault, name) for name in fault.__slots__} | {"where": "write"})
    api.fault("acme", fault)
    with pytest.raises(error) as caught:
        _at(api, timeout_seconds=1).write(True)
    assert type(caught.value) is error
    assert api.enabled("acme") is applied


def test_a_write_that_was_never_sent_is_unavailable(session: requests.Session | None) -> None:
    port = _closed_port()
    with pytest.raises(Unavailable):
        _at(f"http://127.0.0.1:{port}", session=session).write(True)


def test_a_write_whose_answer_never_came_has_an_unknown_outcome(session: requests.Session | None) -> None:
    with Hostile(_silence) as server, pytest.raises(WriteOutcomeUnknown, match="read it back"):
        _at(server.url, session=session, timeout_seconds=DEADLINE).write(True)


def test_a_write_to_a_server_that_fails_the_handshake_was_never_sent(tmp_path: Path) -> None:
    context, _ = certificate(tmp_path)
    with Hostile(_silence, context=context) as server, pytest.raises(Unavailable, match="TLS failed"):
        _at(server.url).write(True)


def test_a_write_with_an_old_token_is_tried_once_more(api: ConfigAPIEmulator) -> None:
    client = _at(api)
    client.read()
    api.expire_tokens("acme")
    client.write(True)
    assert (api.writes("acme"), api.enabled("acme")) == (2, True)


# --- a session of the user's -----------------------------------------------------------------------------------


class _Counting(HTTPAdapter):
    """An adapter of a user's, with an attribute that no copy by names would carry."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def send(self, *args: Any, **more: Any) -> requests.Response:  # noqa: ANN401 - passed on
        self.sent += 1
        return super().send(*args, **more)


def test_a_users_session_keeps_its_adapters_headers_and_hooks(api: ConfigAPIEmulator) -> None:
    answered: list[int] = []
    with requests.Session() as session:
        adapter = _Counting()
        session.mount("http://", adapter)
        session.headers["X-Gateway"] = "yes"
        session.hooks["response"].append(lambda response, **_: answered.append(response.status_code))
        assert _at(api, session=session).read().document is not None
        assert adapter.sent == 2  # the token and the read
        assert answered == [200, 200]
        assert session.get_adapter("http://x") is adapter


def test_the_body_of_a_users_session_ends_at_the_deadline() -> None:
    with Hostile(_drip_body) as server, requests.Session() as session:
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"within 0\.4 s"):
            _at(server.url, session=session, timeout_seconds=DEADLINE).read()
        assert time.monotonic() - began < DEADLINE + SLACK


class _Raising(requests.Session):
    def request(self, *_args: Any, **_more: Any) -> requests.Response:  # noqa: ANN401 - passed on
        raise LookupError(TOKEN)


def test_whatever_a_users_session_raises_becomes_ours() -> None:
    client = _at("https://{tenant}.example.com", session=_Raising())
    with pytest.raises(Unavailable) as caught:
        client.read()
    assert TOKEN not in str(caught.value)
    with pytest.raises(WriteOutcomeUnknown):
        client.write(True)


# --- a fork ----------------------------------------------------------------------------------------------------


def test_a_child_reads_over_connections_of_its_own(session: requests.Session | None) -> None:
    def keep_alive(line: Line) -> None:
        while line.request():
            line.send(_answer(DOCUMENT))

    with Hostile(keep_alive) as server:
        client = _at(server.url, session=session)
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
    client = _at(api)
    client.read()
    api.fault("acme", Fault(delay_seconds=0.3))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(client.read)
        while api.reads("acme") < 2:
            threading.Event().wait(0.005)
        child = os.fork()
        if child == 0:
            client.after_fork()
            client.abort()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert reading.result(5).document is not None
