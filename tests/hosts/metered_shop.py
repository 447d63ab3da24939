"""A user's Flask app with the extension, our metrics below a prefix, and a metric of its own: what gunicorn runs."""

from __future__ import annotations

import os

from flask import Flask, Response, jsonify, request
from openfeature import api
from prometheus_client import Counter

from external_oms import FLAG_KEY
from external_oms.web import ExternalOMS

__all__ = ["app"]

ORDERS = Counter("shop_orders", "Orders routed.")

app = Flask(__name__)
ExternalOMS(app, mount="/oms")
client = api.get_client()


@app.get("/evaluate")
def evaluate() -> Response:
    """Evaluate so many times, and say in which process."""
    times = int(request.args.get("times", "1"))
    for _ in range(times):
        client.get_boolean_value(FLAG_KEY, default_value=False)
        ORDERS.inc()
    return jsonify(pid=os.getpid(), answers={"any": times})
