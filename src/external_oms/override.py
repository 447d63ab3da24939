"""Overrides `external_oms_enabled` in this process, for tests; needs no extra and no provider."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from openfeature.evaluation_context import EvaluationContext
from openfeature.flag_evaluation import FlagResolutionDetails, Reason
from openfeature.provider import FeatureProvider, Metadata, ProviderStatus
from openfeature.provider._registry import ProviderRegistry, provider_registry

from external_oms.config import FLAG_KEY

__all__ = ["override_enabled"]


@dataclass(eq=False, frozen=True, slots=True)
class _Override:
    value: bool
    tenant: str | None
    domain: str | None


_active: list[_Override] = []
_lock = threading.Lock()


@contextmanager
def override_enabled(value: bool, tenant: str | None = None, *, domain: str | None = None) -> Iterator[None]:
    """Set `external_oms_enabled` to a value while the context lasts, in this process, for every thread.

    The override does not depend on the provider: it also holds for a provider that is registered, replaced or shut down
    while the context lasts, and for none at all. Other flags are evaluated by the registered provider. Overrides nest:
    the last one takes precedence.

    Args:
        value: The value.
        tenant: Only for evaluations whose context names this tenant; None: for all.
        domain: The OpenFeature domain of the client under test; None: clients of the default provider.
    """
    override = _Override(value, tenant, domain)
    with _lock:
        _active.append(override)
        # The SDK has no public way to evaluate by another provider than the one registered.
        vars(provider_registry).update(get_provider=_get_provider, get_provider_status=_get_provider_status)
    try:
        yield
    finally:
        with _lock:
            _active.remove(override)
            if not _active:
                del vars(provider_registry)["get_provider"], vars(provider_registry)["get_provider_status"]


def _get_provider(domain: str | None) -> FeatureProvider:
    """Look up the provider as the SDK does, wrapped where an override is active for the domain."""
    registered = ProviderRegistry.get_provider(provider_registry, domain)
    own = None if registered is provider_registry.get_default_provider() else domain
    overrides = [override for override in _active if override.domain in {domain, own}]
    return cast("FeatureProvider", _OverridingProvider(registered, overrides)) if overrides else registered


def _get_provider_status(provider: FeatureProvider) -> ProviderStatus:
    """Return the status that the SDK keeps; an override is ready even if the provider under it is not."""
    if isinstance(provider, _OverridingProvider):
        return ProviderStatus.READY
    return ProviderRegistry.get_provider_status(provider_registry, provider)


class _OverridingProvider:
    """The registered provider, except for the boolean evaluations that an override decides."""

    def __init__(self, registered: FeatureProvider, overrides: Sequence[_Override]) -> None:
        self._registered = registered
        self._overrides = overrides

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the provider has
        return getattr(self._registered, name)

    def get_metadata(self) -> Metadata:
        """Return a name that shows the override in logs."""
        return Metadata("external-oms-override")

    def resolve_boolean_details(
        self, flag_key: str, default_value: bool, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[bool]:
        """Return the value of the override, otherwise what the registered provider returns."""
        overridden = self._overridden(flag_key, evaluation_context)
        return overridden or self._registered.resolve_boolean_details(flag_key, default_value, evaluation_context)

    async def resolve_boolean_details_async(
        self, flag_key: str, default_value: bool, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[bool]:
        """Return the same, without blocking the event loop."""
        return self._overridden(flag_key, evaluation_context) or await self._registered.resolve_boolean_details_async(
            flag_key, default_value, evaluation_context
        )

    def _overridden(self, flag_key: str, context: EvaluationContext | None) -> FlagResolutionDetails[bool] | None:
        tenant = None if context is None else context.attributes.get("tenant")
        for override in reversed(self._overrides):
            if flag_key == FLAG_KEY and override.tenant in {None, tenant}:
                metadata: dict[str, bool | int | float | str] = {"source": "override"}
                if isinstance(tenant, str):
                    metadata["tenant"] = tenant
                variant = "on" if override.value else "off"
                return FlagResolutionDetails(
                    override.value, reason=Reason.STATIC, variant=variant, flag_metadata=metadata
                )
        return None
