"""One tenant's API hangs under a storm of its deliveries: requests of another tenant find a thread."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from external_oms.settings import Settings
from external_oms.testing import ConfigAPIEmulator, Fault, sign_delivery
from external_oms.web.serving import THREADS
from tests.support.servers import FLAG_PATH, Served, served
from tests.support.waiting import wait_until
from tests.support.web import HOOK, KEYS, SECRET

HANGING, OTHER = "globex", "acme-staging"
MAX_WAITERS = Settings.model_fields["max_waiters_per_tenant"].get_default()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    with (
        ConfigAPIEmulator([OTHER, HANGING]) as api,
        served(
            api,
            tmp_path,
            workers=1,
            timeout_seconds="50",
            ttl_seconds="60",
            max_streams="0",
        ) as found,
    ):
        yield found


def evaluate(server: Served, tenant: str) -> tuple[int, dict[str, object]]:
    headers = {"X-API-Key": KEYS["viewer"], "Content-Type": "application/json"}
    return server.post(FLAG_PATH, json.dumps({"context": {"tenant": tenant}}).encode(), headers)


def deliver(server: Served, tenant: str) -> tuple[int, dict[str, object]]:
    body = json.dumps({"tenant": tenant}).encode()
    return server.post(HOOK, body, sign_delivery(body, SECRET))


@pytest.mark.timeout(120)
def test_another_tenant_is_served_while_the_deliveries_of_one_wait_for_its_api(server: Served) -> None:
    """Twice as many deliveries as the server has threads; all but a few are answered though the API hangs on."""
    assert evaluate(server, HANGING)[0] == 200
    assert evaluate(server, OTHER)[0] == 200
    server.api.fault(HANGING, Fault(delay_seconds=3600.0, times=None))
    statuses: list[int] = []

    def send() -> None:
        try:
            statuses.append(deliver(server, HANGING)[0])
        except (OSError, http.client.HTTPException):
            statuses.append(0)

    threads = [threading.Thread(target=send) for _ in range(2 * THREADS)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(statuses) >= len(threads) - MAX_WAITERS, message="the deliveries occupy the threads")
        assert server.api.reads(HANGING) == 2, "the read that hangs goes on hanging"
        server.api.set_enabled(OTHER, True)
        status, answer = deliver(server, OTHER)
        assert (status, answer["enabled"]) == (200, True)
        status, answer = evaluate(server, OTHER)
        assert (status, answer["value"]) == (200, True)
        assert set(statuses) == {202}
        assert len(statuses) == len(threads) - MAX_WAITERS, "the deliveries that wait still do"
    finally:
        server.api.stop()
        for thread in threads:
            thread.join()
