"""A crowd on a cold cache, over the standard library's HTTP server: fifty threads and fifty tasks, and one GET."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from openfeature.exception import GeneralError
from openfeature.flag_evaluation import Reason

from external_oms import FLAG_KEY, ExternalOMSProvider, Settings

CROWD = 50


@dataclass
class Upstream:
    """A server that counts what it is asked, and answers when `go` is set."""

    status: int = 200
    gets: list[str] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    url: str = ""


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    found = Upstream()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.gets.append(self.path)
            found.go.wait()
            body = json.dumps({"enabled": True}).encode()
            self.send_response(found.status)
            self.send_header("Retry-After", "60")  # so that who comes after a failure shares it too
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
        found.go.set()
        server.shutdown()
        thread.join()


def ask_all_at_once(provider: ExternalOMSProvider, all_ask: Callable[[], None]) -> list[object]:
    """What fifty threads and fifty tasks are answered: details, or the error they got."""
    answers: list[object] = []
    start = threading.Barrier(CROWD + 1)
    number = itertools.count(1)

    def begin() -> None:
        if next(number) == 2 * CROWD:
            all_ask()

    def ask() -> None:
        start.wait()
        begin()
        try:
            answers.append(provider.resolve_boolean_details(FLAG_KEY, default_value=False))
        except GeneralError as error:
            answers.append(error)

    async def ask_in_a_task() -> object:
        begin()
        return await provider.resolve_boolean_details_async(FLAG_KEY, default_value=False)

    async def ask_in_tasks() -> list[object]:
        start.wait()
        return list(await asyncio.gather(*(ask_in_a_task() for _ in range(CROWD)), return_exceptions=True))

    threads = [threading.Thread(target=ask) for _ in range(CROWD)]
    for thread in threads:
        thread.start()
    tasks = asyncio.run(ask_in_tasks())
    for thread in threads:
        thread.join()
    return answers + tasks


@pytest.mark.parametrize("how", ["answers", "fails", "hangs"])
def test_a_crowd_on_a_cold_cache_costs_one_read(how: str, upstream: Upstream) -> None:
    upstream.status = 503 if how == "fails" else 200
    settings = Settings(
        tenant="acme",
        access_token="token",
        base_url=upstream.url,
        timeout_seconds=2.0 if how == "hangs" else 30.0,
        refresh="lazy",  # so that nothing reads again in the background
    )
    provider = ExternalOMSProvider(settings)
    answers = ask_all_at_once(provider, (lambda: None) if how == "hangs" else upstream.go.set)
    provider.shutdown()
    assert len(upstream.gets) == 1
    assert len(answers) == 2 * CROWD
    if how == "answers":
        reasons = Counter(getattr(answer, "reason", None) for answer in answers)
        assert reasons[Reason.STATIC] > 0
        assert reasons.keys() <= {Reason.STATIC, Reason.CACHED}, "a late caller has it from memory"
    else:
        assert all(isinstance(answer, GeneralError) for answer in answers)
