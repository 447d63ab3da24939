"""Output: coloured lines and tables on a terminal, the same words in plain columns in a pipe, or JSON.

Text from outside, such as the scope of a token or a row of history, is escaped where it is not printable, so that it
cannot control the terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

import click

__all__ = ["Cell", "duration", "flag_cell", "local_time", "print_json", "print_line", "print_table", "printable"]

_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86_400.0


class Cell(NamedTuple):
    """A piece of text with its style; the colours are those of click."""

    text: str
    color: str | None = None
    bold: bool | None = None
    dim: bool | None = None

    def styled(self, width: int = 0) -> str:
        """Return the escaped text with its style, padded to a width."""
        text = printable(self.text).ljust(width)
        return click.style(text, fg=self.color, bold=self.bold, dim=self.dim) if any(self[1:]) else text


def printable(text: str) -> str:
    r"""Return the text with everything that is not printable escaped as in JSON, such as `\u001b` or `\u202e`."""
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def flag_cell(enabled: bool | None) -> Cell:
    """Return the value of the flag as the name of its variant."""
    if enabled is None:
        return Cell("—", dim=True)
    return Cell("on", "green", bold=True) if enabled else Cell("off", "red", bold=True)


def duration(seconds: float | None) -> str:
    """Return a duration with a unit from milliseconds to days."""
    if seconds is None:
        return ""
    if abs(seconds) < 1:
        return f"{seconds * 1000:.{1 if abs(seconds) < 0.01 else 0}f} ms"  # noqa: PLR2004 - below 10 ms with tenths
    for limit, unit, name in ((_MINUTE, 1.0, "s"), (_HOUR, _MINUTE, "min"), (2 * _DAY, _HOUR, "h")):
        if abs(seconds) < limit:
            return f"{seconds / unit:.{1 if abs(seconds) < 10 * unit else 0}f} {name}"
    return f"{seconds / _DAY:.0f} days"


def local_time(when: datetime | None) -> str:
    """Return the local time; in a pipe with its offset from UTC, since it may be read elsewhere."""
    form = "%Y-%m-%d %H:%M:%S" if sys.stdout.isatty() else "%Y-%m-%d %H:%M:%S %z"
    return "" if when is None else when.astimezone().strftime(form)


def print_json(document: Mapping[str, object]) -> None:
    """Print a JSON object on one line."""
    click.echo(printable(json.dumps(document, ensure_ascii=False)))


def print_line(*parts: str | Cell) -> None:
    """Print a line of parts with spaces between."""
    click.echo(" ".join(_cell(part).styled() for part in parts))


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str | Cell]]) -> None:
    """Print aligned columns without the empty ones; in a pipe an empty cell is `-`, so that columns can be counted."""
    table = [[_cell(part) for part in row] for row in rows]
    shown = [column for column in range(len(heads)) if any(row[column].text for row in table)]
    if not sys.stdout.isatty():
        table = [[cell if cell.text else Cell("-") for cell in row] for row in table]
    lines = [[Cell(head, dim=True) for head in heads], *table]
    widths = [max(len(printable(line[column].text)) for line in lines) for column in shown[:-1]]
    for line in lines:
        click.echo("  ".join(line[column].styled(width) for column, width in zip(shown, [*widths, 0], strict=False)))


def _cell(part: str | Cell) -> Cell:
    return part if isinstance(part, Cell) else Cell(part)
