"""Planted defects, each of which the simulation must find: a check that finds none of them proves nothing."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["MUTANTS", "Mutant", "first_seed", "kill", "mutated"]

ROOT = Path(__file__).parents[2]

MODULES = (
    "external_oms.entry",
    "external_oms.policy",
    "external_oms.codec",
    "external_oms.stores.base",
    "external_oms.stores.memory",
    "external_oms.stores.fallback",
    "external_oms.scheduler",
    "external_oms.singleflight",
    "external_oms.cache",
    "tests.simulation.world",
    "tests.simulation.shared",
    "tests.simulation.history",
)
"""The modules that a mutated world is made of, in the order of their imports."""


MOST_HISTORIES = 5_000
"""How many histories may search for a defect. The first one finds it, until the code changes; then
`python -m tests.simulation --mutants` prints new seeds."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One defect: a text in a module, and what stands there instead.

    Attributes:
        name: What the defect is.
        module: The module, below the package.
        old: The text; it occurs once.
        new: The text in its place.
        seed: Where the search for a history that finds it begins: near one that does, so that few are played.
    """

    name: str
    module: str
    old: str
    new: str
    seed: int = 0


MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "the fence is removed: a read that was overtaken is current",
        "entry",
        "etag, lease.generation, lease.token, read_at",
        "etag, entry.generation, lease.token, read_at",
    ),
    Mutant("a stored value forgets that it was overtaken", "entry", "stale_since=overtaken_at, verified=True)", "stale_since=None, verified=True)", seed=324),
    Mutant("the lease is not fenced in commit", "entry", "    if not _holds(entry, lease):\n        return Change(entry, None)\n    known", "    known", seed=68),
    Mutant("the lease is not fenced in fail", "entry", "    if not _holds(entry, lease):\n        return Change(entry, None)\n    before", "    before", seed=157),
    Mutant("an overtaken read is thrown away", "entry", "    known = entry.snapshot\n    overtaken_at", "    if lease.generation < entry.generation:\n        return Change(replace(entry, lease=None), entry.snapshot)\n    known = entry.snapshot\n    overtaken_at", seed=21),
    Mutant("the age counts from the end of the read", "singleflight", "        latency_seconds = self._clock.monotonic() - read_at\n", "        latency_seconds = self._clock.monotonic() - read_at\n        read_at += latency_seconds\n"),
    Mutant("settling is dropped", "entry", "    return min(ttl_seconds, max(SETTLING_FLOOR_SECONDS, since_invalidation_seconds))", "    return ttl_seconds"),
    Mutant("delivery ids are not stored with the invalidation", "entry", "        tuple(claimed),\n", "        (),\n", seed=24),
    Mutant("a duplicate raises the generation", "entry", "    if all(duplicates):", "    if all(duplicates) and False:", seed=24),
    Mutant("the stale window starts anew with every invalidation", "entry", "stale_since=moment.now if entry.stale_since is None else entry.stale_since", "stale_since=moment.now", seed=117),
    Mutant("two invalidations make a value expire", "entry", "stale_since=moment.now if entry.stale_since is None else entry.stale_since", "stale_since=moment.now if entry.stale_since is None else entry.stale_since - 1e6", seed=50),
    Mutant("an absurd updated_at is believed", "entry", "    if updated_at is not None and updated_at > fetched_at + UPDATED_AT_TOLERANCE:\n        updated_at = None\n", "", seed=9),
    Mutant("an older updated_at replaces a newer one", "entry", "if known is not None and _is_older(snapshot, known) and", "if False and known is not None and", seed=9),
    Mutant("a lagging answer extends the old value without end", "entry", "    extended = min(ttl, read_at - known.read_at + lifetime_seconds)", "    extended = read_at - known.read_at + lifetime_seconds", seed=22),
    Mutant("an invalidation ends the wait that the API asked for", "entry", "    return own if failure.server_retry_at is None else max(own, failure.server_retry_at)", "    return own", seed=14),
    Mutant("Retry-After is forgotten", "entry", "server_retry_at=None if server_wait_seconds is None else moment.now + server_wait_seconds", "server_retry_at=None", seed=14),
    Mutant("two processes may hold the lease", "entry", "        if 0 < remaining <= LEASE_LIFE_FACTOR * lease_seconds:\n", "        if False:\n"),
    Mutant("a lease never ends", "entry", "        if 0 < remaining <= LEASE_LIFE_FACTOR * lease_seconds:\n            return Change(entry, Busy(held.token, held.holder, remaining))", "        if True:\n            return Change(entry, Busy(held.token, held.holder, 1.0))", seed=12),
    Mutant("invalidations cause any number of reads", "entry", "PACE_SECONDS = 1.0", "PACE_SECONDS = 0.0", seed=13),
    Mutant("the pace holds reads for ever", "entry", "        if wait_seconds > 0:\n            return Change(entry, Paced(wait_seconds))", "        if wait_seconds > -2.5:\n            return Change(entry, Paced(1.0))"),
    Mutant("a clock conversion forgets the end of freshness", "entry", "        stale_since=_moved(entry.stale_since, seconds),\n", "", seed=99),
    Mutant("a clock conversion forgets the lease", "entry", "replace(lease, expires_at=lease.expires_at + seconds, overtaken_at", "replace(lease, expires_at=lease.expires_at, overtaken_at"),
    Mutant("the codec forgets the end of freshness", "codec", '            "stale_since": entry.stale_since,\n', "", seed=51),
    Mutant("the codec forgets that a lease was overtaken", "codec", '                "overtaken_at": lease.overtaken_at,\n', "", seed=324),
    Mutant("stale-if-error applies though reads succeed", "policy", "    if failing and stale_for_seconds < windows.stale_if_error_seconds:", "    if stale_for_seconds < windows.stale_if_error_seconds:", seed=18),
    Mutant("stale-if-error has no end", "policy", "    if failing and stale_for_seconds < windows.stale_if_error_seconds:", "    if failing:", seed=13),
    Mutant("evaluations wait though a value may be served", "cache", "        answered = evaluation.servable is not None or (", "        answered = ("),
    Mutant("evaluations wait though a failure is known", "cache", "(entry.failure is not None and not self._waits_after_failure)", "False", seed=51),
    Mutant("the version is remembered after the load", "cache", "        entry = self._store.load(state.tenant)\n", "        entry = self._store.load(state.tenant)\n        version = versions[place]\n", seed=2213),
    Mutant("a forked child does not follow the store", "cache", "        if self._started and not self._closed:", "        if False:", seed=72),
    Mutant("a forked child waits for the flight of its parent", "cache", "        self._states = {tenant: _Tenant(tenant) for tenant in known}\n", "", seed=13),
    Mutant("a forced read takes an older result", "singleflight", "    if forced:\n        newer_than = NO_STORED_RESULT\n", "", seed=17),
    Mutant("a delivery counts as refreshed with an older value", "cache", "if entry.snapshot is not None and entry.snapshot.generation >= generation:", "if entry.snapshot is not None:"),
    Mutant("the lease of a process that ended holds until its end", "singleflight", "        if flight.dead_holder != busy.holder and self._store.is_gone(busy.holder):", "        if False:", seed=614),
    Mutant("a failed flight is tried again without a pause", "singleflight", "        return max(pause_seconds, 0.001)", "        return 0.0"),
    Mutant("an owed invalidation is forgotten", "stores.fallback", "                self._known.owe(tenant, change.entry.generation)\n", "                pass\n", seed=37),
    Mutant("an invalidation is owed once the local store has shown it", "stores.fallback", "        results = self._invalidate_alone(local, tenant, unnamed)\n", "        results = local.transact(tenant, partial(invalidate, requests=unnamed))\n", seed=37),
    Mutant("what is owed is repeated without raising the generation above ours", "stores.fallback", "    at_least = max(owed, known.generation) + 1", "    at_least = 0", seed=80),
    Mutant("a recovered store is believed before what is owed is repaid", "stores.fallback", "            if tenant in self.owed:\n                generation", "            if False:\n                generation"),
    Mutant("a store that lost the generation is believed", "stores.fallback", "    value, known_value = entry.snapshot, known.snapshot\n    return (\n", "    value, known_value = entry.snapshot, known.snapshot\n    return False and (\n", seed=108),
    Mutant("an invalidation that meets a failure of the store is not taken alone", "stores.fallback", "                self._known.raise_to(tenant, generation)  # a local store that is made from now on begins with it\n                if self._local is not None:\n                    self._invalidate_alone(self._local, tenant, [Invalidation()], shared=generation)\n", "", seed=2216),
    Mutant("a failed store leaves the old version words in force", "stores.fallback", "        self._touch_all(self._shared)\n        return local", "        return local", seed=29),
    Mutant("a store that failed is never used again", "stores.fallback", "        self._recover(local)\n", "", seed=6),
    Mutant("a busy store leaves this process as it was", "stores.fallback", "                results = (Invalidated(self._known.owe_next(tenant, len(requests))),) * len(requests)\n", "                results = (Invalidated(1),) * len(requests)\n"),
    Mutant("a change in memory does not change the version word", "stores.memory", "                self._versions[self._index_of(tenant)] += 1\n            return change.result", "            return change.result"),
    Mutant("the first of two flights takes the second one with it", "singleflight", "        self.flight, self.next_flight = self.next_flight, None", "        self.flight, self.next_flight = None, None", seed=46),
    Mutant("evaluations wait for their read though a value may be served meanwhile", "cache", "            flight.serve()\n", "            pass\n"),
    Mutant("waiters stay when the flight ends", "singleflight", "        flight.end(error_of(stored, now", "        (lambda error: None)(error_of(stored, now", seed=10),
)  # fmt: skip


@contextmanager
def mutated(mutant: Mutant | None) -> Iterator[tuple[Any, Any]]:
    """Give the modules `history` and `world` of a world with one defect; None gives one without."""
    importlib.import_module("tests.simulation.history")  # first everything that is not replaced
    saved = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    try:
        for name in MODULES:
            path = ROOT / ("src" if name.startswith("external_oms") else ".") / f"{name.replace('.', '/')}.py"
            source = path.read_text(encoding="utf-8")
            if mutant is not None and name == f"external_oms.{mutant.module}":
                if source.count(mutant.old) != 1:
                    raise LookupError(f"{mutant.name}: its text stands {source.count(mutant.old)} times in {path.name}")
                source = source.replace(mutant.old, mutant.new)
            module = types.ModuleType(name)
            module.__spec__ = importlib.util.spec_from_file_location(name, path)
            module.__file__ = str(path)
            sys.modules[name] = module
            exec(compile(source, str(path), "exec"), module.__dict__)  # noqa: S102 - our own source, with a defect
        yield sys.modules["tests.simulation.history"], sys.modules["tests.simulation.world"]
    finally:
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(saved)


def kill(mutant: Mutant, *, histories: int = MOST_HISTORIES) -> tuple[int, str] | None:
    """Play histories with a defect until one breaks a promise, from the seed of the mutant on.

    Args:
        mutant: The defect.
        histories: The most histories to play, >= 1; a count, so that a busy machine lets no defect survive.

    Returns:
        The seed of the history, and the promise; None where none of so many histories did.
    """
    with mutated(mutant) as (history, world):
        for seed in range(mutant.seed, mutant.seed + histories):
            try:
                history.play(world.Choices(seed=seed))
            except world.Violation as violation:
                return seed, str(violation)
            except Exception as error:  # noqa: BLE001 - a defect may also end in an error of any kind
                return seed, f"{type(error).__name__}: {error}"
    return None


def first_seed(mutant: Mutant) -> int | None:
    """Return the first seed of all whose history finds a defect."""
    logging.disable(logging.CRITICAL)
    found = kill(replace(mutant, seed=0))
    return None if found is None else found[0]
