"""For users' tests: the config API to talk to, deliveries to send, and the flag set to what a test needs."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from openfeature import api
from openfeature.evaluation_context import EvaluationContext
from openfeature.flag_evaluation import FlagResolutionDetails, FlagValueType, Reason
from openfeature.hook import Hook
from openfeature.provider import AbstractProvider, FeatureProvider, Metadata
from openfeature.provider.no_op_provider import NoOpProvider

from external_oms.config import FLAG_KEY
from external_oms.emulator import ConfigAPIEmulator, Fault, Seen
from external_oms.signature import sign

__all__ = ["ConfigAPIEmulator", "Fault", "Override", "Seen", "override_enabled", "sign_delivery"]

_KEPT = "external_oms.testing.kept"
"""The domain under which the previous provider stays registered meanwhile, so that the SDK does not shut it down."""


def sign_delivery(
    body: bytes | str, secret: str, *, delivery_id: str | None = None, at: float | None = None
) -> dict[str, str]:
    """The headers of a genuine delivery by Standard Webhooks, its content type included.

    Args:
        body: The body, as it will be sent.
        secret: A `whsec_…` secret.
        delivery_id: The id that a repeated delivery shares; None makes one up.
        at: The moment of sending, seconds since the Unix epoch; None: now.

    Raises:
        SignatureError: The secret, the id or the moment is malformed.
    """
    raw = body.encode("utf-8") if isinstance(body, str) else body
    headers = sign(
        raw,
        secret=secret,
        delivery_id=delivery_id or f"msg_{uuid.uuid4().hex}",
        at_wall=time.time() if at is None else at,
    )
    return {"content-type": "application/json", **headers}


class Override(AbstractProvider):
    """An in-memory provider: it answers what was set, and everything else as the provider under it does.

    Args:
        under: The provider that was there before.
        domain: The domain that it is registered for; None: the default.
    """

    def __init__(self, under: FeatureProvider, domain: str | None = None) -> None:
        super().__init__()
        self.under = under
        self.domain = domain
        self._layers: list[_Layer] = []

    @contextmanager
    def layer(self, value: bool, tenant: str | None) -> Iterator[None]:
        """The value while the context lasts; the layer that came last wins."""
        layer = _Layer(value, tenant)
        self._layers.append(layer)
        try:
            yield
        finally:
            self._layers.remove(layer)

    def _set(self, flag_key: str, context: EvaluationContext | None) -> FlagResolutionDetails[bool] | None:
        tenant = None if context is None else context.attributes.get("tenant")
        for layer in reversed(self._layers):
            if flag_key == FLAG_KEY and layer.tenant in {None, tenant}:
                variant = "on" if layer.value else "off"
                about: dict[str, bool | int | float | str] = {"source": "override"}
                if isinstance(tenant, str):
                    about["tenant"] = tenant
                return FlagResolutionDetails(layer.value, reason=Reason.STATIC, variant=variant, flag_metadata=about)
        return None

    def get_metadata(self) -> Metadata:
        """A name of its own, so that a log shows the override."""
        return _METADATA

    def get_provider_hooks(self) -> list[Hook]:
        """Those of the provider under it."""
        return self.under.get_provider_hooks()

    def resolve_boolean_details(
        self, flag_key: str, default_value: bool, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[bool]:
        """What was set, or what the provider under it says."""
        found = self._set(flag_key, evaluation_context)
        return found or self.under.resolve_boolean_details(flag_key, default_value, evaluation_context)

    async def resolve_boolean_details_async(
        self, flag_key: str, default_value: bool, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[bool]:
        """The same, without stalling the loop where the provider under it does not."""
        found = self._set(flag_key, evaluation_context)
        return found or await self.under.resolve_boolean_details_async(flag_key, default_value, evaluation_context)

    def resolve_string_details(
        self, flag_key: str, default_value: str, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[str]:
        """What the provider under it says."""
        return self.under.resolve_string_details(flag_key, default_value, evaluation_context)

    def resolve_integer_details(
        self, flag_key: str, default_value: int, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[int]:
        """What the provider under it says."""
        return self.under.resolve_integer_details(flag_key, default_value, evaluation_context)

    def resolve_float_details(
        self, flag_key: str, default_value: float, evaluation_context: EvaluationContext | None = None
    ) -> FlagResolutionDetails[float]:
        """What the provider under it says."""
        return self.under.resolve_float_details(flag_key, default_value, evaluation_context)

    def resolve_object_details(
        self,
        flag_key: str,
        default_value: Sequence[FlagValueType] | Mapping[str, FlagValueType],
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[Sequence[FlagValueType] | Mapping[str, FlagValueType]]:
        """What the provider under it says."""
        return self.under.resolve_object_details(flag_key, default_value, evaluation_context)


@dataclass(eq=False, frozen=True, slots=True)
class _Layer:
    value: bool
    tenant: str | None


_METADATA = Metadata("external-oms-override")


@contextmanager
def override_enabled(value: bool, tenant: str | None = None, *, domain: str | None = None) -> Iterator[None]:
    """Let `external_oms_enabled` have this value while the context lasts, in this process, for every thread.

    Other flags go on as they are. The provider that was there is neither shut down nor initialized again; where the
    test itself sets another provider meanwhile, that one stays. Overrides nest: the last one wins.

    Args:
        value: The value.
        tenant: Only for evaluations whose context names this tenant; None: for all.
        domain: The OpenFeature domain of the client under test; None: the default.
    """
    previous = api.get_client(domain).provider
    if isinstance(previous, Override) and previous.domain == domain:
        with previous.layer(value, tenant):
            yield
        return
    kept = f"{_KEPT}.{domain or ''}"
    override = Override(previous, domain)
    api.set_provider_and_wait(previous, kept)  # bound already, so not initialized again
    api.set_provider_and_wait(override, domain)
    try:
        with override.layer(value, tenant):
            yield
    finally:
        if api.get_client(domain).provider is override:
            api.set_provider_and_wait(previous, domain)
        api.set_provider_and_wait(NoOpProvider(), kept)
