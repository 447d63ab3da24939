from __future__ import annotations

import builtins
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

import pytest

from external_oms.__main__ import EXTRA_NEEDED, main

REAL_IMPORT = builtins.__import__


def without(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """Make the import of the command line fail as it does where a library is not installed."""

    def failing(
        name: str,
        globals_: Mapping[str, object] | None = None,
        locals_: Mapping[str, object] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> ModuleType:
        if name == "external_oms.cli":
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return REAL_IMPORT(name, globals_, locals_, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", failing)


def test_without_click_the_command_names_the_extra_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, "click")
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.err == EXTRA_NEEDED
    assert "pip install 'openfeature-provider-external-oms[server]'" in said.err
    assert said.out == ""


def test_a_defect_of_ours_is_not_taken_for_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "external_oms.no_such_room")
    with pytest.raises(ModuleNotFoundError):
        main()


def test_the_module_runs_the_command_line() -> None:
    command = [sys.executable, "-m", "external_oms", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
