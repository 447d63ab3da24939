from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
from flask import Flask, jsonify
from openfeature import api as openfeature
from openfeature.client import OpenFeatureClient
from openfeature.provider import ProviderStatus

from external_oms import FLAG_KEY
from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.errors import SettingsError
from external_oms.settings import Settings
from external_oms.web import ExternalOMS
from external_oms.web.parts import Parts
from external_oms.problems import PROBLEM_TYPE
from tests.support.waiting import wait_until
from tests.support.web import BEARER, ENTRIES, HOOK, SECRET, TENANT, Server, with_key

MakeSettings = Callable[..., Settings]


@pytest.fixture
def settings(api: ConfigAPIEmulator) -> MakeSettings:
    return lambda **more: api.settings(**{"webhook_secrets": [SECRET], "api_keys": ENTRIES, **more})


@pytest.fixture(autouse=True)
def _openfeature_as_before() -> Iterator[None]:
    yield
    openfeature.shutdown()


def users_app() -> Flask:
    """An app of the user's, with habits of its own."""
    app = Flask("of-the-user")
    app.add_url_rule("/", "home", lambda: "home")
    app.add_url_rule("/api/v1/orders/<path:order>", "orders", lambda order: f"order {order}")
    app.register_error_handler(404, lambda _: (jsonify(mine=True), 404))
    app.register_error_handler(500, lambda _: (jsonify(mine=True), 500))
    return app


def server_of(app: Flask, emulator: ConfigAPIEmulator) -> Server:
    parts = app.extensions["external_oms"]
    assert isinstance(parts, Parts)
    return Server(app, app.test_client(), emulator, parts)


def ready(client: OpenFeatureClient) -> OpenFeatureClient:
    """The client, once the SDK has initialized its provider."""
    wait_until(lambda: client.get_provider_status() is ProviderStatus.READY)
    return client


def test_the_flag_is_evaluated_and_a_delivery_changes_it(api: ConfigAPIEmulator, settings: MakeSettings) -> None:
    app = users_app()
    ExternalOMS(app, settings())
    client = ready(openfeature.get_client())
    assert client.get_boolean_value(FLAG_KEY, True) is False
    api.set_enabled(TENANT, True)
    assert server_of(app, api).deliver().status_code == 200
    assert client.get_boolean_value(FLAG_KEY, False) is True


def test_only_what_was_chosen_is_mounted(api: ConfigAPIEmulator, settings: MakeSettings) -> None:
    bare, full = users_app(), users_app()
    ExternalOMS(bare, settings())
    ExternalOMS(full, settings(), api=True, health=True, url_prefix="/oms/")
    paths = ["/api/v1/tenants", "/healthz", "/openapi.json", HOOK]

    def statuses(app: Flask, prefix: str) -> list[int]:
        return [app.test_client().get(prefix + path, headers=with_key("viewer")).status_code for path in paths]

    assert statuses(bare, "") == [404, 404, 404, 405]
    assert statuses(full, "/oms") == [200, 200, 200, 405]
    assert statuses(full, "") == [404, 404, 404, 404]
    assert server_of(full, api).oms.mounted == {"webhook", "api", "health"}


def test_the_document_tells_what_is_mounted_and_where(settings: MakeSettings) -> None:
    app = users_app()
    ExternalOMS(app, settings(), api=True, webhook=False, url_prefix="/oms")
    document = app.test_client().get("/oms/openapi.json").get_json()
    assert document["servers"] == [{"url": "/oms"}]
    assert "/api/v1/tenants" in document["paths"]
    assert not {HOOK, "/healthz"} & set(document["paths"])


def test_the_apps_own_routes_and_errors_stay_its_own(settings: MakeSettings) -> None:
    app = users_app()
    ExternalOMS(app, settings(), api=True)
    client = app.test_client()
    assert client.get("/api/v1/orders/7/lines").text == "order 7/lines"
    assert client.get("/nothing").get_json() == {"mine": True}
    assert client.get("/api/v1/nothing").get_json() == {"mine": True}
    assert client.post("/").mimetype == "text/html"
    ours = client.get("/api/v1/tenants/nobody", headers=with_key("viewer"))
    assert (ours.status_code, ours.mimetype) == (404, PROBLEM_TYPE)
    assert client.get(HOOK).mimetype == PROBLEM_TYPE


def test_mounting_twice_is_mounting_once(settings: MakeSettings) -> None:
    app, oms = users_app(), ExternalOMS(settings=settings())
    first = oms.init_app(app)
    rules = len(list(app.url_map.iter_rules()))
    assert oms.init_app(app) is first
    assert ExternalOMS(app, settings(ttl_seconds=60)) is not None
    assert app.extensions["external_oms"] is first
    assert len(list(app.url_map.iter_rules())) == rules


def test_the_extension_keeps_nothing_of_an_app(settings: MakeSettings) -> None:
    app = users_app()
    oms = ExternalOMS(app, settings())
    assert app not in vars(oms).values()


def test_two_apps_with_the_same_settings_share_one_provider(api: ConfigAPIEmulator, settings: MakeSettings) -> None:
    oms = ExternalOMS(settings=settings())
    apps = [users_app(), users_app()]
    parts = [oms.init_app(app) for app in apps]
    assert parts[0].provider is parts[1].provider
    assert [server_of(app, api).deliver().status_code for app in apps] == [200, 200]
    assert server_of(apps[0], api).generation() == 2


def test_two_apps_with_settings_of_their_own_live_side_by_side_in_their_domains(
    api: ConfigAPIEmulator, settings: MakeSettings
) -> None:
    oms = ExternalOMS(settings=settings())
    one, other = users_app(), users_app()
    oms.init_app(one)
    theirs = api.settings("globex", webhook_api_keys=[BEARER])
    oms.init_app(other, theirs, domain="globex")
    api.set_enabled("globex", True)
    sent = other.test_client().post(HOOK, json={}, headers={"Authorization": f"Bearer {BEARER}"})
    assert (sent.status_code, sent.get_json()["tenant"]) == (200, "globex")
    assert server_of(one, api).deliver().status_code == 200
    assert ready(openfeature.get_client("globex")).get_boolean_value(FLAG_KEY, False) is True
    assert ready(openfeature.get_client()).get_boolean_value(FLAG_KEY, True) is False


def test_who_does_not_wait_starts_at_once_whatever_the_api_does(api: ConfigAPIEmulator, settings: MakeSettings) -> None:
    api.fault(TENANT, Fault(delay_seconds=60, times=None, where="any"))
    app = users_app()
    ExternalOMS(app, settings(timeout_seconds=30), wait=False)
    assert app.test_client().get("/").text == "home"
    assert openfeature.get_client().get_provider_status() is ProviderStatus.NOT_READY


def test_the_first_order_is_routed_by_a_value_that_was_read(api: ConfigAPIEmulator, settings: MakeSettings) -> None:
    api.set_enabled(TENANT, True)
    api.fault(TENANT, Fault(delay_seconds=0.3))
    ExternalOMS(users_app(), settings())
    assert openfeature.get_client().get_boolean_value(FLAG_KEY, False) is True


def test_a_dead_api_does_not_keep_an_app_from_starting(api: ConfigAPIEmulator, settings: MakeSettings) -> None:
    api.fault(TENANT, Fault(status=500, times=None))
    app = users_app()
    ExternalOMS(app, settings())
    assert app.test_client().get("/").text == "home"
    assert openfeature.get_client().get_provider_status() is ProviderStatus.ERROR
    assert openfeature.get_client().get_boolean_details(FLAG_KEY, False).reason == "ERROR"


def test_without_credentials_nothing_is_mounted_and_nothing_registered(settings: MakeSettings) -> None:
    app = users_app()
    with pytest.raises(SettingsError, match=r"^webhook_secrets"):
        ExternalOMS(app, settings(webhook_secrets=[]))
    with pytest.raises(SettingsError, match=r"^api_keys: is not set, and api would"):
        ExternalOMS(app, settings(api_keys=[]), api=True)
    assert "external_oms" not in app.extensions
    assert openfeature.get_provider_metadata().name != "external-oms"


def test_without_its_webhook_no_webhook_credentials_are_needed(settings: MakeSettings) -> None:
    app = users_app()
    ExternalOMS(app, settings(webhook_secrets=[], api_keys=[]), webhook=False, health=True)
    assert app.test_client().get("/healthz").status_code == 200


def test_settings_may_stand_in_the_apps_configuration(api: ConfigAPIEmulator) -> None:
    app = users_app()
    app.config |= {
        "EXTERNAL_OMS_TENANT": TENANT,
        "EXTERNAL_OMS_BASE_URL": api.base_url,
        "EXTERNAL_OMS_ACCESS_TOKEN": api.access_token(TENANT),
        "EXTERNAL_OMS_WEBHOOK_SECRETS": [SECRET],
    }
    ExternalOMS().init_app(app)
    assert server_of(app, api).deliver().status_code == 200


def test_insecure_restricts_our_routes_and_no_others(settings: MakeSettings) -> None:
    app = users_app()
    ExternalOMS(app, settings(insecure=True, webhook_secrets=[]))
    client = app.test_client()
    far = {"REMOTE_ADDR": "192.0.2.1"}
    assert client.post(HOOK, json={}, environ_overrides=far).status_code == 403
    assert client.get("/", environ_overrides=far).status_code == 200


def warnings_of_workers(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in (record.getMessage() for record in caplog.records) if "workers" in line]


def test_a_webhook_over_memory_under_several_workers_is_warned_of_once(
    settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SERVER_SOFTWARE", "gunicorn/23.0.0")
    monkeypatch.setattr(sys, "argv", ["gunicorn", "-w", "4", "app:app"])
    caplog.set_level(logging.WARNING, logger="external_oms")
    app, oms = users_app(), ExternalOMS(settings=settings())
    oms.init_app(app)
    oms.init_app(app)
    (warned,) = warnings_of_workers(caplog)
    assert "4 workers" in warned
    assert "sqlite:////path/state.db" in warned


def test_uwsgi_says_itself_how_many_there_are(
    settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uwsgi = ModuleType("uwsgi")
    uwsgi.__dict__["numproc"] = 3
    monkeypatch.setitem(sys.modules, "uwsgi", uwsgi)
    caplog.set_level(logging.WARNING, logger="external_oms")
    ExternalOMS(users_app(), settings())
    assert "3 workers" in warnings_of_workers(caplog)[0]


@pytest.mark.parametrize("choice", [{"webhook": False, "health": True}, {}])
def test_one_worker_or_no_webhook_is_nothing_to_warn_of(
    settings: MakeSettings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    choice: dict[str, bool],
) -> None:
    monkeypatch.setenv("SERVER_SOFTWARE", "gunicorn/23.0.0")
    monkeypatch.setattr(sys, "argv", ["gunicorn", "-w", "1" if not choice else "4"])
    caplog.set_level(logging.WARNING, logger="external_oms")
    ExternalOMS(users_app(), settings(), **choice)  # type: ignore[arg-type]  # a table of choices
    assert warnings_of_workers(caplog) == []


def test_shutting_openfeature_down_leaves_no_thread(settings: MakeSettings) -> None:
    before = set(threading.enumerate())
    app = users_app()
    ExternalOMS(app, settings())
    ready(openfeature.get_client())
    openfeature.shutdown()

    def left() -> set[str]:
        names = {thread.name for thread in set(threading.enumerate()) - before}
        return {name for name in names if name.startswith("external-oms")} - {"external-oms-emulator"}

    wait_until(lambda: not left())
