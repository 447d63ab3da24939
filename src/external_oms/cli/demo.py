"""`demo`: a flip in the config API, a delivery, and what every worker answers before and after, and how fast."""

from __future__ import annotations

import http.client
import json
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import click
from rich.console import Console

from external_oms import signature
from external_oms.cli.endings import endable, wait_to_be_ended
from external_oms.cli.frame import Code
from external_oms.cli.printing import Cell, cell, flag, say, span
from external_oms.cli.stage import TENANT, Heard, Stage
from external_oms.clock import SYSTEM_CLOCK
from external_oms.config import FLAG_KEY
from external_oms.errors import Unavailable
from external_oms.webhook import PATH

__all__ = ["demo"]

WORKERS = 2

_EVALUATION = f"/ofrep/v1/evaluate/flags/{FLAG_KEY}"


@click.command(short_help="See it work in ten seconds, with no settings.")
@click.option("--check", is_flag=True, help="End by itself, with 0 where every worker followed, else with 1.")
def demo(check: bool) -> None:
    """See it work: an emulator, a server with two workers, a flip in the config API and a signed delivery.

    Shows what every worker answers before and after, why, and how long each step took. Then it stays up, with what to
    try by curl, until Ctrl-C. It needs no settings, reads none, and leaves nothing behind.
    """
    followed: bool | None = None
    with endable(), Stage(WORKERS) as stage:
        followed = _play(stage)
        if not check:
            _print_what_to_try(stage)
            _stay()
    if followed is None:
        click.get_current_context().exit(Code.INTERRUPTED)
    if not followed:
        click.get_current_context().exit(Code.FAILED)


def _stay() -> None:
    try:
        wait_to_be_ended()
    finally:
        with suppress(OSError):  # the terminal may be what has ended
            say("\nstopping …")


def _play(stage: Stage) -> bool:
    """The whole story; whether every worker followed."""
    say(cell("external-oms demo", "bold"), cell(f"one flag, {WORKERS} workers, one webhook", "dim"), "\n")
    with _done("emulator of the config API") as told:
        stage.start_emulator()
        told.append(stage.emulator.origin)
    with _done(f"server with {WORKERS} workers") as told:
        stage.start_server()
        told.append(stage.origin)
    try:
        return _flip(stage)
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable("a worker of the demo did not answer") from error


def _flip(stage: Stage) -> bool:
    before = stage.emulator.enabled()
    _title(1, "What every worker answers")
    _print_answers(stage.ask_all("POST", _EVALUATION, b"{}"))
    switched = stage.switch(not before)
    took = cell(span(switched.seconds), "dim")
    _title(2, "The flag is switched in the config API:", flag(before), "→", flag(not before), took)
    _print_answers(stage.ask_all("POST", _EVALUATION, b"{}"))
    say("  ", cell("nobody has told them; by themselves they look again within ttl_seconds (30)", "dim"))
    began = time.monotonic()
    delivered = _deliver(stage)
    style = "bold green" if delivered.status == http.client.OK else "bold red"
    _title(
        3, f"A signed delivery: POST {PATH} →", cell(str(delivered.status), style), cell(span(delivered.seconds), "dim")
    )
    say("  ", json.dumps(delivered.document))
    after = stage.ask_all("POST", _EVALUATION, b"{}")
    everyone = time.monotonic() - began
    _title(4, "What every worker answers now")
    _print_answers(after)
    old = sum(answer.document.get("value") is not (not before) for answer in after)
    followed = delivered.status == http.client.OK and not old
    _print_verdict(len(after), old, everyone, followed=followed)
    return followed


def _deliver(stage: Stage) -> Heard:
    body = json.dumps({"tenant": TENANT, "name": "external_oms.changed", "payload": {}}).encode()
    now = SYSTEM_CLOCK.wall()
    signed = signature.sign(body, secret=stage.webhook_secret, delivery_id=f"msg_{uuid.uuid4().hex}", at_wall=now)
    return stage.ask("POST", PATH, body, {"Content-Type": "application/json", **signed})


@contextmanager
def _done(what: str) -> Iterator[list[str]]:
    """Progress while something starts, and a line when it has."""
    told: list[str] = []
    began = time.monotonic()
    if sys.stdout.isatty():
        with Console(highlight=False).status(f"starting: {what}"):
            yield told
    else:
        say(f"starting: {what}")
        yield told
    say(cell("✓", "green"), f"{what:<28}", *told, cell(span(time.monotonic() - began), "dim"))


def _title(number: int, *parts: str | Cell) -> None:
    say()
    say(cell(f"{number}.", "bold cyan"), *parts)


def _print_answers(answers: Sequence[Heard]) -> None:
    """A line for each worker: what it answered, why, and how long its quickest answer took."""
    for member in sorted({answer.member for answer in answers}):
        own = [answer for answer in answers if answer.member == member]
        for value in dict.fromkeys(answer.document.get("value") for answer in own):
            same = [answer for answer in own if answer.document.get("value") is value]
            shown = flag(value if isinstance(value, bool) else None)
            shown.pad_right(3 - len(shown.plain))
            quickest = min(answer.seconds for answer in same)
            say("  ", f"worker {member.rpartition(':')[2]}", shown, _why(same[-1]), cell(span(quickest), "dim"))


def _why(answer: Heard) -> Cell:
    told = answer.document
    metadata = told.get("metadata")
    if not isinstance(metadata, dict):
        return cell(f"{answer.status} {told.get('errorCode', '')} {told.get('errorDetails', '')}", "red")
    known = f"{metadata.get('cache')}, generation {metadata.get('generation')}, from {metadata.get('source')}"
    return cell(f"{told.get('reason')} ({known})")


def _print_verdict(answers: int, old: int, seconds: float, *, followed: bool) -> None:
    say()
    if followed:
        say(cell("✓", "green"), cell(f"Every worker followed within {span(seconds)} of the delivery", "bold green"))
        say("  ", cell(f"{answers} answers since, none of them old; the time includes asking every worker", "dim"))
    else:
        say(cell("✗", "red"), cell(f"{old} of {answers} answers were old, or the delivery was refused", "bold red"))


def _print_what_to_try(stage: Stage) -> None:
    state, control = f"$SERVER/api/v1/tenants/{TENANT}", f"$API/_control/tenants/{TENANT}"
    key = '-H "X-API-Key: $KEY"'
    tries: tuple[tuple[str, str], ...] = (
        ("Where everything is in this run", f"KEY={stage.key}"),
        ("", f"WEBHOOK_KEY={stage.webhook_key}"),
        ("", f"SERVER={stage.origin} API={stage.emulator.origin}"),
        ("What is known of the flag", f"curl {key} {state}"),
        ("Evaluate it, as any OFREP client does", f"curl {key} --json '{{}}' $SERVER{_EVALUATION}"),
        ("Switch it behind everybody's back …", f"curl -X PUT --json '{{\"enabled\": false}}' {control}"),
        ("… and deliver the news", f"curl -H \"Authorization: Bearer $WEBHOOK_KEY\" --json '{{}}' $SERVER{PATH}"),
        ("Switch it through the server", f'curl -X PUT {key} --json \'{{"enabled": true, "reason": "demo"}}\' {state}'),
        ("What happened", f"curl {key} $SERVER/api/v1/history"),
        ("Let the config API fail ten times", f'curl --json \'{{"status": 503, "times": 10}}\' {control}/faults'),
    )
    say()
    say(cell("It stays up until Ctrl-C. Try:", "bold"))
    tries += (("See it in a browser; log in with that KEY", f"{stage.origin}/"),)
    for what, command in tries:
        if what:
            say()
            say("  ", cell(f"# {what}", "dim"))
        say("  ", command)
