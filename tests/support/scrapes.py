"""A scrape as Prometheus reads it: by the parser of its own client, with one value looked up at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_plain

__all__ = ["Scrape"]

PREFIX = "external_oms_"


@dataclass(frozen=True)
class Scrape:
    """What one scrape gave."""

    text: str
    families: tuple[Metric, ...]

    @classmethod
    def of(cls, text: str) -> Scrape:
        """A scrape in either format."""
        found: Iterable[Metric] = read_openmetrics(text) if text.endswith("# EOF\n") else read_plain(text)  # type: ignore[no-untyped-call]  # the library has no types here
        return cls(text, tuple(found))

    def values(self, name: str, **labels: str) -> dict[tuple[str, ...], float]:
        """The values of the series with these labels, by the others' values in the order of their names."""
        return {
            tuple(value for label, value in sorted(sample.labels.items()) if label not in labels): sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == PREFIX + name and labels.items() <= sample.labels.items()
        }

    def value(self, name: str, **labels: str) -> float:
        """The sum over the series with these labels; there is at least one."""
        found = self.values(name, **labels)
        assert found, f"{name} {labels} is not in the scrape"
        return sum(found.values())

    def described(self) -> dict[str, tuple[str, frozenset[str]]]:
        """Name to type and labels, of every metric that has a series."""
        return {
            family.name + ("_total" if family.type == "counter" else ""): (
                family.type,
                frozenset(label for sample in family.samples for label in sample.labels) - {"le"},
            )
            for family in self.families
            if family.samples
        }
