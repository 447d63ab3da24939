"""A Flask application that asks on every order, with the webhook on its own app.

Run it by `python examples/flask_app.py` against an emulator; with settings in the environment, by
`flask --app examples/flask_app run`, or by `gunicorn -w 4 'examples.flask_app:create_app()'`: several workers, so set
EXTERNAL_OMS_STORE to a file or to Redis.
"""

from __future__ import annotations

import json

from flask import Flask
from openfeature import api

from external_oms import FLAG_KEY, Settings
from external_oms.testing import ConfigAPIEmulator, sign_delivery
from external_oms.web import ExternalOMS

SECRET = "whsec_" + "ZXhhbXBsZSBvbmx5LCBuZXZlciBpbiBwcm9kdWN0aW9u"


def create_app(settings: Settings | None = None) -> Flask:
    """The application; without settings the environment decides."""
    app = Flask(__name__)
    ExternalOMS(app, settings)

    @app.post("/orders")
    def order() -> dict[str, str]:
        details = api.get_client().get_boolean_details(FLAG_KEY, default_value=False)
        return {"owner": "external OMS" if details.value else "this platform", "reason": str(details.reason)}

    return app


def main() -> None:
    """Order, flip, deliver, order."""
    with ConfigAPIEmulator(("acme-staging",)) as emulator:
        app = create_app(emulator.settings(webhook_secrets=[SECRET]))
        browser = app.test_client()
        emulator.set_enabled("acme-staging", True)
        body = json.dumps({"tenant": "acme-staging", "name": "config.changed"}).encode()
        answer = browser.post("/webhooks/external-oms", data=body, headers=sign_delivery(body, SECRET))
        print("delivery:", answer.status_code, answer.get_json())
        order = browser.post("/orders").get_json()
        print("order:", order)
        assert order["owner"] == "external OMS"
        api.shutdown()


if __name__ == "__main__":
    main()
