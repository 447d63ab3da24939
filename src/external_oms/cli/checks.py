"""What can be wrong with a set-up, looked at piece by piece; no printing here; each trouble comes with its cure."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import StrEnum

from external_oms.auth import TokenSource
from external_oms.client import READ_SCOPE, WRITE_SCOPE, ConfigClient
from external_oms.clock import Clock
from external_oms.config import format_instant
from external_oms.errors import ExternalOMSError, ReadError, SettingsError, StoreError
from external_oms.settings import ENV_PREFIX, Settings, TenantSettings
from external_oms.store_url import mask_passwords
from external_oms.stores.base import Health
from external_oms.transport import Transport
from external_oms.web.app import check_credentials
from external_oms.wiring import make_store, token_source

__all__ = ["Finding", "Verdict", "claims_of", "examine", "origins"]

CLOCK_TOLERANCE_SECONDS = 30.0
"""A tenth of what a delivery's timestamp may be off; a Date header itself is cut to whole seconds."""

_ADVICE = {
    "token": "check client_id, client_secret, scope and token_url against the tenant's API client",
    "unauthorized": f"use a token or an API client of this very tenant, with the scope {READ_SCOPE}",
    "rate_limited": "wait, and see who else reads with these credentials",
    "unavailable": "check base_url and config_path, and that this host may reach it (proxy, firewall, CA bundle)",
    "malformed": "check config_path: another resource, or a sign-in page, answers there",
}


MAX_EXP = 1e12
"""The latest `exp` of a token that is believed, in the year 33658: an integer of 400 digits is no float."""

_COUNTED = frozenset({"webhook_secrets", "webhook_api_keys", "api_keys"})
"""Lists of secrets, or of what recognises them: their number is all that is told."""


class Verdict(StrEnum):
    """What a finding means."""

    OK = "ok"
    """As it should be."""
    NOTE = "note"
    """Works, and somebody should know."""
    FAIL = "FAIL"
    """Does not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the examination.

    Attributes:
        subject: What was looked at.
        verdict: What it means.
        said: What was found, without any secret.
        advice: What to do about it; empty where it is well.
    """

    subject: str
    verdict: Verdict
    said: str
    advice: str = ""


def origins(settings: Settings, environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Every setting: its name, its value with no secret in it, and where it comes from.

    Args:
        settings: The settings.
        environ: The environment that they were gathered from.
    """
    named = {name.lower() for name in environ}
    for name in type(settings).model_fields:
        if f"{ENV_PREFIX}{name}".lower() in named:
            origin = "environment"
        else:
            origin = "file" if name in settings.model_fields_set else "default"
        yield name, _shown(name, getattr(settings, name)), origin


def _shown(name: str, value: object) -> str:
    if value is None or value in ((), {}, ""):
        return "not set"
    return "set" if hasattr(value, "get_secret_value") else _open(name, value)


def _open(name: str, value: object) -> str:
    if name in _COUNTED and isinstance(value, tuple):
        return f"{len(value)} {'entry' if len(value) == 1 else 'entries'}"
    if isinstance(value, tuple | dict):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else str(value)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)  # a store's URL shows no password


def examine(settings: Settings, *, clock: Clock) -> Iterator[Finding]:
    """Look at everything that the settings lead to, one finding after the other, each as soon as it is made.

    Args:
        settings: The settings, with the store that the command uses.
        clock: What tells the time.
    """
    several = len(settings.by_tenant()) > 1
    for name, reached in settings.by_tenant().items():
        where = f" of {name}" if several else ""
        yield from _tenant_findings(name, reached, settings, clock, where)
    yield _clock_finding(settings, clock)
    yield _store_finding(settings, clock)
    yield _server_finding(settings)


def _tenant_findings(
    tenant: str, reached: TenantSettings, settings: Settings, clock: Clock, where: str
) -> Iterator[Finding]:
    source = token_source(tenant, reached, settings, None, clock)
    subject = f"token{where}"
    began = clock.monotonic()
    try:
        token = source.token()
    except ReadError as error:
        yield _failed(subject, error)
        yield Finding(f"read{where}", Verdict.FAIL, "not tried, for want of a token", "mend the token first")
        return
    took = clock.monotonic() - began
    how = f"obtained in {_milliseconds(took)}" if source.renews else "configured as access_token"
    claims = claims_of(token)
    yield _token_finding(subject, how, claims, now_wall=clock.wall())
    yield _scope_finding(f"scopes{where}", claims)
    yield _read_finding(f"read{where}", tenant, reached, settings, source, clock)


def claims_of(token: str) -> Mapping[str, object] | None:
    """The claims in a JSON Web Token, *not verified*; None where it is none, as an opaque token is.

    Source: RFC 7519 §3, RFC 7515 §7.1: three parts in base64url, the second is a JSON object.
    """
    parts = token.split(".")
    if len(parts) != 3:  # noqa: PLR2004 - header, claims, signature
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        return None
    return claims if isinstance(claims, dict) else None


def _token_finding(subject: str, how: str, claims: Mapping[str, object] | None, *, now_wall: float) -> Finding:
    ends = claims.get("exp") if claims else None
    if isinstance(ends, bool) or not isinstance(ends, int | float) or not abs(ends) < MAX_EXP:
        return Finding(subject, Verdict.OK, how)
    left = ends - now_wall
    if left > 0:
        return Finding(subject, Verdict.OK, f"{how}; it says that it ends in {left:.0f} s")
    advice = "put a new one in its place, or use client_id and client_secret; if it is new, look at the clock"
    return Finding(subject, Verdict.FAIL, f"{how}; it says that it ended {-left:.0f} s ago", advice)


def _scope_finding(subject: str, claims: Mapping[str, object] | None) -> Finding:
    if claims is None:
        return Finding(subject, Verdict.OK, "not to be seen: the token is opaque")
    told = claims.get("scope", claims.get("scp"))
    scopes = told.split() if isinstance(told, str) else [str(scope) for scope in told] if isinstance(told, list) else []
    if not scopes:
        return Finding(subject, Verdict.OK, "the token names none")
    said = f"{' '.join(sorted(scopes))} (as the token says, unverified)"
    for scope, needed in ((READ_SCOPE, "a read"), (WRITE_SCOPE, "enable and disable")):
        if scope not in scopes:
            advice = f"give the API client the scope {scope}, should {needed} be refused"
            return Finding(subject, Verdict.NOTE, said, advice)
    return Finding(subject, Verdict.OK, said)


def _read_finding(
    subject: str, tenant: str, reached: TenantSettings, settings: Settings, source: TokenSource, clock: Clock
) -> Finding:
    client = ConfigClient(
        tenant=tenant,
        settings=reached,
        token=source,
        session=None,
        clock=clock,
        timeout_seconds=settings.timeout_seconds,
        retry_after_max_seconds=settings.retry_after_max_seconds,
    )
    began = clock.monotonic()
    try:
        document = client.read().document
    except ReadError as error:
        return _failed(subject, error)
    took = _milliseconds(clock.monotonic() - began)
    value = "unknown" if document is None else "on" if document.enabled else "off"
    since = document.updated_at if document else None
    changed = f", changed upstream {format_instant(since)}" if since else ""
    return Finding(subject, Verdict.OK, f"{value}, in {took}{changed}, from {reached.config_url(tenant)}")


def _clock_finding(settings: Settings, clock: Clock) -> Finding:
    """This host's clock against the Date that the API's own answer carries; which answer does not matter."""
    tenant, reached = next(iter(settings.by_tenant().items()))
    transport = Transport(None, subject="the config API", url_setting="base_url", clock=clock)
    began = clock.wall()
    try:
        with transport.deadline(clock.monotonic() + settings.timeout_seconds) as deadline:
            answer = transport.send(deadline, "HEAD", reached.config_url(tenant), headers={})
    except ReadError as error:
        return Finding("clock", Verdict.NOTE, f"not to be compared: {error}")
    ended = clock.wall()
    try:
        told = parsedate_to_datetime(answer.headers.get("Date", "")).timestamp() + 0.5  # the middle of its second
    except (ValueError, TypeError, OverflowError):
        return Finding("clock", Verdict.NOTE, "not to be compared: the config API's answers carry no date")
    ahead = (began + ended) / 2 - told
    off = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the config API's"
    if abs(ahead) <= CLOCK_TOLERANCE_SECONDS:
        return Finding("clock", Verdict.OK, off)
    advice = (
        "set it by NTP; deliveries are refused whose timestamp seems too old or too new, and tokens seem to have ended"
    )
    return Finding("clock", Verdict.FAIL, off, advice)


def _store_finding(settings: Settings, clock: Clock) -> Finding:
    where = mask_passwords(settings.store)
    try:
        store = make_store(settings, clock=clock)
    except (ExternalOMSError, OSError) as error:
        return Finding("store", Verdict.FAIL, str(error), "choose another place in the setting store")
    try:
        store.history(limit=1)  # goes where the entries are, and changes nothing
        health = store.health()
    except StoreError as error:
        health = Health(ok=False, problem=str(error))
    finally:
        store.close()
    if not health.ok:
        return Finding("store", Verdict.FAIL, f"{where}: {health.problem}")
    if store.kind == "memory":
        advice = "with several processes use sqlite:////path/state.db, or redis://host:6379/0 with several hosts"
        return Finding("store", Verdict.NOTE, f"{where}: an invalidation reaches one process only", advice)
    return Finding("store", Verdict.OK, where)


def _server_finding(settings: Settings) -> Finding:
    try:
        check_credentials(settings)
    except SettingsError as error:
        return Finding("server", Verdict.NOTE, f"`external-oms serve` would refuse to start: {error}")
    return Finding("server", Verdict.OK, "credentials are there for all that it serves")


def _failed(subject: str, error: ReadError) -> Finding:
    return Finding(subject, Verdict.FAIL, str(error), _ADVICE.get(error.kind, ""))


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
