"""The example page in a real browser, on another origin: preflight, keys in headers, ETag, EventSource, and a flip."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from external_oms.emulator import ConfigAPIEmulator
from tests.support.servers import Served, served
from tests.support.web import KEYS, TENANT

EXAMPLE = Path(__file__).parents[2] / "examples" / "browser_client"
NODE = Path(__file__).parents[1] / "support" / "node"
CORE = "/node_modules/@openfeature/ofrep-core/"


class _Page(SimpleHTTPRequestHandler):
    """The example, with the clients that the tests have installed."""

    def translate_path(self, path: str) -> str:
        if path.startswith(CORE):  # the web client's own, which stands inside it where the server's client is there too
            path = path.replace(CORE, f"/node_modules/@openfeature/ofrep-web-provider{CORE}")
        if path.startswith("/node_modules/"):
            return str(NODE / path.lstrip("/"))
        return super().translate_path(path)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def origin(node: Path) -> Iterator[str]:
    """Where the page is: another origin than the server's."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Page, directory=str(EXAMPLE))) as pages:
        thread = threading.Thread(target=pages.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{pages.server_port}"
        pages.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def server(origin: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("served")
    with ConfigAPIEmulator([TENANT]) as api, served(api, place, ofrep_origins=origin) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context()
    yield context.new_page()
    context.close()


def connect(page: Page, at: str, server: Served, key: str) -> None:
    page.goto(at)
    page.get_by_label("Server").fill(server.url)
    page.get_by_label("Viewer's key").fill(key)
    page.get_by_role("button", name="Connect").click()


def test_the_page_hears_of_every_flip(page: Page, origin: str, server: Served) -> None:
    server.flip(True)
    with page.expect_response(lambda answer: "/ofrep/v1/events" in answer.url) as stream:
        connect(page, origin, server, KEYS["viewer"])
    assert stream.value.status == 200
    output = page.get_by_role("status")
    expect(output).to_have_text("The external OMS has it.")
    for enabled in (False, True, False):
        server.flip(enabled)
        expect(output).to_have_text("The external OMS has it." if enabled else "It is ours.")


def test_a_page_with_a_wrong_key_says_so(page: Page, origin: str, server: Served) -> None:
    connect(page, origin, server, "oms_wrong")
    expect(page.get_by_role("status")).to_contain_text("Refused")


def test_a_page_of_an_origin_that_is_not_named_learns_nothing(page: Page, origin: str, server: Served) -> None:
    connect(page, origin.replace("127.0.0.1", "localhost"), server, KEYS["viewer"])
    expect(page.get_by_role("status")).to_contain_text("Refused")
