"""Run the simulation with fresh seeds: `python -m tests.simulation --seconds 60`.

Prints how many histories were played and how many steps they took. The first history that breaks a promise is made
smaller and told step by step, and the exit status is 1; `--seed` plays one history again. `--mutants` searches from the
first seed on for a history that finds each planted defect, and prints its seed, which belongs into `mutants.py`.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import secrets
import sys
import time

from tests.simulation.mutants import MUTANTS, first_seed
from tests.simulation.runs import BATCH, Report, broken, shrink, tell, work
from tests.simulation.world import Choices


def explain(seed: int) -> None:
    """Make the history of a seed smaller, and tell it."""
    choices = Choices(seed=seed)
    promise = broken(choices)
    if not promise:
        print(f"seed {seed}: every promise holds")
        return
    smaller = shrink(choices.made, lambda given: broken(Choices(given)) == promise, seconds=30)
    story, end = tell(smaller)
    print(f"seed {seed}, made smaller from {len(choices.made)} choices to {len(smaller)}:")
    print("\n".join(f"  {line}" for line in story))
    print(f"  {end}")


def main() -> int:
    """Play until the time is over or a promise is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, in seconds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many processes")
    parser.add_argument("--seed", type=int, help="play the history of this seed alone")
    parser.add_argument("--mutants", action="store_true", help="print the seeds that find the planted defects")
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if asked.seed is not None:
        explain(asked.seed)
        return 0
    if asked.mutants:
        with multiprocessing.get_context("spawn").Pool(asked.jobs) as pool:
            for mutant, seed in zip(MUTANTS, pool.imap(first_seed, MUTANTS), strict=True):
                print(f"{seed}: {mutant.name}", flush=True)
        return 0
    began, histories, steps = time.monotonic(), 0, 0
    first = secrets.randbits(40)
    print(f"first seed {first}")
    with multiprocessing.get_context("spawn").Pool(asked.jobs) as pool:
        pending: list[multiprocessing.pool.AsyncResult[Report]] = []
        while (left := began + asked.seconds - time.monotonic()) > 0 or pending:
            while left > 0 and len(pending) < 2 * asked.jobs:
                pending.append(pool.apply_async(work, (first, left)))
                first += BATCH
            played, taken, seed = pending.pop(0).get()
            histories, steps = histories + played, steps + taken
            if sys.stderr.isatty():
                print(f"\r{histories:,} histories, {steps:,} steps", end="", file=sys.stderr, flush=True)
            if seed is not None:
                pool.terminate()
                explain(seed)
                return 1
    seconds = time.monotonic() - began
    print(f"{histories:,} histories, {steps:,} steps, {seconds:.0f} s: every promise holds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
