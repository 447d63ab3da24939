from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from external_oms.cli.base import ExitCode, deferred_signals, stoppable
from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.settings import ENV_PREFIX
from tests.support.cli import START_SECONDS, one_line, run, running
from tests.support.waiting import wait_until


def test_a_reader_who_leaves_early_is_no_error(api: ConfigAPIEmulator) -> None:
    command = f"set -o pipefail; {sys.executable} -m external_oms status | head -c 0"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=START_SECONDS, check=False)
    assert done.stderr == ""
    assert done.returncode in {ExitCode.DONE, ExitCode.FAILED}


def test_a_stdout_that_nobody_reads_ends_the_command_with_1_and_without_a_traceback(api: ConfigAPIEmulator) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "external_oms", "status"]
    with os.fdopen(writing, "wb") as nobody:
        done = subprocess.run(
            command, stdout=nobody, stderr=subprocess.PIPE, text=True, timeout=START_SECONDS, check=False
        )
    assert (done.returncode, done.stderr) == (ExitCode.FAILED, "")


def test_ctrl_c_ends_a_command_that_has_not_finished_with_130(api: ConfigAPIEmulator) -> None:
    api.fault(None, Fault(delay_seconds=START_SECONDS))
    with running("status") as reading:
        wait_until(api.reads)
        reading.send_signal(signal.SIGINT)
        said, stderr = reading.communicate(timeout=START_SECONDS)
    assert (reading.returncode, said, stderr) == (ExitCode.INTERRUPTED, "", "")


def test_without_a_home_directory_the_setting_of_the_store_is_named(
    api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "")
    monkeypatch.setattr(Path, "expanduser", lambda path: path)  # as for a user without an entry and without HOME
    result = run("status")
    assert result.exit_code == ExitCode.REFUSED
    assert "store: is not set, and there is no home directory" in one_line(result.stderr)


def test_a_terminal_that_knows_no_arrow_ends_no_command(api: ConfigAPIEmulator) -> None:
    command = [sys.executable, "-m", "external_oms", "status"]
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    api.fault(None, Fault(status=503, times=None))
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=START_SECONDS, check=False)
    assert (done.returncode, done.stderr) == (ExitCode.FAILED, "")


def test_a_value_of_one_platform_is_never_shown_for_a_tenant_of_the_same_name_on_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = []
    for enabled in (True, False):
        with ConfigAPIEmulator(enabled=enabled) as emulator:
            for name, value in emulator.environment().items():
                monkeypatch.setenv(name, value)
            said.append(json.loads(run("status", "--json").stdout)["enabled"])
    assert said == [True, False]


@pytest.mark.parametrize("command", [["status"], ["watch"], ["history"], ["enable", "--yes"], ["serve"]])
def test_a_wrong_setting_is_refused_with_2_in_one_line(
    api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch, command: Sequence[str]
) -> None:
    monkeypatch.setenv(f"{ENV_PREFIX}TTL_SECONDS", "soon")
    result = run(*command)
    assert result.exit_code == ExitCode.REFUSED
    assert one_line(result.stderr).startswith("Error: ttl_seconds: 'soon' given;")
    assert result.stdout == ""


def test_an_unknown_tenant_is_refused_with_2_in_one_line(api: ConfigAPIEmulator) -> None:
    result = run("status", "--tenant", "globex")
    assert result.exit_code == ExitCode.REFUSED
    assert "globex" in one_line(result.stderr)


def test_a_store_that_cannot_be_used_is_told_in_one_line(
    api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv(f"{ENV_PREFIX}STORE", f"sqlite:///{tmp_path}/file/state.db")
    result = run("status")
    assert result.exit_code == ExitCode.FAILED
    assert "is not a directory" in one_line(result.stderr)


def test_a_deferred_signal_ends_the_command_after_the_block() -> None:
    done = []
    with stoppable():
        with deferred_signals():
            signal.raise_signal(signal.SIGTERM)
            done.append("finished")
        done.append("never")
    assert done == ["finished"]
