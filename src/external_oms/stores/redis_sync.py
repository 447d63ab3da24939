"""The one background thread of the Redis store: hears that entries change, and pulls them.

A message on the channel is only a hint that an entry changed; the thread then pulls the entry. So a message that is
lost, forged or malformed can delay a change or cost a pull, and nothing else. Certainty comes from pulling every entry
in a fixed rhythm, and after each subscription, because a subscriber misses what is published while it is away.

A TCP connection that went deaf raises no error. Each pull of everything therefore sends a PING over the subscription,
and a subscription whose PONG has not come by the next one is replaced.

How the bound is kept, as parts of it: everything is pulled after at most 0.7, and an operation that hangs is given up
after 0.2 (`timeout_of`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from random import Random

from external_oms.errors import StoreError
from external_oms.stores.redis_client import FAILURES, PubSub

__all__ = ["Sync", "timeout_of"]

logger = logging.getLogger("external_oms")

TIMEOUT = 0.2
"""The longest wait for an answer of Redis, as a part of the bound."""

TIMEOUT_CAP_SECONDS = 1.0
"""The longest wait for an answer of Redis in any case: a request that changes something waits for it."""

PULL = (0.5, 0.7)
"""When everything is pulled again, as parts of the bound; drawn in between, so that a fleet does not pull at once."""

RETRY = (0.04, 0.2)
"""When to try again while Redis does not answer, as parts of the bound."""

SLICE_SECONDS = 0.1
"""The longest wait for a message: how long `close` waits for a thread that has nothing to do."""

SUBSCRIBE_SECONDS = 0.05
"""How long to wait for the confirmation of a subscription before everything is pulled without it."""

CLOSE_SECONDS = 0.8
"""The longest that `close` waits for the thread."""

DRAIN = 1000
"""The most messages that are taken between two pulls: a flood of them must not keep the thread from pulling."""


def timeout_of(bound_seconds: float) -> float:
    """Return how long connecting to Redis and each operation may take, in seconds."""
    return min(TIMEOUT_CAP_SECONDS, TIMEOUT * bound_seconds)


class Sync:
    """The thread of one process.

    Args:
        subscribe: Returns a new subscription to the channel; raises `StoreError`.
        hear: Takes the data of a message; returns whether an entry is to be pulled.
        pull: Pulls what was heard, or everything where its argument is true; raises `StoreError`.
        bound_seconds: The longest that a change whose message was lost stays unseen, > 0.
        random: Spreads the members of a fleet.

    Attributes:
        wake: Called when Redis stops or begins to answer.
        problem: Why the last pull failed; empty where it did not fail.
        first_pull: Set once the first pull of everything in this process has ended, well or not.
    """

    def __init__(
        self,
        *,
        subscribe: Callable[[], PubSub],
        hear: Callable[[bytes | str], bool],
        pull: Callable[[bool], None],
        bound_seconds: float,
        random: Random,
    ) -> None:
        self._subscribe = subscribe
        self._hear = hear
        self._pull = pull
        self._bound_seconds = bound_seconds
        self._random = random
        self._wanted = False
        self.wake: Callable[[], None] = lambda: None
        self.after_fork()

    def after_fork(self) -> None:
        """Forget the thread of the parent."""
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.first_pull = threading.Event()
        self.problem = ""

    def call_wake(self) -> None:
        """Call the present `wake`, which may be set after this object is made."""
        self.wake()

    def start(self) -> None:
        """Start the thread where it does not run; cheap where it does."""
        self._wanted = True
        self.keep_running()

    def keep_running(self) -> None:
        """Start the thread again where it is wanted and does not run, because the process had no thread to spare."""
        with self._lock:
            if not self._wanted or (self._thread is not None and self._thread.is_alive()):
                return
            stop = threading.Event()
            thread = threading.Thread(target=self._run, args=(stop,), name="external-oms-redis", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                self.problem = "this process cannot start the thread that follows Redis; raise its limit of threads"
                return
            self._thread, self._stop = thread, stop

    def close(self) -> None:
        """End the thread within a second; only `start` starts it again."""
        with self._lock:
            self._wanted = False
            thread, self._thread = self._thread, None
            self._stop.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(CLOSE_SECONDS)

    def _run(self, stop: threading.Event) -> None:
        failed_at = float("-inf")
        while not stop.is_set():
            try:
                self._follow(stop)
            except Exception as error:  # noqa: BLE001 - without this thread the bound is gone, so it survives everything
                self._fail(error)
            now = time.monotonic()
            if now - failed_at < self._bound_seconds:  # the first time at once: it may have been this one connection
                stop.wait(self._within(RETRY))
            failed_at = now

    def _follow(self, stop: threading.Event) -> None:
        """Hear and pull until the subscription is lost; raises what a pull raises."""
        subscription = self._subscribe()
        try:
            due, is_awaiting_pong = time.monotonic() + SUBSCRIBE_SECONDS, False
            while not stop.is_set():
                try:
                    types = self._take_messages(subscription, min(SLICE_SECONDS, max(0.0, due - time.monotonic())))
                except FAILURES:
                    self._pull_everything()
                    return
                is_awaiting_pong &= "pong" not in types
                if "subscribe" not in types and time.monotonic() < due:
                    if "message" in types:
                        self._pull(False)
                    continue
                self._pull_everything()
                if is_awaiting_pong and "subscribe" not in types:
                    return
                try:
                    subscription.ping()
                except FAILURES:
                    return
                due, is_awaiting_pong = time.monotonic() + self._within(PULL), True
        finally:
            with suppress(*FAILURES):
                subscription.close()

    def _take_messages(self, subscription: PubSub, timeout_seconds: float) -> set[str]:
        """Wait for a message and take all that are there; return their types, `message` only for an entry to pull."""
        types: set[str] = set()
        for _ in range(DRAIN):
            message = subscription.get_message(timeout=timeout_seconds)
            if message is None:
                break
            timeout_seconds = 0.0
            if message["type"] != "message" or self._hear(message["data"]):
                types.add(message["type"])
        return types

    def _pull_everything(self) -> None:
        self._pull(True)
        self.first_pull.set()
        if self.problem:
            self.problem = ""
            self.wake()

    def _fail(self, error: Exception) -> None:
        if isinstance(error, (StoreError, *FAILURES)):
            problem = str(error) if isinstance(error, StoreError) else "Redis does not answer"
        else:
            problem = "following Redis failed; this is a defect of external_oms, please report it"
            if self.problem != problem:
                logger.error(problem, exc_info=error)
        news, self.problem = not self.problem, problem
        self.first_pull.set()
        if news:
            self.wake()

    def _within(self, parts: tuple[float, float]) -> float:
        return self._bound_seconds * self._random.uniform(*parts)
