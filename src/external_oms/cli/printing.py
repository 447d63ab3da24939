"""How things look: a terminal gets a table and colour, a pipe gets the same words in plain columns, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["Cell", "ago", "cell", "clock_time", "flag", "moment", "print_json", "print_table", "say", "span"]

Cell = Text
"""A piece of text with its colour."""

WRAPPED_FROM = 30
"""Characters: a column with a longer text gives way in a narrow terminal, the others do not."""

GAP = 2
"""Characters between two columns."""

_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86_400.0


def cell(text: str, style: str = "") -> Cell:
    """A piece of text in a colour of rich's."""
    return Text(text, style=style)


def flag(enabled: bool | None) -> Cell:
    """The flag's value as its variant is called."""
    if enabled is None:
        return cell("—", "dim")
    return cell("on", "bold green") if enabled else cell("off", "bold red")


def span(seconds: float | None) -> str:
    """A duration for people, from microseconds to days."""
    if seconds is None:
        return ""
    size = abs(seconds)
    if size < 1:
        return f"{seconds * 1000:.{1 if size < 0.01 else 0}f} ms"  # noqa: PLR2004 - below 10 ms the tenths tell
    for limit, unit, name in ((_MINUTE, 1.0, "s"), (_HOUR, _MINUTE, "min"), (2 * _DAY, _HOUR, "h")):
        if size < limit:
            return f"{seconds / unit:.{1 if size < 10 * unit else 0}f} {name}"
    return f"{seconds / _DAY:.0f} days"


def ago(seconds: float | None) -> str:
    """An age, read by people: whole seconds and more."""
    if seconds is None:
        return ""
    return f"{seconds:.0f} s" if seconds < _MINUTE else span(seconds)


def moment(when: datetime | None) -> str:
    """A moment in the reader's own time; in a pipe with its offset from UTC, for who reads it may be elsewhere."""
    form = "%Y-%m-%d %H:%M:%S" if sys.stdout.isatty() else "%Y-%m-%d %H:%M:%S %z"
    return "" if when is None else when.astimezone().strftime(form)


def clock_time(when: datetime) -> str:
    """The time of day in the reader's own time, to the millisecond."""
    return when.astimezone().strftime("%H:%M:%S.") + f"{when.microsecond // 1000:03d}"


def print_json(shape: Mapping[str, object]) -> None:
    """One object on one line."""
    click.echo(json.dumps(shape, ensure_ascii=False))


def say(*parts: str | Cell) -> None:
    """One line, in colour on a terminal; never wrapped, so that it can be copied."""
    line = Text(" ").join(part if isinstance(part, Text) else Text(part) for part in parts)
    if sys.stdout.isatty():
        _console().print(line, soft_wrap=True)
    else:
        click.echo(line.plain)


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str | Cell]]) -> None:
    """A table: of rich's in a terminal; in a pipe columns with two spaces between, as wide as they must be."""
    texts = [[part if isinstance(part, Text) else Text(part) for part in row] for row in rows]
    shown = [place for place in range(len(heads)) if any(row[place].plain for row in texts)]  # no empty columns
    if sys.stdout.isatty():
        longest = [max(len(heads[place]), *(len(row[place].plain) for row in texts)) for place in shown]
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="dim")
        for place, length in zip(shown, longest, strict=True):
            table.add_column(heads[place], no_wrap=length <= WRAPPED_FROM, overflow="fold")
        for row in texts:
            table.add_row(*(row[place] for place in shown))
        console = _console()
        # never narrower than its words: what a small terminal cannot hold goes onto its next line, and nothing is cut
        console.width = max(console.width, sum(min(length, WRAPPED_FROM) + GAP for length in longest))
        console.print(table)
        return
    lines = [[heads[place] for place in shown], *([row[place].plain or "-" for place in shown] for row in texts)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(shown))]
    for line in lines:
        click.echo((" " * GAP).join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _console() -> Console:
    return Console(highlight=False)
