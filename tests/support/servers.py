"""Processes and servers under test: any command, any WSGI application under gunicorn, and `external-oms serve`."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import pytest

from external_oms.emulator import ConfigAPIEmulator
from external_oms.settings import ENV_PREFIX
from external_oms.testing import sign_delivery
from tests.support.waiting import wait_until
from tests.support.web import ENTRIES, HOOK, KEYS, SECRET

__all__ = [
    "FLAG_PATH",
    "REPOSITORY",
    "SERVE",
    "Gunicorn",
    "Served",
    "ServerProcess",
    "environment",
    "gunicorn",
    "read_until",
    "served",
    "serving",
    "started",
]

REPOSITORY = Path(__file__).parents[2]

START_SECONDS = 40.0
"""How long a server may take to start, on a machine that is busy with other tests."""

STOP_SECONDS = 40.0
"""How long a process may take to end after SIGTERM: more than the grace that our server gives its requests."""

SERVE = (sys.executable, "-m", "external_oms", "serve")
FLAG_PATH = "/ofrep/v1/evaluate/flags/external_oms_enabled"


@contextmanager
def started(
    command: Sequence[str],
    *,
    environ: Mapping[str, str] | None = None,
    **options: Any,  # noqa: ANN401 - as subprocess.Popen takes them
) -> Iterator[subprocess.Popen[str]]:
    """Run a command as a process in a session of its own, and end it with all its children when the block ends.

    Args:
        command: The program and its arguments.
        environ: Variables beside those of the test.
        options: For `subprocess.Popen`; stdout and stderr are pipes unless given.
    """
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **(environ or {})}
    process = subprocess.Popen(command, env=variables, text=True, start_new_session=True, **given)
    try:
        yield process
    finally:
        process.terminate()
        try:
            wait_until(lambda: _ended(process), seconds=STOP_SECONDS, message=f"{command} did not end by SIGTERM")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _ended(process: subprocess.Popen[str]) -> bool:
    """Whether it has ended; reads on meanwhile, since a full pipe would keep it from ending."""
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=0.1)
    return process.poll() is not None


def read_until(stream: IO[str] | None, words: str) -> list[str]:
    """The lines of a process up to the one that holds these words; the test fails where the output ends first."""
    assert stream is not None
    lines = []
    for line in stream:
        lines.append(line.rstrip("\n"))
        if words in line:
            return lines
    pytest.fail(f"{words!r} was not printed, but: {lines}")


@dataclass
class ServerProcess:
    """A server that runs as a process.

    Attributes:
        process: The process that was started; its children are the workers.
        port: The port on 127.0.0.1.
        log: What it has printed.
    """

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def printed(self) -> str:
        """The end of what it has printed, for the messages of failures."""
        return self.log.read_text(encoding="utf-8")[-3000:]

    def connect(self) -> http.client.HTTPConnection:
        """A connection; a worker keeps it to itself, so each request on it reaches that worker and no other."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_SECONDS)

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, dict[str, Any]]:
        """The status and the JSON that one of the workers answers."""
        connection = self.connect()
        try:
            connection.request("POST", path, body, dict(headers))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def workers(self) -> list[int]:
        """The ids of the processes that answer."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text(encoding="ascii")
        return [int(pid) for pid in children.split()]

    def connect_each(
        self,
        count: int,
        name: Callable[[http.client.HTTPConnection], str],
        known: Mapping[str, http.client.HTTPConnection] = MappingProxyType({}),
    ) -> dict[str, http.client.HTTPConnection]:
        """A connection to each of so many workers, by its name.

        Args:
            count: How many workers there are.
            name: Asks the worker at the end of a connection for its name.
            known: Connections that are there already.
        """
        found = dict(known)

        def all_found() -> bool:
            connection = self.connect()
            try:
                worker = name(connection)
            except (OSError, http.client.HTTPException):
                worker = ""
            if worker and worker not in found:
                found[worker] = connection
            else:
                connection.close()
            return len(found) >= count

        self.wait_until(all_found)
        return found

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for the server; its end, or the deadline, fails the test with what the server has printed."""

        def holds() -> object:
            assert self.process.poll() is None, f"the server has ended: {self.printed()}"
            return condition()

        try:
            wait_until(holds, seconds=START_SECONDS)
        except AssertionError as failure:
            raise AssertionError(f"{failure}; the server printed: {self.printed()}") from failure


@contextmanager
def serving(command: Sequence[str], *, log: Path, environ: Mapping[str, str] | None = None) -> Iterator[ServerProcess]:
    """Run a command that serves HTTP; it is given a socket that listens already, as `--bind fd://N`.

    The port is ours from the start, so no other process can take it, and a request waits until a worker is there.
    """
    with ExitStack() as stack:
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as line, log.open("w") as out:
            process = stack.enter_context(
                started(
                    [*command, "--bind", f"fd://{line.fileno()}"],
                    environ=environ,
                    cwd=REPOSITORY,
                    stdout=out,
                    stderr=out,
                    pass_fds=(line.fileno(),),
                )
            )
            port = line.getsockname()[1]
        yield ServerProcess(process, port, log)


# -- an application of a user's own, under gunicorn --------------------------------------------------------------------


def environment(api: ConfigAPIEmulator, *, store: str) -> dict[str, str]:
    """The settings of a process that reads from an emulator and takes signed deliveries."""
    own = {"STORE": store, "WEBHOOK_SECRETS": SECRET}
    return api.environment() | {f"{ENV_PREFIX}{name}": value for name, value in own.items()}


@dataclass
class Gunicorn(ServerProcess):
    """A gunicorn whose application answers `/evaluate?times=N` with `pid` and `answers`.

    Attributes:
        expected: How many workers it has.
        connections: A connection to each worker that was found so far, by the worker's process id.
    """

    expected: int = 4
    connections: dict[int, http.client.HTTPConnection] = field(default_factory=dict)

    def ask(self, connection: http.client.HTTPConnection, path: str) -> dict[str, Any]:
        """The JSON that a worker answers."""
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, (answer.status, body[:300], self.printed())
        found = json.loads(body)
        assert isinstance(found, dict)
        return found

    def members(self) -> dict[int, http.client.HTTPConnection]:
        """A connection to each worker, by its process id; connections to workers that have ended are replaced."""
        if len(self.connections) < self.expected:
            known = {str(pid): connection for pid, connection in self.connections.items()}
            named = self.connect_each(self.expected, self._pid, known)
            self.connections = {int(pid): connection for pid, connection in named.items()}
        return self.connections

    def _pid(self, connection: http.client.HTTPConnection) -> str:
        return str(self.ask(connection, "/evaluate?times=0")["pid"])

    def evaluate(self, times: int) -> dict[int, dict[str, int]]:
        """How often each worker answered what, evaluating so many times each."""
        return {
            pid: self.ask(connection, f"/evaluate?times={times}")["answers"]
            for pid, connection in self.members().items()
        }

    def kill(self, pid: int) -> None:
        """`kill -9` a worker; gunicorn starts another."""
        os.kill(pid, signal.SIGKILL)
        self.connections.pop(pid).close()


@contextmanager
def gunicorn(
    application: str,
    *,
    environ: Mapping[str, str],
    log: Path,
    workers: int = 4,
    preload: bool = False,
    worker_class: str = "gthread",
) -> Iterator[Gunicorn]:
    """A gunicorn that serves an application of the tests until the block ends."""
    command = [sys.executable, "-m", "gunicorn", application, "--workers", str(workers)]
    command += [
        "--worker-class",
        worker_class,
        *(["--threads", "8"] if worker_class == "gthread" else []),
        "--keep-alive",
        "120",
        "--log-level",
        "warning",
    ]
    command += ["--graceful-timeout", "2", "--no-control-socket", *(["--preload"] if preload else [])]
    with serving(command, environ=environ, log=log) as running:
        server = Gunicorn(running.process, running.port, log, expected=workers)
        server.members()
        try:
            yield server
        finally:
            for connection in server.connections.values():
                connection.close()


# -- our own server ----------------------------------------------------------------------------------------------------


@dataclass
class Served(ServerProcess):
    """`external-oms serve` over an emulated config API."""

    api: ConfigAPIEmulator

    def evaluate(self) -> tuple[int, dict[str, Any]]:
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

    def _deliver(self) -> tuple[int, dict[str, Any]]:
        body = json.dumps({"tenant": self.api.tenants[0]}).encode()
        return self.post(HOOK, body, sign_delivery(body, SECRET, delivery_id=f"msg_{uuid.uuid4()}"))


@contextmanager
def served(
    api: ConfigAPIEmulator, place: Path, *, workers: int = 2, command: Sequence[str] = SERVE, **settings: str
) -> Iterator[Served]:
    """`external-oms serve` until the block ends.

    Args:
        api: What it reads.
        place: Where its store and its log go.
        workers: How many processes.
        command: What is run; `--bind` and `--workers` are added.
        settings: Further settings, by their names.
    """
    own = {
        "API_KEYS": ",".join(ENTRIES),
        **{name.upper(): value for name, value in settings.items()},
    }
    environ = environment(api, store=f"sqlite:///{place}/state.db")
    environ |= {f"{ENV_PREFIX}{name}": value for name, value in own.items()}
    with serving([*command, "--workers", str(workers)], environ=environ, log=place / "log") as running:
        server = Served(running.process, running.port, running.log, api)
        server.wait_until(lambda: _answers(server))
        yield server


def _answers(server: Served) -> bool:
    with suppress(OSError, http.client.HTTPException):
        return server.evaluate()[0] == 200
    return False
