"""The webhook as any framework calls it: headers and body in, status, headers and document out."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from external_oms import ExternalOMSProvider
from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.errors import SettingsError
from external_oms.problems import PROBLEM_TYPE
from external_oms.records import Cause
from external_oms.testing import sign_delivery
from external_oms.webhook import SUMMARY_SECONDS, RefusalLog, Response, Webhook
from tests.support.clock import FakeClock
from tests.support.web import BEARER, OLD_SECRET, SECRET, TENANT

BODY = json.dumps({"tenant": TENANT}).encode()


@pytest.fixture
def api() -> Iterator[ConfigAPIEmulator]:
    with ConfigAPIEmulator([TENANT]) as emulator:
        yield emulator


@pytest.fixture
def provider(api: ConfigAPIEmulator) -> Iterator[ExternalOMSProvider]:
    secrets = {"webhook_secrets": [OLD_SECRET, SECRET], "webhook_api_keys": ["another-key", BEARER]}
    made = ExternalOMSProvider(api.settings(**secrets))
    yield made
    made.shutdown()


@pytest.fixture
def webhook(provider: ExternalOMSProvider) -> Webhook:
    return Webhook(provider)


def test_a_genuine_delivery_is_answered_with_the_value_read_after_it(webhook: Webhook, api: ConfigAPIEmulator) -> None:
    api.set_enabled(TENANT, True)
    response = webhook.receive(sign_delivery(BODY, SECRET), BODY)
    assert (response.status, response.headers["Content-Type"]) == (200, "application/json")
    assert response.document == {
        "tenant": TENANT,
        "generation": 1,
        "duplicate": False,
        "refreshed": True,
        "enabled": True,
    }
    assert json.loads(response.body) == response.document


def test_a_delivery_while_the_api_is_down_is_accepted(webhook: Webhook, api: ConfigAPIEmulator) -> None:
    api.fault(TENANT, Fault(status=500, times=None))
    response = webhook.receive(sign_delivery(BODY, SECRET), BODY)
    assert (response.status, response.document["refreshed"]) == (202, False)


@pytest.mark.parametrize(
    ("headers", "actor"),
    [
        (sign_delivery(BODY, OLD_SECRET), "webhook secret 1"),
        (sign_delivery(BODY, SECRET), "webhook secret 2"),
        ({"Authorization": f"Bearer {BEARER}", "Content-Type": "application/json"}, "webhook key 2"),
    ],
)
def test_the_history_names_the_credential(
    webhook: Webhook, provider: ExternalOMSProvider, headers: dict[str, str], actor: str
) -> None:
    assert webhook.receive(headers, BODY).status == 200
    rows = provider.service.operations.history(tenant=TENANT)
    assert [row.actor for row in rows if row.cause is Cause.DELIVERY] == [actor]


def test_a_repeated_delivery_changes_nothing_and_leaves_no_row(
    webhook: Webhook, provider: ExternalOMSProvider, api: ConfigAPIEmulator
) -> None:
    headers = sign_delivery(BODY, SECRET)
    webhook.receive(headers, BODY)
    rows, reads = len(provider.service.operations.history()), api.reads(TENANT)
    for _ in range(50):
        response = webhook.receive(headers, BODY)
        assert (response.status, response.document["duplicate"], response.document["generation"]) == (200, True, 1)
    assert (len(provider.service.operations.history()), api.reads(TENANT)) == (rows, reads)


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, BODY, 401),
        ({"Authorization": "Bearer wrong"}, BODY, 401),
        (sign_delivery(b"{}", SECRET), BODY, 401),
        (sign_delivery(BODY, SECRET) | {"content-type": "text/plain"}, BODY, 415),
        (sign_delivery(b"{", SECRET), b"{", 400),
        (sign_delivery(b'{"tenant": "nobody"}', SECRET), b'{"tenant": "nobody"}', 404),
        ({}, b"x" * 70_000, 413),
    ],
)
def test_a_refusal_is_a_problem(webhook: Webhook, headers: dict[str, str], body: bytes, status: int) -> None:
    kinds: list[str] = []
    webhook.refused.subscribe(kinds.append)
    response = webhook.receive(headers, body)
    assert (response.status, response.headers["Content-Type"]) == (status, PROBLEM_TYPE)
    assert response.document["status"] == status
    assert kinds == [response.document["kind"]]
    assert ("WWW-Authenticate" in response.headers) is (status == 401)


def test_the_names_of_the_headers_are_found_in_any_case(webhook: Webhook) -> None:
    headers = {name.upper(): value for name, value in sign_delivery(BODY, SECRET).items()}
    assert webhook.receive(headers, BODY).status == 200


def test_without_credentials_there_is_no_webhook(api: ConfigAPIEmulator) -> None:
    provider = ExternalOMSProvider(api.settings())
    with pytest.raises(SettingsError, match=r"^webhook_secrets: is not set"):
        Webhook(provider)
    provider.shutdown()


def test_it_needs_no_web_framework_and_no_extra() -> None:
    script = (
        "import sys; from external_oms.webhook import Webhook\n"
        "print([name for name in ('flask', 'werkzeug', 'standardwebhooks', 'limits') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "[]"


# -- a few lines are a view --------------------------------------------------------------------------------------------


def test_an_asynchronous_view_is_a_few_lines_and_does_not_stall_its_loop(webhook: Webhook) -> None:
    """As in FastAPI or Starlette, which hand headers over as a mapping and the body as bytes."""

    async def deliver(headers: dict[str, str], body: bytes) -> tuple[bytes, int, dict[str, str]]:
        response = await asyncio.to_thread(webhook.receive, headers, body)
        return response.body, response.status, dict(response.headers)

    async def serve() -> int:
        turns = 0
        delivery = asyncio.create_task(deliver(sign_delivery(BODY, SECRET), BODY))
        while not delivery.done():
            turns += 1
            await asyncio.sleep(0)
        assert (await delivery)[1] == 200
        return turns

    assert asyncio.run(serve()) > 1


def test_a_wsgi_view_is_a_few_lines(webhook: Webhook) -> None:
    def deliver(environ: dict[str, object], body: bytes) -> Response:
        headers = {
            name.removeprefix("HTTP_").replace("_", "-"): str(value)
            for name, value in environ.items()
            if name.startswith("HTTP_") or name == "CONTENT_TYPE"
        }
        return webhook.receive(headers, body, address=str(environ["REMOTE_ADDR"]))

    environ: dict[str, object] = {"REMOTE_ADDR": "192.0.2.1"}
    for name, value in sign_delivery(BODY, SECRET).items():
        key = name.upper().replace("-", "_")
        environ[key if key == "CONTENT_TYPE" else f"HTTP_{key}"] = value
    assert deliver(environ, BODY).status == 200


# -- the log of refusals -----------------------------------------------------------------------------------------------


def test_refusals_are_one_line_at_once_and_one_a_minute_while_they_last(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    planned: list[tuple[float, Callable[[], None]]] = []
    refusals = RefusalLog(
        logging.getLogger("external_oms.test"),
        "deliveries",
        monotonic=clock.monotonic,
        at=lambda _, when, job: planned.append((when, job)),
    )
    began = clock.monotonic()
    for _ in range(1000):
        refusals.count("unauthorized", "no signature")
    refusals.count("tenant", "unknown")
    (when, flush) = planned.pop()
    assert when == began + SUMMARY_SECONDS
    clock.advance(SUMMARY_SECONDS)
    flush()
    refusals.count("unauthorized", "no signature")
    (_, flush) = planned.pop()
    clock.advance(SUMMARY_SECONDS)
    flush()
    (_, flush) = planned.pop()
    clock.advance(SUMMARY_SECONDS)
    flush()
    assert planned == [], "nothing was refused for a minute"
    assert [record.getMessage() for record in caplog.records] == [
        "refused deliveries: unauthorized (no signature); more are counted for a minute",
        "refused deliveries in the last minute: 1000 (999 unauthorized, 1 tenant); last: unknown",
        "refused deliveries in the last minute: 1 (1 unauthorized); last: no signature",
    ]
