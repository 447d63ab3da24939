"""The plugin in a user's own tests: run by pytest in pytest, and by hand where that shows more."""

from __future__ import annotations

import asyncio

import pytest
from openfeature import api
from openfeature.evaluation_context import EvaluationContext
from openfeature.exception import ProviderFatalError
from openfeature.provider import ProviderStatus
from openfeature.provider.in_memory_provider import InMemoryFlag, InMemoryProvider
from openfeature.provider.no_op_provider import NoOpProvider

from external_oms.config import FLAG_KEY
from external_oms.testing import override_enabled

pytestmark = pytest.mark.usefixtures("_fresh_registry")


@pytest.fixture
def _fresh_registry() -> None:
    api.clear_providers()


class Watched(InMemoryProvider):
    """A provider that tells how often it was started and stopped."""

    def __init__(self) -> None:
        super().__init__(
            {
                FLAG_KEY: InMemoryFlag("off", {"on": True, "off": False}),
                "other": InMemoryFlag("a", {"a": "text"}),
                "count": InMemoryFlag("a", {"a": 7}),
                "rate": InMemoryFlag("a", {"a": 0.5}),
                "shape": InMemoryFlag("a", {"a": {"x": 1}}),
            }
        )
        self.calls: list[str] = []

    def initialize(self, evaluation_context: EvaluationContext) -> None:
        self.calls.append("initialize")

    def shutdown(self) -> None:
        self.calls.append("shutdown")


class NeverReady(Watched):
    """A provider that the SDK takes for one that cannot evaluate."""

    def initialize(self, evaluation_context: EvaluationContext) -> None:
        raise ProviderFatalError


def _enabled(tenant: str | None = None, domain: str | None = None) -> bool:
    context = None if tenant is None else EvaluationContext(attributes={"tenant": tenant})
    return api.get_client(domain).get_boolean_value(FLAG_KEY, False, context)


def test_an_override_ends_with_its_context_and_the_provider_of_before_was_left_alone() -> None:
    provider = Watched()
    api.set_provider_and_wait(provider)
    with override_enabled(True):
        assert _enabled()
        assert api.get_client().get_provider_status() == ProviderStatus.READY
    assert not _enabled()
    assert api.get_client().provider is provider
    assert api.get_client().get_provider_status() == ProviderStatus.READY
    assert provider.calls == ["initialize"]


def test_an_override_for_one_tenant_leaves_the_others() -> None:
    api.set_provider_and_wait(Watched())
    with override_enabled(True, "acme"):
        assert (_enabled("acme"), _enabled("globex"), _enabled()) == (True, False, False)
        with override_enabled(True), override_enabled(False, tenant="acme"):
            assert (_enabled("acme"), _enabled("globex"), _enabled()) == (False, True, True)
        assert (_enabled("acme"), _enabled("globex")) == (True, False)


def test_other_flags_go_on_as_they_are() -> None:
    api.set_provider_and_wait(Watched())
    client = api.get_client()
    with override_enabled(True):
        assert client.get_string_value("other", "") == "text"
        assert client.get_integer_value("count", 0) == 7
        assert client.get_float_value("rate", 0.0) == 0.5
        assert client.get_object_value("shape", {}) == {"x": 1}
        assert client.get_boolean_details("unknown", True).error_code == "FLAG_NOT_FOUND"
        assert client.provider.get_provider_hooks() == []


def test_an_override_is_seen_in_the_answer_and_by_async_clients() -> None:
    api.set_provider_and_wait(Watched())
    context = EvaluationContext(attributes={"tenant": "acme"})
    with override_enabled(True, "acme"):
        details = asyncio.run(api.get_client().get_boolean_details_async(FLAG_KEY, False, context))
        assert not asyncio.run(api.get_client().get_boolean_value_async(FLAG_KEY, False))
        assert api.get_provider_metadata().name == "external-oms-override"
    assert (details.value, details.variant, details.reason) == (True, "on", "STATIC")
    assert details.flag_metadata == {"source": "override", "tenant": "acme"}


def test_a_provider_that_the_test_sets_meanwhile_stays() -> None:
    api.set_provider_and_wait(Watched())
    replaced = Watched()
    with override_enabled(True):
        api.set_provider_and_wait(replaced)
    assert api.get_client().provider is replaced


def test_an_override_holds_for_a_provider_that_is_set_or_cleared_after_it() -> None:
    replaced = Watched()
    with override_enabled(True):
        api.set_provider_and_wait(replaced)
        assert _enabled()
        api.clear_providers()
        assert _enabled()
        api.set_provider(NeverReady())
        assert _enabled()
    assert replaced.calls == ["initialize", "shutdown"]


def test_a_provider_that_is_set_for_a_domain_after_the_override_is_overridden() -> None:
    with override_enabled(True, domain="oms"):
        api.set_provider_and_wait(Watched())
        api.set_provider_and_wait(Watched(), "oms")
        assert (_enabled(domain="oms"), _enabled(domain="other"), _enabled()) == (True, False, False)
    assert not _enabled(domain="oms")


def test_a_domain_is_overridden_by_itself() -> None:
    api.set_provider_and_wait(Watched())
    api.set_provider_and_wait(Watched(), "oms")
    with override_enabled(True, domain="oms"):
        assert (_enabled(domain="oms"), _enabled()) == (True, False)
        with override_enabled(True):
            assert (_enabled(domain="oms"), _enabled()) == (True, True)
    assert (_enabled(domain="oms"), _enabled()) == (False, False)


def test_without_a_provider_the_override_stands_alone() -> None:
    with override_enabled(True):
        assert _enabled()
    assert isinstance(api.get_client().provider, NoOpProvider)
    assert not _enabled()


USERS_TESTS = """
    import os, urllib.error, urllib.request
    import pytest
    from openfeature import api
    from openfeature.evaluation_context import EvaluationContext

    def enabled(tenant=None):
        context = EvaluationContext(attributes={"tenant": tenant} if tenant else {})
        return api.get_client().get_boolean_value("external_oms_enabled", False, context)

    @pytest.mark.parametrize("value", [True, False] * 6)
    def test_the_flag_is_what_the_test_says(external_oms_enabled, value):
        external_oms_enabled(value)
        assert enabled() is value
        external_oms_enabled(not value)
        assert enabled() is not value
        external_oms_enabled(value, tenant="acme")
        assert enabled("acme") is value
        assert enabled("globex") is not value

    @pytest.mark.parametrize("n", range(4))
    def test_the_flag_is_back_afterwards(n):
        assert enabled() is False
        assert api.get_provider_metadata().name == "No-op Provider"

    def test_the_api_is_there(external_oms_api):
        external_oms_api.set_enabled(None, True)
        settings = external_oms_api.settings()
        url = settings.by_tenant()[settings.tenant].config_url(settings.tenant)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url)
        assert caught.value.code == 401
        caught.value.close()
        assert external_oms_api.reads() == 1
"""


APP_TESTS = """
    import pytest
    from flask import Flask
    from openfeature import api

    from external_oms import ExternalOMSProvider
    from external_oms.web import ExternalOMS

    @pytest.fixture(autouse=True)
    def environment(external_oms_api, monkeypatch):
        for name, value in external_oms_api.environment().items():
            monkeypatch.setenv(name, value)
        yield
        api.shutdown()

    def create_app():
        app = Flask(__name__)
        ExternalOMS(app)

        @app.get("/owner")
        def owner():
            return {"external": api.get_client().get_boolean_value("external_oms_enabled", False)}

        return app

    def external(app):
        return app.test_client().get("/owner").get_json()["external"]

    def test_the_app_is_created_after_it(external_oms_enabled):
        external_oms_enabled(True)
        app = create_app()
        assert external(app) is True
        external_oms_enabled(False)
        assert external(app) is False

    @pytest.fixture
    def app():
        return create_app()

    def test_the_app_is_created_before_it(app, external_oms_enabled):
        assert external(app) is False
        external_oms_enabled(True)
        assert external(app) is True

    def test_the_app_is_created_before_it_and_another_one_after_it(app, external_oms_enabled):
        external_oms_enabled(True)
        assert external(create_app()) is True
        assert external(app) is True

    def test_it_ends_with_the_test(app):
        assert external(app) is False
        assert isinstance(api.get_client().provider, ExternalOMSProvider)
"""


# The plugins of this repository's own tests, which a user need not have and which cost seconds to import.
QUICK = [option for name in ("schemathesis", "hypothesispytest", "anyio") for option in ("-p", f"no:{name}")]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_fixtures_work_in_a_users_tests_one_process_or_several(pytester: pytest.Pytester, workers: int) -> None:
    pytester.makepyfile(USERS_TESTS)
    result = pytester.runpytest_subprocess(*QUICK, "-n", str(workers), "-W", "error", timeout=150)
    result.assert_outcomes(passed=17)


@pytest.mark.timeout(180)
def test_the_flag_is_set_for_an_app_created_before_or_after_the_fixture_is_used(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(APP_TESTS)
    result = pytester.runpytest_subprocess(*QUICK, timeout=150)
    result.assert_outcomes(passed=4)


@pytest.mark.timeout(180)
def test_the_plugin_brings_nothing_of_the_server_until_a_fixture_is_used(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import sys

        def test_nothing_heavy(pytestconfig, external_oms_enabled):
            assert pytestconfig.pluginmanager.hasplugin("external_oms")
            external_oms_enabled(True)
            heavy = {"flask", "werkzeug", "redis", "standardwebhooks", "prometheus_client", "click"}
            assert not heavy & set(sys.modules)

        def test_then_it_comes(external_oms_api):
            assert "flask" in sys.modules
    """)
    result = pytester.runpytest_subprocess(*QUICK, timeout=150)
    result.assert_outcomes(passed=2)


@pytest.mark.timeout(180)
def test_the_fixtures_explain_themselves(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess(*QUICK, "--fixtures", "-q", timeout=150)
    result.stdout.fnmatch_lines(["external_oms_api*", "external_oms_enabled*"])
