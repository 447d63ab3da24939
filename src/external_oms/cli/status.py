"""`status`, `watch` and `history`: the present state of the flag, its changes, and what happened before."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import click

from external_oms.cli.base import CommandError, ExitCode, json_option, open_service, stoppable, tenant_option
from external_oms.cli.output import Cell, duration, flag_cell, local_time, print_json, print_line, print_table
from external_oms.config import format_instant
from external_oms.policy import Evaluation, Freshness, State, state_of
from external_oms.records import Cause, Event
from external_oms.web.api import event_shape, state_shape
from external_oms.wiring import Service

__all__ = ["history", "status", "watch"]

WATCH_SECONDS = 0.5  # between two looks at the ages: no event reports that a value has become stale
MAX_CONCURRENT_READS = 16

_COLORS = {Freshness.FRESH: "green", Freshness.STALE: "yellow", Freshness.EXPIRED: "red"}
_STATE_HEADS = ("TENANT", "FLAG", "FRESHNESS", "AGE", "GENERATION", "CHANGED UPSTREAM", "FROM")
_EVENT_HEADS = ("WHEN", "TENANT", "WHAT", "FLAG", "BY", "TOOK", "DETAIL")


@click.command(short_help="Show the flag, its freshness, and why reads fail.")
@tenant_option
@json_option
@click.pass_context
def status(ctx: click.Context, tenant: str | None, as_json: bool) -> None:
    """Show the flag of every tenant: value, freshness, age, and why reads fail.

    Shows what the store knows. The API is read only for a tenant that has no value to serve. Exits with 1 if a tenant
    has none after that.
    """
    with open_service() as service:
        states = _load_states(service, _tenants(service, tenant))
    if as_json:
        for state in states:
            print_json(state_shape(state))
    else:
        print_table(_STATE_HEADS, [_state_row(state) for state in states])
        for state in states:
            if state.last_error is not None:
                print_line(Cell(f"{state.tenant}:", bold=True), Cell(_failure(state), "red"))
    if any(state.freshness is Freshness.EXPIRED for state in states):
        ctx.exit(ExitCode.FAILED)


def _tenants(service: Service, tenant: str | None) -> tuple[str, ...]:
    return service.cache.tenants if tenant is None else (service.cache.tenant_of(tenant),)


def _load_states(service: Service, tenants: Sequence[str]) -> list[State]:
    """Return the states, after concurrent reads of the tenants that have nothing to serve."""
    cache = service.cache

    def evaluate(tenant: str) -> Evaluation:
        evaluation = cache.peek(tenant)
        return cache.lookup(tenant) if evaluation.servable is None else evaluation

    with ThreadPoolExecutor(MAX_CONCURRENT_READS) as threads:
        evaluations = list(threads.map(evaluate, tenants))
    return [state_of(evaluation, now=service.clock.monotonic()) for evaluation in evaluations]


def _state_row(state: State) -> tuple[str | Cell, ...]:
    left = f" {duration(state.fresh_seconds)}" if state.freshness is Freshness.FRESH else ""
    return (
        state.tenant,
        flag_cell(state.enabled),
        Cell(state.freshness.value + left, _COLORS[state.freshness]),
        duration(state.age_seconds),
        str(state.generation),
        local_time(state.updated_at),
        state.source.value if state.enabled is not None else "",
    )


def _failure(state: State) -> str:
    since = f" since {local_time(state.failing_since)}" if state.failing_since else ""
    retry = f"; next attempt in {duration(state.retry_seconds)}" if state.retry_seconds is not None else ""
    return f"reads fail{since} ({state.failures} in a row){retry}: {state.last_error}"


@click.command(short_help="Show the flag, and a line for each change.")
@tenant_option
@json_option
def watch(tenant: str | None, as_json: bool) -> None:
    """Show the flag, and then a line for each change, until Ctrl-C.

    Changes that other processes make are shown if they share the store.
    """
    with stoppable(), open_service(background=True) as service:
        tenants = _tenants(service, tenant)
        changes: queue.SimpleQueue[str] = queue.SimpleQueue()
        service.cache.changes.subscribe(lambda change: changes.put(change.tenant))
        _load_states(service, tenants)
        service.cache.start()
        shown: dict[str, tuple[object, ...]] = {}
        while True:
            for name in tenants:
                state = service.cache.state(name)
                # A further read of the same value, or a further failure in a row, is no change.
                key = (state.enabled, state.freshness, state.generation, state.updated_at, state.failing_since)
                if shown.get(name) != key:
                    shown[name] = key
                    _print_change(state, datetime.fromtimestamp(service.clock.wall(), UTC), as_json=as_json)
            try:
                changes.get(timeout=WATCH_SECONDS)
            except queue.Empty:
                continue


def _print_change(state: State, now: datetime, *, as_json: bool) -> None:
    if as_json:
        print_json({"at": format_instant(now), **state_shape(state)})
        return
    time = Cell(now.astimezone().strftime("%H:%M:%S.%f")[:-3], dim=True)
    value = flag_cell(state.enabled)
    freshness = Cell(state.freshness.value, _COLORS[state.freshness])
    parts = [time, Cell(state.tenant, bold=True), value._replace(text=f"{value.text:<3}"), freshness]
    parts.append(Cell(f"generation {state.generation}"))
    if state.updated_at is not None:
        parts.append(Cell(f"changed upstream {local_time(state.updated_at)}", dim=True))
    if state.last_error is not None:
        parts.append(Cell(f"reads fail: {state.last_error}", "red"))
    print_line(*parts)


@click.command(short_help="Show what happened, newest first.")
@tenant_option
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="The number of rows.")
@json_option
def history(tenant: str | None, limit: int, as_json: bool) -> None:
    """Show what happened, newest first: changes, deliveries, writes, failures and recoveries."""
    with open_service() as service:
        chosen = None if tenant is None else service.cache.tenant_of(tenant)
        events = service.operations.history(tenant=chosen, limit=limit)
        health = service.store.health()
    if not health.ok:
        raise CommandError(f"the history cannot be read: {health.problem}")
    if as_json:
        for event in events:
            print_json(event_shape(event))
    elif events:
        print_table(_EVENT_HEADS, [_event_row(event) for event in events])
    else:
        why = ": a store memory:// keeps it in one process only" if service.store.kind == "memory" else ""
        click.echo(f"The history is empty{why}.", err=True)


def _event_row(event: Event) -> tuple[str | Cell, ...]:
    is_problem = event.cause in {Cause.FAILED, Cause.STORE}
    return (
        local_time(event.at),
        event.tenant,
        Cell(event.cause.value, "red" if is_problem else None, bold=not is_problem),
        "" if event.enabled is None else flag_cell(event.enabled),
        event.actor,
        duration(event.latency_seconds),
        f"{event.detail} ({event.delivery_id})" if event.delivery_id else event.detail,
    )
