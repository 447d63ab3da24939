"""`doctor`: prints what the examination finds, a line as soon as it is found."""

from __future__ import annotations

import os

import click

from external_oms.cli.checks import Finding, Verdict, examine, origins
from external_oms.cli.frame import Code
from external_oms.cli.place import with_place
from external_oms.cli.printing import cell, print_table, say
from external_oms.clock import SYSTEM_CLOCK
from external_oms.errors import SettingsError
from external_oms.settings import Settings

__all__ = ["doctor"]

_STYLES = {Verdict.OK: "green", Verdict.NOTE: "yellow", Verdict.FAIL: "bold red"}


@click.command(short_help="Look at settings, token, read, clock and store.")
def doctor() -> None:
    """Look at every setting, the token and its scopes, the read, the clock and the store.

    One line each, and what to do where one fails. Exits with 1 where one does.
    """
    failed = False
    try:
        settings = Settings()
        placed = with_place(settings)
    except SettingsError as error:
        _print(Finding("settings", Verdict.FAIL, str(error), "the table of settings is in docs/settings.md"))
        click.get_current_context().exit(Code.FAILED)
    rows = list(origins(settings, os.environ))
    print_table(
        ("SETTING", "VALUE", "FROM"),
        [[name, value, cell(origin, "dim" if origin == "default" else "bold")] for name, value, origin in rows],
    )
    click.echo()
    for finding in examine(placed, clock=SYSTEM_CLOCK):
        _print(finding)
        failed |= finding.verdict is Verdict.FAIL
    if failed:
        click.get_current_context().exit(Code.FAILED)


def _print(finding: Finding) -> None:
    advice = [cell(f"— {finding.advice}", "bold")] if finding.advice else []
    verdict = cell(f"{finding.verdict:<4}", _STYLES[finding.verdict])
    say(verdict, cell(f"{finding.subject:<8}", "bold"), finding.said, *advice)
