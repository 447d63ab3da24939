"""A real gunicorn on a free loopback port, and a connection to each of its workers."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Gunicorn", "running"]

START_SECONDS = 30.0
"""How long a gunicorn may take to answer, on a machine that is busy with other tests."""

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Gunicorn:
    """One gunicorn, and a kept-alive connection to each worker found so far.

    A worker of gthread keeps a connection to itself, so a request on it reaches that worker and no other.
    """

    process: subprocess.Popen[bytes]
    port: int
    workers: int
    log: Path
    connections: dict[int, http.client.HTTPConnection] = field(default_factory=dict)

    def ask(self, connection: http.client.HTTPConnection, path: str) -> dict[str, Any]:
        """The JSON that a worker answers."""
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, (answer.status, body[:300], self.log.read_text()[-3000:])
        found = json.loads(body)
        assert isinstance(found, dict)
        return found

    def connect(self) -> dict[int, http.client.HTTPConnection]:
        """A connection to each worker, by its pid; dead ones are replaced."""
        until = time.monotonic() + START_SECONDS
        while len(self.connections) < self.workers:
            assert time.monotonic() < until, f"not every worker answers: {self.log.read_text()[-3000:]}"
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
            try:
                pid = int(self.ask(connection, "/evaluate?times=0")["pid"])
            except (OSError, http.client.HTTPException):
                connection.close()
                time.sleep(0.02)
                continue
            if pid in self.connections:
                connection.close()
            else:
                self.connections[pid] = connection
        return self.connections

    def evaluate(self, times: int) -> dict[int, dict[str, int]]:
        """How often each worker answered what, evaluating so many times each."""
        return {
            pid: self.ask(connection, f"/evaluate?times={times}")["answers"]
            for pid, connection in self.connect().items()
        }

    def kill(self, pid: int) -> None:
        """`kill -9` a worker; gunicorn starts another."""
        os.kill(pid, signal.SIGKILL)
        self.connections.pop(pid).close()

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
        """The status and the JSON that whichever worker takes it answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=15)
        try:
            connection.request("POST", path, body, dict(headers))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    application: str, *, environment: Mapping[str, str], log: Path, workers: int = 4, preload: bool = False
) -> Iterator[Gunicorn]:
    """A gunicorn that serves the application until the block ends."""
    port = _free_port()
    command = [sys.executable, "-m", "gunicorn", application, "--bind", f"127.0.0.1:{port}", "--workers", str(workers)]
    command += ["--worker-class", "gthread", "--threads", "8", "--keep-alive", "120", "--log-level", "warning"]
    command += ["--graceful-timeout", "2", "--no-control-socket"]
    if preload:
        command.append("--preload")
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT
        )
    gunicorn = Gunicorn(process, port, workers, log)
    try:
        gunicorn.connect()
        yield gunicorn
    finally:
        for connection in gunicorn.connections.values():
            connection.close()
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
