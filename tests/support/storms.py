"""Storms of deliveries against a served service, evaluations meanwhile, and the judgement of both.

Everything here is told on the wall clock of this host, which all its processes share.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from external_oms.testing import sign_delivery
from tests.support.servers import FLAG_PATH, REPOSITORY, START_SECONDS, Served, read_until, started
from tests.support.waiting import wait_until
from tests.support.web import HOOK, KEYS, SECRET

__all__ = ["Answer", "Answers", "Storm", "evaluators"]

SPLIT_SECONDS = 0.1
"""Equal answers are told as one, from the first to the last of them, at most so long."""

READ_SECONDS = 0.001
"""`fetched_at` tells milliseconds and leaves the rest off."""

REPLAYED = 0.2
"""Which part of the deliveries is one that was taken already."""


@dataclass
class Answer:
    """An answer to evaluations that were the same for a while.

    Attributes:
        first: When the first of these evaluations began.
        last: When the last of them began.
        enabled: The value.
        fresh: Whether it was called fresh.
        generation: The generation of the value.
        read: When the read of the value began.
        failed: Whether it was an error instead.
        known: When the first of these evaluations was answered.
    """

    first: float
    last: float
    enabled: bool
    fresh: bool
    generation: int
    read: float
    failed: bool
    known: float

    @classmethod
    def of(cls, began: float, enabled: bool, metadata: Mapping[str, object], *, failed: bool = False) -> Answer:
        """The answer that one evaluation got, just now."""
        fetched_at = str(metadata.get("fetched_at", ""))
        read = datetime.fromisoformat(fetched_at).timestamp() if fetched_at else 0.0
        fresh = not failed and metadata.get("stale") is False
        generation = int(str(metadata.get("generation", -1)))
        return cls(began, began, enabled, fresh, generation, read, failed, time.time())


class Answers:
    """The answers of one process, in order.

    Attributes:
        kept: The answers; equal ones in a row are one.
    """

    def __init__(self) -> None:
        self.kept: list[Answer] = []

    def add(self, answer: Answer) -> None:
        if self.kept:
            last = self.kept[-1]
            same = (last.enabled, last.fresh, last.generation, last.read, last.failed) == (
                answer.enabled,
                answer.fresh,
                answer.generation,
                answer.read,
                answer.failed,
            )
            if same and answer.last - last.first < SPLIT_SECONDS:
                last.last = answer.last
                return
        self.kept.append(answer)


@dataclass
class Evaluator:
    """A process that evaluates until it is asked for its answers."""

    process: subprocess.Popen[str]
    log: Path

    def answers(self) -> list[Answer]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        told = self.process.stdout.readline()
        assert told, self.log.read_text()[-3000:]
        return [Answer(*fields) for fields in json.loads(told)]


@contextmanager
def evaluators(count: int, *, environ: Mapping[str, str], place: Path) -> Iterator[list[Evaluator]]:
    """So many processes of `tests.hosts.evaluator`."""
    found = []
    with ExitStack() as stack:
        for number in range(count):
            log = place / f"evaluator-{number}.log"
            out = stack.enter_context(log.open("w"))
            command = [sys.executable, "-m", "tests.hosts.evaluator"]
            process = stack.enter_context(
                started(command, environ=environ, cwd=REPOSITORY, stdin=subprocess.PIPE, stderr=out)
            )
            found.append(Evaluator(process, log))
        for one in found:
            read_until(one.process.stdout, "ready")
        yield found


@dataclass(frozen=True)
class Flip:
    """The value changed at the origin between two instants."""

    began: float
    ended: float
    enabled: bool


@dataclass
class Storm:
    """Senders that deliver without rest while the flag flips, and evaluations over HTTP meanwhile.

    Attributes:
        server: What they deliver to.
        loses: Whether the store loses data meanwhile, delivery ids among it.
        breaks: Whether connections to the server break meanwhile.
        delivered: When each delivery that was taken was sent, and when it was answered.
        statuses: How often which status was answered.
        wrong: What must not have happened.
        answers: The answers of the workers.
        flips: The changes at the origin.
        outages: While the shared store could not be used, from when to when.
    """

    server: Served
    loses: bool = False
    breaks: bool = False
    delivered: list[tuple[float, float]] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    answers: list[list[Answer]] = field(default_factory=list)
    flips: list[Flip] = field(default_factory=list)
    outages: list[tuple[float, float]] = field(default_factory=list)
    _taken: list[str] = field(default_factory=list)
    _ids: Iterator[int] = field(default_factory=itertools.count)
    _ended: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def raging(self, senders: int, *, flip_seconds: float = 0.3, evaluating: int = 8) -> Iterator[None]:
        """Deliver, flip and evaluate until the block ends."""
        threads = [threading.Thread(target=self._send, args=(number,)) for number in range(senders)]
        threads += [threading.Thread(target=self._evaluate) for _ in range(evaluating)]
        threads += [threading.Thread(target=self._flip, args=(flip_seconds,))]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ended.set()
            for thread in threads:
                thread.join(2 * START_SECONDS)
        assert not any(thread.is_alive() for thread in threads), "a request was never answered"

    def flip(self) -> None:
        api = self.server.api
        enabled, began = not api.enabled(), time.time()
        api.set_enabled(None, enabled)
        self.flips.append(Flip(began, time.time(), enabled))

    def _flip(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            self.flip()

    def _send(self, seed: int) -> None:
        dice = random.Random(seed)
        connection = self.server.connect()
        while not self._ended.is_set():
            taken = dice.choice(self._taken) if self._taken and dice.random() < REPLAYED else None
            try:
                self.deliver(connection, taken)
            except (OSError, http.client.HTTPException) as error:
                self._broken(error)
                connection.close()
        connection.close()

    def deliver(self, connection: http.client.HTTPConnection, taken: str | None = None) -> int:
        """Deliver, anew or what was taken before; the status of the answer."""
        delivery_id = taken or f"msg_{id(self)}_{next(self._ids)}"
        body = json.dumps({"tenant": self.server.api.tenants[0]}).encode()
        sent = time.time()
        connection.request("POST", HOOK, body, sign_delivery(body, SECRET, delivery_id=delivery_id))
        answer = connection.getresponse()
        found = json.loads(answer.read())
        answered = time.time()
        self.statuses[answer.status] += 1
        if answer.status == 503:
            if not int(answer.headers.get("Retry-After", 0)) >= 1:
                self.wrong.append("503 without Retry-After")
        elif answer.status not in {200, 202}:
            self.wrong.append(f"{answer.status}: {found}")
        elif found["duplicate"]:
            if taken is None:
                self.wrong.append(f"{delivery_id} counts as a duplicate, and was never sent before")
        else:
            if taken is not None and not self.loses:
                self.wrong.append(f"the replay of {delivery_id} was taken as new")
            self.delivered.append((sent, answered))
            self._taken.append(delivery_id)
        return answer.status

    def _broken(self, error: Exception) -> None:
        if not self.breaks:
            self.wrong.append(f"a connection broke: {error!r}")

    def _evaluate(self) -> None:
        answers = Answers()
        self.answers.append(answers.kept)
        headers = {"X-API-Key": KEYS["viewer"], "Content-Type": "application/json"}
        body = json.dumps({"context": {"tenant": self.server.api.tenants[0]}}).encode()
        connection = self.server.connect()
        while not self._ended.wait(0.02):
            began = time.time()
            try:
                connection.request("POST", FLAG_PATH, body, headers)
                answer = connection.getresponse()
                found = json.loads(answer.read())
            except (OSError, http.client.HTTPException) as error:
                self._broken(error)
                connection.close()
                continue
            if answer.status != 200:
                self.wrong.append(f"evaluation: {answer.status} {found}")
                continue
            answers.add(Answer.of(began, found["value"], found["metadata"]))
        connection.close()

    # -- judgement ----------------------------------------------------------------------------------------------------

    def judge(self, answers: Sequence[Sequence[Answer]], *, bound_seconds: float) -> None:
        """Fail where an answer was wrong, or old and called fresh.

        Args:
            answers: The answers of each process.
            bound_seconds: How long after a delivery was answered a process may know nothing of it.
        """
        assert not self.wrong, (len(self.wrong), Counter(self.wrong).most_common(5))
        assert self.delivered
        by_answer = sorted((answered, sent) for sent, answered in self.delivered)
        instants = [answered for answered, _ in by_answer]
        latest_sent = list(itertools.accumulate((sent for _, sent in by_answer), max))
        for process in answers:
            assert process, "a process was never answered"
            for answer in process:
                assert not answer.failed, answer
                if not answer.fresh or self._is_excused(answer.last, bound_seconds):
                    continue
                before = bisect_left(instants, answer.last - bound_seconds)
                if before:
                    sent, late = latest_sent[before - 1], answer.last - bound_seconds - instants[before - 1]
                    assert answer.read + READ_SECONDS >= sent, (
                        f"{answer} is fresh, {late:.4f} s after all should know of a delivery sent at {sent}"
                    )
                assert answer.enabled in self._possible(answer), f"{answer} is not what the origin says"

    def _is_excused(self, instant: float, bound_seconds: float) -> bool:
        return any(began <= instant <= ended + bound_seconds for began, ended in self.outages)

    def _possible(self, answer: Answer) -> set[bool]:
        """The values that a read that began then and was answered by then may have found."""
        place = bisect_left([flip.ended for flip in self.flips], answer.read)
        possible = {flip.enabled for flip in self.flips[place:] if flip.began <= answer.known}
        return possible | {self.flips[place - 1].enabled if place else not self.flips[0].enabled}

    def heals(self) -> None:
        """Wait until a flip that is delivered is what every worker answers, and the service calls itself ready."""
        self.flip()
        with closing(self.server.connect()) as connection:
            self._heals(connection)

    def _heals(self, connection: http.client.HTTPConnection) -> None:
        def taken() -> bool:
            try:
                return self.deliver(connection) == 200
            except (OSError, http.client.HTTPException):
                connection.close()
                return False

        def ready() -> bool:
            with suppress(OSError, http.client.HTTPException):
                connection.request("GET", "/readyz")
                answer = connection.getresponse()
                return answer.status == 200 and json.loads(answer.read())["status"] == "ready"
            connection.close()
            return False

        def right() -> bool:
            status, answer = self.server.evaluate()
            assert status == 200, answer
            return answer["value"] is self.server.api.enabled()

        self.server.wait_until(taken)
        for _ in range(8):  # new connections reach other workers
            wait_until(ready, message=f"the service does not heal: {self.server.printed()}")
            wait_until(right, message=f"a worker does not follow: {self.server.printed()}")
            connection.close()
