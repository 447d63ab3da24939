"""A login is a signed cookie and nothing kept here: it names no person but the mark of a key that must still be known.

The cookie is our own and not the application's session: what is promised of it holds on whichever app we are mounted.
A session begins with a word of chance, made anew at each login, and forms carry that word signed. So a cookie that
somebody else planted is worth nothing after the login, and a form that another page filled in is refused.
Source: OWASP, "Session Management" and "Cross-Site Request Forgery Prevention" (signed token bound to the session).
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from flask import Request, Response, request
from itsdangerous import BadData, URLSafeSerializer

from external_oms.errors import SettingsError
from external_oms.settings import Settings
from external_oms.tenants import is_loopback
from external_oms.web.access import Identity, Keyring, Via
from external_oms.web.problems import Problem

__all__ = ["COOKIE", "FIELD", "Sessions", "is_lone", "secret_of"]

COOKIE = "external_oms_session"
"""The name of the cookie."""

FIELD = "form_token"
"""The name of the hidden field of every form."""

NOTE_SECONDS = 60.0
"""How long after a form was sent its outcome is told: long enough for a slow page, too short for an old link."""

_CHANGED = "external_oms.session"
"""Where a request keeps the session that its answer is to have the browser keep."""

_LEAST = 16
"""The shortest secret that is taken, in characters."""

_MADE_UP = secrets.token_urlsafe(32)
"""Made up once, where this module is imported: workers forked after it (`external-oms serve`) share it."""

_MADE_BY = os.getpid()

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Session:
    """What the cookie holds: chance, the mark of the key (empty before a login), and when it was made."""

    word: str
    mark: str
    at: float


class Sessions:
    """The sessions of one app.

    Args:
        secret: What signs them.
        keyring: The keys that are known.
        seconds: How long one lasts, > 0.
        prefix: Where we are mounted on the app: the browser sends the cookie there and below.
        wall: Seconds since the Unix epoch.
    """

    def __init__(
        self, secret: str, keyring: Keyring, *, seconds: float, prefix: str, wall: Callable[[], float]
    ) -> None:
        self._cookies = URLSafeSerializer(secret, salt="external_oms.session", serializer=json)
        self._forms = URLSafeSerializer(secret, salt="external_oms.form", serializer=json)
        self._notes = URLSafeSerializer(secret, salt="external_oms.note", serializer=json)
        self._keyring = keyring
        self._seconds = seconds
        self._prefix = prefix
        self._wall = wall

    def identity(self, asked: Request) -> Identity | None:
        """Who logged in: None where the session has ended, or its key is known no more."""
        session = self._of(asked)
        known = None if session is None else self._keyring.marked(session.mark)
        return None if known is None else replace(known, via=Via.SESSION)

    def ends(self, asked: Request) -> float | None:
        """When the session ends, in seconds since the Unix epoch; None where nobody is logged in by one."""
        session = self._of(asked)
        return session.at + self._seconds if session is not None and session.mark else None

    def login(self, key: str) -> Identity | None:
        """Begin a new session for the holder of a key; None, and nothing begins, where the key is wrong."""
        mark = self._keyring.mark(key)
        if mark is None:
            return None
        self._keep(_Session(secrets.token_urlsafe(16), mark, self._wall()))
        return self._keyring.marked(mark)

    def logout(self) -> None:
        """End the session: the browser forgets the cookie."""
        self._keep(None)

    def form_token(self) -> str:
        """What the forms of this answer carry; begins a session without a login where there is none."""
        session = self._of(request)
        if session is None:
            session = _Session(secrets.token_urlsafe(16), "", self._wall())
            self._keep(session)
        return self._forms.dumps(session.word)

    def check_form(self) -> None:
        """See that this request's form was made for this session.

        Raises:
            Problem: 400: it was not, or the session has ended meanwhile.
        """
        session = self._of(request)
        try:
            word = self._forms.loads(request.form.get(FIELD, ""))
        except BadData:
            word = None
        if (
            session is None
            or not isinstance(word, str)
            or not hmac.compare_digest(word.encode(), session.word.encode())
        ):
            raise Problem(400, "this form is too old, or not from this page; nothing was done. Load the page again")

    def note(self, kind: Literal["good", "warn", "bad"], text: str) -> str:
        """A word for the address of the next page: what came of a form, for this session's eyes and not for long."""
        session = self._of(request)
        return self._notes.dumps([session.word if session else "", self._wall(), kind, text])

    def noted(self, word: str | None) -> tuple[str, str] | None:
        """The kind and the text of a note; None where it is not ours, not this session's, or old."""
        session = self._of(request)
        try:
            owner, at, kind, text = self._notes.loads(word or "")
        except (BadData, ValueError, TypeError):
            return None
        fits = session is not None and owner == session.word and 0 <= self._wall() - at < NOTE_SECONDS
        return (kind, text) if fits else None

    def apply(self, answer: Response) -> Response:
        """Have the browser keep, or forget, what this request changed."""
        if _CHANGED not in request.environ:
            return answer
        session: _Session | None = request.environ[_CHANGED]
        path = request.root_path.rstrip("/") + self._prefix or "/"
        # asked by a loopback name, the cookie never leaves this machine, and browsers keep no Secure one there
        kept = {"path": path, "secure": not is_loopback(_host(request)), "httponly": True, "samesite": "Lax"}
        if session is None:
            answer.delete_cookie(COOKIE, **kept)  # type: ignore[arg-type]  # one set of attributes for both calls
        else:
            value = self._cookies.dumps([session.word, session.mark, session.at])
            answer.set_cookie(COOKIE, value, max_age=int(self._seconds), **kept)  # type: ignore[arg-type]  # likewise
        return answer

    def _keep(self, session: _Session | None) -> None:
        request.environ[_CHANGED] = session

    def _of(self, asked: Request) -> _Session | None:
        if _CHANGED in asked.environ:
            changed: _Session | None = asked.environ[_CHANGED]
            return changed
        try:
            word, mark, at = self._cookies.loads(asked.cookies.get(COOKIE, ""))
            session = _Session(str(word), str(mark), float(at))
        except (BadData, ValueError, TypeError):
            return None
        return session if 0 <= self._wall() - session.at < self._seconds else None


def _host(asked: Request) -> str | None:
    name = asked.host.rpartition(":")[0] if asked.host.rpartition(":")[2].isdecimal() else asked.host
    return name.strip("[]")


def secret_of(settings: Settings) -> str:
    """What signs sessions: `session_secret`; else one kept beside a file store; else one made up at start.

    Nothing is derived from `api_keys`: whoever could read the hashes of keys could then log in without one.

    Raises:
        SettingsError: The setting is too short to be a secret, or the kept file may be read by others.
    """
    if settings.session_secret is not None:
        given = settings.session_secret.get_secret_value()
        if len(given) < _LEAST:
            raise SettingsError("session_secret", f"is shorter than {_LEAST} characters; try `openssl rand -base64 32`")
        return given
    if not settings.store.startswith("sqlite:"):
        return _MADE_UP
    path = Path(settings.store.removeprefix("sqlite:///") + ".session-secret")
    try:
        return _kept(path)
    except OSError as error:
        _logger.warning("no session secret can be kept at %s (%s): each process makes up its own", path, error.strerror)
        return _MADE_UP


def is_lone(settings: Settings) -> bool:
    """Whether the secret is one that this process made up for itself, so that no other worker knows its sessions."""
    shared = settings.session_secret is not None or settings.store.startswith("sqlite:")
    return not shared and os.getpid() == _MADE_BY


def _kept(path: Path) -> str:
    """The secret in the file, written first where there is none: whole, by one process, for its owner's eyes."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        descriptor = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32))
        try:
            os.link(mine, path)  # fails where another process was first: then its secret is everybody's
        except FileExistsError:
            pass
        finally:
            mine.unlink()
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, encoding="ascii") as file:
        if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise SettingsError("session_secret", f"is not set, and {path} may be read by others; chmod 600 it")
        kept = file.read().strip()
    if len(kept) < _LEAST:
        raise SettingsError("session_secret", f"is not set, and {path} holds none; remove it, or set the setting")
    return kept
