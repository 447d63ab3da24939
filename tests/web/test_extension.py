from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flask import Flask, got_request_exception, jsonify
from flask_wtf.csrf import CSRFProtect
from openfeature import api as openfeature
from openfeature.client import OpenFeatureClient
from openfeature.provider import ProviderStatus

from external_oms import FLAG_KEY, ExternalOMSProvider
from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.errors import SettingsError
from external_oms.problems import PROBLEM_TYPE
from external_oms.settings import Settings
from external_oms.web import ExternalOMS
from external_oms.web.state import EXTENSION, OMS
from tests.support.pages import form_token
from tests.support.waiting import wait_until
from tests.support.web import BEARER, ENTRIES, HOOK, KEYS, SECRET, TENANT, Server, with_key

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
    oms = app.extensions[EXTENSION]
    assert isinstance(oms, OMS)
    return Server(app, app.test_client(), emulator, oms)


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


def test_the_extension_keeps_nothing_of_an_app(settings: MakeSettings) -> None:
    app = users_app()
    oms = ExternalOMS(app, settings())
    assert app not in vars(oms).values()


def test_two_apps_with_the_same_settings_share_one_provider(api: ConfigAPIEmulator, settings: MakeSettings) -> None:
    oms = ExternalOMS(settings=settings())
    apps = [users_app(), users_app()]
    states = [oms.init_app(app) for app in apps]
    assert states[0].provider is states[1].provider
    assert [server_of(app, api).deliver().status_code for app in apps] == [200, 200]
    assert server_of(apps[0], api).generation() == 2


def test_two_apps_with_settings_of_their_own_live_side_by_side_in_their_domains(
    api: ConfigAPIEmulator, settings: MakeSettings
) -> None:
    oms = ExternalOMS(settings=settings())
    one, other = users_app(), users_app()
    oms.init_app(one)
    theirs = api.settings("globex", webhook_api_keys=[BEARER])
    ExternalOMS(other, theirs, domain="globex")
    api.set_enabled("globex", True)
    sent = other.test_client().post(HOOK, json={}, headers={"Authorization": f"Bearer {BEARER}"})
    assert (sent.status_code, sent.get_json()["tenant"]) == (200, "globex")
    assert server_of(one, api).deliver().status_code == 200
    assert ready(openfeature.get_client("globex")).get_boolean_value(FLAG_KEY, False) is True
    assert ready(openfeature.get_client()).get_boolean_value(FLAG_KEY, True) is False


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


# -- the user's application and ours -----------------------------------------------------------------------------------


def test_the_users_application_gets_the_webhook_and_nothing_else(settings: MakeSettings) -> None:
    app = users_app()
    before = {str(rule) for rule in app.url_map.iter_rules()}
    hooks = (len(app.before_request_funcs), len(app.after_request_funcs), dict(app.error_handler_spec[None]))
    converters = dict(app.url_map.converters)
    ExternalOMS(app, settings())
    assert {str(rule) for rule in app.url_map.iter_rules()} - before == {HOOK}
    assert (len(app.before_request_funcs), len(app.after_request_funcs), dict(app.error_handler_spec[None])) == hooks
    assert app.url_map.converters == converters
    client = app.test_client()
    assert client.get("/nothing").get_json() == {"mine": True}
    assert client.get(HOOK).status_code == 405
    assert client.get("/healthz").get_json() == {"mine": True}


def test_the_rest_is_served_below_the_prefix(api: ConfigAPIEmulator, settings: MakeSettings) -> None:
    app = users_app()
    ExternalOMS(app, settings(), mount="/external-oms/")
    client = app.test_client()
    assert client.get("/").text == "home"
    assert client.get("/external-oms/healthz").get_json() == {"status": "alive"}
    lost = client.get("/external-oms/api/v1/nothing")
    assert (lost.status_code, lost.mimetype) == (404, PROBLEM_TYPE)
    wrong = client.post("/external-oms/healthz")
    assert (wrong.status_code, wrong.mimetype) == (405, PROBLEM_TYPE)
    assert client.get("/external-oms-else").get_json() == {"mine": True}
    assert client.get(f"/external-oms{HOOK}").status_code == 404, "the webhook has one place"
    assert server_of(app, api).deliver().status_code == 200
    assert client.get("/external-oms/metrics", headers=with_key("viewer")).status_code == 200
    document = client.get("/external-oms/openapi.json").get_json()
    assert document["servers"] == [{"url": "/external-oms"}]
    assert HOOK not in document["paths"]


def test_the_mounted_dashboard_logs_in_beside_the_users_own_session_and_forms(settings: MakeSettings) -> None:
    app = users_app()
    app.secret_key = "of the application"
    CSRFProtect(app)
    ExternalOMS(app, settings(), mount="/oms")
    browser = app.test_client()
    assert browser.get("/oms/").headers["Location"] == "/oms/login"
    data = {"csrf_token": form_token(browser.get("/oms/login")), "key": KEYS["viewer"]}
    answer = browser.post("/oms/login", data=data)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/oms/")
    (cookie,) = answer.headers.getlist("Set-Cookie")
    assert "Path=/oms" in cookie
    page = browser.get("/oms/")
    assert page.status_code == 200
    assert 'href="/oms/static/external-oms/dashboard.css"' in page.text


@pytest.mark.parametrize("prefix", ["", "/", "//", "external-oms", "/a//b"])
def test_the_root_is_not_a_prefix(settings: MakeSettings, prefix: str) -> None:
    app = users_app()
    with pytest.raises(SettingsError, match=r"^mount: .* is not a prefix"):
        ExternalOMS(app, settings(), mount=prefix)
    assert EXTENSION not in app.extensions
    assert app.test_client().get("/").text == "home"


REFUSED: list[tuple[dict[str, object], str | None]] = [
    ({"webhook_secrets": []}, None),
    ({"webhook_secrets": ["whsec_x"]}, None),
    ({"api_keys": []}, "/oms"),
    ({"session_secret": "short"}, "/oms"),
    ({"ofrep_origins": ["nonsense"]}, "/oms"),
]


@pytest.mark.parametrize(("given", "prefix"), REFUSED)
def test_a_failed_initialization_leaves_nothing_behind(
    settings: MakeSettings, given: dict[str, object], prefix: str | None
) -> None:
    app = users_app()
    rules, wsgi_app = {str(rule) for rule in app.url_map.iter_rules()}, app.wsgi_app
    with pytest.raises(SettingsError):
        ExternalOMS(app, settings(**given), mount=prefix)
    assert {str(rule) for rule in app.url_map.iter_rules()} == rules
    assert (EXTENSION in app.extensions, app.wsgi_app) == (False, wsgi_app)
    assert openfeature.get_provider_metadata().name != "external-oms"
    ExternalOMS(app, settings(), mount=prefix)
    assert {str(rule) for rule in app.url_map.iter_rules()} - rules == {HOOK}


def test_an_application_that_has_answered_already_is_refused_and_left_as_it_was(settings: MakeSettings) -> None:
    app = users_app()
    app.test_client().get("/")
    threads = set(threading.enumerate())
    with pytest.raises(AssertionError):
        ExternalOMS(app, settings())
    assert EXTENSION not in app.extensions
    assert openfeature.get_provider_metadata().name != "external-oms"
    wait_until(lambda: set(threading.enumerate()) <= threads)


def test_initializing_twice_is_once_and_with_other_settings_an_error(settings: MakeSettings) -> None:
    app, oms = users_app(), ExternalOMS(settings=settings())
    first = oms.init_app(app)
    rules = len(list(app.url_map.iter_rules()))
    assert oms.init_app(app) is first
    for other in (ExternalOMS(settings=settings(ttl_seconds=60)), ExternalOMS(settings=settings(), mount="/oms")):
        with pytest.raises(RuntimeError, match="was initialized before"):
            other.init_app(app)
    assert len(list(app.url_map.iter_rules())) == rules


def test_a_provider_of_other_settings_is_refused(settings: MakeSettings) -> None:
    provider = ExternalOMSProvider(settings())
    with pytest.raises(SettingsError, match=r"^provider"):
        ExternalOMS(users_app(), settings(ttl_seconds=60), provider=provider)
    provider.shutdown()


@pytest.mark.parametrize("csrf_first", [True, False])
def test_the_applications_csrf_protection_lets_deliveries_through(
    api: ConfigAPIEmulator, settings: MakeSettings, csrf_first: bool
) -> None:
    app = users_app()
    app.config |= {"SECRET_KEY": "x", "WTF_CSRF_ENABLED": True}
    app.add_url_rule("/form", "form", lambda: "taken", methods=["POST"])
    steps: list[Callable[[], object]] = [lambda: CSRFProtect(app), lambda: ExternalOMS(app, settings())]
    for step in steps if csrf_first else steps[::-1]:
        step()
    assert server_of(app, api).deliver().status_code == 200
    assert app.test_client().post("/form").status_code == 400


# -- crashes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mount", [None, "/oms"])
def test_a_crash_reaches_flasks_signal_and_propagates_under_testing(
    api: ConfigAPIEmulator, settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, mount: str | None
) -> None:
    app = users_app()
    ExternalOMS(app, settings(), mount=mount)
    server = server_of(app, api)

    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("a defect of ours")

    monkeypatch.setattr(type(server.oms.operations), "deliver", broken)
    monkeypatch.setattr(type(server.oms.cache), "state", broken)

    def crash() -> int:
        if mount is None:
            return server.deliver().status_code
        return server.client.get(f"{mount}/api/v1/tenants", headers=with_key("viewer")).status_code

    seen: list[BaseException] = []

    def record(_: Flask, exception: BaseException) -> None:
        seen.append(exception)

    got_request_exception.connect(record)
    try:
        assert crash() == 500
    finally:
        got_request_exception.disconnect(record)
    assert [str(exception) for exception in seen] == ["a defect of ours"]
    app.testing = True
    with pytest.raises(RuntimeError, match="a defect of ours"):
        crash()


# -- starting ----------------------------------------------------------------------------------------------------------


def test_under_testing_nothing_waits_for_the_network(api: ConfigAPIEmulator, settings: MakeSettings) -> None:
    api.fault(TENANT, Fault(delay_seconds=60, times=None, where="any"))
    app = users_app()
    app.testing = True
    ExternalOMS(app, settings(timeout_seconds=30))
    assert app.test_client().get("/").text == "home"
    assert openfeature.get_client().get_provider_status() is ProviderStatus.NOT_READY


@pytest.mark.parametrize(
    ("store", "multiprocess", "warned"), [("memory", True, 1), ("memory", False, 0), ("sqlite", True, 0)]
)
def test_a_delivery_over_memory_under_several_processes_is_warned_of_once(
    api: ConfigAPIEmulator,
    settings: MakeSettings,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    store: str,
    multiprocess: bool,
    warned: int,
) -> None:
    app = users_app()
    ExternalOMS(app, settings(store="memory://" if store == "memory" else f"sqlite:///{tmp_path}/state.db"))
    server = server_of(app, api)
    for _ in range(2):
        sent = server.deliver(environ_overrides={"wsgi.multiprocess": multiprocess})
        assert sent.status_code == 200
    lines = [record.getMessage() for record in caplog.records if "several processes" in record.getMessage()]
    assert len(lines) == warned
    assert not lines or "sqlite:////path/state.db" in lines[0]
