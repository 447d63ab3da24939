"""`keys new`: a key is shown once and kept nowhere; what recognises it is its hash."""

from __future__ import annotations

import sys

import click

from external_oms.cli.printing import print_json
from external_oms.web.keys import Role, new_key

__all__ = ["keys"]


@click.group()
def keys() -> None:
    """Keys for the HTTP API and the dashboard."""


@keys.command(short_help="Make a key, and the entry of api_keys that recognises it.")
@click.option("--name", required=True, metavar="NAME", help="Whose it is; it stands in the history.")
@click.option("--role", required=True, type=click.Choice([role.word for role in Role]), help="What it may do.")
@click.option("--json", "as_json", is_flag=True, help="JSON, one object a line.")
def new(name: str, role: str, as_json: bool) -> None:
    """Make a key, and the entry of api_keys that recognises it.

    The key is shown now and never again: neither is stored. Give the key to its owner, the entry to the server.
    """
    try:
        key, entry = new_key(name, Role.named(role))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--name") from error
    if as_json:
        print_json({"key": key, "entry": entry})
        return
    if sys.stdout.isatty():
        click.echo(f"The key of {name} ({role}), shown this once:\n\n  {key}\n")
        click.echo(
            f"Its entry, for the setting api_keys (EXTERNAL_OMS_API_KEYS; several with commas between):\n\n  {entry}"
        )
    else:
        click.echo(f"key={key}\nentry={entry}")
