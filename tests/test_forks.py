from __future__ import annotations

import gc
import os

import pytest

from external_oms.forks import call_after_fork


class Counted:
    """Counts how often it began anew."""

    def __init__(self) -> None:
        self.count = 0

    def after_fork(self) -> None:
        self.count += 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # the processes of the tests have threads
def test_an_object_begins_anew_in_a_child_and_not_in_the_parent() -> None:
    one = Counted()
    call_after_fork(one)
    child = os.fork()
    if child == 0:
        os._exit(one.count)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert one.count == 0


def test_an_object_that_is_no_longer_used_is_not_kept() -> None:
    counts: list[int] = []

    class Dying(Counted):
        def __del__(self) -> None:
            counts.append(self.count)

    call_after_fork(Dying())
    gc.collect()
    assert counts == [0]
