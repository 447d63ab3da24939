"""The threads of one process: jobs now and later, waiting, the end, and forks."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from external_oms import scheduler as scheduler_module
from external_oms.clock import SYSTEM_CLOCK, Clock
from external_oms.errors import StoreError
from external_oms.scheduler import Scheduler
from tests.support.waiting import wait_until

SOON = 10.0
"""When a test that waits for a thread gives up; none comes near it."""


class Made:
    """Schedulers, and the polls that they made."""

    def __init__(self) -> None:
        self.made: list[Scheduler] = []
        self.polls: list[int] = []
        self.polled = threading.Event()
        self.strangers = set(threading.enumerate())

    def poll(self) -> None:
        self.polls.append(threading.get_ident())
        self.polled.set()

    def __call__(
        self, *, workers: int = 4, poll_seconds: float | None = None, clock: Clock = SYSTEM_CLOCK
    ) -> Scheduler:
        made = Scheduler(workers=workers, clock=clock, poll=self.poll, poll_seconds=poll_seconds)
        self.made.append(made)
        return made

    def threads(self, word: str = "") -> list[str]:
        """The names of the threads that the schedulers of this test have running."""
        found = [thread.name for thread in set(threading.enumerate()) - self.strangers]
        return [name for name in found if name.startswith(f"external-oms-{word}")]


@pytest.fixture
def make() -> Iterator[Made]:
    made = Made()
    yield made
    for scheduler in made.made:
        scheduler.close(SOON)
    assert made.threads() == []


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


# -- jobs now --------------------------------------------------------------------------------------------------------


def test_nothing_runs_before_there_is_something_to_do(make: Made) -> None:
    make()
    assert make.threads() == []


def test_a_job_runs_on_a_worker_and_not_on_the_timer(make: Made) -> None:
    scheduler, done = make(), threading.Event()
    ran_on: list[tuple[str, bool]] = []

    def job() -> None:
        ran_on.append((threading.current_thread().name, threading.current_thread().daemon))
        done.set()

    scheduler.submit(job)
    assert done.wait(SOON)
    assert ran_on == [("external-oms-worker", True)]
    assert make.threads("timer") == []
    wait_until(lambda: make.threads() == [], message="a worker without a job ends")


def test_jobs_that_block_each_have_a_worker_up_to_the_bound_and_the_next_waits_for_one(make: Made) -> None:
    scheduler = make(workers=3)
    holds = [Hold() for _ in range(4)]
    for hold in holds:
        scheduler.submit(hold)
    assert all(hold.begun.wait(SOON) for hold in holds[:3])
    assert len(make.threads("worker")) == 3
    assert not holds[3].begun.is_set()
    holds[1].may_end.set()
    assert holds[3].begun.wait(SOON)
    for hold in holds:
        hold.may_end.set()
    assert all(hold.ended.wait(SOON) for hold in holds)


def test_every_job_of_many_threads_runs_exactly_once(make: Made) -> None:
    """Workers that come, end and come again, under a thousand jobs from eight threads: no job is lost."""
    scheduler = make(workers=4)
    lock = threading.Lock()
    ran: dict[int, int] = {}
    whole = threading.Event()

    def submit(number: int) -> None:
        def job() -> None:
            with lock:
                ran[number] = ran.get(number, 0) + 1
                if len(ran) == 1000:
                    whole.set()

        scheduler.submit(job)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(submit, range(1000)))
        assert whole.wait(SOON)
    finally:
        sys.setswitchinterval(interval)
    assert set(ran.values()) == {1}
    assert len(make.threads("worker")) <= 4


def test_a_worker_that_ends_takes_no_job_with_it(make: Made) -> None:
    """Each job is submitted about when the last worker ends: the narrowest place for a lost job."""
    scheduler = make(workers=2)
    for _ in range(300):
        done = threading.Event()
        scheduler.submit(done.set)
        assert done.wait(SOON)
    wait_until(lambda: make.threads("worker") == [])
    assert not scheduler._pool.workers


# -- jobs later ------------------------------------------------------------------------------------------------------


def test_due_jobs_run_in_the_order_of_their_instants_whatever_the_order_of_asking(make: Made) -> None:
    scheduler, done = make(), threading.Event()
    now = time.monotonic()
    ran: list[str] = []
    blocker = Hold()
    scheduler.at("blocker", now, blocker)
    assert blocker.begun.wait(SOON)
    # all of them are due when the timer looks again
    scheduler.at("done", now - 0.1, done.set)
    for name, seconds in (("third", 0.2), ("second", 0.3), ("first", 0.4)):
        scheduler.at(name, now - seconds, lambda name=name: ran.append(name))  # type: ignore[misc]  # mypy cannot see the default
    blocker.may_end.set()
    assert done.wait(SOON)
    assert ran == ["first", "second", "third"]


@pytest.mark.parametrize(("first", "second"), [(0.05, 3600.0), (3600.0, 0.05)])
def test_a_job_takes_the_place_of_the_last_one_of_its_key(make: Made, first: float, second: float) -> None:
    scheduler, done = make(), threading.Event()
    ran: list[str] = []
    now, blocker = time.monotonic(), Hold()
    scheduler.at("blocker", now, blocker)
    assert blocker.begun.wait(SOON)
    scheduler.at("key", now + first, lambda: ran.append("replaced"))
    scheduler.at("key", now + second, lambda: ran.append("kept"))
    scheduler.at("other", now + 0.1, done.set)
    blocker.may_end.set()
    assert done.wait(SOON)
    assert ran == (["kept"] if second < 1 else [])
    assert set(scheduler._pool.due) == (set() if second < 1 else {"key"})


def test_a_job_is_not_run_too_early_and_an_earlier_one_wakes_the_timer(make: Made) -> None:
    scheduler, done = make(), threading.Event()
    at: list[float] = []
    scheduler.at("late", time.monotonic() + 3600.0, lambda: at.append(-1.0))
    wait_until(lambda: bool(make.threads("timer")))
    when = time.monotonic() + 0.05

    def job() -> None:
        at.append(time.monotonic())
        done.set()

    scheduler.at("early", when, job)
    assert done.wait(SOON)
    assert len(at) == 1
    assert at[0] >= when


@pytest.mark.parametrize("seconds", [1e10, 1e300, float("inf")])
def test_an_instant_beyond_what_the_system_can_wait_for_ends_nothing(make: Made, seconds: float) -> None:
    scheduler = make()
    scheduler.at("never", time.monotonic() + seconds, lambda: pytest.fail("not in this life"))
    for _ in range(2):
        done = threading.Event()
        scheduler.at("soon", time.monotonic() + 0.01, done.set)
        assert done.wait(SOON)
    assert make.threads("timer") == ["external-oms-timer"]


def test_a_due_job_may_ask_for_the_next_of_its_own_key(make: Made) -> None:
    scheduler, done = make(), threading.Event()
    beats: list[int] = []

    def beat() -> None:
        beats.append(1)
        if len(beats) == 50:
            done.set()
        else:
            scheduler.at("beat", time.monotonic(), beat)

    scheduler.at("beat", time.monotonic(), beat)
    assert done.wait(SOON)
    assert len(make.threads("timer")) == 1


def test_a_job_that_raises_ends_no_thread_and_is_logged(make: Made, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = make(workers=1)

    def fails() -> None:
        raise ZeroDivisionError

    with caplog.at_level(logging.ERROR, logger="external_oms"):
        for run in (scheduler.submit, lambda job: scheduler.at(job, time.monotonic(), job)):
            after = threading.Event()
            run(fails)
            run(after.set)
            assert after.wait(SOON)
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError] * 2


# -- polls -----------------------------------------------------------------------------------------------------------


def test_waking_polls_at_once_on_the_timer(make: Made) -> None:
    scheduler = make(poll_seconds=None)
    scheduler.start()
    scheduler.start()
    assert len(make.threads("timer")) == 1
    assert not make.polled.is_set()
    for _ in range(3):
        scheduler.wake()
        assert make.polled.wait(SOON)
        make.polled.clear()
    (ident,) = set(make.polls)
    assert ident != threading.get_ident()


def test_a_wake_before_the_timer_runs_is_not_lost(make: Made) -> None:
    scheduler = make(poll_seconds=None)
    scheduler.wake()
    assert make.threads() == []
    scheduler.start()
    assert make.polled.wait(SOON)


def test_it_polls_at_its_interval_also_while_due_jobs_come_and_go(make: Made) -> None:
    scheduler = make(poll_seconds=0.01)
    scheduler.start()
    for _ in range(3):
        make.polled.clear()
        scheduler.at("job", time.monotonic(), lambda: None)
        assert make.polled.wait(SOON)


# -- waiting ---------------------------------------------------------------------------------------------------------


def test_waiting_ends_with_the_future_or_at_its_deadline_and_raises_nothing(make: Made) -> None:
    scheduler = make()
    open_, done, failed = Future[int](), Future[int](), Future[int]()
    done.set_result(7)
    failed.set_exception(StoreError("down"))
    timed_out = Future[int]()
    timed_out.set_exception(TimeoutError("of the job, not of the wait"))
    assert [scheduler.wait(future, 0.01) for future in (open_, done, failed, timed_out)] == [False, True, True, True]
    assert scheduler.wait(open_, -1.0) is False
    assert scheduler.wait(done, float("inf")) is True


# -- the end ---------------------------------------------------------------------------------------------------------


def test_closing_ends_every_thread_and_drops_what_waits(make: Made) -> None:
    scheduler = make(workers=2)
    ran: list[str] = []
    holds = [Hold(), Hold()]
    for hold in holds:
        scheduler.submit(hold)
    assert all(hold.begun.wait(SOON) for hold in holds)
    scheduler.submit(lambda: ran.append("submitted before"))
    scheduler.at("due", time.monotonic() + 3600.0, lambda: ran.append("due"))
    closing = threading.Thread(target=scheduler.close, args=(SOON,))
    closing.start()
    wait_until(lambda: scheduler._pool.closing)
    for hold in holds:
        hold.may_end.set()
    closing.join(SOON)
    assert not closing.is_alive()
    assert make.threads() == []
    scheduler.submit(lambda: ran.append("submitted after"))
    scheduler.at("due after", time.monotonic(), lambda: ran.append("due after"))
    scheduler.start()
    assert not scheduler._pool.due, "what is asked for after the end is not kept"
    scheduler.close(1.0)
    assert make.threads() == []
    assert ran == []


def test_closing_does_not_wait_for_a_job_that_hangs_longer_than_it_may(make: Made) -> None:
    scheduler, hold = make(), Hold()
    scheduler.submit(hold)
    assert hold.begun.wait(SOON)
    scheduler.close(0.05)
    assert not hold.ended.is_set()
    hold.may_end.set()
    wait_until(lambda: make.threads("worker") == [], message="it ends by itself when its job does")


@pytest.mark.parametrize("where", ["worker", "timer"])
def test_a_job_may_close_the_scheduler_itself(make: Made, where: str) -> None:
    scheduler, done = make(), threading.Event()

    def job() -> None:
        scheduler.close(SOON)
        done.set()

    if where == "worker":
        scheduler.submit(job)
    else:
        scheduler.at("close", time.monotonic(), job)
    assert done.wait(SOON)
    wait_until(lambda: make.threads() == [])


def test_after_reopening_it_works_as_at_first(make: Made) -> None:
    scheduler = make(poll_seconds=None)
    for _ in range(3):
        now, later = threading.Event(), threading.Event()
        scheduler.submit(now.set)
        scheduler.at("later", time.monotonic(), later.set)
        assert now.wait(SOON)
        assert later.wait(SOON)
        scheduler.reopen()
        assert len(make.threads("timer")) == 1, "reopening what is open changes nothing"
        scheduler.close(SOON)
        scheduler.reopen()


def test_a_thread_left_over_from_before_the_reopening_ends_with_its_job(make: Made) -> None:
    """It belongs to what was closed: it takes no new work and is in nobody's way."""
    scheduler = make(workers=1)
    hanging, hanging_due = Hold(), Hold()
    scheduler.submit(hanging)
    scheduler.at("hanging", time.monotonic(), hanging_due)
    assert hanging.begun.wait(SOON)
    assert hanging_due.begun.wait(SOON)
    scheduler.close(0.01)
    scheduler.reopen()
    scheduler.start()
    done = threading.Event()
    scheduler.submit(done.set)
    assert done.wait(SOON), "a hanging job of before does not use up the bound of after"
    assert len(make.threads("timer")) == 2
    hanging.may_end.set()
    hanging_due.may_end.set()
    wait_until(lambda: make.threads("worker") == [] and len(make.threads("timer")) == 1)


# -- a system without threads ----------------------------------------------------------------------------------------


def _cannot_start(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_where_the_system_has_no_thread_to_give_jobs_wait_until_it_has(
    make: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scheduler_module, "SHORTAGE_SECONDS", 0.001)
    scheduler = make()
    now, later = threading.Event(), threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _cannot_start)
        scheduler.start()
        scheduler.submit(now.set)
        scheduler.at("later", time.monotonic(), later.set)
    assert not now.is_set()
    assert "no thread" in caplog.text
    scheduler.start()
    assert later.wait(SOON)
    assert now.wait(SOON)


def test_a_job_does_not_wait_where_only_a_further_worker_cannot_be_started(
    make: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, hold, done = make(), Hold(), threading.Event()
    scheduler.submit(hold)
    assert hold.begun.wait(SOON)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _cannot_start)
        scheduler.submit(done.set)
    hold.may_end.set()
    assert done.wait(SOON)


# -- forks -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # newer Pythons warn of what is tested here
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_has_threads_of_its_own_and_the_parent_keeps_its(make: Made) -> None:
    scheduler, hold = make(workers=2), Hold()
    scheduler.submit(hold)
    scheduler.at("parent", time.monotonic() + 3600.0, lambda: None)
    assert hold.begun.wait(SOON)
    scheduler._pool.lock.acquire()  # as if another thread held it at the instant of the fork
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        scheduler.after_fork()
        now, later = threading.Event(), threading.Event()
        scheduler.submit(now.set)
        scheduler.at("later", time.monotonic(), later.set)
        works = now.wait(SOON) and later.wait(SOON) and "parent" not in scheduler._pool.due
        scheduler.close(SOON)
        os._exit(0 if works and not scheduler._pool.workers else 1)
    scheduler._pool.lock.release()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    hold.may_end.set()
    assert hold.ended.wait(SOON)
    assert len(make.threads("timer")) == 1
