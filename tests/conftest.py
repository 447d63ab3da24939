"""Fixtures that all tests share, a clean environment, and the report of what was not run."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from external_oms.settings import ENV_PREFIX
from tests.support.clock import FakeClock
from tests.support.redis import RedisServer
from tests.support.requirements import require_chromium, require_node
from tests.support.waiting import PATIENCE_SECONDS

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NODE = Path(__file__).parent / "support" / "node"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell lets its background jobs ignore Ctrl-C, and the commands under test would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("any pace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any pace")  # a property is no benchmark: other tests run beside it

BROWSER_OPTIONS = [  # a browser that calls nobody but the server under test
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the developer's own EXTERNAL_OMS_… out of the tests."""
    for name in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
        monkeypatch.delenv(name)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of this test's own."""
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture(scope="module")  # not longer: another module's tests in this process may want a Playwright of their own
def browser() -> Iterator[Browser]:
    """Chromium."""
    chromium = require_chromium()
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=1000 * PATIENCE_SECONDS)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=BROWSER_OPTIONS)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def node() -> Path:
    """The folder with OpenFeature's JavaScript clients, installed once as the lock file names them."""
    require_node()
    done, lock = NODE / "node_modules" / ".package-lock.json", NODE / "package-lock.json"
    with (NODE / "package.json").open() as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # tests may run in several processes
        if not done.exists() or done.stat().st_mtime < lock.stat().st_mtime:
            install = ["npm", "ci", "--no-audit", "--no-fund", "--loglevel=error"]
            ended = subprocess.run(install, cwd=NODE, capture_output=True, text=True, timeout=180, check=False)
            if ended.returncode != 0:
                pytest.skip(f"npm cannot install the clients: {ended.stderr[-500:]}")
            done.touch()
    return NODE


# -- what was not run --------------------------------------------------------------------------------------------------


LONG_MODULES = (
    "browser/test_page.py",
    "hosts/test_one_host.py",
    "hosts/test_storms.py",
    "hosts/test_idle_children.py",
    "web/test_serving.py",
    "web/test_ofrep_node.py",
    "cli/test_serve.py",
    "test_shared_stores.py",
)
"""Modules that wait for long; they begin first, so that no process is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not str(item.path).endswith(LONG_MODULES))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a test that is skipped fails")
    parser.addoption("--skips-to", metavar="FILE", help="append what was skipped, and why, to a file")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    return report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = _reason(report)
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    file = config.getoption("--skips-to")
    if file is not None and not hasattr(config, "workerinput"):  # of several processes, the one that knows all reports
        reasons = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
        with Path(file).open("a", encoding="utf-8") as out:
            out.writelines(f"{count} {'test' if count == 1 else 'tests'} ({why})\n" for why, count in reasons.items())
