"""One process that serves several tenants; each evaluation names its tenant in the context.

Run it with `python examples/many_tenants.py`. In a service the tenants come from the environment or the TOML file:

    EXTERNAL_OMS_TENANTS='{"acme": {"access_token": "…"}, "globex": {"access_token": "…"}}'
"""

from __future__ import annotations

from openfeature import api
from openfeature.evaluation_context import EvaluationContext

from external_oms import FLAG_KEY, ExternalOMSProvider
from external_oms.testing import ConfigAPIEmulator


def owner(tenant: str | None) -> str:
    """Return who owns an order of this tenant, and why."""
    context = EvaluationContext(attributes={"tenant": tenant} if tenant else {})
    details = api.get_client().get_boolean_details(FLAG_KEY, default_value=False, evaluation_context=context)
    return f"{'external' if details.value else 'ours'} ({details.error_code or details.reason})"


with ConfigAPIEmulator(["acme", "globex"]) as emulator:
    provider = ExternalOMSProvider(emulator.settings("acme", "globex"))
    api.set_provider_and_wait(provider)
    assert owner("acme").startswith("ours")

    emulator.set_enabled("globex", True)
    provider.refresh("globex")  # reads this tenant; the others keep their values and their generations
    assert owner("globex").startswith("external")
    assert provider.state("acme").generation == 0

    # Without a tenant, or with one that is not configured, there is no value to guess: the default is returned with an
    # error code, so route these orders as your default says and watch external_oms_evaluations_total.
    for tenant in ("acme", "globex", "initech", None):
        print(f"{tenant}: {owner(tenant)}")
    assert "INVALID_CONTEXT" in owner(None)
    api.shutdown()
