"""JSON and server time: what goes out comes back, and an age is never too small."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_oms.config import Failure, Snapshot
from external_oms.stores.base import Cause, Event, Member
from external_oms.stores.redis_wire import (
    STRANGE,
    Remote,
    ServerClock,
    Stamp,
    decode_answer,
    decode_differing,
    decode_index,
    decode_members,
    decode_message,
    decode_remote,
    decode_rows,
    decode_stamp,
    encode_event,
    encode_failure,
    encode_members,
    encode_snapshot,
    row_id,
    stream_id,
)

INSTANTS = st.floats(-1e6, 1e6)
TRIPS = st.floats(0.0, 1.0)
WALL = 1_795_000_000.0
"""A server's clock, seconds since the epoch."""

MOMENTS = st.datetimes(datetime(2001, 1, 1), datetime(2101, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - made aware by hypothesis
SNAPSHOTS = st.builds(
    Snapshot,
    enabled=st.booleans(),
    updated_at=st.none() | MOMENTS,
    etag=st.none() | st.text(),
    generation=st.integers(0, 2**40),
    read_number=st.integers(0, 2**40),
    read_at=INSTANTS,
    fetched_at=MOMENTS,
    lifetime_seconds=st.floats(0.0, 1e6),
)
FAILURES = st.builds(
    Failure,
    kind=st.text(),
    message=st.text(),
    status=st.none() | st.integers(100, 599),
    count=st.integers(1, 10**6),
    read_number=st.integers(0, 2**40),
    generation=st.integers(0, 2**40),
    failed_at=INSTANTS,
    since=MOMENTS,
    not_before=INSTANTS,
    obliged=st.booleans(),
)


def told(offset: float, local: float) -> int:
    """What a server says whose clock is so far ahead of ours."""
    return round((local + offset) * 1_000_000)


def set_clock(offset: float = WALL, *, at: float = 0.0, trip: float = 0.0) -> ServerClock:
    clock = ServerClock()
    clock.note(at, at + trip, told(offset, at + trip / 2))
    return clock


def parts(snapshot: str = "", failure: str = "", *, invalidated_at: str = "") -> list[str]:
    return ["1", "epoch", "7", "1795000000000001", "3", invalidated_at, snapshot, failure, "1795000000000000"]


def remote(*, snapshot: str = "", failure: str = "", now: float = 1e9, clock: ServerClock | None = None) -> Remote:
    return decode_remote(parts(snapshot, failure), member="me", now=now, clock=clock or set_clock())


# -- two clocks ---------------------------------------------------------------------------------------------------


@given(offset=st.floats(-1e3, 1e3), trips=st.lists(st.tuples(TRIPS, st.floats(0, 1)), min_size=1), instant=INSTANTS)
def test_an_instant_is_never_taken_for_later_than_it_was_nor_for_much_earlier(
    offset: float, trips: list[tuple[float, float]], instant: float
) -> None:
    clock, at = ServerClock(), 0.0
    for trip, part in trips:
        clock.note(at, at + trip, told(WALL + offset, at + trip * part))
        at += trip + 1.0
    latest = trips[-1][0]
    rounding = 1e-5
    assert -latest - rounding <= clock.local(told(WALL + offset, instant)) - instant <= rounding
    assert -latest - rounding <= clock.server(instant) / 1e6 - (instant + WALL + offset) <= rounding


@given(step=st.floats(-1e6, 1e6).filter(lambda step: abs(step) > 1))
def test_a_clock_that_was_set_is_believed_from_the_next_round_trip_on(step: float) -> None:
    clock = set_clock(WALL, trip=0.01)
    clock.note(10.0, 10.01, told(WALL + step, 10.005))
    assert clock.local(told(WALL + step, 10.0)) == pytest.approx(10.0, abs=0.02)


def test_a_clock_knows_whether_it_was_ever_told() -> None:
    assert not ServerClock().is_set
    assert set_clock().is_set


def test_nothing_was_read_in_the_future() -> None:
    """The server's clock was set back an hour after the read."""
    clock = set_clock(WALL - 3600.0)
    text = encode_snapshot(snapshot_at(0.0), member="other", clock=set_clock(WALL))
    read = remote(snapshot=text, now=5.0, clock=clock).record.snapshot
    assert read is not None
    assert read.read_at == 5.0


# -- there and back -----------------------------------------------------------------------------------------------


def snapshot_at(read_at: float) -> Snapshot:
    day = datetime(2026, 3, 1, tzinfo=UTC)
    return Snapshot(True, day, '"e"', 7, 3, read_at, day, 30.0)


@given(snapshot=SNAPSHOTS)
def test_a_snapshot_comes_back(snapshot: Snapshot) -> None:
    back = remote(snapshot=encode_snapshot(snapshot, member="other", clock=set_clock()))
    read = back.record.snapshot
    assert read is not None
    assert read.read_at == pytest.approx(snapshot.read_at, abs=1e-5)
    assert (read.enabled, read.updated_at, read.etag) == (snapshot.enabled, snapshot.updated_at, snapshot.etag)
    assert (read.generation, read.read_number) == (snapshot.generation, snapshot.read_number)
    assert (read.fetched_at, read.lifetime_seconds) == (snapshot.fetched_at, snapshot.lifetime_seconds)
    assert back.record.foreign
    assert back.stamp == Stamp("epoch", 7, 1795000000000001)


@given(failure=FAILURES)
def test_a_failure_comes_back(failure: Failure) -> None:
    read = remote(failure=encode_failure(failure, clock=set_clock())).record.failure
    assert read is not None
    assert read.failed_at == pytest.approx(failure.failed_at, abs=1e-5)
    assert read.not_before == pytest.approx(failure.not_before, abs=1e-5)
    assert (read.kind, read.message, read.status, read.count) == (
        failure.kind,
        failure.message,
        failure.status,
        failure.count,
    )
    assert (read.since, read.obliged, read.generation) == (failure.since, failure.obliged, failure.generation)


def test_what_we_stored_ourselves_is_not_foreign() -> None:
    text = encode_snapshot(snapshot_at(0.0), member="me", clock=set_clock())
    assert not remote(snapshot=text).record.foreign
    assert not remote().record.foreign


def test_a_row_of_history_comes_back() -> None:
    event = Event(datetime(2026, 3, 1, 12, 0, 0, 250, tzinfo=UTC), "acme", Cause.WRITE, True, "né", "msg", 0.5, "→", 9)
    ((number, back),) = decode_rows([["1795000000000-4", ["event", encode_event(event)]]])
    assert number == 1795000000000004
    assert back == replace(event, id=number)
    assert decode_rows([]) == []


@pytest.mark.parametrize("text", ["{}", "[]", "x", '{"at": 1, "cause": "of a later version", "tenant": "acme"}'])
def test_a_row_that_cannot_be_read_is_passed_over(text: str) -> None:
    assert decode_rows([["1-0", ["event", text]]]) == [(1000, None)]


def test_what_a_later_version_says_beyond_this_one_is_passed_over() -> None:
    event = Event(datetime(2026, 3, 1, tzinfo=UTC), "acme", Cause.WRITE)
    text = json.dumps(json.loads(encode_event(event)) | {"more": 1})
    assert decode_rows([["1-0", ["event", text]]]) == [(1000, replace(event, id=1000))]
    member = Member("host:1", "acme", 3, None, "expired", None)
    text = json.dumps([json.loads(encode_members([member]))[0] | {"more": 1}])
    assert decode_members(text, seen_seconds=0.0) == [member]


@given(milliseconds=st.integers(0, 2**42), sequence=st.integers(0, 999))
def test_a_rows_number_is_its_id_in_the_stream(milliseconds: int, sequence: int) -> None:
    assert stream_id(row_id(f"{milliseconds}-{sequence}")) == f"{milliseconds}-{sequence}"
    assert row_id(f"{milliseconds}-{sequence}") < row_id(f"{milliseconds + 1}-0")


def test_members_come_back_with_how_long_ago_they_were_heard_of() -> None:
    members = [Member("host:1", "acme", 3, None, "expired", None), Member("host:1", "other", 4, True, "fresh", 1.5)]
    assert decode_index(["61000", ["host:1", "60000"]]) == {"host:1": 1.0}
    back = decode_members(encode_members(members), seen_seconds=1.0)
    assert [(one.tenant, one.seen_seconds) for one in back] == [("acme", 1.0), ("other", 1.0)]


def test_a_stamp_is_read_or_there_is_none() -> None:
    assert decode_stamp(["e", "3", "17"]) == Stamp("e", 3, 17)
    assert decode_stamp([None, None, None]) == Stamp()


def test_stamps_that_differ_are_known_by_their_place() -> None:
    assert decode_differing(["17", []]) == (17, {})
    stamps = {0: Stamp("e", 3, 17), 7: Stamp()}
    assert decode_differing(["17", ["0", str(stamps[0]), "7", str(stamps[7])]]) == (17, stamps)


# -- strangers ----------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=10) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@given(said=JSON)
def test_a_message_of_a_stranger_is_refused_or_is_no_harm(said: object) -> None:
    try:
        message = decode_message(json.dumps(said))
        decode_remote(message.parts, member="me", now=0.0, clock=set_clock())
    except STRANGE:
        return
    pytest.fail("nothing that hypothesis makes up is a message")


@given(text=st.text())
def test_text_that_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(STRANGE):
        decode_message("{" + text)


@pytest.mark.parametrize(
    "reply", [None, "", [], ["1"], [["1"], []], [[*"12345678", None], []], [[*"12345678", ["9"]], []]]
)
def test_an_answer_of_another_shape_is_refused(reply: object) -> None:
    with pytest.raises(STRANGE):
        decode_answer(reply)  # type: ignore[arg-type]  # what a server says is not typed


@pytest.mark.parametrize(
    "reply", [None, ["1"], ["x", []], ["1", ["0"]], ["1", ["0", "e 1"]], ["1", ["x", ""]], ["1", [[], ""]]]
)
def test_differences_of_another_shape_are_refused(reply: object) -> None:
    with pytest.raises(STRANGE):
        decode_differing(reply)  # type: ignore[arg-type]  # as above


@pytest.mark.parametrize("reply", [None, "x", ["e", None, None], ["e", "x", "1"], ["e", "1", [], "4"]])
def test_fields_of_another_shape_are_refused(reply: object) -> None:
    with pytest.raises(STRANGE):
        decode_stamp(reply)  # type: ignore[arg-type]  # as above


@pytest.mark.parametrize("reply", [["x"], [["1-0", ["event"]]], [["x", ["event", "[]"]]], "text"])
def test_rows_of_another_shape_are_refused(reply: object) -> None:
    with pytest.raises(STRANGE):
        decode_rows(reply)  # type: ignore[arg-type]  # as above


@pytest.mark.parametrize("reply", [None, ["1"], ["x", ["a", "b"]], ["1", ["a"]], ["1", ["a", None]]])
def test_an_index_of_another_shape_is_refused(reply: object) -> None:
    with pytest.raises(STRANGE):
        decode_index(reply)  # type: ignore[arg-type]  # as above
