"""What every command has in common: how it fails, which code it exits with, what its parts are made from."""

from __future__ import annotations

import getpass
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, NoReturn, TypeVar

import click

from external_oms.cli.place import with_place
from external_oms.errors import ExternalOMSError, SettingsError, TenantError, WriteOutcomeUnknown
from external_oms.settings import Settings
from external_oms.wiring import Service, build_service

__all__ = ["Code", "Edge", "actor", "fail", "json_option", "opened", "tenant_option"]

F = TypeVar("F", bound=Callable[..., Any])

_UNSAFE = re.compile(r"[^\w.@+-]")


class Code(IntEnum):
    """What an exit code means; documented in docs/commands.md."""

    DONE = 0
    """Done as asked, or there was nothing to do."""
    FAILED = 1
    """Not done: the API, the token endpoint, the store or a check failed, or nobody agreed."""
    REFUSED = 2
    """Nothing was tried: an argument or a setting is wrong."""
    UNKNOWN = 3
    """A value was sent to the API, and it is not known, or not seen yet, whether it took it."""
    INTERRUPTED = 130
    """Ctrl-C ended a command that had not finished: 128 and the number of the signal, as shells have it."""
    UNREAD = 141
    """Nobody read the output any more (`status | head`): 128 and the number of SIGPIPE."""


def fail(message: str, code: Code = Code.FAILED) -> NoReturn:
    """End the command with one clear line on stderr.

    Raises:
        Exit: Always, with the code.
    """
    click.echo("Error: " + " ".join(message.split()), err=True)
    raise click.exceptions.Exit(code)


class Edge(click.Group):
    """The outermost group: every error of ours becomes a line and a code here, and a pipe may close at any time."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's own form
        """Run the command, and fail in words."""
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal that knows no arrow must not end a command
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except (SettingsError, TenantError) as error:
            fail(str(error), Code.REFUSED)
        except WriteOutcomeUnknown as error:
            fail(str(error), Code.UNKNOWN)
        except ExternalOMSError as error:
            fail(str(error))
        except BrokenPipeError:
            _point_stdout_nowhere()
            ctx.exit(Code.UNREAD)
        except KeyboardInterrupt:
            ctx.exit(Code.INTERRUPTED)
        return result


def _point_stdout_nowhere() -> None:
    """What is still buffered must not fail again when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@contextmanager
def opened(*, background: bool = False) -> Iterator[Service]:
    """The parts, made from the environment, and closed at the end.

    Args:
        background: Whether values are read again as they age, where the settings want it; else only when asked for.

    Raises:
        SettingsError: A setting is unknown, malformed or contradicts another.
        StoreError: The store's file cannot be used where it is.
    """
    settings = with_place(Settings())
    service = build_service(settings if background else settings.replaced(refresh="lazy"))
    try:
        yield service
    finally:
        service.close()


def actor() -> str:
    """Who sits at this command line, for the history."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # no entry for this user, as in many containers
        name = f"uid {os.getuid()}"
    return "cli:" + _UNSAFE.sub("_", name)[:60]


def tenant_option(command: F) -> F:
    """`--tenant`."""
    return click.option("--tenant", metavar="NAME", help="The tenant; may be left out where one is configured.")(
        command
    )


def json_option(command: F) -> F:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help="JSON, one object a line.")(command)
