"""The Python client of OFREP against the server, for services that do not hold the provider themselves.

Run it with `python examples/ofrep_python.py`. In production the server is `external-oms serve`.
"""

from __future__ import annotations

import base64
import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import requests
from openfeature import api
from openfeature.contrib.provider.ofrep import OFREPProvider
from werkzeug.serving import make_server

from external_oms import FLAG_KEY
from external_oms.testing import ConfigAPIEmulator, sign_delivery
from external_oms.web import create_app
from external_oms.web.keys import Role, new_key

SECRET = "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()
KEY, ENTRY = new_key("example", Role.VIEWER)


@contextmanager
def server(config_api: ConfigAPIEmulator) -> Iterator[str]:
    """Run the server on a free port."""
    app = create_app(config_api.settings(webhook_secrets=[SECRET], api_keys=[ENTRY]))
    listening = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()
        app.extensions["external_oms"].provider.shutdown()


def main() -> None:
    """Evaluate, switch the flag, deliver, evaluate again."""
    with ConfigAPIEmulator() as config_api, server(config_api) as url:
        api.set_provider_and_wait(OFREPProvider(url, headers_factory=lambda: {"X-API-Key": KEY}))
        flags = api.get_client()
        print("before:", flags.get_boolean_details(FLAG_KEY, default_value=False).variant)

        config_api.set_enabled(None, True)
        body = json.dumps({"tenant": config_api.tenants[0]})
        delivery = requests.post(f"{url}/webhooks/external-oms", body, headers=sign_delivery(body, SECRET), timeout=10)
        print("delivery:", delivery.status_code, delivery.json())

        details = flags.get_boolean_details(FLAG_KEY, default_value=False)
        print("after: ", details.variant, dict(details.flag_metadata))
        assert details.value is True
        api.shutdown()


if __name__ == "__main__":
    main()
