"""Server-sent events: one broker per process feeds every event stream.

A stream that is slow gets the newest change of each tenant, not every change. It does not matter which worker holds a
stream: the cache of each process hears of changes by any process that shares the store.

Format: WHATWG HTML, "Server-sent events".
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from flask import Response, request

from external_oms.cache import Cache, Change, ChangeKind
from external_oms.forks import call_after_fork
from external_oms.problems import Problem

__all__ = ["HEARTBEAT_SECONDS", "Broker", "Message", "Subscription", "stream_response"]

HEARTBEAT_SECONDS = 15.0
"""How often a silent stream sends a comment, in seconds: proxies cut connections that are idle for 30 to 60."""

CHECK_SECONDS = 1.0
"""How often a stream asks whether the login that opened it still holds, in seconds."""

RECONNECT_SECONDS = 2.0
"""How long a client waits before it connects again, in seconds."""

RESERVED = 10
"""The last tenth of the streams is for callers that hold fewer than a tenth, so that one cannot take them all."""

_CONTENT_TYPE = "text/event-stream; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Message:
    """One event of a stream.

    Attributes:
        event: Its type; empty without data: the client only remembers the id.
        data: Its text, of any number of lines.
        id: What the client sends as Last-Event-ID when it connects again; empty for none.
    """

    event: str
    data: str
    id: str = ""

    def encode(self) -> bytes:
        """Return the event as it is sent."""
        lines = [f"id: {self.id}"] if self.id else []
        if self.event:
            lines += [f"event: {self.event}", *(f"data: {line}" for line in self.data.split("\n"))]
        return ("\n".join(lines) + "\n\n").encode()


class Subscription:
    """The changes that one stream has not sent yet: per tenant the most important kind."""

    def __init__(self, leave: Callable[[Subscription], None], owner: str) -> None:
        self.owner = owner
        self._leave = leave
        self._waiting: dict[str, ChangeKind] = {}
        self._news = threading.Condition()
        self._closed = False

    def put(self, change: Change) -> None:
        """Add a change; never waits."""
        with self._news:
            if self._waiting.get(change.tenant) is not ChangeKind.VALUE:
                self._waiting[change.tenant] = change.kind
            self._news.notify()

    def get(self, seconds: float) -> dict[str, ChangeKind] | None:
        """Return the changes, as soon as there are any; none after so many seconds; None when the stream has ended."""
        with self._news:
            self._news.wait_for(lambda: self._waiting or self._closed, seconds)
            if self._closed:
                return None
            waiting, self._waiting = self._waiting, {}
            return waiting

    def close(self) -> None:
        """End the stream, from either side; idempotent."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._leave(self)


class Broker:
    """The open event streams of one application in one process.

    Args:
        cache: Whose changes are sent.
        max_streams: The most streams at once, >= 0.
    """

    def __init__(self, cache: Cache, *, max_streams: int) -> None:
        self.max_streams = max_streams
        self._start = cache.start
        self._closed = False
        self._lock = threading.Lock()
        self._subscriptions: frozenset[Subscription] = frozenset()
        self._unsubscribe = cache.changes.subscribe(self._publish)
        call_after_fork(self)

    def __len__(self) -> int:
        """Return how many streams are open."""
        return len(self._subscriptions)

    def subscribe(self, owner: str = "") -> Subscription:
        """Return a new subscription; close it when its client has gone.

        Args:
            owner: The name of the caller.

        Raises:
            Problem: 503 with Retry-After: too many streams are open, or this process is ending.
        """
        with self._lock:
            if self._closed:
                raise Problem(503, "this process is ending; connect again", headers={"Retry-After": "1"})
            count, most = len(self._subscriptions), self.max_streams
            own = sum(one.owner == owner for one in self._subscriptions)
            if count >= most or (count >= most - most // RESERVED and own >= most // RESERVED):
                detail = f"{count} of {most} event streams are open (max_streams), {own} of them yours; poll instead"
                raise Problem(503, detail, kind="too_many_streams", headers={"Retry-After": "10"})
            subscription = Subscription(self._left, owner)
            self._subscriptions |= {subscription}
        self._start()  # a forked worker that has answered nothing yet hears of no change
        return subscription

    def close(self) -> None:
        """End every stream and open no more; idempotent."""
        self._unsubscribe()
        with self._lock:
            self._closed = True
        for subscription in self._subscriptions:
            subscription.close()

    def _left(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscriptions -= {subscription}

    def _publish(self, change: Change) -> None:
        # The set is replaced and never changed, so this needs no lock, on whichever thread of the cache it runs.
        for subscription in self._subscriptions:
            subscription.put(change)

    def after_fork(self) -> None:
        """Leave the streams of the parent to the parent, in a forked child."""
        self._lock = threading.Lock()
        self._subscriptions = frozenset()


def stream_response(
    broker: Broker,
    render: Callable[[str, ChangeKind], Iterable[Message]],
    *,
    first: Callable[[], Iterable[Message]],
    owner: str = "",
    is_valid: Callable[[], bool] | None = None,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> Response:
    """Return a response that sends the present state, then each change, and a comment when there is none.

    Args:
        broker: The broker.
        render: Returns the messages for a change of a tenant.
        first: Returns the messages to begin with; called after the subscription, so that no change falls between.
        owner: The name of the caller.
        is_valid: Returns whether the login that opened the stream still holds; the stream ends when it does not.
        heartbeat_seconds: The longest silence, > 0.

    Raises:
        Problem: 503 with Retry-After: too many streams, or a server that serves one request at a time.
    """
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would hold events back to fill a buffer
    if request.method == "HEAD":
        return Response(content_type=_CONTENT_TYPE, headers=headers)  # a stream would never notice that HEAD ended
    if not request.environ.get("wsgi.multithread"):
        detail = "this server answers one request at a time, and a stream would block it; poll instead"
        raise Problem(503, detail, kind="no_threads", headers={"Retry-After": "60"})
    subscription = broker.subscribe(owner)

    def events() -> Iterator[bytes]:
        yield f"retry: {RECONNECT_SECONDS * 1000:.0f}\n\n".encode()
        yield from (message.encode() for message in first())
        wait = heartbeat_seconds if is_valid is None else min(CHECK_SECONDS, heartbeat_seconds)
        silent = 0.0
        while (news := subscription.get(wait)) is not None:
            if is_valid is not None and not is_valid():
                return
            silent = 0.0 if news else silent + wait
            if silent >= heartbeat_seconds:
                silent = 0.0
                yield b":\n\n"
            for tenant, kind in news.items():
                yield from (message.encode() for message in render(tenant, kind))

    response = Response(events(), content_type=_CONTENT_TYPE, headers=headers)
    response.call_on_close(subscription.close)
    return response
