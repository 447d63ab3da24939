"""What goes to Redis and comes back: JSON and server time outside, our values and the local clock inside. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any

from external_oms.config import Failure, Snapshot
from external_oms.stores.base import Cause, Event, Member, Record

__all__ = [
    "STRANGE",
    "Message",
    "Remote",
    "Reply",
    "ServerClock",
    "Stamp",
    "decode_answer",
    "decode_differing",
    "decode_index",
    "decode_members",
    "decode_message",
    "decode_remote",
    "decode_rows",
    "decode_stamp",
    "encode_event",
    "encode_failure",
    "encode_members",
    "encode_snapshot",
    "row_id",
    "stream_id",
]

MICROSECONDS = 1_000_000

ROWS_PER_MILLISECOND = 1000
"""Rows of history that one millisecond may hold and still have ids of their own: Redis adds about 200 in one."""

_EVENT_FIELDS = tuple(field.name for field in fields(Event))
_MEMBER_FIELDS = tuple(field.name for field in fields(Member))

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Reply = str | None | list["Reply"]
"""What a script answers: text, nothing, or a list of such."""

Json = Any
"""What json.loads gives: every use says what it expects, and whoever calls is ready for `STRANGE`."""

STRANGE = (ValueError, KeyError, TypeError, IndexError, AttributeError)
"""What decoding raises at something that no member wrote."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """Which state of a tenant's record somebody knows.

    Attributes:
        epoch: The record's life: another one means that Redis forgot the record meanwhile; empty where none is known.
        generation: The generation.
        revision: Rises with every change of the record.
    """

    epoch: str = ""
    generation: int = 0
    revision: int = 0

    def __str__(self) -> str:
        """As the script that compares stamps has it."""
        return f"{self.epoch} {self.generation} {self.revision}" if self.epoch else ""


@dataclass(frozen=True, slots=True)
class Remote:
    """A tenant's record as Redis holds it, on the local clock.

    Attributes:
        stamp: Which state it is.
        record: The record.
        was: The revision before the change that this tells of.
        offered: The member that stored the snapshot; empty without one.
    """

    stamp: Stamp
    record: Record
    was: int
    offered: str


@dataclass(frozen=True, slots=True)
class Message:
    """What a member tells the fleet about a change.

    Attributes:
        member: Who made the change.
        tenant: The tenant.
        parts: The record, still in server time.
    """

    member: str
    tenant: str
    parts: Sequence[str]


class ServerClock:
    """Turns instants of a Redis server's clock into instants of ours, and back, always on the side that looks older.

    Each round trip brackets the difference between the clocks: the server told its time somewhere between our sending
    and our receiving. The brackets are intersected; where one contradicts the rest (drift, a step of either clock) it
    replaces them. So the error is at most one round trip, and an age is never too small by it.
    """

    __slots__ = ("_bracket",)

    def __init__(self) -> None:
        self._bracket: tuple[float, float] | None = None

    @property
    def is_set(self) -> bool:
        """Whether a round trip has told the difference yet."""
        return self._bracket is not None

    def note(self, sent: float, received: float, told: int) -> None:
        """Learn from one round trip.

        Args:
            sent: When the request left, in seconds on our monotonic clock.
            received: When the answer had come, on the same clock.
            told: The server's time in the answer, in microseconds.
        """
        server = told / MICROSECONDS
        low, high = sent - server, received - server
        if self._bracket is not None:
            before_low, before_high = self._bracket
            if max(low, before_low) <= min(high, before_high):
                low, high = max(low, before_low), min(high, before_high)
        self._bracket = (low, high)

    def local(self, stamp: int) -> float:
        """The instant on our clock, at the earliest that it can be."""
        assert self._bracket is not None  # noqa: S101 - a caller's mistake: nothing is decoded before a round trip
        return stamp / MICROSECONDS + self._bracket[0]

    def server(self, instant: float) -> int:
        """The instant on the server's clock in microseconds, at the earliest that it can be."""
        assert self._bracket is not None  # noqa: S101 - as above
        return int((instant - self._bracket[1]) * MICROSECONDS)


def _microseconds(moment: datetime | None) -> int | None:
    return None if moment is None else (moment - _EPOCH) // timedelta(microseconds=1)


def _moment(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)


def encode_snapshot(snapshot: Snapshot, *, member: str, clock: ServerClock) -> str:
    """The snapshot as JSON, its instant in server time."""
    return json.dumps(
        {
            "enabled": snapshot.enabled,
            "updated_at": _microseconds(snapshot.updated_at),
            "etag": snapshot.etag,
            "generation": snapshot.generation,
            "read_number": snapshot.read_number,
            "read_at": clock.server(snapshot.read_at),
            "fetched_at": _microseconds(snapshot.fetched_at),
            "lifetime_seconds": snapshot.lifetime_seconds,
            "member": member,
        }
    )


def _decode_snapshot(text: str, *, now: float, clock: ServerClock) -> tuple[Snapshot | None, str]:
    if not text:
        return None, ""
    said: Json = json.loads(text)
    updated_at = said["updated_at"]
    snapshot = Snapshot(
        enabled=said["enabled"] is True,
        updated_at=None if updated_at is None else _moment(updated_at),
        etag=said["etag"],
        generation=int(said["generation"]),
        read_number=int(said["read_number"]),
        # nothing was read in the future: a server whose clock was set back must not make a value younger than new
        read_at=min(now, clock.local(int(said["read_at"]))),
        fetched_at=_moment(said["fetched_at"]),
        lifetime_seconds=float(said["lifetime_seconds"]),
    )
    return snapshot, str(said["member"])


def encode_failure(failure: Failure, *, clock: ServerClock) -> str:
    """The failure as JSON, its instants in server time."""
    said = asdict(failure)
    said["failed_at"] = clock.server(failure.failed_at)
    said["not_before"] = clock.server(failure.not_before)
    said["since"] = _microseconds(failure.since)
    return json.dumps(said)


def _decode_failure(text: str, *, clock: ServerClock) -> Failure | None:
    if not text:
        return None
    said: Json = json.loads(text)
    return Failure(
        kind=str(said["kind"]),
        message=str(said["message"]),
        status=said["status"],
        count=int(said["count"]),
        read_number=int(said["read_number"]),
        generation=int(said["generation"]),
        failed_at=clock.local(int(said["failed_at"])),
        since=_moment(said["since"]),
        not_before=clock.local(int(said["not_before"])),
        obliged=said["obliged"] is True,
    )


_PARTS = ("now", "epoch", "generation", "revision", "reads", "invalidated_at", "snapshot", "failure", "was")
"""A record as the scripts' epilogue puts it together."""


def decode_answer(reply: Reply) -> tuple[list[str], Reply]:
    """The record and the outcome in what a script answered.

    Raises:
        ValueError: It is no such answer.
    """
    match reply:
        case [[*parts], outcome] if len(parts) == len(_PARTS):
            return [_text(part) for part in parts], outcome
        case _:
            raise ValueError("an answer of another shape")


def _text(part: Reply) -> str:
    if not isinstance(part, str):
        raise TypeError("text was expected")
    return part


def decode_stamp(reply: Reply) -> Stamp:
    """The state that a record's first three fields name; an empty one where there is no record.

    Raises:
        ValueError: They name none.
    """
    match reply:
        case [None, None, None]:
            return Stamp()
        case [str(epoch), str(generation), str(revision)]:
            return Stamp(epoch, int(generation), int(revision))
        case _:
            raise ValueError("fields of another shape")


def decode_remote(parts: Sequence[str], *, member: str, now: float, clock: ServerClock) -> Remote:
    """The record that a script answered with or a message carries.

    Args:
        parts: Its parts.
        member: Who we are: a snapshot of anybody else is foreign.
        now: The present moment on our monotonic clock.
        clock: The clock of the server that wrote it.
    """
    _, epoch, generation, revision, reads, invalidated_at, snapshot_text, failure_text, was = parts
    snapshot, offered = _decode_snapshot(snapshot_text, now=now, clock=clock)
    record = Record(
        generation=int(generation),
        invalidated_at=min(now, clock.local(int(invalidated_at))) if invalidated_at else None,
        reads=int(reads),
        snapshot=snapshot,
        failure=_decode_failure(failure_text, clock=clock),
        foreign=snapshot is not None and offered != member,
    )
    return Remote(Stamp(epoch, record.generation, int(revision)), record, int(was), offered)


def decode_differing(reply: Reply) -> tuple[int, dict[int, Stamp]]:
    """The server's time in microseconds, and the stamps that differ by their place in the question.

    Raises:
        ValueError: It is no such answer.
    """
    match reply:
        case [str(now), [*flat]]:
            pairs = zip(flat[::2], flat[1::2], strict=True)
            return int(now), {int(_text(place)): _stamp(_text(text)) for place, text in pairs}
        case _:
            raise ValueError("an answer of another shape")


def _stamp(text: str) -> Stamp:
    if not text:
        return Stamp()
    epoch, generation, revision = text.split(" ")
    return Stamp(epoch, int(generation), int(revision))


def decode_message(text: str) -> Message:
    """A message of the fleet's channel.

    Raises:
        ValueError: It is none of ours: the channel is open to whoever may publish there.
    """
    said: Json = json.loads(text)
    match said:
        case [str(member), str(tenant), [*parts]] if len(parts) == len(_PARTS):
            return Message(member, tenant, [str(part) for part in parts])
        case _:
            raise ValueError("a message that no member sent")


def encode_event(event: Event) -> str:
    """A row of history as JSON; its id is given by the stream."""
    said = asdict(event)
    said["at"] = _microseconds(event.at)
    del said["id"]
    return json.dumps(said)


def decode_rows(reply: Reply) -> list[tuple[int, Event | None]]:
    """Rows of history by their numbers, as the stream gives them.

    A row that cannot be read is None: a later version of this package, beside this one in the fleet for the time of an
    upgrade, may have causes that this one does not know.

    Raises:
        ValueError: These are no rows.
    """
    rows = []
    for row in reply or ():
        match row:
            case [str(stream), [_, str(text)]]:
                rows.append((row_id(stream), _event(text, row=row_id(stream))))
            case _:
                raise ValueError("a row of another shape")
    return rows


def _event(text: str, *, row: int) -> Event | None:
    try:
        said: Json = json.loads(text)
        known = {name: said[name] for name in _EVENT_FIELDS if name in said}
        return Event(**known | {"at": _moment(said["at"]), "cause": Cause(said["cause"]), "id": row})
    except STRANGE:
        return None


def row_id(stream: str) -> int:
    """The number of a row by its id in the stream, `milliseconds-sequence`."""
    milliseconds, _, sequence = stream.partition("-")
    return int(milliseconds) * ROWS_PER_MILLISECOND + int(sequence)


def stream_id(row: int) -> str:
    """The id in the stream of a row by its number."""
    return "{}-{}".format(*divmod(row, ROWS_PER_MILLISECOND))


def encode_members(members: Sequence[Member]) -> str:
    """What a process reports, as JSON."""
    return json.dumps([asdict(member) for member in members])


def decode_index(reply: Reply) -> dict[str, float]:
    """The names of living members, and how many seconds ago each was heard of; raises `STRANGE`."""
    match reply:
        case [str(now), [*flat]]:
            pairs = zip(flat[::2], flat[1::2], strict=True)
            return {_text(name): (int(now) - int(_text(stamp))) / 1000 for name, stamp in pairs}
        case _:
            raise ValueError("an index of another shape")


def decode_members(text: Reply, *, seen_seconds: float) -> list[Member]:
    """What a process reported so many seconds ago; raises `STRANGE`."""
    said: Json = json.loads(_text(text))
    return [
        Member(**{name: member[name] for name in _MEMBER_FIELDS} | {"seen_seconds": seen_seconds}) for member in said
    ]
