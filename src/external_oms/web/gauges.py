"""The state of a service as gauges, computed when it is asked for; nothing here counts, waits or starts a read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric

from external_oms import __version__
from external_oms.policy import Freshness, State
from external_oms.records import Member
from external_oms.wiring import Service

__all__ = ["gauges_of"]


def gauges_of(service: Service) -> Iterator[Metric]:
    """Every gauge of a service's state, now."""
    states = [service.cache.state(tenant) for tenant in service.cache.tenants]
    for name, text, value in _OF_STATES:
        gauge = GaugeMetricFamily(name, text, labels=("tenant",))
        for state in states:
            found = value(state)
            if found is not None:
                gauge.add_metric((state.tenant,), found)
        yield gauge
    yield _freshness(states)
    yield from _of_members(service)
    yield _store(service)
    yield InfoMetricFamily("external_oms_build", "What runs here.", value={"version": __version__})


def _enabled(state: State) -> float | None:
    return None if state.enabled is None else float(state.enabled)


def _changed(state: State) -> float | None:
    return None if state.updated_at is None else state.updated_at.timestamp()


_OF_STATES: tuple[tuple[str, str, Callable[[State], float | None]], ...] = (
    (
        "external_oms_enabled",
        "The flag as last read, 1 on, 0 off; absent until a first read has succeeded: check the credentials then.",
        _enabled,
    ),
    (
        "external_oms_age_seconds",
        "Since the read of the value started; where it grows without end, look at external_oms_reads_total.",
        lambda state: state.age_seconds,
    ),
    (
        "external_oms_fresh_remaining_seconds",
        "Until the value stops being fresh; below 0 since it did: what is served then is old.",
        lambda state: state.fresh_seconds,
    ),
    (
        "external_oms_generation",
        "Rises with every invalidation; one that does not rise after a delivery means another store is used there.",
        lambda state: float(state.generation),
    ),
    (
        "external_oms_consecutive_failures",
        "Failed reads in a row, 0 while they succeed; GET /api/v1/tenants says in words why they fail.",
        lambda state: float(state.failures),
    ),
    (
        "external_oms_backoff_seconds",
        "Until a failed read is tried again, 0 where nothing stands in its way; nothing to do but mend the API.",
        lambda state: state.retry_seconds or 0.0,
    ),
    (
        "external_oms_upstream_change_timestamp_seconds",
        "When the value was changed upstream, where the API says so; compare it with the change you expect.",
        _changed,
    ),
)
"""Of each tenant: the name, what it tells and what to do about it, and the value."""


def _freshness(states: Sequence[State]) -> Metric:
    text = "1 for what the value is worth now, else 0; expired means that callers get when_expired: read the logs."
    gauge = GaugeMetricFamily("external_oms_freshness", text, labels=("tenant", "state"))
    for state in states:
        for freshness in Freshness:
            gauge.add_metric((state.tenant, freshness.value), float(state.freshness is freshness))
    return gauge


_OF_MEMBERS: tuple[tuple[str, str, Callable[[Member], float | None]], ...] = (
    (
        "external_oms_member_generation",
        "The generation of the value that a process serves; one that stays below the others' has lost the store.",
        lambda member: float(member.generation),
    ),
    (
        "external_oms_member_age_seconds",
        "Since the read of the value that a process serves started.",
        lambda member: None if member.age_seconds is None else member.age_seconds + member.seen_seconds,
    ),
    (
        "external_oms_member_report_age_seconds",
        "Since a process last reported; above 30 it ended without a word, hangs, or has lost the store.",
        lambda member: member.seen_seconds,
    ),
)


def _of_members(service: Service) -> Iterator[Metric]:
    known = frozenset(service.cache.tenants)
    members = [member for member in service.store.members() if member.tenant in known]
    for name, text, value in _OF_MEMBERS:
        gauge = GaugeMetricFamily(name, text, labels=("tenant", "member"))
        for member in members:
            found = value(member)
            if found is not None:
                gauge.add_metric((member.tenant, member.name), found)
        yield gauge


def _store(service: Service) -> Metric:
    text = "1 while the store is shared as configured; 0: invalidations reach this process alone, GET /readyz says why."
    gauge = GaugeMetricFamily("external_oms_store_up", text, labels=("kind",))
    gauge.add_metric((service.store.kind,), float(service.store.health().ok))
    return gauge
