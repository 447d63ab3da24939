"""The flag on a trace: the OpenTelemetry hook of OpenFeature adds an event to the current span at every evaluation.

Run it with `python examples/opentelemetry_spans.py`.
"""

from __future__ import annotations

from openfeature import api
from openfeature.contrib.hook.opentelemetry import TracingHook
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from external_oms import FLAG_KEY, ExternalOMSProvider
from external_oms.testing import ConfigAPIEmulator, Fault


def route_order() -> bool:
    """Route an order within a span."""
    with trace.get_tracer("shop").start_as_current_span("route order"):
        return api.get_client().get_boolean_value(FLAG_KEY, default_value=False)


def event_of(span: ReadableSpan) -> dict[str, object]:
    """Return the attributes of the event that the hook added to the span."""
    (event,) = span.events
    assert event.name == "feature_flag.evaluation"
    return dict(event.attributes or {})


def main() -> None:
    """Route an order with a fresh value, and one with a stale value while the config API fails."""
    spans = InMemorySpanExporter()  # in a service, an OTLPSpanExporter
    tracing = TracerProvider()
    tracing.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(tracing)
    api.add_hooks([TracingHook()])

    with ConfigAPIEmulator() as config_api:
        config_api.set_enabled(None, True)
        provider = ExternalOMSProvider(config_api.settings())
        api.set_provider_and_wait(provider)
        assert route_order() is True

        config_api.fault(None, Fault(status=503, times=None))
        provider.invalidate()
        assert route_order() is True
        api.shutdown()

    fresh, stale = (event_of(span) for span in spans.get_finished_spans())
    print("fresh:", fresh)
    print("stale:", stale)
    common = {
        "feature_flag.key": FLAG_KEY,
        "feature_flag.result.value": "true",
        "feature_flag.result.variant": "on",
        "feature_flag.provider.name": "external-oms",
    }
    assert fresh == common | {"feature_flag.result.reason": "cached"}
    assert stale == common | {"feature_flag.result.reason": "stale"}


if __name__ == "__main__":
    main()
