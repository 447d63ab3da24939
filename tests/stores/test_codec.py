"""The codec: what is encoded is decoded to the same, and nothing malformed is believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from external_oms.codec import (
    MAX_COUNTER,
    MAX_TEXT,
    MalformedError,
    decode_entry,
    decode_event,
    decode_member,
    encode_entry,
    encode_event,
    encode_member,
)
from external_oms.entry import Entry, Failure, Lease, Snapshot
from external_oms.records import Cause, Event, Member
from tests.support.clock import FakeClock
from tests.support.contract import complete, event

NUMBERS = st.integers(0, MAX_COUNTER - 1)
INSTANTS = st.floats(-1e11, 1e11)
DURATIONS = st.floats(0, 1e9)
TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=50)
MOMENTS = st.datetimes(datetime(2000, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - the zone is given beside
ETAGS = st.sampled_from(['"a"', 'W/"b"', '""'])

ENTRIES = st.builds(
    Entry,
    generation=NUMBERS,
    invalidated_at=st.none() | INSTANTS,
    stale_since=st.none() | INSTANTS,
    token=NUMBERS,
    paced_until=INSTANTS,
    snapshot=st.none()
    | st.builds(
        Snapshot,
        enabled=st.booleans(),
        updated_at=st.none() | MOMENTS,
        etag=st.none() | ETAGS,
        generation=NUMBERS,
        token=NUMBERS,
        read_at=INSTANTS,
        fetched_at=MOMENTS,
        lifetime_seconds=st.floats(1e-6, 1e9),
        writer=TEXTS,
    ),
    failure=st.none()
    | st.builds(
        Failure,
        kind=TEXTS,
        message=TEXTS,
        status=st.none() | st.integers(100, 599),
        count=st.integers(1, 1000),
        generation=NUMBERS,
        token=NUMBERS,
        failed_at=INSTANTS,
        since=MOMENTS,
        retry_at=INSTANTS,
        server_retry_at=st.none() | INSTANTS,
    ),
    lease=st.none()
    | st.builds(
        Lease,
        token=NUMBERS,
        holder=TEXTS,
        generation=NUMBERS,
        expires_at=INSTANTS,
        overtaken_at=st.none() | INSTANTS,
    ),
    verified=st.just(True),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=10), parts, max_size=3),
    max_leaves=10,
)


def in_front(entry: Entry) -> Entry:
    """The entry with counters that no part of it is ahead of."""
    parts = [part for part in (entry.snapshot, entry.failure, entry.lease) if part is not None]
    return replace(
        entry,
        generation=max([entry.generation, *(part.generation for part in parts)]),
        token=max([entry.token, *(part.token for part in parts)]),
    )


@given(ENTRIES)
def test_a_part_that_is_ahead_of_its_entry_is_malformed(entry: Entry) -> None:
    if in_front(entry) != entry:
        with pytest.raises(MalformedError, match="ahead"):
            decode_entry(encode_entry(entry))


@given(ENTRIES.map(in_front))
def test_an_entry_survives(entry: Entry) -> None:
    assert decode_entry(encode_entry(entry)) == entry
    assert decode_entry(encode_entry(entry).encode()) == entry


def test_every_field_of_an_entry_is_stored(clock: FakeClock) -> None:
    entry = complete(clock)
    default = Entry()
    assert [name.name for name in fields(Entry) if getattr(entry, name.name) == getattr(default, name.name)] == [
        "verified"
    ]
    assert decode_entry(encode_entry(entry)) == entry


def test_whether_an_entry_is_verified_is_not_stored() -> None:
    assert decode_entry(encode_entry(Entry(verified=False))) == Entry(verified=True)


@given(
    st.builds(
        Event,
        at=MOMENTS,
        tenant=TEXTS,
        cause=st.sampled_from(Cause),
        enabled=st.none() | st.booleans(),
        actor=TEXTS,
        delivery_id=TEXTS,
        latency_seconds=st.none() | DURATIONS,
        detail=TEXTS,
        id=NUMBERS,
    )
)
def test_an_event_survives(row: Event) -> None:
    assert decode_event(encode_event(row), number=row.id) == row


@given(
    st.builds(
        Member,
        name=TEXTS,
        tenant=TEXTS,
        generation=NUMBERS,
        enabled=st.none() | st.booleans(),
        freshness=st.sampled_from(["fresh", "stale", "expired"]),
        age_seconds=st.none() | DURATIONS,
        seen_seconds=DURATIONS,
    )
)
def test_a_member_survives(member: Member) -> None:
    assert decode_member(encode_member(member), seen_seconds=member.seen_seconds) == member


def test_a_moment_with_another_offset_is_the_same_moment(clock: FakeClock) -> None:
    row = event(clock)
    elsewhere = replace(row, at=row.at.astimezone(timezone(timedelta(hours=5, minutes=30))))
    assert decode_event(encode_event(elsewhere), number=0) == row


@given(st.text(max_size=20), st.integers(0, 2 * MAX_TEXT))
def test_any_text_can_be_stored(text: str, length: int) -> None:
    """What a sender or an administrator writes must not make the row malformed that records it."""
    text = text + "x" * length
    row = Event(datetime(2026, 3, 1, tzinfo=UTC), "acme", Cause.WRITE, actor=text, delivery_id=text, detail=text)
    stored = decode_event(encode_event(row), number=0)
    assert len(stored.detail) == min(len(text), MAX_TEXT)
    stored.detail.encode()
    failed = replace(Entry(), failure=replace(_failure(), message=text))
    assert decode_entry(encode_entry(failed)).failure is not None


def _failure() -> Failure:
    return Failure("unavailable", "", 503, 1, 0, 0, 1.0, datetime(2026, 3, 1, tzinfo=UTC), 2.0)


def test_a_field_that_is_unknown_is_ignored(clock: FakeClock) -> None:
    """A later version may add fields while both versions share a store."""
    entry = complete(clock)
    stored = json.loads(encode_entry(entry))
    stored["of_a_later_version"] = [1]
    for part in ("snapshot", "failure", "lease"):
        stored[part]["of_a_later_version"] = {"x": None}
    assert decode_entry(json.dumps(stored)) == entry
    row = event(clock)
    assert decode_event(json.dumps(json.loads(encode_event(row)) | {"new": 1}), number=0) == row
    member = Member("host:1", "acme", 1, True, "fresh", 1.0)
    assert decode_member(json.dumps(json.loads(encode_member(member)) | {"new": 1}), seen_seconds=0.0) == member


def test_a_field_that_is_missing_has_its_default() -> None:
    assert decode_entry("{}") == Entry()


@pytest.mark.parametrize(
    ("part", "name", "wrong"),
    [
        (None, "generation", -1),
        (None, "generation", MAX_COUNTER),
        (None, "generation", 1 << 60),
        (None, "generation", 1.0),
        (None, "generation", True),
        (None, "generation", "1"),
        (None, "token", [1]),
        (None, "paced_until", "now"),
        (None, "paced_until", 1e12),
        (None, "stale_since", 10**400),
        (None, "invalidated_at", False),
        (None, "snapshot", []),
        (None, "snapshot", "x"),
        ("snapshot", "enabled", "no"),
        ("snapshot", "enabled", 1),
        ("snapshot", "enabled", None),
        ("snapshot", "etag", 'a"'),
        ("snapshot", "etag", '"a\r\nX: y"'),
        ("snapshot", "etag", '"é"'),
        ("snapshot", "etag", 7),
        ("snapshot", "read_at", None),
        ("snapshot", "fetched_at", "yesterday"),
        ("snapshot", "fetched_at", "2026-03-01T12:00:00"),
        ("snapshot", "fetched_at", "0001-01-01T00:00:00+23:59"),
        ("snapshot", "fetched_at", 7),
        ("snapshot", "lifetime_seconds", 0),
        ("snapshot", "lifetime_seconds", -1),
        ("snapshot", "lifetime_seconds", 1e10),
        ("snapshot", "writer", "a\x00b"),
        ("snapshot", "writer", "a\ud800b"),
        ("failure", "kind", None),
        ("failure", "message", "x" * (MAX_TEXT + 1)),
        ("failure", "status", "503"),
        ("failure", "retry_at", "soon"),
        ("lease", "holder", 1),
        ("lease", "expires_at", None),
        ("lease", "token", -1),
    ],
)
def test_a_field_of_another_type_or_out_of_range_is_malformed(
    clock: FakeClock, part: str | None, name: str, wrong: object
) -> None:
    stored = json.loads(encode_entry(complete(clock)))
    (stored if part is None else stored[part])[name] = wrong
    with pytest.raises(MalformedError):
        decode_entry(json.dumps(stored))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "7",
        '"x"',
        "{",
        '{"generation": NaN}',
        '{"paced_until": Infinity}',
        '{"generation": ' + "1" * 10_000 + "}",
        "[" * 100_000,
        '{"snapshot": ' * 50_000,
        b"\xff\xfe{}",
        b"\x80",
        b"{\x00}",
    ],
)
@pytest.mark.parametrize("decode", [decode_entry, lambda text: decode_event(text, number=1)])
def test_a_text_that_is_no_object_is_malformed(decode: Callable[[Any], object], text: str | bytes) -> None:
    with pytest.raises(MalformedError):
        decode(text)


@pytest.mark.parametrize(
    "wrong",
    [{"cause": "other"}, {"cause": None}, {"at": None}, {"tenant": 1}, {"latency_seconds": -1}, {"enabled": 0}],
)
def test_a_malformed_event_is_refused(clock: FakeClock, wrong: dict[str, object]) -> None:
    with pytest.raises(MalformedError):
        decode_event(json.dumps(json.loads(encode_event(event(clock))) | wrong), number=1)


@pytest.mark.parametrize("wrong", [{"freshness": "new"}, {"name": None}, {"age_seconds": "1"}, {"enabled": "no"}])
def test_a_malformed_member_is_refused(wrong: dict[str, object]) -> None:
    stored = json.loads(encode_member(Member("host:1", "acme", 1, True, "fresh", 1.0)))
    with pytest.raises(MalformedError):
        decode_member(json.dumps(stored | wrong), seen_seconds=0.0)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from([name.name for name in fields(Entry)]), JSON, max_size=8))
def test_nothing_else_than_malformed_is_raised(stored: dict[str, object]) -> None:
    try:
        entry = decode_entry(json.dumps(stored))
    except MalformedError:
        return
    assert decode_entry(encode_entry(entry)) == entry
