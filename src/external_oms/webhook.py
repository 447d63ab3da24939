"""The webhook without a web framework: headers and body of a delivery in, status, headers and document out.

A view of any framework reads the body, calls `Webhook.receive` and returns what it says. A genuine delivery is a hint
that names a tenant: it invalidates the tenant, and the value comes from the config API.

The checks have a fixed order: size, authenticity (over the raw bytes), content type, JSON, tenant, rate. A sender that
cannot sign learns nothing but 401, with one text for every reason.

Source: Standard Webhooks 1.0.0; the platform's envelope `{"tenant", "name", "published_at", "payload"}`.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

from external_oms import signature
from external_oms.errors import ExternalOMSError, SettingsError, SignatureError
from external_oms.forks import call_after_fork
from external_oms.operations import DeliveryResult
from external_oms.problems import JSON, PROBLEM_TYPE, Problem, check_json_type, json_object, problem_of
from external_oms.provider import ExternalOMSProvider
from external_oms.settings import Settings
from external_oms.signals import Signal
from external_oms.tenants import is_tenant_name

__all__ = ["ACTOR", "PATH", "RateLimits", "RefusalLog", "Response", "Webhook", "check_webhook_credentials"]

PATH = "/webhooks/external-oms"
"""The path of the webhook on every server."""

ACTOR = "webhook"
"""The first word of the actor of a delivery in the history; the credential that it showed follows."""

SUMMARY_SECONDS = 60.0
"""The least time between two log lines about refusals, in seconds."""

logger = logging.getLogger("external_oms.webhook")


@dataclass(frozen=True, slots=True)
class Response:
    """The response to a delivery.

    Attributes:
        status: The HTTP status.
        headers: The headers, the content type included.
        document: The JSON document of the body.
    """

    status: int
    headers: Mapping[str, str]
    document: Mapping[str, JSON]

    @property
    def body(self) -> bytes:
        """The document as bytes."""
        return json.dumps(self.document).encode()


class RateLimits(Protocol):
    """Counts requests; `external_oms.web` has one."""

    def hit(self, what: str, who: str, *, per_minute: int) -> None:
        """Count a request, or raise `Problem` 429."""
        ...

    def check(self, what: str, who: str, *, per_minute: int) -> None:
        """Raise `Problem` 429 where `hit` would, and count nothing."""
        ...


class RefusalLog:
    """One log line a minute about refused requests, with their number, instead of one for each.

    The first refusal is logged at once; those that follow are counted and logged together a minute later.

    Args:
        log: Where the lines go.
        what: What is refused, in the plural, such as `deliveries`.
        monotonic: The present instant, in seconds.
        at: Calls a function at an instant.
    """

    def __init__(
        self,
        log: logging.Logger,
        what: str,
        *,
        monotonic: Callable[[], float],
        at: Callable[[str, float, Callable[[], None]], object],
    ) -> None:
        self._log = log
        self._what = what
        self._monotonic = monotonic
        self._at = at
        self.after_fork()
        call_after_fork(self)

    def after_fork(self) -> None:
        """Forget the counts of the parent in a forked child."""
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._until = 0.0
        self._reason = ""

    def count(self, kind: str, reason: str) -> None:
        """Count a refusal.

        Args:
            kind: A stable word.
            reason: Why, for the operator; never text that the sender wrote.
        """
        now = self._monotonic()
        with self._lock:
            if now < self._until:
                self._counts[kind] += 1
                self._reason = reason
                return
            self._until = now + SUMMARY_SECONDS
        self._log.warning("refused %s: %s (%s); more are counted for a minute", self._what, kind, reason)
        self._at(f"refused {self._what}", now + SUMMARY_SECONDS, self.flush)

    def flush(self) -> None:
        """Log what was counted since the last line, if anything was."""
        now = self._monotonic()
        with self._lock:
            counts, self._counts = self._counts, Counter()
            if not counts:
                return
            self._until = now + SUMMARY_SECONDS
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in counts.most_common())
        self._log.warning(
            "refused %s in the last minute: %d (%s); last: %s", self._what, counts.total(), kinds, self._reason
        )
        self._at(f"refused {self._what}", now + SUMMARY_SECONDS, self.flush)


def check_webhook_credentials(settings: Settings) -> None:
    """Refuse settings with which the webhook would take no delivery, or every one.

    Raises:
        SettingsError: A secret is malformed, or none is set and `insecure` is not either.
    """
    for number, secret in enumerate(settings.webhook_secrets, start=1):
        try:
            signature.check_secret(secret.get_secret_value())
        except SignatureError as error:
            raise SettingsError("webhook_secrets", f"entry {number} {error}") from error
    if not (settings.webhook_secrets or settings.webhook_api_keys or settings.insecure):
        raise SettingsError(
            "webhook_secrets",
            "is not set, and neither is webhook_api_keys, so no delivery could be genuine; set one of them "
            "(`insecure` does without, on loopback only)",
        )


class Webhook:
    """The webhook of one provider.

    ::

        webhook = Webhook(provider)

        @app.post("/webhooks/external-oms")
        def deliver(request):
            response = webhook.receive(request.headers, request.body)
            return JSONResponse(response.document, response.status, response.headers)

    `receive` waits for the read that follows a delivery, `timeout_seconds` at most: an async view calls it in a thread.

    Args:
        provider: The provider.
        limits: Counts deliveries per tenant and refused ones per address; None: they are not limited.

    Attributes:
        refused: Sent with the kind of problem of every refused delivery.

    Raises:
        SettingsError: A secret is malformed, or nothing tells a genuine delivery.
    """

    def __init__(self, provider: ExternalOMSProvider, *, limits: RateLimits | None = None) -> None:
        self._service = provider.service
        self._settings = provider.service.settings
        check_webhook_credentials(self._settings)
        self._secrets = [secret.get_secret_value() for secret in self._settings.webhook_secrets]
        self._keys = [key.get_secret_value() for key in self._settings.webhook_api_keys]
        self._limits = limits
        self.refused: Signal[str] = Signal()
        self.refusals = RefusalLog(
            logger,
            "deliveries",
            monotonic=provider.service.clock.monotonic,
            at=provider.service.cache.runner.at,
        )

    @property
    def max_bytes(self) -> int:
        """The largest body that is taken, in bytes."""
        return self._settings.webhook_max_bytes

    def receive(self, headers: Mapping[str, str], body: bytes, *, address: str = "") -> Response:
        """Take a delivery, wait for the read that follows, and return the response.

        Args:
            headers: The headers of the request; their case does not matter.
            body: The raw body, as received. A view need not read more than `max_bytes` + 1.
            address: The address of the sender, by which refused deliveries are limited.
        """
        try:
            result = self._receive({name.lower(): value for name, value in headers.items()}, body, address)
        except (Problem, ExternalOMSError) as error:
            return self.refuse(error)
        done = result.refreshed or result.duplicate
        if not result.duplicate:  # a captured delivery can be replayed thousands of times
            logger.info("tenant %s: delivery, generation %d", result.tenant, result.generation)
        return Response(
            HTTPStatus.OK if done else HTTPStatus.ACCEPTED,
            {"Content-Type": "application/json", "Cache-Control": "no-store"},
            _document(result),
        )

    def refuse(self, error: Problem | ExternalOMSError) -> Response:
        """Return the response to a delivery that is not taken, and count it."""
        problem = problem_of(error)
        reason = error.__cause__ if isinstance(error.__cause__, SignatureError) else problem.detail
        self.refusals.count(problem.kind, str(reason))
        self.refused.send(problem.kind)
        headers = {"Content-Type": PROBLEM_TYPE, "Cache-Control": "no-store", **problem.headers}
        return Response(problem.status, headers, problem.document)

    def _receive(self, headers: Mapping[str, str], body: bytes, address: str) -> DeliveryResult:
        if len(body) > self.max_bytes:
            raise Problem(413, f"the body is larger than {self.max_bytes} bytes")
        delivery_id, credential = self._authenticate(headers, body, address)
        check_json_type(headers.get("content-type", ""))
        tenant = self._service.cache.tenant_of(_tenant_in(json_object(body)))
        per_minute = self._settings.webhook_per_minute
        if self._limits is not None:
            self._limits.check("delivery", tenant, per_minute=per_minute)
        actor = f"{ACTOR} {credential}".rstrip()
        result = self._service.operations.deliver(tenant, delivery_id=delivery_id, actor=actor)
        if self._limits is not None and not result.duplicate:
            # A replay must not keep genuine deliveries out, and a delivery that the store could not take is repeated.
            self._count(tenant, per_minute)
        return result

    def _count(self, tenant: str, per_minute: int) -> None:
        assert self._limits is not None  # noqa: S101 - the caller has looked
        try:
            self._limits.hit("delivery", tenant, per_minute=per_minute)
        except Problem:
            return  # the delivery is taken already

    def _authenticate(self, headers: Mapping[str, str], body: bytes, address: str) -> tuple[str | None, str]:
        """Return the id of a genuine delivery, if it has one, and the credential that it showed.

        Raises:
            Problem: 401 with one text for every reason; 429 for an address that sends too many such deliveries.
        """
        if not (self._secrets or self._keys):  # only with `insecure`
            return _sane_id(headers), ""
        problem: SignatureError | None = None
        try:
            verified = signature.verify(
                body,
                headers,
                secrets=self._secrets,
                tolerance_seconds=self._settings.webhook_tolerance_seconds,
                now_wall=self._service.clock.wall(),
            )
        except SignatureError as error:
            verified, problem = None, error
        key = signature.matching_bearer(headers.get("authorization"), self._keys)  # compared in either case
        if verified is not None:
            return verified.delivery_id, f"secret {verified.entry}"
        if key:
            return _sane_id(headers), f"key {key}"
        if self._limits is not None:
            self._limits.hit("refused", address, per_minute=self._settings.webhook_per_minute)
        challenge = {"WWW-Authenticate": 'Bearer realm="external-oms"'}
        raise Problem(401, "the delivery is not genuine", headers=challenge) from problem


def _sane_id(headers: Mapping[str, str]) -> str | None:
    given = headers.get("webhook-id", "")
    return given if signature.is_delivery_id(given) else None


def _tenant_in(delivery: dict[str, JSON]) -> str | None:
    """Return the tenant that a delivery names, in either envelope; None where it names none.

    Raises:
        Problem: 400: `tenant` is no tenant's name, or the two places differ.
    """
    inner = delivery.get("data", {})
    if not isinstance(inner, dict):
        if "tenant" not in delivery:
            raise Problem(400, "`data` must be a JSON object")
        inner = {}
    named = [holder["tenant"] for holder in (delivery, inner) if "tenant" in holder]
    for name in named:
        if not isinstance(name, str) or not is_tenant_name(name):
            raise Problem(400, "`tenant` must be a tenant's name: [a-z0-9-], 1 to 63 characters")
        if name != named[0]:
            raise Problem(400, "`tenant` and `data.tenant` differ")
    return str(named[0]) if named else None


def _document(result: DeliveryResult) -> dict[str, JSON]:
    return {
        "tenant": result.tenant,
        "generation": result.generation,
        "duplicate": result.duplicate,
        "refreshed": result.refreshed,
        "enabled": result.enabled,
    }
