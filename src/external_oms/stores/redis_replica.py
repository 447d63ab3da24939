"""The replica of the entries in a process: evaluations load from it.

A reply of Redis is taken into the replica unless its request was sent before the replica learned of a later version.
So the replica goes back where Redis does: where Redis has lost changes. What follows from that, `fallback` decides.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from external_oms.entry import Entry, shift
from external_oms.stores.redis_scripts import NOTHING, Found, as_bytes

__all__ = ["Replica", "State", "Tenant"]


@dataclass(frozen=True, slots=True)
class State:
    """What this process knows of a tenant's entry.

    Attributes:
        found: The entry as Redis holds it.
        entry: The same entry, its instants on the clock of this process.
        order: A number between those of the requests before and after the entry was learned. The reply to a request
            with a lower number may be older than the entry.
    """

    found: Found = NOTHING
    entry: Entry = NOTHING.entry
    order: int = 0


class Tenant:
    """The keys of one tenant in Redis, and what this process knows of its entry.

    Attributes:
        name: The tenant.
        storage_key: The name under which Redis keeps it.
        keys: The keys of its entry and history, and of what is set aside of them.
        index: The place of its version word.
        state: What this process knows.
        writing: The versions that this process stores at this moment.
    """

    __slots__ = ("_base", "index", "keys", "name", "state", "storage_key", "writing")

    def __init__(self, name: str, storage_key: str, prefix: str, index: int) -> None:
        self._base = f"{prefix}:2:{{{storage_key}}}:"
        self.name = name
        self.storage_key = storage_key
        self.keys = [f"{self._base}{key}" for key in ("entry", "history", "set-aside:entry", "set-aside:history")]
        self.index = index
        self.state = State()
        self.writing: set[bytes] = set()

    def id_key(self, delivery_id: str) -> str:
        """Return the key of a delivery id: its hash, because senders choose what an id holds."""
        return f"{self._base}id:{hashlib.sha256(delivery_id.encode(errors='surrogatepass')).hexdigest()}"


class Replica:
    """The entries of all tenants that this process uses.

    Args:
        keys: Tenants, each with its storage key. The storage key of another tenant is its name.
        prefix: The beginning of every key.
        orders: Numbers requests and states.
        changed: Called when another process changed an entry, without a lock.

    Attributes:
        versions: The version words.
    """

    def __init__(
        self, keys: Mapping[str, str], *, prefix: str, orders: Iterator[int], changed: Callable[[], None]
    ) -> None:
        self._keys = dict(keys)
        self._prefix = prefix
        self._notify = changed
        self._orders = orders
        self.versions: list[int] = []
        self._tenants: dict[str, Tenant] = {}
        self._by_storage_key: dict[bytes, Tenant] = {}
        self._lock = threading.Lock()
        self._changed: set[str] = set()
        for name in self._keys:
            self.tenant(name)

    def after_fork(self) -> None:
        """Make a new lock in a forked child, and mark every entry as unverified until the first pull."""
        self._lock = threading.Lock()
        self._changed = set()
        for tenant in self._tenants.values():
            tenant.state = replace(tenant.state, entry=replace(tenant.state.entry, verified=False))
            tenant.writing = set()
            self.versions[tenant.index] += 1

    def storage_key(self, name: str) -> str:
        """Return the name under which Redis keeps a tenant."""
        return self._keys.get(name, name)

    def tenant(self, name: str) -> Tenant:
        """Return a tenant; one that is asked for the first time is followed from now on."""
        tenant = self._tenants.get(name)
        if tenant is None:
            with self._lock:
                tenant = self._tenants.get(name)
                if tenant is None:
                    tenant = Tenant(name, self.storage_key(name), self._prefix, len(self.versions))
                    self.versions.append(0)
                    self._tenants = {**self._tenants, name: tenant}  # others may iterate over the old one
                    self._by_storage_key[tenant.storage_key.encode()] = tenant
        return tenant

    def tenants(self) -> Collection[Tenant]:
        """Return every tenant that is followed."""
        return self._tenants.values()

    def touch(self, tenant: Tenant) -> None:
        """Change the version word of a tenant."""
        with self._lock:
            self.versions[tenant.index] += 1

    def take_changed(self) -> Collection[str]:
        """Return the tenants whose entry another process changed since the last call."""
        with self._lock:
            changed, self._changed = self._changed, set()
        return changed

    def named_in(self, message: bytes | str) -> Tenant | None:
        """Return the tenant that a message names; None where there is none, or this process has that version."""
        version, _, storage_key = as_bytes(message).partition(b" ")
        tenant = self._by_storage_key.get(storage_key)
        is_news = tenant is not None and version != tenant.state.found.expected and version not in tenant.writing
        return tenant if is_news else None

    def adopt(self, tenant: Tenant, found: Found, entry: Entry | None = None) -> None:
        """Take what Redis holds into the replica, unless the replica has learned of a later version.

        Args:
            tenant: The tenant.
            found: The reply.
            entry: The entry on the clock of this process, where this process has stored it; None where it has not.
        """
        known = tenant.state
        if found.version == known.found.version and known.entry.verified:
            return
        if entry is None:
            entry = shift(found.entry, found.early_offset)
        with self._lock:
            known = tenant.state
            if found.version <= known.found.version and found.order < known.order:
                return
            tenant.state = State(found, entry, next(self._orders))
            self.versions[tenant.index] += 1
            is_own = found.expected in tenant.writing
            if not is_own:
                self._changed.add(tenant.name)
        if not is_own:
            self._notify()
