"""What all tests share: a clock that stands still until told, a clean environment, and the option --no-skips."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

from external_oms.settings import ENV_PREFIX

__all__ = ["FakeClock"]


class FakeClock:
    """A clock that moves only by `advance`.

    The monotonic start is no round number and not the wall's, so that a test in which the two are mixed up fails.
    """

    def __init__(self, monotonic: float = 5_000.25, wall: float = 1_780_000_000.0) -> None:
        self._monotonic = monotonic
        self._wall = wall

    def monotonic(self) -> float:
        return self._monotonic

    def wall(self) -> float:
        return self._wall

    def advance(self, seconds: float) -> None:
        """Let time pass on both clocks; a negative number is an error of the test."""
        assert seconds >= 0, "a monotonic clock does not go back; use set_wall for the clock on the wall"
        self._monotonic += seconds
        self._wall += seconds

    def set_wall(self, wall: float) -> None:
        """Set the clock on the wall alone, as an administrator or NTP does."""
        self._wall = wall


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own EXTERNAL_OMS_… must not reach a test."""
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a test that is skipped fails")


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"--no-skips: {report.nodeid}: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.config.getoption("--no-skips"):
        _forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if collector.config.getoption("--no-skips"):
        _forbid_skip(report)
    return report
