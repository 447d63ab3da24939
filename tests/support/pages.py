"""How a browser without scripts goes through the pages: it keeps cookies and sends back the forms that it was shown."""

from __future__ import annotations

import re
from html import unescape

from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from tests.support.web import KEYS

__all__ = ["form_token", "login", "open_browser", "text_of"]

_TOKEN = re.compile(r'name="csrf_token" value="([^"]+)"')
_TAG = re.compile(r"<[^>]*>")


def form_token(answer: TestResponse) -> str:
    """The hidden token of a page's first form."""
    found = _TOKEN.search(answer.text)
    assert found, answer.text[:2000]
    return unescape(found.group(1))


def text_of(answer: TestResponse) -> str:
    """What a page says, without its tags."""
    return " ".join(unescape(_TAG.sub(" ", answer.text)).split())


def login(browser: FlaskClient, role: str = "admin", *, key: str = "") -> TestResponse:
    """Log in with the key of a role, or another one."""
    token = form_token(browser.get("/login"))
    return browser.post("/login", data={"csrf_token": token, "key": key or KEYS[role]})


def open_browser(browser: FlaskClient, role: str = "admin") -> FlaskClient:
    """A browser that has logged in."""
    assert login(browser, role).status_code == 303
    return browser
