"""`keys new`, `webhook secret` and `webhook send`: what a server and a sender of deliveries need."""

from __future__ import annotations

import base64
import json
import os
import secrets
import sys
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from typing import IO
from urllib.parse import urlsplit

import click

from external_oms.cli.base import CommandError, ExitCode, json_option
from external_oms.cli.output import Cell, duration, print_json, print_line
from external_oms.clock import SYSTEM_CLOCK
from external_oms.config import format_instant
from external_oms.errors import SettingsError, SignatureError
from external_oms.settings import ENV_PREFIX, Settings, listed
from external_oms.tenants import is_loopback
from external_oms.testing import sign_delivery
from external_oms.transport import Transport
from external_oms.web.keys import Role, new_key
from external_oms.web.serving import DEFAULT_BIND
from external_oms.webhook import PATH

__all__ = ["keys", "webhook"]

TIMEOUT_SECONDS = 15.0  # the receiver answers after the read that follows: three times the default of timeout_seconds
MAX_SHOWN_LENGTH = 2000  # characters of a response; ours has some hundred
SECRET_BYTES = 32  # Standard Webhooks asks for 24 to 64


@click.group()
def keys() -> None:
    """Keys for the HTTP API and the dashboard."""


@keys.command(short_help="Make a key, and its entry for the setting api_keys.")
@click.option("--name", required=True, metavar="NAME", help="The name of its owner, for the history.")
@click.option("--role", required=True, type=click.Choice([role.word for role in Role]), help="What it allows.")
@json_option
def new(name: str, role: str, as_json: bool) -> None:
    """Make a key, and its entry for the setting api_keys.

    The key is shown once and stored nowhere. Give the key to its owner, and the entry to the server.
    """
    try:
        key, entry = new_key(name, Role.named(role))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--name") from error
    if as_json:
        print_json({"key": key, "entry": entry})
    elif sys.stdout.isatty():
        click.echo(f"The key of {name} ({role}), shown this once:\n\n  {key}\n")
        click.echo(f"Its entry for api_keys (EXTERNAL_OMS_API_KEYS; several separated by commas):\n\n  {entry}")
    else:
        click.echo(f"key={key}\nentry={entry}")


@click.group()
def webhook() -> None:
    """Deliveries to the webhook."""


@webhook.command(short_help="Make a secret for the setting webhook_secrets and its sender.")
def secret() -> None:
    """Make a Standard Webhooks secret, for the setting webhook_secrets and for the sender of deliveries.

    The secret is stored nowhere. To replace one, configure both until the sender uses the new one.
    """
    if sys.stdout.isatty():
        click.echo("A secret for webhook_secrets (EXTERNAL_OMS_WEBHOOK_SECRETS) and for the sender:\n")
    click.echo(f"whsec_{base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()}")


@webhook.command(short_help="Sign a delivery, send it, and show the response.")
@click.option("--url", default=f"http://{DEFAULT_BIND}{PATH}", show_default=True, help="The address of the webhook.")
@click.option("--tenant", metavar="NAME", help="The tenant to name; by default that of the settings, if there is one.")
@click.option("--id", "delivery_id", metavar="ID", help="The webhook-id, to repeat a delivery; a new one by default.")
@click.option("--bearer", is_flag=True, help="Send an API key as a bearer token instead of a signature.")
@click.option("--secret-file", type=click.File("r"), help="Read the secret, or the key, from a file; - is stdin.")
@click.pass_context
def send(
    ctx: click.Context, url: str, tenant: str | None, delivery_id: str | None, bearer: bool, secret_file: IO[str] | None
) -> None:
    """Sign a delivery, send it, and show the response.

    The first of webhook_secrets signs, by Standard Webhooks. With --bearer, or if only webhook_api_keys is set, the
    first key is sent instead. Exits with 1 unless the response is 200 or 202.
    """
    host = _host_of(url)
    bearer = bearer or (secret_file is None and not _first("webhook_secrets") and bool(_first("webhook_api_keys")))
    setting = "webhook_api_keys" if bearer else "webhook_secrets"
    shared = secret_file.read().strip() if secret_file else _first(setting)
    if not shared:
        problem = f"no secret: set {ENV_PREFIX}{setting.upper()}, or use --secret-file"
        raise CommandError(problem, ExitCode.REFUSED)
    if bearer and url.startswith("http:") and not is_loopback(host):
        problem = "an API key is sent over plain http on loopback only; use https, or a signature"
        raise CommandError(problem, ExitCode.REFUSED)
    delivery_id = delivery_id or f"msg_{uuid.uuid4().hex}"
    body = _delivery(tenant)
    headers = _headers(body, shared, delivery_id, bearer=bearer)
    transport = Transport(None, subject="the webhook", url_setting="--url", clock=SYSTEM_CLOCK)
    began = SYSTEM_CLOCK.monotonic()
    with transport.deadline(began + TIMEOUT_SECONDS) as deadline:
        response = transport.send(deadline, "POST", url, headers=headers, body=body)
    accepted = response.status in {200, 202}
    status = Cell(str(response.status), "green" if accepted else "red", bold=True)
    print_line(status, f"in {duration(SYSTEM_CLOCK.monotonic() - began)}, webhook-id {delivery_id}")
    shown = " ".join(response.body.decode("utf-8", "replace").split())[:MAX_SHOWN_LENGTH]
    if shown:
        print_line(shown)
    ctx.exit(ExitCode.DONE if accepted else ExitCode.FAILED)


def _host_of(url: str) -> str:
    with suppress(ValueError):
        parts = urlsplit(url)
        if parts.hostname and parts.scheme in {"http", "https"} and parts.username is None:
            return parts.hostname
    raise click.BadParameter("must be an http or https address without credentials", param_hint="--url")


def _first(setting: str) -> str:
    """Return the first secret of a setting. A mere sender needs no other setting, so the environment is enough."""
    text = os.environ.get(f"{ENV_PREFIX}{setting.upper()}", "")
    try:
        found = listed(text) if text else [one.get_secret_value() for one in getattr(Settings(), setting)]
    except SettingsError:  # nothing is configured here except, perhaps, a file with the secret
        return ""
    except ValueError as error:
        raise CommandError(f"{setting}: must be JSON or separated by commas", ExitCode.REFUSED) from error
    return str(found[0]) if isinstance(found, list) and found else ""


def _delivery(tenant: str | None) -> bytes:
    """Return the envelope of the platform; without a tenant it means the only one of the receiver."""
    if tenant is None:
        try:
            tenant = Settings().tenant
        except SettingsError:
            tenant = os.environ.get(f"{ENV_PREFIX}TENANT")
    now = format_instant(datetime.fromtimestamp(SYSTEM_CLOCK.wall(), UTC))
    envelope: dict[str, object] = {"name": "external_oms.changed", "published_at": now, "payload": {}}
    return json.dumps({"tenant": tenant, **envelope} if tenant else envelope).encode()


def _headers(body: bytes, shared: str, delivery_id: str, *, bearer: bool) -> dict[str, str]:
    if not bearer:
        try:
            return sign_delivery(body, shared, delivery_id=delivery_id)
        except SignatureError as error:
            raise CommandError(f"the delivery cannot be signed: {error}", ExitCode.REFUSED) from error
    if not shared.isascii() or not shared.isprintable() or " " in shared:
        raise CommandError("the key must be printable ASCII without spaces", ExitCode.REFUSED)
    return {"content-type": "application/json", "Authorization": f"Bearer {shared}", "webhook-id": delivery_id}
