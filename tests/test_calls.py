"""How many functions a cold evaluation and a delivery call: a guard against layers that add up.

The limits are the most that was counted when they were set: the numbers vary, since threads meet in different orders. A
change that needs more calls raises them with a reason; a change that saves calls lowers them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from external_oms import FLAG_KEY, ExternalOMSProvider
from external_oms.testing import ConfigAPIEmulator
from tests.support.calls import Calls
from tests.support.redis import RedisServer
from tests.support.waiting import wait_until

LIMITS = {
    "memory": (215, 18, 205, 18),
    "sqlite": (390, 23, 345, 22),
    "redis": (365, 24, 355, 24),
}
"""Calls and modules of a cold evaluation, which opens the store and reads, and of a delivery with its read."""


@pytest.fixture(params=LIMITS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    if request.param == "redis":
        with RedisServer(tmp_path) as server:
            yield "redis", server.url
    else:
        url = "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/state/state.db"
        yield request.param, url


def test_a_cold_evaluation_and_a_delivery_call_few_functions(
    store: tuple[str, str], external_oms_api: ConfigAPIEmulator
) -> None:
    kind, url = store
    calls = Calls()
    with calls.installed():
        provider = ExternalOMSProvider(external_oms_api.settings(store=url))
        try:
            with calls.counting():
                assert provider.resolve_boolean_details(FLAG_KEY, True).value is False
            evaluation = calls.total, len(calls.modules), str(calls)
            deliveries = []
            for number in range(5):
                wait_until(lambda: provider.state().freshness == "fresh")
                with calls.counting():
                    tenant = external_oms_api.tenants[0]
                    assert provider.service.operations.deliver(tenant, delivery_id=f"{number}", actor="us").refreshed
                deliveries.append((calls.total, len(calls.modules), str(calls)))
            delivery = min(deliveries)  # what else is due at that moment comes on top
        finally:
            provider.shutdown()
    most, modules, most_of_delivery, modules_of_delivery = LIMITS[kind]
    print(f"{kind}: an evaluation makes {evaluation[2]}\n{kind}: a delivery makes {delivery[2]}")
    assert evaluation[0] <= most, evaluation[2]
    assert evaluation[1] <= modules, evaluation[2]
    assert delivery[0] <= most_of_delivery, delivery[2]
    assert delivery[1] <= modules_of_delivery, delivery[2]
