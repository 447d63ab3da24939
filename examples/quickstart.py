"""The flag in an application without a web framework: evaluate, see why, hear of changes.

Run it by `python examples/quickstart.py`. Here an emulator stands for the config API; in a service leave `settings`
out, and the environment decides.
"""

from __future__ import annotations

import threading

from openfeature import api
from openfeature.event import EventDetails, ProviderEvent

from external_oms import FLAG_KEY, ExternalOMSProvider
from external_oms.testing import ConfigAPIEmulator


def main() -> None:
    """Read the flag, have it switched, read it again."""
    switched = threading.Event()

    def hear(details: EventDetails) -> None:
        print("changed:", details.flags_changed)
        switched.set()

    with ConfigAPIEmulator(("acme-staging",)) as emulator:
        provider = ExternalOMSProvider(settings=emulator.settings())
        api.set_provider_and_wait(provider)
        api.add_handler(ProviderEvent.PROVIDER_CONFIGURATION_CHANGED, hear)
        client = api.get_client()

        details = client.get_boolean_details(FLAG_KEY, default_value=False)
        print("value:", details.value, "reason:", details.reason, dict(details.flag_metadata))

        emulator.set_enabled("acme-staging", True)
        provider.refresh()  # what a delivery to the webhook causes by itself
        assert switched.wait(5), "nobody said that the flag has changed"
        assert client.get_boolean_value(FLAG_KEY, default_value=False) is True
        print("state:", provider.state())
        api.shutdown()


if __name__ == "__main__":
    main()
