from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from functools import partial

import pytest

from external_oms.cli import base, output
from external_oms.emulator import ConfigAPIEmulator
from external_oms.records import Cause, Event
from external_oms.stores.memory import MemoryStore
from external_oms.wiring import build_service
from tests.support.cli import in_a_terminal, run


def test_a_terminal_gets_a_table_in_colour(api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    code, said = in_a_terminal(["status"], [])
    assert code == 0
    assert re.search(r"\x1b\[31m\x1b\[1moff *\x1b\[0m", said)
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)
        assert "\x1b" not in in_a_terminal(["status"])[1]
        monkeypatch.delenv(name)


def test_a_narrow_terminal_is_shown_every_word_in_full(api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    run("enable", "--yes", "--reason", "a reason that is rather long")
    for command, words in (
        (["status"], ["acme-staging", "GENERATION", "store"]),
        (["history"], ["written", "cli:", "rather"]),
    ):
        code, said = in_a_terminal(command, [])
        assert code == 0
        assert all(word in said for word in words), said


HOSTILE = "\x1b]0;title\x07\x9b31m \u202etxt\u2066 \ud800 \U000e0001é"
ESCAPED = r"\u001b]0;title\u0007\u009b31m \u202etxt\u2066 \ud800 \udb40\udc01é"


def test_nothing_unprintable_reaches_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert output.printable(HOSTILE) == ESCAPED
    output.print_line("a", output.Cell(HOSTILE))
    output.print_table(("HEAD", "NEXT"), [[HOSTILE, "x"]])
    output.print_json({HOSTILE: HOSTILE})
    line, heads, row, document = capsys.readouterr().out.splitlines()
    assert line == f"a {ESCAPED}"
    assert heads.index("NEXT") == row.index("x", len(ESCAPED))
    assert json.loads(document) == {HOSTILE: HOSTILE}
    assert document.isprintable()


def test_a_row_of_history_cannot_control_the_terminal(api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    event = Event(datetime.now(UTC), "acme-staging", Cause.WRITE, actor=HOSTILE, detail=HOSTILE)
    store = MemoryStore()
    store.append(event)
    monkeypatch.setattr(base, "build_service", partial(build_service, store=store))
    for arguments in ([], ["--json"]):
        printed = run("history", *arguments).stdout
        assert all(line.isprintable() for line in printed.splitlines())
        assert r"\u202e" in printed


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.000_5, "0.5 ms"),
        (0.25, "250 ms"),
        (5, "5.0 s"),
        (59, "59 s"),
        (90, "1.5 min"),
        (7200, "2.0 h"),
        (86_400 * 3, "3 days"),
        (-20, "-20 s"),
    ],
)
def test_a_duration_has_a_unit(seconds: float | None, text: str) -> None:
    assert output.duration(seconds) == text
