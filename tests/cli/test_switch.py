from __future__ import annotations

import json

import pytest

from external_oms.cli.base import ExitCode
from external_oms.emulator import ConfigAPIEmulator, Fault
from tests.support.cli import in_a_terminal, one_line, run


def test_enable_writes_reads_back_and_leaves_who_and_why_in_the_history(api: ConfigAPIEmulator) -> None:
    result = run("enable", "--yes", "--reason", "go live")
    assert result.exit_code == 0
    assert "acme-staging external_oms_enabled is on (it was off; read back at generation 1" in one_line(result.stdout)
    assert api.enabled() is True
    rows = [json.loads(line) for line in run("history", "--json").stdout.splitlines()]
    (write,) = [row for row in rows if row["cause"] == "write"]
    assert write["actor"].startswith("cli:")
    assert write["detail"].endswith("reason: go live")


def test_a_pipe_without_yes_is_refused_and_nothing_is_asked_of_the_api(api: ConfigAPIEmulator) -> None:
    result = run("enable", stdin="y\n")
    assert result.exit_code == ExitCode.REFUSED
    assert "--yes" in one_line(result.stderr)
    assert (api.reads(), api.writes()) == (0, 0)


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(api: ConfigAPIEmulator) -> None:
    result = run("enable", "--dry-run")
    assert result.exit_code == 0
    assert "would go from off to on" in result.stdout
    assert f'POST {api.origin}/acme-staging/v0/config/external_oms with {{"enabled": true}}' in result.stdout
    assert (api.writes(), api.enabled()) == (0, False)


def test_a_value_that_stands_already_is_not_written_again(api: ConfigAPIEmulator) -> None:
    result = run("disable", "--yes")
    assert result.exit_code == 0
    assert "is off already; nothing was written" in result.stdout
    assert api.writes() == 0


def test_a_conflict_is_told_in_words_with_1(api: ConfigAPIEmulator) -> None:
    api.fault(None, Fault(status=409, where="write"))
    result = run("enable", "--yes")
    assert result.exit_code == ExitCode.FAILED
    assert "409" in one_line(result.stderr)
    assert "cannot be changed in its present state" in result.stderr


def test_a_write_without_an_answer_that_cannot_be_read_back_exits_with_3(api: ConfigAPIEmulator) -> None:
    api.fault(None, Fault(dropped="headers", where="write"))
    api.fault(None, Fault(status=500, times=None, where="read"))
    result = run("enable", "--yes")
    assert result.exit_code == ExitCode.UNKNOWN
    assert "The present value is not known" in result.stderr
    assert "it may have changed" in result.stderr.splitlines()[-1]


def test_a_write_without_an_answer_that_can_be_read_back_is_done(api: ConfigAPIEmulator) -> None:
    api.fault(None, Fault(dropped="headers", where="write"))
    result = run("enable", "--yes")
    assert result.exit_code == 0
    assert "is on (it was off" in result.stdout


def test_a_value_that_was_taken_and_is_not_seen_yet_exits_with_3(api: ConfigAPIEmulator) -> None:
    api.fault(None, Fault(lag_seconds=30.0))
    result = run("enable", "--yes")
    assert result.exit_code == ExitCode.UNKNOWN
    assert "still answers the old one" in one_line(result.stderr)


def test_without_a_present_value_a_dry_run_fails(api: ConfigAPIEmulator) -> None:
    api.fault(None, Fault(status=500, times=None, where="read"))
    result = run("enable", "--dry-run")
    assert result.exit_code == ExitCode.FAILED
    assert "500" in one_line(result.stderr)


@pytest.mark.parametrize("reason", ["x" * 501, "two\nlines"])
def test_a_reason_is_one_line_of_bounded_length(api: ConfigAPIEmulator, reason: str) -> None:
    assert run("enable", "--yes", "--reason", reason).exit_code == ExitCode.REFUSED
    assert api.writes() == 0


def test_in_a_terminal_the_confirmation_names_tenant_old_and_new_value_and_asks_why(api: ConfigAPIEmulator) -> None:
    question = "Switch external_oms_enabled of acme-staging from off to on? [y/N]"
    code, said = in_a_terminal(["enable"], [(question, "y\n"), ("Why?", "ticket 4711\n")])
    assert code == 0, said
    assert api.enabled() is True
    assert "ticket 4711" in run("history").stdout


def test_in_a_terminal_no_is_no(api: ConfigAPIEmulator) -> None:
    code, said = in_a_terminal(["enable"], [("[y/N]", "n\n")])
    assert (code, api.writes()) == (ExitCode.FAILED, 0), said
