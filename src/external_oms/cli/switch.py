"""`enable` and `disable`: confirm, write to the config API, and read back."""

from __future__ import annotations

import getpass
import json
import os
import re
import sys

import click

from external_oms.cli.base import CommandError, ExitCode, open_service, tenant_option
from external_oms.cli.output import Cell, flag_cell, local_time, print_line
from external_oms.config import FLAG_KEY
from external_oms.errors import ReadError
from external_oms.policy import State
from external_oms.wiring import Service

__all__ = ["disable", "enable"]

MAX_REASON_LENGTH = 500  # characters; the limit of the HTTP API


def _command(name: str, *, enabled: bool, summary: str, help_text: str) -> click.Command:
    @click.command(name, short_help=summary, help=help_text)
    @tenant_option
    @click.option("--reason", default="", metavar="TEXT", help="Why, for the history.")
    @click.option("--yes", "-y", is_flag=True, help="Do not ask for confirmation.")
    @click.option("--dry-run", is_flag=True, help="Show what would be written, and write nothing.")
    def switch(tenant: str | None, reason: str, yes: bool, dry_run: bool) -> None:
        _switch(tenant, enabled, reason=reason, yes=yes, dry_run=dry_run)

    return switch


enable = _command(
    "enable",
    enabled=True,
    summary="Switch the flag on, in the config API.",
    help_text="Write `true` to the config API: the external OMS owns the tenant's orders.",
)
disable = _command(
    "disable",
    enabled=False,
    summary="Switch the flag off, in the config API.",
    help_text="Write `false` to the config API: the external OMS does not own the tenant's orders.",
)


def _switch(tenant: str | None, wanted: bool, *, reason: str, yes: bool, dry_run: bool) -> None:
    reason = _checked(reason)
    with open_service() as service:
        name = service.cache.tenant_of(tenant)
        if not (yes or dry_run or sys.stdin.isatty()):
            unconfirmed = "stdin is no terminal, so the change cannot be confirmed; add --yes or --dry-run"
            raise CommandError(unconfirmed, ExitCode.REFUSED)
        before = _read(service, name, required=dry_run)
        if before is not None and before.enabled is wanted:
            print_line(Cell(name, bold=True), FLAG_KEY, "is", flag_cell(wanted), "already; nothing was written")
            return
        old, new = "unknown" if before is None else flag_cell(before.enabled).text, flag_cell(wanted).text
        if dry_run:
            reached, body = service.settings.by_tenant()[name], json.dumps({"enabled": wanted})
            print_line(Cell(name, bold=True), FLAG_KEY, f"would go from {old} to", flag_cell(wanted))
            print_line(f"by {reached.write_method} {reached.config_url(name)} with {body}; nothing was written")
            return
        if not yes:
            click.confirm(f"Switch {FLAG_KEY} of {name} from {old} to {new}?", abort=True)
            reason = reason or _checked(click.prompt("Why? (may be empty)", default="", show_default=False))
        after = service.operations.set_enabled(name, enabled=wanted, actor=_actor(), reason=reason)
    if after.enabled is not wanted:
        problem = f"{name}: the API took the value and still answers the old one; check `external-oms status`"
        raise CommandError(problem, ExitCode.UNKNOWN)
    since = f", changed upstream {local_time(after.updated_at)}" if after.updated_at else ""
    read_back = f"(it was {old}; read back at generation {after.generation}{since})"
    print_line(Cell(name, bold=True), FLAG_KEY, "is", flag_cell(wanted), Cell(read_back, dim=True))


def _checked(reason: str) -> str:
    if len(reason) > MAX_REASON_LENGTH or not reason.isprintable():
        raise click.UsageError(f"a reason is one line of at most {MAX_REASON_LENGTH} characters")
    return reason


def _read(service: Service, tenant: str, *, required: bool) -> State | None:
    """Return what the API answers now; None if it cannot be read, which does not prevent a switch in an emergency."""
    try:
        return service.operations.refresh(tenant)
    except ReadError as error:
        if required:
            raise
        click.echo(f"The present value is not known: {error}", err=True)
        return None


def _actor() -> str:
    """Return the name of the user, as the history shows it."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # no entry for this user, as in many containers
        name = f"uid {os.getuid()}"
    return "cli:" + re.sub(r"[^\w.@+-]", "_", name)[:60]
