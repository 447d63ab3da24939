"""flagd's own evaluator, unchanged, over the definition that is served."""

from __future__ import annotations

import pytest
from openfeature.contrib.tools.flagd.core import FlagdCore
from openfeature.evaluation_context import EvaluationContext
from openfeature.flag_evaluation import FlagResolutionDetails
from werkzeug.test import TestResponse

from external_oms import FLAG_KEY
from tests.support.web import TENANT, Server, StartServer, with_key

PATH = "/flagd/flags.json"


def get(server: Server, query: str = "", **headers: str) -> TestResponse:
    return server.client.get(f"{PATH}{query}", headers={**with_key("viewer"), **headers})


def evaluated(answer: TestResponse, *, default: bool = False, **context: str) -> FlagResolutionDetails[bool]:
    assert (answer.status_code, answer.mimetype) == (200, "application/json")
    core = FlagdCore()
    core.set_flags(answer.get_data(as_text=True))
    return core.resolve_boolean_value(FLAG_KEY, default, EvaluationContext(attributes=dict(context)))


def flip(server: Server, tenant: str, enabled: bool) -> None:
    server.api.set_enabled(tenant, enabled)
    assert server.deliver({"tenant": tenant}).status_code == 200


def test_flagd_evaluates_what_we_do(server: Server) -> None:
    for enabled, variant in ((True, "on"), (False, "off")):
        flip(server, TENANT, enabled)
        details = evaluated(get(server), default=not enabled)
        assert (details.value, details.variant) == (enabled, variant)


def test_the_definition_changes_with_the_value_alone(server: Server) -> None:
    tag = get(server).headers["ETag"]
    server.deliver()
    unchanged = get(server, **{"If-None-Match": tag})
    assert (unchanged.status_code, unchanged.data, unchanged.headers["ETag"]) == (304, b"", tag)
    assert unchanged.headers["Cache-Control"] == "no-cache"
    flip(server, TENANT, True)
    assert get(server, **{"If-None-Match": tag}).headers["ETag"] != tag
    flip(server, TENANT, False)
    assert get(server, **{"If-None-Match": f"W/{tag}"}).status_code == 304


def test_of_several_tenants_the_context_chooses_and_without_one_the_callers_default_holds(two: Server) -> None:
    flip(two, "globex", True)
    flip(two, TENANT, False)
    answer = get(two)
    assert evaluated(answer, tenant="globex").value is True
    assert evaluated(answer, default=True, tenant=TENANT).value is False
    for default in (True, False):
        assert evaluated(answer, default=default).value is default
        assert evaluated(answer, default=default, tenant="nobody").value is default


def test_one_tenant_of_several_can_be_asked_for(two: Server) -> None:
    flip(two, "globex", True)
    assert evaluated(get(two, "?tenant=globex")).value is True
    assert get(two, "?tenant=nobody").status_code == 404


@pytest.mark.parametrize("default", [True, False])
def test_where_nothing_may_be_served_the_callers_default_holds(start: StartServer, default: bool) -> None:
    nowhere = "http://127.0.0.1:9/{tenant}"
    assert evaluated(get(start(base_url=nowhere)), default=default).value is default
    assert evaluated(get(start(base_url=nowhere, when_expired="on")), default=default).value is True


def test_it_is_for_viewers_and_not_without_limit(start: StartServer) -> None:
    server = start(evaluations_per_minute=1)
    assert server.client.get(PATH).status_code == 401
    answers = [get(server) for _ in range(3)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused, "a new minute begins once at most"
    assert int(refused[0].headers["Retry-After"]) >= 1
