"""Children that are idle after the fork are told of a change, and their first evaluation is right."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from external_oms.provider import ExternalOMSProvider
from external_oms.testing import ConfigAPIEmulator, sign_delivery
from tests.support.redis import RedisServer
from tests.support.servers import REPOSITORY, environment, gunicorn, read_until, started
from tests.support.waiting import wait_until
from tests.support.web import HOOK, SECRET, TENANT


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/state/state.db"
        return
    with RedisServer(tmp_path) as server:
        yield server.url


@pytest.fixture
def api() -> Iterator[ConfigAPIEmulator]:
    with ConfigAPIEmulator((TENANT,)) as emulator:
        yield emulator


@pytest.mark.timeout(120)
def test_a_worker_that_is_idle_since_the_preloaded_app_was_forked(
    api: ConfigAPIEmulator, store: str, tmp_path: Path
) -> None:
    environ, log = environment(api, store=store), tmp_path / "gunicorn.log"
    with gunicorn("tests.hosts.warm_shop:app", environ=environ, log=log, preload=True) as host:
        api.set_enabled(TENANT, True)
        body = json.dumps({"tenant": TENANT}).encode()
        status, answer = host.post(HOOK, body, sign_delivery(body, SECRET))
        assert (status, answer["enabled"]) == (200, True), answer
        wait_until(lambda: all(host.ask(one, "/evaluate?times=0")["changes"] for one in host.members().values()))
        first = host.evaluate(1)
    assert len(first) == 4
    for pid, answers in first.items():
        assert [what for what in answers if what.startswith("off")] == [], (pid, answers)
    assert "Traceback" not in log.read_text()


@pytest.mark.timeout(120)
def test_a_child_of_multiprocessing_that_is_idle_since_the_fork(
    api: ConfigAPIEmulator, store: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.hosts.idle_children"]
    log = tmp_path / "log"
    with (
        log.open("w") as out,
        started(command, environ=environment(api, store=store), cwd=REPOSITORY, stderr=out) as parent,
    ):
        read_until(parent.stdout, "ready")
        api.set_enabled(TENANT, True)
        other = ExternalOMSProvider(api.settings(store=store))
        generation = other.invalidate()
        other.shutdown()
        found = json.loads(read_until(parent.stdout, "]")[-1])
    assert len(found) == 3
    for value, reason, seen in found:
        assert value is True, (value, reason)
        assert seen >= generation
    assert "Traceback" not in log.read_text()
