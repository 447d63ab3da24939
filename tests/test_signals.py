"""Listeners come and go; one's mistake is nobody else's."""

from __future__ import annotations

import logging

import pytest

from external_oms.signals import Signal


def test_everybody_who_listens_is_told_in_the_order_of_coming() -> None:
    signal: Signal[int] = Signal()
    told: list[tuple[str, int]] = []
    signal.listen(lambda what: told.append(("first", what)))
    signal.listen(lambda what: told.append(("second", what)))
    signal.tell(7)
    assert told == [("first", 7), ("second", 7)]


def test_who_listens_no_more_is_told_no_more_and_may_say_so_twice() -> None:
    signal: Signal[int] = Signal()
    told: list[int] = []
    unlisten = signal.listen(told.append)
    signal.listen(told.append)
    unlisten()
    unlisten()
    signal.tell(7)
    assert told == [7], "the same function listening twice is two listeners"


def test_a_listener_that_raises_is_logged_and_keeps_nothing_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    signal: Signal[int] = Signal()
    told: list[int] = []

    def fails(what: int) -> None:
        raise ZeroDivisionError

    signal.listen(fails)
    signal.listen(told.append)
    with caplog.at_level(logging.ERROR, logger="external_oms"):
        signal.tell(7)
    assert told == [7]
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_a_listener_may_come_and_go_while_it_is_told() -> None:
    signal: Signal[int] = Signal()
    told: list[str] = []

    def once(what: int) -> None:
        told.append("once")
        unlisten()
        signal.listen(lambda later: told.append("late"))

    unlisten = signal.listen(once)
    signal.tell(1)
    assert told == ["once"]
    signal.tell(2)
    assert told == ["once", "late"]


def test_nobody_listening_is_nothing_to_complain_about() -> None:
    Signal[int]().tell(7)
