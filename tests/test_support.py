"""The suite's own means: what is skipped is reported, waiting has a deadline, and tests share code by one package."""

from __future__ import annotations

import ast
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clock import FakeClock
from tests.support.ports import free_port
from tests.support.servers import read_until, started
from tests.support.waiting import wait_until
from tests.support.watching import watched

TESTS = Path(__file__).parent

SKIPPING = """
    import pytest

    def test_that_runs():
        pass

    def test_that_skips():
        pytest.skip("no redis-server on the PATH")

    @pytest.mark.skip(reason="marked")
    def test_that_is_marked():
        raise AssertionError

    @pytest.mark.xfail(reason="known")
    def test_that_is_known_to_fail():
        raise AssertionError
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest((TESTS / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(SKIPPING)
    return pytester


@pytest.mark.parametrize("processes", ["0", "1"])
def test_a_skip_is_a_skip_without_the_option_and_is_reported_once(suite: pytest.Pytester, processes: str) -> None:
    result = suite.runpytest("-p", "no:cacheprovider", "--skips-to", "not-run", "-n", processes)
    result.assert_outcomes(passed=1, skipped=2, xfailed=1)
    reported = (suite.path / "not-run").read_text(encoding="utf-8").splitlines()
    assert sorted(reported) == ["1 test (marked)", "1 test (no redis-server on the PATH)"]


def test_a_skip_is_a_failure_with_the_option_and_its_reason_is_told(suite: pytest.Pytester) -> None:
    result = suite.runpytest("-p", "no:cacheprovider", "--no-skips")
    result.assert_outcomes(passed=1, failed=1, errors=1, xfailed=1)  # a mark skips in the set-up: an error
    result.stdout.fnmatch_lines(["*--no-skips: *no redis-server on the PATH*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_a_module_that_skips_itself_whole_is_a_failure_with_the_option(pytester: pytest.Pytester) -> None:
    pytester.makeconftest((TESTS / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile("import pytest; pytest.importorskip('no_such_library')\ndef test_never(): pass")
    assert pytester.runpytest("-p", "no:cacheprovider", "--no-skips").ret != pytest.ExitCode.OK


@pytest.mark.parametrize(("fixture", "reason"), [("browser", "chromium"), ("node", "node"), ("redis_server", "redis")])
def test_a_test_that_needs_a_program_is_skipped_by_its_fixture_where_there_is_none(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, fixture: str, reason: str
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "prefix", "/nowhere")
    suite.makepyfile(f"def test_that_needs_it({fixture}): raise AssertionError")
    result = suite.runpytest("-p", "no:cacheprovider", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines([f"SKIPPED*no {reason}*on Debian: apt install *"])


def imports(path: Path) -> Iterator[str]:
    """The modules of the tests that a module imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_module_imports_a_test_module_or_a_conftest() -> None:
    imported = {(path, name) for path in TESTS.rglob("*.py") for name in imports(path) if name.startswith("tests.")}
    assert imported, "the walk finds no import"
    parts = {(str(path.relative_to(TESTS)), part) for path, name in imported for part in name.split(".")[1:]}
    assert {(path, part) for path, part in parts if part == "conftest" or part.startswith("test_")} == set()


def test_waiting_gives_the_first_true_value() -> None:
    values = iter([0, None, "", "found", "later"])
    assert wait_until(lambda: next(values)) == "found"


def test_waiting_fails_at_its_deadline_with_its_message() -> None:
    with pytest.raises(AssertionError, match=r"the lamp is on \(waited 0.01 seconds\)"):
        wait_until(lambda: False, seconds=0.01, message="the lamp is on")


def test_an_error_of_the_condition_ends_the_waiting() -> None:
    def condition() -> bool:
        raise LookupError

    with pytest.raises(LookupError):
        wait_until(condition)


def test_a_call_that_may_wait_is_seen_and_others_are_not() -> None:
    event, lock = threading.Event(), threading.Lock()
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert watched(lambda: socket.create_connection(server.getsockname()).close())[1]
    for waiting in (lambda: event.wait(0.0), lambda: time.sleep(0.0), lambda: select.select([], [], [], 0.0)):
        assert watched(waiting)[1] != []

    def quick() -> str:
        with lock:
            event.set()
        assert event.wait()
        return "done"

    assert watched(quick) == ("done", [])


def test_a_free_port_is_given_once() -> None:
    ports = [free_port() for _ in range(20)]
    assert len(set(ports)) == 20
    with socket.create_server(("127.0.0.1", ports[0])):
        pass


def test_a_port_that_another_process_has_reserved_is_given_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from tests.support.ports import free_port; print(free_port(), flush=True); input()"
    with started([sys.executable, "-c", code], cwd=TESTS.parent, stdin=-1) as other:
        assert other.stdout is not None
        theirs = int(other.stdout.readline())
        monkeypatch.setattr("tests.support.ports._FIRST", theirs)
        monkeypatch.setattr("tests.support.ports._LAST", theirs + 1)
        assert free_port() == theirs + 1


def test_a_process_ends_with_its_children_when_the_block_ends() -> None:
    code = "import os, time; pid = os.fork(); pid and print(pid, flush=True); time.sleep(60)"
    with started([sys.executable, "-c", code], stdin=-1) as parent:
        child = Path("/proc") / read_until(parent.stdout, "")[0]
        assert child.exists()
    wait_until(lambda: not child.exists() or "\nState:\tZ" in (child / "status").read_text(encoding="ascii"))


def test_the_clock_stands_still_until_told(clock: FakeClock) -> None:
    before = (clock.monotonic(), clock.wall())
    assert (clock.monotonic(), clock.wall()) == before
    clock.advance(1.5)
    assert (clock.monotonic(), clock.wall()) == (before[0] + 1.5, before[1] + 1.5)
    clock.set_wall(0.0)
    assert (clock.monotonic(), clock.wall()) == (before[0] + 1.5, 0.0)
