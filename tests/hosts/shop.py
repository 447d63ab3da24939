"""A user's own Flask app with the extension: what gunicorn runs in the tests of one host. Settings: the environment."""

from __future__ import annotations

import os
from collections import Counter

from flask import Flask, Response, jsonify, request
from openfeature import api

from external_oms import FLAG_KEY
from external_oms.web import ExternalOMS

__all__ = ["app"]

app = Flask(__name__)
ExternalOMS(app)
client = api.get_client()


@app.get("/evaluate")
def evaluate() -> Response:
    """Evaluate so many times; how often which value came for which reason, and in which process."""
    answers: Counter[str] = Counter()
    for _ in range(int(request.args.get("times", "1"))):
        details = client.get_boolean_details(FLAG_KEY, default_value=False)
        answers[f"{'on' if details.value else 'off'} {details.reason}"] += 1
    return jsonify(pid=os.getpid(), answers=answers)
