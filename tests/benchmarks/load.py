"""A closed loop of requests over kept connections, in one thread: what a server can do when it is never left alone."""

from __future__ import annotations

import selectors
import socket
import time
from dataclasses import dataclass

__all__ = ["Load", "load", "request_for"]

CONNECTIONS = 8


@dataclass(frozen=True)
class Load:
    """What came of it.

    Attributes:
        per_second: Answers a second.
        median_seconds: Half of them came within that time.
        late_seconds: And 99 of a hundred within that.
    """

    per_second: float
    median_seconds: float
    late_seconds: float

    def __str__(self) -> str:
        median, late = self.median_seconds * 1000, self.late_seconds * 1000
        return f"{self.per_second:6.0f}/s, median {median:5.2f} ms, 99th {late:6.2f} ms"


def request_for(method: str, path: str, key: str, body: bytes = b"") -> bytes:
    """The bytes of a request."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {key}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def load(port: int, request: bytes, seconds: float, connections: int = CONNECTIONS) -> Load:
    """Ask for so long; every answer must be 200."""
    waiting = selectors.DefaultSelector()
    began: dict[socket.socket, float] = {}
    taken: list[float] = []

    def ask(line: socket.socket) -> None:
        began[line] = time.perf_counter()
        line.sendall(request)

    def connect() -> None:
        line = socket.create_connection(("127.0.0.1", port), 10)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        waiting.register(line, selectors.EVENT_READ)
        ask(line)

    for _ in range(connections):
        connect()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for key, _ in waiting.select(1.0):
            line = key.fileobj
            assert isinstance(line, socket.socket)
            if _read_answer(line):
                taken.append(time.perf_counter() - began[line])
                ask(line)
            else:  # the server closed it between two requests
                waiting.unregister(line)
                line.close()
                connect()
    elapsed = time.perf_counter() - start
    for line in [key.fileobj for key in waiting.get_map().values()]:
        assert isinstance(line, socket.socket)
        line.close()
    taken.sort()
    return Load(len(taken) / elapsed, taken[len(taken) // 2], taken[len(taken) * 99 // 100])


def _read_answer(line: socket.socket) -> bool:
    received = line.recv(65_536)
    if not received:
        return False
    assert received.startswith(b"HTTP/1.1 200"), received[:200]
    while not (parts := received.partition(b"\r\n\r\n"))[1]:
        received += line.recv(65_536)
    length = int(parts[0].lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    missing = length - len(parts[2])
    while missing > 0:
        missing -= len(line.recv(65_536))
    return True
