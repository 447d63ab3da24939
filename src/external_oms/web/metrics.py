"""What a monitor asks: states as they stand when it asks, counts as all workers together made them.

States (value, age, members, …) are computed at each scrape from the store, which every worker shares, so any worker
gives the same answer. Counts are each process's own. Where `PROMETHEUS_MULTIPROC_DIR` names a directory, which
`shared_counts` makes for `external-oms serve`, prometheus-client keeps them there, a mapped file per process, and a
scrape sums them, those of ended processes included. Else they stand in a registry of our own, never the application's.

Counting and scraping each happen under a lock of ours that is held over a fork, so no child inherits one of
prometheus-client's locks while somebody holds it. They are two, so that nobody who counts waits for a scrape.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

from flask import Blueprint, Response, request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess, values
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from werkzeug.datastructures import MIMEAccept

from external_oms.cache import Cache, Change
from external_oms.entry import Failure
from external_oms.errors import SettingsError
from external_oms.heartbeat import member_name
from external_oms.operations import DeliveryResult
from external_oms.singleflight import ReadEnd
from external_oms.web.access import Role, demand
from external_oms.web.gauges import gauges_of
from external_oms.web.hooks import Evaluated, MetricsHook, Via
from external_oms.web.parts import Parts
from external_oms.web.problems import resource
from external_oms.wiring import Service, TokenRenewed

__all__ = ["DIRECTORY_VARIABLE", "Meters", "are_shared", "blueprint", "exposition", "forget", "shared_counts"]

DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""prometheus-client's own: where the processes of one server count together."""

PREFIX = "external_oms_"
"""How every name of ours begins."""

READ_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Seconds: from an API next door to the longest sensible timeout_seconds, finest where healthy APIs answer."""

LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds: from memory of the same process to a fleet that has lost its store."""

_REASONS = ("CACHED", "STATIC", "STALE", "DEFAULT", "ERROR")
_DELIVERED = ("read", "later", "duplicate")

_OPENMETRICS = "application/openmetrics-text"

_counting = threading.RLock()
_scraping = threading.RLock()


class _Counts:
    """The counts, in a registry or in the shared directory."""

    def __init__(self, registry: CollectorRegistry | None) -> None:
        counter = partial(Counter, registry=registry)
        self.reads = counter(
            PREFIX + "reads",
            "Reads of the config API whose outcome was stored, by what came of them; look up a result other than ok "
            "in docs/failure-modes.md.",
            ("tenant", "result"),
        )
        self.read_seconds = Histogram(
            PREFIX + "read_duration_seconds",
            "How long reads of the config API took; near timeout_seconds, ask its operators before you raise that.",
            ("tenant", "outcome"),
            buckets=READ_BUCKETS,
            registry=registry,
        )
        self.evaluations = counter(
            PREFIX + "evaluations",
            "Evaluations of the flag, by reason and way; DEFAULT and ERROR were not answered from a value that may be "
            "served, so look at external_oms_freshness.",
            ("tenant", "reason", "via"),
        )
        self.deliveries = counter(
            PREFIX + "deliveries",
            "Deliveries to the webhook: read (value read again), later (the read follows), duplicate, or why refused; "
            "unauthorized ones mean a sender with a wrong secret, or a stranger.",
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
            "Reads that waited for another process's read instead of making one: one read for all, as it should be.",
            ("tenant",),
        )
        self.renewals = counter(
            PREFIX + "token_renewals",
            "Tries to obtain an access token, by what came of them; where they fail, run `external-oms doctor`.",
            ("tenant", "result"),
        )

    def begin(self, tenant: str) -> None:
        """Have what is usual stand at 0, so that its first increase is seen as one."""
        for reason in _REASONS:
            for via in (Via.SDK, Via.OFREP):
                self.evaluations.labels(tenant, reason, via)
        for result in _DELIVERED:
            self.deliveries.labels(tenant, result)
        for outcome in ("ok", "failed"):
            self.read_seconds.labels(tenant, outcome)
        for counter in (self.reads, self.renewals):
            counter.labels(tenant, "ok")
        self.lag_seconds.labels(tenant)
        self.lease_waits.labels(tenant)


@cache
def _shared() -> _Counts:
    """The one set of counts of a process that shares them: two would write over each other in its file."""
    return _Counts(None)


def are_shared() -> bool:
    """Whether the processes of this server count together."""
    return bool(os.environ.get(DIRECTORY_VARIABLE)) and values.ValueClass is not values.MutexValue


@contextmanager
def shared_counts() -> Iterator[None]:
    """Have this process and all that it forks count together, in a fresh directory that goes when this process ends.

    For a server that is ours from its beginning: it changes the environment, and where prometheus-client keeps whatever
    is counted from now on.
    """
    owner = os.getpid()
    directory = tempfile.mkdtemp(prefix="external-oms-metrics-")
    os.environ[DIRECTORY_VARIABLE] = directory
    values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]  # as at its import, which has passed
    try:
        yield
    finally:
        if os.getpid() == owner:  # a worker leaves through here too
            shutil.rmtree(directory, ignore_errors=True)


def forget(pid: int) -> None:
    """Drop what was true of a process that has ended; what it counted stays in the sums."""
    if are_shared():
        multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]  # the library has no types here


class Meters(Collector):
    """What is counted of a service, and its state, as prometheus-client collects it.

    Args:
        service: What is looked at.

    Raises:
        SettingsError: The directory of shared counts cannot be written to.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tenants = frozenset(service.cache.tenants)
        self._monotonic = service.clock.monotonic
        self._since = service.clock.monotonic()
        self._applied: dict[str, int] = {}
        self._evaluations: dict[Evaluated, Counter] = {}
        self._registry = None if are_shared() else CollectorRegistry()
        self.counts = _shared() if self._registry is None else _Counts(self._registry)
        try:
            with _counting:
                for tenant in service.cache.tenants:
                    self.counts.begin(tenant)
        except OSError as error:
            raise SettingsError(DIRECTORY_VARIABLE, "must name a directory that every worker may write to") from error
        _alive.add(self)

    def listen(self, parts: Parts | None = None) -> None:
        """Count from now on; where the processes share their counts, once for each service.

        Args:
            parts: The app whose requests count too.
        """
        if parts is not None:
            parts.evaluated.subscribe(self.evaluated)
            parts.refused.subscribe(self.refused)
        service = self._service
        if are_shared():
            if service.cache in _heard:
                return
            _heard.add(service.cache)
        service.cache.reads.subscribe(self.read)
        service.cache.changes.subscribe(self.changed)
        service.cache.lease_waits.subscribe(self.waited)
        service.operations.deliveries.subscribe(self.delivered)
        service.renewals.subscribe(self.renewed)
        if parts is not None:
            parts.provider.hooks.append(MetricsHook(service.cache, self.evaluated))

    # -- counting: each is told by a signal, on whatever thread, and takes some microseconds ------------------------

    def read(self, end: ReadEnd) -> None:
        """A read ended."""
        tenant, outcome = end.tenant, end.outcome
        failed = isinstance(outcome, Failure)
        with _counting:
            self.counts.reads.labels(tenant, outcome.kind if isinstance(outcome, Failure) else "ok").inc()
            self.counts.read_seconds.labels(tenant, "failed" if failed else "ok").observe(max(0.0, end.latency_seconds))

    def evaluated(self, one: Evaluated) -> None:
        """The flag was evaluated."""
        counter = self._evaluations.get(one)  # the library's own look-up takes as long as the rest of the counting
        with _counting:
            if counter is None:
                counter = self._evaluations[one] = self.counts.evaluations.labels(one.tenant, one.reason, one.via)
            counter.inc()

    def delivered(self, result: DeliveryResult) -> None:
        """A genuine delivery was taken."""
        outcome = "duplicate" if result.duplicate else "read" if result.refreshed else "later"
        with _counting:
            self.counts.deliveries.labels(result.tenant, outcome).inc()

    def refused(self, kind: str) -> None:
        """A delivery was refused; whose it was is not believed."""
        with _counting:
            self.counts.deliveries.labels("", kind).inc()

    def waited(self, tenant: str) -> None:
        """A read waits for another process's."""
        with _counting:
            self.counts.lease_waits.labels(tenant).inc()

    def renewed(self, renewal: TokenRenewed) -> None:
        """A token was obtained, or was not."""
        with _counting:
            self.counts.renewals.labels(renewal.tenant, renewal.error.kind if renewal.error else "ok").inc()

    def changed(self, change: Change) -> None:
        """Something changed; where it is the first value read after an invalidation, it has been applied here."""
        tenant, entry = change.tenant, change.evaluation.entry
        invalidated_at, snapshot = entry.invalidated_at, entry.snapshot
        if snapshot is None or snapshot.generation < entry.generation or invalidated_at is None:
            return
        if invalidated_at < self._since or entry.generation <= self._applied.get(tenant, -1):
            return  # of before this process looked, or known
        self._applied[tenant] = entry.generation
        lag_seconds = max(0.0, self._monotonic() - invalidated_at)
        with _counting:
            self.counts.lag_seconds.labels(tenant).observe(lag_seconds)
            self.counts.last_lag_seconds.labels(tenant, member_name()).set(lag_seconds)

    def after_fork(self) -> None:
        """In a forked child: the last lag is the parent's, who tells it; shared, the child has a file of its own."""
        if self._registry is not None:
            self.counts.last_lag_seconds.clear()

    # -- telling ----------------------------------------------------------------------------------------------------

    def collect(self) -> Iterable[Metric]:
        """Every metric, as it stands now, in the order of the names."""
        counted = [_kept(metric) for metric in self._counted() if metric.name.startswith(PREFIX)]
        return sorted([*gauges_of(self._service), *counted], key=lambda metric: metric.name)

    def _counted(self) -> Iterable[Metric]:
        if self._registry is not None:
            with _scraping:
                return list(self._registry.collect())
        # a process that begins to count makes its file before it fills it, and the library cannot read an empty one
        files = [str(file) for file in Path(os.environ[DIRECTORY_VARIABLE]).glob("*.db") if file.stat().st_size]
        summed: Iterable[Metric] = multiprocess.MultiProcessCollector.merge(files, accumulate=True)  # type: ignore[no-untyped-call]  # the library has no types here
        return summed


def _kept(metric: Metric) -> Metric:
    """The metric without the instants at which its series began, which a sum over processes cannot have."""
    metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
    return metric


def exposition(meters: Collector, accept: MIMEAccept) -> tuple[bytes, str]:
    """The metrics as text, and its type: OpenMetrics where the asker would rather have it, else Prometheus' own.

    The library's own choice fails on a version that is no number, so it is not asked.
    """
    kinds = [kind.partition(";")[0].strip().lower() for kind, quality in accept if quality > 0]
    plain = kinds.index("text/plain") if "text/plain" in kinds else len(kinds)
    if _OPENMETRICS in kinds[:plain]:
        return openmetrics.generate_latest(meters), openmetrics.CONTENT_TYPE_LATEST  # type: ignore[no-untyped-call]  # the library has no types here
    return generate_latest(meters), CONTENT_TYPE_PLAIN_0_0_4


def blueprint(parts: Parts) -> Blueprint:
    """The metrics of one app."""
    mounted = Blueprint("metrics", __name__)
    meters = Meters(parts.service)
    meters.listen(parts)

    def metrics() -> Response:
        if not parts.settings.metrics_open:
            demand(Role.VIEWER)
        parts.service.cache.start()  # a worker that nobody else asks must not tell of a past
        body, kind = exposition(meters, request.accept_mimetypes)
        return Response(body, content_type=kind)

    resource(mounted, "/metrics", GET=metrics)
    return mounted


_alive: weakref.WeakSet[Meters] = weakref.WeakSet()
_heard: weakref.WeakSet[Cache] = weakref.WeakSet()


def _before_fork() -> None:
    _scraping.acquire()
    _counting.acquire()


def _after_fork() -> None:
    _counting.release()
    _scraping.release()


def _after_fork_in_child() -> None:
    for meters in tuple(_alive):
        meters.after_fork()
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
