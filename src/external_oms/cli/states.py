"""`status`, `watch` and `history`: what is known of the flag, now, from now on, and until now."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import click

from external_oms.cli.endings import endable
from external_oms.cli.frame import Code, fail, json_option, opened, tenant_option
from external_oms.cli.printing import Cell, ago, cell, clock_time, flag, moment, print_json, print_table, say, span
from external_oms.config import format_instant
from external_oms.policy import Evaluation, Freshness, State, state_of
from external_oms.records import Cause, Event
from external_oms.web.api import event_shape, state_shape
from external_oms.wiring import Service

__all__ = ["history", "status", "watch"]

LOOK_SECONDS = 0.5
"""How often `watch` looks at the ages by itself: that a value has grown stale is no event, only time that passes."""

MAX_TENANTS_AT_ONCE = 16

_COLOURS = {Freshness.FRESH: "green", Freshness.STALE: "yellow", Freshness.EXPIRED: "red"}

Essence = tuple[bool | None, Freshness, int, datetime | None, datetime | None]


@click.command(short_help="Show the flag, its freshness, and what is wrong.")
@tenant_option
@json_option
def status(tenant: str | None, as_json: bool) -> None:
    """Show the flag of every tenant: value, freshness, age, and why reads fail where they do.

    What a shared store knows is shown as it is; only where no value may be served is the API read. Exits with 1 where
    even then a tenant has none.
    """
    with opened() as service:
        states = _present(service, _chosen(service, tenant))
    if as_json:
        for state in states:
            print_json(state_shape(state))
    else:
        _print_states(states)
    if any(state.freshness is Freshness.EXPIRED for state in states):
        click.get_current_context().exit(Code.FAILED)


def _chosen(service: Service, tenant: str | None) -> tuple[str, ...]:
    cache = service.cache
    return cache.tenants if tenant is None else (cache.tenant_of(tenant),)


def _present(service: Service, tenants: Sequence[str]) -> list[State]:
    """The states, after one read of each tenant that has nothing to serve; those at the same time."""
    cache = service.cache

    def look(tenant: str) -> Evaluation:
        evaluation = cache.peek(tenant)
        return cache.lookup(tenant) if evaluation.servable is None else evaluation

    with ThreadPoolExecutor(MAX_TENANTS_AT_ONCE) as threads:
        evaluations = list(threads.map(look, tenants))
    return [state_of(evaluation, now=service.clock.monotonic()) for evaluation in evaluations]


def _print_states(states: Sequence[State]) -> None:
    heads = ("TENANT", "FLAG", "FRESHNESS", "AGE", "GENERATION", "CHANGED UPSTREAM", "FROM")
    print_table(heads, [_row(state) for state in states])
    for state in states:
        if state.last_error is not None:
            say(cell(f"{state.tenant}:", "bold"), cell(_trouble(state), "red"))


def _row(state: State) -> tuple[str | Cell, ...]:
    return (
        state.tenant,
        flag(state.enabled),
        _freshness(state),
        ago(state.age_seconds),
        str(state.generation),
        moment(state.updated_at),
        state.source.value if state.enabled is not None else "",
    )


def _freshness(state: State) -> Cell:
    left = state.fresh_seconds
    more = f" {ago(left)}" if left is not None and state.freshness is Freshness.FRESH else ""
    return cell(state.freshness.value + more, _COLOURS[state.freshness])


def _trouble(state: State) -> str:
    since = f" since {moment(state.failing_since)}" if state.failing_since else ""
    again = f"; the next is tried in {ago(state.retry_seconds)}" if state.retry_seconds is not None else ""
    return f"reads fail{since} ({state.failures} in a row){again}: {state.last_error}"


@click.command(short_help="Show the flag, and a line for each change.")
@tenant_option
@json_option
def watch(tenant: str | None, as_json: bool) -> None:
    """Show the flag, and then a line for each change, until Ctrl-C.

    In a shared store the changes that other processes make are shown as they make them.
    """
    with endable(), opened(background=True) as service:
        tenants = _chosen(service, tenant)
        news: queue.SimpleQueue[str] = queue.SimpleQueue()
        service.cache.changes.subscribe(lambda change: news.put(change.tenant))
        _present(service, tenants)
        service.cache.start()
        told: dict[str, Essence] = {}
        while True:
            for name in tenants:
                state = service.cache.state(name)
                if told.get(name) != _essence(state):
                    told[name] = _essence(state)
                    _print_change(state, service.clock.wall(), as_json=as_json)
            try:
                news.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                continue


def _essence(state: State) -> Essence:
    """What of a state is worth a line when it changes: no further read of the same value or failure in a row."""
    return state.enabled, state.freshness, state.generation, state.updated_at, state.failing_since


def _print_change(state: State, now_wall: float, *, as_json: bool) -> None:
    now = datetime.fromtimestamp(now_wall, UTC)
    if as_json:
        print_json({"at": format_instant(now), **state_shape(state)})
    else:
        value = flag(state.enabled)
        value.pad_right(3 - len(value.plain))
        told = [cell(clock_time(now), "dim"), cell(state.tenant, "bold"), value]
        told += [cell(state.freshness.value, _COLOURS[state.freshness]), cell(f"generation {state.generation}")]
        if state.updated_at is not None:
            told.append(cell(f"changed upstream {moment(state.updated_at)}", "dim"))
        if state.last_error is not None:
            told.append(cell(f"reads fail: {state.last_error}", "red"))
        say(*told)


@click.command(short_help="Show what happened, newest first.")
@tenant_option
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="The most rows.")
@json_option
def history(tenant: str | None, limit: int, as_json: bool) -> None:
    """Show what happened, newest first: changes, deliveries, writes, failures and recoveries."""
    with opened() as service:
        chosen = None if tenant is None else service.cache.tenant_of(tenant)
        events = service.operations.history(tenant=chosen, limit=limit)
        health = service.store.health()
    if not health.ok:
        fail(f"the history cannot be read: {health.problem}")
    if as_json:
        for event in events:
            print_json(event_shape(event))
    elif events:
        print_table(("WHEN", "TENANT", "WHAT", "FLAG", "BY", "TOOK", "DETAIL"), [_event_row(event) for event in events])
    elif service.store.kind == "memory":
        click.echo("Nothing: the store is memory://, whose history ends with its process.", err=True)
    else:
        click.echo("Nothing has happened yet.", err=True)


def _event_row(event: Event) -> tuple[str | Cell, ...]:
    bad = event.cause in {Cause.FAILED, Cause.STORE}
    detail = f"{event.detail} ({event.delivery_id})" if event.delivery_id else event.detail
    return (
        moment(event.at),
        event.tenant,
        cell(event.cause.value, "red" if bad else "bold"),
        cell("") if event.enabled is None else flag(event.enabled),
        event.actor,
        span(event.latency_seconds),
        detail,
    )
