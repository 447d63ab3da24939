"""One hub per process feeds every event stream; a stream that lags is told the newest of each tenant, not everything.

Format: WHATWG HTML, "Server-sent events". Which worker holds a stream does not matter: the cache hears of changes made
by any process that shares the store.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from flask import Response, request

from external_oms.cache import Cache, Change, ChangeKind
from external_oms.web.problems import Problem

__all__ = ["HEARTBEAT_SECONDS", "Hub", "Message", "Stream", "stream_response"]

HEARTBEAT_SECONDS = 15.0
"""How often a silent stream says that it lives: proxies cut connections that are idle for 30 to 60 seconds."""

EVENT_STREAM = "text/event-stream; charset=utf-8"

RECONNECT_SECONDS = 2.0
"""What a client is asked to wait before it connects again."""


@dataclass(frozen=True, slots=True)
class Message:
    """One event of a stream.

    Attributes:
        event: Its type; empty, with no data: nothing happens at the client, which only remembers the id.
        data: Its text, of any number of lines.
        id: What the client sends back as Last-Event-ID when it connects again; empty for none.
    """

    event: str
    data: str
    id: str = ""

    def encode(self) -> bytes:
        """The event on the wire."""
        lines = [f"id: {self.id}"] if self.id else []
        if self.event:
            lines += [f"event: {self.event}", *(f"data: {line}" for line in self.data.split("\n"))]
        return ("\n".join(lines) + "\n\n").encode()


class Stream:
    """What one listener has not been told yet: per tenant the weightiest kind of change; bounded by their number."""

    def __init__(self, leave: Callable[[Stream], None]) -> None:
        self._leave = leave
        self._waiting: dict[str, ChangeKind] = {}
        self._news = threading.Condition()
        self._ended = False

    def offer(self, change: Change) -> None:
        """Note a change; never waits."""
        with self._news:
            if self._waiting.get(change.tenant) is not ChangeKind.VALUE:
                self._waiting[change.tenant] = change.kind
            self._news.notify()

    def take(self, seconds: float) -> dict[str, ChangeKind] | None:
        """The tenants with news, and its kind, at once; none after so many seconds; None when the stream has ended."""
        with self._news:
            self._news.wait_for(lambda: self._waiting or self._ended, seconds)
            if self._ended:
                return None
            waiting, self._waiting = self._waiting, {}
            return waiting

    def end(self) -> None:
        """End the stream, from either side; idempotent."""
        with self._news:
            self._ended = True
            self._news.notify()
        self._leave(self)


class Hub:
    """The open streams of one app in one process.

    Args:
        cache: Whose changes they are told.
        max_streams: The most of them at once, >= 0.
    """

    def __init__(self, cache: Cache, *, max_streams: int) -> None:
        self.max_streams = max_streams
        self._start = cache.start
        self._closed = False
        self._lock = threading.Lock()
        self._streams: frozenset[Stream] = frozenset()
        self._unlisten = cache.changes.subscribe(self._tell)
        _alive.add(self)

    def __len__(self) -> int:
        """How many streams are open."""
        return len(self._streams)

    def open(self) -> Stream:
        """A new stream; end it when its listener has gone.

        Raises:
            Problem: 503 with Retry-After: as many are open as there may be, or this process is ending.
        """
        with self._lock:
            if self._closed:
                raise Problem(503, "this process is ending; connect again", headers={"Retry-After": "1"})
            if len(self._streams) >= self.max_streams:
                detail = f"{self.max_streams} event streams are open, which is the most (max_streams); poll instead"
                raise Problem(503, detail, kind="too_many_streams", headers={"Retry-After": "10"})
            stream = Stream(self._left)
            self._streams |= {stream}
        self._start()  # a worker that was forked and has answered nothing yet hears of no change
        return stream

    def close(self) -> None:
        """End every stream, open no more and listen no more; idempotent."""
        self._unlisten()
        with self._lock:
            self._closed = True
        for stream in self._streams:
            stream.end()

    def _left(self, stream: Stream) -> None:
        with self._lock:
            self._streams -= {stream}

    def _tell(self, change: Change) -> None:
        # replaced whole, never changed: so no lock here, on whichever thread of the cache this runs
        for stream in self._streams:
            stream.offer(change)

    def after_fork(self) -> None:
        """In a forked child: the parent's streams stay with the parent."""
        self._lock = threading.Lock()
        self._streams = frozenset()


_alive: weakref.WeakSet[Hub] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for hub in tuple(_alive):
        hub.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def stream_response(
    hub: Hub,
    render: Callable[[str, ChangeKind], Iterable[Message]],
    *,
    first: Callable[[], Iterable[Message]],
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> Response:
    """An answer that goes on: first what is so already, then each change as it comes, and a comment when nothing does.

    Args:
        hub: Where to listen.
        render: What to say of a change: tenant and kind in, events out.
        first: What to say at once; asked after the stream listens, so that nothing falls between the two.
        heartbeat_seconds: The longest silence, > 0.

    Raises:
        Problem: 503: too many streams.
    """
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would hold events back to fill a buffer
    if request.method == "HEAD":
        # nothing is written that could fail when the asker goes, so a stream opened for it would stay for ever
        return Response(content_type=EVENT_STREAM, headers=headers)
    stream = hub.open()

    def events() -> Iterator[bytes]:
        yield f"retry: {RECONNECT_SECONDS * 1000:.0f}\n\n".encode()
        yield from (message.encode() for message in first())
        while (news := stream.take(heartbeat_seconds)) is not None:
            if not news:
                yield b":\n\n"
            for tenant, kind in news.items():
                yield from (message.encode() for message in render(tenant, kind))

    answer = Response(events(), content_type=EVENT_STREAM, headers=headers)
    answer.call_on_close(stream.end)
    return answer
