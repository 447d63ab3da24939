"""A process that evaluates without rest until it is sent a line; then it prints what it was answered.

It prints one JSON list of answers, each the fields of `tests.support.storms.Answer`. Settings: the environment.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import astuple

from openfeature import api

from external_oms import FLAG_KEY, ExternalOMSProvider
from tests.support.storms import Answer, Answers

PAUSE_SECONDS = 0.002


def _set_at_end_of_line(ended: threading.Event) -> None:
    sys.stdin.readline()
    ended.set()


def main() -> None:
    """Evaluate, and print the answers."""
    api.set_provider_and_wait(ExternalOMSProvider())
    client = api.get_client()
    answers = Answers()
    ended = threading.Event()
    threading.Thread(target=_set_at_end_of_line, args=(ended,), daemon=True).start()
    print("ready", flush=True)
    while not ended.wait(PAUSE_SECONDS):
        began = time.time()
        details = client.get_boolean_details(FLAG_KEY, default_value=False)
        answers.add(Answer.of(began, details.value, dict(details.flag_metadata), failed=details.error_code is not None))
    api.shutdown()
    print(json.dumps([astuple(answer) for answer in answers.kept]))


if __name__ == "__main__":
    main()
