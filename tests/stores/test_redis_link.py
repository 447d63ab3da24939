"""The line to Redis: what it says of a failure, how seldom it says it, and that nothing foreign comes through."""

from __future__ import annotations

import logging
from typing import cast

import pytest
import redis
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    ResponseError,
)

from external_oms.stores.redis_client import Client
from external_oms.stores.redis_link import QUIET_SECONDS, Away, Link, plain
from tests.support.clock import FakeClock


def link(clock: FakeClock, failures: list[str] | None = None) -> Link:
    told = [] if failures is None else failures
    return Link(lambda: cast("Client", object()), owned=False, clock=clock, failed=lambda: told.append("failed"))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (AuthenticationError("WRONGPASS s3cr3t"), "credentials"),
        (NoPermissionError("NOPERM s3cr3t"), "ACL"),
        (ReadOnlyError("READONLY s3cr3t"), "primary"),
        (OutOfMemoryError("OOM s3cr3t"), "maxmemory"),
        (BusyLoadingError("LOADING s3cr3t"), "by itself"),
        (redis.ConnectionError("s3cr3t"), "does not answer"),
        (redis.TimeoutError("s3cr3t"), "does not answer"),
        (OSError("s3cr3t"), "does not answer"),
        (ResponseError("s3cr3t"), "ResponseError"),
        (RedisClusterException("s3cr3t"), "RedisClusterException"),
        (KeyError("s3cr3t"), "store_prefix"),
    ],
)
def test_a_failure_says_what_to_do_and_nothing_that_the_server_said(
    clock: FakeClock, caplog: pytest.LogCaptureFixture, error: Exception, advice: str
) -> None:
    line = link(clock)
    assert line.health().ok
    line.fail(error)
    assert not line.health().ok
    assert advice in line.health().problem
    assert "s3cr3t" not in line.health().problem + caplog.text


def test_a_link_that_is_down_asks_nobody_but_who_probes(clock: FakeClock) -> None:
    failures: list[str] = []
    line = link(clock, failures)
    asked: list[Client] = []
    line.fail(redis.ConnectionError())
    line.fail(redis.ConnectionError())
    assert failures == ["failed"]
    with pytest.raises(Away):
        line.call(asked.append)
    assert not asked
    line.call(asked.append, probing=True)
    assert len(asked) == 1
    assert not line.is_up, "one answer is no repair: the mirror must be in step first"
    line.restore()
    assert line.is_up


def test_what_redis_py_raises_takes_the_link_down_and_what_it_does_not_is_a_defect(clock: FakeClock) -> None:
    line = link(clock)

    def refuse(client: Client) -> object:
        raise ResponseError("no")

    with pytest.raises(Away):
        line.call(refuse)
    assert not line.is_up
    with pytest.raises(ZeroDivisionError):
        line.call(lambda client: 1 // 0, probing=True)


def test_a_client_that_cannot_be_made_takes_the_link_down(clock: FakeClock) -> None:
    def make() -> Client:
        raise RedisClusterException("nobody there")

    line = Link(make, owned=True, clock=clock, failed=lambda: None)
    with pytest.raises(Away):
        line.is_cluster()
    line.restore()
    with pytest.raises(Away):
        line.call(lambda client: None)
    assert line.node_of("key") == ""
    line.close()


def test_an_outage_is_two_lines_and_a_flapping_link_a_line_a_minute(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="external_oms")
    line = link(clock)
    for _ in range(3600):  # an hour, a failure each second
        line.fail(redis.ConnectionError())
        clock.advance(1.0)
    line.restore()
    line.restore()
    assert [entry.levelname for entry in caplog.records] == ["WARNING", "INFO"]
    clock.advance(QUIET_SECONDS)
    caplog.clear()
    for _ in range(600):  # ten minutes, down and up every second
        line.fail(redis.ConnectionError())
        line.restore()
        clock.advance(1.0)
    assert len(caplog.records) == 20
    assert "60 outages since the last such line" in caplog.text


def test_an_outage_that_began_in_the_quiet_is_told_once_it_lasts(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    line = link(clock)
    line.fail(redis.ConnectionError())
    line.restore()
    caplog.clear()
    line.fail(redis.ConnectionError())
    assert not caplog.records
    clock.advance(QUIET_SECONDS)
    line.fail(redis.ConnectionError())
    assert len(caplog.records) == 1


def test_answers_are_text_whether_or_not_the_client_decodes() -> None:
    assert plain([b"\xc3\xa9", "é", 7, None, (b"a", [1.5])]) == ["é", "é", "7", None, ["a", ["1.5"]]]
    assert plain(b"\xff") == "\ufffd"
    with pytest.raises(ResponseError):
        plain([ResponseError("in a pipeline")])
