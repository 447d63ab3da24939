"""The command line: prints and exits; what it prints is decided below it, in the package."""

from __future__ import annotations

import click

import external_oms
from external_oms.cli.demo import demo as demo_command
from external_oms.cli.doctor import doctor as doctor_command
from external_oms.cli.frame import Edge
from external_oms.cli.keys import keys
from external_oms.cli.sending import webhook
from external_oms.cli.servers import emulate, serve
from external_oms.cli.states import history, status, watch
from external_oms.cli.switch import disable, enable

__all__ = ["main"]


@click.group(cls=Edge, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(external_oms.__version__, "--version", prog_name="external-oms", message="%(prog)s %(version)s")
def main() -> None:
    """One flag, external_oms_enabled: see it, switch it, serve it.

    Settings come from the environment (EXTERNAL_OMS_<NAME>) and from the TOML file that EXTERNAL_OMS_CONFIG_FILE names.
    Exit codes: 0 done, 1 failed, 2 refused (an argument or a setting), 3 sent with an unknown outcome.
    """


for command in (demo_command, emulate, serve, status, watch, history, enable, disable, doctor_command, keys, webhook):
    main.add_command(command)
