"""Rate limits per minute and caller, and ended sessions; shared through Redis or a file, as the store is.

`limits`, the engine of Flask-Limiter, is used directly: one counter serves Flask's views and `external_oms.webhook`.
With a file store, logins, writes and ended sessions are counted in a file beside it, for all processes of the host;
deliveries, which are many, are counted per process.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from limits import RateLimitItemPerMinute
from limits.errors import ConfigurationError, StorageError
from limits.storage import MemoryStorage, Storage, storage_from_string
from limits.strategies import FixedWindowRateLimiter

from external_oms.forks import call_after_fork
from external_oms.problems import Problem, whole_seconds
from external_oms.settings import Settings

__all__ = ["FileStorage", "Limits"]

REDIS_SECONDS = 0.5
"""How long a request waits for the shared counter, in seconds."""

RETRY_SECONDS = 10.0
"""How long this process counts by itself after the shared counter failed, in seconds."""

_FREQUENT = frozenset({"delivery", "refused"})
"""Counted in Redis or in this process, and in no file."""

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
        call_after_fork(self)

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
        self._limit(what, who, per_minute, count=True)

    def check(self, what: str, who: str, *, per_minute: int) -> None:
        """Refuse where `hit` would, and count nothing.

        Raises:
            Problem: 429 with Retry-After: too often.
        """
        self._limit(what, who, per_minute, count=False)

    def revoke(self, session_id: str) -> None:
        """Remember that a session has ended, for as long as a copy of its cookie could be used."""
        expiry = int(self._session_seconds) + 60
        self._use_own(lambda storage: storage.incr(_revoked(session_id), expiry))
        if self._ready()[0] is not None:
            self._use(lambda storage: storage.incr(_revoked(session_id), expiry))

    def is_revoked(self, session_id: str) -> bool:
        """Return whether a session has ended, as far as this process or the shared counter knows."""

        def has_it(storage: Storage) -> bool:
            return storage.get(_revoked(session_id)) > 0

        return self._use_own(has_it) or self._use(has_it)

    def _limit(self, what: str, who: str, per_minute: int, *, count: bool) -> None:
        item = RateLimitItemPerMinute(per_minute)

        def refuse_over(storage: Storage) -> None:
            limiter = FixedWindowRateLimiter(storage)
            if not (limiter.hit if count else limiter.test)(item, what, who):
                wait = whole_seconds(limiter.get_window_stats(item, what, who).reset_time - self._wall())
                raise Problem(429, f"more than {per_minute} a minute; wait {wait} s", headers={"Retry-After": wait})

        self._use(refuse_over, is_frequent=what in _FREQUENT)

    def _use(self, work: Callable[[Storage], T], *, is_frequent: bool = False) -> T:
        shared, _ = self._ready()
        if is_frequent and isinstance(shared, FileStorage):
            return self._use_own(work)
        if shared is None or (self._failed_at is not None and self._wall() < self._failed_at + RETRY_SECONDS):
            return self._use_own(work)
        try:
            result = work(shared)
        except (StorageError, ValueError):  # ValueError: another program has put a text in the place of a count
            if self._failed_at is None:
                logger.warning("rate limits are counted per process: the shared counter does not answer")
            self._failed_at = self._wall()
            return self._use_own(work)
        if self._failed_at is not None:
            self._failed_at = None
            logger.warning("rate limits are counted together again")
        return result

    def _use_own(self, work: Callable[[Storage], T]) -> T:
        _, own = self._ready()
        with self._lock:  # two threads of `MemoryStorage` may start one and the same timer, which is an error
            return work(own)

    def _ready(self) -> tuple[Storage | None, Storage]:
        """Return the shared counter, if there is one, and our own; made on first use, after a fork."""
        with self._lock:
            if self._storages is None:
                self._storages = (self._shared(), MemoryStorage())
            return self._storages

    def _shared(self) -> Storage | None:
        scheme, _, rest = self._store.partition("://")
        if scheme == "memory":
            return None
        if scheme == "sqlite":
            return FileStorage(Path(f"{self._store.removeprefix('sqlite:///')}-limits"), wall=self._wall)
        uri = f"{'redis+unix' if scheme == 'unix' else scheme}://{rest}"
        timeouts = {"socket_timeout": REDIS_SECONDS, "socket_connect_timeout": REDIS_SECONDS}
        try:
            storage = storage_from_string(uri, wrap_exceptions=True, key_prefix=f"{self._prefix}:limits", **timeouts)
        except (ConfigurationError, ValueError, StorageError):
            logger.warning("rate limits are counted per process: this form of Redis URL cannot be used for them")
            return None
        return storage if isinstance(storage, Storage) else None


class FileStorage(Storage):
    """Counters in a SQLite file, for the processes of one host; each use opens it, since uses are rare.

    Args:
        path: The file, in a directory that only its owner can write to, as the store demands.
        wall: Seconds since the Unix epoch.
    """

    STORAGE_SCHEME = None

    def __init__(self, path: Path, *, wall: Callable[[], float]) -> None:
        super().__init__(wrap_exceptions=True)
        self._path = path
        self._wall = wall

    @property
    def base_exceptions(self) -> tuple[type[Exception], ...]:
        """The errors that become a `StorageError`."""
        return sqlite3.Error, OSError

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        with suppress(FileExistsError):
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        connection = sqlite3.connect(self._path, timeout=REDIS_SECONDS, isolation_level=None)
        try:
            connection.execute("PRAGMA synchronous = OFF")  # a count that is lost in a power failure does not matter
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("CREATE TABLE IF NOT EXISTS counts (key TEXT PRIMARY KEY, count INTEGER, ends REAL)")
            connection.execute("DELETE FROM counts WHERE ends <= ?", (self._wall(),))
            yield connection
            connection.execute("COMMIT")
        finally:
            connection.close()

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Add to a counter, which begins with a window of `expiry` seconds, and return it."""
        with self._opened() as connection:
            connection.execute(
                "INSERT INTO counts VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET count = count + excluded.count",
                (key, amount, self._wall() + expiry),
            )
            return int(connection.execute("SELECT count FROM counts WHERE key = ?", (key,)).fetchone()[0])

    def get(self, key: str) -> int:
        """Return a counter, 0 where there is none."""
        return self._read("count", key)

    def get_expiry(self, key: str) -> float:
        """Return when the window of a counter ends."""
        return self._read("CAST(ends + 1 AS INTEGER)", key) or self._wall()

    def _read(self, column: str, key: str) -> int:
        """Return a number of a counter, 0 where there is none; takes no lock for writing, since pages read often."""
        if not self._path.exists() or self._path.stat().st_size == 0:  # nothing was counted yet
            return 0
        with closing(sqlite3.connect(self._path, timeout=REDIS_SECONDS)) as connection:
            query = f"SELECT {column} FROM counts WHERE key = ? AND ends > ?"  # noqa: S608 - columns of this module
            row = connection.execute(query, (key, self._wall())).fetchone()
        return 0 if row is None else int(row[0])

    def check(self) -> bool:
        """Return whether the file can be used."""
        with self._opened():
            return True

    def reset(self) -> int | None:
        """Drop every counter."""
        with self._opened() as connection:
            return connection.execute("DELETE FROM counts").rowcount

    def clear(self, key: str) -> None:
        """Drop a counter."""
        with self._opened() as connection:
            connection.execute("DELETE FROM counts WHERE key = ?", (key,))


def _revoked(session_id: str) -> str:
    return f"session-ended:{session_id}"
