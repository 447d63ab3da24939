"""`external-oms serve` as people run it, over an emulated config API: real processes, real sockets, a file store."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from external_oms.cli.reaching import environment_of
from external_oms.emulator import ConfigAPIEmulator
from external_oms.testing import sign_delivery
from tests.web.conftest import ENTRIES, HOOK, KEYS, SECRET

__all__ = ["FLAG_PATH", "SERVE", "Served", "served"]

START_SECONDS = 40.0
"""How long the server may take to start, on a machine that is busy with other tests."""

SERVE = (sys.executable, "-m", "external_oms", "serve")

FLAG_PATH = "/ofrep/v1/evaluate/flags/external_oms_enabled"


@dataclass(frozen=True)
class Served:
    """One server."""

    api: ConfigAPIEmulator
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def post(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, object]]:
        asked = urllib.request.Request(f"{self.url}{path}", body, headers, method="POST")
        try:
            with urllib.request.urlopen(asked, timeout=15) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as refused:
            return refused.code, json.loads(refused.read())

    def evaluate(self) -> tuple[int, dict[str, object]]:
        headers = {"X-API-Key": KEYS["viewer"], "Content-Type": "application/json"}
        return self.post(FLAG_PATH, json.dumps({"context": {"tenant": self.api.tenants[0]}}).encode(), headers)

    def flip(self, enabled: bool) -> float:
        """Change the value upstream and deliver; the moment of the delivery's answer, seconds since the epoch."""
        self.api.set_enabled(None, enabled)
        status, answer = self._deliver()
        answered = time.time()
        assert (status, answer["enabled"]) == (200, enabled), answer
        return answered

    def deliver_in_vain(self) -> None:
        """Deliver while the config API cannot be read."""
        status, answer = self._deliver()
        assert (status, answer["refreshed"]) == (202, False), answer

    def _deliver(self) -> tuple[int, dict[str, object]]:
        body = json.dumps({"tenant": self.api.tenants[0]}).encode()
        return self.post(HOOK, body, sign_delivery(body, SECRET, delivery_id=f"msg_{uuid.uuid4()}"))

    def workers(self) -> list[int]:
        """The processes that answer."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text(encoding="ascii")
        return [int(pid) for pid in children.split()]


@contextmanager
def served(
    api: ConfigAPIEmulator, place: Path, *, workers: int = 2, command: Sequence[str] = SERVE, **settings: str
) -> Iterator[Served]:
    """A server until the block ends.

    Args:
        api: What it reads.
        place: Where its store and its log go.
        workers: How many processes.
        command: What is run; `--bind` and `--workers` are added.
        settings: Further settings, by their names.
    """
    own = {
        "STORE": f"sqlite:///{place}/state.db",
        "API_KEYS": ",".join(ENTRIES),
        "WEBHOOK_SECRETS": SECRET,
        "EVALUATIONS_PER_MINUTE": "100000000",
        **{name.upper(): value for name, value in settings.items()},
    }
    environment = {f"EXTERNAL_OMS_{name}": value for name, value in own.items()} | environment_of(api)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as line, (place / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--bind", f"fd://{line.fileno()}", "--workers", str(workers)],
            env=os.environ | environment,
            stdout=log,
            stderr=log,
            pass_fds=(line.fileno(),),
        )
        server = Served(api, line.getsockname()[1], process, place / "log")
    try:
        _wait_until_it_answers(server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def _wait_until_it_answers(server: Served) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        assert server.process.poll() is None, server.log.read_text(encoding="utf-8")[-3000:]
        assert time.monotonic() < until, server.log.read_text(encoding="utf-8")[-3000:]
        try:
            if server.evaluate()[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
