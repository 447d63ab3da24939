"""The option that CI relies on is itself tested: a skip that goes unseen would hide what was never run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import FakeClock

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
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(SKIPPING)
    return pytester


def test_a_skip_is_a_skip_without_the_option(suite: pytest.Pytester) -> None:
    suite.runpytest("-p", "no:cacheprovider").assert_outcomes(passed=1, skipped=2, xfailed=1)


def test_a_skip_is_a_failure_with_the_option_and_its_reason_is_told(suite: pytest.Pytester) -> None:
    result = suite.runpytest("-p", "no:cacheprovider", "--no-skips")
    result.assert_outcomes(passed=1, failed=1, errors=1, xfailed=1)  # a mark skips in the set-up: an error
    result.stdout.fnmatch_lines(["*--no-skips: *no redis-server on the PATH*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_a_module_that_skips_itself_whole_is_a_failure_with_the_option(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile("import pytest; pytest.importorskip('no_such_library')\ndef test_never(): pass")
    assert pytester.runpytest("-p", "no:cacheprovider", "--no-skips").ret != pytest.ExitCode.OK


def test_the_clock_stands_still_until_told(clock: FakeClock) -> None:
    before = (clock.monotonic(), clock.wall())
    assert (clock.monotonic(), clock.wall()) == before
    clock.advance(1.5)
    assert (clock.monotonic(), clock.wall()) == (before[0] + 1.5, before[1] + 1.5)
    clock.set_wall(0.0)
    assert (clock.monotonic(), clock.wall()) == (before[0] + 1.5, 0.0)
