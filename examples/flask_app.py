"""A Flask application that evaluates the flag for every order and takes the webhook.

    flask --app examples/flask_app.py run
    gunicorn --workers 4 --chdir examples 'flask_app:create_app()'

Settings come from the environment, `EXTERNAL_OMS_…`. Several workers need a store that they share: with the default,
memory://, a delivery reaches only the worker that takes it. So set EXTERNAL_OMS_STORE to sqlite:////path/state.db or
to redis://….
"""

from __future__ import annotations

from flask import Flask
from openfeature import api

from external_oms import FLAG_KEY
from external_oms.web import ExternalOMS

external_oms = ExternalOMS()


def create_app() -> Flask:
    """Return the application."""
    app = Flask(__name__)
    external_oms.init_app(app)  # registers the provider and adds POST /webhooks/external-oms, and nothing else

    @app.post("/orders")
    def place_order() -> tuple[dict[str, str | None], int]:
        # The default is what this shop does without a value. It is returned only after every window has passed.
        details = api.get_client().get_boolean_details(FLAG_KEY, default_value=False)
        return {"owner": "external" if details.value else "ours", "reason": details.reason}, 201

    return app
