"""The page in a real browser, against a real server with two workers over an emulated config API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage

from external_oms.emulator import ConfigAPIEmulator
from tests.support.browsing import Visit, Visits
from tests.support.servers import Served, served
from tests.support.web import TENANT


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
def axe(node: Path) -> str:
    """The script that looks for what keeps people out."""
    return (node / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")
