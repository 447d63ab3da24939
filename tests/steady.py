"""Run by `make steady`: all tests ten times, every other time while busy loops hold the processor; no test may fail.

Prints one line for each run, and ends at the first run that fails, with what it printed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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


def make_test() -> tuple[int, str]:
    """The exit status of `make test`, and what it printed; nothing of it goes on afterwards."""
    with subprocess.Popen(
        ["make", "test"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=RUN_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, printed


def run(number: int) -> None:
    loops = (os.cpu_count() or 1) if number % 2 == 0 else 0
    began = time.monotonic()
    with busy(loops):
        status, printed = make_test()
    groups = ", then ".join(re.findall(r"^=+ (.* in [\d.]+s)(?: \(.*\))? =+$", printed, re.MULTILINE))
    with_loops = f" beside {loops} busy loops" if loops else ""
    print(f"run {number} of {RUNS}{with_loops}: {groups or 'no test'}; {time.monotonic() - began:.0f} s", flush=True)
    if status != 0:
        sys.exit(printed)


if __name__ == "__main__":
    for number in range(1, RUNS + 1):
        run(number)
