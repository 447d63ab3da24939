"""Builds the components from the settings: the one module that knows all of them."""

from __future__ import annotations

import hashlib
import importlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import requests

from external_oms.auth import ClientCredentials, StaticToken, TokenSource
from external_oms.cache import Cache, CacheStore
from external_oms.client import ConfigClient
from external_oms.clock import SYSTEM_CLOCK, Clock
from external_oms.config import Reading
from external_oms.errors import ReadError, SettingsError
from external_oms.heartbeat import Heartbeat
from external_oms.operations import Operations
from external_oms.scheduler import Scheduler
from external_oms.settings import Settings, TenantSettings
from external_oms.signals import Signal
from external_oms.stores.base import Store
from external_oms.stores.fallback import Fallback
from external_oms.stores.memory import MemoryStore

__all__ = ["Service", "TokenRenewed", "build_service", "make_store", "storage_key", "token_source"]


@dataclass(frozen=True, slots=True)
class TokenRenewed:
    """An attempt to obtain an access token ended.

    Attributes:
        tenant: The tenant.
        error: Why it failed; None where it did not.
    """

    tenant: str
    error: ReadError | None


@dataclass(frozen=True, slots=True)
class Service:
    """The components of one provider.

    Attributes:
        settings: The settings that they were built from.
        clock: Tells the time.
        store: Holds the entries.
        clients: The config API of each tenant.
        cache: Serves the values.
        operations: Changes them.
        heartbeat: Reports what this process serves. A provider starts it; a command that reads or writes the flag is no
            member of the fleet.
        renewals: Sent after every attempt to obtain an access token.
    """

    settings: Settings
    clock: Clock
    store: CacheStore
    clients: Mapping[str, ConfigClient]
    cache: Cache
    operations: Operations
    heartbeat: Heartbeat
    renewals: Signal[TokenRenewed]

    def after_fork(self) -> None:
        """Forget the sockets, locks and threads of the parent in a forked child."""
        for client in self.clients.values():
            client.after_fork()
        self.heartbeat.restart()
        self.cache.after_fork()

    def reopen(self) -> None:
        """Work again after `close`."""
        self.cache.reopen()
        self.heartbeat.restart()

    def close(self, seconds: float = 1.0) -> None:
        """End every thread and connection within so many seconds; idempotent. `reopen` undoes it."""
        self.cache.close(seconds, abort=self._abort)

    def _abort(self) -> None:
        for client in self.clients.values():
            client.abort()


def build_service(
    settings: Settings,
    *,
    session: requests.Session | None = None,
    store: Store | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> Service:
    """Build the components; start nothing and call nothing yet.

    Args:
        settings: The settings.
        session: The user's own session for the config API and the token endpoint; None: connections of our own.
        store: A store made by the caller, which is not closed; None: the one that the settings name.
        clock: Tells the time.

    Raises:
        SettingsError: The store needs an extra that is not installed, or its URL is malformed.
        StoreError: The file of the store cannot be used where it is.
    """
    renewals: Signal[TokenRenewed] = Signal()
    by_tenant = settings.by_tenant()
    clients = {
        tenant: _client(tenant, reached, settings, session, clock, renewals) for tenant, reached in by_tenant.items()
    }
    draw = random.SystemRandom().random  # a seeded one would give every forked worker the same jitter
    shared = make_store(settings, clock=clock) if store is None else store
    if isinstance(shared, MemoryStore):
        cache_store: CacheStore = shared
    else:
        cache_store = Fallback(
            shared, clock=clock, random=draw, history_rows=settings.history_rows, owned=store is None
        )
    background = settings.refresh == "background"
    cache = Cache(
        tenants=clients,
        store=cache_store,
        source=partial(_read, clients),
        windows=settings.windows,
        timeout_seconds=settings.timeout_seconds,
        clock=clock,
        random=draw,
        background=background,
        waits_after_failure=not background and settings.when_expired == "default",
        max_waiters=settings.max_waiters_per_tenant,
        runner=lambda poll, poll_seconds: Scheduler(
            workers=settings.max_concurrent_reads, clock=clock, poll=poll, poll_seconds=poll_seconds
        ),
    )
    operations = Operations(cache=cache, store=cache_store, writers=clients, clock=clock)
    heartbeat = Heartbeat(cache=cache, store=cache_store, clock=clock, random=draw)
    return Service(settings, clock, cache_store, clients, cache, operations, heartbeat, renewals)


def _read(clients: Mapping[str, ConfigClient], tenant: str, etag: str | None) -> Reading:
    return clients[tenant].read(etag)


def _client(
    tenant: str,
    reached: TenantSettings,
    settings: Settings,
    session: requests.Session | None,
    clock: Clock,
    renewals: Signal[TokenRenewed],
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
    renewals: Signal[TokenRenewed] | None = None,
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
    told: Signal[TokenRenewed] = Signal() if renewals is None else renewals
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
        on_renewal=lambda error: told.send(TokenRenewed(tenant, error)),
    )


def storage_key(tenant: str, config_url: str) -> str:
    """Return the name under which a store keeps a tenant: the state belongs to the tenant at one upstream address.

    Two environments that share a store by mistake, such as staging and production, never see each other's values.
    """
    return f"{tenant}@{hashlib.sha256(config_url.encode()).hexdigest()[:12]}"


def make_store(settings: Settings, *, clock: Clock = SYSTEM_CLOCK) -> Store:
    """Return the store that the settings name.

    Raises:
        SettingsError: It needs an extra that is not installed, or its URL is malformed.
        StoreError: The file of the store cannot be used where it is.
    """
    rows, seconds = settings.history_rows, settings.history_seconds
    keys = {tenant: storage_key(tenant, reached.config_url(tenant)) for tenant, reached in settings.by_tenant().items()}
    scheme = settings.store.partition("://")[0]
    if scheme == "memory":
        return MemoryStore(clock=clock, history_rows=rows, history_seconds=seconds)
    if scheme == "sqlite":
        sqlite = importlib.import_module("external_oms.stores.sqlite")
        path = Path(settings.store.removeprefix("sqlite:///"))
        file_store: Store = sqlite.SqliteStore(path, keys=keys, clock=clock, history_rows=rows, history_seconds=seconds)
        return file_store
    try:
        redis = importlib.import_module("external_oms.stores.redis")
    except ModuleNotFoundError as error:
        raise SettingsError(
            "store", "Redis needs the extra: pip install 'openfeature-provider-external-oms[redis]'"
        ) from error
    fleet_store: Store = redis.RedisStore(
        settings.store,
        prefix=settings.store_prefix,
        keys=keys,
        bound_seconds=settings.store_bound_seconds,
        clock=clock,
        history_rows=rows,
        history_seconds=seconds,
    )
    return fleet_store
