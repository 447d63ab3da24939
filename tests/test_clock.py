"""The clocks: ages run on in suspend, and all processes of a host read the same clock."""

from __future__ import annotations

import runpy
import time

import pytest

from external_oms import clock as module
from external_oms.clock import SYSTEM_CLOCK, Clock


def _loaded() -> Clock:
    """The clock of a fresh copy of the module."""
    made = runpy.run_path(str(module.__file__))["SYSTEM_CLOCK"]
    assert isinstance(made.monotonic(), float)
    return made  # type: ignore[no-any-return]  # a class of the copy


def test_ages_are_counted_on_the_clock_that_runs_on_in_suspend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "CLOCK_BOOTTIME", 7, raising=False)
    monkeypatch.setattr(time, "clock_gettime", lambda which: {7: 3600.5}[which])
    monkeypatch.setattr(time, "monotonic", lambda: 0.5)
    assert _loaded().monotonic() == 3600.5


def test_without_such_a_clock_ages_are_counted_on_the_monotonic_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(time, "CLOCK_BOOTTIME", raising=False)
    monkeypatch.setattr(time, "monotonic", lambda: 0.5)
    assert _loaded().monotonic() == 0.5


def test_the_clocks_of_the_system_tell_the_time() -> None:
    first = SYSTEM_CLOCK.monotonic()
    assert first <= SYSTEM_CLOCK.monotonic()
    assert abs(SYSTEM_CLOCK.wall() - time.time()) < 60
