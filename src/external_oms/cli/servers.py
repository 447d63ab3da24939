"""`serve` and `emulate`: what runs until it is told to end."""

from __future__ import annotations

import logging
import os
import shlex
import sys

import click

from external_oms.cli.endings import endable, wait_to_be_ended
from external_oms.cli.frame import fail
from external_oms.cli.place import with_place
from external_oms.cli.reaching import environment_of
from external_oms.config import FLAG_KEY
from external_oms.emulator import ConfigAPIEmulator
from external_oms.settings import Settings
from external_oms.tenants import is_tenant_name
from external_oms.web.serving import DEFAULT_BIND, THREADS, Serving, check, is_private, is_taken, run
from external_oms.wiring import make_store

__all__ = ["emulate", "serve"]

MAX_WORKERS = 4
"""More workers than cores gain nothing here, and four answer some thousand requests a second."""


def _default_workers() -> int:
    return min(MAX_WORKERS, max(2, os.cpu_count() or 1))


@click.command(short_help="Serve webhook, API, OFREP and dashboard.")
@click.option(
    "--bind", default=DEFAULT_BIND, show_default=True, metavar="ADDRESS", help="host:port, unix:/path, fd://N."
)
@click.option("--workers", type=click.IntRange(1, 64), help="Processes; 2 to 4, by the cores, unless it is given.")
@click.option(
    "--threads",
    type=click.IntRange(1, 1000),
    default=THREADS,
    show_default=True,
    help="Threads of each, beside those of event streams.",
)
@click.option("--preload", is_flag=True, help="Make the app before the workers are forked.")
@click.option("--name-members", is_flag=True, help="Answers name the process that gave them, in External-OMS-Member.")
@click.option("--insecure", is_flag=True, help="Without credentials; on loopback only.")
def serve(bind: str, workers: int | None, threads: int, preload: bool, name_members: bool, insecure: bool) -> None:
    """Serve the webhook, the API, OFREP and the dashboard, with several workers, until Ctrl-C or SIGTERM.

    The workers share the store; unless the setting `store` names one, it is a file in the user's state directory.
    """
    settings = with_place(Settings())
    if insecure:
        settings = settings.replaced(insecure=True)
    _check_bind(bind, insecure=settings.insecure)
    serving = Serving(bind, workers or _default_workers(), threads, preload, name_members)
    check(settings, serving)
    make_store(settings).close()  # what is wrong with it is told here, in one line, and not by each worker
    _log_to_stderr()
    run(settings, serving)


def _check_bind(bind: str, *, insecure: bool) -> None:
    try:
        private, taken = is_private(bind), is_taken(bind)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--bind") from error
    if insecure and not private:
        raise click.BadParameter("without credentials (insecure) it must be on loopback", param_hint="--bind")
    if taken:
        fail(f"{bind} cannot be had: somebody listens there, or it is no address of this host; see --bind")


def _log_to_stderr() -> None:
    """Our lines between gunicorn's, in its form."""
    form = logging.Formatter("[%(asctime)s] [%(process)d] [%(levelname)s] %(message)s", "%Y-%m-%d %H:%M:%S %z")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(form)
    logger = logging.getLogger("external_oms")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


@click.command(short_help="Run an emulator of the config API.")
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=0, help="The port on loopback; 0, the default, takes a free one."
)
@click.option(
    "--tenant", "tenants", multiple=True, metavar="NAME", help="A tenant, acme-staging unless given; repeatable."
)
@click.option("--enabled", is_flag=True, help="Start with the flag on.")
@click.option(
    "--shape", type=click.Choice(["wrapped", "bare"]), default="wrapped", show_default=True, help="The answers' shape."
)
def emulate(port: int, tenants: tuple[str, ...], enabled: bool, shape: str) -> None:
    """Run an emulator of the config API and of its token endpoint on loopback, until Ctrl-C.

    Prints the settings that reach it, as lines for a shell.
    """
    for name in tenants:
        if not is_tenant_name(name):
            raise click.BadParameter("a tenant's name is [a-z0-9-], such as acme-staging", param_hint="--tenant")
    if port and is_taken(f"127.0.0.1:{port}"):
        fail(f"port {port} is taken; choose another with --port, or leave it out")
    emulator = ConfigAPIEmulator(
        tenants or ("acme-staging",), enabled=enabled, shape="bare" if shape == "bare" else "wrapped", port=port
    )
    with endable(), emulator:
        _print_emulator(emulator)
        wait_to_be_ended()


def _print_emulator(emulator: ConfigAPIEmulator) -> None:
    for name, value in environment_of(emulator).items():
        click.echo(f"export {name}={shlex.quote(value)}")
    control = f"{emulator.origin}/_control/tenants/{emulator.tenants[0]}"
    click.echo(f"# {FLAG_KEY} at {emulator.origin}, until Ctrl-C. Switch it behind everybody's back:")
    click.echo(f"""#   curl -X PUT --json '{{"enabled": true}}' {control}""")
    click.echo("# Let it misbehave, and behave again:")
    click.echo(f"""#   curl --json '{{"status": 503, "times": 10}}' {control}/faults""")
    click.echo(f"#   curl -X DELETE {control}/faults")
