"""How another process is told, by its environment, to read from an emulator."""

from __future__ import annotations

import json

from external_oms.emulator import ConfigAPIEmulator
from external_oms.settings import ENV_PREFIX, TenantSettings

__all__ = ["environment_of"]


def environment_of(emulator: ConfigAPIEmulator) -> dict[str, str]:
    """The variables that make every tenant of the emulator the configured ones, secrets included."""
    reached = {name: emulator.tenant_settings(name) for name in emulator.tenants}
    given: dict[str, str] = {"base_url": emulator.base_url, "token_url": emulator.token_url}
    if len(reached) == 1:
        name, only = next(iter(reached.items()))
        given |= {"tenant": name, **_credentials(only)}
    else:
        given["tenants"] = json.dumps({name: _credentials(one) for name, one in reached.items()})
    return {f"{ENV_PREFIX}{name.upper()}": value for name, value in given.items()}


def _credentials(reached: TenantSettings) -> dict[str, str]:
    if reached.client_id is None or reached.client_secret is None:
        return {}
    return {"client_id": reached.client_id, "client_secret": reached.client_secret.get_secret_value()}
