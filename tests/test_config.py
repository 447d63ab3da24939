"""The API's document: what is accepted, and that everything else is an error and never a value."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_oms.config import FLAG_KEY, Document, format_instant, parse_document, parse_instant
from external_oms.errors import MalformedAnswer

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def test_the_flag_has_its_name() -> None:
    assert FLAG_KEY == "external_oms_enabled"


@pytest.mark.parametrize("enabled", [True, False])
def test_both_shapes_of_the_answer_are_read(enabled: bool) -> None:
    since = datetime(2021, 7, 13, 20, 18, 25, tzinfo=UTC)
    wrapped = {"value": {"enabled": enabled}, "updated_at": "2021-07-13T20:18:25Z"}
    assert parse_document(json.dumps({"enabled": enabled}).encode()) == Document(enabled)
    assert parse_document(json.dumps(wrapped).encode()) == Document(enabled, since)


@given(enabled=st.booleans(), more=st.dictionaries(st.text(max_size=8), json_values, max_size=3))
def test_members_that_a_newer_api_adds_change_nothing(enabled: bool, more: dict[str, Any]) -> None:
    body = {name: value for name, value in more.items() if name not in {"value", "updated_at"}} | {"enabled": enabled}
    assert parse_document(json.dumps(body).encode()) == Document(enabled)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"<!doctype html><p>Please sign in", "not JSON"),
        (b'{"enabled": tr', "not JSON"),
        (b'{"enabled": true} {}', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"true", "not a JSON object"),
        (b'[{"enabled": true}]', "not a JSON object"),
        (b"{}", "is missing"),
        (b'{"Enabled": true}', "is missing"),
        (b'{"enabled": "true"}', "a JSON string"),
        (b'{"enabled": 1}', "a JSON number"),
        (b'{"enabled": 0.0}', "a JSON number"),
        (b'{"enabled": null}', "a JSON null"),
        (b'{"enabled": [true]}', "a JSON array"),
        (b'{"enabled": {}}', "a JSON object"),
        (b'{"value": true}', "`value` that is not a JSON object"),
        (b'{"value": {}, "enabled": true}', "is missing"),
        (b'{"enabled": true, "updated_at": 1626207505}', "a JSON number, not an instant"),
        (b'{"enabled": true, "updated_at": true}', "a JSON boolean, not an instant"),
        (b'{"enabled": true, "updated_at": "yesterday"}', "not an RFC 3339 instant"),
        (b'{"enabled": true, "updated_at": "2021-07-13T20:18:25"}', "not an RFC 3339 instant"),
        (b'{"enabled": true, "enabled": false}', "two members of one name"),
        (b'{"value": {"enabled": true, "enabled": true}}', "two members of one name"),
        (b'{"enabled": true, "updated_at": "0001-01-01T00:00:00+10:00"}', "not an RFC 3339 instant"),
    ],
)
def test_what_is_no_document_is_an_error_that_says_why(body: bytes, said: str) -> None:
    with pytest.raises(MalformedAnswer, match=said):
        parse_document(body)


@given(body=st.binary(max_size=64) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_document_or_a_malformed_answer(body: bytes) -> None:
    try:
        document = parse_document(body)
    except MalformedAnswer:
        return
    assert document.enabled in {True, False}


moments = st.datetimes(min_value=datetime(1, 1, 3), max_value=datetime(9999, 12, 29))  # noqa: DTZ001 - a zone is added below


@given(moment=moments, minutes=st.integers(-1439, 1439))
def test_an_instant_survives_its_text_to_the_millisecond(moment: datetime, minutes: int) -> None:
    aware = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    text = format_instant(aware)
    assert text.endswith("Z")
    assert timedelta(0) <= aware - parse_instant(text) < timedelta(milliseconds=1)
    assert parse_instant(text).tzinfo is UTC


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2021-07-13T20:18:25Z", "2021-07-13T20:18:25+00:00"),
        ("2021-07-13t20:18:25.5z", "2021-07-13T20:18:25.500000+00:00"),
        ("2021-07-13T20:18:25.123456789+02:30", "2021-07-13T17:48:25.123456+00:00"),
        ("2021-07-13T20:18:25-00:00", "2021-07-13T20:18:25+00:00"),
        ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00+00:00"),
        ("2016-12-31T15:59:60.9-08:00", "2017-01-01T00:00:00+00:00"),
    ],
)
def test_an_rfc_3339_instant_is_read_with_leap_seconds(text: str, instant: str) -> None:
    assert parse_instant(text).isoformat() == instant


@pytest.mark.parametrize(
    "text",
    [
        "20210713T201825Z",
        "2021-W28-2T20:18:25Z",
        "2021-194T20:18:25Z",
        "2021-07-13T20:18Z",
        "2021-07-13T20Z",
        "2021-07-13 20:18:25Z",
        "2021-07-13T20:18:25",
        "2021-07-13T20:18:25,5Z",
        "2021-07-13T20:18:25.Z",
        "2021-07-13T20:18:25+0200",
        "2021-07-13T20:18:25+02",
        "2021-07-13T20:18:25+02:00:00",
        "2021-07-13T20:18:25+24:00",
        "2021-07-13T24:00:00Z",
        "2021-02-29T20:18:25Z",
        "2021-07-13T20:18:60Z",
        "2016-12-30T23:59:60Z",
        "9999-12-31T23:59:60Z",
        "2021-07-13T20:18:25Z\n",
        " 2021-07-13T20:18:25Z",
        "\u0662021-07-13T20:18:25Z",
    ],
)
def test_other_forms_of_iso_8601_are_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - which of them does not matter
        parse_instant(text)
    with pytest.raises(MalformedAnswer, match="not an RFC 3339 instant"):
        parse_document(json.dumps({"enabled": True, "updated_at": text}).encode())


@given(text=st.text(max_size=30))
def test_an_instant_is_in_utc_or_a_value_error(text: str) -> None:
    try:
        moment = parse_instant(text)
    except ValueError:
        return
    assert moment.utcoffset() == timedelta(0)
