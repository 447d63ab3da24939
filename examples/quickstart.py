"""The flag in a plain script: evaluate it, see where the value comes from, and hear of a change.

Run it with `python examples/quickstart.py`. An emulator stands in for the config API; in a service, write
`ExternalOMSProvider()` and set `EXTERNAL_OMS_…` in the environment.
"""

from __future__ import annotations

import threading

from openfeature import api
from openfeature.event import EventDetails, ProviderEvent

from external_oms import FLAG_KEY, ExternalOMSProvider
from external_oms.testing import ConfigAPIEmulator

changed = threading.Event()


def on_change(details: EventDetails) -> None:
    """Handle PROVIDER_CONFIGURATION_CHANGED; the SDK calls it in a thread of its own."""
    print("changed:", details.flags_changed)
    changed.set()


with ConfigAPIEmulator(["acme-staging"]) as emulator:
    provider = ExternalOMSProvider(emulator.settings())
    api.set_provider_and_wait(provider)
    api.add_handler(ProviderEvent.PROVIDER_CONFIGURATION_CHANGED, on_change)
    client = api.get_client()

    details = client.get_boolean_details(FLAG_KEY, default_value=False)
    print(f"{details.value} ({details.reason}), read at {details.flag_metadata['fetched_at']}")

    emulator.set_enabled("acme-staging", True)
    provider.refresh()  # a delivery to the webhook does the same, in every process that shares the store
    assert changed.wait(10), "no event came"
    assert client.get_boolean_value(FLAG_KEY, default_value=False) is True
    print(provider.state())
    api.shutdown()
