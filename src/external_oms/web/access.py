"""Nobody in without a name: who asks is decided here, by keys kept as hashes, and what they may do by three roles."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from functools import wraps
from ipaddress import IPv4Network, IPv6Network
from typing import ParamSpec, Protocol, TypeVar
from urllib.parse import urlsplit

from flask import Request, current_app, request

from external_oms.errors import SettingsError
from external_oms.settings import Settings
from external_oms.tenants import is_loopback
from external_oms.web.problems import Problem

__all__ = [
    "EXTENSION",
    "Access",
    "Identity",
    "Keyring",
    "Role",
    "Via",
    "bearer_of",
    "demand",
    "identity_of",
    "new_key",
    "only_loopback",
    "require",
]

EXTENSION = "external_oms"
"""Where an app keeps what is mounted on it: `app.extensions["external_oms"]`."""

KEY_PREFIX = "oms_"
"""How every key begins, so that a scanner for leaked secrets can know one."""

_KEY_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PERSON = re.compile(r"[\w.@+-]{1,128}")
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

P = ParamSpec("P")
R = TypeVar("R")


class Role(IntEnum):
    """What a name may do; a higher one may do all that a lower one may."""

    VIEWER = 1
    """See."""
    OPERATOR = 2
    """Have the API read."""
    ADMIN = 3
    """Switch."""

    @property
    def word(self) -> str:
        """`viewer`, `operator` or `admin`."""
        return self.name.lower()

    @classmethod
    def named(cls, word: str) -> Role:
        """The role of that name.

        Raises:
            ValueError: There is none.
        """
        for role in cls:
            if role.word == word:
                return role
        raise ValueError("a role is viewer, operator or admin")


class Via(StrEnum):
    """How somebody was recognised."""

    KEY = "key"
    """By a key in a header."""
    TICKET = "ticket"
    """By a ticket in the address of an event stream."""
    PROXY = "proxy"
    """By a trusted proxy's header."""
    SESSION = "session"
    """By a session cookie."""
    NOTHING = "nothing"
    """Not at all: the service was started with `insecure` and without keys."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who asks.

    Attributes:
        name: The key's name, or the person's; it stands in the history as the actor.
        role: What they may do.
        via: How they were recognised.
    """

    name: str
    role: Role
    via: Via = Via.KEY

    @property
    def is_ambient(self) -> bool:
        """Whether a browser sends this identity along by itself, whoever made it ask."""
        return self.via in {Via.PROXY, Via.SESSION, Via.NOTHING}


def new_key(name: str, role: Role, *, token: Callable[[int], str] = secrets.token_urlsafe) -> tuple[str, str]:
    """A new key, to be shown once, and the entry of `api_keys` that recognises it.

    Args:
        name: Whose key it is: letters, digits and `._@-`, at most 64.
        role: What it may do.
        token: Makes so many random bytes into text that is safe in a header.

    Raises:
        ValueError: The name is not of that form.
    """
    if not _NAME.fullmatch(name):
        raise ValueError("a key's name is 1 to 64 letters, digits and ._@-, and begins with a letter or digit")
    key = KEY_PREFIX + token(_KEY_BYTES)
    return key, f"{name}:{role.word}:{hashlib.sha256(key.encode()).hexdigest()}"


class Keyring:
    """The entries of `api_keys`, ready to recognise a key."""

    def __init__(self, entries: Sequence[str]) -> None:
        """Parse every entry.

        Raises:
            SettingsError: An entry is not `name:role:sha256-hex`; the entry itself is not quoted, it may be a key.
        """
        self._entries = tuple(_parsed(number, entry) for number, entry in enumerate(entries, start=1))
        self._marked = {_mark(digest): identity for digest, identity in self._entries}

    def __len__(self) -> int:
        """How many keys are known."""
        return len(self._entries)

    def has(self, identity: Identity) -> bool:
        """Whether there is a key of that name and role."""
        return any((known.name, known.role) == (identity.name, identity.role) for _, known in self._entries)

    def marked(self, mark: str) -> Identity | None:
        """Whose key has that mark, or None where there is no such key (any more)."""
        return self._marked.get(mark)

    def mark(self, key: str) -> str | None:
        """What a session remembers of a key, from which nobody learns the key or its entry; None for a wrong key."""
        return None if self.identity(key) is None else _mark(hashlib.sha256(key.encode()).digest())

    def identity(self, key: str) -> Identity | None:
        """Whose key it is, or None; takes the same time whichever entry fits, or none."""
        shown = hashlib.sha256(key.encode()).digest()
        found: Identity | None = None
        for digest, identity in self._entries:
            if hmac.compare_digest(digest, shown):
                found = identity
        return found


def _mark(digest: bytes) -> str:
    return hashlib.sha256(b"external_oms.session:" + digest).hexdigest()[:32]


def _parsed(number: int, entry: str) -> tuple[bytes, Identity]:
    parts = entry.split(":")
    problem = f"entry {number} is not name:role:sha256-hex; make one with `external-oms keys new`"
    if len(parts) != 3 or not _NAME.fullmatch(parts[0]) or not _DIGEST.fullmatch(parts[2].lower()):  # noqa: PLR2004 - three parts
        raise SettingsError("api_keys", problem)
    try:
        role = Role.named(parts[1])
    except ValueError as error:
        raise SettingsError("api_keys", f"entry {number}: {error}") from error
    return bytes.fromhex(parts[2]), Identity(parts[0], role)


def bearer_of(asked: Request) -> str | None:
    """The token after `Authorization: Bearer`, or None."""
    scheme, _, token = str(asked.environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


class Access:
    """Who may do what on one app."""

    def __init__(self, settings: Settings) -> None:
        """Prepare keys and trusted proxies.

        Raises:
            SettingsError: `api_keys` or `trusted_proxies` has a malformed entry.
        """
        self.keyring = Keyring(settings.api_keys)
        self._proxies = tuple(_network(given) for given in settings.trusted_proxies)
        self._header = settings.identity_header
        self._role = Role.named(settings.identity_role)
        self._sources: list[Callable[[Request], Identity | None]] = [self._of_proxy]
        self._is_open = settings.insecure and not self.is_configured

    @property
    def is_configured(self) -> bool:
        """Whether anybody can be recognised at all."""
        return bool(len(self.keyring) or self._proxies)

    def recognise_by(self, source: Callable[[Request], Identity | None]) -> None:
        """Add a way to recognise who asks (a session cookie), tried where no key is shown; before the first request."""
        self._sources.append(source)

    def identity(self, asked: Request) -> Identity | None:
        """Who asks, or None. A key that is shown decides alone: a wrong one is never made good by a cookie."""
        if self._is_open:
            return Identity("insecure", Role.ADMIN, Via.NOTHING)
        # from the environ: a header that is missing costs a microsecond there, and an exception in `headers`
        key = bearer_of(asked) or asked.environ.get("HTTP_X_API_KEY")
        if key is not None:
            return self.keyring.identity(key)
        for source in self._sources:
            found = source(asked)
            if found is not None:
                return found
        return None

    def address(self, asked: Request) -> str:
        """From where somebody asks; through a trusted proxy, what that proxy says; empty where nobody knows."""
        hops = [hop.strip() for hop in asked.headers.get("X-Forwarded-For", "").split(",") if hop.strip()]
        here = asked.remote_addr or ""
        while hops and self._is_trusted(here):
            here = hops.pop()
        return here[:64]

    def _is_trusted(self, address: str) -> bool:
        try:
            known = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(known in network for network in self._proxies)

    def _of_proxy(self, asked: Request) -> Identity | None:
        name = asked.headers.get(self._header, "")
        if not self._is_trusted(asked.remote_addr or "") or not _PERSON.fullmatch(name):
            return None
        return Identity(name, self._role, Via.PROXY)


def _network(given: str) -> IPv4Network | IPv6Network:
    try:
        return ipaddress.ip_network(given, strict=False)
    except ValueError as error:
        raise SettingsError("trusted_proxies", f"{given[:80]!r} is not an address or network") from error


class _Guarded(Protocol):
    """What is mounted on an app, as far as this module cares."""

    @property
    def access(self) -> Access: ...


def identity_of(asked: Request) -> Identity | None:
    """Who asks this app, by key, trusted proxy or session; None where nobody is recognised."""
    mounted: _Guarded = current_app.extensions[EXTENSION]
    return mounted.access.identity(asked)


def demand(role: Role) -> Identity:
    """Who asks in this request, having at least that role.

    Raises:
        Problem: 401 where nobody is recognised; 403 where the role is too low, or a foreign page made the browser ask.
    """
    identity = identity_of(request)
    if identity is None:
        detail = "show a key of this service as `Authorization: Bearer …` or `X-API-Key: …`"
        raise Problem(401, detail, headers={"WWW-Authenticate": 'Bearer realm="external-oms"'})
    if identity.role < role:
        raise Problem(403, f"this needs the role {role.word}; {identity.name} is {identity.role.word}")
    if identity.is_ambient and request.method not in _SAFE_METHODS and not _is_from_here(request):
        raise Problem(403, "a page of another origin asked for this; ask from this service's own page")
    return identity


def require(role: Role) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the view runs only for who has at least that role; see `demand` for what others are answered."""

    def guard(view: Callable[P, R]) -> Callable[P, R]:
        @wraps(view)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            demand(role)
            return view(*args, **kwargs)

        return guarded

    return guard


def _is_from_here(asked: Request) -> bool:
    """Whether no browser sent this from a page of another origin. Browsers do say so; other clients need not."""
    site = asked.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site in {"same-origin", "none"}
    origin = asked.headers.get("Origin")
    return origin is None or urlsplit(origin).netloc == asked.host


def only_loopback() -> None:
    """Refuse, without credentials, whoever does not ask from this machine by a name of this machine.

    The Host header is looked at because a page on the web may have its own name resolve to 127.0.0.1 and then read
    what this service answers; a forwarding header, because then the asker is not the one who connects.

    Raises:
        Problem: 403.
    """
    forwarded = any(name in request.headers for name in ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host"))
    try:
        host = urlsplit(f"//{request.environ.get('HTTP_HOST', '')}").hostname
    except ValueError:  # an IPv6 address without its end
        host = None
    if forwarded or not is_loopback(request.remote_addr) or not is_loopback(host):
        raise Problem(403, "started with `insecure`, this service answers this machine only, by a loopback name")
