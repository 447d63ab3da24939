"""The page in a real browser, against a real server with two workers over an emulated config API."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

from external_oms.emulator import ConfigAPIEmulator
from tests.web.conftest import KEYS, TENANT, installed
from tests.web.served import Served, served

__all__ = ["PHONE", "Visit", "Visits", "installed"]

PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}

QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
"""A browser that calls nobody but the server under test."""


@dataclass
class Visit:
    """One browser's look at the page, and what its console had to say."""

    page: Page
    server: Served
    complaints: list[str] = field(default_factory=list)

    def login(self, role: str, *, key: str = "") -> None:
        self.page.goto(f"{self.server.url}/login")
        self.page.get_by_label("Key").fill(key or KEYS[role])
        self.page.get_by_role("button", name="Log in").click()

    def live(self, role: str, path: str = "/") -> None:
        """Log in and wait until the page is live."""
        self.login(role)
        if path != "/":
            self.page.goto(f"{self.server.url}{path}")
        expect(self.page.locator("#live")).to_have_text("Live")


Visits = Callable[..., Visit]


@pytest.fixture(scope="module")  # not longer: another module's tests in this process may want a Playwright of their own
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not on the PATH")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=list(QUIET))
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("served")
    with (
        ConfigAPIEmulator([TENANT, "globex"]) as api,
        served(api, place, logins_per_minute="10000", writes_per_minute="10000") as running,
    ):
        yield running


@pytest.fixture
def visit(browser: Browser, server: Served) -> Iterator[Visits]:
    """Opens browsers; at the end none of them may have complained, of a script or of the security policy."""
    opened: list[tuple[BrowserContext, Visit]] = []

    def new(**given: Any) -> Visit:  # noqa: ANN401 - as Playwright takes them
        context = browser.new_context(**given)
        made = Visit(context.new_page(), server)

        def heard(message: ConsoleMessage) -> None:
            if message.type in {"error", "warning"} and "status of 4" not in message.text:
                made.complaints.append(message.text)

        made.page.on("console", heard)
        made.page.on("pageerror", lambda error: made.complaints.append(str(error)))
        made.page.on(
            "requestfailed", lambda failed: made.complaints.append(failed.url) if "csp" in str(failed.failure) else None
        )
        opened.append((context, made))
        return made

    yield new
    for context, made in opened:
        context.close()
        assert made.complaints == []


@pytest.fixture(scope="session")
def axe(installed: Path) -> str:
    """The script that looks for what keeps people out."""
    return (installed / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
