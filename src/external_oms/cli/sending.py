"""`webhook send`: a delivery as a genuine sender makes it; its secret is never an argument."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import IO
from urllib.parse import urlsplit

import click

from external_oms import signature
from external_oms.cli.frame import Code, fail
from external_oms.cli.printing import cell, say, span
from external_oms.clock import SYSTEM_CLOCK
from external_oms.config import format_instant
from external_oms.errors import SettingsError, SignatureError
from external_oms.settings import ENV_PREFIX, Settings, listed
from external_oms.tenants import is_loopback
from external_oms.transport import Response, Transport
from external_oms.web.serving import DEFAULT_BIND
from external_oms.webhook import PATH

__all__ = ["webhook"]

TIMEOUT_SECONDS = 15.0
"""A delivery is answered after the read that it causes: the default of timeout_seconds, three times over."""

MAX_SHOWN = 2000
"""Characters of an answer; our own has some hundred."""

_SECRETS, _KEYS = "webhook_secrets", "webhook_api_keys"


@click.group()
def webhook() -> None:
    """Deliveries to the webhook."""


@webhook.command(short_help="Sign a delivery, send it, and show the answer.")
@click.option("--url", default=f"http://{DEFAULT_BIND}{PATH}", show_default=True, help="Where to.")
@click.option("--tenant", metavar="NAME", help="The tenant that it names; else that of the settings, else none.")
@click.option("--id", "delivery_id", metavar="ID", help="Its webhook-id, to repeat a delivery; else a new one.")
@click.option("--bearer", is_flag=True, help="Show a key as a bearer, as the platform does, in place of a signature.")
@click.option("--secret-file", type=click.File("r"), help="Read the secret, or the key, from a file; - is stdin.")
def send(url: str, tenant: str | None, delivery_id: str | None, bearer: bool, secret_file: IO[str] | None) -> None:
    """Sign a delivery, send it, and show the answer.

    The first of webhook_secrets signs, by Standard Webhooks. With --bearer, or where only webhook_api_keys is set, the
    first key is shown instead. Exits with 1 unless the answer is 200 or 202.
    """
    host = _host_of(url)
    bearer = bearer or (secret_file is None and not _given(_SECRETS) and bool(_given(_KEYS)))
    setting = _KEYS if bearer else _SECRETS
    secret = secret_file.read().strip() if secret_file else next(iter(_given(setting)), "")
    if not secret:
        problem = "nothing to make the delivery genuine with"
        fail(f"{problem}: set {ENV_PREFIX}{setting.upper()}, or give --secret-file", Code.REFUSED)
    if bearer and url.startswith("http:") and not is_loopback(host):
        fail("a key is not shown over plain http, save on loopback; use https, or a signature", Code.REFUSED)
    body = _delivery(tenant or _configured_tenant())
    headers = _headers(body, secret, delivery_id or f"msg_{uuid.uuid4().hex}", bearer=bearer)
    began = time.monotonic()
    answer = _sent(url, headers, body)
    _print_answer(answer, headers["webhook-id"], time.monotonic() - began)
    if answer.status not in {HTTPStatus.OK, HTTPStatus.ACCEPTED}:
        click.get_current_context().exit(Code.FAILED)


def _host_of(url: str) -> str:
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        parts, host = None, None
    if parts is None or host is None or parts.scheme not in {"http", "https"} or parts.username is not None:
        raise click.BadParameter("must be an http or https address without credentials", param_hint="--url")
    return host


def _given(setting: str) -> Sequence[str]:
    """The secrets of a setting. Who only sends needs no other setting, so the environment alone will do."""
    text = os.environ.get(f"{ENV_PREFIX}{setting.upper()}", "")
    try:
        found = listed(text) if text else [one.get_secret_value() for one in getattr(Settings(), setting)]
    except SettingsError:  # nothing is configured here but, perhaps, a file for the secret
        return []
    except ValueError:
        fail(f"{setting}: must be JSON or separated by commas", Code.REFUSED)
    return [str(one) for one in found] if isinstance(found, list) else []


def _configured_tenant() -> str | None:
    try:
        return Settings().tenant
    except SettingsError:
        return os.environ.get(f"{ENV_PREFIX}TENANT") or None


def _delivery(tenant: str | None) -> bytes:
    """The platform's envelope; a tenant that is left out is the receiver's only one."""
    now = format_instant(datetime.fromtimestamp(SYSTEM_CLOCK.wall(), UTC))
    envelope: dict[str, object] = {"name": "external_oms.changed", "published_at": now, "payload": {}}
    return json.dumps({"tenant": tenant, **envelope} if tenant else envelope).encode()


def _headers(body: bytes, secret: str, delivery_id: str, *, bearer: bool) -> dict[str, str]:
    if bearer:
        if not secret.isascii() or not secret.isprintable() or " " in secret:
            fail("the key must be printable ASCII without spaces", Code.REFUSED)
        credentials = {"Authorization": f"Bearer {secret}", "webhook-id": delivery_id}
    else:
        try:
            credentials = signature.sign(body, secret=secret, delivery_id=delivery_id, at_wall=SYSTEM_CLOCK.wall())
        except SignatureError as error:
            fail(f"the delivery cannot be signed: {error}", Code.REFUSED)
    return {"Content-Type": "application/json", **credentials}


def _sent(url: str, headers: Mapping[str, str], body: bytes) -> Response:
    transport = Transport(None, subject="the webhook", url_setting="--url", clock=SYSTEM_CLOCK)
    with transport.deadline(SYSTEM_CLOCK.monotonic() + TIMEOUT_SECONDS) as deadline:
        return transport.send(deadline, "POST", url, headers=headers, body=body)


def _print_answer(answer: Response, delivery_id: str, seconds: float) -> None:
    good = answer.status in {HTTPStatus.OK, HTTPStatus.ACCEPTED}
    say(cell(str(answer.status), "bold green" if good else "bold red"), f"in {span(seconds)}, webhook-id {delivery_id}")
    shown = "".join(c if c.isprintable() else " " for c in answer.body.decode("utf-8", "replace"))
    if shown.strip():
        say(shown.strip()[:MAX_SHOWN])
