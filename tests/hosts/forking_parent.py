"""A parent that evaluates, refreshes and is invalidated without rest, and forks at random instants.

Arguments: how many forks, and a seed. Each child answers its first evaluation, sees the next invalidation, and has its
event handlers run; the parent prints one JSON object about all of them. Settings: the environment.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

from openfeature import api
from openfeature.event import EventDetails, ProviderEvent

from external_oms import FLAG_KEY, ExternalOMSError, ExternalOMSProvider
from tests.support.waiting import PATIENCE_SECONDS, wait_until

CHILDREN_AT_ONCE = 2


def child(provider: ExternalOMSProvider, heard: threading.Event, out: int) -> None:
    """What a child does; writes its first answer's time in seconds, or what went wrong."""
    heard.clear()
    client = api.get_client()
    began = time.monotonic()
    details = client.get_boolean_details(FLAG_KEY, default_value=False)
    first_seconds = time.monotonic() - began
    problem = None if details.error_code is None else f"first answer: {details.error_code} {details.error_message}"
    generation = details.flag_metadata.get("generation", -1)

    def invalidated() -> bool:
        client.get_boolean_details(FLAG_KEY, default_value=False)
        return provider.state().generation > int(generation)

    if problem is None:
        try:
            wait_until(invalidated)
        except AssertionError:
            problem = f"no invalidation was seen after generation {generation}"
    if problem is None and not heard.wait(PATIENCE_SECONDS):
        problem = "no event handler ran"
    os.write(out, json.dumps([first_seconds, problem]).encode() + b"\n")


def fork_children(forks: int, dice: random.Random, live: Callable[[], None]) -> list[int]:
    """Fork so many children at random instants, a few at a time; how each ended."""
    living: set[int] = set()
    codes: list[int] = []
    for number in range(forks):
        time.sleep(dice.random() * 0.02)
        pid = os.fork()
        if pid == 0:
            how = signal.SIGUSR2
            try:
                live()
                how = signal.SIGUSR1
            finally:
                # Whatever happened, a child must not go on as a second parent. Ended by a signal and not by an exit:
                # what measures coverage saves at an exit, and has locks of its own that a busy parent may hold.
                os.kill(os.getpid(), how)
        living.add(pid)
        while len(living) >= (CHILDREN_AT_ONCE if number < forks - 1 else 1):
            ended, status = os.wait()
            living.discard(ended)
            codes.append(status)
    return codes


def main(forks: int, seed: int) -> None:
    """Fork so many times."""
    dice = random.Random(seed)
    heard, stop = threading.Event(), threading.Event()
    provider = ExternalOMSProvider()

    def hear(_details: EventDetails) -> None:
        heard.set()

    api.get_client().add_handler(ProviderEvent.PROVIDER_CONFIGURATION_CHANGED, hear)
    api.set_provider_and_wait(provider)
    client = api.get_client()

    def evaluate() -> None:
        while not stop.is_set():
            client.get_boolean_value(FLAG_KEY, default_value=False)

    def disturb() -> None:
        value = False
        while not stop.wait(0.02):
            value = not value
            try:
                provider.set_enabled(value)  # writes, invalidates, reads back
            except ExternalOMSError:
                traceback.print_exc()

    threads = [threading.Thread(target=target, daemon=True) for target in (evaluate, disturb)]
    for thread in threads:
        thread.start()
    reading, writing = os.pipe()
    codes = fork_children(forks, dice, lambda: child(provider, heard, writing))
    stop.set()
    os.close(writing)
    with os.fdopen(reading) as lines:
        reports = [json.loads(line) for line in lines]
    for thread in threads:  # a shutdown breaks a write off, and that is no failure of a fork
        thread.join(PATIENCE_SECONDS)
    api.shutdown()
    print(
        json.dumps(
            {
                "children": len(codes),
                "failed": sum(os.waitstatus_to_exitcode(code) != -signal.SIGUSR1 for code in codes),
                "problems": [problem for _, problem in reports if problem],
                "first_seconds": sorted(seconds for seconds, _ in reports),
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
