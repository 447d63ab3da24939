"""API keys and roles. Keys are kept as SHA-256 hashes and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum

from external_oms.errors import SettingsError

__all__ = ["APIKeys", "Identity", "Role", "Via", "new_key"]

KEY_PREFIX = "oms_"
"""The prefix of every key, by which scanners for leaked secrets find one."""

_KEY_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Role(IntEnum):
    """What a caller may do; a higher role may do everything that a lower one may."""

    VIEWER = 1
    """Read and evaluate."""
    OPERATOR = 2
    """Have the config API read."""
    ADMIN = 3
    """Write the flag."""

    @property
    def word(self) -> str:
        """`viewer`, `operator` or `admin`."""
        return self.name.lower()

    @classmethod
    def named(cls, word: str) -> Role:
        """Return the role of that name.

        Raises:
            ValueError: There is none.
        """
        for role in cls:
            if role.word == word:
                return role
        raise ValueError("a role is viewer, operator or admin")


class Via(StrEnum):
    """How a caller was authenticated."""

    KEY = "key"
    """By an API key in a header."""
    TOKEN = "token"  # noqa: S105 - a word
    """By a token in the URL of an event stream."""
    SESSION = "session"
    """By a session cookie."""
    INSECURE = "insecure"
    """Not at all: the setting `insecure` is on, and there are no API keys."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller.

    Attributes:
        name: The name of the API key; the actor in the history.
        role: The role.
        via: How the caller was authenticated.
        fingerprint: Stands for the API key in sessions and tokens, and does not reveal it.
    """

    name: str
    role: Role
    via: Via = Via.KEY
    fingerprint: str = ""

    @property
    def is_ambient(self) -> bool:
        """Whether a browser authenticates by itself, so that a page of another origin could make it ask."""
        return self.via in {Via.SESSION, Via.INSECURE}


def new_key(name: str, role: Role, *, token: Callable[[int], str] = secrets.token_urlsafe) -> tuple[str, str]:
    """Return a new key, to be shown once, and its entry for the setting `api_keys`.

    Args:
        name: The name of its holder: letters, digits and `._@-`, at most 64.
        role: The role.
        token: Makes text that is safe in a header from so many random bytes.

    Raises:
        ValueError: The name is not of that form.
    """
    if not _NAME.fullmatch(name):
        raise ValueError("a key's name is 1 to 64 letters, digits and ._@-, and begins with a letter or digit")
    key = KEY_PREFIX + token(_KEY_BYTES)
    return key, f"{name}:{role.word}:{hashlib.sha256(key.encode()).hexdigest()}"


class APIKeys:
    """The entries of the setting `api_keys`.

    Args:
        entries: `name:role:sha256-hex`.

    Raises:
        SettingsError: An entry is malformed, or two have the same name; the message does not quote it, since it may be
            a key.
    """

    def __init__(self, entries: Sequence[str]) -> None:
        self._entries = tuple(_parsed(number, entry) for number, entry in enumerate(entries, start=1))
        self._by_fingerprint = {identity.fingerprint: identity for _, identity in self._entries}
        names: set[str] = set()
        for number, (_, identity) in enumerate(self._entries, start=1):
            if identity.name in names:
                raise SettingsError("api_keys", f"entry {number} has the name of another entry; the history shows it")
            names.add(identity.name)

    def __len__(self) -> int:
        """Return how many keys there are."""
        return len(self._entries)

    def identity(self, key: str) -> Identity | None:
        """Return the holder of a key, or None; takes the same time whichever entry fits."""
        given = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        found: Identity | None = None
        for digest, identity in self._entries:
            if hmac.compare_digest(digest, given):
                found = identity
        return found

    def by_fingerprint(self, fingerprint: str, via: Via) -> Identity | None:
        """Return the holder of the key with that fingerprint, or None where the key was removed."""
        known = self._by_fingerprint.get(fingerprint)
        return None if known is None else replace(known, via=via)


def _parsed(number: int, entry: str) -> tuple[bytes, Identity]:
    name, _, rest = entry.partition(":")
    word, _, digest = rest.partition(":")
    if not _NAME.fullmatch(name) or not _DIGEST.fullmatch(digest.lower()):
        advice = f"entry {number} is not name:role:sha256-hex; make one with `external-oms keys new`"
        raise SettingsError("api_keys", advice)
    try:
        role = Role.named(word)
    except ValueError as error:
        raise SettingsError("api_keys", f"entry {number}: {error}") from error
    raw = bytes.fromhex(digest)
    fingerprint = hashlib.sha256(b"external_oms.session:" + raw).hexdigest()[:32]
    return raw, Identity(name, role, Via.KEY, fingerprint)
