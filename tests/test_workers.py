"""Threads that come when there is work, keep due times, and are gone within a second."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from external_oms import workers as workers_module
from external_oms.clock import SYSTEM_CLOCK, Clock
from external_oms.workers import Workers
from tests.support.waiting import wait_until

SOON = 10.0
"""When a test that waits for a thread gives up; none comes near it."""


class Made:
    """Workers, and the polls that they made."""

    def __init__(self) -> None:
        self.made: list[Workers] = []
        self.polls: list[int] = []
        self.polled = threading.Event()

    def poll(self) -> None:
        self.polls.append(threading.get_ident())
        self.polled.set()

    def __call__(self, *, readers: int = 4, poll_seconds: float | None = None, clock: Clock = SYSTEM_CLOCK) -> Workers:
        made = Workers(readers=readers, clock=clock, poll=self.poll, poll_seconds=poll_seconds)
        self.made.append(made)
        return made


@pytest.fixture
def make() -> Iterator[Made]:
    before = set(threading.enumerate())
    STRANGERS.clear()
    STRANGERS.update(before)
    made = Made()
    yield made
    for workers in made.made:
        workers.close(SOON)
    left = [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("external-oms")]
    assert left == []


STRANGERS: set[threading.Thread] = set()
"""Threads that were there before the test: of whatever an earlier test of this process has not put away."""


def names(word: str) -> list[str]:
    threads = set(threading.enumerate()) - STRANGERS
    return [thread.name for thread in threads if thread.name == f"external-oms-{word}"]


class Hold:
    """A job that says that it runs, and goes on when it may."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.ended = threading.Event()

    def __call__(self) -> None:
        self.begun.set()
        assert self.may_end.wait(SOON)
        self.ended.set()


def test_nothing_runs_before_there_is_something_to_do(make: Made) -> None:
    make()
    assert names("due") == names("read") == []


def test_a_job_runs_on_a_reader_and_not_on_the_thread_that_keeps_due_times(make: Made) -> None:
    workers, done = make(), threading.Event()
    ran_on: list[str] = []

    def job() -> None:
        ran_on.append(threading.current_thread().name)
        done.set()

    workers.submit(job)
    assert done.wait(SOON)
    assert ran_on == ["external-oms-read"]
    assert names("due") == []
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("external-oms"))


def test_jobs_that_block_each_have_a_reader_up_to_the_bound_and_the_next_waits_for_one(make: Made) -> None:
    workers = make(readers=3)
    holds = [Hold() for _ in range(4)]
    for hold in holds:
        workers.submit(hold)
    assert all(hold.begun.wait(SOON) for hold in holds[:3])
    assert len(names("read")) == 3
    assert not holds[3].begun.is_set()
    holds[1].may_end.set()
    assert holds[3].begun.wait(SOON)
    for hold in holds:
        hold.may_end.set()
    assert all(hold.ended.wait(SOON) for hold in holds)
    assert len(names("read")) == 3


def test_an_idle_reader_is_used_again(make: Made) -> None:
    workers = make(readers=4)
    ran_on: list[int] = []
    for _ in range(20):
        done = threading.Event()

        def job(done: threading.Event = done) -> None:
            ran_on.append(threading.get_ident())
            done.set()

        workers.submit(job)
        assert done.wait(SOON)
        wait_until(lambda: workers._crew.idle == 1)
    assert len(set(ran_on)) == 1


def test_an_idle_reader_that_has_a_job_already_does_not_hold_up_the_next(make: Made) -> None:
    for _ in range(20):
        workers = make(readers=4)
        workers.submit(lambda: None)
        wait_until(lambda: workers._crew.idle == 1)  # noqa: B023 - called at once
        holds = [Hold() for _ in range(3)]
        for hold in holds:
            workers.submit(hold)
        assert all(hold.begun.wait(SOON) for hold in holds), "all of them run at once"
        for hold in holds:
            hold.may_end.set()


def test_every_job_of_many_threads_runs_exactly_once(make: Made) -> None:
    """Readers that come, idle, end and come again, under a thousand jobs from eight threads: no wake-up is lost."""
    workers = make(readers=4)
    lock = threading.Lock()
    ran: dict[int, int] = {}
    whole = threading.Event()

    def submit(number: int) -> None:
        def job() -> None:
            with lock:
                ran[number] = ran.get(number, 0) + 1
                if len(ran) == 1000:
                    whole.set()

        workers.submit(job)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(submit, range(1000)))
        assert whole.wait(SOON)
    finally:
        sys.setswitchinterval(interval)
    assert set(ran.values()) == {1}
    assert len(names("read")) <= 4


@pytest.mark.parametrize("idle_seconds", [0.0, 1e-4])
def test_a_reader_that_ends_idle_takes_no_job_with_it(
    make: Made, monkeypatch: pytest.MonkeyPatch, idle_seconds: float
) -> None:
    """Each job is submitted about when the last reader gives up waiting: the narrowest place for a lost job."""
    monkeypatch.setattr(workers_module, "IDLE_SECONDS", idle_seconds)
    workers = make(readers=2)
    for _ in range(300):
        done = threading.Event()
        workers.submit(done.set)
        assert done.wait(SOON)
    wait_until(lambda: names("read") == [])
    assert workers._crew.idle == 0
    assert not workers._crew.threads


def test_due_times_are_kept_in_their_order_whatever_the_order_of_asking(make: Made) -> None:
    workers, done = make(), threading.Event()
    now = time.monotonic()
    ran: list[str] = []
    blocker = Hold()
    workers.at(now, blocker)
    assert blocker.begun.wait(SOON)
    workers.at(now + 0.021, done.set)
    workers.at(now + 0.02, lambda: ran.append("third"))
    workers.at(now + 0.01, lambda: ran.append("second"))
    workers.at(now + 0.001, lambda: ran.append("first"))
    workers.at(now + 0.01, lambda: ran.append("second, asked later"))
    blocker.may_end.set()
    assert done.wait(SOON)
    assert ran == ["first", "second", "second, asked later", "third"]


def test_a_due_time_is_not_kept_too_early_and_an_earlier_one_wakes_the_thread(make: Made) -> None:
    workers, done = make(), threading.Event()
    at: list[float] = []
    workers.at(time.monotonic() + 3600.0, lambda: at.append(-1.0))
    wait_until(lambda: bool(names("due")))
    when = time.monotonic() + 0.05

    def job() -> None:
        at.append(time.monotonic())
        done.set()

    workers.at(when, job)
    assert done.wait(SOON)
    assert len(at) == 1
    assert at[0] >= when


@pytest.mark.parametrize("seconds", [1e10, 1e300, float("inf")])
def test_a_due_time_beyond_what_the_system_can_wait_for_ends_nothing(make: Made, seconds: float) -> None:
    workers, done = make(), threading.Event()
    workers.at(time.monotonic() + seconds, lambda: pytest.fail("not in this life"))
    workers.at(time.monotonic() + 0.01, done.set)
    assert done.wait(SOON)
    wait_until(lambda: names("due") == ["external-oms-due"])
    done.clear()
    workers.at(time.monotonic(), done.set)
    assert done.wait(SOON)


def test_a_due_job_may_ask_for_the_next_as_a_pulse_does(make: Made) -> None:
    workers, done = make(), threading.Event()
    beats: list[int] = []

    def beat() -> None:
        beats.append(1)
        if len(beats) == 50:
            done.set()
        else:
            workers.at(time.monotonic(), beat)

    workers.at(time.monotonic(), beat)
    assert done.wait(SOON)
    assert len(names("due")) == 1


def test_a_job_that_raises_ends_no_thread_and_is_logged(make: Made, caplog: pytest.LogCaptureFixture) -> None:
    workers = make(readers=1)

    def fails() -> None:
        raise ZeroDivisionError

    with caplog.at_level(logging.ERROR, logger="external_oms"):
        for run in (workers.submit, lambda job: workers.at(time.monotonic(), job)):
            after = threading.Event()
            run(fails)
            run(after.set)
            assert after.wait(SOON)
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError] * 2
    assert len(names("read")) == len(names("due")) == 1


def test_waking_polls_at_once_on_the_thread_that_keeps_due_times(make: Made) -> None:
    workers = make(poll_seconds=None)
    workers.start()
    workers.start()
    assert len(names("due")) == 1
    assert not make.polled.is_set()
    for _ in range(3):
        workers.wake()
        assert make.polled.wait(SOON)
        make.polled.clear()
    (ident,) = set(make.polls)
    assert ident != threading.get_ident()


def test_a_wake_before_the_thread_runs_is_not_lost(make: Made) -> None:
    workers = make(poll_seconds=None)
    workers.wake()
    assert names("due") == []
    workers.start()
    assert make.polled.wait(SOON)


def test_it_polls_at_its_interval_also_while_due_jobs_come_and_go(make: Made) -> None:
    workers = make(poll_seconds=0.01)
    workers.start()
    for _ in range(3):
        make.polled.clear()
        workers.at(time.monotonic(), lambda: None)
        assert make.polled.wait(SOON)


def test_closing_ends_every_thread_within_a_second_and_drops_what_waits(make: Made) -> None:
    workers = make(readers=2)
    ran: list[str] = []
    holds = [Hold(), Hold()]
    for hold in holds:
        workers.submit(hold)
    assert all(hold.begun.wait(SOON) for hold in holds)
    workers.submit(lambda: ran.append("submitted before"))
    workers.at(time.monotonic() + 3600.0, lambda: ran.append("due"))
    closing = threading.Thread(target=workers.close, args=(SOON,))
    closing.start()
    wait_until(lambda: workers._crew.closing)
    for hold in holds:
        hold.may_end.set()
    closing.join(SOON)
    assert not closing.is_alive()
    assert names("due") == names("read") == []
    workers.submit(lambda: ran.append("submitted after"))
    workers.at(time.monotonic(), lambda: ran.append("due after"))
    workers.start()
    assert not workers._crew.due, "what is asked for after the end is not hoarded"
    workers.close(1.0)
    assert names("due") == names("read") == []
    assert ran == []


def test_closing_does_not_wait_for_a_job_that_hangs_longer_than_it_may(make: Made) -> None:
    workers, hold = make(), Hold()
    workers.submit(hold)
    assert hold.begun.wait(SOON)
    began = time.monotonic()
    workers.close(0.05)
    assert time.monotonic() - began < 1.0
    hold.may_end.set()
    wait_until(lambda: names("read") == [], message="it ends by itself when its job does")


def test_a_job_may_close_the_workers_itself(make: Made) -> None:
    workers, done = make(), threading.Event()

    def job() -> None:
        workers.close(SOON)
        done.set()

    workers.at(time.monotonic(), job)
    assert done.wait(SOON)
    wait_until(lambda: names("due") == [])


def test_after_reopening_it_works_as_at_first(make: Made) -> None:
    workers = make(poll_seconds=None)
    for _ in range(3):
        read, due = threading.Event(), threading.Event()
        workers.submit(read.set)
        workers.at(time.monotonic(), due.set)
        assert read.wait(SOON)
        assert due.wait(SOON)
        workers.reopen()
        assert len(names("due")) == 1, "reopening what is open changes nothing"
        workers.close(SOON)
        workers.reopen()


def test_a_thread_left_over_from_before_the_reopening_ends_with_its_job(make: Made) -> None:
    """It belongs to what was closed: it takes no new work and is in nobody's way."""
    workers = make(readers=1)
    hanging, hanging_due = Hold(), Hold()
    workers.submit(hanging)
    workers.at(time.monotonic(), hanging_due)
    assert hanging.begun.wait(SOON)
    assert hanging_due.begun.wait(SOON)
    workers.close(0.01)
    workers.reopen()
    workers.start()
    done = threading.Event()
    workers.submit(done.set)
    assert done.wait(SOON), "a hanging job of before does not use up the bound of after"
    assert len(names("read")) == 2
    assert len(names("due")) == 2
    hanging.may_end.set()
    hanging_due.may_end.set()
    wait_until(lambda: len(names("read")) == 1 and len(names("due")) == 1)
    wait_until(lambda: workers._crew.idle == 1)
    workers.close(SOON)
    assert names("read") == names("due") == []


def test_where_the_system_has_no_thread_to_give_jobs_wait_until_it_has(
    make: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers_module, "SHORT_SECONDS", 0.001)
    workers = make()
    read, due = threading.Event(), threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _cannot_start)
        workers.start()
        workers.submit(read.set)
        workers.at(time.monotonic(), due.set)
    assert not read.is_set()
    assert "no thread" in caplog.text
    workers.start()
    assert due.wait(SOON)
    assert read.wait(SOON)


def test_a_job_does_not_wait_where_only_a_further_reader_cannot_be_started(
    make: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers, hold, read = make(), Hold(), threading.Event()
    workers.submit(hold)
    assert hold.begun.wait(SOON)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _cannot_start)
        workers.submit(read.set)
    hold.may_end.set()
    assert read.wait(SOON)
    assert len(names("read")) == 1


def _cannot_start(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # newer Pythons warn of what is tested here
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_has_threads_of_its_own_and_the_parent_keeps_its(make: Made) -> None:
    workers, hold = make(readers=2), Hold()
    workers.submit(hold)
    workers.at(time.monotonic() + 3600.0, lambda: None)
    assert hold.begun.wait(SOON)
    workers._crew.lock.acquire()  # as if another thread held it at the instant of the fork
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        workers.after_fork()
        read, due = threading.Event(), threading.Event()
        workers.submit(read.set)
        workers.at(time.monotonic(), due.set)
        works = read.wait(SOON) and due.wait(SOON) and len(workers._crew.threads) == 2
        workers.close(SOON)
        os._exit(0 if works and not workers._crew.threads else 1)
    workers._crew.lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    hold.may_end.set()
    assert hold.ended.wait(SOON)
    assert len(names("due")) == 1
