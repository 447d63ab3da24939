from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest

from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.stores.base import Health
from tests.support.waiting import wait_until
from tests.support.web import TENANT, Server, StartServer


def readiness(server: Server) -> tuple[int, dict[str, Any]]:
    answer = server.client.get("/readyz")
    return answer.status_code, answer.get_json()


def settled(server: Server) -> None:
    """Wait until the first reads have ended, well or badly."""
    cache = server.oms.cache

    def ended() -> bool:
        states = [cache.state(name) for name in cache.tenants]
        return all(state.enabled is not None or state.failures for state in states)

    wait_until(ended)


def test_a_process_that_answers_is_alive_whatever_else_is_broken(start: StartServer, api: ConfigAPIEmulator) -> None:
    api.fault(TENANT, Fault(status=500, times=None))
    assert start().client.get("/healthz").get_json() == {"status": "alive"}


def test_a_process_becomes_ready_by_itself(server: Server) -> None:
    settled(server)
    status, body = readiness(server)
    assert (status, body["status"], body["problems"]) == (200, "ready", [])
    assert body["store"] == {"kind": "memory", "ok": True}
    assert body["tenants"] == {"configured": 1, "fresh": 1, "stale": 0, "expired": 0, "failing": 0}


def test_a_dead_api_with_servable_values_is_ready_and_says_so(server: Server) -> None:
    settled(server)
    server.api.fault(TENANT, Fault(status=500, times=None))
    assert server.deliver().status_code == 202
    status, body = readiness(server)
    assert (status, body["status"], body["tenants"]["stale"], body["tenants"]["failing"]) == (200, "degraded", 1, 1)
    assert body["problems"] == [
        "reads of the config API fail for 1 of 1 tenants; 1 of them are served from their last known value"
    ]


def test_a_dead_api_without_a_value_is_not_ready(start: StartServer, api: ConfigAPIEmulator) -> None:
    api.fault(TENANT, Fault(status=500, times=None))
    server = start()
    settled(server)
    status, body = readiness(server)
    assert (status, body["status"], body["tenants"]["expired"]) == (503, "unready", 1)


def test_one_dead_tenant_takes_nobody_out(start: StartServer, api: ConfigAPIEmulator) -> None:
    api.fault("globex", Fault(status=500, times=None))
    server = start(TENANT, "globex")
    settled(server)
    status, body = readiness(server)
    assert (status, body["status"]) == (200, "degraded")
    assert body["tenants"] == {"configured": 2, "fresh": 1, "stale": 0, "expired": 1, "failing": 1}


@pytest.mark.parametrize(("policy", "status"), [("default", 503), ("last", 503), ("on", 200), ("off", 200)])
def test_a_policy_for_what_has_expired_is_an_answer_too(
    start: StartServer, api: ConfigAPIEmulator, policy: str, status: int
) -> None:
    api.fault(TENANT, Fault(status=500, times=None))
    server = start(when_expired=policy)
    settled(server)
    assert readiness(server)[0] == status


@pytest.mark.parametrize("policy", ["default", "last", "on"])
def test_an_outage_beyond_every_window_takes_nobody_out(start: StartServer, policy: str) -> None:
    windows = {"stale_while_revalidate_seconds": 0.0, "stale_if_error_seconds": 0.0}
    server = start(when_expired=policy, **windows)
    settled(server)
    server.api.fault(TENANT, Fault(status=500, times=None))
    server.deliver()
    status, body = readiness(server)
    assert (status, body["tenants"]["expired"]) == (200, 1)


@pytest.mark.parametrize("policy", ["default", "off"])
def test_before_the_first_read_has_ended_a_process_is_not_ready(
    start: StartServer, api: ConfigAPIEmulator, policy: str
) -> None:
    api.fault(TENANT, Fault(delay_seconds=60, times=None, where="any"))
    assert readiness(start(when_expired=policy, timeout_seconds=30.0))[0] == 503


@pytest.mark.filterwarnings(
    "ignore:.*multi-threaded.*:DeprecationWarning"
)  # forking under threads is this test's subject
def test_a_worker_forked_before_the_first_read_ended_becomes_ready_by_being_asked(
    start: StartServer, api: ConfigAPIEmulator
) -> None:
    api.fault(TENANT, Fault(delay_seconds=60))  # the parent's read; it never ends in time
    server = start(timeout_seconds=20.0)
    wait_until(lambda: api.reads(TENANT))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            wait_until(lambda: readiness(server)[0] == 200)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_process_that_reads_only_when_asked_is_ready_to_be_asked(start: StartServer) -> None:
    server = start(refresh="lazy")
    assert readiness(server)[0] == 200
    assert server.api.reads(TENANT) == 0


@dataclass
class OutOfOrder:
    """A store's word about itself, as a full disk would make it."""

    problem: str = "the disk is full: /var/lib/oms; this process works alone until there is room"

    def health(self) -> Health:
        return Health(ok=False, problem=self.problem)


def test_a_store_out_of_order_is_degraded_and_tells_no_path(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    settled(server)
    trouble = OutOfOrder()
    monkeypatch.setattr(server.oms.store, "health", trouble.health)
    status, body = readiness(server)
    assert (status, body["status"]) == (200, "degraded")
    assert body["problems"] == ["the memory store cannot be used as configured; the log says why"]
    assert body["store"] == {"kind": "memory", "ok": False}


def test_an_open_route_names_no_tenant(two: Server) -> None:
    settled(two)
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert "globex" not in two.client.get(path).text
