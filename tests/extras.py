"""Run by `make dist` with the Python of an environment that holds the wheel with one extra alone; no pytest there.

The argument is the extra: `flask`, `server`, `redis` or `all`.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import subprocess
import sys
import time

ONLY = {
    "flask": {"flask", "flask_wtf", "limits", "click"},  # Flask itself needs click
    "server": {"flask", "flask_wtf", "limits", "click", "gunicorn", "prometheus_client"},
    "redis": {"redis"},
    "all": {"flask", "flask_wtf", "limits", "click", "gunicorn", "prometheus_client", "redis"},
}
"""The libraries of our own that each extra brings."""

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
NOWHERE = "http://127.0.0.1:1/{tenant}"


def check_libraries(extra: str) -> None:
    """Check that the extra brings what it names, and nothing of the other extras."""
    there = {name for name in ONLY["all"] if importlib.util.find_spec(name)}
    assert there == ONLY[extra], there


def check_extension() -> None:
    """Take a signed delivery on a Flask application; the config API is down, so it is answered 202."""
    from flask import Flask

    from external_oms import Settings, signature
    from external_oms.web import ExternalOMS

    app = Flask(__name__)
    given = {"tenant": "acme", "base_url": NOWHERE, "access_token": "token", "webhook_secrets": [SECRET]}
    oms = ExternalOMS()
    state = oms.init_app(app, Settings(**given))
    try:
        body = json.dumps({"tenant": "acme"}).encode()
        headers = signature.sign(body, secret=SECRET, delivery_id="msg_1", at_wall=time.time())
        answer = app.test_client().post(
            "/webhooks/external-oms", data=body, headers=headers, content_type="application/json"
        )
        assert (answer.status_code, answer.get_json()["refreshed"]) == (202, False), answer.data
    finally:
        state.provider.shutdown()


def check_server() -> None:
    """Make the server, and ask the command for its help."""
    from external_oms import Settings
    from external_oms.web import create_app

    app = create_app(Settings(tenant="acme", base_url=NOWHERE, access_token="token", insecure=True))
    assert app.test_client().get("/healthz").status_code == 200
    app.extensions["external_oms"].provider.shutdown()
    subprocess.run([sys.executable, "-I", "-m", "external_oms", "--help"], check=True, capture_output=True, timeout=30)


def check_redis() -> None:
    """Evaluate with a Redis that is down: the process works alone."""
    from external_oms import ExternalOMSProvider, Settings

    settings = Settings(
        tenant="acme", base_url=NOWHERE, access_token="token", store="redis://127.0.0.1:1/0", when_expired="on"
    )
    provider = ExternalOMSProvider(settings)
    assert provider.enabled() is True
    provider.shutdown()


def main() -> None:
    """Check one extra."""
    (extra,) = sys.argv[1:]
    check_libraries(extra)
    if "flask" in ONLY[extra]:
        check_extension()
    if "gunicorn" in ONLY[extra]:
        check_server()
    if "redis" in ONLY[extra]:
        check_redis()
    sys.stdout.write(f"extra {extra}: ok\n")


if __name__ == "__main__":
    main()
