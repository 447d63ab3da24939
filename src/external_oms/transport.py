"""One call over requests, bounded whole: its time by one deadline, its answer by one limit, its end by any thread.

`requests` bounds each socket operation, so a peer that sends a byte now and then holds a caller for ever. Here every
socket of a call is duplicated as it is made; at the deadline, or by `abort`, another thread shuts the connection down
through the duplicate, and the caller wakes. The duplicate is ours to close: the number of its descriptor can never have
come to mean another connection, and it outlives `SSLSocket`, which detaches the socket it wraps.
"""

from __future__ import annotations

# Two that the standard library and requests would import at the first call, in a reader thread: a fork in the middle of
# an import leaves the module's lock held for ever in the child.
import encodings.idna  # noqa: F401 - imported for its being there
import math
import netrc  # noqa: F401 - likewise
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import ConnectionPool, HTTPConnectionPool
from urllib3.exceptions import NameResolutionError, NewConnectionError
from urllib3.util.connection import allowed_gai_family

from external_oms.clock import Clock
from external_oms.errors import MalformedAnswer, ReadError, Unavailable

__all__ = ["MAX_ANSWER_BYTES", "USER_AGENT", "Answer", "Call", "Signer", "Transport"]

MAX_ANSWER_BYTES = 64 * 1024
"""The most of an answer that is read, after decoding; the API's document has some eighty bytes."""

try:
    USER_AGENT = f"external-oms/{version('openfeature-provider-external-oms')}"
except PackageNotFoundError:  # pragma: no cover - run from a source tree that was never installed
    USER_AGENT = "external-oms/0"

Signer = Callable[[requests.PreparedRequest], requests.PreparedRequest]
"""What puts the credentials into a request. Never a plain header: requests would let a ~/.netrc overwrite it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back.

    Attributes:
        status: The HTTP status.
        headers: The headers; their case does not matter.
        body: The body, decoded; empty where it did not come whole.
        trouble: Why the body did not come whole, to be raised by whoever needs it; None where it did.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    trouble: ReadError | None = None


class Call:
    """The exchanges of one read or write: one deadline for them together, and one switch that ends them.

    Attributes:
        subject: Who is called, for messages.
        deadline: When it ends, seconds on the monotonic clock.
        sent: Whether the last request may have reached the other side.
    """

    def __init__(self, subject: str, deadline: float, clock: Clock) -> None:
        self.subject = subject
        self.deadline = deadline
        self.sent = False
        self._clock = clock
        self._seconds = max(0.0, deadline - clock.monotonic())
        self._lock = threading.Lock()
        self._lines: list[socket.socket] = []
        self._timer: threading.Timer | None = None
        self._ended: str | None = None

    def remaining_seconds(self) -> float:
        """The seconds left, > 0.

        Raises:
            Unavailable: None are left, or the call was ended.
        """
        left = self.deadline - self._clock.monotonic()
        if left <= 0:
            self.end(self._too_late())
        if self._ended is not None:
            raise Unavailable(f"{self.subject}: {self._ended}")
        return left

    def hold(self, line: socket.socket) -> None:
        """Take a socket under the deadline.

        Raises:
            Unavailable: The call has ended already.
        """
        left = self.remaining_seconds()
        with self._lock:
            self._lines.append(line.dup())
            if self._timer is None:
                timer = threading.Timer(left, self.end, (self._too_late(),))
                timer.daemon = True
                timer.start()
                self._timer = timer
        self.remaining_seconds()  # ended between the two: then nobody shut this line

    def end(self, reason: str) -> None:
        """End the call from any thread: whoever waits on one of its sockets wakes; only the first reason counts."""
        with self._lock:
            self._ended = self._ended or reason
            for line in self._lines:
                with suppress(OSError):  # not connected, or closed by the other side
                    line.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Leave nothing behind: neither a descriptor nor the thread of the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        with self._lock:
            for line in self._lines:
                line.close()
            self._lines.clear()

    def failure(self, error: Exception) -> Unavailable:
        """The error that a foreign one amounts to, in our words."""
        if isinstance(error, requests.Timeout | TimeoutError) and self._ended is None:
            self._ended = self._too_late()
        return Unavailable(f"{self.subject}: {self._ended or _explained(error)}")

    def _too_late(self) -> str:
        return f"no whole answer within {round(self._seconds, 2):g} s; raise timeout_seconds if it is only slow"


class Transport:
    """Makes calls, over a session of the user's or over connections of its own.

    Its own connections are new for each exchange and closed after it: reads are half a minute apart, when a connection
    kept open is as often dead as alive, and a name that moved to another address is followed at once. They obey proxies
    and CA bundles as requests does (`HTTPS_PROXY`, `REQUESTS_CA_BUNDLE`). Only the system's resolver of names keeps its
    own time.

    A session of the user's is left as it is, its adapters, hooks and certificates included. Then each socket operation
    is bounded by what is left of the deadline, and the deadline is looked at after each byte of the body; but a peer
    that drips *headers* can hold a caller longer, and `abort` does not reach into it.

    Either way no redirect is followed, and a cookie that a server sets is forgotten with its answer.

    Args:
        session: The user's session, or None.
        subject: Who is called, for messages.
        clock: What tells the time.
    """

    def __init__(self, session: requests.Session | None, *, subject: str, clock: Clock) -> None:
        self._session = session
        self._subject = subject
        self._clock = clock
        self._lock = threading.Lock()
        self._calls: set[Call] = set()

    @contextmanager
    def call(self, deadline: float) -> Iterator[Call]:
        """A call that ends at the deadline (seconds on the monotonic clock), or by `abort`."""
        call = Call(self._subject, deadline, self._clock)
        with self._lock:
            self._calls.add(call)
        try:
            yield call
        finally:
            with self._lock:
                self._calls.discard(call)
            call.close()

    def abort(self) -> None:
        """End every call under way, from any thread; later calls are not touched."""
        with self._lock:
            calls = tuple(self._calls)
        for call in calls:
            call.end("ended from outside, as by a shutdown")

    def after_fork(self) -> None:
        """In a child: forget what belongs to the parent, shutting nothing down that it may still use."""
        self._lock = threading.Lock()
        self._calls = set()
        if self._session is not None:
            for adapter in self._session.adapters.values():
                if isinstance(adapter, HTTPAdapter):
                    # New pools by the adapter's own rules of pickling; no lock of the old ones is touched.
                    adapter.__setstate__(adapter.__getstate__())  # type: ignore[attr-defined]  # the stubs leave it out

    def exchange(
        self,
        call: Call,
        method: str,
        url: str,
        *,
        signer: Signer,
        headers: Mapping[str, str],
        body: bytes | None = None,
    ) -> Answer:
        """One request and what came back, redirects and errors included.

        Args:
            call: The call that it belongs to.
            method: The HTTP method.
            url: Where to, made from settings alone.
            signer: Puts the credentials in.
            headers: Headers beside the common ones.
            body: What to send.

        Raises:
            Unavailable: No answer: no connection, or none within the deadline; `call.sent` tells how far it went.
        """
        call.sent = False
        session = _own_session(call) if self._session is None else _twin(self._session)
        try:
            with session.request(
                method,
                url,
                headers={"User-Agent": USER_AGENT, **headers},
                data=body,
                auth=signer,
                allow_redirects=False,
                stream=True,
                timeout=call.remaining_seconds(),
            ) as response:
                # A session not ours is looked at after each byte: nothing else would end a drip.
                return _answer(response, call, chunk_bytes=16_384 if self._session is None else 1)
        except ReadError:
            raise
        except Exception as error:
            if self._session is not None:
                call.sent = not _before_sending(error)
            raise call.failure(error) from error
        finally:
            if self._session is None:
                session.close()


def _answer(response: requests.Response, call: Call, *, chunk_bytes: int) -> Answer:
    received, trouble = b"", None
    try:
        received = _whole(response, call, chunk_bytes=chunk_bytes)
    except ReadError as error:
        trouble = error
    except Exception as error:  # noqa: BLE001 - a session of the user's may raise anything; the edge is here
        trouble = call.failure(error)
        trouble.__cause__ = error
    return Answer(response.status_code, response.headers, received, trouble)


def _whole(response: requests.Response, call: Call, *, chunk_bytes: int) -> bytes:
    received = bytearray()
    for chunk in response.iter_content(chunk_bytes):
        received += chunk
        if len(received) > MAX_ANSWER_BYTES:
            raise MalformedAnswer(f"{call.subject}: the answer is longer than {MAX_ANSWER_BYTES} bytes")
        call.remaining_seconds()
    call.remaining_seconds()  # a connection cut at the deadline looks like the end of a body without a length
    return bytes(received)


def _explained(error: Exception) -> str:
    reason = _reason(error)
    if isinstance(error, requests.exceptions.SSLError):
        return "TLS failed; is its certificate trusted here (REQUESTS_CA_BUNDLE names a CA bundle)?"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy could not be used; is HTTPS_PROXY right?"
    if isinstance(reason, NameResolutionError):
        return "its host name cannot be resolved; is the address right?"
    if isinstance(reason, NewConnectionError):
        return "no connection; is the address right, and may this host reach it?"
    return "the connection broke before the answer was whole"


def _reason(error: Exception) -> object:
    """What urllib3 says underneath an error of requests."""
    return getattr(error.args[0], "reason", None) if error.args else None


def _before_sending(error: Exception) -> bool:
    """Whether a session of the user's failed before the request can have left; in doubt it has left."""
    early = (
        requests.ConnectTimeout,
        requests.exceptions.InvalidHeader,
        requests.exceptions.InvalidSchema,
        requests.exceptions.InvalidURL,
    )
    return isinstance(error, early) or isinstance(_reason(error), NewConnectionError)


def _own_session(call: Call) -> requests.Session:
    session = requests.Session()
    # The document is smaller than the overhead of compressing it, and a connection is used once.
    session.headers.update({"Accept-Encoding": "identity", "Connection": "close"})
    for scheme in ("https://", "http://"):
        session.mount(scheme, _Adapter(call))
    return session


def _twin(session: requests.Session) -> requests.Session:
    """The user's session in all but its cookie jar, of which it has a copy: what servers set goes with the twin.

    `copy.copy` will not do: a Session copies by a list of names that attributes of a subclass are not on.
    """
    twin = object.__new__(type(session))
    twin.__dict__.update(session.__dict__)
    twin.cookies = session.cookies.copy()
    return twin


class _Adapter(HTTPAdapter):
    """The adapter of one exchange: its connections put their sockets under the call's deadline."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._pools: list[ConnectionPool] = []
        super().__init__(pool_connections=1, pool_maxsize=1)

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> ConnectionPool:  # noqa: ANN401 - passed on
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        # A SOCKS proxy has connections of its own kind: they are bounded as a user's session is.
        if isinstance(pool, HTTPConnectionPool) and pool.ConnectionCls in _WATCHED:
            pool.ConnectionCls = _WATCHED[pool.ConnectionCls]
            pool.conn_kw["call"] = self._call
        self._pools.append(pool)
        return pool

    def close(self) -> None:
        """Close the connection now: urllib3 leaves that to the garbage collector, and a traceback can hold it long."""
        for pool in self._pools:
            pool.close()
        super().close()


class _Connection(HTTPConnection):
    def __init__(self, *args: Any, call: Call, **kwargs: Any) -> None:  # noqa: ANN401 - passed on
        super().__init__(*args, **kwargs)
        self._call = call

    def connect(self) -> None:
        super().connect()  # TLS included
        self._call.sent = True  # from here on the request may be on its way

    def _new_conn(self) -> socket.socket:
        """A connected socket: each address of the host has an equal share of the time that is left."""
        try:
            found = socket.getaddrinfo(self._dns_host, self.port, allowed_gai_family(), socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise NameResolutionError(self.host, self, error) from error
        failure: OSError | None = None
        for tried, (family, kind, protocol, _, address) in enumerate(found):
            line = socket.socket(family, kind, protocol)
            try:
                for option in self.socket_options or ():
                    line.setsockopt(*option)
                line.settimeout(self._call.remaining_seconds() / (len(found) - tried))
                self._call.hold(line)
                line.connect(address)
                line.settimeout(self._call.remaining_seconds())
            except OSError as error:
                failure = error
                line.close()
            except BaseException:
                line.close()
                raise
            else:
                return line
        raise NewConnectionError(self, "no address of the host accepts a connection") from failure


class _TLSConnection(_Connection, HTTPSConnection):
    """The same with TLS, which `HTTPSConnection.connect` adds on top of the socket."""


_WATCHED: dict[object, type[_Connection]] = {HTTPConnection: _Connection, HTTPSConnection: _TLSConnection}


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
