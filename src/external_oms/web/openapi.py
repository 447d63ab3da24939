"""The API describes itself: the document in `openapi.json`, cut to what is mounted, served where it is mounted."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

from flask import Blueprint, Flask, Response, current_app, jsonify, request

from external_oms.web.parts import Parts
from external_oms.web.problems import resource

__all__ = ["blueprint", "document", "document_of", "mounted_paths"]

_CONVERTER = re.compile(r"<(?:[^:<>]+:)?([^<>]+)>")


@cache
def _text() -> str:
    return files("external_oms.web").joinpath("openapi.json").read_text(encoding="utf-8")


def document() -> dict[str, Any]:
    """The whole document, a new one each time. Source: OpenAPI 3.1."""
    whole: dict[str, Any] = json.loads(_text())
    return whole


def mounted_paths(app: Flask, url_prefix: str) -> frozenset[str]:
    """The paths of the app's routes under the prefix, as OpenAPI writes them."""
    rules = (_CONVERTER.sub(r"{\1}", rule.rule) for rule in app.url_map.iter_rules())
    return frozenset(rule.removeprefix(url_prefix) for rule in rules if rule.startswith(url_prefix))


def document_of(app: Flask, *, url_prefix: str, root: str = "") -> dict[str, Any]:
    """The document, cut to the routes that are mounted on the app.

    Args:
        app: The app.
        url_prefix: Where we are mounted on it.
        root: Where the app itself is mounted by its server.
    """
    cut = document()
    there = mounted_paths(app, url_prefix)
    cut["paths"] = {path: item for path, item in cut["paths"].items() if path in there}
    cut["servers"] = [{"url": f"{root}{url_prefix}" or "/"}]
    return cut


def blueprint(parts: Parts) -> Blueprint:
    """The route that serves the document."""
    mounted = Blueprint("openapi", __name__)

    def openapi() -> Response:
        return jsonify(document_of(current_app, url_prefix=parts.url_prefix, root=request.root_path.rstrip("/")))

    resource(mounted, "/openapi.json", GET=openapi)
    return mounted
