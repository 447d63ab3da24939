"""A parent that evaluates and forks children by `multiprocessing`, each idle until it is told of a change.

It prints one JSON list: the first evaluation of each child as value, reason and generation. Settings: the environment.
"""

from __future__ import annotations

import json
import multiprocessing
import threading
from multiprocessing.connection import Connection

from openfeature import api
from openfeature.event import EventDetails, ProviderEvent

from external_oms import FLAG_KEY, ExternalOMSProvider
from tests.support.waiting import PATIENCE_SECONDS

CHILDREN = 3


def child(parent: Connection, heard: threading.Event) -> None:
    """Do nothing until it is told of a change, then evaluate once, and send what came of it."""
    heard.clear()
    parent.send("idle")
    heard.wait(PATIENCE_SECONDS)
    details = api.get_client().get_boolean_details(FLAG_KEY, default_value=False)
    parent.send([details.value, details.reason, details.flag_metadata.get("generation", -1)])


def main() -> None:
    """Fork the children, and print what they evaluate."""
    heard = threading.Event()

    def hear(_: EventDetails) -> None:
        heard.set()

    api.get_client().add_handler(ProviderEvent.PROVIDER_CONFIGURATION_CHANGED, hear)
    api.set_provider_and_wait(ExternalOMSProvider())
    assert api.get_client().get_boolean_details(FLAG_KEY, default_value=False).error_code is None
    context = multiprocessing.get_context("fork")
    children = []
    for _ in range(CHILDREN):
        here, there = context.Pipe()
        process = context.Process(target=child, args=(there, heard))
        process.start()
        children.append((here, process))
        here.recv()
    print("ready", flush=True)
    found = []
    for here, process in children:
        found.append(here.recv())
        process.join()
    api.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
