"""How many workers the server around us runs, as far as can be seen from inside one of them. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

__all__ = ["worker_count"]

_LONG = "--workers"
_SHORT = "-w"


def worker_count(argv: Sequence[str], environ: Mapping[str, str], *, uwsgi_processes: int | None) -> int:
    """The number of worker processes, >= 1; 1 where none can be seen.

    gunicorn takes its number from its arguments, else from GUNICORN_CMD_ARGS, else from WEB_CONCURRENCY. A number in
    its configuration file cannot be seen from here.

    Args:
        argv: The arguments of this process.
        environ: Its environment.
        uwsgi_processes: What uWSGI's own module says; None under another server.
    """
    if uwsgi_processes is not None:
        return max(1, uwsgi_processes)
    if not environ.get("SERVER_SOFTWARE", "").startswith("gunicorn"):
        return 1
    try:
        more = shlex.split(environ.get("GUNICORN_CMD_ARGS", ""))
    except ValueError:
        more = []
    for arguments in (argv, more):
        named = _named(arguments)
        if named is not None:
            return named
    return _whole(environ.get("WEB_CONCURRENCY", "")) or 1


def _named(arguments: Sequence[str]) -> int | None:
    """The last number given for the workers, as the last one counts."""
    found: int | None = None
    for place, argument in enumerate(arguments):
        if argument in {_LONG, _SHORT}:
            following = arguments[place + 1] if place + 1 < len(arguments) else ""
            found = _whole(following) or found
        elif argument.startswith(f"{_LONG}="):
            found = _whole(argument.removeprefix(f"{_LONG}=")) or found
        elif argument.startswith(_SHORT) and not argument.startswith("--"):
            found = _whole(argument.removeprefix(_SHORT).removeprefix("=")) or found
    return found


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 4 and int(text) > 0 else None  # noqa: PLR2004 - no server has 10,000 workers
