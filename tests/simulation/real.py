"""A small fleet of real members over a real Redis: what the model says of many is checked on these few."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random

from external_oms.cache import Cache
from external_oms.clock import SYSTEM_CLOCK
from external_oms.config import Document, Reading
from external_oms.errors import ReadError
from external_oms.freshness import Windows
from external_oms.stores.redis import RedisStore
from external_oms.workers import Workers

__all__ = ["Api", "members_of"]


class Api:
    """The config API of all tenants, in this process: it takes its time, and counts.

    Args:
        seconds: How long an answer takes.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.fails: ReadError | None = None
        self.reads: list[tuple[float, str]] = []
        self._never = threading.Event()

    def __call__(self, tenant: str, _etag: str | None) -> Reading:
        self.reads.append((SYSTEM_CLOCK.monotonic(), tenant))
        self._never.wait(self.seconds)  # an answer's time, not luck's
        if self.fails is not None:
            raise self.fails
        return Reading(Document(enabled=True), None)


@contextmanager
def members_of(
    url: str,
    *,
    members: int,
    tenants: tuple[str, ...],
    api: Api,
    windows: Windows,
    timeout_seconds: float,
    bound_seconds: float,
    seed: int,
) -> Iterator[list[tuple[Cache, RedisStore]]]:
    """So many members, each with a store, a cache and threads of its own, reading in the background."""
    with ExitStack() as stack:
        made = []
        for number in range(members):
            store = RedisStore(url, tenants=tenants, bound_seconds=bound_seconds, random=Random(f"{seed}-{number}"))
            cache = Cache(
                tenants=tenants,
                store=store,
                source=api,
                windows=windows,
                timeout_seconds=timeout_seconds,
                clock=SYSTEM_CLOCK,
                random=Random(f"{number}-{seed}").random,
                background=True,
                runner=lambda poll, poll_seconds: Workers(
                    readers=16, clock=SYSTEM_CLOCK, poll=poll, poll_seconds=poll_seconds
                ),
            )
            stack.callback(cache.close)
            made.append((cache, store))
        for cache, _ in made:
            cache.start()
        yield made
