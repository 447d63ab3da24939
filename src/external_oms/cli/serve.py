"""`serve` and `emulate`: servers that run until they are stopped."""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import socket
import sys
import threading
from contextlib import suppress
from typing import Literal

import click

from external_oms.cli.base import CommandError, load_settings, stoppable
from external_oms.config import FLAG_KEY
from external_oms.emulator import ConfigAPIEmulator
from external_oms.tenants import is_tenant_name
from external_oms.web.serving import DEFAULT_BIND, THREADS, Serving, check, is_private, run
from external_oms.wiring import make_store

__all__ = ["emulate", "serve"]

MAX_DEFAULT_WORKERS = 4  # they answer some thousand requests a second; more workers than cores gain nothing
ADDRESSES = "host:port, [ipv6]:port, unix:/path or fd://N"


@click.command(short_help="Serve webhook, API, OFREP and dashboard.")
@click.option("--bind", default=DEFAULT_BIND, show_default=True, metavar="ADDRESS", help=f"{ADDRESSES}.")
@click.option("--workers", type=click.IntRange(1, 64), help="Processes; by default 2 to 4, as there are cores.")
@click.option("--threads", type=click.IntRange(1, 1000), default=THREADS, show_default=True, help="Of each worker.")
@click.option("--preload", is_flag=True, help="Create the app before the workers are forked.")
@click.option("--name-members", is_flag=True, help="Name the process of each response in External-OMS-Member.")
@click.option("--insecure", is_flag=True, help="Start without credentials; on loopback only.")
def serve(bind: str, workers: int | None, threads: int, preload: bool, name_members: bool, insecure: bool) -> None:
    """Serve the webhook, the API, OFREP and the dashboard with several workers, until Ctrl-C or SIGTERM.

    The workers share the store. If the setting `store` is not set, it is a file in the user's state directory.
    """
    settings = load_settings()
    if insecure:
        settings = settings.replaced(insecure=True)
    _check_bind(bind, loopback_only=settings.insecure)
    workers = workers or min(MAX_DEFAULT_WORKERS, max(2, os.cpu_count() or 1))
    serving = Serving(bind, workers, threads, preload, name_members)
    check(settings, serving)
    make_store(settings).close()  # reports what is wrong once, and not from every worker
    _log_to_stderr()
    run(settings, serving)


def _check_bind(bind: str, *, loopback_only: bool) -> None:
    private = None
    with suppress(ValueError):
        private = is_private(bind)
    if private is None or ("://" in bind and not re.fullmatch(r"fd://\d+", bind)):
        raise click.BadParameter(f"{bind!r} given; must be {ADDRESSES}", param_hint="--bind")
    if loopback_only and not private:
        raise click.BadParameter("must be on loopback without credentials (insecure)", param_hint="--bind")
    if bind.startswith(("unix:", "fd://")):
        return
    host, _, port = bind.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host.strip("[]"), int(port)), family=family).close()
    except OSError as error:
        raise CommandError(f"cannot bind to {bind}: {_reason(error)}; choose another address with --bind") from error


def _reason(error: OSError) -> str:
    reasons = {errno.EADDRINUSE: "it is in use", errno.EADDRNOTAVAIL: "this host has no such address"}
    number = error.errno or 0
    return reasons.get(number, os.strerror(number) if number > 0 else "the host is unknown")  # negative: no address


def _log_to_stderr() -> None:
    """Log in the format of gunicorn, between its lines."""
    form = logging.Formatter("[%(asctime)s] [%(process)d] [%(levelname)s] %(message)s", "%Y-%m-%d %H:%M:%S %z")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(form)
    logger = logging.getLogger("external_oms")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


@click.command(short_help="Run an emulator of the config API.")
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=0, help="On loopback; 0, the default, takes a free one."
)
@click.option("--tenant", "tenants", multiple=True, default=["acme-staging"], metavar="NAME", help="Can be repeated.")
@click.option("--enabled", is_flag=True, help="Start with the flag on.")
@click.option(
    "--shape", type=click.Choice(["wrapped", "bare"]), default="wrapped", show_default=True, help="Of answers."
)
def emulate(port: int, tenants: tuple[str, ...], enabled: bool, shape: Literal["wrapped", "bare"]) -> None:
    """Run an emulator of the config API and of its token endpoint on loopback, until Ctrl-C.

    Prints the settings with which an application runs against it, as lines for a shell.
    """
    for name in tenants:
        if not is_tenant_name(name):
            raise click.BadParameter("a tenant's name is [a-z0-9-], such as acme-staging", param_hint="--tenant")
    emulator = ConfigAPIEmulator(tenants, enabled=enabled, shape=shape, port=port)
    with stoppable():
        try:
            emulator.start()
        except OSError as error:
            raise CommandError(f"cannot listen on port {port}: {_reason(error)}; choose another with --port") from error
        with emulator:
            _print_environment(emulator)
            threading.Event().wait()


def _print_environment(emulator: ConfigAPIEmulator) -> None:
    for name, value in emulator.environment().items():
        click.echo(f"export {name}={shlex.quote(value)}")
    control = f"{emulator.origin}/_control/tenants/{emulator.tenants[0]}"
    click.echo(f"""\
# {FLAG_KEY} at {emulator.origin}, until Ctrl-C. An application, its webhook and
# `external-oms webhook send` work with these settings; the server does with `external-oms serve --insecure`.
# Change the flag as another client of the API does:
#   curl -X PUT --json '{{"enabled": true}}' {control}
# Let requests fail, and end that:
#   curl --json '{{"status": 503, "times": 10}}' {control}/faults
#   curl -X DELETE {control}/faults""")
