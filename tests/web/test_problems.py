from __future__ import annotations

import logging

import pytest
from flask import Blueprint, Flask, abort, redirect
from werkzeug.wrappers import Response

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
from external_oms.web.problems import PROBLEM_TYPE, Problem, problem_of, report_problems, resource, whole_seconds
from tests.support.web import Server, with_key

SECRET_TEXT = "a text of somebody else's, which may hold a secret"


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
def test_each_of_our_errors_is_one_problem_with_its_own_words(error: Exception, status: int, kind: str) -> None:
    problem = problem_of(error)
    assert (problem.status, problem.kind, problem.detail) == (status, kind, str(error))
    assert ("Retry-After" in problem.answer.headers) == (status == 503)


def test_a_problem_has_the_members_of_the_rfc_and_one_word_for_programs() -> None:
    answer = Problem(503, "why", headers={"Retry-After": "3"}).answer
    assert answer.get_json() == {
        "type": "about:blank",
        "title": "Service Unavailable",
        "status": 503,
        "detail": "why",
        "kind": "service_unavailable",
    }
    assert (answer.mimetype, answer.headers["Retry-After"]) == (PROBLEM_TYPE, "3")


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "1"), (0.0, "1"), (-5.0, "1"), (0.2, "1"), (1.0, "1"), (1.01, "2"), (300.0, "300")]
)
def test_a_wait_is_told_in_whole_seconds_rounded_up(seconds: float | None, text: str) -> None:
    assert whole_seconds(seconds) == text


@pytest.mark.parametrize("path", ["/nonsense", "/api/v1/nonsense", "/api/v1/tenants/", "/webhooks", "/%00", "/\u00e9"])
def test_an_unknown_path_is_a_problem(server: Server, path: str) -> None:
    answer = server.client.get(path, headers=with_key("viewer"))
    assert (answer.status_code, answer.mimetype) == (404, PROBLEM_TYPE)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/api/v1/tenants", "GET, HEAD, OPTIONS"),
        ("DELETE", "/api/v1/tenants/x", "GET, HEAD, PUT, OPTIONS"),
        ("GET", "/api/v1/tenants/x/refresh", "POST, OPTIONS"),
        ("POST", "/healthz", "GET, HEAD, OPTIONS"),
    ],
)
def test_a_method_that_is_not_there_is_a_problem_which_names_those_that_are(
    server: Server, method: str, path: str, allowed: str
) -> None:
    answer = server.client.open(path, method=method)
    assert (answer.status_code, answer.mimetype, answer.headers["Allow"]) == (405, PROBLEM_TYPE, allowed)
    asked = server.client.options(path)
    assert (asked.status_code, asked.headers["Allow"], asked.data) == (204, allowed, b"")


def test_a_method_nobody_knows_is_a_problem_too(server: Server) -> None:
    answer = server.client.open("/healthz", method="PROPFIND")
    assert (answer.status_code, answer.mimetype) == (405, PROBLEM_TYPE)


def test_head_answers_as_get_without_a_body(server: Server) -> None:
    answer = server.client.head("/healthz")
    assert (answer.status_code, answer.data) == (200, b"")


def small_app() -> Flask:
    app = Flask("small")
    ours = Blueprint("ours", __name__, url_prefix="/ours")
    report_problems(ours)

    def broken() -> str:
        raise RuntimeError(SECRET_TEXT)

    def aborted() -> str:
        abort(418, "short and stout")

    def aborted_with_an_answer() -> str:
        abort(Response("as it is", status=402))

    def elsewhere() -> Response:
        return redirect("/")

    for view in (broken, aborted, aborted_with_an_answer, elsewhere):
        resource(ours, f"/{view.__name__}", GET=view)
    app.register_blueprint(ours)
    app.add_url_rule("/theirs", "theirs", broken)
    return app


def test_an_error_nobody_foresaw_is_logged_here_and_says_nothing_there(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    answer = small_app().test_client().get("/ours/broken")
    assert (answer.status_code, answer.mimetype) == (500, PROBLEM_TYPE)
    assert SECRET_TEXT not in answer.text
    assert [record.exc_info is not None for record in caplog.records] == [True]


def test_what_flask_aborts_with_is_a_problem_and_a_made_answer_stays_as_it_is() -> None:
    client = small_app().test_client()
    aborted = client.get("/ours/aborted")
    assert (aborted.status_code, aborted.mimetype, aborted.get_json()["detail"]) == (
        418,
        PROBLEM_TYPE,
        "short and stout",
    )
    assert (client.get("/ours/aborted_with_an_answer").text, client.get("/ours/elsewhere").status_code) == (
        "as it is",
        302,
    )


def test_errors_of_the_app_around_us_stay_its_own() -> None:
    client = small_app().test_client()
    assert client.get("/nothing-there").mimetype == "text/html"
    assert client.get("/theirs").mimetype == "text/html"


def test_a_redirect_of_the_router_is_no_problem() -> None:
    app = Flask("strict")
    report_problems(app)
    app.add_url_rule("/folder/", "folder", lambda: "in it")
    assert app.test_client().get("/folder").status_code == 308
