"""What the demo stands on: an emulator and a real server with several processes, which leave no trace when it ends."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from external_oms.cli.endings import uninterrupted
from external_oms.cli.reaching import environment_of
from external_oms.emulator import ConfigAPIEmulator
from external_oms.errors import Unavailable
from external_oms.settings import ENV_PREFIX
from external_oms.web.keys import Role, new_key
from external_oms.web.serving import MEMBER_HEADER

__all__ = ["Heard", "Stage"]

TENANT = "acme-staging"

START_SECONDS = 30.0
"""How long the server may take to start; on an idle machine it takes about one second."""

STOP_SECONDS = 15.0
"""How long it may take to stop before it is killed: longer than its own grace; an idle machine takes half a second."""

ROUND_SECONDS = 10.0
"""How long to go on asking until every worker has answered."""

_JSON = "application/json"

BURST = 8
"""Requests at once, each over a connection of its own: the kernel gives one after the other to whoever is idle, so a
row of single requests could land on one worker for ever."""


@dataclass(frozen=True, slots=True)
class Heard:
    """One answer.

    Attributes:
        member: The process that gave it, as `host:pid`; empty where it did not say.
        status: The HTTP status.
        document: The JSON object in its body; empty where there was none.
        seconds: How long it took, in seconds, its connection included.
    """

    member: str
    status: int
    document: Mapping[str, object]
    seconds: float


class Stage:
    """The emulator, and `external-oms serve` with some workers, both on loopback.

    Args:
        workers: How many workers, >= 1.

    Attributes:
        emulator: The config API.
        key: An admin's key to the server.
        webhook_secret: Signs deliveries.
        webhook_key: The bearer that does as well.
    """

    def __init__(self, workers: int = 2) -> None:
        self.emulator = ConfigAPIEmulator((TENANT,))
        self.key, self._entry = new_key("demo", Role.ADMIN)
        self.webhook_secret = f"whsec_{b64encode(secrets.token_bytes(24)).decode()}"
        self.webhook_key = f"demo_{secrets.token_urlsafe(18)}"
        self._workers = workers
        self._open = ExitStack()
        self._log: Path | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._port = 0

    def __enter__(self) -> Self:
        self._open.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    @property
    def origin(self) -> str:
        """Where the server is."""
        return f"http://127.0.0.1:{self._port}"

    def start_emulator(self) -> None:
        """Let the config API answer."""
        self._open.enter_context(self.emulator)

    def start_server(self) -> None:
        """Start the server, and wait until every worker has something to serve.

        Raises:
            Unavailable: It ended, or did not become ready in time.
        """
        place = Path(self._open.enter_context(TemporaryDirectory(prefix="external-oms-demo-")))
        self._log = place / "server.log"
        with socket.create_server(("127.0.0.1", 0), backlog=128) as line, self._log.open("wb") as log:
            # handed over while it listens: so no other process can take the port in between
            self._port = line.getsockname()[1]
            command = [sys.executable, "-P", "-m", "external_oms", "serve", "--name-members"]
            command += ["--bind", f"fd://{line.fileno()}", "--workers", str(self._workers)]
            self._open.callback(self._stop_server)
            with uninterrupted():  # else a process could have been made that nobody knows
                self._server = subprocess.Popen(  # noqa: S603 - our own module, by this interpreter
                    command,
                    env=self._environment(place),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(line.fileno(),),
                    start_new_session=True,  # so that Ctrl-C reaches it through us, in order
                )
        self._wait_until_ready()

    def _environment(self, place: Path) -> dict[str, str]:
        """Nobody else's settings, and no proxy between processes of one machine."""
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(ENV_PREFIX)}
        own = {
            "STORE": f"sqlite:///{place}/state.db",
            "API_KEYS": self._entry,
            "WEBHOOK_SECRETS": self.webhook_secret,
            "WEBHOOK_API_KEYS": self.webhook_key,
        }
        return {
            **kept,
            **{ENV_PREFIX + name: value for name, value in own.items()},
            **environment_of(self.emulator),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self._server is None or self._server.poll() is not None:
                break
            with suppress(OSError, http.client.HTTPException):
                heard = self.ask_all("GET", "/readyz")
                if all(answer.status == http.client.OK for answer in heard):
                    return
            time.sleep(0.05)
        raise Unavailable(f"the server of the demo did not start; its last words: {self._last_words()}")

    def _last_words(self) -> str:
        words = self._log.read_text("utf-8", "replace").strip() if self._log is not None else ""
        return words.splitlines()[-1] if words else "none"

    def _stop_server(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        server.terminate()
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    # -- asking ---------------------------------------------------------------------------------------------------

    def switch(self, enabled: bool) -> Heard:
        """Change the value in the config API, as another client of it does.

        Raises:
            OSError: No answer came.
            http.client.HTTPException: What came was none.
        """
        body = json.dumps({"enabled": enabled}).encode()
        return _asked(self.emulator.origin, "PUT", f"/_control/tenants/{TENANT}", body, {"Content-Type": _JSON})

    def ask(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Heard:
        """Ask the server; without headers, as the admin whose key this is.

        Raises:
            OSError: No answer came.
            http.client.HTTPException: What came was none.
        """
        own = {"Authorization": f"Bearer {self.key}", "Content-Type": _JSON}
        return _asked(self.origin, method, path, body, own if headers is None else headers)

    def ask_all(self, method: str, path: str, body: bytes | None = None) -> list[Heard]:
        """Ask, in bursts, until every worker has answered; all the answers.

        Raises:
            OSError: An answer did not come, or not every worker answered in time.
            http.client.HTTPException: What came was none.
        """
        heard: list[Heard] = []
        until = time.monotonic() + ROUND_SECONDS
        with ThreadPoolExecutor(BURST) as threads:
            while len({answer.member for answer in heard}) < self._workers:
                if time.monotonic() > until:
                    raise TimeoutError("not every worker of the demo has answered")
                heard += threads.map(lambda _: self.ask(method, path, body), range(BURST))
        return heard


def _asked(origin: str, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> Heard:
    """One exchange over a connection of its own, never by a proxy."""
    began = time.monotonic()
    line = http.client.HTTPConnection(origin.removeprefix("http://"), timeout=ROUND_SECONDS)
    try:
        line.request(method, path, body, {**headers, "Connection": "close"})
        answer = line.getresponse()
        received = answer.read()
    finally:
        line.close()
    took = time.monotonic() - began
    try:
        document = json.loads(received)
    except ValueError:
        document = None
    told = document if isinstance(document, dict) else {}
    return Heard(answer.headers.get(MEMBER_HEADER, ""), answer.status, told, took)
