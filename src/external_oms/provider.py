"""OpenFeature's face: five types, sync and async, statuses and events; thin over the cache, fast where hot."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import NoReturn

import requests
from openfeature.evaluation_context import EvaluationContext
from openfeature.event import ProviderEvent, ProviderEventDetails
from openfeature.exception import ErrorCode, GeneralError, InvalidContextError, ProviderNotReadyError
from openfeature.flag_evaluation import FlagResolutionDetails, FlagValueType
from openfeature.hook import Hook
from openfeature.provider import AbstractProvider, Metadata, ProviderStatus

from external_oms.assemble import Service, assemble
from external_oms.cache import Change, ChangeKind
from external_oms.config import FLAG_KEY
from external_oms.errors import NothingToServe, TenantError, Unavailable
from external_oms.freshness import Freshness
from external_oms.judgement import Answer, State
from external_oms.resolution import SharedDetails, details_of, expired_details, refuse_key, refuse_type
from external_oms.sdk import repair_after_fork, status_in_sdk
from external_oms.settings import Settings
from external_oms.status import Standing, Standings
from external_oms.stores.base import Store

__all__ = ["ExternalOMSProvider"]

logger = logging.getLogger("external_oms")

ATTRIBUTE = "tenant"
"""The attribute of the evaluation context that names the tenant."""

RECONCILE_SECONDS = 0.01
"""How often, after `initialize` returned, the SDK is asked whether it has set its status, before ours are published."""

RECONCILE_TRIES = 500
"""After so many tries, five seconds, the SDK is taken to have done so."""

_EVENTS = {
    Standing.READY: ProviderEvent.PROVIDER_READY,
    Standing.STALE: ProviderEvent.PROVIDER_STALE,
    Standing.ERROR: ProviderEvent.PROVIDER_ERROR,
}

_STANDINGS: dict[ProviderStatus | None, Standing] = {
    ProviderStatus.READY: Standing.READY,
    ProviderStatus.STALE: Standing.STALE,
    ProviderStatus.ERROR: Standing.ERROR,
}

Hot = tuple[float, Sequence[int], int, int | None, SharedDetails]
"""Until when, and while which word stands where, which details may be given again."""


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
        self.service: Service = assemble(Settings() if settings is None else settings, session=session, store=store)
        self._cache = self.service.cache
        self._monotonic = self.service.clock.monotonic
        self._when_expired = self.service.settings.when_expired
        self._metadata = Metadata(name="external-oms")
        self.hooks: list[Hook] = []
        self._hot: dict[str | None, Hot] = {}
        self._standings = Standings()
        self._publishing = threading.Lock()
        self._published: Standing | None = None
        self._open = False  # whether the SDK has set the status that follows `initialize`
        self._shut = False
        self._cache.changes.listen(self._take_note)
        self.service.reporter.start()
        _alive.add(self)

    def get_metadata(self) -> Metadata:
        """The provider's name."""
        return self._metadata

    def get_provider_hooks(self) -> list[Hook]:
        """What stands in `hooks`."""
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
        # the hot path, written out: what it costs is paid on every order
        if flag_key == FLAG_KEY:
            attributes = evaluation_context.attributes if evaluation_context is not None else None
            try:
                hot = self._hot.get(attributes.get(ATTRIBUTE) if attributes else None)  # type: ignore[arg-type]  # any attribute may be asked for
            except TypeError:  # an unhashable tenant; refused below
                hot = None
            if hot is not None:
                until, words, slot, word, details = hot
                if self._monotonic() < until and words[slot] == word:
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
        hot = self._hot.get(tenant)
        if hot is not None:
            until, words, slot, word, details = hot
            if self._monotonic() < until and words[slot] == word:
                return details
        return self._details(await self._cache.lookup_async(tenant))

    def _tenant_of(self, flag_key: str, context: EvaluationContext | None) -> str:
        refuse_key(flag_key)
        if self._shut:
            raise ProviderNotReadyError("the provider was shut down")
        try:
            return self._cache.tenant_of(context.attributes.get(ATTRIBUTE) if context is not None else None)
        except TenantError as error:
            raise InvalidContextError(str(error)) from error

    def _details(self, answer: Answer) -> SharedDetails:
        details = details_of(answer)
        if details is None:
            return expired_details(answer, self._when_expired, self._cache.failure(answer))
        if answer.freshness is Freshness.FRESH:
            self._warm(answer)
        return details

    def _warm(self, answer: Answer) -> None:
        """Have the fresh answer given again, as a cached one, while its warrant stands."""
        cached = details_of(self._cache.remembered(answer))
        if cached is not None and not self._shut:
            hot = (*self._cache.warrant(answer), cached)
            self._hot[answer.tenant] = hot
            if len(self._cache.tenants) == 1:
                self._hot[None] = hot

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
        """The flag for a hot loop: the value alone, by the same rules.

        Raises:
            TenantError: No tenant is named where several are configured, or it is unknown.
            NothingToServe: The SDK would serve the caller's default.
        """
        try:
            hot = self._hot.get(tenant)
        except TypeError:  # an unhashable tenant; refused below
            hot = None
        if hot is not None:
            until, words, slot, word, details = hot
            if self._monotonic() < until and words[slot] == word:
                return details.value
        name = self._cache.tenant_of(tenant)
        if self._shut:
            raise NothingToServe(name, Unavailable("the provider was shut down"))
        answer = self._cache.lookup(name)
        try:
            return self._details(answer).value
        except GeneralError as error:
            raise self._cache.failure(answer) from error

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
        """
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
        answers = self._cache.warm()
        serving = any(answer.servable is not None for answer in answers)
        self._published = Standing.READY
        failure: GeneralError | None = None
        if not serving and self._when_expired in {"default", "last"}:
            self._published = Standing.ERROR
            failure = GeneralError(str(self._cache.failure(answers[0])))
        self._cache.after(RECONCILE_SECONDS, lambda: self._reconcile(RECONCILE_TRIES))
        if failure is not None:
            raise failure

    def shutdown(self) -> None:
        """End every thread and connection within a second; idempotent, and `initialize` may be called again."""
        self._shut = True
        self._hot = {}
        self._open = False
        self.service.close()

    def emit(self, event: ProviderEvent, details: ProviderEventDetails) -> None:
        """Tell the SDK; a provider that is not, or no longer, registered tells nobody."""
        try:
            super().emit(event, details)
        except (AttributeError, RuntimeError):
            # detached between the SDK's own check and call, or the interpreter is going down: nobody is left to hear
            logger.debug("event %s was not delivered", event.value)

    def _reconcile(self, tries: int) -> None:
        """After `initialize`: wait until the SDK has set its status, for it would overwrite ours; then publish ours."""
        status = status_in_sdk(getattr(self, "_on_emit", None), self)
        if status is ProviderStatus.NOT_READY and tries > 0 and not self._shut:
            self._cache.after(RECONCILE_SECONDS, lambda: self._reconcile(tries - 1))
            return
        self._published = _STANDINGS.get(status) or self._published
        self._open = not self._shut
        self._publish(None)

    def _take_note(self, change: Change) -> None:
        edge = self._standings.observe(change.answer)
        if edge is not None:
            logger.log(logging.INFO if edge.after is Standing.READY else logging.WARNING, edge.line)
        if change.kind is ChangeKind.VALUE:
            self.emit_provider_configuration_changed(
                ProviderEventDetails(flags_changed=[FLAG_KEY], metadata={"tenant": change.tenant})
            )
        self._publish(edge.reason if edge is not None else None)

    def _publish(self, reason: str | None) -> None:
        """Bring the SDK's status to where the tenants stand; one publisher at a time: the last word is the newest."""
        while self._open and self._standings.overall() not in {None, self._published}:
            if not self._publishing.acquire(blocking=False):
                return  # whoever publishes looks again before it leaves
            try:
                standing = self._standings.overall()
                if standing is None or standing is self._published:
                    continue
                self._published = standing
                code = ErrorCode.GENERAL if standing is Standing.ERROR else None
                self.emit(_EVENTS[standing], ProviderEventDetails(message=reason or None, error_code=code))
            finally:
                self._publishing.release()

    def _after_fork(self) -> None:
        """In a forked child: the warm value stays; the first evaluation, by the long way, starts the threads."""
        self._hot = {}
        self._publishing = threading.Lock()
        self._standings.after_fork()
        self.service.after_fork()
        status = status_in_sdk(getattr(self, "_on_emit", None), self)
        self._open = not self._shut and status is not ProviderStatus.NOT_READY
        if status is ProviderStatus.NOT_READY and not self._shut:
            self._end_initialization()

    def _end_initialization(self) -> None:
        """End the initialization that was under way in the parent; its thread is not in this process."""
        if any(self._cache.peek(tenant).servable for tenant in self._cache.tenants):
            self._published, self._open = Standing.READY, True
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
