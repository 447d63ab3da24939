"""`demo`: changes the flag in an emulated config API, delivers a webhook, and shows what every worker answers."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import click

from external_oms.cli.base import CommandError, ExitCode, deferred_signals, stoppable
from external_oms.cli.output import Cell, duration, flag_cell, print_line
from external_oms.config import FLAG_KEY
from external_oms.emulator import ConfigAPIEmulator
from external_oms.settings import ENV_PREFIX
from external_oms.testing import sign_delivery
from external_oms.web.keys import Role, new_key
from external_oms.web.serving import MEMBER_HEADER
from external_oms.webhook import PATH

__all__ = ["DemoEnvironment", "demo"]

WORKERS = 2
TENANT = "acme-staging"
START_SECONDS = 30.0  # on an idle machine the server starts in about a second
STOP_SECONDS = 15.0  # before it is killed: longer than the grace period of the server
ROUND_SECONDS = 10.0  # until every worker has answered
BURST = 8  # concurrent requests, each on its own connection: single ones could all reach the same worker

_EVALUATION = f"/ofrep/v1/evaluate/flags/{FLAG_KEY}"


class Reply(NamedTuple):
    """The response of one worker: its name, the status, the JSON object, and how long it took in seconds."""

    member: str
    status: int
    document: Mapping[str, object]
    seconds: float


@click.command(short_help="See it work in ten seconds, with no settings.")
@click.option("--check", is_flag=True, help="Exit after the demonstration, with 1 unless every worker followed.")
@click.pass_context
def demo(ctx: click.Context, check: bool) -> None:
    """See it work: an emulator, a server with two workers, a change in the config API and a signed delivery.

    Shows what every worker answers before and after, why, and how long each step took. Then it keeps running, with
    commands to try, until Ctrl-C. It needs no settings, reads none, and leaves nothing behind.
    """
    code = ExitCode.INTERRUPTED
    with stoppable(), DemoEnvironment() as environment:
        print_line(Cell("external-oms demo", bold=True), Cell(f"one flag, {WORKERS} workers, one webhook", dim=True))
        click.echo()
        with _progress("emulator of the config API"):
            environment.enter_context(environment.emulator)
        with _progress(f"server with {WORKERS} workers"):
            environment.start_server()
        code = ExitCode.DONE if _demonstrate(environment) else ExitCode.FAILED
        if not check:
            _print_what_to_try(environment)
            try:
                threading.Event().wait()
            finally:
                with suppress(OSError):  # the terminal may be closed
                    click.echo("\nstopping …")
    ctx.exit(code)


@contextmanager
def _progress(what: str) -> Iterator[None]:
    began = time.monotonic()
    click.echo(f"starting: {what}")
    yield
    print_line(Cell("✓", "green"), f"{what:<28}", Cell(duration(time.monotonic() - began), dim=True))


class DemoEnvironment(ExitStack):
    """An emulator, and `external-oms serve` with several workers, both on loopback, in a temporary directory."""

    def __init__(self) -> None:
        super().__init__()
        self.emulator = ConfigAPIEmulator((TENANT,))
        self.key, self._entry = new_key("demo", Role.ADMIN)
        self.webhook_key = f"demo_{secrets.token_urlsafe(18)}"
        self.origin = ""

    def start_server(self) -> None:
        """Start the server, and wait until every worker is ready."""
        place = Path(self.enter_context(TemporaryDirectory(prefix="external-oms-demo-")))
        log = place / "server.log"
        # The server inherits a listening socket, so no other process can take the port.
        with socket.create_server(("127.0.0.1", 0), backlog=128) as listening, log.open("wb") as output:
            self.origin = f"http://127.0.0.1:{listening.getsockname()[1]}"
            command = [sys.executable, "-P", "-m", "external_oms", "serve", "--name-members"]
            command += ["--bind", f"fd://{listening.fileno()}", "--workers", str(WORKERS)]
            with deferred_signals():  # otherwise a signal could leave a process that nothing stops
                server = subprocess.Popen(  # noqa: S603 - our own module, by this interpreter
                    command,
                    env=self.variables(place),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(listening.fileno(),),
                    start_new_session=True,  # Ctrl-C reaches the server through this process, in order
                )
                self.callback(_stop, server)
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and server.poll() is None:
            with suppress(CommandError):
                if all(reply.status == http.client.OK for reply in self.ask_all("/readyz")):
                    return
            time.sleep(0.05)
        lines = log.read_text("utf-8", "replace").strip().splitlines()
        raise CommandError(f"the server of the demo did not start; its log ends: {lines[-1] if lines else '(empty)'}")

    def variables(self, place: Path) -> dict[str, str]:
        """Return the environment of the server: no settings of the user's, and no proxy."""
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(ENV_PREFIX)}
        own = {"STORE": f"sqlite:///{place}/state.db", "API_KEYS": self._entry, "WEBHOOK_API_KEYS": self.webhook_key}
        settings = self.emulator.environment() | {ENV_PREFIX + name: value for name, value in own.items()}
        return {**kept, **settings, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> Reply:
        """Send a request as the admin, a POST if there is a body, on its own connection."""
        sent = {"x-api-key": self.key, "content-type": "application/json", "connection": "close", **headers}
        began = time.monotonic()
        try:
            with closing(
                http.client.HTTPConnection(self.origin.removeprefix("http://"), timeout=ROUND_SECONDS)
            ) as line:
                line.request("GET" if body is None else "POST", path, body, sent)
                response = line.getresponse()
                document = json.loads(response.read() or b"{}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise CommandError(f"the server of the demo did not answer: {error}") from error
        return Reply(response.headers.get(MEMBER_HEADER, ""), response.status, document, time.monotonic() - began)

    def ask_all(self, path: str, body: bytes | None = None) -> list[Reply]:
        """Send requests in bursts until every worker has answered."""
        replies: list[Reply] = []
        until = time.monotonic() + ROUND_SECONDS
        with ThreadPoolExecutor(BURST) as threads:
            while len({reply.member for reply in replies}) < WORKERS:
                if time.monotonic() > until:
                    raise CommandError("not every worker of the demo has answered")
                replies += threads.map(lambda _: self.ask(path, body), range(BURST))
        return replies


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _demonstrate(environment: DemoEnvironment) -> bool:
    """Show every step; return whether every worker followed."""
    emulator, before = environment.emulator, environment.emulator.enabled()
    _print_step(1, "What every worker answers")
    _print_replies(environment.ask_all(_EVALUATION, b"{}"))
    emulator.set_enabled(TENANT, not before)
    _print_step(2, "The flag is changed in the config API:", flag_cell(before), "→", flag_cell(not before))
    _print_replies(environment.ask_all(_EVALUATION, b"{}"))
    print_line("  ", Cell("no worker knows yet; each reads again within ttl_seconds (30)", dim=True))
    body = json.dumps({"tenant": TENANT, "name": "external_oms.changed", "payload": {}}).encode()
    began = time.monotonic()
    delivered = environment.ask(PATH, body, **sign_delivery(body, emulator.webhook_secret))
    accepted = delivered.status == http.client.OK
    status = Cell(str(delivered.status), "green" if accepted else "red", bold=True)
    _print_step(3, f"A signed delivery: POST {PATH} →", status, Cell(duration(delivered.seconds), dim=True))
    print_line("  ", json.dumps(delivered.document))
    replies = environment.ask_all(_EVALUATION, b"{}")
    took = duration(time.monotonic() - began)
    _print_step(4, "What every worker answers now")
    _print_replies(replies)
    old = sum(reply.document.get("value") is not (not before) for reply in replies)
    click.echo()
    if accepted and not old:
        print_line(Cell(f"✓ Every worker followed within {took} of the delivery", "green", bold=True))
        print_line(
            "  ", Cell(f"{len(replies)} answers since, none of them old; includes asking every worker", dim=True)
        )
    else:
        problem = f"✗ {old} of {len(replies)} answers were old, or the delivery was refused"
        print_line(Cell(problem, "red", bold=True))
    return accepted and not old


def _print_step(number: int, *parts: str | Cell) -> None:
    click.echo()
    print_line(Cell(f"{number}.", "cyan", bold=True), *parts)


def _print_replies(replies: Sequence[Reply]) -> None:
    """Print a line for each worker and value, with the time of its fastest answer."""
    fastest: dict[tuple[str, object], Reply] = {}
    for reply in sorted(replies, key=lambda reply: (reply.member, reply.seconds)):
        fastest.setdefault((reply.member, reply.document.get("value")), reply)
    for (member, value), reply in fastest.items():
        shown = flag_cell(value if isinstance(value, bool) else None)
        told, metadata = reply.document, reply.document.get("metadata")
        if isinstance(metadata, dict):
            known = f"{metadata.get('cache')}, generation {metadata.get('generation')}, from {metadata.get('source')}"
            why = Cell(f"{told.get('reason')} ({known})")
        else:
            why = Cell(f"{reply.status} {told.get('errorCode', '')} {told.get('errorDetails', '')}", "red")
        worker = f"worker {member.rpartition(':')[2]}"
        print_line("  ", worker, shown._replace(text=f"{shown.text:<3}"), why, Cell(duration(reply.seconds), dim=True))


def _print_what_to_try(environment: DemoEnvironment) -> None:
    state, control = f"$SERVER/api/v1/tenants/{TENANT}", f"$API/_control/tenants/{TENANT}"
    key = '-H "X-API-Key: $KEY"'
    click.echo(f"""
It runs until Ctrl-C. Try:

   # The addresses and keys of this run; {environment.origin}/ shows the page, log in with the KEY
   KEY={environment.key}
   WEBHOOK_KEY={environment.webhook_key}
   SERVER={environment.origin} API={environment.emulator.origin}
   # The state of the flag
   curl {key} {state}
   # Evaluate it, as any OFREP client does
   curl {key} --json '{{}}' $SERVER{_EVALUATION}
   # Change it as another client of the config API does, and deliver the webhook
   curl -X PUT --json '{{"enabled": false}}' {control}
   curl -H "Authorization: Bearer $WEBHOOK_KEY" --json '{{}}' $SERVER{PATH}
   # Switch it through the server
   curl -X PUT {key} --json '{{"enabled": true, "reason": "demo"}}' {state}
   # What happened
   curl {key} $SERVER/api/v1/history
   # Let ten reads of the config API fail
   curl --json '{{"status": 503, "times": 10}}' {control}/faults""")
