"""A parent that evaluates and forks children by `multiprocessing`, each idle until the parent is sent a line.

It prints one JSON list: the first evaluation of each child as value, reason and generation. Settings: the environment.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from multiprocessing.connection import Connection

from openfeature import api

from external_oms import FLAG_KEY, ExternalOMSProvider

CHILDREN = 3


def child(parent: Connection) -> None:
    """Wait for a word, evaluate once, and send what came of it."""
    parent.recv()
    details = api.get_client().get_boolean_details(FLAG_KEY, default_value=False)
    parent.send([details.value, details.reason, details.flag_metadata.get("generation", -1)])


def main() -> None:
    """Fork the children, and have them evaluate when told."""
    api.set_provider_and_wait(ExternalOMSProvider())
    assert api.get_client().get_boolean_details(FLAG_KEY, default_value=False).error_code is None
    context = multiprocessing.get_context("fork")
    children = []
    for _ in range(CHILDREN):
        here, there = context.Pipe()
        process = context.Process(target=child, args=(there,))
        process.start()
        children.append((here, process))
    print("ready", flush=True)
    sys.stdin.readline()
    found = []
    for here, process in children:
        here.send("evaluate")
        found.append(here.recv())
        process.join()
    api.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
