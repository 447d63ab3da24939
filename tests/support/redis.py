"""A real redis-server and a TCP proxy in front of it, both in the hands of a test."""

from __future__ import annotations

import select
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import redis

from tests.support.ports import BUS_OFFSET, free_port
from tests.support.requirements import require_redis
from tests.support.waiting import wait_until

__all__ = ["RedisProxy", "RedisServer"]


class RedisServer:
    """One server on a loopback port, without a file: what it forgets is gone.

    Args:
        directory: Where it may write.
        options: Further options of its command line.
        configuration: A file of options.
        sentinel: Whether it is a Sentinel.
        in_cluster: Whether it is a node of a cluster.
    """

    def __init__(
        self,
        directory: Path,
        *options: str,
        configuration: Path | None = None,
        sentinel: bool = False,
        in_cluster: bool = False,
    ) -> None:
        self.port = free_port()
        self.bus = self.port + BUS_OFFSET
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._directory = directory
        self._options = options
        if in_cluster:
            file = f"nodes-{self.port}.conf"
            own = ("--cluster-enabled", "yes", "--cluster-config-file", file)
            self._options = (*options, *own)
        self._configuration = configuration
        self._sentinel = sentinel
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        command = [require_redis(), *([str(self._configuration)] if self._configuration else [])]
        command += ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._directory)]
        if self._sentinel:
            command.append("--sentinel")
        else:
            command += ["--save", "", "--appendonly", "no", "--loglevel", "warning"]
            command += ["--repl-diskless-sync-delay", "0", *self._options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with self.client() as client:
                wait_until(lambda: self._answers(client), message="redis-server does not answer")
        except AssertionError:
            self.stop()
            raise

    @staticmethod
    def _answers(client: redis.Redis) -> bool:
        try:
            return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False

    @contextmanager
    def client(self) -> Iterator[redis.Redis]:
        """The test's own client."""
        client = redis.Redis(port=self.port, decode_responses=True, socket_timeout=5, protocol=2)
        try:
            yield client
        finally:
            client.close()

    def freeze(self) -> None:
        """It takes connections and bytes, as the kernel does it, and never answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def flush(self) -> None:
        with self.client() as client:
            client.flushall()

    def stop(self) -> None:
        """Kill it: there is no file, so it comes back empty."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def command(self, *parts: str | int) -> object:
        """Run any command."""
        with self.client() as client:
            return client.execute_command(*parts)  # type: ignore[no-untyped-call]  # redis-py has it without types

    def holds(self) -> list[str]:
        """Its keys."""
        with self.client() as client:
            return [str(key) for key in client.scan_iter("*", count=1000)]

    def restart(self) -> None:
        self.stop()
        self.start()


class RedisProxy:
    """Passes bytes between clients and a server, until it is told to swallow them or to cut.

    Args:
        port: The server's port; can be set to another server's at any time.
        context: Speaks TLS with the clients, as a load balancer in front of Redis does, where one is given.

    Attributes:
        subscriptions: The clients' ends of the connections that subscribed, in order; setting the event makes one deaf.
    """

    def __init__(self, port: int, *, context: ssl.SSLContext | None = None) -> None:
        self.target = port
        self._context = context
        self.swallows = False
        self._pairs: list[tuple[socket.socket, socket.socket, threading.Event]] = []
        self.subscriptions: list[tuple[socket.socket, threading.Event]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._closing = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while not self._closing:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target), timeout=1.0)
            except OSError:
                near.close()
                continue
            if self._context is not None:
                near = self._context.wrap_socket(near, server_side=True, do_handshake_on_connect=False)
            deaf = threading.Event()
            self._pairs.append((near, far, deaf))
            thread = threading.Thread(target=self._pump, args=(near, far, deaf), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _pump(self, near: socket.socket, far: socket.socket, deaf: threading.Event) -> None:
        other = {near: far, far: near}
        with near, far, suppress(OSError, ValueError):
            if isinstance(near, ssl.SSLSocket):
                near.do_handshake()
            while not self._closing:
                for ready in select.select([near, far], [], [], 0.1)[0]:
                    received = ready.recv(65_536)
                    if not received:
                        return
                    if ready is near and b"SUBSCRIBE" in received:
                        self.subscriptions.append((near, deaf))
                    if not (self.swallows or deaf.is_set()):
                        other[ready].sendall(received)

    @property
    def living(self) -> int:
        """How many connections pass bytes."""
        return sum(near.fileno() >= 0 and not deaf.is_set() for near, _, deaf in self._pairs)

    def deafen(self) -> None:
        """Swallow everything on the connections there are now; new ones work."""
        for _, _, deaf in self._pairs:
            deaf.set()

    def cut(self) -> None:
        """Close every connection."""
        for near, far, _ in self._pairs:
            for end in (near, far):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._pairs = []

    def close(self) -> None:
        self._closing = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(2.0)
