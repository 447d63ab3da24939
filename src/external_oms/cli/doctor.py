"""`doctor`: checks settings, tokens, reads, stored values, the clock, the store and the server, with advice."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Literal, NamedTuple

import click

from external_oms.cli.base import ExitCode, json_option, load_settings
from external_oms.cli.output import Cell, duration, print_json, print_line, print_table
from external_oms.client import READ_SCOPE, WRITE_SCOPE
from external_oms.clock import SYSTEM_CLOCK, Clock
from external_oms.config import format_instant
from external_oms.entry import Change
from external_oms.errors import ExternalOMSError, ReadError, SettingsError, StoreError
from external_oms.policy import Freshness
from external_oms.settings import ENV_PREFIX, Settings
from external_oms.stores.memory import MemoryStore
from external_oms.transport import Transport
from external_oms.web.app import check_credentials
from external_oms.wiring import Service, build_service, token_source

__all__ = ["Finding", "claims_of", "describe_settings", "doctor", "examine"]

CLOCK_TOLERANCE_SECONDS = 30.0  # a tenth of that for the timestamps of deliveries; a Date header has whole seconds
MAX_EXP = 1e12  # the greatest `exp` of a token that is used, in the year 33658: an integer of 400 digits is no float

_ADVICE = {
    "token": "check client_id, client_secret, scope and token_url against the tenant's API client",
    "unauthorized": f"use a token or an API client of this tenant, with the scope {READ_SCOPE}",
    "rate_limited": "wait, and find out who else reads with these credentials",
    "unavailable": "check base_url and config_path, and that this host may reach it (proxy, firewall, CA bundle)",
    "malformed": "check config_path: another resource, or a sign-in page, answers there",
}

_COUNTED = {"webhook_secrets", "webhook_api_keys", "api_keys"}  # secrets and hashes: only their number is shown


class Finding(NamedTuple):
    """The result of one check; contains no secret. `note`: it works, and there is something to know."""

    check: str
    verdict: Literal["ok", "note", "fail"]
    message: str
    advice: str = ""


_VARIANTS = {None: "no value", True: "on", False: "off"}
_COLORS = {"ok": "green", "note": "yellow", "fail": "red"}


@click.command(short_help="Check settings, token, read, stored value, clock and store.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check every setting, the token and its scopes, the read, the stored value, the clock and the store.

    Prints a line for each check, with advice where one fails. Exits with 1 if a check fails, and with 2 if the settings
    are refused.
    """
    rows: list[tuple[str, str, str]] = []
    findings: list[Finding] = []

    def report(finding: Finding) -> None:
        findings.append(finding)
        if not as_json:
            verdict = finding.verdict.upper() if finding.verdict == "fail" else finding.verdict
            advice = [Cell(f"— {finding.advice}", bold=True)] if finding.advice else []
            check = Cell(f"{finding.check:<8}", bold=True)
            print_line(Cell(f"{verdict:<4}", _COLORS[finding.verdict]), check, finding.message, *advice)

    try:
        settings = load_settings()
    except SettingsError as error:
        report(Finding("settings", "fail", str(error)))
        code = ExitCode.REFUSED
    else:
        rows = list(describe_settings(settings, Settings().model_fields_set, os.environ))
        if not as_json:
            print_table(("SETTING", "VALUE", "FROM"), rows)
            click.echo()
        for finding in examine(settings, clock=SYSTEM_CLOCK):
            report(finding)
        code = ExitCode.FAILED if any(finding.verdict == "fail" for finding in findings) else ExitCode.DONE
    if as_json:
        described = {name: {"value": value, "from": origin} for name, value, origin in rows}
        checks = [finding._asdict() for finding in findings]
        print_json({"ok": code == ExitCode.DONE, "checks": checks, "settings": described})
    ctx.exit(code)


def describe_settings(
    settings: Settings, given: Collection[str], environ: Mapping[str, str]
) -> Iterator[tuple[str, str, str]]:
    """Yield the name of every setting, its value without secrets, and where it comes from.

    Args:
        settings: The settings.
        given: The names of those that the file or the environment has; a command sets others, such as `store`.
        environ: The environment.
    """
    variables = {name.lower() for name in environ}
    for name in type(settings).model_fields:
        origin = "file" if name in given else "default"
        if f"{ENV_PREFIX}{name}".lower() in variables:
            origin = "environment"
        yield name, _describe(name, getattr(settings, name)), origin


def _describe(name: str, value: object) -> str:
    if value is None or value in ((), {}, ""):
        return "not set"
    if hasattr(value, "get_secret_value"):
        return "set"
    if name in _COUNTED and isinstance(value, tuple):
        return f"{len(value)} {'entry' if len(value) == 1 else 'entries'}"
    if isinstance(value, tuple | dict):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.0f}" if isinstance(value, float) and value.is_integer() else str(value)  # a store URL is masked


def examine(settings: Settings, *, clock: Clock) -> Iterator[Finding]:
    """Check everything that the settings lead to, and yield each finding as soon as it is made."""
    settings, problem = settings.replaced(refresh="lazy"), ""
    try:
        service = build_service(settings, clock=clock)
    except (ExternalOMSError, OSError) as error:
        problem = str(error)
        service = build_service(settings, clock=clock, store=MemoryStore(clock=clock))
    several = len(service.clients) > 1
    try:
        store = Finding("store", "fail", problem, "check the setting store") if problem else _check_store(service)
        yield store
        for tenant in service.clients:
            for finding in _check_tenant(tenant, service, compare=store.verdict == "ok"):
                yield finding._replace(check=f"{finding.check} of {tenant}") if several else finding
        yield _check_clock(settings, clock)
        yield _check_server(settings)
    finally:
        service.close()


def _check_tenant(tenant: str, service: Service, *, compare: bool) -> Iterator[Finding]:
    clock, reached = service.clock, service.settings.by_tenant()[tenant]
    source = token_source(tenant, reached, service.settings, None, clock)
    began = clock.monotonic()
    try:
        token = source.token()
    except ReadError as error:
        yield _failed("token", error)
        yield Finding("read", "fail", "not tried without a token", "fix the token first")
        return
    how = f"obtained in {duration(clock.monotonic() - began)}" if source.renews else "configured as access_token"
    yield from _check_token(how, claims_of(token), now_wall=clock.wall())
    began = clock.monotonic()
    try:
        document = service.clients[tenant].read().document
    except ReadError as error:
        yield _failed("read", error)
        return
    enabled = None if document is None else document.enabled
    changed = f", changed upstream {format_instant(document.updated_at)}" if document and document.updated_at else ""
    took = f"in {duration(clock.monotonic() - began)}{changed}, from {reached.config_url(tenant)}"
    yield Finding("read", "ok", f"{_VARIANTS[enabled]}, {took}")
    if compare:
        yield _compare(tenant, enabled, service)


def _failed(check: str, error: ReadError) -> Finding:
    advice = "" if "; check base_url" in str(error) else _ADVICE.get(error.kind, "")
    return Finding(check, "fail", str(error), advice)


def claims_of(token: str) -> Mapping[str, object] | None:
    """Return the claims of a JSON Web Token, *not verified*; None for an opaque token.

    Source: RFC 7519 §3, RFC 7515 §7.1: three parts in base64url, the second is a JSON object.
    """
    parts = token.split(".")
    if len(parts) != 3:  # noqa: PLR2004 - header, claims, signature
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, RecursionError):
        return None
    return claims if isinstance(claims, dict) else None


def _check_token(how: str, claims: Mapping[str, object] | None, *, now_wall: float) -> Iterator[Finding]:
    """Check the expiry and the scopes that a token claims."""
    if claims is None:
        yield Finding("token", "ok", how)
        yield Finding("scopes", "ok", "unknown, since the token is opaque")
        return
    expires, told = claims.get("exp"), claims.get("scope", claims.get("scp"))
    if isinstance(expires, bool) or not isinstance(expires, int | float) or not abs(expires) < MAX_EXP:
        yield Finding("token", "ok", how)
    elif expires > now_wall:
        yield Finding("token", "ok", f"{how}; expires in {expires - now_wall:.0f} s")
    else:
        advice = "configure a new one, or client_id and client_secret; if it is new, check the clock of this host"
        yield Finding("token", "fail", f"{how}; expired {now_wall - expires:.0f} s ago", advice)
    scopes = told.split() if isinstance(told, str) else [str(scope) for scope in told] if isinstance(told, list) else []
    needed = ((READ_SCOPE, "a read"), (WRITE_SCOPE, "enable or disable"))
    advice = next(
        (f"if {use} is refused, give the API client {scope}" for scope, use in needed if scope not in scopes), ""
    )
    message = f"{' '.join(sorted(scopes))} (claimed by the token, not verified)"
    if not scopes:
        message, advice = "the token names none", ""
    yield Finding("scopes", "note" if advice else "ok", message, advice)


def _compare(tenant: str, enabled: bool | None, service: Service) -> Finding:
    """Compare the value that the API answered with the one that the processes of this store serve."""
    with suppress(StoreError):  # then the value is the one that this process knows
        service.store.transact(tenant, lambda entry, _: Change(entry, None))  # a replica knows what others wrote later
    state = service.cache.state(tenant)
    if state.enabled is None or enabled is None:
        return Finding("value", "ok", f"the store has {_VARIANTS[state.enabled]}, the API {_VARIANTS[enabled]}")
    fresh = state.freshness is Freshness.FRESH
    left = f" for another {duration(state.fresh_seconds)}" if fresh else ""
    stored = f"the store has {_VARIANTS[state.enabled]} ({state.freshness}{left}, generation {state.generation})"
    if state.enabled is enabled:
        return Finding("value", "ok", f"{stored}, as the API")
    advice = "no delivery has arrived since the change; `external-oms webhook send` sends one"
    return Finding("value", "fail" if fresh else "note", f"{stored}, but the API answers {_VARIANTS[enabled]}", advice)


def _check_clock(settings: Settings, clock: Clock) -> Finding:
    """Compare the clock of this host with the Date of a response of the API, whatever its status."""
    tenant, reached = next(iter(settings.by_tenant().items()))
    transport = Transport(None, subject="the config API", url_setting="base_url", clock=clock)
    began = clock.wall()
    try:
        with transport.deadline(clock.monotonic() + settings.timeout_seconds) as deadline:
            response = transport.send(deadline, "HEAD", reached.config_url(tenant), headers={})
    except ReadError as error:
        return Finding("clock", "note", f"cannot be compared: {error}")
    ended = clock.wall()
    try:
        theirs = parsedate_to_datetime(response.headers.get("Date", "")).timestamp() + 0.5  # the middle of its second
    except (ValueError, TypeError, OverflowError):
        return Finding("clock", "note", "cannot be compared: the responses of the config API have no date")
    ahead = (began + ended) / 2 - theirs
    message = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the config API's"
    if abs(ahead) <= CLOCK_TOLERANCE_SECONDS:
        return Finding("clock", "ok", message)
    advice = "set it by NTP; otherwise deliveries are refused for their timestamps, and tokens seem to be expired"
    return Finding("clock", "fail", message, advice)


def _check_store(service: Service) -> Finding:
    url = str(service.settings.store)  # without its password
    try:
        service.store.history(limit=1)  # reads from where the entries are, and changes nothing
        health = service.store.health()
    except StoreError as error:
        return Finding("store", "fail", f"{url}: {error}")
    if not health.ok:
        return Finding("store", "fail", f"{url}: {health.problem}")
    if service.store.kind == "memory":
        advice = "for several processes use sqlite:////path/state.db, for several hosts redis://host:6379/0"
        return Finding("store", "note", f"{url}: an invalidation reaches one process only", advice)
    return Finding("store", "ok", url)


def _check_server(settings: Settings) -> Finding:
    try:
        check_credentials(settings)
    except SettingsError as error:
        return Finding("server", "note", f"`external-oms serve` would refuse to start: {error}")
    return Finding("server", "ok", "all routes have credentials")
