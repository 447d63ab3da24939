"""Run by `make steady`: all tests ten times, every other time while busy loops hold the processor; no test may fail.

Prints one line for each run, and ends at the first run that fails, with what it printed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

RUNS = 10
RUN_SECONDS = 1200
"""When a run is given up; the busy loops end by themselves at the same time."""

LOOP = f"import time; end = time.monotonic() + {RUN_SECONDS}\nwhile time.monotonic() < end: pass"


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """So many processes that do nothing but use a core."""
    processes = [subprocess.Popen([sys.executable, "-c", LOOP]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(number: int) -> None:
    loops = (os.cpu_count() or 1) if number % 2 == 0 else 0
    began = time.monotonic()
    with busy(loops):
        done = subprocess.run(
            ["make", "test"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )
    groups = ", then ".join(re.findall(r"^=+ (.* in [\d.]+s)(?: \(.*\))? =+$", done.stdout, re.MULTILINE))
    with_loops = f" beside {loops} busy loops" if loops else ""
    print(f"run {number} of {RUNS}{with_loops}: {groups or 'no test'}; {time.monotonic() - began:.0f} s", flush=True)
    if done.returncode != 0:
        sys.exit(done.stdout)


if __name__ == "__main__":
    for number in range(1, RUNS + 1):
        run(number)
