"""Nobody in without a key: sessions, forms, cookies, and what a stranger may try."""

from __future__ import annotations

import base64
import json
import logging
import re
import time
from http.cookies import Morsel, SimpleCookie
from itertools import count
from pathlib import Path

import pytest
import requests
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from external_oms.emulator import ConfigAPIEmulator
from external_oms.errors import SettingsError
from external_oms.web import create_app
from external_oms.web.keys import Role, new_key
from external_oms.web.login import COOKIE
from external_oms.web.state import EXTENSION
from tests.support.pages import form_token, login, open_browser, text_of
from tests.support.servers import SERVE, served
from tests.support.waiting import wait_until
from tests.support.web import ENTRIES, KEYS, SECRET, TENANT, Server, StartServer, with_key

ROLES = tuple(KEYS)
SIGNED = "a secret of sixteen characters and more"


def cookie_of(answer: TestResponse) -> Morsel[str]:
    """The session cookie that an answer sets."""
    (given,) = [line for line in answer.headers.getlist("Set-Cookie") if line.startswith(f"{COOKIE}=")]
    return SimpleCookie(given)[COOKIE]


def carried(browser: FlaskClient) -> str:
    cookie = browser.get_cookie(COOKIE)
    assert cookie is not None
    return cookie.value


# -- the way in --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_a_key_opens_the_page_and_names_its_holder(server: Server, role: str) -> None:
    answer = login(server.client, role)
    assert (answer.status_code, answer.headers["Location"]) == (303, "/")
    page = server.client.get("/")
    assert page.status_code == 200
    assert f"the-{role} {role}" in text_of(page)


@pytest.mark.parametrize("path", ["/", f"/tenants/{TENANT}", f"/tenants/{TENANT}/switch?to=on"])
def test_who_is_not_logged_in_is_asked_for_a_key(server: Server, path: str) -> None:
    answer = server.client.get(path)
    wanted = "/login" if path == "/" else f"/login?tenant={TENANT}"
    assert (answer.status_code, answer.headers["Location"]) == (303, wanted)
    assert "ON" not in answer.text


def test_after_the_login_the_tenant_asked_for_is_shown(server: Server) -> None:
    token = form_token(server.client.get(f"/login?tenant={TENANT}"))
    answer = server.client.post("/login", data={"csrf_token": token, "key": KEYS["viewer"], "tenant": TENANT})
    assert answer.headers["Location"] == f"/tenants/{TENANT}"


@pytest.mark.parametrize(
    "wanted",
    ["https://evil.example", "//evil.example", "/\\evil.example", "..", "javascript:alert(1)", "\r\nX: y", "nobody"],
)
def test_no_login_leads_anywhere_else(server: Server, wanted: str) -> None:
    token = form_token(server.client.get("/login", query_string={"tenant": wanted, "next": wanted}))
    data = {"csrf_token": token, "key": KEYS["viewer"], "tenant": wanted, "next": wanted}
    assert server.client.post("/login", data=data).headers["Location"] == "/"


WRONG = ("", " ", "oms_wrong", *ENTRIES, *(entry.rsplit(":", 1)[1] for entry in ENTRIES), "x" * 5000, "\u00e9\u0000")


@pytest.mark.parametrize("key", WRONG, ids=count())
def test_a_wrong_key_gets_in_nowhere(server: Server, key: str) -> None:
    token = form_token(server.client.get("/login"))
    answer = server.client.post("/login", data={"csrf_token": token, "key": key})
    assert (answer.status_code, "Invalid API key" in answer.text) == (403, True)
    assert key.strip() == "" or key not in answer.text
    assert server.client.get("/").status_code == 303
    assert server.client.get("/api/v1/tenants").status_code == 401


def test_a_key_pasted_with_a_space_or_a_newline_is_taken(server: Server) -> None:
    assert login(server.client, key=f" {KEYS['viewer']}\r\n").status_code == 303


def test_logins_are_counted_by_address_and_refused_with_the_right_key_too(start: StartServer) -> None:
    server = start(logins_per_minute=3)
    token = form_token(server.client.get("/login"))
    tried = [server.client.post("/login", data={"csrf_token": token, "key": f"oms_{n}"}) for n in range(3)]
    assert [answer.status_code for answer in tried] == [403] * 3
    answer = server.client.post("/login", data={"csrf_token": token, "key": KEYS["admin"]})
    assert answer.status_code == 429
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    elsewhere = server.client.post(
        "/login", data={"csrf_token": token, "key": KEYS["admin"]}, environ_base={"REMOTE_ADDR": "192.0.2.7"}
    )
    assert elsewhere.status_code == 303


# -- the session -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "secure"),
    [
        ("localhost:8080", False),
        ("127.0.0.1", False),
        ("[::1]:8080", False),
        ("oms.example", True),
        ("10.0.0.5:8080", True),
        ("localhost.evil.example", True),
    ],
)
def test_the_cookie_is_kept_from_scripts_other_sites_and_plain_lines(server: Server, host: str, secure: bool) -> None:
    base = {"base_url": f"{'https' if secure else 'http'}://{host}"}
    asked = server.client.get("/login", **base)
    entered = server.client.post("/login", data={"csrf_token": form_token(asked), "key": KEYS["viewer"]}, **base)
    for answer in (asked, entered):
        cookie = cookie_of(answer)
        assert (cookie["httponly"], cookie["samesite"], bool(cookie["secure"])) == (True, "Lax", secure)
        assert (cookie["path"], cookie["domain"]) == ("/", "")
    assert (cookie_of(asked)["expires"] == "", cookie_of(entered)["expires"] == "") == (True, False)


def test_the_cookie_holds_no_key_no_hash_and_no_name(server: Server) -> None:
    open_browser(server.client)
    inside = base64.urlsafe_b64decode(carried(server.client).partition(".")[0] + "==").decode()
    assert KEYS["admin"] not in inside
    assert not any(entry.rsplit(":", 1)[1][:16] in inside or entry.split(":")[0] in inside for entry in ENTRIES)


def test_a_login_begins_a_session_of_its_own(server: Server) -> None:
    """Whoever planted a cookie before the login holds nothing after it."""
    token = form_token(server.client.get("/login"))
    planted = carried(server.client)
    server.client.post("/login", data={"csrf_token": token, "key": KEYS["admin"]})
    assert carried(server.client) != planted
    stranger = server.app.test_client()
    stranger.set_cookie(COOKIE, planted)
    assert stranger.get("/").status_code == 303
    assert server.client.post("/logout", data={"csrf_token": token}).status_code == 400, "nor does the form of before"


def test_a_session_of_a_key_that_was_removed_is_refused(start: StartServer) -> None:
    before = start(session_secret=SIGNED)
    open_browser(before.client)
    value = carried(before.client)
    _, replaced = new_key("the-admin", Role.ADMIN)
    fewer = [entry for entry in ENTRIES if not entry.startswith("the-admin:")]
    for entries, status in ((ENTRIES, 200), (fewer, 303), ([*fewer, replaced], 303)):
        browser = start(session_secret=SIGNED, api_keys=entries).app.test_client()
        browser.set_cookie(COOKIE, value)
        assert browser.get("/").status_code == status


def test_a_key_whose_role_was_lowered_can_do_less_at_once(start: StartServer) -> None:
    open_browser(before := start(session_secret=SIGNED).client)
    lowered = [entry.replace(":admin:", ":viewer:") for entry in ENTRIES]
    browser = start(session_secret=SIGNED, api_keys=lowered).app.test_client()
    browser.set_cookie(COOKIE, carried(before))
    assert browser.get(f"/tenants/{TENANT}/switch?to=on").status_code == 403


@pytest.mark.parametrize(
    "forge",
    [
        lambda value: value[:-9] + ("A" if value[-9] != "A" else "B") + value[-8:],
        lambda value: value.partition(".")[0],
        lambda value: base64.urlsafe_b64encode(json.dumps(["w", "m", time.time()]).encode()).decode() + ".x",
        lambda _: "",
        lambda _: "." * 3000,
        lambda _: "\u00e9",
    ],
)
def test_a_forged_cookie_is_no_session(server: Server, forge: object) -> None:
    assert callable(forge)
    open_browser(server.client)
    server.client.set_cookie(COOKIE, forge(carried(server.client)))
    assert server.client.get("/").status_code == 303


def test_logging_out_ends_it(server: Server) -> None:
    open_browser(server.client)
    answer = server.client.post("/logout", data={"csrf_token": form_token(server.client.get("/"))})
    assert (answer.status_code, answer.headers["Location"]) == (303, "/login")
    assert server.client.get_cookie(COOKIE) is None
    assert server.client.get("/").status_code == 303


def test_a_session_opens_the_api_for_reading_and_a_shown_key_decides_alone(server: Server) -> None:
    open_browser(server.client)
    assert server.client.get("/api/v1/tenants").status_code == 200
    assert server.client.get("/api/v1/tenants", headers=with_key("stranger")).status_code == 401


@pytest.mark.parametrize("headers", [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}])
def test_a_page_of_another_origin_cannot_use_the_session(server: Server, headers: dict[str, str]) -> None:
    open_browser(server.client)
    body = {"enabled": True, "reason": "x"}
    assert server.client.put(f"/api/v1/tenants/{TENANT}", json=body, headers=headers).status_code == 403
    token = form_token(server.client.get("/"))
    form = {"csrf_token": token, "to": "on", "from": "OFF", "reason": "x"}
    assert server.client.post(f"/tenants/{TENANT}/switch", data=form, headers=headers).status_code == 403
    assert server.api.writes(TENANT) == 0


def test_a_session_ends_by_itself(start: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(session_seconds=60.0)
    now = time.time()
    open_browser(server.client)
    for later, status in ((59.0, 200), (61.0, 303), (-3600.0, 303)):
        monkeypatch.setattr(time, "time", lambda later=later: now + later)
        assert server.client.get("/").status_code == status


def test_logging_out_ends_every_copy_of_the_cookie(server: Server) -> None:
    open_browser(server.client)
    copy = server.app.test_client()
    copy.set_cookie(COOKIE, carried(server.client))
    assert copy.get("/").status_code == 200
    server.client.post("/logout", data={"csrf_token": form_token(server.client.get("/"))})
    copy.set_cookie(COOKIE, carried_before := copy.get_cookie(COOKIE).value)  # type: ignore[union-attr]  # set above
    assert carried_before
    assert copy.get("/").status_code == 303
    assert copy.get("/api/v1/tenants").status_code == 401


def test_logging_out_ends_the_event_streams_of_the_session(server: Server) -> None:
    open_browser(server.client)
    answer = server.client.get("/api/v1/events", buffered=False)
    chunks = answer.iter_encoded()
    assert next(chunks).startswith(b"retry")
    other = server.app.test_client()
    other.set_cookie(COOKIE, carried(server.client))
    other.post("/logout", data={"csrf_token": form_token(other.get("/"))})
    assert sum(1 for _ in chunks) < 100, "the stream has ended"
    answer.close()
    assert len(server.oms.broker) == 0


# -- forms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/logout", f"/tenants/{TENANT}/switch", f"/tenants/{TENANT}/read"])
@pytest.mark.parametrize("token", [None, "", "wrong", "of another session"])
def test_a_form_without_the_sessions_own_token_does_nothing(start: StartServer, path: str, token: str | None) -> None:
    server = start(refresh="lazy")
    open_browser(server.client)
    if token == "of another session":
        other = server.app.test_client()
        token = form_token(open_browser(other).get("/"))
    reads = server.api.reads(TENANT)
    form = {"to": "on", "from": "OFF", "reason": "x"} | ({} if token is None else {"csrf_token": token})
    answer = server.client.post(path, data=form)
    assert (answer.status_code, server.api.writes(TENANT), server.api.reads(TENANT)) == (400, 0, reads)
    assert server.client.get("/").status_code == 200, "still logged in"


def test_a_login_form_of_another_page_does_nothing(server: Server) -> None:
    answer = server.client.post("/login", data={"key": KEYS["viewer"], "csrf_token": "x"})
    assert answer.status_code == 400
    assert server.client.get("/").status_code == 303


def test_a_form_that_is_too_large_is_not_read(server: Server) -> None:
    open_browser(server.client)
    answer = server.client.post(f"/tenants/{TENANT}/switch", data={"reason": "x" * 20_000})
    assert answer.status_code == 413


def test_behind_a_proxy_logins_are_counted_by_the_address_before_it(start: StartServer) -> None:
    server = start(logins_per_minute=1, proxies=1)
    token = form_token(server.client.get("/login"))

    def tries(forwarded: str) -> int:
        data = {"csrf_token": token, "key": "oms_wrong"}
        return server.client.post("/login", data=data, headers={"X-Forwarded-For": forwarded}).status_code

    assert [tries("192.0.2.1"), tries("192.0.2.2"), tries("192.0.2.1")] == [403, 403, 429]
    assert tries("10.9.9.9, 192.0.2.1") == 429, "what the client itself wrote in front decides nothing"


def test_without_the_setting_no_header_changes_the_address(start: StartServer) -> None:
    server = start(logins_per_minute=1)
    token = form_token(server.client.get("/login"))
    data = {"csrf_token": token, "key": "oms_wrong"}
    tried = [server.client.post("/login", data=data, headers={"X-Forwarded-For": f"192.0.2.{n}"}) for n in range(2)]
    assert [answer.status_code for answer in tried] == [403, 429]


def test_failed_logins_and_logins_are_logged_without_the_key(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="external_oms.access")
    login(server.client, key="oms_wrong-one")
    login(server.client, "viewer")
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert ("WARNING", "failed login from 127.0.0.1") in lines
    assert ("INFO", "the-viewer (viewer) logged in from 127.0.0.1") in lines
    assert "oms_" not in caplog.text


# -- what signs --------------------------------------------------------------------------------------------------------


def test_all_workers_of_one_server_know_a_login_though_no_secret_was_set(
    api: ConfigAPIEmulator, tmp_path: Path
) -> None:
    with served(api, tmp_path, command=(*SERVE, "--name-members")) as server:
        with requests.Session() as browser:
            token = re.search(r'name="csrf_token" value="([^"]+)"', browser.get(f"{server.url}/login").text)
            assert token
            entered = browser.post(f"{server.url}/login", {"csrf_token": token.group(1), "key": KEYS["viewer"]})
            assert entered.status_code == 200
            cookies = dict(browser.cookies)
        members: set[str] = set()

        def all_answered() -> bool:
            answer = requests.get(f"{server.url}/", cookies=cookies, allow_redirects=False, timeout=10)
            assert answer.status_code == 200
            members.add(answer.headers["External-OMS-Member"])
            return len(members) == 2

        wait_until(all_answered)
        assert "session_secret" not in server.log.read_text(encoding="utf-8")


def test_logging_out_at_one_worker_ends_the_session_and_its_streams_at_all(
    api: ConfigAPIEmulator, tmp_path: Path
) -> None:
    with served(api, tmp_path, command=(*SERVE, "--name-members")) as server, requests.Session() as browser:
        token = re.search(r'name="csrf_token" value="([^"]+)"', browser.get(f"{server.url}/login").text)
        assert token
        page = browser.post(f"{server.url}/login", {"csrf_token": token.group(1), "key": KEYS["viewer"]})
        copied = dict(browser.cookies)
        streams: dict[str, requests.Response] = {}

        def open_streams() -> bool:
            stream = requests.get(f"{server.url}/api/v1/events", cookies=copied, stream=True, timeout=40)
            assert stream.status_code == 200
            streams.setdefault(stream.headers["External-OMS-Member"], stream)
            return len(streams) == 2

        wait_until(open_streams)
        form = re.search(r'name="csrf_token" value="([^"]+)"', page.text)
        assert form
        browser.post(f"{server.url}/logout", {"csrf_token": form.group(1)})
        for _ in range(10):  # new connections reach either worker
            refused = requests.get(f"{server.url}/api/v1/tenants", cookies=copied, timeout=10)
            assert refused.status_code == 401
        for stream in streams.values():
            assert stream.raw.read() is not None, "the stream has ended"


def test_several_processes_that_share_no_secret_refuse_logins_and_say_why(start: StartServer) -> None:
    many = {"wsgi.multiprocess": True}
    for given, status in (({}, 503), ({"session_secret": SIGNED}, 303)):
        server = start(**given)
        data = {"csrf_token": form_token(server.client.get("/login")), "key": KEYS["viewer"]}
        answer = server.client.post("/login", data=data, environ_overrides=many)
        assert (answer.status_code, "session_secret" in answer.text) == (status, status == 503)


def test_a_secret_that_is_too_short_is_refused_by_name_and_not_quoted(api: ConfigAPIEmulator) -> None:
    settings = api.settings(TENANT, api_keys=ENTRIES, webhook_secrets=[SECRET], session_secret="tiny-secret")
    with pytest.raises(SettingsError, match=r"^session_secret: is shorter than 16") as refused:
        create_app(settings)
    assert "tiny" not in str(refused.value)


def test_with_redis_and_no_secret_the_log_says_that_other_hosts_know_no_login_made_here(
    api: ConfigAPIEmulator, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"api_keys": ENTRIES, "webhook_secrets": [SECRET], "store": "redis://127.0.0.1:1/0", "refresh": "lazy"}
    for secret, said in ((None, True), (SIGNED, False)):
        caplog.clear()
        create_app(api.settings(TENANT, session_secret=secret, **given)).extensions[EXTENSION].provider.shutdown()
        assert ("session_secret is not set" in caplog.text) == said
