"""HTTP calls with a total deadline, a response size limit, and cancellation from other threads.

`requests` limits each socket operation, so a server that sends one byte now and then holds a caller without end. Here
every socket of a call is duplicated when it is made. At the deadline, or by `abort`, another thread shuts the
connection down through the duplicate, and the caller wakes up. Only the `Deadline` closes the duplicate, so its
descriptor never refers to another connection, and it outlives `SSLSocket`, which detaches the socket that it wraps.
"""

from __future__ import annotations

# Two modules that the first call would import in a worker thread: a fork during an import leaves the lock of the module
# held in the child for ever.
import encodings.idna  # noqa: F401 - imported for its side effect
import http.client
import math
import netrc  # noqa: F401 - likewise
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import cache, lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import NameResolutionError, NewConnectionError, ReadTimeoutError
from urllib3.util.ssl_ import create_urllib3_context

from external_oms.clock import Clock
from external_oms.errors import MalformedAnswer, ReadError, Unavailable

__all__ = ["MAX_RESPONSE_BYTES", "Deadline", "Response", "Transport", "parse_retry_after"]

MAX_RESPONSE_BYTES = 64 * 1024
"""The most that is read of a response body, after decoding. The API's document has some eighty bytes."""

_BROKEN = "the connection broke before the response was complete"


@dataclass(frozen=True, slots=True)
class Response:
    """A response, whatever its status.

    Attributes:
        status: The HTTP status.
        headers: The headers, by names in any case.
        body: The decoded body; empty if it is incomplete.
        body_error: Why the body is incomplete, to be raised by callers that need it; None if it is complete.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    body_error: ReadError | None = None


class Deadline:
    """The time limit of one read or write, for all its requests together; any thread can end it early.

    Attributes:
        at: When it passes, seconds on the monotonic clock.
        sent: Whether the last request may have reached the server.
    """

    def __init__(self, at: float, *, subject: str, clock: Clock) -> None:
        self.at = at
        self.sent = False
        self._subject = subject
        self._clock = clock
        whole = max(0.0, at - clock.monotonic())
        self._late = f"no complete response within {whole:.3g} s; raise timeout_seconds if the server is slow"
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._timer: threading.Timer | None = None
        self._reason: str | None = None

    def remaining_seconds(self) -> float:
        """Return the seconds left, > 0.

        Raises:
            Unavailable: The deadline has passed, or was ended early.
        """
        left = self.at - self._clock.monotonic()
        if left <= 0:
            self.abort()
        if self._reason is not None:
            raise Unavailable(f"{self._subject}: {self._reason}")
        return left

    def watch(self, sock: socket.socket) -> float:
        """Shut this socket down when the deadline ends, and return the seconds left, > 0.

        Raises:
            Unavailable: It has ended.
        """
        with self._lock:
            self._sockets.append(sock.dup())
            if self._timer is None:
                timer = threading.Timer(max(0.0, self.at - self._clock.monotonic()), self.abort)
                timer.daemon = True
                timer.start()
                self._timer = timer
        return self.remaining_seconds()  # `abort` does not shut down a socket that was listed after it

    def abort(self, reason: str | None = None) -> None:
        """End it from any thread: a caller that waits on a socket wakes up.

        Args:
            reason: Why, for the error; None: the time is over. Only the first reason is reported.
        """
        with self._lock:
            self._reason = self._reason or reason or self._late
            for sock in self._sockets:
                with suppress(OSError):  # not connected yet, or closed by the peer
                    sock.shutdown(socket.SHUT_RDWR)

    def error(self, cause: Exception, otherwise: str) -> Unavailable:
        """Return the error for a request that failed: why the deadline ended, or else the given text."""
        # in the middle of a body, requests reports a timeout as a ConnectionError that holds urllib3's error
        inner = next(iter(cause.args), None)
        if isinstance(cause, requests.Timeout | TimeoutError) or isinstance(inner, ReadTimeoutError):
            self.abort()
        return Unavailable(f"{self._subject}: {self._reason or otherwise}")

    def close(self) -> None:
        """Release the descriptors and the timer's thread."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        with self._lock:
            for sock in self._sockets:
                sock.close()
            self._sockets.clear()


_DEADLINE: ContextVar[Deadline] = ContextVar("deadline")
"""The deadline of the request that this thread sends: urllib3 makes connections where nothing can be passed in."""


class Transport:
    """Sends requests, over a session of its own or over the application's.

    Its own session is made at first use, and anew in a forked child. It obeys proxies and CA bundles as requests does
    (`HTTPS_PROXY`, `REQUESTS_CA_BUNDLE`). Each request has a new connection: reads are half a minute apart, so that an
    open one is as often dead as alive. Only the system's name resolver keeps its own time limit.

    The application's session keeps its adapters, hooks and certificates. Then each socket operation is limited to the
    time that is left, and the deadline is checked after each byte of the body; but a server that drips *headers* can
    hold a caller longer, and `abort` does not reach into it.

    Neither follows redirects, reads ~/.netrc, or sends back a cookie that a server set.

    Args:
        session: The application's session, or None.
        subject: What is called, for messages, such as "the config API of tenant 'acme'".
        url_setting: The setting that holds the URL, for messages.
        clock: The clock that deadlines refer to.
    """

    def __init__(self, session: requests.Session | None, *, subject: str, url_setting: str, clock: Clock) -> None:
        self._own = session is None
        self._session = session
        self._subject = subject
        self._url_setting = url_setting
        self._clock = clock
        self._user_agent = f"external-oms/{_version()}"
        self._lock = threading.Lock()
        self._deadlines: set[Deadline] = set()

    @contextmanager
    def deadline(self, at: float) -> Iterator[Deadline]:
        """Open a deadline for some requests: they end at that time (seconds on the monotonic clock), or by `abort`."""
        deadline = Deadline(at, subject=self._subject, clock=self._clock)
        with self._lock:
            self._deadlines.add(deadline)
        try:
            yield deadline
        finally:
            with self._lock:
                self._deadlines.discard(deadline)
            deadline.close()

    def abort(self) -> None:
        """End every request in progress, from any thread; later requests are not affected."""
        with self._lock:
            deadlines = tuple(self._deadlines)
        for deadline in deadlines:
            deadline.abort("aborted, as by a shutdown")

    def after_fork(self) -> None:
        """Replace locks and connections in a forked child, without shutting down what the parent may still use."""
        self._lock = threading.Lock()
        self._deadlines = set()
        if self._own or self._session is None:
            self._session = None
            return
        for adapter in self._session.adapters.values():
            if isinstance(adapter, HTTPAdapter):
                # New pools by the adapter's own rules for pickling; no lock of the old ones is taken.
                adapter.__setstate__(adapter.__getstate__())  # type: ignore[attr-defined]  # missing in the stubs

    def send(
        self,
        deadline: Deadline,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        token: str | None = None,
        body: bytes | None = None,
    ) -> Response:
        """Send one request and return the response, redirects and errors included.

        Args:
            deadline: The deadline that the request belongs to.
            method: The HTTP method.
            url: The URL, made from settings alone.
            headers: Headers beside the common ones.
            token: The access token to send, if any.
            body: The body to send, if any.

        Raises:
            Unavailable: No response: no connection, or none in time; `deadline.sent` says how far the request went.
        """
        deadline.sent = False
        bound = _DEADLINE.set(deadline)
        try:
            if self._session is None:  # not before it is used: a forked child of a thousand tenants uses few at once
                self._session = _own_session()
            with _without_cookies(self._session).request(
                method,
                url,
                headers={"User-Agent": self._user_agent, **headers},
                data=body,
                auth=partial(_authorize, token),
                allow_redirects=False,
                stream=True,
                timeout=deadline.remaining_seconds(),
            ) as response:
                body, body_error = b"", None
                try:
                    body = self._body(response, deadline)
                except ReadError as error:
                    body_error = error
                except Exception as error:  # noqa: BLE001 - the application's session may raise anything
                    body_error = deadline.error(error, _BROKEN)
                    body_error.__cause__ = error
                return Response(response.status_code, response.headers, body, body_error)
        except ReadError:
            raise
        except Exception as error:
            if not self._own:
                deadline.sent = not _before_sending(error)
            raise deadline.error(error, _explained(error, url, self._url_setting)) from error
        finally:
            _DEADLINE.reset(bound)

    def _body(self, response: requests.Response, deadline: Deadline) -> bytes:
        received = bytearray()
        # In the application's session only a check after each byte ends a body that drips; in ours the socket is shut.
        for chunk in response.iter_content(16_384 if self._own else 1):
            received += chunk
            if len(received) > MAX_RESPONSE_BYTES:
                raise MalformedAnswer(f"{self._subject}: the response is longer than {MAX_RESPONSE_BYTES} bytes")
            if not self._own:
                deadline.remaining_seconds()
        deadline.remaining_seconds()  # a connection that was shut down looks like the end of a body without a length
        return bytes(received)


@cache  # it reads the disk, and is not needed at import
def _version() -> str:
    return version("openfeature-provider-external-oms")


def _authorize(token: str | None, request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Set the token, as an auth object: as a plain header, or without any, requests would take one from ~/.netrc."""
    if token is not None:
        request.headers["Authorization"] = f"Bearer {token}"
    return request


def _explained(error: Exception, url: str, url_setting: str) -> str:
    """Return what went wrong and what to check. The host in the message comes from a setting, and is no secret."""
    host, reason = urlsplit(url).hostname, _urllib3_error(error)
    if isinstance(error, requests.exceptions.SSLError):
        return f"TLS with {host} failed; is its certificate trusted here (REQUESTS_CA_BUNDLE names a CA bundle)?"
    if isinstance(error, requests.exceptions.ProxyError):
        return f"the proxy on the way to {host} cannot be used; check HTTPS_PROXY"
    if isinstance(reason, NameResolutionError):
        return f"the host name {host} cannot be resolved; check {url_setting}"
    if isinstance(reason, NewConnectionError):
        return f"no connection to {host}; check {url_setting}, and that this host may reach it (proxy, firewall)"
    return _BROKEN


def _urllib3_error(error: Exception) -> object:
    return getattr(error.args[0], "reason", None) if error.args else None


def _before_sending(error: Exception) -> bool:
    """Return whether an error of the application's session rules out that the request was sent; False in doubt."""
    invalid = requests.exceptions.InvalidHeader | requests.exceptions.InvalidSchema | requests.exceptions.InvalidURL
    return isinstance(error, requests.ConnectTimeout | invalid) or isinstance(_urllib3_error(error), NewConnectionError)


def _without_cookies(session: requests.Session) -> requests.Session:
    """Return the session with a copy of its cookie jar, so that cookies which servers set are dropped with the copy."""
    clone = object.__new__(type(session))  # `copy.copy` would lose the attributes of a subclass
    clone.__dict__.update(session.__dict__)
    clone.cookies = session.cookies.copy()
    return clone


def _own_session() -> requests.Session:
    session = requests.Session()
    # The document is smaller than what compressing it would add, and a connection is used once.
    session.headers.update({"Accept-Encoding": "identity", "Connection": "close"})
    adapter = _Adapter()
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return session


@lru_cache(maxsize=4)
def _tls_context(bundle: str, changed_ns: int) -> ssl.SSLContext:  # noqa: ARG001 - a bundle replaced on disk is read again
    """Return the context that trusts a CA bundle, for the whole process: reading the bundle takes 20 ms or more."""
    context = create_urllib3_context(cert_reqs=ssl.CERT_REQUIRED)
    context.load_verify_locations(**{"capath" if Path(bundle).is_dir() else "cafile": bundle})
    return context


class _Adapter(HTTPAdapter):
    """The adapter of our own session: deadlines watch its connections, and each connection carries one request."""

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - passed on
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        # A SOCKS proxy has connections of another kind: they are limited as those of the application's session are.
        pool.ConnectionCls = _WATCHED.get(pool.ConnectionCls, pool.ConnectionCls)
        return pool


class _LastResponse(http.client.HTTPResponse):
    """A response after which the connection is closed, also if the server would keep it open."""

    def begin(self) -> None:
        super().begin()
        self.will_close = True


class _Connection(HTTPConnection):
    response_class = _LastResponse

    def connect(self) -> None:
        super().connect()  # TLS included
        _DEADLINE.get().sent = True  # from here on the request may be on its way

    def _new_conn(self) -> socket.socket:
        """Connect: each address of the host gets an equal share of the time that is left.

        urllib3's own method gives each address all of it, and no other thread could end it while it connects.
        """
        deadline = _DEADLINE.get()
        try:
            addresses = socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise NameResolutionError(self.host, self, error) from error
        problem: OSError | None = None
        for tried, (family, kind, protocol, _, address) in enumerate(addresses):
            sock = socket.socket(family, kind, protocol)
            try:
                for option in self.socket_options or ():
                    sock.setsockopt(*option)
                sock.settimeout(deadline.watch(sock) / (len(addresses) - tried))
                sock.connect(address)
                sock.settimeout(deadline.remaining_seconds())
            except BaseException as error:
                sock.close()
                if not isinstance(error, OSError):
                    raise
                problem = error
            else:
                return sock
        raise NewConnectionError(self, "no address of the host accepts a connection") from problem


class _TLSConnection(_Connection, HTTPSConnection):
    def connect(self) -> None:
        bundle = self.ca_certs or self.ca_cert_dir
        if bundle and not (self.proxy and self.proxy.scheme == "https"):  # such a proxy is given the bundle's name only
            self.ssl_context = _tls_context(bundle, Path(bundle).stat().st_mtime_ns)
            self.ca_certs = self.ca_cert_dir = None
        super().connect()


_WATCHED: dict[Any, type[_Connection]] = {HTTPConnection: _Connection, HTTPSConnection: _TLSConnection}


def parse_retry_after(header: str | None, *, now_wall: float, cap_seconds: float) -> float | None:
    """Return the seconds that a Retry-After header asks for, between 0 and the cap; None where it is not usable.

    Args:
        header: The text of the header: seconds or an HTTP date (RFC 9110 §10.2.3).
        now_wall: The present moment in seconds since the Unix epoch.
        cap_seconds: The most that is accepted, in seconds.
    """
    if header is None:
        return None
    text = header.strip()
    try:
        asked = float(text)
    except ValueError:
        try:
            moment = parsedate_to_datetime(text)
        except (ValueError, TypeError, OverflowError):
            return None
        asked = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now_wall
    if math.isnan(asked):
        return None
    return min(max(asked, 0.0), cap_seconds)
