"""What people look at: the fleet's history and its members. Nothing that is served rests on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from operator import attrgetter

from external_oms.clock import Clock
from external_oms.stores import redis_scripts as scripts
from external_oms.stores.base import Event, Member
from external_oms.stores.redis_exchange import milliseconds
from external_oms.stores.redis_link import Away, Link, Refused
from external_oms.stores.redis_wire import (
    STRANGE,
    decode_index,
    decode_members,
    decode_rows,
    encode_event,
    encode_members,
    stream_id,
)

__all__ = ["Ledger"]

REPORT_SECONDS = 60.0
"""How long a member counts as living after its report: the store's contract says a minute."""

BACKLOG_ROWS = 1000
"""Rows of history kept for Redis while it is away; an outage writes a handful per tenant."""

PAGE_ROWS = 500
"""Rows asked for at once where one tenant's are picked out of everybody's."""


class Ledger:
    """History and members in Redis.

    Args:
        link: The line to Redis.
        prefix: What every key begins with.
        clock: What tells the time.
        history_rows: How many rows are kept, >= 1.
        history_seconds: And for how long, in seconds, > 0.
    """

    def __init__(self, *, link: Link, prefix: str, clock: Clock, history_rows: int, history_seconds: float) -> None:
        self._link = link
        self._clock = clock
        self._rows = f"{prefix}:{{_history}}:rows"  # no tenant's name begins with an underscore
        self._members = f"{prefix}:{{_members}}"
        self._history_rows = history_rows
        self._history_seconds = history_seconds
        self._backlog: deque[str] = deque(maxlen=BACKLOG_ROWS)

    def after_fork(self) -> None:
        """What the parent could not send yet, the parent sends."""
        self._backlog.clear()

    def append(self, event: Event) -> None:
        """Add a row; while Redis is away it is kept here and added later, with the time at which it happened."""
        self._backlog.append(encode_event(event))
        if self._link.is_up:
            try:
                self.send()
            except Away:
                return

    def send(self) -> None:
        """Add the rows that are kept here; raises `Away`."""
        limits = [str(self._history_rows), milliseconds(self._history_seconds)]
        while self._backlog:
            try:
                text = self._backlog.popleft()
            except IndexError:  # another thread sent it
                return
            try:
                self._link.run(scripts.APPEND, [self._rows], [*limits, text], probing=True, aside=True)
            except Away:
                self._backlog.appendleft(text)
                raise

    def history(self, *, tenant: str | None, limit: int, before: int | None) -> Sequence[Event]:
        """Rows, newest first; raises `Away`."""
        rows: list[Event] = []
        start = "+" if before is None else f"({stream_id(before)}"
        count = limit if tenant is None else PAGE_ROWS
        while len(rows) < limit:
            reply = self._link.run(scripts.HISTORY, [self._rows], [start, str(count)], aside=True)
            try:
                page = decode_rows(reply)
            except STRANGE as error:
                raise Refused from error
            rows += [event for _, event in page if event is not None and tenant in {None, event.tenant}]
            if len(page) < count:
                break
            last, _ = page[-1]
            start = f"({stream_id(last)}"
        # the stream is trimmed by whole blocks and by the server's clock: the last rows may be too old by ours
        oldest = datetime.fromtimestamp(self._clock.wall() - self._history_seconds, UTC)
        return tuple(event for event in rows[:limit] if event.at >= oldest)

    def report(self, members: Sequence[Member]) -> None:
        """Tell what this process serves: one round trip; raises `Away`."""
        by_name = attrgetter("name")
        for name, rows in groupby(sorted(members, key=by_name), key=by_name):
            keys = [f"{self._members}:index", f"{self._members}:{name}"]
            told = [name, encode_members(tuple(rows)), milliseconds(REPORT_SECONDS)]
            self._link.run(scripts.REPORT, keys, told, aside=True)

    def members(self) -> list[Member]:
        """What every living member serves: two round trips; raises `Away`."""
        reply = self._link.run(scripts.MEMBERS, [f"{self._members}:index"], [milliseconds(REPORT_SECONDS)], aside=True)
        try:
            seen = decode_index(reply)
            keys = [f"{self._members}:{name}" for name in seen]
            texts = self._link.call(lambda client: client.mget(keys), aside=True) if keys else []
            return [
                member
                for seconds, text in zip(seen.values(), texts or (), strict=True)
                if text is not None  # it ended between the two trips
                for member in decode_members(text, seen_seconds=seconds)
            ]
        except STRANGE as error:
            raise Refused from error
