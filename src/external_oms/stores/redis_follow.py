"""Hurry and certainty: one thread hears what the fleet tells, one looks for what was never told. Both are daemons.

The *listener* holds the subscription. redis-py does not notice a connection that has gone deaf: a PING that is not
answered in time is the sign, and the connection is replaced.

The *poller* compares all stamps with Redis, in one round trip, in a jittered rhythm; at once after every
(re)subscription, for what was told meanwhile is lost; and while Redis is away it alone goes on trying.

How the bound is kept, as fractions of it: a look is due after at most 0.75, a connection that swallows everything is
given up after at most 0.2 (`timeout_of`), and the next look, over a new connection, follows at once.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from random import Random

from external_oms.clock import Clock
from external_oms.stores.redis_client import FAILURES, PubSub
from external_oms.stores.redis_link import Away, Link, plain

__all__ = ["Follower", "timeout_of"]

logger = logging.getLogger("external_oms")

TIMEOUT = 0.2
"""The longest wait for an answer, as a part of the bound."""

TIMEOUT_MOST_SECONDS = 1.0
"""And in any case: a caller that asks a store waits no longer for it to turn out dead."""

LOOK = (0.5, 0.75)
"""When the next look at all stamps is due, as parts of the bound."""

AGAIN = (0.04, 0.2)
"""When to try again while Redis is away, as parts of the bound; 0.2 to 1 s by default, as a server's restart takes."""

SILENCE = 0.5
"""How long a subscription may be silent before a PING asks whether it still hears, as a part of the bound."""

SLICE_SECONDS = 0.2
"""The longest single wait on the subscription's socket, so that `close` ends within a second."""


def timeout_of(bound_seconds: float) -> float:
    """The longest that connecting, one operation or a PONG may take, in seconds."""
    return min(TIMEOUT_MOST_SECONDS, TIMEOUT * bound_seconds)


class Follower:
    """The two threads of one process.

    Args:
        link: The line to Redis.
        channel: Where the fleet tells its changes.
        hear: Called with every message told there, on the listener.
        look: Called on the poller: compare everything with Redis and settle what differs; raises `Away`.
        gave_up: Called on the poller when a look ended without success.
        bound_seconds: The longest that a lost message stays unnoticed, > 0.
        clock: What tells the time.
        chance: What spreads the members of a fleet.
    """

    def __init__(
        self,
        *,
        link: Link,
        channel: str,
        hear: Callable[[str], None],
        look: Callable[[], None],
        gave_up: Callable[[], None],
        bound_seconds: float,
        clock: Clock,
        chance: Random,
    ) -> None:
        self._link = link
        self._channel = channel
        self._hear = hear
        self._look = look
        self._gave_up = gave_up
        self._bound_seconds = bound_seconds
        self._timeout_seconds = timeout_of(bound_seconds)
        self._clock = clock
        self._chance = chance
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._pid: int | None = None
        self.is_hearing = False

    def start(self) -> None:
        """Make sure that both threads run in this process; cheap where they do."""
        if self._pid == os.getpid():
            return
        with self._lock:
            if self._pid == os.getpid():
                return
            self._wanted, self._closing = threading.Event(), threading.Event()
            self._wanted.set()
            self._threads = [
                threading.Thread(target=self._poll, args=(self._closing,), name="external-oms-redis-poll", daemon=True),
                threading.Thread(
                    target=self._listen, args=(self._closing,), name="external-oms-redis-hear", daemon=True
                ),
            ]
            for thread in self._threads:
                thread.start()
            self._pid = os.getpid()

    def wake(self) -> None:
        """Look now; while Redis is away, at the next try."""
        self._wanted.set()

    def after_fork(self) -> None:
        """Forget the parent's threads and locks; nothing starts before it is used."""
        self._forget()

    def close(self, seconds: float) -> None:
        """End both threads within so many seconds; `start` begins again."""
        with self._lock:
            threads, self._threads = self._threads, []
            self._pid = None
            self._closing.set()
            self._wanted.set()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(seconds / 2)

    def _within(self, span: tuple[float, float]) -> float:
        low, high = span
        return self._bound_seconds * (low + (high - low) * self._chance.random())

    # -- certainty ------------------------------------------------------------------------------------------------

    def _poll(self, closing: threading.Event) -> None:
        wanted, failures = self._wanted, 0
        while not closing.is_set():
            wanted.clear()
            try:
                self._look()
            except Away:
                failures += 1
                self._gave_up()
                if failures > 1:  # the first time at once: it may have been this one connection
                    closing.wait(self._within(AGAIN))
                continue
            except Exception:  # the thread must live, or the bound is gone
                if not failures:
                    logger.exception("following Redis failed; this is a defect of external_oms, please report it")
                failures += 1
                closing.wait(self._within(AGAIN))
                continue
            failures = 0
            self._link.restore()
            wanted.wait(self._within(LOOK))

    # -- hurry ----------------------------------------------------------------------------------------------------

    def _listen(self, closing: threading.Event) -> None:
        while not closing.is_set():
            subscription: PubSub | None = None
            try:
                subscription = self._link.client().pubsub()
                subscription.subscribe(self._channel)
                self._attend(subscription, closing)
            except FAILURES:
                logger.debug("the subscription was lost", exc_info=True)
            except Exception:  # as in _poll: without it messages would be lost in silence
                logger.exception("hearing Redis failed; this is a defect of external_oms, please report it")
            finally:
                self.is_hearing = False
                if subscription is not None:
                    _drop(subscription)
            if not closing.is_set():
                self.wake()  # perhaps Redis is gone: whoever asks it should not have to find out
                closing.wait(self._within(AGAIN))

    def _attend(self, subscription: PubSub, closing: threading.Event) -> None:
        heard, asked = self._clock.monotonic(), True  # the confirmation of the subscription is awaited like a PONG
        while not closing.is_set():
            message = subscription.get_message(timeout=min(SLICE_SECONDS, self._timeout_seconds / 2))
            now = self._clock.monotonic()
            if message is not None:
                heard, asked = now, False
                if message["type"] == "subscribe":  # also where a client that was handed in reconnects by itself
                    self.is_hearing = True
                    self.wake()
                elif message["type"] == "message":
                    self._hear(str(plain(message["data"])))
            elif asked and now - heard > self._timeout_seconds:
                raise TimeoutError("the subscription does not answer its PING")  # among FAILURES, as an OSError
            elif not asked and now - heard > SILENCE * self._bound_seconds:
                subscription.ping()
                heard, asked = now, True


def _drop(subscription: PubSub) -> None:
    try:
        subscription.close()
    except FAILURES:
        logger.debug("closing a lost subscription failed", exc_info=True)
