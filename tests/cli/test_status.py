from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import pytest

from external_oms.cli import base
from external_oms.cli.base import ExitCode
from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.entry import Entry
from external_oms.settings import ENV_PREFIX
from external_oms.stores.memory import MemoryStore
from external_oms.wiring import build_service
from tests.support.cli import START_SECONDS, run, running
from tests.support.ports import free_port
from tests.support.servers import read_until
from tests.support.waiting import wait_until


def test_status_reads_the_api_where_nothing_is_known_and_then_shows_what_the_store_knows(
    api: ConfigAPIEmulator, state_home: Path
) -> None:
    api.set_enabled(None, True)
    first, second = run("status"), run("status")
    assert first.exit_code == second.exit_code == 0
    heads, row = (line.split() for line in first.stdout.splitlines())
    assert heads[:3] == ["TENANT", "FLAG", "FRESHNESS"]
    assert row[:3] == ["acme-staging", "on", "fresh"]
    assert row[-1] == "api"
    assert second.stdout.splitlines()[1].split()[-1] == "store"
    assert api.reads() == 1
    assert list((state_home / "external-oms").glob("state-*.db"))


def test_status_as_json_is_one_object_for_each_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    with ConfigAPIEmulator(("acme", "globex")) as emulator:
        emulator.set_enabled("globex", True)
        for name, value in emulator.environment().items():
            monkeypatch.setenv(name, value)
        states = [json.loads(line) for line in run("status", "--json").stdout.splitlines()]
        (alone,) = [json.loads(line) for line in run("status", "--json", "--tenant", "globex").stdout.splitlines()]
    assert [(state["tenant"], state["enabled"], state["freshness"]) for state in states] == [
        ("acme", False, "fresh"),
        ("globex", True, "fresh"),
    ]
    assert alone["tenant"] == "globex"


def test_status_says_why_reads_fail_and_exits_with_1_where_nothing_may_be_served(api: ConfigAPIEmulator) -> None:
    api.fault(None, Fault(status=503, times=None))
    result = run("status")
    assert result.exit_code == ExitCode.FAILED
    assert "expired" in result.stdout
    assert "answered 503" in result.stdout.splitlines()[-1]


def test_a_generation_of_thirteen_digits_is_shown_whole(
    api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generations in Redis are times in milliseconds; people compare them with what a delivery was answered."""
    generation = 1_780_000_000_123
    store = MemoryStore(entries={"acme-staging": Entry(generation=generation)})
    monkeypatch.setattr(base, "build_service", partial(build_service, store=store))
    assert json.loads(run("status", "--json").stdout)["generation"] == generation
    assert str(generation) in run("status").stdout


def test_a_history_that_cannot_be_read_is_not_told_as_an_empty_one(
    api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}STORE", f"redis://127.0.0.1:{free_port()}/0")
    result = run("history")
    assert result.exit_code == ExitCode.FAILED
    assert "the history cannot be read" in result.stderr
    assert "empty" not in result.stderr


def test_watch_shows_what_another_process_does_and_ends_cleanly_on_ctrl_c(api: ConfigAPIEmulator) -> None:
    with running("watch", "--json") as watching:
        assert watching.stdout is not None
        first = json.loads(watching.stdout.readline())
        assert (first["tenant"], first["enabled"]) == ("acme-staging", False)
        assert run("enable", "--yes").exit_code == 0
        line = read_until(watching.stdout, '"enabled": true')[-1]
        assert json.loads(line)["generation"] == 1
        watching.send_signal(signal.SIGINT)
        _, stderr = watching.communicate(timeout=START_SECONDS)
    assert (watching.returncode, stderr) == (0, "")


def test_watch_tells_a_row_of_failures_once_for_people(api: ConfigAPIEmulator) -> None:
    with running("watch", environ={f"{ENV_PREFIX}TTL_SECONDS": "1", f"{ENV_PREFIX}TIMEOUT_SECONDS": "1"}) as watching:
        read_until(watching.stdout, "fresh")
        before = api.reads()
        api.fault(None, Fault(status=503, times=None, where="read"))
        assert "answered 503" in read_until(watching.stdout, "reads fail")[-1]
        wait_until(lambda: api.reads() >= before + 2)
        api.clear()
        told = read_until(watching.stdout, " fresh ")
        watching.send_signal(signal.SIGTERM)
        watching.communicate(timeout=START_SECONDS)
    assert sum("reads fail" in line and "fresh" in line for line in told) <= 1
    assert len(told) <= 3, told
    assert watching.returncode == 0


def test_history_is_newest_first_and_bounded(api: ConfigAPIEmulator) -> None:
    run("enable", "--yes")
    run("disable", "--yes")
    rows = [json.loads(line) for line in run("history", "--json").stdout.splitlines()]
    assert [row["id"] for row in rows] == sorted((row["id"] for row in rows), reverse=True)
    assert len(rows) > 2
    (newest,) = [json.loads(line) for line in run("history", "--json", "--limit", "1").stdout.splitlines()]
    assert newest == rows[0]
    heads, *lines = run("history", "--tenant", "acme-staging").stdout.splitlines()
    assert heads.split() == ["WHEN", "TENANT", "WHAT", "FLAG", "BY", "TOOK", "DETAIL"]
    assert len(lines) == len(rows)


def test_an_empty_history_says_so(api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("history")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "The history is empty." in result.stderr
    monkeypatch.setenv(f"{ENV_PREFIX}STORE", "memory://")
    assert "memory://" in run("history").stderr
