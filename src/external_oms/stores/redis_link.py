"""The line to Redis: bounded in time, closed to all callers while Redis is away, and quiet about it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import redis
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from external_oms.clock import Clock
from external_oms.stores.base import Health
from external_oms.stores.redis_client import FAILURES, Client
from external_oms.stores.redis_scripts import Script
from external_oms.stores.redis_wire import Reply

__all__ = ["Away", "Link", "Refused", "plain"]

logger = logging.getLogger("external_oms")

QUIET_SECONDS = 60.0
"""How long a line stays unlogged that would repeat the last one: a link that flaps must not fill the log."""

_COMPLAINTS: tuple[tuple[type[RedisError], str], ...] = (
    (AuthenticationError, "refuses the credentials; check the user and the password in the setting `store`"),
    (NoPermissionError, "denies its user a command, a key or a channel; see the documentation for the ACL it needs"),
    (ReadOnlyError, "is a read-only replica; name the primary, or use redis+sentinel://"),
    (OutOfMemoryError, "has no memory left; raise maxmemory"),
    (BusyLoadingError, "is loading its file into memory; it will come by itself"),
)


class Away(Exception):
    """Redis cannot be asked now; never leaves the Redis store, which then works alone."""


class Refused(Away):
    """Redis answered this question with an error; others it may answer."""


class Link:
    """One process's line to Redis.

    After a failure it is *down*: callers get `Away` at once. One thread, the one that keeps the mirror in step, goes on
    trying by `probing` and opens it again.

    Args:
        make: Makes a client; called again after a fork.
        owned: Whether the client is ours to close.
        clock: What tells the time.
        failed: Called, from any thread, when the link goes down.
    """

    def __init__(self, make: Callable[[], Client], *, owned: bool, clock: Clock, failed: Callable[[], None]) -> None:
        self._make = make
        self._owned = owned
        self._clock = clock
        self._failed = failed
        self._problem = ""
        self._said_at = float("-inf")
        self._said = False
        self._unsaid = 0
        self.after_fork()

    def after_fork(self) -> None:
        """Forget the parent's client: its sockets are closed in the child alone, nothing is sent over them."""
        self._lock = threading.Lock()
        self._client: Client | None = None

    @property
    def is_up(self) -> bool:
        """Whether Redis is asked at all."""
        return not self._problem

    def health(self) -> Health:
        """Whether Redis answers, and what to do where it does not."""
        return Health(ok=not self._problem, problem=self._problem)

    def client(self) -> Client:
        """The client, made on first use: a cluster's asks the servers for their slots when it is made."""
        client = self._client
        if client is None:
            made = self._make()
            with self._lock:
                client = self._client = self._client or made
        return client

    def call(self, work: Callable[[Client], object], *, probing: bool = False, aside: bool = False) -> Reply:
        """Ask Redis something.

        Args:
            work: What to ask, given the client.
            probing: Whether to ask although the link is down.
            aside: Whether nothing that is served rests on the answer, so that an error in it is no reason to go down.

        Raises:
            Away: Redis cannot be asked, or did not answer as it should.
        """
        if self._problem and not probing:
            raise Away
        try:
            return plain(work(self.client()))
        except FAILURES as error:
            if aside and isinstance(error, ResponseError):
                raise Refused from error
            self.fail(error)
            raise Away from error

    def is_cluster(self) -> bool:
        """Whether the keys are spread over several servers; raises `Away` like `call`."""
        try:
            return hasattr(self.client(), "get_node_from_key")  # only a cluster's client has it
        except FAILURES as error:
            self.fail(error)
            raise Away from error

    def node_of(self, key: str) -> str:
        """The name of the server that keeps a key, in a cluster; empty where there is only one."""
        where = getattr(self._client, "get_node_from_key", None)
        if where is None:
            return ""
        try:
            return str(where(key).name)
        except FAILURES:  # the slot is not served now: the call that follows says so
            return ""

    def run(
        self, script: Script, keys: Sequence[str], args: Sequence[str], *, probing: bool = False, aside: bool = False
    ) -> Reply:
        """Run a script; raises `Away` like `call`."""

        def work(client: Client) -> object:
            try:
                return client.evalsha(script.sha, len(keys), *keys, *args)
            except NoScriptError:  # the server is new, or was restarted
                return client.eval(script.text, len(keys), *keys, *args)

        return self.call(work, probing=probing, aside=aside)

    def run_all(self, script: Script, calls: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[Reply]:
        """Run a script for several keys and arguments, in one round trip where there is one server.

        A cluster's pipeline takes no EVALSHA, so there they run one after the other. Raises `Away` like `call`.
        """
        first = [self.run(script, *call, probing=True) for call in calls[:1]]  # and the server knows the script
        rest = calls[1:]
        if not rest:
            return first
        if self.is_cluster():
            return first + [self.run(script, *call, probing=True) for call in rest]

        def work(client: Client) -> object:
            pipeline = client.pipeline(transaction=False)
            for keys, args in rest:
                pipeline.evalsha(script.sha, len(keys), *keys, *args)
            return pipeline.execute()

        replies = self.call(work, probing=True)
        return first + (replies if isinstance(replies, list) else [replies])

    def fail(self, error: Exception) -> None:
        """Take the link down, for this reason."""
        problem = f"Redis {_complaint(error)}. Until then this process works from memory, alone"
        with self._lock:
            first, self._problem = not self._problem, problem
            line = self._line(problem, first=first)
        if line:
            logger.warning(line)
        if first:
            self._failed()

    def _line(self, problem: str, *, first: bool) -> str:
        """What to log of a failure: one line per outage, and one a minute where outages follow each other."""
        now = self._clock.monotonic()
        self._unsaid += first
        if self._said or now - self._said_at < QUIET_SECONDS:
            return ""
        outages, self._unsaid = self._unsaid, 0
        self._said, self._said_at = True, now
        return problem if outages <= 1 else f"{problem} ({outages} outages since the last such line)"

    def restore(self) -> None:
        """Open the link again: Redis answers and the mirror is in step."""
        with self._lock:
            said, self._said, self._problem = self._said, False, ""
        if said:
            logger.info("Redis answers again; what this process missed and owed is settled")

    def close(self) -> None:
        """Close the client; a later use makes a new one."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None and self._owned:
            try:
                client.close()
            except FAILURES:
                logger.debug("closing the client of Redis failed", exc_info=True)


def _complaint(error: Exception) -> str:
    for kind, complaint in _COMPLAINTS:
        if isinstance(error, kind):
            return complaint
    if isinstance(error, (redis.ConnectionError, redis.TimeoutError, OSError)):
        return "does not answer; check that it runs and can be reached as the setting `store` says"
    if isinstance(error, FAILURES) and not isinstance(error, ValueError):
        return f"answers with an error ({type(error).__name__}); see its log"
    return "holds something under this prefix that is not ours; choose another `store_prefix`"


def plain(reply: object) -> Reply:
    """An answer with its bytes as text, whether or not the client decodes.

    Raises:
        ResponseError: An answer in a pipeline was an error.
    """
    if isinstance(reply, Exception):
        raise reply
    if isinstance(reply, bytes):
        return reply.decode(errors="replace")
    if isinstance(reply, (list, tuple)):
        return [plain(part) for part in reply]
    return None if reply is None else str(reply)
