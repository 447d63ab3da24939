from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from flask import Request
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.test import EnvironBuilder

from external_oms.web.bodies import demand_json_type, json_object, raw_body
from external_oms.problems import Problem

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_every_json_object_comes_out_as_it_went_in(value: dict[str, Any]) -> None:
    assert json_object(json.dumps(value).encode()) == value
    assert json_object(json.dumps(value, ensure_ascii=True, indent=1).encode()) == value


@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_a_problem(body: bytes) -> None:
    with suppress(Problem):
        assert isinstance(json_object(body), dict)


@given(VALUES.filter(lambda value: not isinstance(value, dict)))
def test_json_that_is_no_object_is_a_problem(value: object) -> None:
    with pytest.raises(Problem, match=r"JSON, but not an object|each name once"):
        json_object(json.dumps(value).encode())


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": 1, "a": 1}',
        b'{"b": {"a": 1, "a": 2}}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b"[" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
        '{"a": 1}'.encode("utf-16"),
        b'\xef\xbb\xbf{"a": 1}',
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_two_readers_might_read_differently_is_a_problem(body: bytes) -> None:
    with pytest.raises(Problem) as refused:
        json_object(body)
    assert refused.value.status == 400


def asked(body: bytes, **more: Any) -> Request:  # noqa: ANN401 - the builder's own arguments
    return Request(EnvironBuilder(method="POST", data=body, **more).get_environ())


@pytest.mark.parametrize(
    ("size", "fits"), [(0, True), (1, True), (100, True), (101, False), (102, False), (100_000, False)]
)
@pytest.mark.parametrize("in_chunks", [True, False])
def test_the_cap_is_exact_whether_the_length_is_announced_or_not(size: int, fits: bool, in_chunks: bool) -> None:
    request = asked(b"x" * size)
    if in_chunks:
        request.environ.pop("CONTENT_LENGTH", None)
        request.environ["wsgi.input_terminated"] = True
        request = Request(request.environ)
    if fits:
        assert raw_body(request, max_bytes=100) == b"x" * size
    else:
        with pytest.raises(Problem) as refused:
            raw_body(request, max_bytes=100)
        assert refused.value.status == 413


@pytest.mark.parametrize(
    ("announced", "is_json"),
    [
        ("application/json", True),
        ("APPLICATION/JSON; charset=utf-8", True),
        ("application/problem+json", True),
        ("text/json", False),
        ("image/svg+json", False),
        ("application/jsonp", False),
        ("", False),
    ],
)
def test_json_is_what_is_announced_as_json(announced: str, is_json: bool) -> None:
    request = asked(b"{}", content_type=announced)
    if is_json:
        demand_json_type(request)
    else:
        with pytest.raises(Problem) as refused:
            demand_json_type(request)
        assert refused.value.status == 415
