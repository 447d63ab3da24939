from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from external_oms.cli import demo
from external_oms.cli.base import ExitCode
from external_oms.cli.demo import DemoEnvironment
from external_oms.settings import ENV_PREFIX
from tests.support.cli import START_SECONDS, one_line, processes_of, run, running
from tests.support.servers import read_until
from tests.support.waiting import wait_until
from tests.support.web import SECRET


def traces(place: Path) -> list[Path]:
    return list(place.glob("external-oms-demo-*"))


def test_the_demo_checks_itself_and_leaves_nothing_behind(tmp_path: Path) -> None:
    environ = {
        "TMPDIR": str(tmp_path),
        f"{ENV_PREFIX}TTL_SECONDS": "a setting of the user, which the demo does not read",
    }
    with running("demo", "--check", environ=environ) as playing:
        said, stderr = playing.communicate(timeout=START_SECONDS)
    assert (playing.returncode, stderr) == (0, "")
    before, after = re.findall(r"worker (\d+) off", said), re.findall(r"worker (\d+) on ", said)
    assert len(set(after)) == 2
    assert set(before) == set(after)
    assert "→ 200" in said
    assert "Every worker followed" in said
    assert traces(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_stays_up_with_what_to_try_until_it_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    with running("demo", environ={"TMPDIR": str(tmp_path)}) as playing:
        lines = [line.strip() for line in read_until(playing.stdout, "/faults")]
        given = dict(pair.split("=", 1) for line in lines if re.match(r"[A-Z_]+=", line) for pair in line.split())
        line = http.client.HTTPConnection(given["SERVER"].removeprefix("http://"), timeout=START_SECONDS)
        line.request("GET", "/api/v1/tenants/acme-staging", headers={"X-API-Key": given["KEY"]})
        answer = line.getresponse()
        assert json.loads(answer.read())["enabled"] is True
        line.close()
        playing.send_signal(number)
        _, stderr = playing.communicate(timeout=START_SECONDS)
    assert (playing.returncode, stderr) == (0, "")
    assert traces(tmp_path) == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(given["SERVER"].rpartition(":")[2])), 1)


def test_the_demo_that_is_ended_while_it_starts_leaves_nothing_behind(tmp_path: Path) -> None:
    with running("demo", environ={"TMPDIR": str(tmp_path)}) as playing:
        read_until(playing.stdout, "starting: server")
        playing.send_signal(signal.SIGINT)
        _, stderr = playing.communicate(timeout=START_SECONDS)
    assert (playing.returncode, stderr) == (ExitCode.INTERRUPTED, "")
    assert traces(tmp_path) == []


def test_a_server_that_does_not_stop_in_time_is_killed_with_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "STOP_SECONDS", 0.0)
    stubborn = ["sh", "-c", "trap '' TERM; sleep 1000 & echo started; wait"]
    with subprocess.Popen(stubborn, stdout=subprocess.PIPE, start_new_session=True) as server:
        assert server.stdout is not None
        server.stdout.readline()
        assert len(processes_of(server.pid)) == 2
        demo._stop(server)
        wait_until(lambda: processes_of(server.pid) == [])


class Refusing(DemoEnvironment):
    """Its server knows another secret, so that it refuses the delivery and no worker hears of the change."""

    def variables(self, place: Path) -> dict[str, str]:
        return {**super().variables(place), f"{ENV_PREFIX}WEBHOOK_SECRETS": SECRET}


def test_the_check_fails_if_a_worker_does_not_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DemoEnvironment", Refusing)
    result = run("demo", "--check")
    assert result.exit_code == ExitCode.FAILED
    assert "→ 401" in result.stdout
    assert re.search(r"✗ (\d+) of \1 answers were old", result.stdout)


class Broken(DemoEnvironment):
    """Its server refuses to start."""

    def variables(self, place: Path) -> dict[str, str]:
        return {**super().variables(place), f"{ENV_PREFIX}TTL_SECONDS": "1"}


def test_the_end_of_the_log_is_shown_if_the_server_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DemoEnvironment", Broken)
    result = run("demo", "--check")
    assert result.exit_code == ExitCode.FAILED
    assert "ttl_seconds" in one_line(result.stderr)
