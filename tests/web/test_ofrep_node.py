"""OpenFeature's own JavaScript clients, unchanged, as black boxes: each in a Node process, against a real server."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from external_oms.emulator import ConfigAPIEmulator
from tests.support.servers import Served, served, started
from tests.support.waiting import PATIENCE_SECONDS, wait_until
from tests.support.web import KEYS, TENANT


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
def client(node: Path, server: Served) -> Iterator[StartClient]:
    with ExitStack() as stack:

        def start(mode: str, *, options: tuple[str, ...] = (), url: str = "", tenant: str = "") -> Client:
            command = ["node", *options, "client.mjs", mode, url or server.url, KEYS["viewer"]]
            environ = {"NODE_NO_WARNINGS": "1"}
            return Client(
                stack.enter_context(
                    started(
                        [*command, *([tenant] if tenant else [])],
                        environ=environ,
                        cwd=node,
                        stdin=subprocess.PIPE,
                        stderr=None,
                    )
                )
            )

        yield start


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
    wait_until(lambda: 304 in node.ask()["statuses"])
    server.flip(True)
    changed = node.heard("PROVIDER_CONFIGURATION_CHANGED", lambda said: value(said) is True)
    assert changed["flags"] == ["external_oms_enabled"]


@pytest.mark.parametrize("options", [(), ("--experimental-eventsource",)], ids=["eventsource", "of-node"])
def test_the_web_client_hears_of_a_flip_by_the_event_stream(
    client: StartClient, server: Served, options: tuple[str, ...], record_property: Callable[[str, object], None]
) -> None:
    server.flip(False)
    listening = client("stream", options=options)
    assert value(listening.heard("ready")) is False
    delays = []
    for enabled in (True, False):
        answered = server.flip(enabled)
        changed = listening.heard("PROVIDER_CONFIGURATION_CHANGED")
        while value(changed) is not enabled:
            changed = listening.heard("PROVIDER_CONFIGURATION_CHANGED")
        delays.append(changed["at"] - answered)
        assert set(changed["statuses"]) <= {200, 304}
    record_property("milliseconds from the delivery's answer", [round(delay * 1000) for delay in delays])


EXAMPLE = Path(__file__).parents[2] / "examples" / "node_client"


def test_the_example_server_decides_every_order_anew(node: Path, server: Served, tmp_path: Path) -> None:
    shutil.copy(EXAMPLE / "server.mjs", tmp_path)
    (tmp_path / "node_modules").symlink_to(node / "node_modules")
    own = {"OFREP_ENDPOINT": server.url, "OFREP_KEY": KEYS["viewer"], "PORT": "0"}
    with started(["node", "server.mjs"], environ=own, cwd=tmp_path) as process:
        assert process.stdout is not None
        orders = process.stdout.readline().strip()
        for enabled, owner in ((True, "external"), (False, "ours")):
            server.flip(enabled)
            with urllib.request.urlopen(urllib.request.Request(orders, method="POST"), timeout=10) as answer:
                assert json.loads(answer.read())["owner"] == owner


@pytest.mark.parametrize("example", ["node_client", "browser_client"])
def test_an_example_names_the_clients_that_are_tested(example: str) -> None:
    def named(path: Path) -> dict[str, str]:
        found: dict[str, str] = json.loads((path / "package.json").read_text(encoding="utf-8"))["dependencies"]
        return found

    tested = named(Path(__file__).parents[1] / "support" / "node")
    assert named(EXAMPLE.parent / example).items() <= tested.items()
