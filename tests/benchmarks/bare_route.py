"""The measure: a Flask route that answers a constant, and does nothing else."""

from __future__ import annotations

import os

from flask import Flask, Response

app = Flask(__name__)
BODY = b"{" + b" " * (int(os.environ["EXTERNAL_OMS_BARE_BYTES"]) - 2) + b"}"


@app.post("/ofrep/v1/evaluate/flags/<key>")
def evaluate(key: str) -> Response:
    """The constant."""
    return Response(BODY, content_type="application/json")
