"""OpenFeature's own Python client, unchanged, as a black box over real connections to a real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openfeature import api as openfeature
from openfeature.client import OpenFeatureClient
from openfeature.contrib.provider.ofrep import OFREPProvider
from openfeature.evaluation_context import EvaluationContext
from openfeature.exception import ErrorCode
from openfeature.flag_evaluation import Reason

from external_oms import FLAG_KEY
from external_oms.emulator import ConfigAPIEmulator, Fault
from tests.support.servers import Served, served
from tests.support.web import KEYS, TENANT

DOMAIN = "test_ofrep_python"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with ConfigAPIEmulator([TENANT]) as api, served(api, tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture
def client(server: Served) -> OpenFeatureClient:
    return client_with(server, KEYS["viewer"])


def client_with(server: Served, key: str) -> OpenFeatureClient:
    provider = OFREPProvider(server.url, headers_factory=lambda: {"X-API-Key": key})
    openfeature.set_provider_and_wait(provider, DOMAIN)
    return openfeature.get_client(DOMAIN)


def test_it_sees_a_flip_at_its_next_evaluation_on_whichever_worker(client: OpenFeatureClient, server: Served) -> None:
    for enabled in (True, False, True):
        server.flip(enabled)
        for _ in range(10):
            assert client.get_boolean_value(FLAG_KEY, not enabled) is enabled


def test_it_gets_reason_variant_and_metadata(client: OpenFeatureClient, server: Served) -> None:
    server.flip(True)
    details = client.get_boolean_details(FLAG_KEY, False, EvaluationContext("someone", {"tenant": TENANT}))
    assert (details.value, details.reason, details.variant, details.error_code) == (True, Reason.STATIC, "on", None)
    assert details.flag_metadata["tenant"] == TENANT
    assert details.flag_metadata["cache"] == "fresh"


@pytest.mark.parametrize(
    ("key", "context", "code"),
    [
        ("another", {}, ErrorCode.FLAG_NOT_FOUND),
        ("another/one", {}, ErrorCode.FLAG_NOT_FOUND),
        (FLAG_KEY, {"tenant": "nobody"}, ErrorCode.INVALID_CONTEXT),
        (FLAG_KEY, {"tenant": 7}, ErrorCode.INVALID_CONTEXT),
    ],
)
def test_it_is_told_what_is_wrong(
    client: OpenFeatureClient, key: str, context: dict[str, str | int], code: ErrorCode
) -> None:
    details = client.get_boolean_details(key, True, EvaluationContext(attributes=dict(context)))
    assert (details.value, details.reason, details.error_code) == (True, Reason.ERROR, code)


def test_a_read_of_another_type_gives_its_default(client: OpenFeatureClient) -> None:
    assert client.get_string_details(FLAG_KEY, "mine").error_code is ErrorCode.TYPE_MISMATCH


def test_without_a_good_key_it_gets_its_default(server: Served) -> None:
    details = client_with(server, "oms_wrong").get_boolean_details(FLAG_KEY, True)
    assert (details.value, details.error_code, details.error_message) == (True, ErrorCode.GENERAL, "unauthorized")


def test_while_the_config_api_is_down_it_goes_on_with_the_last_value(client: OpenFeatureClient, server: Served) -> None:
    server.flip(True)
    server.api.fault(TENANT, Fault(status=500, times=None))
    try:
        server.deliver_in_vain()
        details = client.get_boolean_details(FLAG_KEY, False)
        assert (details.value, details.reason, details.error_code) == (True, Reason.UNKNOWN, None)
        assert details.flag_metadata["cache"] == "stale"
    finally:
        server.api.clear(TENANT)
    server.flip(False)
    assert client.get_boolean_value(FLAG_KEY, True) is False
