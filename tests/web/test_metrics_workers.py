"""Several workers, one truth: real servers, traffic to each worker, a scrape of any of them, and one killed."""

from __future__ import annotations

import http.client
import os
import re
import signal
from pathlib import Path

import pytest

from external_oms.emulator import ConfigAPIEmulator
from external_oms.web.serving import MEMBER_HEADER
from tests.support.scrapes import Scrape
from tests.support.servers import FLAG_PATH, SERVE, Gunicorn, Served, environment, gunicorn, served
from tests.support.waiting import wait_until
from tests.support.web import ENTRIES, TENANT, with_key

NAMED = (*SERVE, "--name-members")


def asked(connection: http.client.HTTPConnection, method: str, path: str, body: str | None = None) -> tuple[str, str]:
    """The member that answered, and its answer."""
    connection.request(method, path, body, with_key("viewer") | {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode()
    assert answer.status == 200, text
    return answer.headers.get(MEMBER_HEADER, ""), text


def each_worker(server: Served, count: int = 2) -> dict[str, http.client.HTTPConnection]:
    """A connection to each worker, by its name: a worker keeps its connections to itself."""
    return server.connect_each(count, lambda connection: asked(connection, "GET", "/healthz")[0])


def scraped(connection: http.client.HTTPConnection) -> Scrape:
    return Scrape.of(asked(connection, "GET", "/metrics")[1])


def evaluations(seen: Scrape, via: str = "ofrep") -> float:
    return seen.value("evaluations_total", tenant=TENANT, via=via)


def test_the_page_shows_the_counts_of_all_workers(tmp_path: Path) -> None:
    with ConfigAPIEmulator([TENANT]) as api, served(api, tmp_path, command=NAMED) as server:
        server.flip(True)
        workers = each_worker(server)
        for connection in workers.values():
            for _ in range(4):
                asked(connection, "POST", FLAG_PATH, '{"context": {}}')
        pages = [asked(connection, "GET", f"/tenants/{TENANT}")[1] for connection in workers.values()]
        for connection in workers.values():
            connection.close()
    counts = [re.findall(r"<desc[^>]*>((?:≤ 50 ms|ON): [^<]*)</desc>", page) for page in pages]
    assert counts[0] == counts[1]
    assert sum(int(count) for count in re.findall(r": (\d+)[;.]", counts[0][0])) >= 2
    assert counts[0][0].endswith("; failed: 0.")
    assert counts[0][1].startswith("ON: 8; ")
    assert all("All processes of this server, since the start" in page for page in pages)


@pytest.mark.timeout(150)
def test_served_counts_are_sums_over_workers_living_and_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with ConfigAPIEmulator([TENANT]) as api, served(api, tmp_path, command=NAMED) as server:
        (directory,) = tmp_path.glob("external-oms-metrics-*")
        workers = each_worker(server)
        one, other = workers
        before = {name: scraped(connection) for name, connection in workers.items()}
        for name, times in ((one, 7), (other, 5)):
            for _ in range(times):
                assert asked(workers[name], "POST", FLAG_PATH, '{"context": {}}')[0] == name
        for connection in workers.values():
            assert evaluations(scraped(connection)) == evaluations(before[one]) + 12
        assert evaluations(before[one]) == evaluations(before[other])

        server.flip(True)
        wait_until(lambda: len(scraped(workers[one]).values("last_invalidation_applied_seconds")) == 2)
        seen = scraped(workers[other])
        assert {member for member, _ in seen.values("last_invalidation_applied_seconds")} == {one, other}
        assert seen.value("invalidation_applied_seconds_count", tenant=TENANT) == 2, "each worker once"
        assert seen.value("deliveries_total", tenant=TENANT, result="read") == 1
        wait_until(lambda: scraped(workers[one]).value("reads_total", tenant=TENANT, result="ok") == api.reads(TENANT))
        assert seen.value("token_renewals_total", tenant=TENANT, result="ok") == api.tokens_issued(TENANT)
        assert (seen.value("enabled"), seen.value("generation")) == (1, 1)
        assert {member for member, _ in seen.values("member_generation")} <= {one, other}

        os.kill(int(one.rpartition(":")[2]), signal.SIGKILL)
        workers[one].close()
        wait_until(lambda: len(server.workers()) == 2 and f":{server.workers()[0]}" != one)
        wait_until(
            lambda: set(scraped(workers[other]).values("last_invalidation_applied_seconds")) == {(other, TENANT)}
        )
        after = scraped(workers[other])
        assert evaluations(after) == evaluations(before[one]) + 12, "what the dead one counted stays"
        heirs = each_worker(server)
        assert one not in heirs
        assert directory.is_dir()
        for connection in (workers[other], *heirs.values()):
            connection.close()
    assert not list(tmp_path.glob("external-oms-metrics-*"))


def shop_scrape(connection: http.client.HTTPConnection) -> Scrape:
    return Scrape.of(asked(connection, "GET", "/oms/metrics")[1])


def totals(shop: Gunicorn) -> list[float]:
    return [evaluations(shop_scrape(connection), "sdk") for connection in shop.members().values()]


@pytest.mark.timeout(150)
@pytest.mark.parametrize("preload", [False, True], ids=["each-worker-loads", "preload"])
def test_the_workers_of_an_application_count_together_where_it_has_them_do_so(preload: bool, tmp_path: Path) -> None:
    (counts := tmp_path / "counts").mkdir()
    with ConfigAPIEmulator([TENANT]) as api:
        variables = environment(api, store=f"sqlite:///{tmp_path}/state.db") | {
            "EXTERNAL_OMS_METRICS_OPEN": "true",
            "EXTERNAL_OMS_API_KEYS": ",".join(ENTRIES),
            "PROMETHEUS_MULTIPROC_DIR": str(counts),
        }
        log = tmp_path / "log"
        with gunicorn("tests.hosts.metered_shop:app", environ=variables, log=log, workers=2, preload=preload) as shop:
            shop.evaluate(6)
            assert totals(shop) == [12, 12]
            killed = next(iter(shop.connections))
            shop.kill(killed)
            assert totals(shop) == [12, 12]
            shop.evaluate(3)
            assert totals(shop) == [18, 18]
            assert killed not in shop.connections
            assert "shop_orders" not in shop_scrape(next(iter(shop.connections.values()))).text
        assert "/metrics" not in log.read_text(encoding="utf-8"), "nothing is missing, so nothing is said"


@pytest.mark.timeout(150)
def test_an_application_whose_workers_count_alone_is_told_so(tmp_path: Path) -> None:
    with ConfigAPIEmulator([TENANT]) as api:
        variables = environment(api, store=f"sqlite:///{tmp_path}/state.db") | {
            "EXTERNAL_OMS_METRICS_OPEN": "true",
            "EXTERNAL_OMS_API_KEYS": ",".join(ENTRIES),
        }
        log = tmp_path / "log"
        with gunicorn("tests.hosts.metered_shop:app", environ=variables, log=log, workers=2) as shop:
            shop.evaluate(6)
            assert totals(shop) == [6, 6]
        assert "PROMETHEUS_MULTIPROC_DIR" in log.read_text(encoding="utf-8")
