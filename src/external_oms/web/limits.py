"""Rate limits per minute and caller, and ended sessions; shared through Redis if the store is Redis.

`limits`, the engine of Flask-Limiter, is used directly: one counter serves Flask's views and `external_oms.webhook`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

from limits import RateLimitItemPerMinute
from limits.errors import ConfigurationError, StorageError
from limits.storage import MemoryStorage, Storage, storage_from_string
from limits.strategies import FixedWindowRateLimiter

from external_oms.problems import Problem, whole_seconds
from external_oms.settings import Settings

__all__ = ["Limits"]

REDIS_SECONDS = 0.5
"""How long a request waits for the counter in Redis, in seconds."""

RETRY_SECONDS = 10.0
"""How long this process counts by itself after Redis failed, in seconds."""

T = TypeVar("T")

logger = logging.getLogger("external_oms.web")


class Limits:
    """The counters of one application.

    Args:
        settings: Where to count, and under which prefix.
        wall: Seconds since the Unix epoch, by the clock that the counters use.
    """

    def __init__(self, settings: Settings, *, wall: Callable[[], float] = time.time) -> None:
        self._store = str(settings.store)
        self._prefix = settings.store_prefix
        self._session_seconds = settings.session_seconds
        self._wall = wall
        self.after_fork()
        _alive.add(self)

    def after_fork(self) -> None:
        """Count anew in a forked child, with no lock, thread or connection of the parent."""
        self._lock = threading.Lock()
        self._storages: tuple[Storage | None, Storage] | None = None
        self._failed_at: float | None = None

    def hit(self, what: str, who: str, *, per_minute: int) -> None:
        """Count a request.

        Args:
            what: What is requested.
            who: The caller: the name of an API key, an address.
            per_minute: How often the caller may, >= 1.

        Raises:
            Problem: 429 with Retry-After: too often.
        """
        self._use(lambda storage: self._limit(storage, what, who, per_minute, count=True))

    def check(self, what: str, who: str, *, per_minute: int) -> None:
        """Refuse where `hit` would, and count nothing.

        Raises:
            Problem: 429 with Retry-After: too often.
        """
        self._use(lambda storage: self._limit(storage, what, who, per_minute, count=False))

    def revoke(self, session_id: str) -> None:
        """Remember that a session has ended, for as long as a copy of its cookie could be used."""
        expiry = int(self._session_seconds) + 60
        shared, own = self._ready()
        own.incr(_revoked(session_id), expiry)
        if shared is not None:
            self._use(lambda storage: storage.incr(_revoked(session_id), expiry))

    def is_revoked(self, session_id: str) -> bool:
        """Return whether a session has ended, as far as the counters of this process or of Redis know."""
        return self._ready()[1].get(_revoked(session_id)) > 0 or self._use(
            lambda storage: storage.get(_revoked(session_id)) > 0
        )

    def _limit(self, storage: Storage, what: str, who: str, per_minute: int, *, count: bool) -> None:
        limiter, item = FixedWindowRateLimiter(storage), RateLimitItemPerMinute(per_minute)
        if not (limiter.hit if count else limiter.test)(item, what, who):
            seconds = limiter.get_window_stats(item, what, who).reset_time - self._wall()
            wait = whole_seconds(seconds)
            raise Problem(429, f"more than {per_minute} a minute; wait {wait} s", headers={"Retry-After": wait})

    def _use(self, work: Callable[[Storage], T]) -> T:
        shared, own = self._ready()
        if shared is None or (self._failed_at is not None and self._wall() < self._failed_at + RETRY_SECONDS):
            return work(own)
        try:
            result = work(shared)
        except StorageError:
            if self._failed_at is None:
                logger.warning("rate limits are counted per process: the counter in Redis does not answer")
            self._failed_at = self._wall()
            return work(own)
        if self._failed_at is not None:
            self._failed_at = None
            logger.warning("rate limits are counted in Redis again")
        return result

    def _ready(self) -> tuple[Storage | None, Storage]:
        """Return the shared counter, if there is one, and our own; made on first use, after a fork."""
        with self._lock:
            if self._storages is None:
                self._storages = (self._shared(), MemoryStorage())
            return self._storages

    def _shared(self) -> Storage | None:
        scheme, _, rest = self._store.partition("://")
        if scheme in {"memory", "sqlite"}:
            return None
        uri = f"{'redis+unix' if scheme == 'unix' else scheme}://{rest}"
        timeouts = {"socket_timeout": REDIS_SECONDS, "socket_connect_timeout": REDIS_SECONDS}
        try:
            storage = storage_from_string(uri, wrap_exceptions=True, key_prefix=f"{self._prefix}:limits", **timeouts)
        except (ConfigurationError, ValueError, StorageError):
            logger.warning("rate limits are counted per process: this form of Redis URL cannot be used for them")
            return None
        return storage if isinstance(storage, Storage) else None


def _revoked(session_id: str) -> str:
    return f"session-ended:{session_id}"


_alive: weakref.WeakSet[Limits] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for limits in tuple(_alive):
        limits.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
