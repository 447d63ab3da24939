"""How often is too often: counted per minute and asker, over the fleet where the store is Redis.

Flask-Limiter's own engine (`limits`) is used without its Flask half, which would take the configuration and the routes
of the application that we are mounted on for its own, and cannot count by who turned out to ask.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress

from limits import RateLimitItemPerMinute
from limits.errors import ConfigurationError, StorageError
from limits.storage import MemoryStorage, StorageTypes, storage_from_string
from limits.strategies import FixedWindowRateLimiter

from external_oms.settings import Settings
from external_oms.web.problems import Problem, whole_seconds

__all__ = ["Limits"]

REDIS_SECONDS = 0.5
"""How long Redis may take to count: a request is never held longer for the sake of a limit."""

REST_SECONDS = 10.0
"""How long this process counts by itself after Redis failed to."""

_logger = logging.getLogger(__name__)


class Limits:
    """Counters of one app.

    Args:
        settings: Where to count, and under which prefix.
        wall: Seconds since the Unix epoch, by the clock that the counters use.
    """

    def __init__(self, settings: Settings, *, wall: Callable[[], float] = time.time) -> None:
        self._store = settings.store
        self._prefix = settings.store_prefix
        self._wall = wall
        self._lock = threading.Lock()
        self._counters: tuple[FixedWindowRateLimiter, ...] = ()
        self._here: dict[tuple[str, str], tuple[float, Iterator[int]]] = {}
        self._rests_until = 0.0
        _alive.add(self)

    def take(self, what: str, who: str, *, per_minute: int) -> None:
        """Count one more of something that somebody does.

        Args:
            what: What they do.
            who: Who they are: a key's name, an address.
            per_minute: How often they may, >= 1.

        Raises:
            Problem: 429 with Retry-After: too often.
        """
        self._admit(FixedWindowRateLimiter.hit, what, who, per_minute)

    def check(self, what: str, who: str, *, per_minute: int) -> None:
        """Refuse where `take` would, and count nothing: for what turns out to count or not only when it is done.

        Args:
            what: What they do.
            who: Who they are.
            per_minute: How often they may, >= 1.

        Raises:
            Problem: 429 with Retry-After: too often.
        """
        self._admit(FixedWindowRateLimiter.test, what, who, per_minute)

    def count(self, what: str, who: str, *, per_minute: int) -> None:
        """Count what `check` let pass; it is done, so nothing is refused any more."""
        with suppress(Problem):
            self.take(what, who, per_minute=per_minute)

    def _admit(self, admits: Callable[..., bool], what: str, who: str, per_minute: int) -> None:
        item = RateLimitItemPerMinute(per_minute)
        shared, own = self._ready()
        if self._wall() >= self._rests_until:
            try:
                self._refuse_unless(admits, shared, item, what, who)
            except (StorageError, ValueError):  # ValueError: another program has put a text in the place of a count
                self._rests_until = self._wall() + REST_SECONDS
                _logger.warning("rate limits are counted per process: the shared counter cannot be used")
            else:
                return
        self._refuse_unless(admits, own, item, what, who)

    def take_here(self, what: str, who: str, *, per_minute: int) -> None:
        """As `take`, for what is asked on every order: each process counts for itself, and it costs a microsecond.

        `limits` would take twenty of them, and with Redis a request over the network.
        """
        minute, spent = divmod(self._wall(), 60.0)
        kept = self._here.get((what, who))
        if kept is None or kept[0] != minute:
            kept = self._here[what, who] = (minute, itertools.count(1))
        if next(kept[1]) > per_minute:
            raise _too_often(per_minute, 60.0 - spent)

    def _refuse_unless(
        self,
        admits: Callable[..., bool],
        counter: FixedWindowRateLimiter,
        item: RateLimitItemPerMinute,
        what: str,
        who: str,
    ) -> None:
        if not admits(counter, item, what, who):
            raise _too_often(item.amount, counter.get_window_stats(item, what, who).reset_time - self._wall())

    def _ready(self) -> tuple[FixedWindowRateLimiter, FixedWindowRateLimiter]:
        """The shared counter and our own, made on first use: a parent that only forks starts no thread for them."""
        with self._lock:
            if not self._counters:
                alone = FixedWindowRateLimiter(MemoryStorage())
                shared = self._shared()
                self._counters = (alone if shared is None else FixedWindowRateLimiter(shared), alone)
            return self._counters[0], self._counters[1]

    def _shared(self) -> StorageTypes | None:
        scheme, _, rest = self._store.partition("://")
        if scheme in {"memory", "sqlite"}:
            return None
        uri = f"{'redis+unix' if scheme == 'unix' else scheme}://{rest}"
        patience = {"socket_timeout": REDIS_SECONDS, "socket_connect_timeout": REDIS_SECONDS}
        try:
            return storage_from_string(uri, wrap_exceptions=True, key_prefix=f"{self._prefix}:limits", **patience)
        except (ConfigurationError, ValueError, StorageError):
            _logger.warning("rate limits are counted per process: this form of Redis URL cannot be used for them")
            return None

    def after_fork(self) -> None:
        """In a forked child: count anew, with no lock, thread or connection of the parent."""
        self._lock = threading.Lock()
        self._counters = ()


_alive: weakref.WeakSet[Limits] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for limits in tuple(_alive):
        limits.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _too_often(per_minute: int, wait_seconds: float) -> Problem:
    wait = whole_seconds(wait_seconds)
    return Problem(429, f"more than {per_minute} a minute; wait {wait} s", headers={"Retry-After": wait})
