"""Nothing is under way at a fork."""

from __future__ import annotations

import os
import threading

import pytest

from external_oms.stores import gate as gate_module
from external_oms.stores.gate import Gate, keep_from_forks


def test_shut_waits_for_what_is_inside_and_holds_back_the_rest() -> None:
    gate = Gate()
    inside, leave, second = threading.Event(), threading.Event(), threading.Event()

    def first_in() -> None:
        with gate.passed():
            inside.set()
            assert leave.wait(10)

    def second_in() -> None:
        with gate.passed():
            second.set()

    first = threading.Thread(target=first_in)
    first.start()
    assert inside.wait(10)
    shut = threading.Event()

    def fork() -> None:
        assert gate.shut()
        shut.set()

    forker = threading.Thread(target=fork)
    forker.start()
    assert not shut.is_set()
    leave.set()
    assert shut.wait(10)
    late = threading.Thread(target=second_in)
    late.start()
    assert not second.is_set()
    gate.open()
    assert second.wait(10)
    for thread in (first, forker, late):
        thread.join()


def test_shut_says_so_where_somebody_stays_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "WAIT_SECONDS", 0.01)
    gate = Gate()
    with gate.passed():
        assert gate.shut() is False
    gate.open()
    with gate.passed():
        pass


def test_each_fork_is_announced_before_and_after_on_both_sides() -> None:
    class Told:
        def __init__(self) -> None:
            self.words: list[str] = []

        def before_fork(self) -> None:
            self.words.append("before")

        def after_fork_in_parent(self) -> None:
            self.words.append("parent")

        def after_fork(self) -> None:
            self.words.append("child")

    told = Told()
    keep_from_forks(told)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if told.words == ["before", "child"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert told.words == ["before", "parent"]
