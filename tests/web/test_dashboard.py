"""The page as it reads without scripts: what it shows of every state, who may do what, and what becomes of a switch."""

from __future__ import annotations

import csv
import io
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from werkzeug.test import TestResponse

from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.entry import Entry
from external_oms.heartbeat import member_name
from external_oms.policy import Freshness, Source, State
from external_oms.records import Cause, Event, Member
from external_oms.stores.memory import MemoryStore
from external_oms.web import create_app, dashboard
from external_oms.web.api import REASON_LENGTH
from external_oms.web.dashboard import ACTIVITY_ROWS, PANELS
from external_oms.web.dashboard_context import DayLog, event_title, format_duration, format_latency, has_ended
from external_oms.web.state import EXTENSION
from tests.support.clock import FakeClock
from tests.support.pages import form_token, open_browser, text_of
from tests.support.stores import FaultyStore
from tests.support.waiting import wait_until
from tests.support.web import ENTRIES, SECRET, TENANT, Server, StartServer, with_key

RANK = {"stranger": -1, "nobody": -1, "viewer": 1, "operator": 2, "admin": 3}
ONE = f"/tenants/{TENANT}"
SWITCH = f"{ONE}/switch"

ROUTES: list[tuple[str, str, int]] = [
    ("GET", "/", 1),
    ("GET", ONE, 1),
    ("GET", f"{SWITCH}?to=on", 3),
    ("POST", SWITCH, 3),
    ("POST", f"{ONE}/read", 2),
    ("GET", "/history.csv", 1),
    ("GET", "/history.json", 1),
    ("GET", "/login", 0),
    ("POST", "/login", 0),
    ("POST", "/logout", 0),
]
"""Every route of the page with the rank that it needs."""


def read(server: Server, tenant: str = TENANT, enabled: bool | None = None) -> None:
    """Have a value read, so that there is one to show."""
    if enabled is not None:
        server.api.set_enabled(tenant, enabled)
    server.oms.operations.refresh(tenant)


def switch(server: Server, to: str, *, seen: str, reason: str = "OPS-7", tenant: str = TENANT) -> TestResponse:
    """Confirm a switch in a browser that has logged in."""
    path = f"/tenants/{tenant}/switch"
    token = form_token(server.client.get(f"{path}?to={to}"))
    return server.client.post(path, data={"csrf_token": token, "to": to, "from": seen, "reason": reason})


def note(server: Server, answer: TestResponse) -> tuple[str, str]:
    """Kind and text of what the next page says became of a form."""
    assert answer.status_code == 303, answer.text[:1000]
    found = re.search(
        r'<p class="note (\w+)" role="status">([^<]*)', server.client.get(answer.headers["Location"]).text
    )
    assert found
    return found.group(1), found.group(2).replace("&#39;", "'")


# -- who ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", RANK)
@pytest.mark.parametrize(("method", "path", "rank"), ROUTES)
def test_each_page_answers_each_role_as_the_table_says(
    server: Server, method: str, path: str, rank: int, who: str
) -> None:
    if method == "POST":
        answer = server.client.post(path, headers=with_key(who))
        assert answer.status_code == 400, "without the token of a form"
    form = {"csrf_token": form_token(server.client.get("/login"))}
    answer = server.client.open(path, method=method, headers=with_key(who), data=form if method == "POST" else None)
    if rank > RANK[who]:
        refused = 303 if method == "GET" else 401
        assert answer.status_code == (refused if RANK[who] < 0 else 403) if rank else answer.status_code < 500
    else:
        assert answer.status_code in {200, 303, 400, 403}
    assert server.api.writes(TENANT) == 0


def test_the_table_of_routes_holds_every_page(server: Server) -> None:
    mounted = {
        (method, rule.rule.replace("<tenant>", TENANT))
        for rule in server.app.url_map.iter_rules()
        if rule.endpoint.startswith(("dashboard.", "login.")) and not rule.endpoint.endswith(".static")
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert mounted == {(method, path.partition("?")[0]) for method, path, _ in ROUTES}


@pytest.mark.parametrize(("role", "switches", "reads"), [("viewer", 0, 0), ("operator", 0, 1), ("admin", 1, 1)])
def test_only_what_a_role_may_do_is_offered(server: Server, role: str, switches: int, reads: int) -> None:
    read(server)
    open_browser(server.client, role)
    for path in ("/", ONE):
        page = server.client.get(path).text
        assert page.count("Switch O") == switches
        assert page.count("Read now") == reads


# -- headers -----------------------------------------------------------------------------------------------------------


class Inline(HTMLParser):
    """What a content security policy without `unsafe-inline` would keep from running."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        if tag == "style" or (tag == "script" and "src" not in names):
            self.found.append(tag)
        self.found += [name for name in names if name == "style" or name.startswith("on")]
        self.found += [
            value
            for name in ("src", "href", "action")
            if (value := names.get(name)) and not value.startswith(("/", "#"))
        ]


PAGES = ("/login", "/", ONE, f"{SWITCH}?to=on", "/tenants/nobody", f"{SWITCH}?to=maybe", "/login?tenant=x")


@pytest.mark.parametrize("path", PAGES)
def test_no_page_holds_a_script_a_style_or_an_address_elsewhere(server: Server, path: str) -> None:
    if not path.startswith("/login"):
        open_browser(server.client)
    walked = Inline()
    walked.feed(server.client.get(path).text)
    assert walked.found == []


@pytest.mark.parametrize("path", [*PAGES, "/static/external-oms/dashboard.js", "/static/external-oms/dashboard.css"])
def test_every_page_is_sealed(server: Server, path: str) -> None:
    open_browser(server.client)
    with server.client.get(path) as answer:
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "*" not in policy
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "same-origin"
        assert answer.headers["Cache-Control"] in {"no-store", "no-cache"}


def test_what_others_wrote_is_shown_as_text(server: Server) -> None:
    read(server)
    server.oms.store.append(  # whatever a row holds
        Event(
            datetime.now(UTC),
            TENANT,
            Cause.WRITE,
            actor="<b>ada",
            delivery_id="<script>",
            detail='"><img src=x onerror=alert(1)>',
        )
    )
    open_browser(server.client)
    page = server.client.get("/").text
    assert "<script>" not in page
    assert "<img src=x" not in page
    assert "&lt;b&gt;ada" in page


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_two_tenants_are_shown_with_everything_that_is_known(two: Server) -> None:
    read(two, TENANT, True)
    read(two, "globex", False)
    assert two.deliver(delivery_id="msg_seen").status_code == 200
    open_browser(two.client)
    said = text_of(two.client.get("/"))
    for words in (
        f"{TENANT} ON",
        "globex OFF",
        "The external OMS owns the orders.",
        "The tenant's own order management owns the orders.",
        "Fresh for another",
        "Generation 1",
        "127.0.0.1:",
        "Last delivery",
        "webhook secret 1",
        "generation 1",
        "msg_seen",
        "1 on 1 off",
    ):
        assert words in said
    assert f"{TENANT} ON" in text_of(two.client.get(ONE))


def test_a_generation_of_thirteen_digits_is_shown_by_its_end_and_whole_under_the_pointer(start: StartServer) -> None:
    """Generations in Redis are times in milliseconds, too long for the columns."""
    generation = 1_780_000_000_123
    data = MemoryStore(entries={TENANT: Entry(generation=generation)})
    server = start(shared=FaultyStore(data=data), refresh="lazy")
    read(server, enabled=True)
    data.report([Member("web:1", TENANT, generation, True, "fresh", 1.0)])
    open_browser(server.client)
    page = server.client.get("/")
    assert "Generation …000123" in text_of(page)
    assert "web:1 ON …000123" in text_of(page)
    assert page.text.count(f'title="{generation}"') == 2
    answer = server.get(f"/api/v1/tenants/{TENANT}").json
    assert answer is not None
    assert answer["generation"] == generation


def test_one_tenant_is_the_whole_page(server: Server) -> None:
    read(server, enabled=True)
    open_browser(server.client, "viewer")
    page = server.client.get("/")
    assert f"<title>{TENANT} ON" in page.text
    assert "All tenants" not in page.text


def test_an_old_value_says_why_since_when_and_how_long_it_will_do(server: Server) -> None:
    read(server, enabled=True)
    server.api.fault(TENANT, Fault(status=503, times=None))
    assert server.deliver().status_code == 202
    open_browser(server.client, "viewer")
    said = text_of(server.client.get("/"))
    assert f"Reads fail for {TENANT}, and the last value is served." in said
    assert "answered 503" in said
    assert re.search(r"Stale while reads fail; served for another (59 min|1 h)", said)
    assert re.search(r"ON is served from the last successful read, \d s ago", said)
    assert re.search(r"Last read failed after \d+ ms", said)
    assert re.search(r"Next read in \d+ s", said)
    assert "generation 1" in said


@pytest.mark.parametrize(
    ("policy", "word", "meaning"),
    [
        ("default", "NO VALUE", "Each caller's own default decides, by when_expired = default."),
        ("on", "ON", "The external OMS owns the orders, by when_expired = on."),
        ("off", "OFF", "The tenant's own order management owns the orders, by when_expired = off."),
        ("last", "NO VALUE", "Each caller's own default decides, by when_expired = last."),
    ],
)
def test_without_a_value_the_page_says_what_callers_get(
    start: StartServer, api: ConfigAPIEmulator, policy: str, word: str, meaning: str
) -> None:
    api.fault(TENANT, Fault(status=500, times=None))
    server = start(when_expired=policy)
    wait_until(lambda: server.oms.cache.state(TENANT).failures)
    open_browser(server.client, "viewer")
    said = text_of(server.client.get("/"))
    assert f"{TENANT} {word}" in said
    assert f"{meaning} No value was ever read." in said
    assert f"No value may be served for {TENANT}." in said


def test_where_nobody_asks_an_old_value_is_no_alarm(start: StartServer, stop_clock: Callable[[], FakeClock]) -> None:
    server = start(refresh="lazy", stale_while_revalidate_seconds=0)
    read(server, enabled=True)
    open_browser(server.client, "viewer")
    stop_clock().advance(31)
    assert server.oms.cache.state(TENANT).freshness == "expired"
    said = text_of(server.client.get("/"))
    assert f"{TENANT} ON" in said
    assert "the next evaluation reads it first" in said


def test_a_member_that_lags_is_seen_at_once_and_a_silent_one_too(
    server: Server, stop_clock: Callable[[], FakeClock]
) -> None:
    read(server, enabled=True)
    assert server.deliver().status_code == 200
    clock = stop_clock()
    store = server.oms.store
    store.report([Member("web-2:8", TENANT, 0, False, "stale", 9.0), Member("web-3:9", TENANT, 1, True, "fresh", 1.0)])
    open_browser(server.client, "viewer")
    assert "web-2:8 OFF 0 following… 0 s ago" in text_of(server.client.get("/")), "it has a moment to follow"
    clock.advance(5)
    said = text_of(server.client.get("/"))
    assert re.search(r"web-2:8 OFF 0 behind 5 s ago", said)
    assert re.search(r"web-3:9 ON 1 current 5 s ago", said)
    assert re.search(r"An older value is served by [^.]*web-2:8", said)
    clock.advance(35)
    assert "silent 40 s ago" in text_of(server.client.get("/"))


def test_the_fleet_is_asked_once_however_many_pages_are_open(
    server: Server, monkeypatch: pytest.MonkeyPatch, stop_clock: Callable[[], FakeClock]
) -> None:
    asked: list[str | None] = []
    store = server.oms.store
    real = type(store).members

    def counted(self: object, tenant: str | None = None) -> object:
        asked.append(tenant)
        return real(store, tenant)

    monkeypatch.setattr(type(store), "members", counted)
    open_browser(server.client, "viewer")
    stop_clock()
    for _ in range(20):
        assert server.client.get(ONE).status_code == 200
    assert len(asked) == 1


def test_the_history_goes_on_over_pages(start: StartServer) -> None:
    server = start(refresh="lazy")  # so that no read adds a row
    for number in range(ACTIVITY_ROWS + 10):
        row = Event(datetime.now(UTC), TENANT, Cause.DELIVERY, delivery_id=f"msg_number_{number:02d}_")
        server.oms.store.append(row)
    open_browser(server.client, "viewer")
    first = server.client.get("/")
    assert first.text.count('<li class="delivery') == ACTIVITY_ROWS
    older = re.search(r'href="(/\?before=\d+)#activity"', first.text)
    assert older
    second = text_of(server.client.get(older.group(1)))
    assert "msg_number_05_" in second
    assert "msg_number_39_" not in second
    assert server.client.get("/?before=nonsense").status_code == 200


# -- many tenants ------------------------------------------------------------------------------------------------------


@contextmanager
def serving(*names: str) -> Iterator[Server]:
    """A server of many tenants."""
    with ConfigAPIEmulator(names) as api:
        app = create_app(api.settings(*names, refresh="lazy", api_keys=ENTRIES, webhook_secrets=[SECRET]))
        oms = app.extensions[EXTENSION]
        yield Server(app, app.test_client(), api, oms)
        oms.provider.shutdown()


def test_a_thousand_tenants_are_a_line_each_and_the_page_stays_usable() -> None:
    with serving(*(f"shop-{number:04d}" for number in range(1000))) as server:
        open_browser(server.client, "viewer")
        for path in ("/", "/?parts=1"):
            page = server.client.get(path)
            assert page.text.count("data-tenant=") == (1000 if path == "/" else 0)
            assert len(page.data) < (1_500_000 if path == "/" else 20_000)


def test_a_filter_works_without_scripts() -> None:
    names = [TENANT, "globex", *(f"shop-{number}" for number in range(PANELS))]
    with serving(*names) as server:
        read(server, "shop-3")
        open_browser(server.client, "viewer")

        def shown(query: str) -> list[str]:
            return re.findall(r'data-tenant="([^"]+)"', server.client.get(f"/?{query}").text)

        assert sorted(shown("")) == sorted(names)
        assert shown("")[-1] == "shop-3", "the one that needs no attention comes last"
        assert shown("q=GLOB") == ["globex"]
        assert shown("q=shop&show=off") == ["shop-3"]
        assert len(shown("show=attention")) == len(names) - 1
        assert shown("q=%3Cscript%3E") == []


# -- switching ---------------------------------------------------------------------------------------------------------


def test_the_confirmation_names_tenant_old_and_new_and_asks_why(server: Server) -> None:
    read(server, enabled=False)
    open_browser(server.client)
    page = server.client.get(f"{SWITCH}?to=on")
    said = text_of(page)
    assert f"Switch {TENANT} ON?" in said
    assert re.search(rf"Tenant {TENANT} 127\.0\.0\.1:\d+ Now OFF", said)
    assert "Then ON the external OMS owns the orders" in said
    assert re.search(r'<input id="reason"[^>]* required', page.text)
    assert server.api.writes(TENANT) == 0


def test_a_switch_reaches_the_api_with_actor_and_reason_in_the_history(server: Server) -> None:
    read(server, enabled=False)
    open_browser(server.client)
    kind, text = note(server, switch(server, "on", seen="OFF", reason="  partner is\tback, OPS-7 "))
    assert (kind, text) == (
        "good",
        f"{TENANT} is ON: written, and read back at generation 1.",
    )
    assert (server.api.enabled(TENANT), server.api.writes(TENANT)) == (True, 1)
    (row,) = [event for event in server.oms.operations.history() if event.cause is Cause.WRITE]
    assert (row.actor, row.enabled) == ("the-admin", True)
    assert "reason: partner is back, OPS-7" in row.detail
    assert "Switch ON by the-admin" in text_of(server.client.get("/"))


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("", "Give a reason"),
        ("   ", "Give a reason"),
        ("x" * (REASON_LENGTH + 1), "one line of text"),
        ("a\x00b", "one line"),
    ],
)
def test_without_a_reason_nothing_is_written(server: Server, reason: str, said: str) -> None:
    read(server)
    open_browser(server.client)
    answer = switch(server, "on", seen="OFF", reason=reason)
    assert (answer.status_code, said in answer.text, server.api.writes(TENANT)) == (400, True, 0)


@pytest.mark.parametrize("to", ["", "maybe", "true"])
def test_a_switch_to_nothing_is_asked_again(server: Server, to: str) -> None:
    read(server)
    open_browser(server.client)
    token = form_token(server.client.get(f"{SWITCH}?to=on"))
    form = {"csrf_token": token, "to": to, "from": "OFF", "reason": "x"}
    answer = server.client.post(SWITCH, data=form)
    assert (answer.status_code, server.api.writes(TENANT)) == (400, 0)


def test_what_changed_since_it_was_looked_at_is_asked_again_with_the_reason_kept(server: Server) -> None:
    read(server, enabled=False)
    open_browser(server.client)
    token = form_token(server.client.get(f"{SWITCH}?to=on"))
    read(server, enabled=True)
    form = {"csrf_token": token, "to": "off", "from": "OFF", "reason": "OPS-9"}
    answer = server.client.post(SWITCH, data=form)
    assert answer.status_code == 400
    assert "The value is ON now; it has changed since you opened this page" in answer.text
    assert 'value="OPS-9"' in answer.text
    assert server.api.writes(TENANT) == 0


def test_what_is_so_already_needs_no_switch(server: Server) -> None:
    read(server, enabled=True)
    open_browser(server.client)
    page = server.client.get(f"{SWITCH}?to=on")
    assert "is ON already" in page.text
    assert 'name="reason"' not in page.text


def test_where_the_present_value_is_not_known_both_are_offered(start: StartServer) -> None:
    server = start(refresh="lazy")
    open_browser(server.client)
    page = server.client.get(SWITCH)
    assert "The present value is not known" in page.text
    assert note(server, switch(server, "on", seen="unknown"))[0] == "good"
    assert server.api.enabled(TENANT) is True


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (Fault(status=409, times=None, where="write"), "bad", "refuses ON in its present state (409)"),
        (Fault(status=400, times=None, where="write"), "bad", "Not switched: the config API refused ON"),
        (Fault(status=403, times=None, where="write"), "bad", "Not switched: nothing was written"),
        (Fault(status=429, retry_after=9, times=None, where="write"), "bad", "Not switched: nothing was written"),
    ],
    ids=["409", "400", "403", "429"],
)
def test_a_switch_that_fails_says_so_in_words_and_claims_nothing(
    server: Server, fault: Fault, kind: str, said: str
) -> None:
    read(server, enabled=False)
    server.api.fault(TENANT, fault)
    open_browser(server.client)
    told = note(server, switch(server, "on", seen="OFF"))
    assert told[0] == kind
    assert said in told[1]
    assert server.api.enabled(TENANT) is False


def test_a_switch_whose_answer_was_lost_is_read_back_until_it_is_known(server: Server) -> None:
    read(server, enabled=False)
    server.api.fault(TENANT, Fault(dropped="headers", where="write"))
    server.api.fault(TENANT, Fault(status=500, times=2))
    open_browser(server.client)
    assert note(server, switch(server, "on", seen="OFF"))[0] == "good"


def test_a_switch_whose_outcome_stays_unknown_says_so_and_what_to_do(server: Server) -> None:
    read(server, enabled=False)
    server.api.fault(TENANT, Fault(dropped="headers", times=None, where="write"))
    server.api.fault(TENANT, Fault(status=500, times=None))
    open_browser(server.client)
    kind, text = note(server, switch(server, "on", seen="OFF"))
    assert kind == "warn"
    assert "It is not known whether ON was written" in text
    assert "Watch this page before you try again" in text


def test_a_write_that_the_api_took_and_does_not_show_yet_is_told_so(server: Server) -> None:
    read(server, enabled=False)
    server.api.fault(TENANT, Fault(lag_seconds=60.0))
    open_browser(server.client)
    kind, text = note(server, switch(server, "on", seen="OFF"))
    assert kind == "warn"
    assert f"took ON for {TENANT} and still answers OFF" in text


def test_what_became_of_a_form_is_told_to_its_session_alone(server: Server) -> None:
    read(server, enabled=False)
    open_browser(server.client)
    place = switch(server, "on", seen="OFF").headers["Location"]
    other = open_browser(server.app.test_client())
    assert 'class="note' not in other.get(place).text
    assert 'class="note' in server.client.get(place).text
    assert 'class="note' not in server.client.get(place).text, "shown once"


def test_switches_are_limited_by_name(start: StartServer) -> None:
    server = start(writes_per_minute=1)
    read(server, enabled=False)
    open_browser(server.client)
    assert note(server, switch(server, "on", seen="OFF"))[0] == "good"
    answer = switch(server, "off", seen="ON")
    assert answer.status_code == 429
    assert "Too many requests" in answer.text
    assert int(answer.headers["Retry-After"]) >= 1


def test_reading_now_tells_what_it_found_or_why_not(server: Server) -> None:
    read(server, enabled=True)
    open_browser(server.client, "operator")

    def press() -> tuple[str, str]:
        token = form_token(server.client.get("/"))
        return note(server, server.client.post(f"{ONE}/read", data={"csrf_token": token}))

    assert press() == ("good", f"Read just now: {TENANT} is ON.")
    server.api.fault(TENANT, Fault(status=503, times=None))
    kind, text = press()
    assert kind == "bad"
    assert text.startswith("The read failed: ")


# -- failing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/tenants/nobody", 404), ("DELETE", ONE, 405), ("POST", "/", 405), ("GET", f"{ONE}/read", 405)],
)
def test_an_error_is_a_page_in_words(server: Server, method: str, path: str, status: int) -> None:
    open_browser(server.client)
    answer = server.client.open(path, method=method)
    assert (answer.status_code, answer.mimetype) == (status, "text/html")
    assert 'role="alert"' in answer.text
    if status == 405:
        assert "GET" in answer.headers["Allow"] or "POST" in answer.headers["Allow"]


def test_a_defect_is_a_page_without_its_text(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a secret of the inside")

    open_browser(server.client)
    monkeypatch.setattr(dashboard, "_activity", broken)
    answer = server.client.get("/")
    assert (answer.status_code, "secret" in answer.text) == (500, False)


def test_without_the_dashboard_there_is_no_page_and_no_login(start: StartServer) -> None:
    server = start(dashboard=False)
    for path in ("/", "/login", "/static/external-oms/dashboard.js"):
        assert server.client.get(path).status_code == 404


def test_every_static_file_and_template_is_in_the_package() -> None:
    place = Path(dashboard.__file__).parent
    assert {path.name for path in (place / "static").iterdir()} == {
        "dashboard.css",
        "dashboard.js",
        "icon.svg",
        "login.js",
    }
    used = {
        name
        for path in (place / "templates").rglob("*.html")
        for name in re.findall(r"http[s]?://[^\"' )]+", path.read_text())
    }
    assert used == set(), "nothing is fetched from elsewhere"


def test_the_rows_say_what_happened() -> None:
    at = datetime(2026, 1, 2, tzinfo=UTC)
    titles = {cause: event_title(Event(at, TENANT, cause, enabled=True)) for cause in Cause}
    assert titles[Cause.WRITE] == "Switch ON"
    assert len(set(titles.values())) == len(Cause)
    assert [format_duration(seconds) for seconds in (None, -3.0, 0.9, 59.9, 60, 3599, 3600, 86_399, 90_000)] == [
        "—", "0 s", "0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "23 h 59 min", "1 d 1 h",
    ]  # fmt: skip
    assert [format_latency(seconds) for seconds in (None, 0.0234, 1.44)] == ["", "23 ms", "1.4 s"]


# -- the truth in the second in which somebody looks -------------------------------------------------------------------


def test_processes_that_have_not_followed_yet_are_counted_as_such(
    server: Server, stop_clock: Callable[[], FakeClock]
) -> None:
    read(server, enabled=True)
    assert server.deliver().status_code == 200
    stop_clock()
    rows = [Member("web-1:7", TENANT, 1, True, "fresh", 1.0), Member("web-2:8", TENANT, 0, False, "stale", 9.0)]
    server.oms.store.report(rows)
    open_browser(server.client, "viewer")
    said = text_of(server.client.get("/"))
    assert f"{TENANT} is ON, and 1 of 2 processes follow so far." in said
    assert "Processes 1 of 2 processes follow so far" in said
    server.oms.store.report([Member("web-2:8", TENANT, 1, True, "fresh", 1.0)])
    server.oms.fleet._kept.clear()
    assert f"{TENANT} is ON, and all 2 processes agree." in text_of(server.client.get("/"))


def test_a_process_that_has_ended_serves_nothing_and_is_not_counted(
    server: Server, stop_clock: Callable[[], FakeClock]
) -> None:
    read(server, enabled=True)
    clock = stop_clock()
    with subprocess.Popen(["/bin/true"]) as ended:
        pass
    mine = Member(member_name(), TENANT, 0, True, "fresh", 1.0)
    server.oms.store.report([Member(f"{socket.gethostname()}:{ended.pid}", TENANT, 0, True, "fresh", 1.0)])
    clock.advance(13)
    server.oms.store.report([mine])
    open_browser(server.client, "viewer")
    said = text_of(server.client.get("/"))
    assert f"{TENANT} is ON. Ended: {socket.gethostname()}:{ended.pid}." in said
    assert f":{ended.pid} — 0 ended 13 s ago" in said


@pytest.mark.parametrize(
    ("name", "seen_seconds", "ended"),
    [("here:5", 13.0, True), ("here:5", 11.0, False), ("there:5", 50.0, False), ("here:6", 50.0, False)],
)
def test_only_a_process_of_this_host_is_known_to_have_ended(name: str, seen_seconds: float, ended: bool) -> None:
    assert has_ended(name, lambda pid: pid == 6, host="here", seen_seconds=seen_seconds) is ended


def test_a_write_that_cannot_be_read_back_is_not_said_to_be_answered_with_the_old_value(server: Server) -> None:
    read(server, enabled=False)
    server.api.fault(TENANT, Fault(status=503, times=None, where="read"))
    open_browser(server.client)
    kind, text = note(server, switch(server, "on", seen="OFF"))
    assert kind == "warn"
    assert f"took ON for {TENANT}, and reading it back fails" in text
    assert "answered 503" in text
    assert "OFF is served until a read succeeds" in text
    assert "answers OFF" not in text


def test_a_message_is_shown_once(server: Server) -> None:
    read(server, enabled=False)
    open_browser(server.client)
    place = switch(server, "on", seen="OFF").headers["Location"]
    assert 'class="note' not in server.client.get(f"{place}?parts=1").text, "an update of an open page does not take it"
    assert 'class="note good' in server.client.get(place).text
    assert 'class="note' not in server.client.get(place).text


def test_a_value_whose_generation_is_older_than_the_tenants_says_so(server: Server) -> None:
    read(server, enabled=True)
    server.api.fault(TENANT, Fault(status=503, times=None))
    assert server.deliver().status_code == 202
    open_browser(server.client, "viewer")
    assert "Generation 1 the value is of 0" in text_of(server.client.get("/"))


def test_a_settling_value_says_so(server: Server) -> None:
    read(server, enabled=True)
    assert server.deliver().status_code == 200
    open_browser(server.client, "viewer")
    assert "Fresh, settling after an invalidation; read again in 0 s" in text_of(server.client.get("/"))


def test_the_page_says_what_is_configured(start: StartServer) -> None:
    server = start(when_expired="last", stale_if_error_seconds=7200, environment="production")
    open_browser(server.client, "viewer")
    page = server.client.get("/")
    said = text_of(page)
    assert "external_oms_enabled" in said
    assert re.search(r"Config API 127\.0\.0\.1:\d+", said)
    assert "A value is fresh for 30 s then stale, while a read runs 30 s or while reads fail 2 h 00 min" in said
    assert "last: the last value" in said


@pytest.mark.parametrize(
    ("given", "color"),
    [
        ({"environment": "production"}, "red"),
        ({"environment": "Live EU"}, "red"),
        ({"environment": "staging"}, "amber"),
        ({"environment": "sandbox"}, "blue"),
        ({"environment": "production", "environment_color": "purple"}, "purple"),
    ],
)
def test_an_environment_is_a_word_in_colour_on_every_page(
    start: StartServer, given: dict[str, str], color: str
) -> None:
    server = start(**given)
    pages = [server.client.get("/login").text]
    open_browser(server.client)
    pages += [server.client.get(path).text for path in ("/", ONE, SWITCH, "/tenants/nobody")]
    for page in pages:
        assert f'class="env-{color}"' in page
        assert f"</span>{given['environment']}</p>" in page
        assert f"· {given['environment']}</title>" in page


def test_parts_are_the_page_without_what_does_not_change(two: Server) -> None:
    read(two)
    read(two, "globex")
    open_browser(two.client)
    for path in ("/", ONE):
        page, parts = two.client.get(path).text, two.client.get(f"{path}?parts=1").text
        named = re.findall(r'data-part="([^"]+)"', page)
        assert named == re.findall(r'data-part="([^"]+)"', parts)
        assert len(named) >= 3
        assert "<header class" not in parts.split("<article", maxsplit=1)[0]
        assert "<link" not in parts


# -- charts ------------------------------------------------------------------------------------------------------------


def test_the_last_day_and_the_counts_are_charts_that_read_as_text(server: Server) -> None:
    read(server, enabled=False)
    read(server, enabled=True)
    evaluate = {"headers": with_key("viewer"), "json": {}}
    for _ in range(3):
        assert server.client.post("/ofrep/v1/evaluate/flags/external_oms_enabled", **evaluate).status_code == 200
    open_browser(server.client, "viewer")
    said = text_of(server.client.get("/"))
    assert re.search(rf"The last 24 hours of {TENANT} ON for \d s, since \d\d:\d\d\. In the last 24 hours: ON", said)
    assert "not recorded 23 h 59 min" in said
    assert re.search(r"From To Evaluations got For \d{4}-\d\d-\d\d \S+ now ON", said)
    assert re.search(r"Reads of the config API by latency ≤ 50 ms: [1-9]", said)
    assert "failed: 0." in said
    assert "Evaluations by value ON: 3; OFF: 0; no value: 0." in said
    assert "This process, since the start" in said


class Rows:
    """A history that counts how often it is asked."""

    def __init__(self, *events: Event) -> None:
        self.events = events
        self.asked = 0

    def __call__(self, *, tenant: str, limit: int, before: int | None) -> list[Event]:
        self.asked += 1
        fits = [event for event in self.events if event.tenant == tenant and (before is None or event.id < before)]
        return fits[:limit]


def test_the_rows_of_a_day_are_read_until_they_are_older_and_kept_until_the_state_changes() -> None:
    now = datetime(2026, 7, 1, tzinfo=UTC)
    fetched = now - timedelta(seconds=3)

    def row(number: int, hours: float, cause: Cause) -> Event:
        return Event(now - timedelta(hours=hours), TENANT, cause, enabled=True, id=number)

    newer = [row(2000 - number, number / 100, Cause.DELIVERY) for number in range(1200)]
    history = Rows(*newer, row(700, 13, Cause.CHANGED), row(699, 25, Cause.FAILED))
    log = DayLog(history)
    state = State(TENANT, True, Freshness.FRESH, 3.0, 1, fetched, None, Source.MEMORY, None, 27.0)
    day = log.rows(state, now=now)
    assert ([event.id for event in day.rows], day.since, history.asked) == ([700], now - timedelta(hours=24), 3)
    assert day.delivery == newer[0]
    assert log.rows(state, now=now) is day
    assert log.rows(replace(state, generation=2), now=now) is not day
    history.events = (row(3000, 0, Cause.FAILED), *history.events)
    history.asked = 0
    later = log.rows(replace(state, generation=3), now=now)
    assert ([event.id for event in later.rows], later.since, later.delivery) == ([3000, 700], day.since, newer[0])
    assert history.asked == 1, "only the newer rows are read"
    history.events = (row(1, 5, Cause.CHANGED),)  # the store was replaced
    assert [event.id for event in log.rows(replace(state, generation=4), now=now).rows] == [1]

    assert DayLog(Rows()).rows(state, now=now).since == fetched
    assert DayLog(Rows(*newer[:3])).rows(state, now=now).since == newer[2].at
    everlasting = [row(10**6 - number, number / 10**5, Cause.DELIVERY) for number in range(6000)]
    assert DayLog(Rows(*everlasting)).rows(state, now=now).since == everlasting[4999].at, "a storm is cut off"
    never = replace(state, enabled=None, fetched_at=None, age_seconds=None, fresh_seconds=None)
    assert DayLog(Rows()).rows(never, now=now).since.year == 9999


# -- the history -------------------------------------------------------------------------------------------------------


@pytest.fixture
def storied(start: StartServer) -> Server:
    """A server with a history of one tenant, and one row of another."""
    server = start(TENANT, "globex", refresh="lazy")
    at = datetime.now(UTC)
    for cause, actor, detail in (
        (Cause.DELIVERY, "webhook secret 1", ""),
        (Cause.WRITE, "ada", '=HYPERLINK("http://evil")'),
        (Cause.WRITE, "Grace", '-1+1, "quoted"\nand more'),
        (Cause.FAILED, "", "answered 503"),
    ):
        server.oms.store.append(Event(at, TENANT, cause, actor=actor, detail=detail))
    server.oms.store.append(Event(at, "globex", Cause.DELIVERY, actor="webhook key 2"))
    open_browser(server.client, "viewer")
    return server


@pytest.mark.parametrize(
    ("query", "actors"),
    [
        ("", ["webhook key 2", "", "Grace", "ada", "webhook secret 1"]),
        ("cause=write", ["Grace", "ada"]),
        ("actor=WEBHOOK", ["webhook key 2", "webhook secret 1"]),
        ("cause=write&actor=grace", ["Grace"]),
        ("cause=store", []),
        (f"tenant={TENANT}&cause=delivery", ["webhook secret 1"]),
    ],
)
def test_the_history_is_filtered_alike_on_the_page_in_the_api_and_in_the_exports(
    storied: Server, query: str, actors: list[str]
) -> None:
    api = storied.get(f"/api/v1/history?{query}").json
    exported = storied.client.get(f"/history.json?{query}")
    table = list(csv.DictReader(io.StringIO(storied.client.get(f"/history.csv?{query}").text)))
    assert api is not None
    assert [event["actor"] for event in api["events"]] == actors
    assert exported.json == api["events"]
    assert [row["actor"] for row in table] == actors
    assert exported.headers["Content-Disposition"] == 'attachment; filename="external-oms-history.json"'
    if "tenant" not in query:
        shown = re.findall(r'<li class="', storied.client.get(f"/?{query}").text.split('id="activity"')[1])
        assert len(shown) == len(actors)
        assert actors or "No activity matches." in storied.client.get(f"/?{query}").text


def test_no_cell_of_an_export_is_a_formula(storied: Server) -> None:
    answer = storied.client.get("/history.csv")
    assert answer.content_type == "text/csv; charset=utf-8; header=present"
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["detail"] for row in rows][2:4] == ['\'-1+1, "quoted"\nand more', '\'=HYPERLINK("http://evil")']
    assert not [cell for row in rows for cell in row.values() if cell.startswith(("=", "+", "-", "@"))]


def test_the_api_pages_through_csv_too(storied: Server) -> None:
    first = storied.get("/api/v1/history?format=csv&limit=2&actor=e")
    following = re.fullmatch(r'<(/api/v1/history\?[^>]+)>; rel="next"', first.headers["Link"])
    assert following
    rest = storied.get(following.group(1))
    actors = [row["actor"] for page in (first, rest) for row in csv.DictReader(io.StringIO(page.text))]
    assert actors == ["webhook key 2", "Grace", "webhook secret 1"]
    assert "Link" not in rest.headers


@pytest.mark.parametrize("query", ["cause=nonsense", f"actor={'x' * 129}", "format=xml"])
def test_a_filter_that_is_none_is_refused_by_the_api(server: Server, query: str) -> None:
    assert server.get(f"/api/v1/history?{query}").status_code == 400


def test_an_export_of_an_unknown_tenant_or_cause_is_refused(server: Server) -> None:
    open_browser(server.client, "viewer")
    assert server.client.get("/history.csv?tenant=nobody").status_code == 404
    assert server.client.get("/history.json?cause=nonsense").status_code == 400
    assert server.app.test_client().get("/history.csv").status_code == 303


def test_an_export_goes_on_over_pages(start: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(refresh="lazy")
    for number in range(1203):
        server.oms.store.append(Event(datetime.now(UTC), TENANT, Cause.DELIVERY, delivery_id=f"msg_{number}"))
    open_browser(server.client, "viewer")
    assert len(server.client.get("/history.json").json or ()) == 1203
    monkeypatch.setattr(dashboard, "EXPORT_ROWS", 1000)
    assert len(server.client.get("/history.csv").text.splitlines()) == 1001
