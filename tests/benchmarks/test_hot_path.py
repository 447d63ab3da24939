"""What an evaluation costs on a fresh value, beside the SDK's own in-memory provider: in one run, turn by turn.

Only ratios are judged: they hold on any machine. Each turn times both sides a moment apart, and the least of many
turns counts, for whatever disturbs a turn makes it longer.
"""

from __future__ import annotations

import asyncio
import timeit
from collections.abc import Callable, Iterator

import pytest
from openfeature import api as openfeature
from openfeature.client import OpenFeatureClient
from openfeature.evaluation_context import EvaluationContext
from openfeature.provider import FeatureProvider
from openfeature.provider.in_memory_provider import InMemoryFlag, InMemoryProvider

from external_oms import FLAG_KEY, ExternalOMSProvider
from external_oms.emulator import ConfigAPIEmulator

TURNS = 60
SECONDS_A_TURN = 0.01

RESOLVE_AT_MOST = 0.5
"""Of what the in-memory provider costs: it builds its details anew each time, ours are at hand."""

CLIENT_AT_MOST = 1.02
"""Of what the client costs over the in-memory provider: the client itself is nearly all of it."""

CONTEXT = EvaluationContext("order-7", {"tenant": "acme-staging", "country": "DE"})


@pytest.fixture(scope="module")
def ours() -> Iterator[ExternalOMSProvider]:
    with ConfigAPIEmulator(("acme-staging",), enabled=True) as emulator:
        provider = ExternalOMSProvider(emulator.settings(ttl_seconds=600.0))
        openfeature.set_provider_and_wait(provider, "ours")
        openfeature.set_provider_and_wait(in_memory(), "in-memory")
        yield provider
        openfeature.shutdown()
        openfeature.clear_providers()


def in_memory() -> InMemoryProvider:
    return InMemoryProvider({FLAG_KEY: InMemoryFlag("on", {"on": True, "off": False})})


def least(*sides: Callable[[], object]) -> list[float]:
    """The least seconds that one call of each side takes, over many turns in which all of them are timed."""
    timers = [timeit.Timer(side) for side in sides]
    number = max(100, int(SECONDS_A_TURN / (timers[0].timeit(1000) / 1000)))
    turns = [[timer.timeit(number) / number for timer in timers] for _ in range(TURNS)]
    return [min(seconds) for seconds in zip(*turns, strict=True)]


def told(what: str, ours_seconds: float, theirs_seconds: float, at_most: float | None = None) -> float:
    """The ratio of two times, printed."""
    ratio = ours_seconds / theirs_seconds
    bound = "" if at_most is None else f" (at most {at_most:g}x)"
    print(f"\n{what}: {ours_seconds * 1e9:,.0f} ns, in-memory {theirs_seconds * 1e9:,.0f} ns, {ratio:.3f}x{bound}")
    return ratio


def resolving(provider: FeatureProvider, context: EvaluationContext) -> Callable[[], object]:
    """As the client calls it: by keyword, with a context always."""
    resolve = provider.resolve_boolean_details
    return lambda: resolve(flag_key=FLAG_KEY, default_value=False, evaluation_context=context)


def evaluating(domain: str) -> Callable[[], object]:
    get = openfeature.get_client(domain).get_boolean_value
    return lambda: get(FLAG_KEY, False)


@pytest.mark.parametrize("context", [EvaluationContext(), CONTEXT], ids=["no attributes", "the tenant named"])
def test_resolving_a_fresh_value_costs_half_of_what_the_in_memory_provider_costs(
    ours: ExternalOMSProvider, context: EvaluationContext
) -> None:
    mine, theirs = least(resolving(ours, context), resolving(in_memory(), context))
    assert told("resolve_boolean_details", mine, theirs, RESOLVE_AT_MOST) <= RESOLVE_AT_MOST


def test_an_evaluation_by_the_client_costs_no_more_than_over_the_in_memory_provider(
    ours: ExternalOMSProvider,
) -> None:
    mine, theirs = least(evaluating("ours"), evaluating("in-memory"))
    assert told("client.get_boolean_value", mine, theirs, CLIENT_AT_MOST) <= CLIENT_AT_MOST


def test_what_the_short_cut_and_the_async_client_cost(ours: ExternalOMSProvider) -> None:
    mine, theirs = least(ours.enabled, resolving(in_memory(), EvaluationContext()))
    told("provider.enabled()", mine, theirs)
    assert mine < theirs

    async def evaluate(client: OpenFeatureClient, times: int) -> None:
        for _ in range(times):
            await client.get_boolean_value_async(FLAG_KEY, default_value=False)

    def rounds(domain: str) -> Callable[[], object]:
        client = openfeature.get_client(domain)
        return lambda: asyncio.run(evaluate(client, 1000))

    timers = [timeit.Timer(rounds(domain)) for domain in ("ours", "in-memory")]
    turns = [[timer.timeit(1) / 1000 for timer in timers] for _ in range(10)]
    told("client.get_boolean_value_async", min(turn[0] for turn in turns), min(turn[1] for turn in turns))
