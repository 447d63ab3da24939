"""The URL of the store: checked without the network, and shown without its passwords; pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, unquote, urlsplit

__all__ = ["StoreURL", "check_store_url", "mask_passwords"]

_MASK = "…"


def mask_passwords(url: str) -> str:
    """Return a store URL with `…` for its user and password, and for each query option with `password` in its name.

    A malformed URL, such as one with an unescaped `@` or `?` in its password, is masked more widely, never less.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url[:]
    address, mark, query = rest.partition("?")
    options = [option.partition("=") for option in query.split("&")]
    masked = [
        name + equals + (_MASK if value and "password" in unquote(name).casefold() else value)
        for name, equals, value in options
    ]
    shown = address + mark + "&".join(masked)
    _, at, place = shown.rpartition("@")
    return scheme + separator + (f"{_MASK}@{place}" if at else shown)


class StoreURL(str):
    """A store URL that shows no password when it is printed, formatted or serialised; string methods see all of it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(mask_passwords(self))

    def __str__(self) -> str:
        return mask_passwords(self)

    def __format__(self, spec: str) -> str:
        return format(mask_passwords(self), spec)


_TEXT = (".*", "text")
_COUNT = ("[0-9]{1,9}", "a whole number")
_SECONDS = (r"[0-9]{1,9}(\.[0-9]{1,9})?", "seconds, such as 0.5")
_FLAG = ("(?i:true|false|yes|no|1|0)", "true or false")
_CHECKED = ("none|optional|required", "none, optional or required")

# What redis-py 5.2 and later take in a URL, without what would break the store, such as decoding, RESP3 or retries.
_UNIX = {
    "client_name": _TEXT,
    "db": _COUNT,
    "health_check_interval": _COUNT,
    "max_connections": _COUNT,
    "password": _TEXT,
    "socket_connect_timeout": _SECONDS,
    "socket_timeout": _SECONDS,
    "username": _TEXT,
}
_TCP = {**_UNIX, "socket_keepalive": _FLAG}
_TLS = {
    **_TCP,
    "ssl_ca_certs": _TEXT,
    "ssl_ca_data": _TEXT,
    "ssl_ca_path": _TEXT,
    "ssl_cert_reqs": _CHECKED,
    "ssl_certfile": _TEXT,
    "ssl_check_hostname": _FLAG,
    "ssl_ciphers": _TEXT,
    "ssl_keyfile": _TEXT,
    "ssl_password": _TEXT,
}
_SENTINEL = {"sentinel_password": _TEXT, "sentinel_username": _TEXT}

_REDIS: Mapping[str, tuple[Mapping[str, tuple[str, str]], str]] = {
    "redis": (_TCP, "redis://host:6379/0"),
    "rediss": (_TLS, "rediss://host:6379/0"),
    "unix": (_UNIX, "unix:///run/redis/redis.sock"),
    "redis+cluster": (_TCP, "redis+cluster://host:6379"),
    "rediss+cluster": (_TLS, "rediss+cluster://host:6379"),
    "redis+sentinel": (_SENTINEL, "redis+sentinel://host1:26379,host2:26379/service/0"),
}
"""The schemes of Redis: their query options, each with the form of its value, and an example."""


def check_store_url(url: str) -> None:
    """Refuse a URL that no store can be made of, as far as that can be seen without the network.

    Raises:
        ValueError: The URL is malformed. The message contains no part of it that may be a secret.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in {"memory", "sqlite", *_REDIS}:
        allowed = "memory://, sqlite:////absolute/path.db, redis://host:6379/0, rediss://…"
        raise ValueError(f"the scheme is not one of those allowed: {allowed}")
    if not url.isprintable() or (scheme in _REDIS and " " in url):
        raise ValueError("white space or a control character stands in it; is there a newline at its end?")
    if scheme == "memory" and rest:
        raise ValueError("the memory store takes no path: memory://")
    if scheme == "sqlite" and not (rest.startswith("//") and rest.strip("/")):
        raise ValueError("a sqlite store is named by an absolute path: sqlite:////var/lib/external-oms/state.db")
    if scheme in _REDIS:
        _check_redis(url, scheme)


def _check_redis(url: str, scheme: str) -> None:
    options, example = _REDIS[scheme]
    escapes = "in a password or an option, write @ as %40, / as %2F, ? as %3F, and # as %23"
    malformed = ValueError(f"its host or port is malformed; such as {example}; {escapes}")
    authority = re.split("[/?#]", url.partition("://")[2], maxsplit=1)[0]
    hosts = authority.rpartition("@")[2].split(",")
    try:
        # one host at a time: of several, newer Pythons refuse one in brackets
        parts = urlsplit(url.replace(authority, hosts[0], 1))
        ports = [urlsplit(f"//{host}").port for host in hosts]  # raises for what is no port
    except ValueError:
        raise malformed from None
    if parts.fragment or "@" in parts.path + parts.query:
        raise ValueError(f"it is malformed; {escapes}")
    several = scheme == "redis+sentinel"
    if 0 in ports or (len(hosts) > 1 and not several) or (several and not all(hosts)):
        raise malformed
    _check_path(parts.path.strip("/"), scheme, example)
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in options:
            shown = f"`{name}`" if re.fullmatch("[a-z_]{1,32}", name) else "one of its options"
            from difflib import get_close_matches  # noqa: PLC0415 - needed for an error only

            close = get_close_matches(name, options, 1)
            advice = f"did you mean `{close[0]}`?" if close else f"known are {', '.join(options)}"
            raise ValueError(f"{shown} is unknown; {advice}")
        form, expected = options[name]
        if not re.fullmatch(form, value):
            raise ValueError(f"its option `{name}` must be {expected}")


def _check_path(path: str, scheme: str, example: str) -> None:
    service, _, db = path.partition("/") if scheme == "redis+sentinel" else ("", "", path)
    if scheme == "unix":
        if not path:
            raise ValueError(f"the path of the socket is missing; such as {example}")
    elif scheme == "redis+sentinel" and not service:
        raise ValueError(f"the name of the service is missing; such as {example}")
    elif not re.fullmatch("[0-9]{0,9}", db):
        raise ValueError(f"its path is not the number of a database; such as {example}")
