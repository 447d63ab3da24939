"""What a scrape says after what has happened, to whom, in which format; and what never stands in it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import monotonic

import pytest
from flask import Flask
from openfeature import api as openfeature
from openfeature.evaluation_context import EvaluationContext
from prometheus_client import REGISTRY, CollectorRegistry, Counter, generate_latest, values

from external_oms import FLAG_KEY, ExternalOMSProvider
from external_oms.cache import Change, ChangeKind
from external_oms.emulator import ConfigAPIEmulator, Fault
from external_oms.entry import Entry, Snapshot, begin_read
from external_oms.errors import SettingsError
from external_oms.policy import Source, Windows, evaluate
from external_oms.settings import Settings
from external_oms.stores.base import Health
from external_oms.stores.memory import MemoryStore
from external_oms.web import ExternalOMS, create_app, metrics
from external_oms.web.metrics import Metrics
from external_oms.web.state import OMS, Evaluation
from tests.support.clock import FakeClock
from tests.support.scrapes import Scrape
from tests.support.waiting import wait_until
from tests.support.web import BEARER, ENTRIES, HOOK, KEYS, SECRET, TENANT, Server, StartServer, with_key

FLAG = f"/ofrep/v1/evaluate/flags/{FLAG_KEY}"


def scrape(server: Server) -> Scrape:
    answer = server.get("/metrics")
    assert answer.status_code == 200, answer.text
    return Scrape.of(answer.text)


def scrape_when(server: Server, shows: Callable[[Scrape], bool]) -> Scrape:
    """The first scrape that shows it."""

    def shown() -> Scrape | None:
        seen = scrape(server)
        return seen if shows(seen) else None

    return wait_until(shown)


def read_once(server: Server, tenant: str = TENANT) -> Scrape:
    """The scrape after the first read."""
    return scrape_when(server, lambda seen: seen.values("reads_total", tenant=tenant, result="ok") == {(): 1.0})


# -- states ---------------------------------------------------------------------------------------------------------


def test_a_value_is_told_with_its_age_its_freshness_and_its_generation(server: Server) -> None:
    server.api.set_enabled(TENANT, True)
    read_once(server)
    began = monotonic()
    server.deliver()
    seen = scrape(server)
    assert seen.value("enabled", tenant=TENANT) == 1
    assert seen.values("freshness", tenant=TENANT) == {("fresh",): 1, ("stale",): 0, ("expired",): 0}
    assert 0 <= seen.value("age_seconds", tenant=TENANT) <= monotonic() - began
    assert 0 < seen.value("fresh_remaining_seconds", tenant=TENANT) <= 30
    assert seen.value("generation", tenant=TENANT) == 1
    assert seen.value("consecutive_failures", tenant=TENANT) == 0
    assert seen.value("backoff_seconds", tenant=TENANT) == 0
    changed = seen.value("upstream_change_timestamp_seconds", tenant=TENANT)
    state = server.oms.cache.state(TENANT)
    assert state.updated_at is not None
    assert changed == state.updated_at.timestamp()
    assert seen.values("store_up") == {("memory",): 1}


def test_a_dead_api_shows_as_failures_back_off_and_a_stale_value(
    server: Server, stop_clock: Callable[[], FakeClock]
) -> None:
    read_once(server)
    clock = stop_clock()  # so that no back-off ends: one read fails
    server.api.fault(TENANT, Fault(status=503, times=None))
    assert server.deliver().status_code == 202
    clock.advance(0.5)
    seen = scrape_when(server, lambda seen: ("unavailable",) in seen.values("reads_total", tenant=TENANT))
    assert seen.values("freshness", tenant=TENANT) == {("fresh",): 0, ("stale",): 1, ("expired",): 0}
    assert seen.value("fresh_remaining_seconds", tenant=TENANT) < 0
    assert seen.value("consecutive_failures", tenant=TENANT) == 1
    assert seen.value("backoff_seconds", tenant=TENANT) > 0
    assert seen.values("reads_total", tenant=TENANT) == {("ok",): 1, ("unavailable",): 1}
    assert seen.values("read_duration_seconds_count", tenant=TENANT) == {("ok",): 1, ("failed",): 1}
    assert seen.values("deliveries_total", tenant=TENANT) == {("read",): 0, ("later",): 1, ("duplicate",): 0}
    assert seen.value("invalidation_applied_seconds_count", tenant=TENANT) == 0


def test_a_value_that_was_never_read_is_absent_and_not_off(start: StartServer, api: ConfigAPIEmulator) -> None:
    api.fault(TENANT, Fault(status=500, times=None))
    server = start()
    seen = scrape_when(server, lambda seen: seen.value("consecutive_failures", tenant=TENANT) == 1)
    assert not seen.values("enabled")
    assert not seen.values("age_seconds")
    assert seen.values("freshness", tenant=TENANT) == {("fresh",): 0, ("stale",): 0, ("expired",): 1}


def test_a_store_out_of_order_shows(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.oms.store, "health", lambda: Health(ok=False, problem="the disk is full"))
    assert scrape(server).values("store_up") == {("memory",): 0}


def test_every_member_shows_with_what_it_serves(server: Server) -> None:
    read_once(server)
    began = monotonic()
    server.deliver()
    mine = f":{os.getpid()}"
    seen = scrape_when(server, lambda seen: list(seen.values("member_generation", tenant=TENANT).values()) == [1.0])
    ((member,),) = seen.values("member_generation", tenant=TENANT)
    assert member.endswith(mine)
    assert 0 <= seen.value("member_age_seconds", tenant=TENANT, member=member) <= monotonic() - began
    assert 0 <= seen.value("member_report_age_seconds", tenant=TENANT, member=member) <= monotonic() - began


# -- counts ---------------------------------------------------------------------------------------------------------


def test_deliveries_count_by_what_came_of_them(server: Server) -> None:
    read_once(server)
    server.deliver(delivery_id="msg_a")
    server.deliver(delivery_id="msg_a")
    server.deliver(secret="whsec_" + "QUFB" * 8)
    server.deliver(b"{")
    server.deliver({"tenant": "nobody-we-know"})
    seen = scrape_when(server, lambda seen: seen.value("reads_total", tenant=TENANT, result="ok") == 2)
    assert seen.values("deliveries_total", tenant=TENANT) == {("read",): 1, ("later",): 0, ("duplicate",): 1}
    refused = {("unauthorized",): 1, ("bad_request",): 1, ("tenant",): 1}
    assert seen.values("deliveries_total", tenant="") == refused
    assert seen.value("token_renewals_total", tenant=TENANT, result="ok") == 1


def test_a_delivery_that_was_read_shows_how_long_it_took_to_apply(server: Server) -> None:
    read_once(server)
    began = monotonic()
    server.deliver()
    seen = scrape_when(server, lambda seen: seen.value("invalidation_applied_seconds_count", tenant=TENANT) == 1)
    (last,) = seen.values("last_invalidation_applied_seconds", tenant=TENANT).values()
    assert 0 < last == seen.value("invalidation_applied_seconds_sum", tenant=TENANT) <= monotonic() - began


def test_evaluations_over_http_count_by_their_reason(server: Server) -> None:
    server.api.set_enabled(TENANT, True)
    read_once(server)
    asked = {"headers": with_key("viewer"), "json": {"context": {}}}
    for _ in range(3):
        assert server.client.post(FLAG, **asked).status_code == 200
    assert server.client.post("/ofrep/v1/evaluate/flags", **asked).status_code == 200
    server.api.fault(TENANT, Fault(status=500, times=None))
    server.deliver()
    server.client.post(FLAG, **asked)
    server.client.post("/ofrep/v1/evaluate/flags", **asked)
    counted = scrape(server).values("evaluations_total", tenant=TENANT, via="ofrep")
    assert {labels: count for labels, count in counted.items() if count} == {("CACHED", "on"): 4, ("STALE", "on"): 2}
    reasons = ("CACHED", "STATIC", "STALE", "DEFAULT")
    assert counted.keys() == {(reason, value) for reason in reasons for value in ("on", "off")} | {("ERROR", "none")}


@pytest.mark.parametrize(("policy", "reason"), [("default", "ERROR"), ("on", "DEFAULT")])
def test_evaluations_without_a_value_count_as_what_decided(
    start: StartServer, api: ConfigAPIEmulator, policy: str, reason: str
) -> None:
    api.fault(TENANT, Fault(status=500, times=None))
    server = start(when_expired=policy)
    scrape_when(server, lambda seen: seen.value("consecutive_failures", tenant=TENANT) == 1)
    for path in (FLAG, "/ofrep/v1/evaluate/flags"):
        server.client.post(path, headers=with_key("viewer"), json={"context": {}})
    assert scrape(server).value("evaluations_total", tenant=TENANT, via="ofrep", reason=reason) == 2


def test_tokens_that_cannot_be_had_show(start: StartServer, api: ConfigAPIEmulator) -> None:
    api.fault(TENANT, Fault(status=500, times=None, where="token"))
    seen = scrape_when(start(), lambda seen: ("unavailable",) in seen.values("token_renewals_total", tenant=TENANT))
    assert seen.value("token_renewals_total", tenant=TENANT, result="ok") == 0


def test_a_read_that_waits_for_anothers_shows_once(api: ConfigAPIEmulator) -> None:
    class Shared(MemoryStore):
        def is_gone(self, holder: str) -> bool:
            return False

    store = Shared()
    provider = ExternalOMSProvider(api.settings(refresh="lazy", insecure=True), store=store)
    service = provider.service
    meters = Metrics(OMS(provider))
    meters.subscribe()
    # by another process, which never ends it
    store.transact(TENANT, partial(begin_read, holder="another", lease_seconds=0.3, newer_than=0))
    try:
        assert service.cache.refresh(TENANT).entry.snapshot is not None
    finally:
        service.close()
    counted = {metric.name: metric.samples for metric in meters.collect()}
    assert [sample.value for sample in counted["external_oms_lease_waits"]] == [1.0]


def test_what_is_usual_stands_at_zero_from_the_start(start: StartServer) -> None:
    seen = scrape(start(TENANT, "globex", refresh="lazy"))
    for tenant in (TENANT, "globex"):
        for name in (
            "reads_total",
            "deliveries_total",
            "evaluations_total",
            "lease_waits_total",
            "token_renewals_total",
        ):
            assert seen.value(name, tenant=tenant) == 0
        assert seen.value("invalidation_applied_seconds_count", tenant=tenant) == 0


# -- the lag, by hand -----------------------------------------------------------------------------------------------


def snapshot(clock: FakeClock, generation: int) -> Snapshot:
    return Snapshot(
        enabled=True,
        updated_at=None,
        etag=None,
        generation=generation,
        token=generation + 1,
        read_at=clock.monotonic(),
        fetched_at=datetime.fromtimestamp(clock.wall(), UTC),
        lifetime_seconds=30.0,
    )


def applied(meters: Metrics) -> tuple[float, float]:
    """How many lags were counted, and their sum in seconds."""
    (metric,) = [metric for metric in meters.collect() if metric.name == "external_oms_invalidation_applied_seconds"]
    found = {sample.name.rpartition("_")[2]: sample.value for sample in metric.samples}
    return found["count"], found["sum"]


def test_a_lag_counts_once_for_each_generation_from_its_last_invalidation(clock: FakeClock) -> None:
    settings = Settings(tenant=TENANT, access_token="t", refresh="lazy", insecure=True)
    oms = OMS(ExternalOMSProvider(settings))
    oms.clock = clock
    meters = Metrics(oms)

    def tell(entry: Entry) -> None:
        windows = Windows(30.0, 30.0, 3600.0)
        evaluation = evaluate(TENANT, entry, now=clock.monotonic(), windows=windows, source=Source.MEMORY)
        meters.changed(Change(TENANT, ChangeKind.STATE, evaluation))

    tell(Entry(generation=7, invalidated_at=clock.monotonic() - 60, token=1, snapshot=snapshot(clock, 7)))
    assert applied(meters) == (0, 0), "an invalidation of before this process looked"
    old, invalidated_at = snapshot(clock, 7), clock.monotonic()
    tell(Entry(generation=8, invalidated_at=invalidated_at, token=2, snapshot=old))
    assert applied(meters) == (0, 0), "nothing read after it is here yet"
    clock.advance(0.25)
    new = snapshot(clock, 8)
    tell(Entry(generation=8, invalidated_at=invalidated_at, token=3, snapshot=new))
    assert applied(meters) == (1, 0.25)
    clock.advance(10)
    tell(Entry(generation=8, invalidated_at=invalidated_at, token=4, snapshot=new))
    assert applied(meters) == (1, 0.25), "known"
    ahead = clock.monotonic() + 5
    tell(Entry(generation=9, invalidated_at=ahead, token=5, snapshot=snapshot(clock, 9)))
    assert applied(meters) == (2, 0.25), "another host's clock goes ahead: no lag, and none below nothing"


# -- who, and how ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "status"), [("nobody", 401), ("stranger", 401), ("viewer", 200), ("admin", 200)])
def test_a_scrape_takes_the_key_of_a_viewer(server: Server, role: str, status: int) -> None:
    assert server.get("/metrics", role).status_code == status


def test_a_scrape_is_open_only_by_choice(start: StartServer) -> None:
    assert start(metrics_open=True).get("/metrics", "nobody").status_code == 200


OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PLAIN = "text/plain; version=0.0.4; charset=utf-8"
PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "text/plain;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "text/plain"),
        ("*/*", "text/plain"),
        ("text/plain", "text/plain"),
        ("text/html", "text/plain"),
        (PROMETHEUS, "application/openmetrics-text"),
        ("application/openmetrics-text", "application/openmetrics-text"),
        ("application/openmetrics-text; version=0.0.1", "text/plain"),
        ("Application/OpenMetrics-Text; version=nonsense", "text/plain"),
        ("application/openmetrics-text; version=nonsense", "text/plain"),
        ("application/openmetrics-text;q=x, ;;;,,=", "application/openmetrics-text"),
        ("text/plain; version=v", "text/plain"),
    ],
)
def test_the_format_is_the_one_that_the_scraper_accepts(server: Server, accept: str | None, kind: str) -> None:
    headers = with_key("viewer") | ({"Accept": accept} if accept is not None else {})
    answer = server.client.get("/metrics", headers=headers)
    assert (answer.status_code, answer.mimetype) == (200, kind)
    assert answer.text.endswith("# EOF\n") is (kind != "text/plain")
    assert Scrape.of(answer.text).value("generation", tenant=TENANT) == 0


def test_both_formats_say_the_same(server: Server) -> None:
    read_once(server)
    server.deliver()
    plain = scrape(server)
    headers = with_key("viewer") | {"Accept": "application/openmetrics-text"}
    other = Scrape.of(server.client.get("/metrics", headers=headers).text)
    passing = {"external_oms_age_seconds", "external_oms_fresh_remaining_seconds"}  # as time does
    described = {name: what for name, what in plain.described().items() if name not in passing}
    for name, (_, labels) in described.items():
        assert other.described()[name.replace("build_info", "build")][1] == labels
    assert not [line for line in plain.text.splitlines() if "_created" in line]


def test_names_and_units_are_by_the_conventions(server: Server) -> None:
    read_once(server)
    for family in scrape(server).families:
        assert family.name.startswith("external_oms_")
        assert family.documentation[0].isupper() or family.documentation[0] == "1"
        assert family.documentation.endswith(".")
        assert not set(family.name.split("_")) & {"ms", "milliseconds", "minutes", "percent", "ratio"}
        for sample in family.samples:
            assert sample.name.endswith("_total") is (family.type == "counter")


def test_no_secret_and_nothing_that_a_caller_chose_stands_in_a_scrape(start: StartServer) -> None:
    server = start()
    read_once(server)
    server.deliver({"tenant": "a-tenant-of-the-sender"}, delivery_id="msg_of_the_sender")
    server.client.post(HOOK, json={}, headers={"Authorization": "Bearer a-key-of-the-sender"})
    asked = {
        "headers": with_key("viewer") | {"User-Agent": "an-agent"},
        "json": {"context": {"tenant": "of-the-asker"}},
    }
    server.client.post(FLAG, **asked)
    server.client.post(f"{FLAG}-of-the-asker", **asked)
    secret = server.oms.settings.client_secret
    assert secret is not None
    text = scrape(server).text
    hidden = [SECRET, SECRET.removeprefix("whsec_"), BEARER, secret.get_secret_value(), *KEYS.values(), *ENTRIES]
    hidden += [entry.rpartition(":")[2] for entry in ENTRIES] + ["the-viewer"]
    assert not [
        word for word in (*hidden, "of-the-sender", "of_the_sender", "an-agent", "of-the-asker") if word in text
    ]
    assert 'evaluations_total{reason="' in text


def test_the_registry_of_the_application_is_left_alone_and_its_metrics_are_not_ours_to_show(server: Server) -> None:
    orders = Counter("test_metrics_orders", "Of the application.")
    try:
        assert "test_metrics_orders" not in scrape(server).text
        assert not [family.name for family in REGISTRY.collect() if family.name.startswith("external_oms")]
    finally:
        REGISTRY.unregister(orders)


def test_the_meters_can_stand_in_a_registry_of_the_application_where_it_asks_for_that() -> None:
    registry = CollectorRegistry()
    registry.register(
        Metrics(OMS(ExternalOMSProvider(Settings(tenant=TENANT, access_token="t", refresh="lazy", insecure=True))))
    )
    assert Scrape.of(generate_latest(registry).decode()).value("generation", tenant=TENANT) == 0


# -- evaluations by clients of OpenFeature --------------------------------------------------------------------------


@pytest.fixture
def _openfeature_as_before() -> Iterator[None]:
    yield
    openfeature.shutdown()


@pytest.mark.usefixtures("_openfeature_as_before")
def test_the_extension_counts_evaluations_where_metrics_are_served(api: ConfigAPIEmulator) -> None:
    app = Flask("of-the-user")
    settings = api.settings(TENANT, "globex", webhook_secrets=[SECRET], metrics_open=True, api_keys=ENTRIES)
    ExternalOMS(app, settings, mount="/oms")
    client = openfeature.get_client()
    for _ in range(3):
        client.get_boolean_value(
            FLAG_KEY, default_value=False, evaluation_context=EvaluationContext(None, {"tenant": TENANT})
        )
    client.get_boolean_value(FLAG_KEY, default_value=False)
    client.get_boolean_value(
        FLAG_KEY, default_value=False, evaluation_context=EvaluationContext(None, {"tenant": ["x"]})
    )
    client.get_string_value(FLAG_KEY, "", EvaluationContext(None, {"tenant": "globex"}))
    client.get_boolean_value("another_flag", default_value=False)
    seen = Scrape.of(app.test_client().get("/oms/metrics").text)
    assert seen.value("evaluations_total", tenant=TENANT, via="sdk", reason="CACHED") == 3
    assert seen.values("evaluations_total", tenant="") == {("ERROR", "none", "sdk"): 2}
    assert seen.value("evaluations_total", tenant="globex", via="sdk", reason="ERROR") == 1
    assert seen.value("evaluations_total", via="sdk") == 6


@pytest.mark.usefixtures("_openfeature_as_before")
def test_without_metrics_evaluations_call_nothing_of_ours(api: ConfigAPIEmulator) -> None:
    app = Flask("of-the-user")
    ExternalOMS(app, api.settings(webhook_secrets=[SECRET]))
    assert app.extensions["external_oms"].provider.get_provider_hooks() == []
    assert app.test_client().get("/metrics").status_code == 404


@pytest.mark.usefixtures("_openfeature_as_before")
def test_two_apps_over_one_provider_count_the_same(api: ConfigAPIEmulator) -> None:
    settings = api.settings(webhook_secrets=[SECRET], metrics_open=True, api_keys=ENTRIES)
    apps = [Flask("one"), Flask("other")]
    for app in apps:
        ExternalOMS(app, settings, mount="/oms")
    openfeature.get_client().get_boolean_value(FLAG_KEY, default_value=False)
    for app in apps:
        seen = Scrape.of(app.test_client().get("/oms/metrics").text)
        assert seen.value("evaluations_total", via="sdk") == 1


# -- forks ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # forking under threads is the subject
def test_a_child_forked_while_others_count_and_scrape_counts_and_scrapes() -> None:
    provider = ExternalOMSProvider(Settings(tenant=TENANT, access_token="t", refresh="lazy", insecure=True))
    meters = Metrics(OMS(provider))
    one, stop = Evaluation(TENANT, "CACHED", "sdk", "on"), threading.Event()

    def busy(work: Callable[[], object], pause_seconds: float) -> None:
        while not stop.wait(pause_seconds):  # without a pause between scrapes a fork would hardly get its turn
            work()

    jobs = ((lambda: meters.evaluated(one), 0.0), (meters.collect, 0.001))
    threads = [threading.Thread(target=busy, args=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    try:
        for _ in range(40):
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(30)  # ends a child that hangs in a lock of its parent
                meters.evaluated(one)
                # ended by a signal: what measures coverage saves at an exit, and has locks of its own in the parent
                os.kill(os.getpid(), signal.SIGUSR1 if list(meters.collect()) else signal.SIGUSR2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGUSR1
    finally:
        stop.set()
        for thread in threads:
            thread.join(5)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_child_does_not_tell_its_parents_last_lag(server: Server) -> None:
    read_once(server)
    server.deliver()
    scrape_when(server, lambda seen: bool(seen.values("last_invalidation_applied_seconds")))
    child = os.fork()
    if child == 0:
        os._exit(1 if scrape(server).values("last_invalidation_applied_seconds") else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- counting together ----------------------------------------------------------------------------------------------


def test_several_processes_that_do_not_count_together_are_warned_of(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        answer = server.client.get(
            "/metrics", headers=with_key("viewer"), environ_overrides={"wsgi.multiprocess": True}
        )
        assert answer.status_code == 200
    (line,) = [record.getMessage() for record in caplog.records if "/metrics" in record.getMessage()]
    assert "PROMETHEUS_MULTIPROC_DIR" in line


@pytest.fixture
def _counting_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a server that set it up before prometheus-client was imported."""
    monkeypatch.setenv(metrics.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr(values, "ValueClass", values.MultiProcessValue())  # type: ignore[no-untyped-call]  # the library has no types here
    metrics._shared_counts.cache_clear()
    yield
    metrics._shared_counts.cache_clear()


@pytest.mark.usefixtures("_counting_together")
def test_a_scrape_of_shared_counts_says_what_one_of_our_own_says(start: StartServer) -> None:
    server = start()
    assert metrics.are_shared()
    theirs = Counter("of_the_application", "Counts together with ours.", registry=None)
    theirs.inc()
    read_once(server)
    server.deliver()
    seen = scrape_when(server, lambda seen: seen.value("reads_total", tenant=TENANT, result="ok") == 2)
    assert seen.values("deliveries_total", tenant=TENANT) == {("read",): 1, ("later",): 0, ("duplicate",): 0}
    scrape_when(server, lambda seen: bool(seen.values("last_invalidation_applied_seconds")))
    assert "of_the_application" not in seen.text


@pytest.mark.usefixtures("_counting_together")
def test_two_apps_over_one_provider_count_once_in_shared_counts(start: StartServer) -> None:
    server = start()
    read_once(server)
    create_app(server.oms.settings, provider=server.oms.provider)
    server.deliver()
    assert scrape(server).value("deliveries_total", tenant=TENANT, result="read") == 1


@pytest.mark.usefixtures("_counting_together")
def test_a_directory_that_cannot_be_used_is_refused_by_its_name(
    api: ConfigAPIEmulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(metrics.DIRECTORY_VARIABLE, "/nowhere/at/all")
    with pytest.raises(SettingsError, match="PROMETHEUS_MULTIPROC_DIR"):
        create_app(api.settings(webhook_secrets=[SECRET], api_keys=ENTRIES))


@pytest.mark.usefixtures("_counting_together")
def test_a_file_that_another_process_has_made_and_not_yet_filled_is_left_out(
    start: StartServer, tmp_path: Path
) -> None:
    server = start()
    (tmp_path / "counter_4711.db").touch()
    assert server.get("/metrics").status_code == 200
