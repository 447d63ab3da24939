from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from external_oms.emulator import ConfigAPIEmulator
from external_oms.errors import StoreError
from external_oms.web import api, create_app
from external_oms.web.state import EXTENSION
from tests.support.waiting import wait_until
from tests.support.web import BEARER, ENTRIES, HOOK, SECRET, TENANT, Server, StartServer, with_key

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    allow_header_conformance,
    unsupported_method,
]

SENDERS = ("nobody", "stranger", "viewer", "operator", "admin", "deliverer")


@pytest.fixture(scope="module")
def described() -> Iterator[schemathesis.BaseSchema]:
    """The document of a running server as schemathesis reads it, with names of tenants that are there."""
    with ConfigAPIEmulator([TENANT, "globex"]) as emulator:
        many = {f"{what}_per_minute": 1_000_000 for what in ("writes", "webhook")}
        credentials = {"webhook_secrets": [SECRET], "webhook_api_keys": [BEARER], "api_keys": ENTRIES}
        app = create_app(emulator.settings(TENANT, "globex", **many, **credentials))
        wait_until(lambda: app.test_client().get("/readyz").status_code == 200)
        document = app.test_client().get("/openapi.json").get_json()
        document["components"]["parameters"]["tenant"]["schema"] = {"enum": [TENANT, "globex", "nobody"]}
        document["components"]["schemas"]["Delivery"]["properties"]["tenant"] = {"enum": [TENANT, "globex", "nobody"]}
        schema = schemathesis.openapi.from_dict(document)
        schema.app = app
        yield schema
        app.extensions[EXTENSION].provider.shutdown()


OPERATIONS = [
    (method.upper(), path)
    for path, item in api.documented()["paths"].items()
    for method in item
    if method != "parameters" and not path.endswith("/events")  # a stream does not end; other tests read it
]


@pytest.mark.parametrize("who", SENDERS)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_answer_to_anything_is_a_documented_one(
    described: schemathesis.BaseSchema, method: str, path: str, who: str
) -> None:
    operation = described[path][method]
    headers = {"Authorization": f"Bearer {BEARER}"} if who == "deliverer" else with_key(who)
    kinds = [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]
    relaxed = [HealthCheck.too_slow, HealthCheck.filter_too_much]

    @given(case=st.one_of(kinds))
    @settings(max_examples=25, suppress_health_check=relaxed, derandomize=True, database=None)
    def answers(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(headers=headers, checks=CHECKS)

    answers()


def test_every_route_is_documented_and_every_documented_path_is_a_route(server: Server) -> None:
    routes = api.routed_paths(server.app)
    pages = {
        "/",
        "/history.csv",
        "/history.json",
        "/login",
        "/logout",
        "/static/external-oms/{filename}",
        *(f"/tenants/{{tenant}}{end}" for end in ("", "/switch", "/read")),
    }
    assert routes - pages == set(api.documented()["paths"])
    assert pages <= routes


def test_every_method_of_a_route_is_documented_and_no_other(server: Server) -> None:
    for path, item in api.documented()["paths"].items():
        allowed = server.client.options(path.format(tenant=TENANT, key="external_oms_enabled")).headers["Allow"]
        assert set(allowed.split(", ")) - {"HEAD", "OPTIONS"} == {m.upper() for m in item if m != "parameters"}


def references(part: Any) -> Iterator[str]:  # noqa: ANN401 - any JSON
    if isinstance(part, dict):
        yield from (value for name, value in part.items() if name == "$ref")
        for value in part.values():
            yield from references(value)
    elif isinstance(part, list):
        for value in part:
            yield from references(value)


def test_every_reference_leads_somewhere_and_every_component_is_used() -> None:
    document = api.documented()
    used = set(references(document))
    there = {
        f"#/components/{kind}/{name}"
        for kind, components in document["components"].items()
        if kind != "securitySchemes"
        for name in components
    }
    assert used == there


def test_every_operation_says_who_may_and_has_a_name_of_its_own() -> None:
    operations = [
        operation
        for item in api.documented()["paths"].values()
        for method, operation in item.items()
        if method != "parameters"
    ]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+", name) for name in names)
    for operation in operations:
        assert ("x-role" in operation) == (operation["security"][:2] == [{"bearer": []}, {"apiKey": []}])


def test_the_document_is_valid_openapi() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schemathesis.openapi.from_dict(api.documented()).validate()


def test_a_store_that_cannot_be_used_is_an_answer_as_documented(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise StoreError("the store cannot be used; see /readyz")

    monkeypatch.setattr(server.oms.cache, "invalidate", broken)
    answer = server.deliver()
    assert (answer.status_code, answer.get_json()["kind"]) == (503, "store")
    assert int(answer.headers["Retry-After"]) >= 1
    assert "503" in api.documented()["paths"][HOOK]["post"]["responses"]


def test_a_server_under_a_prefix_describes_itself_there(start: StartServer) -> None:
    server = start()
    document = server.client.get("/openapi.json", environ_overrides={"SCRIPT_NAME": "/oms"}).get_json()
    assert document["servers"] == [{"url": "/oms"}]
