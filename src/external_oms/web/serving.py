"""`external-oms serve`: gunicorn with several processes, each with the whole application.

A thread answers a request that has arrived as a whole. Until then the connection waits in the poller of its worker: a
client that sends slowly, or half a request, occupies no thread, and is closed after `ARRIVAL_SECONDS`. An event stream
holds a thread for as long as it is open, so each worker may have `max_streams` threads beside those for requests.
gunicorn makes a thread when it is first needed; one that only waits costs 50 kB.
"""

from __future__ import annotations

import errno
import os
import resource
import selectors
import shutil
import socket
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from flask import Flask, Response
from gunicorn import util
from gunicorn.app.base import BaseApplication
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers.gthread import TConn, ThreadWorker

from external_oms.errors import SettingsError
from external_oms.heartbeat import member_name
from external_oms.settings import Settings
from external_oms.tenants import is_loopback
from external_oms.web.app import check_credentials, create_app
from external_oms.web.state import DIRECTORY_VARIABLE, instances

__all__ = ["DEFAULT_BIND", "MEMBER_HEADER", "THREADS", "Serving", "Worker", "check", "is_private", "run"]

DEFAULT_BIND = "127.0.0.1:8080"

THREADS = 64
"""Requests that one worker answers at once, beside its event streams: some of them wait for the config API."""

MAX_CONNECTIONS = 10_000
"""Connections of one worker, where the system allows as many files: those that wait cost some kilobytes each."""

MAX_ARRIVING = 4_000
"""Connections of one worker that wait for the rest of a request. One more closes the oldest: an honest request arrives
within milliseconds."""

ARRIVAL_SECONDS = 15.0
"""How long a request may take to arrive, head and body, in seconds."""

BUFFER_BYTES = 128 * 1024
"""How much of a request is read before a thread is needed. A head is refused above it; a larger body is refused by the
application, which reads no further."""

UNREAD_SECONDS = 1.0
"""How long a thread waits for the rest of a body that is larger than the buffer, in seconds."""

GRACE_SECONDS = 10
"""How long a stopping worker goes on with requests that it has begun: twice the default of timeout_seconds."""

MEMBER_HEADER = "External-OMS-Member"
"""Names the process that answered, as `host:pid`, with `Serving.named`."""

_SPARE_FILES = 200
_TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Serving:
    """How to serve.

    Attributes:
        bind: `host:port`, `[address]:port`, `unix:/path`, or `fd://N` for a socket that listens already.
        workers: How many processes, >= 1.
        threads: How many requests each answers at once, beside its event streams, >= 1.
        preload: Whether the application is made before the workers are forked.
        named: Whether each response names the process that gave it, in `External-OMS-Member`.
    """

    bind: str = DEFAULT_BIND
    workers: int = 2
    threads: int = THREADS
    preload: bool = False
    named: bool = False


def is_private(bind: str) -> bool:
    """Return whether the address is on this machine alone; False for a socket that listens already.

    Raises:
        ValueError: It is no address.
    """
    if bind.startswith("unix:"):
        return True
    if "://" in bind:
        return False
    parts = urlsplit(f"//{bind}")
    if parts.port is None or parts.path or parts.username is not None:
        raise ValueError("an address is host:port, [address]:port, unix:/path or fd://N")
    return is_loopback(parts.hostname)


def check(settings: Settings, serving: Serving) -> None:
    """Refuse settings that this server could not serve, or not safely.

    Raises:
        SettingsError: A credential is missing or weak, or the store is not shared by the workers.
    """
    check_credentials(settings)
    if serving.workers > 1 and settings.store.startswith("memory:"):
        raise SettingsError(
            "store",
            f"memory:// is not shared by {serving.workers} workers, so a delivery would reach only one of them; set "
            "store to sqlite:////path/state.db or redis://…, or start one worker (--workers 1)",
        )


def run(settings: Settings, serving: Serving) -> None:
    """Serve, and do not return: the process ends with the server, by SystemExit.

    Args:
        settings: The settings.
        serving: How to serve.

    Raises:
        SettingsError: As `check`.
    """
    check(settings, serving)
    with _shared_metrics():
        _Server(settings, serving).run()


@contextmanager
def _shared_metrics() -> Iterator[None]:
    """Have prometheus-client, which no code has imported yet, count in a directory that all workers share."""
    owner = os.getpid()
    directory = tempfile.mkdtemp(prefix="external-oms-metrics-")
    os.environ[DIRECTORY_VARIABLE] = directory
    try:
        yield
    finally:
        if os.getpid() == owner:  # workers leave through here too
            shutil.rmtree(directory, ignore_errors=True)


def _raise_file_limit() -> int:
    """Let this process open as many files as the system allows, and return how many connections that leaves."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + _SPARE_FILES
    soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, resource.getrlimit(resource.RLIMIT_NOFILE)[0]), hard))
    return max(_SPARE_FILES, min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_FILES))


class _Server(BaseApplication):
    """Our application, and gunicorn's settings for it; no file, argument or variable of gunicorn's is read."""

    def __init__(self, settings: Settings, serving: Serving) -> None:
        self._settings = settings
        self._serving = serving
        super().__init__()

    def load_config(self) -> None:
        """Set gunicorn's settings."""
        serving = self._serving
        connections = _raise_file_limit()
        wanted: dict[str, object] = {
            "bind": serving.bind,
            "workers": serving.workers,
            "worker_class": Worker,
            "threads": serving.threads + self._settings.max_streams,
            "worker_connections": max(connections, serving.threads + self._settings.max_streams + 1),
            "preload_app": serving.preload,
            "graceful_timeout": GRACE_SECONDS,
            "proc_name": "external-oms",
            "child_exit": _forget,
            # Headers of a client move nothing here; ProxyFix reads those of a proxy, with the setting `proxies`.
            "forwarded_allow_ips": "",
            "forwarder_headers": "",
            "secure_scheme_headers": {},
            "control_socket_disable": True,
        }
        for name, value in wanted.items():
            if name in self.cfg.settings:
                self.cfg.set(name, value)

    def load(self) -> Flask:  # type: ignore[override]  # Flask takes a dict for the environ, and gunicorn gives one
        """Return the application, in a worker, or before them with `preload`."""
        app = create_app(self._settings)
        if self._serving.named:
            app.after_request(_name_member)
        return app


def _forget(_arbiter: object, worker: ThreadWorker) -> None:
    """Drop the gauges of a process that has ended; its counts stay in the sums."""
    from prometheus_client import multiprocess  # noqa: PLC0415 - after the variable is set

    multiprocess.mark_process_dead(int(worker.pid))  # type: ignore[no-untyped-call]  # the library has no types here


def _name_member(response: Response) -> Response:
    response.headers[MEMBER_HEADER] = member_name()
    return response


# -- the worker --------------------------------------------------------------------------------------------------------


class Arriving:
    """A request that is arriving: the bytes so far, and whether they are the whole request.

    Args:
        deadline: Until when the rest must be there, on the monotonic clock.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.data = bytearray()
        self.expects_continue = False
        self.is_complete = False
        self._body_at: int | None = None
        self._length = 0
        self._chunk_at: int | None = None

    def feed(self, more: bytes) -> bool:
        """Add bytes; return whether to wait no longer: the request is complete, malformed, or too large to wait for."""
        self.data += more
        if self._body_at is None and not self._parse_head():
            return len(self.data) > BUFFER_BYTES
        if self._chunk_at is not None:
            self.is_complete = self._skip_chunks(self._chunk_at)
        else:
            self.is_complete = len(self.data) >= (self._body_at or 0) + self._length
        return self.is_complete or max(self._length, len(self.data)) > BUFFER_BYTES

    def _parse_head(self) -> bool:
        # Only the last bytes can end the head; the parser of gunicorn refuses what is not HTTP.
        end = self.data.find(b"\r\n\r\n")
        if end < 0:
            return False
        self._body_at = end + 4
        head = bytes(self.data[:end]).lower().split(b"\r\n")
        for line in head[1:]:
            name, _, value = line.partition(b":")
            if name == b"content-length":
                text = value.strip()
                self._length = int(text) if text.isdigit() and len(text) < 16 else 0  # noqa: PLR2004 - refused later
            elif name == b"transfer-encoding":
                self._chunk_at = self._body_at
            elif name == b"expect" and value.strip() == b"100-continue":
                self.expects_continue = True
        return True

    def _skip_chunks(self, at: int) -> bool:
        """Go over the chunks that are there; return whether the last one is, or one is malformed."""
        while (end := self.data.find(b"\r\n", at)) >= 0:
            try:
                size = int(bytes(self.data[at:end]).partition(b";")[0], 16)
            except ValueError:
                return True
            if size <= 0:
                return size < 0 or self.data.find(b"\r\n\r\n", end) >= 0
            following = end + size + 4
            if following > len(self.data):
                return False
            if self.data[following - 2 : following] != b"\r\n":
                return True
            at = self._chunk_at = following
        return False

    def without_expectation(self) -> bytes:
        """Return the bytes without the header that was answered already."""
        if not self.expects_continue or self._body_at is None:
            return bytes(self.data)
        lines = bytes(self.data[: self._body_at]).split(b"\r\n")
        kept = [line for line in lines if not line.lower().startswith(b"expect:")]
        return b"\r\n".join(kept) + bytes(self.data[self._body_at :])


class _Unreader(SocketUnreader):
    """Reads what has arrived, then for a short time from the socket: only a body that is too large has more."""

    deadline = 0.0
    """Until when the socket is read, on the monotonic clock."""

    def chunk(self, *size_hint: int | None) -> bytes:
        """Return the next bytes.

        Raises:
            TimeoutError: They do not come.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the rest of the body does not come")
        self.sock.settimeout(left)
        try:
            return bytes(super().chunk(*size_hint))
        finally:
            self.sock.setblocking(True)


class Worker(ThreadWorker):
    """A threaded worker of gunicorn whose threads are given whole requests.

    It ends its event streams when it stops, so that they do not hold it. It works for any application
    (`--worker-class external_oms.web.serving.Worker`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - gunicorn's own form
        super().__init__(*args, **kwargs)
        self._arriving: OrderedDict[TConn, Arriving] = OrderedDict()

    # -- requests arrive in the poller ---------------------------------------------------------------------------------

    def accept(self, listener: socket.socket) -> None:
        """Accept a connection, and wait for its request."""
        try:
            client, address = listener.accept()
        except OSError as error:  # another worker was faster, the client has gone, or no file is left
            if error.errno in {errno.EMFILE, errno.ENFILE}:
                self._drop_oldest()
            return
        self.nr_conns += 1
        self._await_request(TConn(self.cfg, client, address, listener.getsockname()))

    def on_client_socket_readable(self, conn: TConn, client: socket.socket) -> None:
        """Read the next request of a connection that was kept open."""
        self.poller.unregister(client)
        self.keepalived_conns.remove(conn)
        self._await_request(conn)
        self._receive(conn)

    def _await_request(self, conn: TConn) -> None:
        conn.sock.setblocking(False)
        self._arriving[conn] = Arriving(time.monotonic() + ARRIVAL_SECONDS)
        self.poller.register(conn.sock, selectors.EVENT_READ, lambda _: self._receive(conn))
        if len(self._arriving) > MAX_ARRIVING:
            self._drop_oldest()

    def _receive(self, conn: TConn) -> None:
        arriving = self._arriving.get(conn)
        if arriving is None:
            return
        try:
            more = conn.sock.recv(65_536)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            more = b""
        if not more:
            self._drop(conn)
            return
        expected = arriving.expects_continue
        if arriving.feed(more):
            self._leave_poller(conn)
            self._prepare(conn, arriving)
            self.enqueue_req(conn)
        elif arriving.expects_continue and not expected:
            with suppress(OSError):
                conn.sock.send(_CONTINUE)

    def _prepare(self, conn: TConn, arriving: Arriving) -> None:
        """Give the parser of gunicorn the bytes that have arrived."""
        conn.data_ready = True
        conn.init()
        parser: Any = conn.parser
        if not isinstance(parser.unreader, _Unreader):
            parser.unreader = _Unreader(conn.sock)
        parser.unreader.deadline = time.monotonic() + UNREAD_SECONDS
        parser.unreader.unread(arriving.without_expectation())

    def murder_pending(self) -> None:
        """Close the connections whose request is late."""
        super().murder_pending()
        now = time.monotonic()
        while self._arriving:
            conn, arriving = next(iter(self._arriving.items()))
            if arriving.deadline > now and self.alive:
                break
            if arriving.data:
                with suppress(OSError):
                    conn.sock.send(_TOO_LATE)
            self._drop(conn)

    def _drop_oldest(self) -> None:
        if self._arriving:
            self._drop(next(iter(self._arriving)))

    def _drop(self, conn: TConn) -> None:
        self._leave_poller(conn)
        self.nr_conns -= 1
        conn.close()

    def _leave_poller(self, conn: TConn) -> None:
        self._arriving.pop(conn, None)
        with suppress(KeyError, ValueError, OSError):
            self.poller.unregister(conn.sock)

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:  # noqa: ANN401 - gunicorn's own form
        """Answer a request that is not HTTP, without the text of the sender in the log: it may be a key."""
        if type(exc).__module__.startswith("gunicorn.http"):
            self.log.info("Invalid request: %s", type(exc).__name__)
            with suppress(OSError):
                util.write_error(client, 400, "Bad Request", "")
        else:
            super().handle_error(req, client, addr, exc)

    # -- life and end --------------------------------------------------------------------------------------------------

    def init_process(self) -> None:
        """Serve until told to stop, then shut the providers down."""
        try:
            super().init_process()
        finally:
            for oms in tuple(instances):
                oms.provider.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in order: end the streams, answer requests under way."""
        self._end_streams()
        super().handle_exit(sig, frame)

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at once; the thread of a stream would be waited for."""
        self._end_streams()
        super().handle_quit(sig, frame)

    @staticmethod
    def _end_streams() -> None:
        for oms in tuple(instances):
            # On another thread: this one may have been interrupted while it held a lock that ending a stream takes.
            threading.Thread(target=oms.broker.close, daemon=True).start()
