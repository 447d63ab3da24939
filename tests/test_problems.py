from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from external_oms.errors import (
    ExternalOMSError,
    LaggingAnswer,
    MalformedAnswer,
    NothingToServe,
    RateLimited,
    ReadError,
    StoreError,
    TenantError,
    TokenError,
    Unauthorized,
    Unavailable,
    WriteConflict,
    WriteError,
    WriteOutcomeUnknown,
)
from external_oms.problems import Problem, check_json_type, json_object, problem_of, whole_seconds

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
    if is_json:
        check_json_type(announced)
    else:
        with pytest.raises(Problem) as refused:
            check_json_type(announced)
        assert refused.value.status == 415


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (TenantError(None, "none named"), 400, "tenant"),
        (TenantError("x", "not configured"), 404, "tenant"),
        (WriteConflict("m", status=409), 409, "write_conflict"),
        (WriteOutcomeUnknown("m"), 504, "write_outcome_unknown"),
        (WriteError("m", status=400), 400, "write_refused"),
        (WriteError("m", status=422), 502, "write_refused"),
        (RateLimited("m", status=429, retry_after_seconds=2.2), 503, "rate_limited"),
        (TokenError("m"), 502, "token"),
        (Unauthorized("m", status=403), 502, "unauthorized"),
        (Unavailable("m"), 502, "unavailable"),
        (MalformedAnswer("m"), 502, "malformed"),
        (LaggingAnswer("m"), 502, "lagging"),
        (ReadError("m"), 502, "error"),
        (NothingToServe("acme", None), 503, "nothing_to_serve"),
        (StoreError("m"), 503, "store"),
        (ExternalOMSError("m"), 500, "unforeseen"),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, Exception) else str(part),
)
def test_each_of_our_errors_is_one_problem_with_its_own_words(error: ExternalOMSError, status: int, kind: str) -> None:
    problem = problem_of(error)
    assert (problem.status, problem.kind, problem.detail) == (status, kind, str(error))
    assert ("Retry-After" in problem.headers) == (status == 503)


def test_a_problem_has_the_members_of_the_rfc_and_one_word_for_programs() -> None:
    problem = Problem(503, "why", headers={"Retry-After": "3"})
    assert problem.document == {
        "type": "about:blank",
        "title": "Service Unavailable",
        "status": 503,
        "detail": "why",
        "kind": "service_unavailable",
    }
    assert problem.headers == {"Retry-After": "3"}


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "1"), (0.0, "1"), (-5.0, "1"), (0.2, "1"), (1.0, "1"), (1.01, "2"), (300.0, "300")]
)
def test_a_wait_is_told_in_whole_seconds_rounded_up(seconds: float | None, text: str) -> None:
    assert whole_seconds(seconds) == text
