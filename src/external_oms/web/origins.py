"""Which pages of other origins may read an answer: those that are named, letter by letter, and no others.

Nothing here lets a browser send cookies along: `Access-Control-Allow-Credentials` is never answered, so keys travel in
headers that a page sets itself. Source: WHATWG Fetch, "CORS protocol".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from flask import Blueprint, Response, request

from external_oms.errors import SettingsError

__all__ = ["ANY", "allow_origins", "check_origins"]

ANY = "*"
"""In the place of an origin: every one."""

PREFLIGHT_SECONDS = 600
"""How long a browser may remember what was allowed: ten minutes, as an origin that is taken away should soon be out."""

_ALLOWED = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "Authorization, Cache-Control, Content-Type, If-None-Match, Last-Event-ID, "
    "X-API-Key",
    "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
}
_EXPOSED = "ETag, Retry-After"

_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(:[0-9]{1,5})?")
"""As a browser writes one: in small letters, a name of other letters in its ASCII form."""


def check_origins(origins: Sequence[str]) -> None:
    """See that each entry is an origin as a browser sends it.

    Raises:
        SettingsError: One is not.
    """
    for origin in origins:
        if origin != ANY and not _ORIGIN.fullmatch(origin):
            raise SettingsError(
                "ofrep_origins",
                f"{origin[:80]!r} is not an origin, such as https://shop.example, with nothing after it",
            )


def allow_origins(mounted: Blueprint, origins: Sequence[str]) -> None:
    """Have every answer of a blueprint, its refusals included, readable for pages of these origins.

    Args:
        mounted: The blueprint.
        origins: The origins, or `*`; none: no page of another origin.

    Raises:
        SettingsError: An entry is not an origin.
    """
    check_origins(origins)
    if not origins:
        return
    named = frozenset(origins)

    def allow(answer: Response) -> Response:
        if ANY not in named:
            answer.vary.add("Origin")
        origin = request.headers.get("Origin", "")
        if not (origin and (origin in named or ANY in named)):
            return answer
        answer.headers["Access-Control-Allow-Origin"] = ANY if ANY in named else origin
        answer.headers["Access-Control-Expose-Headers"] = _EXPOSED
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            answer.headers.update(_ALLOWED)
        return answer

    mounted.after_request(allow)
