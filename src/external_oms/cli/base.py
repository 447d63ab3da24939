"""What the commands share: exit codes, errors, settings, the service, options, and how a running command is stopped."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

import click

from external_oms.cli.output import printable
from external_oms.errors import ExternalOMSError, SettingsError, TenantError, WriteOutcomeUnknown
from external_oms.settings import Settings
from external_oms.wiring import Service, build_service

__all__ = ["CLIGroup", "CommandError", "ExitCode", "deferred_signals", "json_option", "load_settings"]
__all__ += ["open_service", "stoppable", "tenant_option"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

tenant_option = click.option("--tenant", metavar="NAME", help="The tenant; by default all, or the only one.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")


class ExitCode(IntEnum):
    """The exit codes, as docs/commands.md lists them."""

    DONE = 0
    FAILED = 1
    REFUSED = 2
    UNKNOWN = 3
    INTERRUPTED = 130


class CommandError(click.ClickException):
    """The command ends with an exit code and one line on stderr."""

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = code  # type: ignore[misc] # click reads it from the object, and declares it for the class

    def format_message(self) -> str:
        """Return the message as one line of printable text."""
        return printable(" ".join(self.message.split()))


class CLIGroup(click.Group):
    """The group of all commands: gives every error of this package its exit code."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - the signature of click
        """Run the command."""
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            ctx.color = False
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # some terminals have no dash and no arrow
        try:
            return super().invoke(ctx)
        except (SettingsError, TenantError) as error:
            raise CommandError(str(error), ExitCode.REFUSED) from error
        except WriteOutcomeUnknown as error:
            raise CommandError(str(error), ExitCode.UNKNOWN) from error
        except ExternalOMSError as error:
            raise CommandError(str(error)) from error
        except KeyboardInterrupt:
            ctx.exit(ExitCode.INTERRUPTED)


def load_settings() -> Settings:
    """Return the settings of the environment, with a store in the user's state directory if they name none.

    The name of its file depends on the addresses of the tenants, so a value that was read from an emulator, or from
    another environment, is never shown for a tenant of the same name elsewhere.
    """
    settings = Settings()
    if "store" in settings.model_fields_set:
        return settings
    addresses = {name: reached.config_url(name) for name, reached in settings.by_tenant().items()}
    digest = hashlib.sha256(json.dumps(addresses, sort_keys=True).encode()).hexdigest()[:12]
    state = Path(os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser())
    if not state.is_absolute():
        raise SettingsError("store", "is not set, and there is no home directory; set it, or XDG_STATE_HOME")
    with suppress(OSError):  # the store reports what is wrong with the directory
        state.mkdir(mode=0o700, parents=True, exist_ok=True)  # the mode is that of the XDG specification
    return settings.replaced(store=f"sqlite:///{state}/external-oms/state-{digest}.db")


@contextmanager
def open_service(*, background: bool = False) -> Iterator[Service]:
    """Build the components that the environment configures, which read on demand unless `background`; close them."""
    settings = load_settings()
    service = build_service(settings if background else settings.replaced(refresh="lazy"))
    try:
        yield service
    finally:
        service.close()


class _Stopped(BaseException):
    """A signal asked the process to end."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP end the block normally; further ones are ignored while it ends."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise _Stopped

    with _handled(stop), suppress(_Stopped):
        yield


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Hold the same signals back until the block has ended."""
    received: list[int] = []
    with _handled(lambda number, _frame: received.append(number)):
        yield
    if received:
        signal.raise_signal(received[0])


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
