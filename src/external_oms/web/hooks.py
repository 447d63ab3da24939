"""What came of an evaluation, told to whoever counts; only where a hook was added does an evaluation pay for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from openfeature.flag_evaluation import FlagEvaluationDetails, FlagValueType, Reason
from openfeature.hook import Hook, HookContext, HookHints

from external_oms.cache import Cache
from external_oms.config import FLAG_KEY
from external_oms.errors import TenantError

__all__ = ["Evaluated", "MetricsHook", "Via"]

REASONS = frozenset(reason.value for reason in Reason)
"""Every reason there is: what another provider's hook or a newer SDK makes of it is counted as UNKNOWN."""


class Via:
    """By which way an evaluation came."""

    SDK = "sdk"
    """By a client of OpenFeature in this process."""
    OFREP = "ofrep"
    """Over HTTP."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The flag was evaluated.

    Attributes:
        tenant: For which configured tenant; empty where the caller named none that is.
        reason: Why the answer was what it was, in OpenFeature's words: `CACHED`, `STATIC`, `STALE`, `DEFAULT`, `ERROR`.
        via: How it came: `Via.SDK` or `Via.OFREP`.
    """

    tenant: str
    reason: str
    via: str


class MetricsHook(Hook):
    """Tells of every evaluation of `external_oms_enabled` by clients of OpenFeature.

    `ExternalOMS(app, metrics=True)` adds it to its provider; `openfeature.api.add_hooks` takes it as well.

    Args:
        cache: Knows the tenants.
        told: What is told; must not block.
    """

    def __init__(self, cache: Cache, told: Callable[[Evaluated], object]) -> None:
        self._cache = cache
        self._told = told

    def finally_after(
        self,
        hook_context: HookContext,
        details: FlagEvaluationDetails[FlagValueType],
        hints: HookHints,  # noqa: ARG002 - the SDK's form
    ) -> None:
        """Tell what came of it, an error included."""
        if hook_context.flag_key != FLAG_KEY:
            return
        reason = details.reason if details.reason in REASONS else Reason.UNKNOWN.value
        self._told(Evaluated(self._tenant(hook_context), str(reason), Via.SDK))

    def _tenant(self, asked: HookContext) -> str:
        try:
            return self._cache.tenant_of(asked.evaluation_context.attributes.get("tenant"))
        except TenantError:
            return ""
