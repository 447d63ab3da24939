"""A crowd on a cold cache, over the standard library's HTTP server: fifty threads and fifty tasks, and one GET."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from openfeature.exception import GeneralError
from openfeature.flag_evaluation import Reason

from external_oms import FLAG_KEY, ExternalOMSProvider, Settings

CROWD = 50
READ_SECONDS = 0.2
TIMEOUT_SECONDS = 1.0


@dataclass
class Upstream:
    """A server that counts what it is asked."""

    status: int = 200
    seconds: float = READ_SECONDS
    gets: list[str] = field(default_factory=list)
    enough: threading.Event = field(default_factory=threading.Event)
    url: str = ""


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    found = Upstream()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.gets.append(self.path)
            found.enough.wait(found.seconds)  # how long a read takes; the end of the test cuts a hang short
            body = json.dumps({"enabled": True}).encode()
            self.send_response(found.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A caller that gave up is no error of the server's."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        found.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield found
        found.enough.set()
        server.shutdown()
        thread.join()


def ask_all_at_once(provider: ExternalOMSProvider) -> list[object]:
    """What fifty threads and fifty tasks are answered: details, or the error they got."""
    answers: list[object] = []
    start = threading.Barrier(CROWD + 1)

    def ask() -> None:
        start.wait()
        try:
            answers.append(provider.resolve_boolean_details(FLAG_KEY, default_value=False))
        except GeneralError as error:
            answers.append(error)

    async def ask_in_tasks() -> list[object]:
        start.wait()
        tasks = (provider.resolve_boolean_details_async(FLAG_KEY, default_value=False) for _ in range(CROWD))
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    threads = [threading.Thread(target=ask) for _ in range(CROWD)]
    for thread in threads:
        thread.start()
    tasks = asyncio.run(ask_in_tasks())
    for thread in threads:
        thread.join()
    return answers + tasks


@pytest.mark.parametrize(
    ("status", "seconds", "serves"),
    [(200, READ_SECONDS, True), (500, READ_SECONDS, False), (200, 60.0, False)],
    ids=["answers", "fails", "hangs"],
)
def test_a_crowd_on_a_cold_cache_costs_one_read(status: int, seconds: float, serves: bool, upstream: Upstream) -> None:
    upstream.status, upstream.seconds = status, seconds
    provider = ExternalOMSProvider(
        Settings(tenant="acme", access_token="token", base_url=upstream.url, timeout_seconds=TIMEOUT_SECONDS)
    )
    answers = ask_all_at_once(provider)
    provider.shutdown()
    assert len(upstream.gets) == 1
    assert len(answers) == 2 * CROWD
    if serves:
        assert {getattr(answer, "reason", None) for answer in answers} == {Reason.STATIC}
    else:
        assert all(isinstance(answer, GeneralError) for answer in answers)
