"""OpenFeature's own JavaScript clients, unchanged, as black boxes: each in a Node process, against a real server."""

from __future__ import annotations

import fcntl
import json
import os
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from external_oms.emulator import ConfigAPIEmulator
from tests.web.conftest import KEYS, TENANT
from tests.web.served import Served, served

NODE = Path(__file__).parent / "node"
PATIENCE_SECONDS = 15.0
SOON_SECONDS = 2.0
"""Generous: what is measured stands in docs/ofrep.md, and in the report of `pytest --junit-xml`."""


@pytest.fixture(scope="session")
def installed() -> Path:
    """The clients, as the lock file names them; installed once, and again where the lock file is newer."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not on the PATH")
    done, lock = NODE / "node_modules" / ".package-lock.json", NODE / "package-lock.json"
    with (NODE / "package.json").open() as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # tests may run in several processes
        if not done.exists() or done.stat().st_mtime < lock.stat().st_mtime:
            install = ["npm", "ci", "--no-audit", "--no-fund", "--loglevel=error"]
            ended = subprocess.run(install, cwd=NODE, capture_output=True, text=True, timeout=180, check=False)
            if ended.returncode != 0:
                pytest.skip(f"npm could not install the clients: {ended.stderr[-500:]}")
            done.touch()
    return NODE


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with ConfigAPIEmulator([TENANT]) as api, served(api, tmp_path_factory.mktemp("served")) as running:
        yield running


class Client:
    """One Node process with one client in it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def heard(self, event: str, until: Callable[[dict[str, Any]], bool] = lambda _: True) -> dict[str, Any]:
        """The next event of that name of which `until` is true."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                said: dict[str, Any] = json.loads(self._lines.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                pytest.fail(f"the client did not say {event!r}")
            if said["event"] == event and until(said):
                return said

    def ask(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("ask\n")
        self.process.stdin.flush()
        return self.heard("asked")


StartClient = Callable[..., Client]


@pytest.fixture
def client(installed: Path, server: Served) -> Iterator[StartClient]:
    started: list[subprocess.Popen[str]] = []

    def start(mode: str, *, node: tuple[str, ...] = (), url: str = "", tenant: str = "") -> Client:
        command = ["node", *node, "client.mjs", mode, url or server.url, KEYS["viewer"], *([tenant] if tenant else [])]
        process = subprocess.Popen(
            command,
            cwd=installed,
            env=os.environ | {"NODE_NO_WARNINGS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return Client(process)

    yield start
    for process in started:
        process.kill()
        process.communicate()


def value(said: dict[str, Any]) -> object:
    return said["details"]["value"]


def test_the_server_side_client_sees_a_flip_at_its_next_evaluation(client: StartClient, server: Served) -> None:
    server.flip(False)
    node = client("server")
    details = node.heard("ready")["details"]
    assert (details["value"], details["reason"], details["variant"]) == (False, "STATIC", "off")
    assert "errorCode" not in details
    assert details["flagMetadata"]["tenant"] == TENANT
    for enabled in (True, False, True):
        server.flip(enabled)
        assert value(node.ask()) is enabled


def test_the_server_side_client_is_told_what_is_wrong_with_the_context(client: StartClient) -> None:
    details = client("server", tenant="globex").heard("ready")["details"]
    assert (details["value"], details["errorCode"]) == (False, "INVALID_CONTEXT")
    assert "globex" in details["errorMessage"]


def test_the_web_client_has_the_right_value_from_the_start(client: StartClient, server: Served) -> None:
    server.flip(True)
    ready = client("once").heard("ready")
    assert (value(ready), ready["details"]["variant"], ready["statuses"]) == (True, "on", [200])


def test_the_polling_web_client_is_answered_304_until_the_value_changes(client: StartClient, server: Served) -> None:
    server.flip(False)
    node = client("poll")
    assert value(node.heard("ready")) is False
    until = time.monotonic() + PATIENCE_SECONDS
    while 304 not in node.ask()["statuses"]:
        assert time.monotonic() < until, "no 304"
    answered = server.flip(True)
    changed = node.heard("PROVIDER_CONFIGURATION_CHANGED", lambda said: value(said) is True)
    assert changed["flags"] == ["external_oms_enabled"]
    assert changed["at"] - answered < SOON_SECONDS


@pytest.mark.parametrize("node", [(), ("--experimental-eventsource",)], ids=["eventsource", "of-node"])
def test_the_web_client_hears_of_a_flip_by_the_event_stream(
    client: StartClient, server: Served, node: tuple[str, ...], record_property: Callable[[str, object], None]
) -> None:
    server.flip(False)
    listening = client("stream", node=node)
    assert value(listening.heard("ready")) is False
    delays = []
    for enabled in (True, False, True, False):
        answered = server.flip(enabled)
        changed = listening.heard("PROVIDER_CONFIGURATION_CHANGED")
        while value(changed) is not enabled:
            changed = listening.heard("PROVIDER_CONFIGURATION_CHANGED")
        delays.append(changed["at"] - answered)
        assert set(changed["statuses"]) <= {200, 304}
    record_property("milliseconds from the delivery's answer", [round(delay * 1000) for delay in delays])
    assert max(delays) < SOON_SECONDS
