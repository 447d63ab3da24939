"""What people see: the flip within a second, the switch with its reason, and nothing for who may not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.testing import sign_delivery
from external_oms.web.dashboard import PANELS
from tests.support.browsing import PHONE, Visit, Visits
from tests.support.servers import Served, served
from tests.support.waiting import PATIENCE_SECONDS
from tests.support.web import HOOK, SECRET, TENANT

SOON_MS = 5_000
"""Five times what is promised: a flip shows within a second."""

PATIENCE_MS = 1000 * PATIENCE_SECONDS


def panel(page: Page, tenant: str = TENANT) -> Locator:
    return page.locator(f'[data-tenant="{tenant}"]')


def word(page: Page, tenant: str = TENANT) -> Locator:
    return panel(page, tenant).locator('[data-field="word"]')


def deliver(server: Served, tenant: str, delivery_id: str) -> dict[str, object]:
    body = f'{{"tenant": "{tenant}"}}'.encode()
    return server.post(HOOK, body, sign_delivery(body, SECRET, delivery_id=delivery_id))[1]


def flip(server: Served, enabled: bool, delivery_id: str, tenant: str = TENANT) -> None:
    server.api.set_enabled(tenant, enabled)
    assert deliver(server, tenant, delivery_id)["enabled"] is enabled


# -- live --------------------------------------------------------------------------------------------------------------


@pytest.mark.serial
def test_a_flip_with_a_delivery_shows_within_a_second_without_a_reload(visit: Visits, server: Served) -> None:
    flip(server, False, "flip_0")
    one = visit()
    one.live("viewer")
    expect(word(one.page, "globex")).to_have_text(re.compile("ON|OFF"))
    expect(word(one.page)).to_have_text("OFF")
    one.page.evaluate("window.untouched = true")
    for number, enabled in enumerate((True, False, True), start=1):
        flip(server, enabled, f"flip_{number}")
        expect(word(one.page)).to_have_text("ON" if enabled else "OFF", timeout=SOON_MS)
        expect(one.page.locator("#said")).to_contain_text(f"{TENANT} is {'ON' if enabled else 'OFF'} now")
    expect(one.page.get_by_text("flip_3")).to_be_visible(timeout=PATIENCE_MS)
    assert one.page.evaluate("window.untouched") is True


def test_every_worker_is_a_member_and_follows(visit: Visits, server: Served) -> None:
    one = visit()
    one.live("viewer")
    flip(server, True, "member_0")
    flip(server, False, "member_1")
    for pid in server.workers():
        row = panel(one.page).get_by_role("row", name=re.compile(rf":{pid}\b"))
        expect(row).to_contain_text("OFF", timeout=PATIENCE_MS)
        expect(row).to_contain_text("current", timeout=PATIENCE_MS)
    expect(panel(one.page).locator("caption")).to_contain_text("all 2 processes agree")


def test_the_summary_and_the_rows_never_contradict_each_other(visit: Visits, server: Served) -> None:
    """Right after a flip the processes have not reported it yet; what the summary counts is what the rows show."""
    one = visit()
    one.live("viewer", f"/tenants/{TENANT}")
    one.page.evaluate("""() => {
        window.seen = [];
        const look = () => {
            const rows = [...document.querySelectorAll('.members tbody tr')].map(row => row.className);
            window.seen.push([document.querySelector('.summary').textContent, rows.join(' ')]);
        };
        new MutationObserver(look).observe(document.body, {childList: true, subtree: true, characterData: true});
        look();
    }""")
    for number in range(6):
        flip(server, number % 2 == 0, f"agree_{number}")
        one.page.wait_for_function("() => window.seen.at(-1)[0].includes('all 2 processes agree')")
    seen = set()
    for summary, rows in one.page.evaluate("() => window.seen"):
        agree = "all 2 processes agree" in summary
        assert agree == (rows == "current current"), (summary, rows)
        seen.add(agree)
    assert seen == {True, False}


def test_time_alone_counts_down(visit: Visits, server: Served) -> None:
    one = visit()
    one.live("viewer", f"/tenants/{TENANT}")
    freshness = panel(one.page).locator('[data-field="status"]')
    expect(freshness).to_contain_text(re.compile(r"^Fresh.* \d+ s\.$"), timeout=PATIENCE_MS)
    before = freshness.text_content()
    expect(freshness).not_to_have_text(before or "", timeout=PATIENCE_MS)


def test_a_dead_api_shows_why_and_recovers(visit: Visits, server: Served) -> None:
    one = visit()
    one.live("viewer")
    server.api.fault("globex", Fault(status=503, times=None))
    try:
        deliver(server, "globex", "dead_1")
        error = panel(one.page, "globex").locator('[data-field="error"]')
        expect(error).to_contain_text("answered 503", timeout=PATIENCE_MS)
        expect(one.page.locator(".summary")).to_contain_text("Reads fail for globex", timeout=PATIENCE_MS)
        expect(panel(one.page, "globex").locator('[data-field="retry"]')).to_have_text(
            re.compile(r"in \d+ s|now|before")
        )
    finally:
        server.api.clear("globex")
    deliver(server, "globex", "dead_2")
    expect(error).to_be_hidden(timeout=PATIENCE_MS)
    expect(one.page.locator(".summary")).not_to_contain_text("Reads fail", timeout=PATIENCE_MS)


def test_a_session_that_has_ended_is_said(visit: Visits, server: Served) -> None:
    one = visit()
    one.live("viewer")
    one.page.context.clear_cookies()
    flip(server, True, "ended_1")
    expect(one.page.get_by_role("link", name="Session ended: log in again")).to_be_visible(timeout=PATIENCE_MS)


def test_a_page_that_nobody_sees_holds_no_stream(visit: Visits, server: Served) -> None:
    one = visit()
    one.live("viewer")
    hide = """hidden => {
        Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
        document.dispatchEvent(new Event('visibilitychange'));
    }"""
    one.page.evaluate(hide, True)
    flip(server, False, "hidden_1")
    flip(server, True, "hidden_2")
    with one.page.expect_response(lambda answer: "/api/v1/events" in answer.url):
        one.page.evaluate(hide, False)
    expect(word(one.page)).to_have_text("ON", timeout=PATIENCE_MS)


# -- switching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scripts", [True, False], ids=["with scripts", "without scripts"])
def test_a_switch_asks_for_a_reason_and_reaches_the_api(visit: Visits, server: Served, scripts: bool) -> None:
    flip(server, False, f"switch_{scripts}", "globex")
    one = visit(java_script_enabled=scripts)
    one.login("admin")
    page = one.page
    expect(word(page, "globex")).to_have_text("OFF")
    page.get_by_role("link", name="Switch ON… globex").click()
    expect(page.get_by_role("heading", name="Switch globex ON?")).to_be_visible()
    expect(page.locator(".change")).to_contain_text("OFF")
    button = page.get_by_role("button", name="Switch globex ON")
    button.click()
    assert server.api.enabled("globex") is False, "the browser asks for the reason first"
    page.get_by_label("Reason").fill("partner is back, OPS-7")
    button.click()
    expect(page.locator(".note.good")).to_contain_text("globex is ON: written, and read back", timeout=PATIENCE_MS)
    assert server.api.enabled("globex") is True
    expect(page.get_by_text("reason: partner is back, OPS-7").first).to_be_visible(timeout=PATIENCE_MS)
    expect(page.locator(".timeline")).to_contain_text("the-admin")
    page.reload()
    assert server.api.enabled("globex") is True, "a reload writes nothing again"


@pytest.mark.parametrize(("role", "may_read"), [("viewer", False), ("operator", True)])
def test_who_may_not_switch_has_no_switch(visit: Visits, server: Served, role: str, may_read: bool) -> None:
    one = visit()
    one.live(role)
    expect(one.page.get_by_role("link", name=re.compile("Switch"))).to_have_count(0)
    expect(one.page.get_by_role("button", name=re.compile("Read now"))).to_have_count(2 if may_read else 0)
    one.page.goto(f"{server.url}/tenants/{TENANT}/switch?to=on")
    expect(one.page.get_by_role("alert")).to_contain_text("This needs the role admin")
    one.complaints.clear()  # the browser tells of the 403


def test_a_wrong_key_gets_in_nowhere(visit: Visits, server: Served) -> None:
    one = visit()
    one.login("", key="oms_wrong")
    expect(one.page.get_by_role("alert")).to_have_text("Invalid API key")
    one.page.goto(f"{server.url}/tenants/{TENANT}")
    expect(one.page).to_have_url(re.compile(r"/login\?tenant="))
    expect(one.page.get_by_label("API key")).to_be_focused()


def test_logging_out_ends_it(visit: Visits, server: Served) -> None:
    one = visit()
    one.live("viewer")
    one.page.get_by_role("button", name="Log out").click()
    expect(one.page).to_have_url(re.compile("/login"))
    one.page.goto(server.url)
    expect(one.page).to_have_url(re.compile("/login"))


# -- for everybody -----------------------------------------------------------------------------------------------------


def test_without_scripts_the_page_reads(visit: Visits, server: Served) -> None:
    one = visit(java_script_enabled=False)
    one.login("viewer")
    expect(word(one.page)).to_have_text(re.compile("ON|OFF"))
    expect(panel(one.page)).to_contain_text("Changed upstream")
    expect(panel(one.page).get_by_role("img", name=f"The last 24 hours of {TENANT}")).to_be_visible()
    expect(one.page.get_by_text("this page does not update by itself")).to_be_visible()
    one.page.get_by_role("link", name="Refresh").click()
    expect(word(one.page)).to_have_text(re.compile("ON|OFF"))


def test_a_message_of_success_leaves_by_itself_and_one_of_failure_stays(visit: Visits, server: Served) -> None:
    one = visit()
    one.live("operator", f"/tenants/{TENANT}")
    one.page.clock.install()
    button = one.page.get_by_role("button", name="Read now")
    button.click()
    expect(one.page.locator(".note.good")).to_contain_text("Read just now")
    one.page.clock.fast_forward(11_000)
    expect(one.page.locator(".note")).to_have_count(0)
    server.api.fault(TENANT, Fault(status=503, times=None))
    try:
        button.click()
        expect(one.page.locator(".note.bad")).to_contain_text("The read failed")
        one.page.clock.fast_forward(11_000)
        expect(one.page.locator(".note.bad")).to_be_visible()
    finally:
        server.api.clear(TENANT)


def test_a_lost_connection_is_said_with_the_age_of_what_is_shown(visit: Visits, server: Served) -> None:
    one = visit()
    one.live("viewer")
    one.page.context.set_offline(True)
    live = one.page.locator("#live")
    expect(live).to_have_text(re.compile(r"Not connected: shown as of \d+ s ago"), use_inner_text=True)
    one.page.context.set_offline(False)
    expect(live).to_have_text("Live", use_inner_text=True, timeout=PATIENCE_MS)
    one.complaints.clear()  # the browser tells of the requests that failed


def test_where_the_event_stream_is_refused_the_page_polls(visit: Visits, server: Served) -> None:
    flip(server, False, "poll_0")
    one = visit()
    one.page.route("**/api/v1/events*", lambda route: route.fulfill(status=503, headers={"Retry-After": "5"}))
    one.login("viewer")
    expect(one.page.locator("#live")).to_have_text("Polling", use_inner_text=True, timeout=PATIENCE_MS)
    expect(word(one.page)).to_have_text("OFF")
    flip(server, True, "poll_1")
    expect(word(one.page)).to_have_text("ON", timeout=PATIENCE_MS)
    one.complaints.clear()  # the browser tells of the 503


def test_of_many_tenants_only_the_rows_that_changed_are_fetched(browser: Browser, tmp_path: Path, axe: str) -> None:
    names = [TENANT, *(f"shop-{number}" for number in range(PANELS))]
    with ConfigAPIEmulator(names) as api, served(api, tmp_path) as server, browser.new_context(bypass_csp=True) as own:
        one = Visit(own.new_page(), server)
        asked: list[str] = []
        one.page.on("request", lambda request: asked.append(request.url) if "parts=" in request.url else None)
        one.live("viewer")
        expect(panel(one.page, "shop-3")).to_be_visible()
        one.page.wait_for_function("document.querySelector('.row[data-flag=none]') === null")
        asked.clear()
        flip(server, True, "rows_1", "shop-3")
        expect(word(one.page, "shop-3")).to_have_text("ON", timeout=SOON_MS)
        expect(one.page.locator("#said")).to_contain_text("shop-3 is ON now")
        assert any("tenants=shop-3" in url for url in asked)
        assert serious(one, axe) == []


def test_an_update_keeps_the_focus_and_what_is_open(visit: Visits, server: Served) -> None:
    one = visit()
    one.live("admin", f"/tenants/{TENANT}")
    page = one.page
    page.get_by_text("As a table").click()
    expect(page.get_by_role("columnheader", name="Evaluations got")).to_be_visible()
    button = page.get_by_role("button", name="Read now")
    button.focus()
    generation = panel(page).locator('[data-field="generation"]')
    before = generation.text_content() or ""
    deliver(server, TENANT, "focus_1")
    expect(generation).not_to_have_text(before, timeout=PATIENCE_MS)
    expect(button).to_be_focused()
    expect(page.get_by_role("columnheader", name="Evaluations got")).to_be_visible()


def test_the_keyboard_alone_will_do(visit: Visits, server: Served) -> None:
    one = visit()
    one.live("admin")
    page = one.page
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name=TENANT).first).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name=re.compile("Switch"))).to_have_count(2)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=re.compile(f"Switch {TENANT}"))).to_be_visible()


VIEWS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": PHONE,
    "dark phone": {**PHONE, "color_scheme": "dark"},
}


PATHS = ("/", f"/tenants/{TENANT}", f"/tenants/{TENANT}/switch", "/tenants/nobody")


@pytest.mark.parametrize("view", VIEWS)
def test_nothing_keeps_anybody_out(visit: Visits, server: Served, axe: str, view: str) -> None:
    one = visit(**VIEWS[view], bypass_csp=True)  # the inspector is a foreign script
    one.page.goto(f"{server.url}/login")
    found = {"/login": serious(one, axe)}
    one.live("admin")
    for path in PATHS:
        one.page.goto(f"{server.url}{path}")
        found[path] = serious(one, axe)
        assert "phone" not in view or one.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert found == {path: [] for path in ("/login", *PATHS)}
    one.complaints.clear()  # the 404 that was asked for


def test_nothing_keeps_anybody_out_while_reads_fail(visit: Visits, server: Served, axe: str) -> None:
    server.api.fault("globex", Fault(status=503, times=None))
    try:
        deliver(server, "globex", "axe_dead")
        for view in VIEWS.values():
            one = visit(**view, bypass_csp=True)
            one.live("admin")
            expect(one.page.locator(".summary.warn")).to_be_visible(timeout=PATIENCE_MS)
            assert serious(one, axe) == []
    finally:
        server.api.clear("globex")


def serious(one: Visit, axe: str) -> list[str]:
    """What axe finds that is serious or worse."""
    one.page.evaluate(axe)
    found = one.page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    return [
        f"{rule['id']}: {[node['html'][:120] for node in rule['nodes']]}"
        for rule in found["violations"]
        if rule["impact"] in {"serious", "critical"}
    ]
