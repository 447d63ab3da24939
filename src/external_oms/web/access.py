"""Who may call what: authentication by API key, stream token or session, and the decorator that demands a role."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, cast
from urllib.parse import urlsplit

from flask import Request, current_app, g, request, session
from itsdangerous import BadData, URLSafeSerializer

from external_oms.problems import Problem
from external_oms.tenants import is_loopback
from external_oms.web.keys import Identity, Role, Via
from external_oms.web.state import OMS, get_oms

__all__ = [
    "TOKEN_SLOT_SECONDS",
    "authorize",
    "bearer_of",
    "current_identity",
    "is_local",
    "is_session_valid",
    "require_loopback",
    "require_role",
    "session_seconds_left",
    "stream_token",
]

TOKEN_SLOT_SECONDS = 600
"""Stream tokens made within one slot of so many seconds are the same, so that responses that carry one are too. A token
is good until the end of the next slot: 10 to 20 minutes."""

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_FORWARDING_HEADERS = (
    "Forwarded",
    "Via",
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Proto",
    "X-Forwarded-Prefix",
    "X-Real-IP",
    "X-Client-IP",
    "True-Client-IP",
    "CF-Connecting-IP",
)
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="external-oms"'}

P = ParamSpec("P")
R = TypeVar("R")


def require_role(role: Role) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator: the view runs only for a caller with at least that role, who is then in `g.identity`."""

    def decorate(view: Callable[P, R]) -> Callable[P, R]:
        @wraps(view)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            authorize(role)
            return view(*args, **kwargs)

        return guarded

    return decorate


def authorize(role: Role) -> Identity:
    """Return the caller of this request, who has at least that role.

    Raises:
        Problem: 401 without an identity; 403 where the role is too low, or where a page of another origin made the
            browser ask.
    """
    identity = current_identity()
    if identity is None:
        detail = "send an API key of this service as `Authorization: Bearer …` or `X-API-Key: …`"
        raise Problem(401, detail, headers=_CHALLENGE)
    if identity.role < role:
        raise Problem(403, f"this needs the role {role.word}; {identity.name} is {identity.role.word}")
    if identity.is_ambient and request.method not in _SAFE_METHODS and not is_same_origin(request):
        raise Problem(403, "a page of another origin made this request")
    return identity


def current_identity() -> Identity | None:
    """Return the caller of this request, or None.

    An API key decides alone: a wrong one is not made good by a cookie.
    """
    if "identity" not in g:
        g.identity = _identify(get_oms())
    return cast("Identity | None", g.identity)


def _identify(oms: OMS) -> Identity | None:
    if oms.settings.insecure and not len(oms.api_keys):
        return Identity("insecure", Role.ADMIN, Via.INSECURE)
    # From the environ: a header that is missing costs a microsecond there, and an exception in `headers`.
    key = bearer_of(request) or request.environ.get("HTTP_X_API_KEY")
    if key is not None:
        identity = oms.api_keys.identity(key)
        if identity is None:
            oms.refused_keys.count("unknown", "the key is in no entry of api_keys; was it removed?")
        return identity
    return _of_token(oms) or _of_session(oms)


def bearer_of(given: Request) -> str | None:
    """Return the token after `Authorization: Bearer`, or None."""
    scheme, _, token = str(given.environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


# -- sessions: `key` is the fingerprint of an API key, `id` a random name, `at` the time of the login ------------------


def _of_session(oms: OMS) -> Identity | None:
    fingerprint = session.get("key")
    if not isinstance(fingerprint, str) or session_seconds_left() is None:
        return None
    identity = oms.api_keys.by_fingerprint(fingerprint, Via.SESSION)
    if identity is None or oms.limits.is_revoked(str(session.get("id"))):
        return None
    return identity


def session_seconds_left() -> float | None:
    """Return for how many seconds the login of this session holds; None without one."""
    at = session.get("at")
    if not isinstance(at, int | float) or "key" not in session:
        return None
    age = time.time() - at
    left = get_oms().settings.session_seconds - age
    return left if left > 0 and age > -1 else None


def is_session_valid(oms: OMS, session_id: str, fingerprint: str, until: float) -> bool:
    """Return whether a login still holds, for what outlives its request.

    Args:
        oms: The state of the application.
        session_id: The `id` of the session.
        fingerprint: Its `key`.
        until: When it ends, in seconds since the Unix epoch.
    """
    return (
        time.time() < until
        and oms.api_keys.by_fingerprint(fingerprint, Via.SESSION) is not None
        and not oms.limits.is_revoked(session_id)
    )


# -- stream tokens: an EventSource cannot send headers, so the URL of a stream carries a short-lived token -------------


def _tokens() -> URLSafeSerializer:
    return URLSafeSerializer(str(current_app.secret_key), salt="external_oms.stream")


def stream_token(identity: Identity) -> str | None:
    """Return a token for the event streams; None for a caller whose browser authenticates by itself."""
    if identity.is_ambient:
        return None
    ends = (int(time.time()) // TOKEN_SLOT_SECONDS + 2) * TOKEN_SLOT_SECONDS
    return str(_tokens().dumps([identity.fingerprint, ends]))


def _of_token(oms: OMS) -> Identity | None:
    given = request.args.get("token")
    if given is None or request.method != "GET" or request.endpoint not in {"ofrep.events", "api.events"}:
        return None
    try:
        fingerprint, ends = _tokens().loads(given)
    except (BadData, ValueError, TypeError):
        return None
    if not isinstance(fingerprint, str) or not isinstance(ends, int) or ends <= time.time():
        return None
    return oms.api_keys.by_fingerprint(fingerprint, Via.TOKEN)


# -- where a request comes from ----------------------------------------------------------------------------------------


def is_same_origin(given: Request) -> bool:
    """Return whether no page of another origin made this request. Browsers tell; other clients need not."""
    site = given.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site in {"same-origin", "none"}
    origin = given.headers.get("Origin")
    return origin is None or origin == f"{given.scheme}://{given.host}"


def is_local(given: Request) -> bool:
    """Return whether a request comes from this machine, by a name of this machine, and through no proxy that says so.

    The Host header counts because a page on the web may have its own name resolve to 127.0.0.1.
    """
    try:
        host = urlsplit(f"//{given.environ.get('HTTP_HOST', '')}").hostname
    except ValueError:  # an IPv6 address without its end
        return False
    forwarded = any(name in given.headers for name in _FORWARDING_HEADERS)
    return not forwarded and is_loopback(given.remote_addr) and is_loopback(host)


def require_loopback() -> None:
    """Refuse a request that does not come from this machine, or that a page of another origin made; for `insecure`.

    Raises:
        Problem: 403.
    """
    if request.method not in _SAFE_METHODS and not is_same_origin(request):
        raise Problem(403, "a page of another origin made this request")
    if not is_local(request):
        raise Problem(403, "started with `insecure`, this service answers this machine only, by a loopback name")
