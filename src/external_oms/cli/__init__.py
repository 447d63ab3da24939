"""The command `external-oms`."""

from __future__ import annotations

import click

import external_oms
from external_oms.cli import demo, doctor, serve, status, switch, tools
from external_oms.cli.base import CLIGroup

__all__ = ["main"]


@click.group(cls=CLIGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(external_oms.__version__, "--version", prog_name="external-oms", message="%(prog)s %(version)s")
def main() -> None:
    """One flag, external_oms_enabled: see it, switch it, serve it.

    Settings come from the environment (EXTERNAL_OMS_<NAME>) and from the TOML file that EXTERNAL_OMS_CONFIG_FILE names.
    Exit codes: 0 done, 1 failed, 2 refused (an argument or a setting), 3 sent with an unknown outcome.
    """


for command in (demo.demo, serve.emulate, serve.serve, doctor.doctor, tools.keys, tools.webhook):
    main.add_command(command)
for command in (status.status, status.watch, status.history, switch.enable, switch.disable):
    main.add_command(command)
