"""Servers that no framework would make: a socket, and a script of what to do with each connection."""

from __future__ import annotations

import re
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self

__all__ = ["Hostile", "Line"]


class Line:
    """One connection, as a script sees it."""

    def __init__(self, connection: socket.socket, over: threading.Event) -> None:
        self._connection = connection
        self.over = over

    def request(self) -> bytes:
        """The whole request, its body by its Content-Length; empty where the other side has closed."""
        received = b""
        while not (head := received.partition(b"\r\n\r\n"))[1] or len(head[2]) < _length(head[0]):
            more = self._connection.recv(65_536)
            if not more:
                break
            received += more
        return received

    def receive(self, size: int) -> bytes:
        """What has arrived, up to so many bytes; empty if the other side has closed."""
        return self._connection.recv(size)

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self._connection.sendall(part)

    def drip(self, content: bytes, every_seconds: float = 0.05) -> None:
        """A byte now and then, for as long as the other side listens."""
        for place in range(len(content)):
            self.send(content[place : place + 1])
            if self.over.wait(every_seconds):
                return

    def hold(self) -> None:
        """Neither send nor close until the test is over."""
        self.over.wait(30)


def _length(head: bytes) -> int:
    found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return 0 if found is None else int(found[1])


class Hostile:
    """A loopback server that runs a script per connection, each in a thread; all end with the context.

    `connections` counts what was accepted, `requests` holds what scripts have put there.
    """

    def __init__(self, script: Callable[[Line], None], *, context: ssl.SSLContext | None = None) -> None:
        self._script = script
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._connections: list[socket.socket] = []
        self.connections = 0
        self.requests: list[bytes] = []

    @property
    def url(self) -> str:
        scheme = "http" if self._context is None else "https"
        return f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True, name="hostile")
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            kept = connection.dup()  # a wrapped socket detaches the one it wraps
            self._connections.append(kept)
            self._start(self._serve, connection, kept)

    def _serve(self, connection: socket.socket, kept: socket.socket) -> None:
        with suppress(OSError), kept, connection:
            if self._context is None:
                self._script(Line(connection, self._over))
                return
            with self._context.wrap_socket(connection, server_side=True) as wrapped:
                self._script(Line(wrapped, self._over))
