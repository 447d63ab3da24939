"""Fixtures of the command: an emulated config API in its environment, and a state directory of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from external_oms.emulator import ConfigAPIEmulator
from external_oms.settings import ENV_PREFIX


@pytest.fixture(autouse=True)
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own state stays out of it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[ConfigAPIEmulator]:
    with ConfigAPIEmulator() as emulator:
        for name, value in emulator.environment().items():
            if name != f"{ENV_PREFIX}WEBHOOK_SECRETS":  # tests of the server and of deliveries set their own, or none
                monkeypatch.setenv(name, value)
        yield emulator
