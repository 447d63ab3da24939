"""Dashboard, rules and page speak of the metrics and labels that a scrape has, of all of them and of no other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from external_oms.emulator import ConfigAPIEmulator
from external_oms.web import create_app
from tests.support.scrapes import Scrape
from tests.support.waiting import wait_until
from tests.support.web import TENANT

ROOT = Path(__file__).parents[1]
GRAFANA = ROOT / "examples" / "grafana"
NAME = re.compile(r"\bexternal_oms_\w+")
OF_PROMETHEUS = {"instance", "le", "job"}
"""Labels that a scrape does not have: Prometheus adds them, or a histogram's buckets have them."""


@pytest.fixture(scope="module")
def scraped() -> Scrape:
    """A scrape in which every metric has a series."""
    with ConfigAPIEmulator([TENANT]) as api:
        app = create_app(api.settings(insecure=True, webhook_secrets=(), metrics_open=True))
        client, oms = app.test_client(), app.extensions["external_oms"]
        try:
            assert oms.provider.service.cache.refresh(TENANT).entry.snapshot is not None
            assert client.post("/webhooks/external-oms", json={}).status_code == 200
            oms.provider.service.heartbeat._report()
            wait_until(lambda: "last_invalidation_applied_seconds{" in client.get("/metrics").text)
            return Scrape.of(client.get("/metrics").text)
        finally:
            oms.provider.shutdown()


@cache
def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((GRAFANA / "dashboard.json").read_text(encoding="utf-8"))
    return read


@cache
def rules() -> list[dict[str, Any]]:
    read: dict[str, Any] = yaml.safe_load((GRAFANA / "alerts.yml").read_text(encoding="utf-8"))
    return [rule for group in read["groups"] for rule in group["rules"]]


def expressions() -> Iterator[str]:
    """Everything that is asked of Prometheus."""
    yield from (rule["expr"] for rule in rules())
    yield from (target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ()))
    yield from (annotation["expr"] for annotation in dashboard()["annotations"]["list"])
    yield from (variable["definition"] for variable in dashboard()["templating"]["list"] if "definition" in variable)


def metric_of(name: str) -> str:
    """The metric that a series belongs to."""
    return re.sub(r"_(bucket|count|sum)$", "", name)


def labels_in(expression: str) -> set[str]:
    """Every label that an expression selects or groups by."""
    selected = {
        label for inner in re.findall(r"{([^}]*)}", expression) for label in re.findall(r"(\w+)\s*[=!]~?", inner)
    }
    grouped = re.findall(r"\b(?:by|on|ignoring|without|group_left)\s*\(([^)]*)\)", expression)
    return selected | {label.strip() for inner in grouped for label in inner.split(",") if label.strip()}


@pytest.mark.parametrize("expression", list(expressions()))
def test_every_expression_asks_for_metrics_and_labels_that_there_are(expression: str, scraped: Scrape) -> None:
    described = scraped.described()
    named = {metric_of(name) for name in NAME.findall(expression)}
    assert named
    assert named <= set(described)
    there = {label for name in named for label in described[name][1]}
    assert labels_in(expression) - OF_PROMETHEUS <= there
    assert expression.count("(") == expression.count(")")


@pytest.mark.parametrize("expression", list(expressions()))
def test_a_counter_is_asked_for_its_rate_and_a_histogram_for_its_buckets(expression: str, scraped: Scrape) -> None:
    for name in NAME.findall(expression):
        kind, _ = scraped.described()[metric_of(name)]
        if kind == "counter":
            assert re.search(rf"(rate|increase)\({name}\b", expression)
        if kind == "histogram":
            assert name.endswith("_bucket")
            assert re.search(r"by \([^)]*\ble\b[^)]*\)", expression)


def test_a_result_or_state_that_is_asked_for_by_name_is_one(scraped: Scrape) -> None:
    states = {state for _, state in ((t, s) for s, t in scraped.values("freshness"))}
    asked = {state for expression in expressions() for state in re.findall(r'state="(\w+)"', expression)}
    assert asked <= states
    outcomes = {outcome for outcome, _ in scraped.values("read_duration_seconds_count")}
    assert {outcome for one in expressions() for outcome in re.findall(r'outcome="(\w+)"', one)} <= outcomes
    reasons = {reason for reason, *_ in scraped.values("evaluations_total")}
    asked = {
        reason
        for one in expressions()
        for inner in re.findall(r'reason=~"([\w|]+)"', one)
        for reason in inner.split("|")
    }
    assert asked <= reasons


def test_every_metric_is_on_the_dashboard_or_in_a_rule(scraped: Scrape) -> None:
    used = {metric_of(name) for expression in expressions() for name in NAME.findall(expression)}
    assert set(scraped.described()) - used == {"external_oms_build_info"}


def test_every_rule_says_how_grave_it_is_what_happened_and_what_to_do() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert re.fullmatch(r"ExternalOMS[A-Z]\w+", rule["alert"])
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"]["summary"]
        assert len(rule["annotations"]["description"]) > len(rule["annotations"]["summary"])
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))


def test_a_rule_speaks_only_of_labels_that_its_alert_has() -> None:
    for rule in rules():
        told = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        assert told <= labels_in(rule["expr"]) | ({"member"} if "member_generation" in rule["expr"] else set())


def test_panels_do_not_lie_on_each_other_and_each_says_what_it_shows() -> None:
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["description"].endswith(".")
            assert panel["targets"]


def documented() -> Iterator[list[str]]:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").split("## Every metric")[1].split("\n## ")[0]
    for line in text.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_page_tells_of_every_metric_with_its_type_and_labels_and_of_no_other(scraped: Scrape) -> None:
    told = {cells[0].strip("`"): (cells[1], frozenset(cells[3].split(", "))) for cells in documented()}
    assert told == scraped.described()


def test_the_page_tells_which_alert_uses_which_metric() -> None:
    told = {cells[0].strip("`"): set(re.findall(r"`(ExternalOMS\w+)`", cells[5])) for cells in documented()}
    uses: dict[str, set[str]] = {name: set() for name in told}
    for rule in rules():
        for name in NAME.findall(rule["expr"]):
            uses[metric_of(name)].add(rule["alert"])
    assert told == uses


def test_a_unit_stands_in_the_name() -> None:
    for cells in documented():
        name, kind, unit = cells[0].strip("`"), cells[1], cells[2]
        assert ("seconds" in unit) is name.endswith("_seconds"), name
        assert (kind == "counter") is name.endswith("_total"), name
