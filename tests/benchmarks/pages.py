"""Open pages as the server sees them: each holds its event stream and asks again for what the stream does not say.

Run as a process of its own, so that it takes no time from whoever measures: `python -m tests.benchmarks.pages PORT
COOKIE PAGES`. Says `open` when all streams are; then a line for each value heard; ends with its standard input.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import sys
import threading
import time

__all__ = ["main"]

EVERY_SECONDS = 10.0
"""As the page's script has it."""


def _listen(port: int, cookie: str, opened: threading.Semaphore) -> None:
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    line.request("GET", "/api/v1/events", headers={"Cookie": cookie})
    answer = line.getresponse()
    opened.release()
    while text := answer.readline():
        if text.startswith(b"data: "):
            heard = json.loads(text[6:])
            if heard["change"] == "value":
                print(f"{heard['state']['enabled']} {time.time()}", flush=True)


def _ask_again(port: int, cookie: str) -> None:
    time.sleep(random.random() * EVERY_SECONDS)
    while True:
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        line.request("GET", "/?parts=1", headers={"Cookie": cookie})
        answer = line.getresponse()
        answer.read()
        if answer.status != 200:
            os._exit(1)
        line.close()
        time.sleep(EVERY_SECONDS * (0.9 + random.random() / 5))


def main(port: int, cookie: str, pages: int) -> None:
    """Open so many pages and keep them open."""
    opened = threading.Semaphore(0)
    for _ in range(pages):
        threading.Thread(target=_listen, args=(port, cookie, opened), daemon=True).start()
        threading.Thread(target=_ask_again, args=(port, cookie), daemon=True).start()
    for _ in range(pages):
        opened.acquire()
    print("open", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
