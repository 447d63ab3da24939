"""Listeners come and go; one's mistake is nobody else's."""

from __future__ import annotations

import logging
import threading

import pytest

from external_oms.signals import Signal


def test_everybody_who_listens_is_told_in_the_order_of_coming() -> None:
    signal: Signal[int] = Signal()
    told: list[tuple[str, int]] = []
    signal.subscribe(lambda what: told.append(("first", what)))
    signal.subscribe(lambda what: told.append(("second", what)))
    signal.send(7)
    assert told == [("first", 7), ("second", 7)]


def test_who_listens_no_more_is_told_no_more_and_may_say_so_twice() -> None:
    signal: Signal[int] = Signal()
    told: list[int] = []
    unlisten = signal.subscribe(told.append)
    signal.subscribe(told.append)
    unlisten()
    unlisten()
    signal.send(7)
    assert told == [7], "the same function listening twice is two listeners"


def test_a_listener_that_raises_is_logged_and_keeps_nothing_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    signal: Signal[int] = Signal()
    told: list[int] = []

    def fails(what: int) -> None:
        raise ZeroDivisionError

    signal.subscribe(fails)
    signal.subscribe(told.append)
    with caplog.at_level(logging.ERROR, logger="external_oms"):
        signal.send(7)
    assert told == [7]
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_a_listener_may_come_and_go_while_it_is_told() -> None:
    signal: Signal[int] = Signal()
    told: list[str] = []

    def once(what: int) -> None:
        told.append("once")
        unlisten()
        signal.subscribe(lambda later: told.append("late"))

    unlisten = signal.subscribe(once)
    signal.send(1)
    assert told == ["once"]
    signal.send(2)
    assert told == ["once", "late"]


def test_nobody_listening_is_nothing_to_complain_about() -> None:
    Signal[int]().send(7)


def test_what_is_lined_up_is_told_in_its_order_though_another_thread_is_still_telling() -> None:
    signal: Signal[int] = Signal()
    told: list[tuple[int, int]] = []
    telling, go_on = threading.Event(), threading.Event()

    def listener(what: int) -> None:
        told.append((what, threading.get_ident()))
        telling.set()
        assert go_on.wait(10)

    signal.subscribe(listener)
    signal.enqueue(1)
    first = threading.Thread(target=signal.flush, daemon=True)
    first.start()
    assert telling.wait(10)
    signal.enqueue(2)
    signal.enqueue(3)
    signal.flush()  # comes back at once: the first thread tells these too
    assert [what for what, _ in told] == [1]
    go_on.set()
    first.join(10)
    assert told == [(1, first.ident), (2, first.ident), (3, first.ident)]
    signal.flush()
    assert len(told) == 3


def test_a_listener_that_lines_up_more_has_it_told_after_what_is_there() -> None:
    signal: Signal[int] = Signal()
    told: list[int] = []

    def listener(what: int) -> None:
        told.append(what)
        if what == 1:
            signal.enqueue(3)
            signal.flush()

    signal.subscribe(listener)
    signal.enqueue(1)
    signal.enqueue(2)
    signal.flush()
    assert told == [1, 2, 3]


def test_in_a_forked_child_nobody_is_telling_and_the_parents_news_are_the_parents() -> None:
    signal: Signal[int] = Signal()
    told: list[int] = []
    signal.subscribe(told.append)
    signal._flushing = True  # as a thread of the parent left it
    signal._lock.acquire()
    signal.enqueue(1)
    signal.after_fork()
    signal.enqueue(2)
    signal.flush()
    assert told == [2]
