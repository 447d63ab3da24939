"""Metrics for Prometheus: states as gauges, computed at each scrape, and counts by prometheus-client.

States come from the store that every process shares, so each process gives the same answer. Counts belong to a process.
Where `PROMETHEUS_MULTIPROC_DIR` names a directory, prometheus-client keeps them there, and a scrape sums them over the
processes, those that have ended included; `external-oms serve` makes such a directory. Else they stand in a registry of
our own.

prometheus-client reads the variable when it is imported, so this module is imported when an application is made.
Counting and scraping each happen under a lock that is held over a fork, so that no child inherits a locked lock of the
library.
"""

from __future__ import annotations

import json
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from pathlib import Path

from flask import Blueprint, Response, current_app, request
from openfeature.flag_evaluation import FlagEvaluationDetails, FlagValueType, Reason
from openfeature.hook import Hook, HookContext, HookHints
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder
from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.registry import Collector

from external_oms import __version__
from external_oms.cache import Cache, Change
from external_oms.config import FLAG_KEY
from external_oms.entry import Failure
from external_oms.errors import SettingsError, TenantError
from external_oms.heartbeat import member_name
from external_oms.operations import DeliveryResult
from external_oms.policy import Freshness, State
from external_oms.records import Member
from external_oms.singleflight import ReadEnd
from external_oms.web.access import authorize
from external_oms.web.keys import Role
from external_oms.web.state import DIRECTORY_VARIABLE, OMS, Evaluation, current_oms
from external_oms.wiring import TokenRenewed

__all__ = ["DIRECTORY_VARIABLE", "Metrics", "MetricsHook", "are_shared", "bp", "exposition", "init_app"]

EXTENSION = "external_oms_metrics"

PREFIX = "external_oms_"
"""The prefix of every metric."""

READ_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""In seconds: from an API next door to the longest sensible timeout_seconds."""

LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""In seconds: from memory of the same process to a fleet that has lost its store."""

_REASONS = ("CACHED", "STATIC", "STALE", "DEFAULT", "ERROR")
_DELIVERED = ("read", "later", "duplicate")
_KNOWN_REASONS = frozenset(reason.value for reason in Reason)

bp = Blueprint("metrics", __name__)

_counting = threading.RLock()
_scraping = threading.RLock()


@bp.get("/metrics")
def metrics() -> Response:
    """Return every metric."""
    if not current_oms.settings.metrics_open:
        authorize(Role.VIEWER)
    if request.environ.get("wsgi.multiprocess") and not are_shared():
        current_oms.warn_once(
            "this server has several processes, and each scrape of /metrics counts the one that answers it; have %s "
            "name an empty directory before the server starts",
            DIRECTORY_VARIABLE,
        )
    current_oms.cache.start()  # a process that gets no other request must not report old states
    body, content_type = exposition(current_app.extensions[EXTENSION], request.headers.get("Accept", ""))
    return Response(body, content_type=content_type)


def exposition(collector: Collector, accept: str) -> tuple[bytes, str]:
    """Return the metrics as text, and its type: OpenMetrics where the scraper prefers it."""
    try:
        encoder, content_type = choose_encoder(accept)
        return encoder(collector), content_type
    except (ValueError, TypeError):  # a version that is no number
        return generate_latest(collector), CONTENT_TYPE_PLAIN_0_0_4


class _Counts:
    """The counts, in a registry or in the shared directory."""

    def __init__(self, registry: CollectorRegistry | None) -> None:
        counter = partial(Counter, registry=registry)
        self.reads = counter(
            PREFIX + "reads",
            "Reads of the config API whose outcome was stored, by result; docs/failure-modes.md explains every result "
            "other than ok.",
            ("tenant", "result"),
        )
        self.read_seconds = Histogram(
            PREFIX + "read_duration_seconds",
            "Duration of reads of the config API; near timeout_seconds, ask its operators before you raise that.",
            ("tenant", "outcome"),
            buckets=READ_BUCKETS,
            registry=registry,
        )
        self.evaluations = counter(
            PREFIX + "evaluations",
            "Evaluations of the flag, by reason and way; DEFAULT and ERROR had no value that may be served, so look at "
            "external_oms_freshness. The value is none where the caller's own default decided.",
            ("tenant", "reason", "via", "value"),
        )
        self.deliveries = counter(
            PREFIX + "deliveries",
            "Deliveries to the webhook: read (value read again), later (the read follows), duplicate, or why refused; "
            "unauthorized means a sender with a wrong secret, or a stranger.",
            ("tenant", "result"),
        )
        self.lag_seconds = Histogram(
            PREFIX + "invalidation_applied_seconds",
            "From an invalidation to the moment a process first held a value read after it; where it grows, look at "
            "external_oms_read_duration_seconds, then at external_oms_store_up.",
            ("tenant",),
            buckets=LAG_BUCKETS,
            registry=registry,
        )
        self.last_lag_seconds = Gauge(
            PREFIX + "last_invalidation_applied_seconds",
            "The same for the last invalidation, per process of this server; one that stands out has trouble with the "
            "store.",
            ("tenant", "member"),
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        self.lease_waits = counter(
            PREFIX + "lease_waits",
            "Reads that waited for the read of another process instead of making one.",
            ("tenant",),
        )
        self.renewals = counter(
            PREFIX + "token_renewals",
            "Attempts to obtain an access token, by result; where they fail, run `external-oms doctor`.",
            ("tenant", "result"),
        )

    def begin(self, tenant: str) -> None:
        """Set the usual series to 0, so that `rate` and `increase` see the first event."""
        for reason in _REASONS:
            for via in ("sdk", "ofrep"):
                for value in ("none",) if reason == "ERROR" else ("on", "off"):
                    self.evaluations.labels(tenant, reason, via, value)
        for result in _DELIVERED:
            self.deliveries.labels(tenant, result)
        for outcome in ("ok", "failed"):
            self.read_seconds.labels(tenant, outcome)
        for counter in (self.reads, self.renewals):
            counter.labels(tenant, "ok")
        self.lag_seconds.labels(tenant)
        self.lease_waits.labels(tenant)


@cache
def _shared_counts() -> _Counts:
    """Return the one set of counts of a process that shares them: two would overwrite each other in its file."""
    return _Counts(None)


def are_shared() -> bool:
    """Return whether the processes of this server count together."""
    return DIRECTORY_VARIABLE in os.environ


_Sample = tuple[str, Mapping[str, str], float]


@dataclass(frozen=True, slots=True)
class TenantCounts:
    """What is counted for one tenant since the start.

    Attributes:
        latencies: How many reads succeeded within so many seconds, `inf` included.
        failed_reads: How many reads failed.
        evaluations: How many evaluations gave `on`, `off` and `none`.
    """

    latencies: Mapping[float, float]
    failed_reads: float
    evaluations: Mapping[str, float]


class Metrics(Collector):
    """The metrics of one application.

    Args:
        oms: Its state.

    Raises:
        SettingsError: The directory of shared counts cannot be written to.
    """

    def __init__(self, oms: OMS) -> None:
        self._oms = oms
        self._since = oms.clock.monotonic()
        self._applied: dict[str, int] = {}
        self._evaluations: dict[Evaluation, Counter] = {}
        self._registry = None if are_shared() else CollectorRegistry()
        self.counts = _shared_counts() if self._registry is None else _Counts(self._registry)
        try:
            with _counting:
                for tenant in oms.cache.tenants:
                    self.counts.begin(tenant)
        except OSError as error:
            raise SettingsError(DIRECTORY_VARIABLE, "must name a directory that every worker may write to") from error
        _alive.add(self)

    def subscribe(self) -> None:
        """Count from now on; where the processes share their counts, once for each provider."""
        oms, service = self._oms, self._oms.provider.service
        oms.evaluated.subscribe(self.evaluated)
        oms.webhook.refused.subscribe(self.refused)
        if are_shared():
            if service.cache in _subscribed:
                return
            _subscribed.add(service.cache)
        service.cache.reads.subscribe(self.read)
        service.cache.changes.subscribe(self.changed)
        service.cache.lease_waits.subscribe(self.waited)
        service.operations.deliveries.subscribe(self.delivered)
        service.renewals.subscribe(self.renewed)
        oms.provider.hooks.append(MetricsHook(oms.cache, self.evaluated))

    # -- counting: each is called by a signal, on any thread, and takes some microseconds ------------------------------

    def read(self, end: ReadEnd) -> None:
        """Count a read that ended."""
        tenant, outcome = end.tenant, end.outcome
        result = outcome.kind if isinstance(outcome, Failure) else "ok"
        with _counting:
            self.counts.reads.labels(tenant, result).inc()
            self.counts.read_seconds.labels(tenant, "ok" if result == "ok" else "failed").observe(
                max(0.0, end.latency_seconds)
            )

    def evaluated(self, event: Evaluation) -> None:
        """Count an evaluation."""
        counter = self._evaluations.get(event)  # the library's own lookup takes as long as the rest of the counting
        with _counting:
            if counter is None:
                counter = self._evaluations[event] = self.counts.evaluations.labels(*event)
            counter.inc()

    def delivered(self, result: DeliveryResult) -> None:
        """Count a genuine delivery."""
        outcome = "duplicate" if result.duplicate else "read" if result.refreshed else "later"
        with _counting:
            self.counts.deliveries.labels(result.tenant, outcome).inc()

    def refused(self, kind: str) -> None:
        """Count a refused delivery; the tenant that it names is not believed."""
        with _counting:
            self.counts.deliveries.labels("", kind).inc()

    def waited(self, tenant: str) -> None:
        """Count a read that waits for another process's."""
        with _counting:
            self.counts.lease_waits.labels(tenant).inc()

    def renewed(self, renewal: TokenRenewed) -> None:
        """Count an attempt to obtain a token."""
        with _counting:
            self.counts.renewals.labels(renewal.tenant, renewal.error.kind if renewal.error else "ok").inc()

    def changed(self, change: Change) -> None:
        """Observe the lag, where a change is the first value read after an invalidation."""
        tenant, entry = change.tenant, change.evaluation.entry
        invalidated_at, snapshot = entry.invalidated_at, entry.snapshot
        if snapshot is None or snapshot.generation < entry.generation or invalidated_at is None:
            return
        if invalidated_at < self._since or entry.generation <= self._applied.get(tenant, -1):
            return  # older than this process, or observed already
        self._applied[tenant] = entry.generation
        lag_seconds = max(0.0, self._oms.clock.monotonic() - invalidated_at)
        with _counting:
            self.counts.lag_seconds.labels(tenant).observe(lag_seconds)
            self.counts.last_lag_seconds.labels(tenant, member_name()).set(lag_seconds)

    def after_fork(self) -> None:
        """Leave the last lag to the parent, in a forked child; shared, the child has a file of its own."""
        if self._registry is not None:
            self.counts.last_lag_seconds.clear()

    # -- scraping ------------------------------------------------------------------------------------------------------

    def collect(self) -> Iterable[Metric]:
        """Return every metric in the order of the names."""
        counts = [_without_created(metric) for metric in self._counted() if metric.name.startswith(PREFIX)]
        return sorted([*_gauges(self._oms), *counts], key=lambda metric: metric.name)

    @property
    def is_shared(self) -> bool:
        """Whether the counts are those of all processes of this server."""
        return self._registry is None

    def counts_of(self, tenant: str) -> TenantCounts:
        """Return what is counted for one tenant, without adding up the other tenants."""
        buckets: dict[str, dict[float, float]] = {"ok": {}, "failed": {}}
        evaluations = dict.fromkeys(("on", "off", "none"), 0.0)
        for name, labels, value in self._shared_of(tenant) if self.is_shared else self._own_of(tenant):
            if name.endswith("evaluations_total"):
                evaluations[labels["value"]] += value
            elif name.endswith("read_duration_seconds_bucket"):
                counts, bound = buckets[labels["outcome"]], float(labels["le"])
                counts[bound] = counts.get(bound, 0.0) + value
        if self.is_shared:  # there a bucket does not include those below it
            for outcome, counts in buckets.items():
                bounds = sorted(counts)
                buckets[outcome] = dict(zip(bounds, accumulate(counts[bound] for bound in bounds), strict=True))
        return TenantCounts(buckets["ok"], max(buckets["failed"].values(), default=0.0), evaluations)

    def _own_of(self, tenant: str) -> Iterator[_Sample]:
        children: list[tuple[Collector, dict[str, str]]] = [
            (self.counts.read_seconds.labels(tenant, outcome), {"outcome": outcome}) for outcome in ("ok", "failed")
        ]
        counted = tuple(self._evaluations.items())
        children += [(child, {"value": event.value}) for event, child in counted if event.tenant == tenant]
        with _scraping:
            for child, labels in children:
                for metric in child.collect():
                    yield from ((sample.name, labels | sample.labels, sample.value) for sample in metric.samples)

    def _shared_of(self, tenant: str) -> Iterator[_Sample]:
        needle = json.dumps({"tenant": tenant})[1:-1]
        for file in self._files("counter_*.db", "histogram_*.db"):
            for key, value, *_ in MmapedDict.read_all_values_from_file(file):  # type: ignore[no-untyped-call]  # the library has no types here
                if needle in key:
                    _, name, labels, _ = json.loads(key)
                    yield name, labels, value

    def _counted(self) -> Iterable[Metric]:
        if self._registry is not None:
            with _scraping:
                return list(self._registry.collect())
        merged: Iterable[Metric] = multiprocess.MultiProcessCollector.merge(self._files("*.db"), accumulate=True)  # type: ignore[no-untyped-call]  # the library has no types here
        return merged

    @staticmethod
    def _files(*patterns: str) -> list[str]:
        files = (file for pattern in patterns for file in Path(os.environ[DIRECTORY_VARIABLE]).glob(pattern))
        # A process makes its file before it fills it, and the library cannot read an empty one.
        return [str(file) for file in files if file.stat().st_size]


def _without_created(metric: Metric) -> Metric:
    """Return the metric without the instants at which its series began: a sum over processes has none."""
    metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
    return metric


def init_app(oms: OMS) -> Metrics:
    """Return the metrics of an application, which count from now on."""
    found = Metrics(oms)
    found.subscribe()
    return found


class MetricsHook(Hook):
    """Reports every evaluation of `external_oms_enabled` by clients of OpenFeature.

    Args:
        cache: Knows the tenants.
        report: Called for each evaluation; must not block.
    """

    def __init__(self, cache: Cache, report: Callable[[Evaluation], object]) -> None:
        self._cache = cache
        self._report = report

    def finally_after(
        self,
        hook_context: HookContext,
        details: FlagEvaluationDetails[FlagValueType],
        hints: HookHints,  # noqa: ARG002 - the SDK's form
    ) -> None:
        """Report how an evaluation ended, an error included."""
        if hook_context.flag_key == FLAG_KEY:
            reason = details.reason if details.reason in _KNOWN_REASONS else Reason.UNKNOWN.value
            value = "none" if details.reason == Reason.ERROR else "on" if details.value else "off"
            self._report(Evaluation(self._tenant(hook_context), str(reason), "sdk", value))

    def _tenant(self, hook_context: HookContext) -> str:
        try:
            return self._cache.tenant_of(hook_context.evaluation_context.attributes.get("tenant"))
        except TenantError:
            return ""


# -- gauges ------------------------------------------------------------------------------------------------------------


def _gauges(oms: OMS) -> Iterator[Metric]:
    """Return the gauges of the states; nothing here waits or starts a read."""
    states = [oms.cache.state(tenant) for tenant in oms.cache.tenants]
    for name, text, value in _OF_STATES:
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=("tenant",))
        for state in states:
            found = value(state)
            if found is not None:
                gauge.add_metric((state.tenant,), found)
        yield gauge
    yield _freshness(states)
    yield from _of_members(oms)
    text = "1 while the store is shared as configured; 0: invalidations reach this process alone, and the log says why."
    up = GaugeMetricFamily(PREFIX + "store_up", text, labels=("kind",))
    up.add_metric((oms.store.kind,), float(oms.store.health().ok))
    yield up
    yield InfoMetricFamily(PREFIX + "build", "The version of this server.", value={"version": __version__})


_OF_STATES: tuple[tuple[str, str, Callable[[State], float | None]], ...] = (
    (
        "enabled",
        "The flag as last read, 1 on, 0 off; absent until a first read has succeeded: check the credentials then.",
        lambda state: None if state.enabled is None else float(state.enabled),
    ),
    (
        "age_seconds",
        "Since the read of the value started; where it grows without end, look at external_oms_reads_total.",
        lambda state: state.age_seconds,
    ),
    (
        "fresh_remaining_seconds",
        "Until the value stops being fresh; below 0 since it did: the value that is served then is old.",
        lambda state: state.fresh_seconds,
    ),
    (
        "generation",
        "Rises with every invalidation; one that does not rise after a delivery means another store is used there.",
        lambda state: float(state.generation),
    ),
    (
        "consecutive_failures",
        "Failed reads in a row, 0 while they succeed; GET /api/v1/tenants says why they fail.",
        lambda state: float(state.failures),
    ),
    (
        "backoff_seconds",
        "Until a failed read is tried again, 0 where nothing holds it back; nothing to do but mend the API.",
        lambda state: state.retry_seconds or 0.0,
    ),
    (
        "upstream_change_timestamp_seconds",
        "When the value was changed upstream, where the API says so; compare it with the change you expect.",
        lambda state: None if state.updated_at is None else state.updated_at.timestamp(),
    ),
)
"""Of each tenant: the name, the help text and the value."""

_OF_MEMBERS: tuple[tuple[str, str, Callable[[Member], float | None]], ...] = (
    (
        "member_generation",
        "The generation of the value that a process serves; one that stays below the others' has lost the store.",
        lambda member: float(member.generation),
    ),
    (
        "member_age_seconds",
        "Since the read of the value that a process serves started.",
        lambda member: None if member.age_seconds is None else member.age_seconds + member.seen_seconds,
    ),
    (
        "member_report_age_seconds",
        "Since a process last reported; above 30 it has ended, hangs, or has lost the store.",
        lambda member: member.seen_seconds,
    ),
)
"""Of each process and tenant: the name, the help text and the value."""


def _freshness(states: Sequence[State]) -> Metric:
    text = "1 for the freshness of the value now, else 0; expired means that callers get when_expired: read the logs."
    gauge = GaugeMetricFamily(PREFIX + "freshness", text, labels=("tenant", "state"))
    for state in states:
        for freshness in Freshness:
            gauge.add_metric((state.tenant, freshness.value), float(state.freshness is freshness))
    return gauge


def _of_members(oms: OMS) -> Iterator[Metric]:
    known = frozenset(oms.cache.tenants)
    members = [member for member in oms.store.members() if member.tenant in known]
    for name, text, value in _OF_MEMBERS:
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=("tenant", "member"))
        for member in members:
            found = value(member)
            if found is not None:
                gauge.add_metric((member.tenant, member.name), found)
        yield gauge


# -- forks -------------------------------------------------------------------------------------------------------------

_alive: weakref.WeakSet[Metrics] = weakref.WeakSet()
_subscribed: weakref.WeakSet[Cache] = weakref.WeakSet()


def _before_fork() -> None:
    _scraping.acquire()
    _counting.acquire()


def _after_fork() -> None:
    _counting.release()
    _scraping.release()


def _after_fork_in_child() -> None:
    for metrics in tuple(_alive):
        metrics.after_fork()
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
