"""The example applications, each served as its first lines say: an order, a signed delivery, another order."""

from __future__ import annotations

import http.client
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from external_oms.emulator import ConfigAPIEmulator
from external_oms.testing import sign_delivery
from tests.support.ports import free_port
from tests.support.servers import ServerProcess, environment, started
from tests.support.web import HOOK, SECRET, TENANT

EXAMPLES = Path(__file__).parents[2] / "examples"
OF_FLASK = ("flask", "--app", "flask_app.py", "run", "--port", "{port}")
OF_FASTAPI = ("uvicorn", "fastapi_app:app", "--port", "{port}")
OF_DJANGO = ("gunicorn", "--no-control-socket", "--bind", "127.0.0.1:{port}", "--threads", "2", "wsgi")


@contextmanager
def running(api: ConfigAPIEmulator, command: Sequence[str], folder: Path, place: Path) -> Iterator[ServerProcess]:
    """Serve an example until the block ends; skips where its framework is not installed."""
    needed = "django" if folder.name == "django_app" else command[0]
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed; it comes with the extra `test`")
    port, log = free_port(), place / "log"
    with (
        log.open("w") as out,
        started(
            [sys.executable, "-m", *(part.format(port=port) for part in command)],
            environ=environment(api, store=f"sqlite:///{place}/state.db"),
            cwd=folder,
            stdout=out,
            stderr=out,
        ) as process,
    ):
        server = ServerProcess(process, port, log)
        server.wait_until(lambda: _listens(server))
        yield server


def _listens(server: ServerProcess) -> bool:
    with suppress(OSError):
        connection = server.connect()
        connection.connect()
        connection.close()
        return True
    return False


@pytest.mark.parametrize(
    ("command", "folder"),
    [
        pytest.param(OF_FLASK, EXAMPLES, id="flask_app.py"),
        pytest.param(OF_FASTAPI, EXAMPLES, id="fastapi_app.py"),
        pytest.param(OF_DJANGO, EXAMPLES / "django_app", id="django_app"),
    ],
)
def test_an_application_routes_by_the_flag_and_takes_deliveries(
    command: Sequence[str], folder: Path, tmp_path: Path
) -> None:
    with ConfigAPIEmulator([TENANT]) as api, running(api, command, folder, tmp_path) as server:
        status, order = server.post("/orders", b"{}", {"Content-Type": "application/json"})
        assert (status, order["owner"]) == (201, "ours"), server.printed()

        api.set_enabled(TENANT, True)
        body = json.dumps({"tenant": TENANT}).encode()
        status, answer = server.post(HOOK, body, sign_delivery(body, SECRET))
        assert (status, answer["enabled"]) == (200, True), server.printed()
        assert server.post("/orders", b"{}", {"Content-Type": "application/json"})[1]["owner"] == "external"

        status, problem = server.post(HOOK, body, {"Content-Type": "application/json"})
        assert (status, problem["status"]) == (401, 401)
        large = b" " * 70_000
        assert server.post(HOOK, large, sign_delivery(large, SECRET))[0] == 413
        connection = server.connect()
        try:
            connection.request("GET", HOOK)
            assert connection.getresponse().status == http.client.METHOD_NOT_ALLOWED
        finally:
            connection.close()
