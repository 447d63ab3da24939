"""What the hook tells of an evaluation, and of which it says nothing."""

from __future__ import annotations

import pytest
from openfeature.evaluation_context import EvaluationContext
from openfeature.flag_evaluation import FlagEvaluationDetails, FlagType, FlagValueType
from openfeature.hook import HookContext

from external_oms import FLAG_KEY
from external_oms.settings import Settings
from external_oms.web.metrics import MetricsHook
from external_oms.web.state import Evaluation
from external_oms.wiring import build_service


def told(key: str, reason: str | None, attributes: dict[str, FlagValueType], *tenants: str) -> list[Evaluation]:
    """What a hook over these tenants tells of one evaluation."""
    given: list[Evaluation] = []
    entries = {tenant: {"access_token": "t"} for tenant in tenants}
    hook = MetricsHook(build_service(Settings(tenants=entries, refresh="lazy")).cache, given.append)
    context = HookContext(key, FlagType.BOOLEAN, False, EvaluationContext(None, attributes))
    hook.finally_after(context, FlagEvaluationDetails[FlagValueType](key, True, reason=reason), {})
    return given


@pytest.mark.parametrize("reason", ["CACHED", "STATIC", "STALE", "DEFAULT", "ERROR"])
def test_an_evaluation_is_told_with_its_reason(reason: str) -> None:
    value = "none" if reason == "ERROR" else "on"
    assert told(FLAG_KEY, reason, {"tenant": "acme"}, "acme", "globex") == [Evaluation("acme", reason, "sdk", value)]


@pytest.mark.parametrize("reason", [None, "", "of another provider's own making"])
def test_a_reason_that_openfeature_does_not_know_is_unknown(reason: str | None) -> None:
    assert told(FLAG_KEY, reason, {}, "acme") == [Evaluation("acme", "UNKNOWN", "sdk", "on")]


@pytest.mark.parametrize("attributes", [{}, {"tenant": "initech"}, {"tenant": ["acme"]}, {"tenant": True}])
def test_a_tenant_that_is_not_configured_is_not_told(attributes: dict[str, FlagValueType]) -> None:
    assert told(FLAG_KEY, "ERROR", attributes, "acme", "globex") == [Evaluation("", "ERROR", "sdk", "none")]


def test_of_another_flag_nothing_is_told() -> None:
    assert told("another_flag", "STATIC", {}, "acme") == []
