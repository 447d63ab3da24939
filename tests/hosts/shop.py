"""A user's own Flask app with the extension: what gunicorn runs in the tests of one host. Settings: the environment."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter

from flask import Flask, Response, jsonify, request
from openfeature import api
from openfeature.event import EventDetails, ProviderEvent

from external_oms import FLAG_KEY
from external_oms.web import ExternalOMS

__all__ = ["app"]

app = Flask(__name__)
ExternalOMS(app)
client = api.get_client()


changes = [0]
"""How many changes of the value this process was told of."""


def count(_: EventDetails) -> None:
    """Count a change."""
    changes[0] += 1


client.add_handler(ProviderEvent.PROVIDER_CONFIGURATION_CHANGED, count)


@app.get("/evaluate")
def evaluate() -> Response:
    """Evaluate so many times; how often which value came for which reason, and in which process."""
    answers: Counter[str] = Counter()
    for _ in range(int(request.args.get("times", "1"))):
        details = client.get_boolean_details(FLAG_KEY, default_value=False)
        answers[f"{'on' if details.value else 'off'} {details.reason}"] += 1
    return jsonify(pid=os.getpid(), answers=answers, changes=changes[0])


served: dict[int, float] = {}
"""When this process first served each generation, on the host's monotonic clock."""

slowest = [0.0]
"""The longest that an evaluation of the lookout took, in seconds."""


def look_out() -> None:
    """Evaluate every two milliseconds, as a busy service does."""
    while True:
        began = time.monotonic()
        details = client.get_boolean_details(FLAG_KEY, default_value=False)
        ended = time.monotonic()
        slowest[0] = max(slowest[0], ended - began)
        if not details.flag_metadata.get("stale", True):
            served.setdefault(int(details.flag_metadata["generation"]), ended)
        time.sleep(0.002)


@app.get("/served")
def tell_served() -> Response:
    """When this process first served a generation; the first call begins to look out."""
    if not any(thread.name == "lookout" for thread in threading.enumerate()):
        threading.Thread(target=look_out, name="lookout", daemon=True).start()
    generation = int(request.args.get("generation", "0"))
    moments = [moment for found, moment in served.items() if found >= generation]
    return jsonify(pid=os.getpid(), first=min(moments, default=None), slowest=slowest[0])
