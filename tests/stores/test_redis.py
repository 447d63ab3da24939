"""The Redis store against the contract, on a real server."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from external_oms.stores.redis import RedisStore
from tests.support.clock import FakeClock
from tests.support.contract import TENANT, MakeElsewhere, MakeStore, SharedStoreContract
from tests.support.redis import RedisServer
from tests.support.waiting import wait_until

TENANTS = (TENANT, "other-tenant")


def in_step(store: RedisStore) -> RedisStore:
    """The store, once its first look at Redis has ended."""
    store.watch(TENANT)
    wait_until(lambda: store.verified_until > float("-inf"))
    return store


OPENED: list[RedisStore] = []
"""Handles on the machine's clock, to be closed by the process that opened them."""


def elsewhere(url: str, prefix: str) -> RedisStore:
    """A handle in another process, on the machine's clock."""
    store = RedisStore(url, prefix=prefix, tenants=TENANTS)
    OPENED.append(store)
    return in_step(store)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


class TestRedisStore(SharedStoreContract):
    instant_tolerance_seconds = 0.25
    visible_within_seconds = 5.0

    @pytest.fixture
    def prefix(self) -> str:
        """One per test: a living member repairs what is flushed under it, as it should."""
        return f"test-{secrets.token_hex(4)}"

    @pytest.fixture
    def make_store(self, server: RedisServer, clock: FakeClock, prefix: str) -> Iterator[MakeStore]:
        made: list[RedisStore] = []

        def make(*, history_rows: int = 10_000, history_seconds: float = 30 * 86_400.0) -> RedisStore:
            store = RedisStore(
                server.url,
                prefix=prefix,
                tenants=TENANTS,
                clock=clock,
                history_rows=history_rows,
                history_seconds=history_seconds,
            )
            made.append(store)
            return in_step(store)

        yield make
        for store in made:
            store.close()

    @pytest.fixture
    def make_elsewhere(self, server: RedisServer, prefix: str) -> Iterator[MakeElsewhere]:
        yield partial(elsewhere, server.url, prefix)
        while OPENED:
            OPENED.pop().close()

    @pytest.fixture
    def advance(self, server: RedisServer, clock: FakeClock) -> Callable[[float], None]:
        def advance(seconds: float) -> None:
            server.age(seconds)
            clock.advance(seconds)

        return advance
