"""Tokens: obtained once, renewed early, shared by the callers that wait, never by tenants, and never printed."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import requires
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from external_oms.auth import ClientCredentials, StaticToken, renewal_margin_seconds
from external_oms.clock import SYSTEM_CLOCK, Clock
from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.errors import RateLimited, ReadError, TokenError, Unavailable
from tests.support.clock import FakeClock
from tests.support.hostile import Hostile, Line
from tests.support.waiting import PATIENCE_SECONDS, wait_until

SECRET = "cl1ent-secret-do-not-print"


@pytest.fixture
def api() -> Iterator[ConfigAPIEmulator]:
    with ConfigAPIEmulator(("acme", "globex"), expires_in=300) as emulator:
        yield emulator


def _of(
    api: ConfigAPIEmulator | str,
    clock: Clock,
    *,
    tenant: str = "acme",
    timeout_seconds: float = 5,
    scope: str = "",
    on_renewal: Callable[[ReadError | None], None] = lambda _: None,
) -> ClientCredentials:
    """The source of a tenant's tokens at the emulator, or at an address."""
    endpoint, client_id, secret = str(api), "acme-client", SecretStr(SECRET)
    if isinstance(api, ConfigAPIEmulator):
        settings = api.tenant_settings(tenant)
        assert settings.client_id is not None
        assert settings.client_secret is not None
        endpoint, client_id, secret = settings.token_endpoint(tenant), settings.client_id, settings.client_secret
    return ClientCredentials(
        tenant=tenant,
        endpoint=endpoint,
        client_id=client_id,
        client_secret=secret,
        scope=scope,
        session=None,
        clock=clock,
        timeout_seconds=timeout_seconds,
        retry_after_max_seconds=300,
        on_renewal=on_renewal,
    )


def _answering(body: object, status: str = "200 OK", seen: list[bytes] | None = None) -> Callable[[Line], None]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()

    def script(line: Line) -> None:
        asked = line.request()
        if seen is not None:
            seen.append(asked)
        line.send(f"HTTP/1.1 {status}\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)

    return script


# --- one token and its life --------------------------------------------------------------------------------------


def test_a_token_is_obtained_once_and_used_until_shortly_before_its_end(
    api: ConfigAPIEmulator, clock: FakeClock
) -> None:
    source = _of(api, clock)
    first = source.token()
    clock.advance(269.9)  # of 300 s: the margin is a tenth
    assert source.token() == first
    clock.advance(0.2)
    assert source.token() != first
    assert api.tokens_issued("acme") == 2


def test_every_attempt_to_obtain_a_token_is_reported_once_with_its_error(
    api: ConfigAPIEmulator, clock: FakeClock
) -> None:
    told: list[ReadError | None] = []
    source = _of(api, clock, on_renewal=told.append)
    api.fault("acme", Fault(status=500, where="token"))
    with pytest.raises(Unavailable):
        source.token()
    source.token()
    source.token()
    assert [type(error) for error in told] == [Unavailable, type(None)]


@pytest.mark.parametrize(("life", "margin"), [(1, 0.5), (8, 4), (20, 5), (50, 5), (100, 10), (600, 60), (86_400, 60)])
def test_the_margin_is_a_tenth_between_5_and_60_seconds(life: float, margin: float) -> None:
    assert renewal_margin_seconds(life) == margin


@given(life=st.floats(min_value=1e-3, max_value=1e12))
def test_a_margin_leaves_at_least_half_of_the_life(life: float) -> None:
    assert 0 < renewal_margin_seconds(life) <= min(60, life / 2)


def test_a_token_without_a_life_lives_five_minutes(clock: FakeClock) -> None:
    with ConfigAPIEmulator(("acme",), expires_in=None) as api:
        source = _of(api, clock)
        first = source.token()
        clock.advance(269)
        assert source.token() == first
        clock.advance(2)
        assert source.token() != first


def test_a_life_is_counted_from_the_start_of_the_request(clock: FakeClock) -> None:
    def slow(line: Line) -> None:
        clock.advance(100)
        _answering({"access_token": "t", "expires_in": 101})(line)

    with Hostile(slow) as server:
        source = _of(server.url, clock, timeout_seconds=1000)
        assert source.token() == "t"
        clock.advance(1.1)
        assert source.token() == "t"  # obtained anew
        assert server.connections == 2


@pytest.mark.parametrize("life", [0, -1, -(10**400), True, "300", "soon", [], {}, 1e999, float("nan")])
def test_an_absurd_life_is_a_token_error(clock: FakeClock, life: object) -> None:
    with Hostile(_answering({"access_token": "t", "expires_in": life})) as server, pytest.raises(TokenError):
        _of(server.url, clock).token()


@pytest.mark.parametrize("life", [10**400, 2**63, 1e300])
def test_a_token_that_claims_to_live_for_ever_is_used(clock: FakeClock, life: float) -> None:
    with Hostile(_answering({"access_token": "t", "expires_in": life})) as server:
        source = _of(server.url, clock)
        assert source.token() == "t"
        clock.advance(86_400)
        assert source.token() == "t"
        assert server.connections == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>do-not-print",
        b"[]",
        b"[" * 50_000,
        {},
        {"access_token": ""},
        {"access_token": None},
        {"access_token": 7},
        {"access_token": "two words"},
        {"access_token": "new\r\nline: 1"},
        {"access_token": "é"},
        {"access_token": "t" * 20_000},
        {"access_token": "t", "token_type": "mac"},
        {"access_token": "t", "token_type": 1},
        {"access_token": "t" * 70_000},
    ],
)
def test_a_response_without_a_usable_token_is_a_token_error(clock: FakeClock, body: object) -> None:
    with Hostile(_answering(body)) as server, pytest.raises(TokenError) as caught:
        _of(server.url, clock).token()
    assert "do-not-print" not in str(caught.value)
    assert "token endpoint of tenant 'acme'" in str(caught.value)


# --- the request -----------------------------------------------------------------------------------------------


def test_the_request_is_the_form_of_the_grant_and_no_refresh_token_is_used(clock: FakeClock) -> None:
    seen: list[bytes] = []
    answer = {"access_token": "t", "expires_in": 1, "refresh_token": "r"}
    with Hostile(_answering(answer, seen=seen)) as server:
        source = _of(server.url, clock, scope="newstore:configuration:read more")
        source.token()
        clock.advance(10)
        source.token()
    assert len(seen) == 2
    for request in seen:
        head, _, form = request.decode().partition("\r\n\r\n")
        assert head.startswith("POST / HTTP/1.1")
        assert SECRET not in head
        assert f"Content-Length: {len(form)}" in head
        assert sorted(form.split("&")) == [
            "client_id=acme-client",
            f"client_secret={SECRET}",
            "grant_type=client_credentials",
            "scope=newstore%3Aconfiguration%3Aread+more",
        ]


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ("invalid_client", "check client_id and client_secret"),
        ("unauthorized_client", "check client_id and the client's grants"),
        ("invalid_scope", "check scope"),
        ("invalid_request", "check token_url"),
        ("do-not-print", "check token_url, client_id and client_secret"),
        ({"do-not-print": 1}, "check token_url, client_id and client_secret"),
    ],
)
@pytest.mark.parametrize("status", ["400 Bad Request", "401 Unauthorized", "200 OK"])
def test_a_refusal_says_which_settings_to_check_and_nothing_the_server_said(
    clock: FakeClock, error: object, advice: str, status: str
) -> None:
    body = {"error": error, "error_description": f"do-not-print {SECRET}"}
    with Hostile(_answering(body, status)) as server, pytest.raises(TokenError, match=advice) as caught:
        _of(server.url, clock).token()
    told = "".join(traceback.format_exception(caught.value))
    assert "do-not-print" not in told
    assert SECRET not in told
    assert caught.value.status == int(status[:3])


@pytest.mark.parametrize(
    ("fault", "error", "status", "wait"),
    [
        (Fault(status=429, retry_after=4, where="token"), RateLimited, 429, 4.0),
        (Fault(status=429, where="token"), RateLimited, 429, None),
        (Fault(status=503, retry_after=9_999, where="token"), Unavailable, 503, 300.0),
        (Fault(status=500, where="token"), Unavailable, 500, None),
        (Fault(redirect="http://127.0.0.1:9/", where="token"), Unavailable, 307, None),
        (Fault(status=404, where="token"), TokenError, 404, None),
        (Fault(status=503, retry_after=0, where="token"), Unavailable, 503, 0.0),
        (Fault(dropped="headers", where="token"), Unavailable, None, None),
        (Fault(dropped="body", where="token"), Unavailable, None, None),
    ],
)
def test_each_failure_of_the_endpoint_has_its_name(
    api: ConfigAPIEmulator,
    clock: FakeClock,
    fault: Fault,
    error: type[ReadError],
    status: int | None,
    wait: float | None,
) -> None:
    api.fault("acme", fault)
    with pytest.raises(error) as caught:
        _of(api, clock).token()
    assert type(caught.value) is error
    assert (caught.value.status, caught.value.retry_after_seconds) == (status, wait)


def test_a_wrong_secret_is_refused_by_the_emulator_too(api: ConfigAPIEmulator, clock: FakeClock) -> None:
    with pytest.raises(TokenError, match="check client_id and client_secret"):
        _of(api.tenant_settings("acme").token_endpoint("acme"), clock).token()


def test_a_retry_after_of_the_endpoint_is_obeyed_without_asking_again(api: ConfigAPIEmulator, clock: FakeClock) -> None:
    api.fault("acme", Fault(status=429, retry_after=10, where="token"))
    source = _of(api, clock)
    with pytest.raises(RateLimited):
        source.token()
    clock.advance(4)
    with pytest.raises(RateLimited) as caught:
        source.token()
    assert caught.value.retry_after_seconds == 6
    assert len(api.seen("acme")) == 1
    clock.advance(6)
    assert source.token()


def test_no_secret_is_in_any_repr(clock: FakeClock) -> None:
    with Hostile(_answering({"access_token": "t0ken", "expires_in": 60})) as server:
        source = _of(server.url, clock)
        source.token()
    static = StaticToken(SecretStr(SECRET))
    shown = repr(source) + repr(static) + repr(vars(source)) + repr(vars(static)) + repr(source._cached)
    assert SECRET not in shown
    assert "t0ken" not in shown


# --- renewing ----------------------------------------------------------------------------------------------------


def test_where_a_renewal_fails_the_old_token_is_used_while_it_is_valid(
    api: ConfigAPIEmulator, clock: FakeClock
) -> None:
    source = _of(api, clock)
    first = source.token()
    api.fault("acme", Fault(status=500, where="token", times=None))
    clock.advance(280)
    assert source.token() == first
    assert source.token() == first
    assert len(api.seen("acme")) == 2  # and the endpoint is not asked at every call
    clock.advance(5)
    assert source.token() == first
    assert len(api.seen("acme")) == 3
    clock.advance(15)
    with pytest.raises(Unavailable):
        source.token()


@pytest.mark.serial
def test_a_renewal_that_hangs_leaves_half_of_the_deadline_to_the_read() -> None:
    with ConfigAPIEmulator(("acme",), expires_in=3) as api:
        source = _of(api, SYSTEM_CLOCK, timeout_seconds=1)
        first = source.token()
        assert source._cached is not None
        wait_until(lambda: source._cached is None or source._cached.renew_at <= SYSTEM_CLOCK.monotonic())
        api.fault("acme", Fault(delay_seconds=30, where="token"))
        began = time.monotonic()
        assert source.token() == first
        assert 0.4 < time.monotonic() - began < 5 * 0.5  # promised is half of the timeout


def test_a_caller_with_a_valid_token_does_not_wait_for_its_renewal(api: ConfigAPIEmulator, clock: FakeClock) -> None:
    source = _of(api, clock)
    first = source.token()
    clock.advance(280)
    api.fault("acme", Fault(delay_seconds=30, where="token"))
    with ThreadPoolExecutor(1) as pool:
        renewing = pool.submit(source.token)
        wait_until(lambda: len(api.seen("acme")) == 2)
        assert source.token() == first
        assert not renewing.done()
        source.abort()
        assert renewing.result(PATIENCE_SECONDS) == first


@pytest.mark.parametrize("status", [None, 500])
def test_one_request_serves_all_callers_that_wait_or_fails_them_all(api: ConfigAPIEmulator, status: int | None) -> None:
    source = _of(api, SYSTEM_CLOCK, timeout_seconds=30)
    api.fault("acme", Fault(delay_seconds=60, where="token", status=status))
    asked: list[None] = []
    lock = source._renewing

    class Counted:
        """The lock of the renewal, which counts who asks for it."""

        def acquire(self, *given: float, **named: float) -> bool:
            asked.append(None)
            return lock.acquire(*given, **named)  # type: ignore[arg-type]  # passed on as they are

        def release(self) -> None:
            lock.release()

    source._renewing = Counted()  # type: ignore[assignment]  # what is used of a lock

    def ask() -> str | ReadError:
        try:
            return source.token()
        except Unavailable as error:
            return error

    with ThreadPoolExecutor(30) as pool:
        asking = [pool.submit(ask) for _ in range(30)]
        wait_until(lambda: len(asked) >= 30 and api.seen("acme"))  # one asks, and all others wait
        api.stop()  # lets go what is held back
        told = [future.result(PATIENCE_SECONDS) for future in asking]
    assert len(api.seen("acme")) == 1
    assert len({str(outcome) for outcome in told}) == 1
    if status is not None:
        assert all(isinstance(outcome, Unavailable) and outcome.status == status for outcome in told)
        assert len({id(outcome) for outcome in told}) == 30  # each raises an exception of its own


def test_a_caller_waits_for_another_ones_request_until_its_own_deadline(api: ConfigAPIEmulator) -> None:
    source = _of(api, SYSTEM_CLOCK, timeout_seconds=30)
    api.fault("acme", Fault(delay_seconds=30, where="token"))
    with ThreadPoolExecutor(1) as pool:
        renewing = pool.submit(source.token)
        wait_until(lambda: api.seen("acme"))
        with pytest.raises(Unavailable, match="another caller's request"):
            source.token(deadline=SYSTEM_CLOCK.monotonic() + 0.1)
        source.abort()
        with pytest.raises(Unavailable, match="aborted"):
            renewing.result(PATIENCE_SECONDS)
    assert source.token()


def test_after_an_interruption_the_next_caller_asks_again(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _of("http://127.0.0.1:9", clock)

    def interrupted(_: float) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(source, "_obtain", interrupted)
        with pytest.raises(KeyboardInterrupt):
            source.token()
    with pytest.raises(Unavailable, match="no connection"):
        source.token()


def test_a_failure_is_not_shared_with_a_caller_that_comes_after_it(api: ConfigAPIEmulator, clock: FakeClock) -> None:
    source = _of(api, clock)
    api.fault("acme", Fault(status=500, where="token"))
    with pytest.raises(Unavailable):
        source.token()
    assert source.token()


def test_a_stored_failure_keeps_no_traceback_with_the_secret_in_its_frames(
    api: ConfigAPIEmulator, clock: FakeClock
) -> None:
    source = _of(api, clock)
    api.fault("acme", Fault(status=500, where="token"))
    with pytest.raises(Unavailable):
        source.token()
    assert source._failure is not None
    assert source._failure.__traceback__ is None


# --- dropping ----------------------------------------------------------------------------------------------------


def test_only_the_token_that_was_used_is_dropped(api: ConfigAPIEmulator, clock: FakeClock) -> None:
    source = _of(api, clock)
    first = source.token()
    source.drop(first)
    second = source.token()
    assert second != first
    source.drop(first)  # late: another caller has long renewed
    assert source.token() == second
    assert api.tokens_issued("acme") == 2


def test_a_static_token_stays(clock: FakeClock) -> None:
    source = StaticToken(SecretStr("t"))
    source.drop("t")
    source.abort()
    source.after_fork()
    assert source.token() == "t"
    assert not source.renews


def test_two_tenants_never_share_a_token_though_all_their_settings_are_the_same(clock: FakeClock) -> None:
    def number(line: Line) -> None:
        _answering({"access_token": f"t{server.connections}"})(line)

    with Hostile(number) as server:
        one = _of(server.url, clock, tenant="acme")
        two = _of(server.url, clock, tenant="globex")
        assert (one.token(), two.token()) == ("t1", "t2")
        assert (one.token(), two.token()) == ("t1", "t2")
        one.drop("t2")
        two.drop("t1")
        assert (one.token(), two.token()) == ("t1", "t2")


# --- a fork ------------------------------------------------------------------------------------------------------


def test_a_child_keeps_a_valid_token_though_the_parent_was_renewing(api: ConfigAPIEmulator, clock: FakeClock) -> None:
    source = _of(api, clock)
    first = source.token()
    clock.advance(280)
    api.fault("acme", Fault(delay_seconds=30, where="token"))
    with ThreadPoolExecutor(1) as pool:
        renewing = pool.submit(source.token)
        wait_until(lambda: len(api.seen("acme")) == 2)
        assert source._renewing.locked()  # the worst moment
        child = os.fork()
        if child == 0:
            source.after_fork()
            kept = source._cached is not None and source._cached.text == first
            renewed = source.token()
            os._exit(0 if kept and renewed != first else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        source.abort()
        assert renewing.result(PATIENCE_SECONDS) == first


def test_no_oauth_library_is_needed() -> None:
    needed = [
        requirement for requirement in requires("openfeature-provider-external-oms") or () if ";" not in requirement
    ]
    assert not [name for name in needed if "auth" in name.lower() or "cryptography" in name.lower()]
