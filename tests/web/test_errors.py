from __future__ import annotations

import io
import logging

import pytest
from flask import Flask, got_request_exception, request

from external_oms.problems import PROBLEM_TYPE, Problem
from external_oms.web.errors import read_body
from tests.support.web import Server, with_key


@pytest.mark.parametrize("path", ["/nonsense", "/api/v1/nonsense", "/api/v1/tenants/", "/webhooks", "/%00", "/\u00e9"])
def test_an_unknown_path_is_a_problem(server: Server, path: str) -> None:
    answer = server.client.get(path, headers=with_key("viewer"))
    assert (answer.status_code, answer.mimetype) == (404, PROBLEM_TYPE)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/api/v1/tenants", {"GET", "HEAD", "OPTIONS"}),
        ("DELETE", "/api/v1/tenants/x", {"GET", "HEAD", "PUT", "OPTIONS"}),
        ("GET", "/api/v1/tenants/x/refresh", {"POST", "OPTIONS"}),
        ("POST", "/healthz", {"GET", "HEAD", "OPTIONS"}),
    ],
)
def test_a_method_that_is_not_there_is_a_problem_which_names_those_that_are(
    server: Server, method: str, path: str, allowed: set[str]
) -> None:
    answer = server.client.open(path, method=method)
    assert (answer.status_code, answer.mimetype) == (405, PROBLEM_TYPE)
    assert set(answer.headers["Allow"].split(", ")) == allowed
    options = server.client.options(path)
    assert (options.status_code, set(options.headers["Allow"].split(", ")), options.data) == (200, allowed, b"")


def test_a_method_nobody_knows_is_a_problem_too(server: Server) -> None:
    answer = server.client.open("/healthz", method="PROPFIND")
    assert (answer.status_code, answer.mimetype) == (405, PROBLEM_TYPE)


def test_head_answers_as_get_without_a_body(server: Server) -> None:
    answer = server.client.head("/healthz")
    assert (answer.status_code, answer.data) == (200, b"")


@pytest.mark.parametrize(
    ("path", "seen_as"), [("/api/v1/tenants", PROBLEM_TYPE), ("/ofrep/v1/evaluate/flags", "application/json")]
)
def test_a_crash_is_reported_by_flask_and_answered_without_its_text(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, path: str, seen_as: str
) -> None:
    def broken(*_: object) -> object:
        raise RuntimeError("a text that may hold a secret")

    seen: list[BaseException] = []

    def record(_: Flask, exception: BaseException) -> None:
        seen.append(exception)

    monkeypatch.setattr(type(server.oms.cache), "state", broken)
    monkeypatch.setattr(type(server.oms.cache), "lookup", broken)
    with got_request_exception.connected_to(record, server.app):
        answer = server.client.open(
            path, method="POST" if "ofrep" in path else "GET", headers=with_key("viewer"), json={}
        )
    assert (answer.status_code, answer.mimetype) == (500, seen_as)
    assert "secret" not in answer.text
    assert [str(exception) for exception in seen] == ["a text that may hold a secret"]
    assert [record.exc_info is not None for record in caplog.records if record.levelno == logging.ERROR] == [True]


def test_a_crash_propagates_under_testing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> object:
        raise RuntimeError("seen by the test")

    monkeypatch.setattr(type(server.oms.cache), "state", broken)
    server.app.testing = True
    with pytest.raises(RuntimeError, match="seen by the test"):
        server.get("/api/v1/tenants")


# -- bodies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "fits"), [(0, True), (1, True), (100, True), (101, False), (102, False), (100_000, False)]
)
@pytest.mark.parametrize("in_chunks", [True, False])
def test_the_limit_is_exact_whether_the_length_is_announced_or_not(size: int, fits: bool, in_chunks: bool) -> None:
    with Flask(__name__).test_request_context(method="POST", data=b"x" * size):
        if in_chunks:
            request.environ.pop("CONTENT_LENGTH", None)
            request.environ["wsgi.input_terminated"] = True
        if fits:
            assert read_body(100) == b"x" * size
        else:
            with pytest.raises(Problem) as refused:
                read_body(100)
            assert refused.value.status == 413


@pytest.mark.parametrize(
    "error", [ValueError("a chunk"), OSError("reset"), TimeoutError("late"), RuntimeError("gunicorn")]
)
def test_a_body_that_the_server_cannot_read_is_a_bad_request(error: Exception) -> None:
    class Broken(io.BytesIO):
        def readinto(self, *_: object) -> int:
            raise error

        def read(self, *_: object) -> bytes:
            raise error

    with Flask(__name__).test_request_context(method="POST"):
        request.environ |= {"wsgi.input": Broken(), "CONTENT_LENGTH": "10"}
        with pytest.raises(Problem) as refused:
            read_body(100)
        assert (refused.value.status, refused.value.headers["Connection"]) == (400, "close")
