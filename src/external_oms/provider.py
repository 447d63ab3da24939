"""The OpenFeature provider: resolves the flag from the cache, sync and async, and publishes status and events."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from openfeature.evaluation_context import EvaluationContext
from openfeature.event import ProviderEvent, ProviderEventDetails
from openfeature.exception import ErrorCode, GeneralError, InvalidContextError, ProviderNotReadyError
from openfeature.flag_evaluation import FlagResolutionDetails, FlagValueType
from openfeature.hook import Hook
from openfeature.provider import AbstractProvider, Metadata, ProviderStatus

from external_oms.cache import Change, ChangeKind
from external_oms.config import FLAG_KEY
from external_oms.errors import NothingToServe, TenantError, Unavailable
from external_oms.policy import Evaluation, Freshness, Source, State
from external_oms.resolution import SharedDetails, details_of, expired_details, refuse_key, refuse_type
from external_oms.sdk import repair_after_fork, status_in_sdk
from external_oms.settings import Settings
from external_oms.status import StatusTracker, TenantStatus
from external_oms.stores.base import Store

if TYPE_CHECKING:
    import requests

    from external_oms.wiring import Service

__all__ = ["ExternalOMSProvider"]

logger = logging.getLogger("external_oms")

ATTRIBUTE = "tenant"
"""The attribute of the evaluation context that names the tenant."""

RECONCILE_SECONDS = 0.01
"""How often, after `initialize` returned, the SDK is asked whether it has set its status, before ours are published."""

RECONCILE_TRIES = 500
"""After so many tries, five seconds, the SDK is taken to have done so."""

_EVENTS = {
    TenantStatus.READY: ProviderEvent.PROVIDER_READY,
    TenantStatus.STALE: ProviderEvent.PROVIDER_STALE,
    TenantStatus.ERROR: ProviderEvent.PROVIDER_ERROR,
}

_STATUSES: dict[ProviderStatus | None, TenantStatus] = {
    ProviderStatus.READY: TenantStatus.READY,
    ProviderStatus.STALE: TenantStatus.STALE,
    ProviderStatus.ERROR: TenantStatus.ERROR,
}

HotEntry = tuple[float, Sequence[int], int, int | None, SharedDetails]
"""Cached details: valid until an instant, and while a version word stands at its place."""


class ExternalOMSProvider(AbstractProvider):
    """Resolves `external_oms_enabled` for one tenant or several.

    Usable without the SDK too: `enabled`, `state`, `refresh`, `invalidate` and `set_enabled` need no registration.

    Args:
        settings: The settings; None reads the environment.
        session: The user's own session for the config API, with its proxies, certificates and adapters.
        store: A store made by the caller, in place of the one that the settings name.

    Attributes:
        service: The parts, for the server and the command line.
        hooks: What the SDK calls at each evaluation of this provider, beside its own hooks; empty, and then free.

    Raises:
        SettingsError: A setting is unknown, malformed or contradicts another.
        StoreError: The store's file cannot be used where it is.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        session: requests.Session | None = None,
        store: Store | None = None,
    ) -> None:
        super().__init__()
        # Half of what importing the package would take. This thread imports it, and not the first worker: a child that
        # is forked during an import keeps the lock of the module for ever.
        from external_oms.wiring import build_service  # noqa: PLC0415

        self.service: Service = build_service(
            Settings() if settings is None else settings, session=session, store=store
        )
        self._cache = self.service.cache
        self._monotonic = self.service.clock.monotonic
        self._when_expired = self.service.settings.when_expired
        self._metadata = Metadata(name="external-oms")
        self.hooks: list[Hook] = []
        self._hot: dict[str | None, HotEntry] = {}
        self._statuses = StatusTracker()
        self._publishing = threading.Lock()
        self._published: TenantStatus | None = None
        self._open = False  # whether the SDK has set the status that follows `initialize`
        self._shut = False
        self._cache.changes.subscribe(self._changed)
        self.service.heartbeat.start()
        _alive.add(self)

    def get_metadata(self) -> Metadata:
        """The provider's name."""
        return self._metadata

    def get_provider_hooks(self) -> list[Hook]:
        """Return the attribute `hooks`."""
        return self.hooks

    # -- resolving ------------------------------------------------------------------------------------------------

    def resolve_boolean_details(
        self,
        flag_key: str,
        default_value: bool,  # noqa: ARG002 - the SDK's form
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[bool]:
        """The flag, at once where a value may be served; else after one read, within the timeout.

        Raises:
            FlagNotFoundError: The key is another.
            InvalidContextError: The context names no tenant where several are configured, or an unknown one.
            GeneralError: Nothing may be served; the SDK serves the caller's default.
        """
        # the hot path, written out, because every order pays for a call of a function
        if flag_key == FLAG_KEY:
            attributes = evaluation_context.attributes if evaluation_context is not None else None
            try:
                hot = self._hot[attributes.get(ATTRIBUTE) if attributes else None]  # type: ignore[index]  # any attribute may be asked for
                until, versions, index, version, details = hot
            except Exception:  # noqa: BLE001, S110 - nothing was fresh so far, or a tenant of an odd type, refused below
                pass
            else:
                monotonic = self._monotonic  # loaded apart from its call, which CPython specializes
                if monotonic() < until and versions[index] == version:
                    return details
        tenant = self._tenant_of(flag_key, evaluation_context)
        return self._details(self._cache.lookup(tenant))

    async def resolve_boolean_details_async(
        self,
        flag_key: str,
        default_value: bool,  # noqa: ARG002 - the SDK's form
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[bool]:
        """As `resolve_boolean_details`; where it has to wait, it does not hold the event loop."""
        tenant = self._tenant_of(flag_key, evaluation_context)
        return self._cached_details(tenant) or self._details(await self._cache.lookup_async(tenant))

    def _cached_details(self, tenant: str | None) -> SharedDetails | None:
        """Return the details that were built for the last fresh evaluation, where they still hold."""
        try:
            hot = self._hot.get(tenant)
        except Exception:  # noqa: BLE001 - a tenant of an odd type, refused later
            return None
        if hot is not None:
            until, versions, index, version, details = hot
            if self._monotonic() < until and versions[index] == version:
                return details
        return None

    def _tenant_of(self, flag_key: str, context: EvaluationContext | None) -> str:
        refuse_key(flag_key)
        if self._shut:
            raise ProviderNotReadyError("the provider was shut down")
        try:
            attributes = context.attributes if context is not None else None
            return self._cache.tenant_of(attributes.get(ATTRIBUTE) if attributes else None)
        except TenantError as error:
            raise InvalidContextError(str(error)) from error

    def _details(self, evaluation: Evaluation) -> SharedDetails:
        details = details_of(evaluation)
        if details is None:
            return expired_details(evaluation, self._when_expired, self._cache.failure(evaluation))
        if evaluation.freshness is Freshness.FRESH and not self._shut:
            cached = details.as_cached() if evaluation.source is Source.API else details
            hot = (*self._cache.validity(evaluation), cached)
            self._hot[evaluation.tenant] = hot
            if len(self._cache.tenants) == 1:
                self._hot[None] = hot
        return details

    def resolve_string_details(
        self,
        flag_key: str,
        default_value: str,  # noqa: ARG002 - the SDK's form
        evaluation_context: EvaluationContext | None = None,  # noqa: ARG002 - the SDK's form
    ) -> NoReturn:
        """Never: the flag is a boolean."""
        refuse_type(flag_key, "a string")

    def resolve_integer_details(
        self,
        flag_key: str,
        default_value: int,  # noqa: ARG002 - the SDK's form
        evaluation_context: EvaluationContext | None = None,  # noqa: ARG002 - the SDK's form
    ) -> NoReturn:
        """Never: the flag is a boolean."""
        refuse_type(flag_key, "an integer")

    def resolve_float_details(
        self,
        flag_key: str,
        default_value: float,  # noqa: ARG002 - the SDK's form
        evaluation_context: EvaluationContext | None = None,  # noqa: ARG002 - the SDK's form
    ) -> NoReturn:
        """Never: the flag is a boolean."""
        refuse_type(flag_key, "a float")

    def resolve_object_details(
        self,
        flag_key: str,
        default_value: Sequence[FlagValueType] | Mapping[str, FlagValueType],  # noqa: ARG002 - the SDK's form
        evaluation_context: EvaluationContext | None = None,  # noqa: ARG002 - the SDK's form
    ) -> NoReturn:
        """Never: the flag is a boolean."""
        refuse_type(flag_key, "an object")

    # -- beside the SDK's -----------------------------------------------------------------------------------------

    def enabled(self, tenant: str | None = None) -> bool:
        """Return the value of the flag alone, by the same rules, for a loop that evaluates it often.

        Raises:
            TenantError: No tenant is named where several are configured, or it is unknown.
            NothingToServe: The SDK would serve the caller's default.
        """
        details = self._cached_details(tenant)
        if details is not None:
            return details.value
        name = self._cache.tenant_of(tenant)
        if self._shut:
            raise NothingToServe(name, Unavailable("the provider was shut down"))
        evaluation = self._cache.lookup(name)
        try:
            return self._details(evaluation).value
        except GeneralError as error:
            raise self._cache.failure(evaluation) from error

    def state(self, tenant: str | None = None) -> State:
        """What is known of the tenant; never waits.

        Raises:
            TenantError: No tenant is named where several are configured, or it is unknown.
        """
        return self._cache.state(self._cache.tenant_of(tenant))

    def refresh(self, tenant: str | None = None) -> State:
        """Read the API now, by a read that begins after this call, and return the new state.

        Raises:
            TenantError: No tenant is named where several are configured, or it is unknown.
            ReadError: The read failed; what is served otherwise stays as it was.
        """
        return self.service.operations.refresh(self._cache.tenant_of(tenant))

    def invalidate(self, tenant: str | None = None) -> int:
        """Serve nothing read before this call as fresh, in any process that shares the store; a read follows.

        Returns:
            The tenant's new generation.

        Raises:
            TenantError: No tenant is named where several are configured, or it is unknown.
        """
        return self.service.operations.invalidate(self._cache.tenant_of(tenant), actor="application")

    def set_enabled(self, value: bool, *, tenant: str | None = None) -> State:
        """Write the value to the config API and read it back; every process that shares the store follows.

        Raises:
            TenantError: No tenant is named where several are configured, or it is unknown.
            WriteError: The API refused the value, or no answer came and it could not be read back.
            ReadError: The write was not sent: no token, no connection, or the API asked to wait.
            TypeError: The value is not a boolean; nothing was written.
        """
        if not isinstance(value, bool):  # the API might take "off" for true
            raise TypeError(f"the flag is True or False, and not of type {type(value).__name__}")
        name = self._cache.tenant_of(tenant)
        return self.service.operations.set_enabled(name, enabled=value, actor="application")

    # -- life -----------------------------------------------------------------------------------------------------

    def initialize(self, evaluation_context: EvaluationContext, domain: str | None = None) -> None:  # noqa: ARG002 - the SDK's form; newer SDKs name the domain
        """Read every tenant once, waiting no longer than the timeout; idempotent.

        Raises:
            GeneralError: No tenant has a value that may be served. The provider goes on trying by itself, and becomes
                ready without another call.
        """
        if self._shut:
            self._shut = False
            self.service.reopen()
        self._open = False
        evaluations = self._cache.warm()
        serving = any(evaluation.servable is not None for evaluation in evaluations)
        self._published = TenantStatus.READY
        failure: GeneralError | None = None
        if not serving and self._when_expired in {"default", "last"}:
            self._published = TenantStatus.ERROR
            failure = GeneralError(str(self._cache.failure(evaluations[0])))
        self._reconcile_later(RECONCILE_TRIES)
        if failure is not None:
            raise failure

    def shutdown(self) -> None:
        """End every thread and connection within a second; idempotent, and `initialize` may be called again."""
        self._shut = True
        self._hot = {}
        self._open = False
        self.service.close()

    def emit(self, event: ProviderEvent, details: ProviderEventDetails) -> None:
        """Emit an event to the SDK; nothing happens where the provider is not registered."""
        try:
            super().emit(event, details)
        except (AttributeError, RuntimeError):
            # detached between the SDK's own check and call, or the interpreter is going down: there is no listener
            logger.debug("event %s was not delivered", event.value)

    def _reconcile_later(self, tries: int) -> None:
        when = self._monotonic() + RECONCILE_SECONDS
        self._cache.runner.at((id(self), "reconcile"), when, lambda: self._reconcile(tries))

    def _reconcile(self, tries: int) -> None:
        """Publish our status once the SDK has set its own after `initialize`, which would overwrite ours."""
        status = status_in_sdk(getattr(self, "_on_emit", None), self)
        if status is ProviderStatus.NOT_READY and tries > 0 and not self._shut:
            self._reconcile_later(tries - 1)
            return
        self._published = _STATUSES.get(status) or self._published
        self._open = not self._shut
        self._publish(None)

    def _changed(self, change: Change) -> None:
        transition = self._statuses.observe(change.evaluation)
        if transition is not None:
            logger.warning(transition.line)  # recovery too: a log that shows the beginning shows the end
        if change.kind is ChangeKind.VALUE:
            self.emit_provider_configuration_changed(
                ProviderEventDetails(flags_changed=[FLAG_KEY], metadata={"tenant": change.tenant})
            )
        self._publish(transition.reason if transition is not None else None)

    def _publish(self, reason: str | None) -> None:
        """Emit the event that brings the status in the SDK to ours; one thread at a time, so that the last is true."""
        while self._open and self._statuses.aggregate() not in {None, self._published}:
            if not self._publishing.acquire(blocking=False):
                return  # the thread that publishes looks again before it ends
            try:
                status = self._statuses.aggregate()
                if status is None or status is self._published:
                    continue
                self._published = status
                code = ErrorCode.GENERAL if status is TenantStatus.ERROR else None
                self.emit(_EVENTS[status], ProviderEventDetails(message=reason or None, error_code=code))
            finally:
                self._publishing.release()

    def _after_fork(self) -> None:
        """Forget the locks and threads of the parent in a forked child, and follow the store from now on."""
        self._hot = {}
        self._publishing = threading.Lock()
        self._statuses.after_fork()
        self.service.after_fork()
        status = status_in_sdk(getattr(self, "_on_emit", None), self)
        self._open = not self._shut and status is not ProviderStatus.NOT_READY
        if status is ProviderStatus.NOT_READY and not self._shut:
            self._end_initialization()

    def _end_initialization(self) -> None:
        """End the initialization that was under way in the parent, whose thread is not in this process."""
        if any(self._cache.peek(tenant).servable for tenant in self._cache.tenants):
            self._published, self._open = TenantStatus.READY, True
            self.emit_provider_ready(ProviderEventDetails())
        else:
            threading.Thread(target=self._initialize_anew, name="external-oms-initialize", daemon=True).start()

    def _initialize_anew(self) -> None:
        try:
            self.initialize(EvaluationContext())
        except GeneralError as error:
            self.emit_provider_error(ProviderEventDetails(message=error.error_message, error_code=ErrorCode.GENERAL))
        else:
            self.emit_provider_ready(ProviderEventDetails())


_alive: weakref.WeakSet[ExternalOMSProvider] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    if _alive:
        repair_after_fork()
    for provider in tuple(_alive):
        provider._after_fork()  # noqa: SLF001 - of this module's own class


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
