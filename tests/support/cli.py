"""How tests run the command `external-oms`: in this process, as a process of its own, or in a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from click.testing import CliRunner, Result

from external_oms.cli import main
from tests.support.servers import started

__all__ = ["START_SECONDS", "in_a_terminal", "one_line", "processes_of", "run", "running"]

START_SECONDS = 30.0


def run(*arguments: str, stdin: str | None = None) -> Result:
    """The command in this process; stdin, stdout and stderr are pipes."""
    result = CliRunner().invoke(main, arguments, input=stdin)
    assert "Traceback" not in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def running(*arguments: str, environ: Mapping[str, str] | None = None) -> AbstractContextManager[subprocess.Popen[str]]:
    """The command as a process of its own."""
    return started([sys.executable, "-m", "external_oms", *arguments], environ=environ)


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text


def in_a_terminal(arguments: Sequence[str], answers: Sequence[tuple[str, str]] = ()) -> tuple[int, str]:
    """Run the command in a terminal; to each question that is awaited, the answer is typed."""
    pid, terminal = pty.fork()
    if pid == 0:  # pragma: no cover - another process
        os.execv(sys.executable, [sys.executable, "-m", "external_oms", *arguments])  # noqa: S606 - no shell is wanted
    said, until = "", time.monotonic() + START_SECONDS
    waiting = list(answers)
    try:
        while time.monotonic() < until:
            if not select.select([terminal], [], [], 0.5)[0]:
                continue
            try:
                chunk = os.read(terminal, 4096).decode()
            except OSError:  # the other end has closed
                break
            said += chunk
            if not chunk:
                break
            if waiting and waiting[0][0] in said:
                os.write(terminal, waiting.pop(0)[1].encode())
        assert not waiting, f"never asked: {waiting}; said: {said}"
    finally:
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), said


def processes_of(session: int) -> list[str]:
    """The processes of a session that live; those that only wait to be reaped do not."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, _, _, its_session = stat.read_text().rpartition(") ")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(stat.parent.name)
    return found
