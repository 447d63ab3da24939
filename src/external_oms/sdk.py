"""What the OpenFeature SDK hides or loses, touched in this one place; where it is not as known, nothing is done.

Known: openfeature-sdk 0.10. Its registry calls a provider back through a bound method of its own, from which the status
it keeps can be read. After a fork its pool of event handlers has threads in name only, and an initialization that was
under way in the parent never ends.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openfeature.provider import FeatureProvider, ProviderStatus

__all__ = ["repair_after_fork", "status_in_sdk"]

_RLOCK = type(threading.RLock())


def status_in_sdk(on_emit: Callable[..., Any] | None, provider: FeatureProvider) -> ProviderStatus | None:
    """The status that the SDK keeps of a provider; None where it cannot be told.

    Args:
        on_emit: What the SDK attached to the provider.
        provider: The provider.
    """
    registry = getattr(on_emit, "__self__", None)
    ask = getattr(registry, "get_provider_status", None)
    if not callable(ask):
        return None
    status = ask(provider)
    return status if isinstance(status, ProviderStatus) else None


def repair_after_fork() -> None:
    """In a forked child, give the SDK what it lost: threads for its event handlers, and locks that nobody holds.

    Its pool counts the parent's threads as its own, so the first events of a child would wait for them for ever; and a
    lock that another thread held at the instant of the fork would never be let go. Each thing is replaced only where it
    is what it is known to be.
    """
    events = sys.modules.get("openfeature._event_support")
    if events is not None:
        pool = getattr(events, "_event_executor", None)
        if type(pool) is ThreadPoolExecutor:
            vars(events)["_event_executor"] = ThreadPoolExecutor(thread_name_prefix="openfeature-event-handler")
        for name in ("_global_lock", "_client_lock"):
            _renew_lock(events, name)
    registry = getattr(sys.modules.get("openfeature.provider._registry"), "provider_registry", None)
    if registry is not None:
        _renew_lock(registry, "_lock")


def _renew_lock(holder: object, name: str) -> None:
    if isinstance(getattr(holder, name, None), _RLOCK):
        setattr(holder, name, threading.RLock())
