"""Ports for servers that cannot be handed a socket that listens already."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

__all__ = ["BUS_OFFSET", "free_port"]

BUS_OFFSET = 10_000
"""A node of a Redis cluster listens on its port and on this much more besides."""

_FIRST, _LAST = 12_000, 21_999
"""Below the range from which systems give ports to clients (32768 and up on Linux), the port of the bus included."""

_locks = os.open(Path(tempfile.gettempdir(), f"external-oms-test-ports-{os.getuid()}"), os.O_RDWR | os.O_CREAT, 0o600)
_reserved: set[int] = set()


def free_port() -> int:
    """Reserve a loopback port, and the port of its cluster bus, until this process ends.

    A port that the system gives out by `bind(0)` may be given to somebody else before the server under test takes it.
    This one is outside of that range, and locked against the other processes that run tests.
    """
    while True:
        port = random.SystemRandom().randint(_FIRST, _LAST)
        if port in _reserved:
            continue
        try:
            fcntl.lockf(_locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
            for number in (port, port + BUS_OFFSET):
                socket.create_server(("127.0.0.1", number)).close()
        except OSError:
            continue
        _reserved.add(port)
        return port
