"""Reads and writes: the result of each response of the API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import requests
from pydantic import SecretStr

from external_oms.auth import ClientCredentials, StaticToken
from external_oms.clock import SYSTEM_CLOCK
from external_oms.config import Document, Reading
from external_oms.emulator import ConfigAPIEmulator, Fault, Malformed
from external_oms.errors import (
    MalformedAnswer,
    RateLimited,
    ReadError,
    TokenError,
    Unauthorized,
    Unavailable,
    WriteConflict,
    WriteError,
    WriteOutcomeUnknown,
)
from tests.support.hostile import Hostile, Line
from tests.support.ports import free_port
from tests.support.reaching import (
    DEADLINE,
    DOCUMENT,
    TOKEN,
    answer,
    client_at,
    nothing_left_behind,
    own_or_users,
    recording,
    script_of,
    silence,
)
from tests.support.tls import certificate


@pytest.fixture
def api() -> Iterator[ConfigAPIEmulator]:
    with ConfigAPIEmulator(("acme", "globex")) as emulator:
        yield emulator


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    with nothing_left_behind():
        yield


@pytest.fixture(params=["own", "user's"])
def session(request: pytest.FixtureRequest) -> Iterator[requests.Session | None]:
    """None, for connections of the client's own; and a session of the user's."""
    with own_or_users(request.param) as session:
        yield session


# --- what the API says -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["bare", "wrapped"])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_read_gives_what_the_api_says(shape: Literal["bare", "wrapped"], enabled: bool) -> None:
    with ConfigAPIEmulator(("acme",), shape=shape, enabled=enabled) as api:
        since = api.updated_at("acme") if shape == "wrapped" else None
        assert client_at(api).read() == Reading(Document(enabled, since), None)
        assert api.seen("acme")[-1].user_agent.startswith("external-oms/")


def test_a_validator_saves_the_document_until_it_changes() -> None:
    with ConfigAPIEmulator(("acme",), etag=True) as api:
        client = client_at(api)
        first = client.read()
        assert first.etag is not None
        assert client.read(first.etag) == Reading(None, first.etag)
        api.set_enabled("acme", True)
        changed = client.read(first.etag)
        assert changed.document is not None
        assert changed.document.enabled
        assert changed.etag not in {None, first.etag}


@pytest.mark.parametrize("etag", [b"unquoted", b'"' + b"x" * 300 + b'"', b'"a" "b"', "\u00e9".encode()])
def test_a_validator_that_is_none_is_not_kept(etag: bytes) -> None:
    with Hostile(script_of(answer(DOCUMENT, b"ETag: " + etag))) as server:
        assert client_at(server.url).read() == Reading(Document(True), None)


def test_304_to_a_read_without_a_validator_is_no_answer() -> None:
    with Hostile(script_of(b"HTTP/1.1 304 Not Modified\r\n\r\n")) as server, pytest.raises(Unavailable, match="304"):
        client_at(server.url).read()


@pytest.mark.parametrize("kind", ["html", "truncated", "string", "number", "null", "missing"])
def test_what_is_no_document_is_malformed_and_never_a_value(api: ConfigAPIEmulator, kind: Malformed) -> None:
    api.fault("acme", Fault(malformed=kind))
    with pytest.raises(MalformedAnswer):
        client_at(api).read()


@pytest.mark.parametrize("status", [b"201 Created", b"204 No Content", b"206 Partial Content"])
def test_a_success_other_than_200_is_malformed(status: bytes) -> None:
    body = b"" if status.startswith(b"204") else DOCUMENT
    with Hostile(script_of(answer(body, status=status))) as server, pytest.raises(MalformedAnswer, match="only 200"):
        client_at(server.url).read()


@pytest.mark.parametrize(
    ("fault", "error", "status", "wait"),
    [
        (Fault(status=400), Unavailable, 400, None),
        (Fault(status=404), Unavailable, 404, None),
        (Fault(status=429), RateLimited, 429, None),
        (Fault(status=429, retry_after=7), RateLimited, 429, 7.0),
        (Fault(status=429, retry_after=86_400), RateLimited, 429, 300.0),
        (Fault(status=429, retry_after="Wed, 21 Oct 2099 07:28:00 GMT"), RateLimited, 429, 300.0),
        (Fault(status=429, retry_after="soon"), RateLimited, 429, None),
        (Fault(status=500), Unavailable, 500, None),
        (Fault(status=503, retry_after=2), Unavailable, 503, 2.0),
        (Fault(status=503, retry_after=0), Unavailable, 503, 0.0),
        (Fault(redirect="http://127.0.0.1:9/"), Unavailable, 307, None),
    ],
)
def test_a_status_becomes_its_error_at_once(
    api: ConfigAPIEmulator, fault: Fault, error: type[ReadError], status: int, wait: float | None
) -> None:
    api.fault("acme", fault)
    with pytest.raises(error) as caught:
        client_at(api).read()
    assert (type(caught.value), caught.value.status, caught.value.retry_after_seconds) == (error, status, wait)


def test_a_redirect_is_not_followed_and_the_message_names_the_settings(session: requests.Session | None) -> None:
    with Hostile(script_of(answer(DOCUMENT))) as elsewhere:
        location = b"Location: " + elsewhere.url.encode()
        with Hostile(script_of(answer(b"", location, status=b"302 Found"))) as server:
            client = client_at(server.url, session=session)
            with pytest.raises(Unavailable, match=r"a redirect.*base_url and config_path"):
                client.read()
        assert elsewhere.connections == 0


UUID = "01890a5d-ac96-774b-bcce-b302099a8057"
ULID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


@pytest.mark.parametrize("request_id", [UUID, UUID.upper(), ULID, ULID.lower()])
def test_an_error_repeats_the_error_code_and_the_request_id_and_nothing_else(
    api: ConfigAPIEmulator, request_id: str
) -> None:
    problem = {
        "title": "do-not-print",
        "detail": "do-not-print",
        "message": "do-not-print",
        "error_code": "config.locked_by-other",
        "request_id": request_id,
    }
    content = answer(json.dumps(problem).encode(), status=b"500 do-not-print")
    with Hostile(script_of(content)) as server, pytest.raises(Unavailable) as caught:
        client_at(server.url).read()
    assert f"answered 500 (error_code config.locked_by-other, request_id {request_id})" in str(caught.value)
    assert "do-not-print" not in str(caught.value)


LETTERS = "qwertyuiopasdfghjklzxcvbnm"


@pytest.mark.parametrize("name", ["error_code", "request_id"])
@pytest.mark.parametrize(
    ("token", "echo"),
    [
        (TOKEN, TOKEN),
        (TOKEN, f"x-{TOKEN}"),
        (TOKEN, TOKEN[:6]),
        (TOKEN, "two words"),
        (TOKEN, "x" * 65),
        (TOKEN, "UPPER"),
        (TOKEN, "code_7"),
        (TOKEN, "a..b"),
        (TOKEN, 7),
        (TOKEN, None),
        (TOKEN, "\u212a1ARZ3NDEKTSV4RRFFQ69G5FAV"),  # the Kelvin sign, which is a k in some eyes
        (LETTERS.upper(), f"code-{LETTERS}"),
        (LETTERS, f"code-{LETTERS[5:13]}"),
        (LETTERS, ".".join(LETTERS)),
        (UUID, UUID.upper()),
        (UUID.replace("-", ""), UUID),
        (f"prefix.{ULID}.suffix", ULID.lower()),
        ("short", "short"),
    ],
)
def test_an_error_code_or_request_id_is_not_repeated_if_unsafe_or_made_of_the_token(
    name: str, token: str, echo: object
) -> None:
    body = json.dumps({name: echo}).encode()
    with Hostile(script_of(answer(body, status=b"500 No"))) as server, pytest.raises(Unavailable) as caught:
        client_at(server.url, token=StaticToken(SecretStr(token))).read()
    assert str(caught.value).endswith("answered 500")


def test_an_error_code_made_of_the_client_secret_is_not_repeated() -> None:
    def echo(line: Line) -> None:
        form = line.request()
        if b"client_secret=" in form:
            line.send(answer(b'{"access_token": "t", "expires_in": 60}'))
        else:
            line.send(answer(json.dumps({"error_code": f"code_{LETTERS}"}).encode(), status=b"500 No"))

    with Hostile(echo) as server:
        source = ClientCredentials(
            tenant="acme",
            endpoint=server.url,
            client_id="id",
            client_secret=SecretStr(LETTERS.upper()),
            scope="",
            session=None,
            clock=SYSTEM_CLOCK,
            timeout_seconds=5,
            retry_after_max_seconds=300,
        )
        with pytest.raises(Unavailable) as caught:
            client_at(server.url, token=source).read()
    assert str(caught.value).endswith("answered 500")


# --- tokens ----------------------------------------------------------------------------------------------------


def test_a_refused_token_is_replaced_once_and_the_read_tried_once_more(api: ConfigAPIEmulator) -> None:
    client = client_at(api)
    client.read()
    api.expire_tokens("acme")
    assert client.read().document is not None
    assert (api.reads("acme"), api.tokens_issued("acme")) == (3, 2)


@pytest.mark.parametrize("status", [401, 403])
def test_a_second_refusal_is_reported(api: ConfigAPIEmulator, status: int) -> None:
    api.fault("acme", Fault(status=status, times=None))
    with pytest.raises(Unauthorized, match="newstore:configuration:read") as caught:
        client_at(api).read()
    assert caught.value.status == status
    assert (api.reads("acme"), api.tokens_issued("acme")) == (2, 2)


def test_a_refused_static_token_is_not_tried_twice() -> None:
    with Hostile(script_of(answer(b"", status=b"403 Forbidden"))) as server:
        with pytest.raises(Unauthorized, match="to access_token"):
            client_at(server.url).read()
        assert server.connections == 1


def test_a_static_token_works(api: ConfigAPIEmulator) -> None:
    assert client_at(api, token=StaticToken(SecretStr(api.access_token("acme")))).read().document is not None


def test_a_token_of_another_tenant_is_refused(api: ConfigAPIEmulator) -> None:
    with pytest.raises(Unauthorized):
        client_at(api, token=StaticToken(SecretStr(api.access_token("globex")))).read()


def test_no_token_means_no_read(api: ConfigAPIEmulator) -> None:
    api.fault("acme", Fault(malformed="html", where="token"))
    with pytest.raises(TokenError):
        client_at(api).read()
    assert api.reads("acme") == 0


def test_a_netrc_never_replaces_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    seen: list[bytes] = []
    with Hostile(recording(seen)) as server:
        client_at(server.url).read()
    assert f"Authorization: Bearer {TOKEN}".encode() in seen[0]


# --- writes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_a_write_sets_the_value_by_the_configured_method(method: Literal["POST", "PUT", "PATCH"]) -> None:
    with ConfigAPIEmulator(("acme",), write_method=method) as api:
        client_at(api).write(True)
        assert api.enabled("acme")
        assert [seen.method for seen in api.seen("acme") if seen.kind == "write"] == [method]


@pytest.mark.parametrize(
    "content",
    [answer(b"", status=b"204 No Content"), answer(b"ok"), answer(DOCUMENT, length=99), answer(b" " * 70_000)],
)
def test_a_success_of_a_write_counts_whatever_its_body_is(content: bytes) -> None:
    with Hostile(script_of(content)) as server:
        client_at(server.url).write(True)
        assert server.connections == 1


@pytest.mark.parametrize(
    ("fault", "error", "applied"),
    [
        (Fault(status=400), WriteError, False),
        (Fault(status=404), WriteError, False),
        (Fault(status=409), WriteConflict, False),
        (Fault(status=429, retry_after=3), RateLimited, False),
        (Fault(status=500), WriteOutcomeUnknown, False),
        (Fault(status=503, retry_after=3), WriteOutcomeUnknown, False),
        (Fault(redirect="http://127.0.0.1:9/"), Unavailable, False),
        (Fault(status=403, times=None), Unauthorized, False),
        (Fault(dropped="headers"), WriteOutcomeUnknown, True),
        (Fault(delay_seconds=5), WriteOutcomeUnknown, True),
    ],
)
def test_a_write_that_fails_says_what_is_known(
    api: ConfigAPIEmulator, fault: Fault, error: type[Exception], applied: bool
) -> None:
    fault = Fault(**{name: getattr(fault, name) for name in fault.__slots__} | {"where": "write"})
    api.fault("acme", fault)
    with pytest.raises(error) as caught:
        client_at(api, timeout_seconds=1).write(True)
    assert type(caught.value) is error
    assert api.enabled("acme") is applied


def test_a_write_that_was_never_sent_is_unavailable(session: requests.Session | None) -> None:
    port = free_port()
    with pytest.raises(Unavailable):
        client_at(f"http://127.0.0.1:{port}", session=session).write(True)


def test_a_write_whose_answer_never_came_has_an_unknown_outcome(session: requests.Session | None) -> None:
    with Hostile(silence) as server, pytest.raises(WriteOutcomeUnknown, match="read it back"):
        client_at(server.url, session=session, timeout_seconds=DEADLINE).write(True)


def test_a_write_to_a_server_that_fails_the_handshake_was_never_sent(tmp_path: Path) -> None:
    context, _ = certificate(tmp_path)
    with Hostile(silence, context=context) as server, pytest.raises(Unavailable, match="TLS with"):
        client_at(server.url).write(True)


def test_a_write_with_an_old_token_is_tried_once_more(api: ConfigAPIEmulator) -> None:
    client = client_at(api)
    client.read()
    api.expire_tokens("acme")
    client.write(True)
    assert (api.writes("acme"), api.enabled("acme")) == (2, True)
