"""The server as processes: its address, and clients that send slowly, half, or not HTTP."""

from __future__ import annotations

import http.client
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from external_oms.emulator import ConfigAPIEmulator
from external_oms.errors import SettingsError
from external_oms.web.serving import BUFFER_BYTES, Arriving, Serving, check, is_private
from tests.support.servers import SERVE, Served, environment, gunicorn, served
from tests.support.web import ENTRIES, HOOK, KEYS, SECRET, TENANT, with_key


@pytest.mark.parametrize("bind", ["127.0.0.1:8080", "localhost:80", "[::1]:8080", "127.8.8.8:1", "unix:/run/oms.sock"])
def test_loopback_and_a_unix_socket_are_private(bind: str) -> None:
    assert is_private(bind)


@pytest.mark.parametrize("bind", ["0.0.0.0:8080", "[::]:8080", ":8080", "example.com:80", "10.0.0.1:80", "fd://3"])
def test_anything_else_is_not(bind: str) -> None:
    assert not is_private(bind)


@pytest.mark.parametrize("bind", ["127.0.0.1", "127.0.0.1:", "host:port", "host:70000", "a/b:80", "u@h:80", "[::1:80"])
def test_what_is_no_address_is_refused(bind: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        is_private(bind)


def test_memory_is_refused_for_several_workers_and_names_both_settings(api: ConfigAPIEmulator) -> None:
    settings = api.settings(webhook_secrets=[SECRET], api_keys=ENTRIES)
    with pytest.raises(SettingsError, match=r"^store: memory:// is not shared by 2 workers.*--workers 1"):
        check(settings, Serving(workers=2))
    check(settings, Serving(workers=1))
    check(settings.replaced(store="sqlite:////tmp/state.db"), Serving(workers=2))


# -- a request that arrives --------------------------------------------------------------------------------------------

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("data", "complete"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", True),
        (HEAD + b"\r\n", True),
        (HEAD + b"Content-Length: 3\r\n\r\nabc", True),
        (HEAD + b"CONTENT-LENGTH:3\r\n\r\nabcdef", True),
        (HEAD + b"Content-Length: 3\r\n\r\nab", False),
        (HEAD, False),
        (b"", False),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", True),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3;ext=1\r\nabc\r\n0\r\nTrailer: 1\r\n\r\n", True),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", False),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n0\r\n\r\n", False),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", False),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", True),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", True),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcXY", True),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcX", False),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r", False),
    ],
)
def test_a_request_is_complete_when_its_last_byte_is_there_however_it_is_cut(data: bytes, complete: bool) -> None:
    assert Arriving(0.0).feed(data) is complete
    drip = Arriving(0.0)
    fed = [drip.feed(data[place : place + 1]) for place in range(len(data))]
    assert (fed[-1] if fed else False) is (complete and not data.endswith(b"abcdef")) or any(fed) is complete


def test_what_is_too_large_is_not_waited_for() -> None:
    assert Arriving(0.0).feed(HEAD + b"Content-Length: %d\r\n\r\n" % (BUFFER_BYTES + 1))
    assert Arriving(0.0).feed(HEAD + b"X: " + b"x" * BUFFER_BYTES)
    chunked = Arriving(0.0)
    assert not chunked.feed(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    assert chunked.feed(b"1\r\nx\r\n" * BUFFER_BYTES)


def test_the_expectation_that_was_answered_is_taken_out() -> None:
    arriving = Arriving(0.0)
    assert not arriving.feed(HEAD + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n")
    assert arriving.expects_continue
    assert arriving.feed(b"abc")
    assert arriving.without_expectation() == HEAD + b"Content-Length: 3\r\n\r\nabc"


# -- over real sockets -------------------------------------------------------------------------------------------------

HALF = {
    "half a head": b"POST /webhooks/external-oms HTTP/1.1\r\nHost: x\r\nContent-Len",
    "half a body": b"POST /webhooks/external-oms HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nab",
    "half a chunk": b"POST /webhooks/external-oms HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
    "endless chunks": b"POST /login HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
    "nothing": b"",
}


def impatient(seconds: float) -> tuple[str, ...]:
    """Our server, whose requests have so long to arrive."""
    script = f"from external_oms.web import serving; serving.ARRIVAL_SECONDS = {seconds}; import external_oms.__main__"
    return sys.executable, "-c", f"{script} as command; command.main()", "serve"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One worker, which waits for two seconds."""
    with (
        ConfigAPIEmulator([TENANT]) as api,
        served(api, tmp_path_factory.mktemp("serving"), workers=1, command=impatient(2.0)) as running,
    ):
        yield running


def talk(server: Served, sent: bytes) -> bytes:
    """Everything that the server answers until it closes."""
    with socket.create_connection(("127.0.0.1", server.port), 20) as line:
        line.sendall(sent)
        received = b""
        while more := line.recv(65_536):
            received += more
    return received


def threads(server: Served) -> int:
    (worker,) = server.workers()
    return sum(1 for _ in Path(f"/proc/{worker}/task").iterdir())


def is_alive(server: Served) -> bool:
    with socket.create_connection(("127.0.0.1", server.port), 20) as line:
        line.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        return line.recv(65_536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("kind", HALF)
def test_requests_that_do_not_arrive_occupy_no_thread_and_are_closed(server: Served, kind: str) -> None:
    before = threads(server)
    with ExitStack() as stack:
        lines = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 20)) for _ in range(200)]
        for line in lines:
            line.sendall(HALF[kind])
        assert is_alive(server)
        assert server.evaluate()[0] == 200
        assert threads(server) < before + 50
        for line in lines:
            answer = line.recv(65_536)
            assert answer == b"" if kind == "nothing" else answer.startswith(b"HTTP/1.1 408 ")
    assert is_alive(server)


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", HALF)
def test_two_thousand_of_them_do_not_take_the_server_away(tmp_path: Path, kind: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("so many files cannot be opened here")
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    with ConfigAPIEmulator([TENANT]) as api, served(api, tmp_path) as server, ExitStack() as stack:
        for _ in range(2000):
            line = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 20))
            line.sendall(HALF[kind])
        slowest = 0.0
        for _ in range(100):
            began = time.monotonic()
            assert is_alive(server)
            slowest = max(slowest, time.monotonic() - began)
        server.flip(True)
        counts = [sum(1 for _ in Path(f"/proc/{worker}/task").iterdir()) for worker in server.workers()]
        print(f"\n{kind}: slowest of 100 requests {slowest * 1000:.1f} ms, threads {counts}")
        assert max(counts) < 100


MALFORMED_CHUNKS = (
    b"zz\r\n",
    b"3\r\nabcXY",
    b"-1\r\n",
    b"3\r\nabc\r\n0\r\nAuthorization x\r\n\r\n",
    b"\r\n",
)


@pytest.mark.parametrize(
    "kind", ["application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
@pytest.mark.parametrize(
    "path", [HOOK, "/login", "/logout", "/tenants/acme-staging/switch", "/ofrep/v1/evaluate/flags"]
)
@pytest.mark.parametrize("chunks", MALFORMED_CHUNKS)
def test_malformed_chunks_are_a_bad_request_and_no_traceback(
    server: Served, path: str, chunks: bytes, kind: str
) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {KEYS['viewer']}\r\n"
    head += f"Content-Type: {kind}\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    answer = talk(server, head.encode() + chunks)
    assert answer.split(b" ", 2)[1] in {b"400", b"408", b"413", b"415"}, answer[:300]
    assert "Traceback" not in server.log.read_text(encoding="utf-8")


def test_a_chunk_without_an_end_is_waited_for_as_long_as_any_request(server: Served) -> None:
    head = f"POST {HOOK} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert talk(server, head.encode() + b"ffffffffffff\r\n").startswith(b"HTTP/1.1 408 ")


def test_the_text_of_a_malformed_request_is_in_no_log(server: Served) -> None:
    for request in (
        b"GET / HTTP/1.1\r\nHost: x\r\nX-API-Key oms_in-a-broken-header\r\n\r\n",
        b"GET /ofrep/v1/events?token=oms_in-a-broken-line HTTP/9.9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Bad\x00: oms_in-a-broken-name\r\n\r\n",
    ):
        assert talk(server, request).startswith(b"HTTP/1.1 400 ")
    assert "oms_in-a-broken" not in server.log.read_text(encoding="utf-8")


def test_a_client_that_waits_for_leave_to_send_its_body_gets_it(server: Served) -> None:
    body = b'{"context": {}}'
    head = f"POST /ofrep/v1/evaluate/flags HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {KEYS['viewer']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 20) as line:
        line.sendall(f"{head}Connection: close\r\n\r\n".encode())
        assert line.recv(65_536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        line.sendall(body)
        assert line.recv(65_536).startswith(b"HTTP/1.1 200 ")


def test_requests_in_one_packet_are_answered_one_after_the_other(server: Served) -> None:
    one = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    answer = talk(server, one + b"\r\n" + one + b"\r\n" + one + b"Connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 ") == 3


def test_a_body_that_is_too_large_is_refused_before_it_has_arrived(server: Served) -> None:
    head = b"POST /webhooks/external-oms HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 10000000\r\n\r\n"
    assert talk(server, head + b"x" * 1000).startswith(b"HTTP/1.1 413 ")


def test_a_refused_body_leaves_the_connection_in_order(server: Served) -> None:
    connection = server.connect()
    for _ in range(3):
        connection.request("POST", "/ofrep/v1/evaluate/flags", b"x" * 50_000, with_key("stranger"))
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (401, True)
    connection.close()


def test_headers_of_a_client_move_nothing(api: ConfigAPIEmulator, tmp_path: Path) -> None:
    script = "import os; os.environ['FORWARDED_ALLOW_IPS'] = '*'; import external_oms.__main__ as c; c.main()"
    with served(api, tmp_path, workers=1, command=(sys.executable, "-c", script, "serve")) as server:
        headers = {"SCRIPT_NAME": "/public", "PATH_INFO": "/healthz", "X-Forwarded-Prefix": "/public"}
        headers |= {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example", "X-API-Key": KEYS["viewer"]}

        def status(path: str) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            location = answer.headers.get("Location", "")
            connection.close()
            assert "public" not in location
            assert "evil" not in location
            return answer.status

        assert status("/public/api/v1/tenants") == 404
        assert status("/api/v1/tenants") == 200
        assert status("/healthz") == 200
        assert status("/") == 200
        assert status("/login") == 303


def test_serve_with_memory_and_several_workers_does_not_start(api: ConfigAPIEmulator) -> None:
    variables = environment(api, store="memory://") | {"EXTERNAL_OMS_API_KEYS": ",".join(ENTRIES)}
    command = [*SERVE, "--workers", "2", "--bind", "127.0.0.1:0"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "store: memory:// is not shared by 2 workers" in done.stderr


# -- the user's own server ---------------------------------------------------------------------------------------------


@pytest.mark.timeout(150)
def test_under_a_worker_that_serves_one_request_at_a_time_no_stream_blocks_it(
    api: ConfigAPIEmulator, tmp_path: Path
) -> None:
    variables = environment(api, store=f"sqlite:///{tmp_path}/state.db") | {
        "EXTERNAL_OMS_API_KEYS": ",".join(ENTRIES),
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path),
    }
    with gunicorn(
        "tests.hosts.metered_shop:app", environ=variables, log=tmp_path / "log", workers=1, worker_class="sync"
    ) as shop:
        for path in ("/oms/api/v1/events", f"/oms/ofrep/v1/events?tenant={TENANT}"):
            connection = shop.connect()
            connection.request("GET", path, headers={"X-API-Key": KEYS["viewer"]})
            answer = connection.getresponse()
            assert (answer.status, answer.headers["Retry-After"]) == (503, "60")
            connection.close()
        connection = shop.connect()
        assert shop.ask(connection, "/evaluate?times=1")["answers"] == {"any": 1}
        connection.close()
