"""`enable` and `disable`: what is asked before a value is written, and how it ended, in words."""

from __future__ import annotations

import json
import sys

import click

from external_oms.cli.frame import Code, actor, fail, opened, tenant_option
from external_oms.cli.printing import cell, flag, moment, say
from external_oms.config import FLAG_KEY
from external_oms.errors import ReadError
from external_oms.policy import State
from external_oms.wiring import Service

__all__ = ["disable", "enable"]

MAX_REASON = 500
"""Characters; as many as the HTTP API takes."""

_tenant = tenant_option
_reason = click.option("--reason", default="", metavar="TEXT", help="Why; it stands in the history.")
_yes = click.option("--yes", "-y", is_flag=True, help="Ask nothing.")
_dry_run = click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")


@click.command(short_help="Switch the flag on, in the config API.")
@_tenant
@_reason
@_yes
@_dry_run
def enable(tenant: str | None, reason: str, yes: bool, dry_run: bool) -> None:
    """Write `true` to the config API: the external OMS owns the tenant's orders."""
    _switch(tenant, True, reason=reason, yes=yes, dry_run=dry_run)


@click.command(short_help="Switch the flag off, in the config API.")
@_tenant
@_reason
@_yes
@_dry_run
def disable(tenant: str | None, reason: str, yes: bool, dry_run: bool) -> None:
    """Write `false` to the config API: the tenant's orders are its own again."""
    _switch(tenant, False, reason=reason, yes=yes, dry_run=dry_run)


def _switch(tenant: str | None, wanted: bool, *, reason: str, yes: bool, dry_run: bool) -> None:
    reason = _checked(reason)
    with opened() as service:
        name = service.cache.tenant_of(tenant)
        if not (yes or dry_run or sys.stdin.isatty()):
            fail("nobody can be asked here, for stdin is no terminal; add --yes, or --dry-run", Code.REFUSED)
        before = _before(service, name, dry_run=dry_run)
        if before is not None and before.enabled is wanted:
            say(cell(name, "bold"), FLAG_KEY, "is", flag(wanted), "already; nothing was written")
            return
        old = "unknown" if before is None else flag(before.enabled).plain
        if dry_run:
            _announce(service, name, old, wanted)
            return
        if not yes:
            new = flag(wanted).plain
            click.confirm(f"Switch {FLAG_KEY} of {name} from {old} to {new}?", abort=True)
            reason = reason or _checked(click.prompt("Why? (may be empty)", default="", show_default=False))
        after = service.operations.set_enabled(name, enabled=wanted, actor=actor(), reason=reason)
        _report(after, old, wanted)


def _checked(reason: str) -> str:
    if len(reason) > MAX_REASON or not reason.isprintable():
        raise click.UsageError(f"a reason is one line of text, {MAX_REASON} characters at most")
    return reason


def _before(service: Service, tenant: str, *, dry_run: bool) -> State | None:
    """What the API says now; None where it cannot be read, which keeps nobody from switching in need."""
    try:
        return service.operations.refresh(tenant)
    except ReadError as error:
        if dry_run:
            raise
        click.echo(f"The present value is not known: {error}", err=True)
        return None


def _announce(service: Service, tenant: str, old: str, wanted: bool) -> None:
    reached = service.settings.by_tenant()[tenant]
    say(cell(tenant, "bold"), FLAG_KEY, f"would go from {old} to", flag(wanted))
    body = json.dumps({"enabled": wanted})
    say(f"by {reached.write_method} {reached.config_url(tenant)} with {body}; nothing was written")


def _report(after: State, old: str, wanted: bool) -> None:
    if after.enabled is not wanted:
        problem = f"{after.tenant}: the API took the value and still answers the old one"
        fail(f"{problem}; look again with `external-oms status`", Code.UNKNOWN)
    since = f", changed upstream {moment(after.updated_at)}" if after.updated_at else ""
    told = f"(it was {old}; read back at generation {after.generation}{since})"
    say(cell(after.tenant, "bold"), FLAG_KEY, "is", flag(wanted), cell(told, "dim"))
