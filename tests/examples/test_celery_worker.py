"""celery_worker.py with the prefork pool and a real Redis: a delivery at another process reaches every child."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from external_oms.emulator import ConfigAPIEmulator
from external_oms.provider import ExternalOMSProvider
from external_oms.testing import sign_delivery
from external_oms.webhook import Webhook
from tests.support.redis import RedisServer
from tests.support.servers import environment, started
from tests.support.waiting import wait_until
from tests.support.web import SECRET, TENANT

EXAMPLES = Path(__file__).parents[2] / "examples"
CHILDREN = 2
TTL = "600"  # so long that no lifetime ends in the test: only the delivery can bring the new value
WORKER = ("-m", "celery", "--app", "celery_worker", "worker", "--pool", "prefork", "--concurrency", str(CHILDREN))


def test_every_child_routes_by_the_new_value_after_a_delivery(redis_server: RedisServer, tmp_path: Path) -> None:
    celery = pytest.importorskip("celery", reason="celery is not installed; it comes with the extra `test`")
    broker = redis_server.url.replace("/0", "/1")
    with ConfigAPIEmulator([TENANT]) as api:
        environ = environment(api, store=redis_server.url) | {
            "CELERY_BROKER_URL": broker,
            "EXTERNAL_OMS_TTL_SECONDS": TTL,
        }
        command = [sys.executable, *WORKER, "--without-gossip", "--without-mingle", "--loglevel", "INFO"]
        log = tmp_path / "log"  # a file, since nobody would read a pipe while the worker logs its tasks
        with log.open("w") as out, started(command, environ=environ, cwd=EXAMPLES, stdout=out, stderr=out):
            wait_until(lambda: " ready." in log.read_text(encoding="utf-8"), message="the worker does not start")
            sender = celery.Celery(broker=broker, backend=broker)

            def owners() -> dict[int, set[str]]:
                """Who owns the orders that each child routes, once every child has routed one."""
                found: defaultdict[int, set[str]] = defaultdict(set)

                def all_asked() -> bool:
                    sent = [sender.send_task("celery_worker.route_order", [n]) for n in range(4 * CHILDREN)]
                    for routed in (task.get(timeout=30) for task in sent):
                        found[routed["pid"]].add(routed["owner"])
                    return len(found) == CHILDREN

                wait_until(all_asked)
                return found

            try:
                assert list(owners().values()) == [{"ours"}] * CHILDREN
                deliver(api, redis_server.url)
                wait_until(lambda: list(owners().values()) == [{"external"}] * CHILDREN)
            finally:
                sender.close()


def deliver(api: ConfigAPIEmulator, store: str) -> None:
    """Switch the flag, and take the delivery in this process, as a web application does that shares the store."""
    provider = ExternalOMSProvider(api.settings(store=store, webhook_secrets=[SECRET], ttl_seconds=float(TTL)))
    try:
        api.set_enabled(TENANT, True)
        body = json.dumps({"tenant": TENANT}).encode()
        response = Webhook(provider).receive(sign_delivery(body, SECRET), body)
        assert (response.status, response.document["enabled"]) == (200, True)
    finally:
        provider.shutdown()
