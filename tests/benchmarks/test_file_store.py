"""The hot path with the file store against that with the memory store, in one run: at most 1.15 of it."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from pathlib import Path

from openfeature.evaluation_context import EvaluationContext

from external_oms import FLAG_KEY, ExternalOMSProvider
from external_oms.testing import ConfigAPIEmulator

CALLS = 5000
ROUNDS = 80


def call_of(api: ConfigAPIEmulator, store: str) -> Callable[[], object]:
    """A fresh evaluation over a store, with nothing in the background."""
    provider = ExternalOMSProvider(api.settings(store=store, refresh="lazy", ttl_seconds=3000.0))
    provider.enabled()
    context = EvaluationContext()
    return lambda: provider.resolve_boolean_details(flag_key=FLAG_KEY, default_value=False, evaluation_context=context)


def test_the_hot_path_costs_hardly_more_with_the_file_store(
    external_oms_api: ConfigAPIEmulator, tmp_path: Path
) -> None:
    memory = call_of(external_oms_api, "memory://")
    file = call_of(external_oms_api, f"sqlite:///{tmp_path / 'state' / 'state.db'}")
    taken: dict[str, list[float]] = {"memory": [], "file": []}
    for _ in range(ROUNDS):  # turn about, so that whatever else the machine does falls on both
        taken["memory"].append(timeit.timeit(memory, number=CALLS) / CALLS)
        taken["file"].append(timeit.timeit(file, number=CALLS) / CALLS)
    least = {store: 1e9 * min(seconds) for store, seconds in taken.items()}
    ratio = least["file"] / least["memory"]
    print(f"\nfresh resolve: memory {least['memory']:.0f} ns, file {least['file']:.0f} ns, ratio {ratio:.3f}")
    assert ratio <= 1.15
