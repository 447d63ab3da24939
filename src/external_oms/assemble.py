"""Settings in, the working parts out: the one module that knows every part."""

from __future__ import annotations

import importlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import requests

from external_oms.auth import ClientCredentials, StaticToken, TokenSource
from external_oms.cache import Cache
from external_oms.client import ConfigClient
from external_oms.clock import SYSTEM_CLOCK, Clock
from external_oms.config import Reading
from external_oms.errors import ReadError, SettingsError
from external_oms.members import Reporter
from external_oms.operations import Operations
from external_oms.settings import Settings, TenantSettings
from external_oms.signals import Signal
from external_oms.stores.base import Store
from external_oms.stores.memory import MemoryStore
from external_oms.workers import Workers

__all__ = ["Renewal", "Service", "assemble", "make_store", "token_source"]


@dataclass(frozen=True, slots=True)
class Renewal:
    """A try to obtain an access token.

    Attributes:
        tenant: Whose.
        error: Why it failed; None where it did not.
    """

    tenant: str
    error: ReadError | None


@dataclass(frozen=True, slots=True)
class Service:
    """The parts, put together.

    Attributes:
        settings: What they were made from.
        clock: What tells them the time.
        store: Where records live.
        clients: The config API of each tenant.
        cache: What answers.
        operations: What changes.
        reporter: What tells the others what this process serves, once it is started: by a provider, for who only looks
            or switches is no member.
        renewals: Told of every try to obtain an access token.
    """

    settings: Settings
    clock: Clock
    store: Store
    clients: Mapping[str, ConfigClient]
    cache: Cache
    operations: Operations
    reporter: Reporter
    renewals: Signal[Renewal]

    def after_fork(self) -> None:
        """In a forked child: let go of every socket, lock and thread of the parent."""
        self.cache.after_fork()
        for client in self.clients.values():
            client.after_fork()
        self.reporter.restart()

    def reopen(self) -> None:
        """Take up work again after `close`."""
        self.cache.reopen()
        self.reporter.restart()

    def close(self, seconds: float = 1.0) -> None:
        """End every thread and connection within so many seconds; idempotent, and the parts work again after it."""
        self.cache.close(seconds, abort=self._abort)

    def _abort(self) -> None:
        for client in self.clients.values():
            client.abort()


def assemble(
    settings: Settings,
    *,
    session: requests.Session | None = None,
    store: Store | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> Service:
    """Put the parts together; nothing is started and nothing is called yet.

    Args:
        settings: What to make them from.
        session: The user's own session for the config API and the token endpoint; None: connections of our own.
        store: A store made by the caller; None: the one that the settings name.
        clock: What tells the time.

    Raises:
        SettingsError: The store needs an extra that is not installed.
        StoreError: The store's file cannot be used where it is.
    """
    renewals: Signal[Renewal] = Signal()
    clients = {
        tenant: _client(tenant, reached, settings, session, clock, renewals)
        for tenant, reached in settings.by_tenant().items()
    }
    shared = make_store(settings, clock=clock) if store is None else store
    cache = Cache(
        tenants=clients,
        store=shared,
        source=partial(_read, clients),
        windows=settings.windows,
        timeout_seconds=settings.timeout_seconds,
        clock=clock,
        random=random.SystemRandom().random,  # a seeded one would give every forked worker the same jitter
        background=settings.refresh == "background",
        runner=lambda poll, poll_seconds: Workers(
            readers=settings.max_concurrent_reads, clock=clock, poll=poll, poll_seconds=poll_seconds
        ),
    )
    operations = Operations(cache=cache, store=shared, writers=clients, clock=clock)
    reporter = Reporter(cache=cache, store=shared, clock=clock, random=random.SystemRandom().random)
    return Service(settings, clock, shared, clients, cache, operations, reporter, renewals)


def _read(clients: Mapping[str, ConfigClient], tenant: str, etag: str | None) -> Reading:
    return clients[tenant].read(etag)


def _client(
    tenant: str,
    reached: TenantSettings,
    settings: Settings,
    session: requests.Session | None,
    clock: Clock,
    renewals: Signal[Renewal],
) -> ConfigClient:
    return ConfigClient(
        tenant=tenant,
        settings=reached,
        token=token_source(tenant, reached, settings, session, clock, renewals),
        session=session,
        clock=clock,
        timeout_seconds=settings.timeout_seconds,
        retry_after_max_seconds=settings.retry_after_max_seconds,
    )


def token_source(
    tenant: str,
    reached: TenantSettings,
    settings: Settings,
    session: requests.Session | None,
    clock: Clock,
    renewals: Signal[Renewal] | None = None,
) -> TokenSource:
    """Where one tenant's access tokens come from.

    Args:
        tenant: The tenant.
        reached: How its API is reached, and with which credentials.
        settings: The settings around it, for the timeouts.
        session: The user's own session, or None.
        clock: What tells the time.
        renewals: Told of every try to obtain a token.

    Raises:
        SettingsError: The tenant has no credentials.
    """
    if reached.access_token is not None:
        return StaticToken(reached.access_token)
    if reached.client_id is None or reached.client_secret is None:
        raise SettingsError("client_id", f"tenant {tenant!r} has no credentials")
    told: Signal[Renewal] = Signal() if renewals is None else renewals
    return ClientCredentials(
        tenant=tenant,
        endpoint=reached.token_endpoint(tenant),
        client_id=reached.client_id,
        client_secret=reached.client_secret,
        scope=reached.scope,
        session=session,
        clock=clock,
        timeout_seconds=settings.timeout_seconds,
        retry_after_max_seconds=settings.retry_after_max_seconds,
        on_renewal=lambda error: told.tell(Renewal(tenant, error)),
    )


def make_store(settings: Settings, *, clock: Clock = SYSTEM_CLOCK) -> Store:
    """The store that the settings name.

    Raises:
        SettingsError: It needs an extra that is not installed.
        StoreError: The store's file cannot be used where it is.
    """
    rows, seconds = settings.history_rows, settings.history_seconds
    scheme = settings.store.partition("://")[0]
    if scheme == "memory":
        return MemoryStore(clock=clock, history_rows=rows, history_seconds=seconds)
    if scheme == "sqlite":
        from external_oms.stores.sqlite import SqliteStore  # noqa: PLC0415 - a sixth of importing the package

        return SqliteStore(
            Path(settings.store.removeprefix("sqlite:///")), clock=clock, history_rows=rows, history_seconds=seconds
        )
    try:
        redis_store = importlib.import_module("external_oms.stores.redis")
    except ModuleNotFoundError as error:
        raise SettingsError(
            "store", "Redis needs the extra: pip install 'openfeature-provider-external-oms[redis]'"
        ) from error
    store: Store = redis_store.RedisStore(
        settings.store,
        prefix=settings.store_prefix,
        tenants=tuple(settings.by_tenant()),
        bound_seconds=settings.store_bound_seconds,
        clock=clock,
        history_rows=rows,
        history_seconds=seconds,
    )
    return store
