"""The server as processes: gunicorn, several workers, each with the whole app; how many and of which kind is said here.

Threads, because no evaluation waits: a thread is busy for microseconds, or for one read of the config API. An event
stream holds one for as long as a page is open, so each worker may have as many threads as there may be streams, and
`threads` more, which streams cannot take. A thread that only waits costs 50 kB and no time; gunicorn makes it when it
is first needed. Measured with 500 streams on two workers: docs/ofrep.md. Each worker makes its own app after the fork;
with `preload` the app is made once before it, which the parts are made for.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from urllib.parse import urlsplit

from flask import Flask, Response
from gunicorn.app.base import BaseApplication
from gunicorn.workers.gthread import ThreadWorker

from external_oms.settings import Settings
from external_oms.tenants import is_loopback
from external_oms.web.access import EXTENSION
from external_oms.web.app import create_app
from external_oms.web.metrics import forget, shared_counts
from external_oms.web.parts import Parts

__all__ = ["DEFAULT_BIND", "MEMBER_HEADER", "THREADS", "Serving", "is_private", "is_taken", "run"]

DEFAULT_BIND = "127.0.0.1:8080"

THREADS = 64
"""Per worker, beside those of event streams: so many slow clients, or reads of the config API, at once."""

IDLE_CONNECTIONS = 1000
"""Per worker, beside those that are busy: clients that keep theirs open between evaluations. gunicorn's own number."""

GRACE_SECONDS = 10
"""How long a stopping worker may go on with what it began: twice the default of timeout_seconds."""

MEMBER_HEADER = "External-OMS-Member"
"""Names the process that answered, as `host:pid`, where that is asked for."""


@dataclass(frozen=True, slots=True)
class Serving:
    """How to serve.

    Attributes:
        bind: `host:port`, `[address]:port`, `unix:/path`, or `fd://N` for a socket that listens already.
        workers: How many processes, >= 1.
        threads: How many requests each answers at once, beside its event streams, >= 1.
        preload: Whether the app is made before the workers are forked.
        named: Whether each answer names the process that gave it, in `External-OMS-Member`.
    """

    bind: str = DEFAULT_BIND
    workers: int = 2
    threads: int = THREADS
    preload: bool = False
    named: bool = False


def is_private(bind: str) -> bool:
    """Whether nobody outside this machine can reach the address; not to be known of a socket that listens already."""
    if bind.startswith("unix:"):
        return True
    return "://" not in bind and is_loopback(_host_and_port(bind)[0])


def is_taken(bind: str) -> bool:
    """Whether somebody else listens there already."""
    if bind.startswith(("unix:", "fd://")):
        return False
    host, port = _host_and_port(bind)
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host or "0.0.0.0").version == 6 else socket.AF_INET  # noqa: PLR2004, S104 - IPv6; an empty host means every address
    except ValueError:
        family = socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host or "", port))
        except OSError:
            return True
    return False


def _host_and_port(bind: str) -> tuple[str | None, int]:
    """The two parts of an address.

    Raises:
        ValueError: It is none.
    """
    parts = urlsplit(f"//{bind}")
    if parts.port is None or parts.path or parts.username is not None:
        raise ValueError("an address is host:port, [address]:port, unix:/path or fd://N")
    return parts.hostname, parts.port


def run(settings: Settings, serving: Serving) -> None:
    """Serve, and return never: the process ends with the server, by SystemExit.

    Args:
        settings: The settings, whose credentials have been checked.
        serving: How.
    """
    with shared_counts():
        _Server(settings, serving).run()


class _Server(BaseApplication):
    """Our app, and gunicorn's settings for it; no file, argument or variable of gunicorn's is read."""

    def __init__(self, settings: Settings, serving: Serving) -> None:
        self._settings = settings
        self._serving = serving
        super().__init__()

    def load_config(self) -> None:
        """Say how."""
        serving = self._serving
        threads = serving.threads + self._settings.max_streams
        wanted: dict[str, object] = {
            "bind": serving.bind,
            "workers": serving.workers,
            "worker_class": Worker,
            "threads": threads,
            "worker_connections": threads + IDLE_CONNECTIONS,
            "preload_app": serving.preload,
            "graceful_timeout": GRACE_SECONDS,
            "proc_name": "external-oms",
            "child_exit": _forget,
            "control_socket_disable": True,  # nobody asked for another door; gunicorn has it since 25
        }
        for name, value in wanted.items():
            if name in self.cfg.settings:
                self.cfg.set(name, value)

    def load(self) -> Flask:  # type: ignore[override]  # Flask takes a dict for the environ, and gunicorn gives one
        """The app, in a worker, or before them with `preload`."""
        app = create_app(self._settings)
        if self._serving.named:
            app.after_request(_name_member)
        return app


def _forget(_arbiter: object, worker: ThreadWorker) -> None:
    forget(int(worker.pid))


def _name_member(answer: Response) -> Response:
    answer.headers[MEMBER_HEADER] = f"{socket.gethostname()}:{os.getpid()}"
    return answer


class Worker(ThreadWorker):
    """A worker whose open event streams do not keep it from ending, and which leaves no thread of ours behind."""

    def init_process(self) -> None:
        """Serve until told to stop; then let go."""
        try:
            super().init_process()
        finally:
            self._parts(lambda parts: parts.provider.shutdown())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in order: end the streams, answer what is under way."""
        self._end_streams()
        super().handle_exit(sig, frame)

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at once; a stream's thread would else be waited for."""
        self._end_streams()
        super().handle_quit(sig, frame)

    def _end_streams(self) -> None:
        # on another thread: this one may have been interrupted inside a lock that ending a stream takes
        ending = threading.Thread(target=self._parts, args=(lambda parts: parts.hub.close(),), daemon=True)
        ending.start()

    def _parts(self, use: Callable[[Parts], None]) -> None:
        app = getattr(self, "wsgi", None)
        if isinstance(app, Flask):  # else it could not even be made
            use(app.extensions[EXTENSION])
