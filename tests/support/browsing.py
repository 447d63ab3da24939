"""A visit to the page with a real browser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Page, expect

from tests.support.servers import Served
from tests.support.web import KEYS

__all__ = ["PHONE", "Visit", "Visits"]

PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@dataclass
class Visit:
    """One browser's look at the page, and what its console had to say."""

    page: Page
    server: Served
    complaints: list[str] = field(default_factory=list)

    def login(self, role: str, *, key: str = "") -> None:
        self.page.goto(f"{self.server.url}/login")
        self.page.get_by_label("API key").fill(key or KEYS[role])
        self.page.get_by_role("button", name="Log in").click()

    def live(self, role: str, path: str = "/") -> None:
        """Log in and wait until the page is live."""
        self.login(role)
        if path != "/":
            self.page.goto(f"{self.server.url}{path}")
        expect(self.page.locator("#live")).to_have_text("Live", use_inner_text=True)


Visits = Callable[..., Visit]
