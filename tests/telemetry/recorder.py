"""Telemetry whose spans and metrics stay in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from broker.telemetry.otel import OpenTelemetry


class Unended(SpanProcessor):
    """The names of spans that were started and not ended yet."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        self.names.append(span.name)

    def on_end(self, span: ReadableSpan) -> None:
        self.names.remove(span.name)


class Recorder:
    """What a broker has told.

    Attributes:
        telemetry: to be given to the broker.
    """

    def __init__(self) -> None:
        self._spans = InMemorySpanExporter()
        self._metrics = InMemoryMetricReader()
        tracers = TracerProvider(shutdown_on_exit=False)
        tracers.add_span_processor(SimpleSpanProcessor(self._spans))
        self._unended = Unended()
        tracers.add_span_processor(self._unended)
        self.telemetry = OpenTelemetry(
            tracers,
            MeterProvider([self._metrics], shutdown_on_exit=False),
            upstream_url="https://models.example/v1",
            provider=lambda: "openrouter",
            version="1.2.3",
        )

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        """All spans that have ended."""
        return self._spans.get_finished_spans()

    @property
    def unended(self) -> list[str]:
        """The names of spans that have not ended."""
        return self._unended.names

    def span(self, name: str) -> ReadableSpan:
        """Return the one span whose name begins so."""
        [span] = [span for span in self.spans if span.name.startswith(name)]
        return span

    def points(self, metric: str) -> list[tuple[Mapping[str, Any], Any]]:
        """Return the labels and the value of each series of a metric."""
        data = self._metrics.get_metrics_data()
        return [
            (point.attributes or {}, point)
            for resource in (data.resource_metrics if data is not None else ())
            for scope in resource.scope_metrics
            for found in scope.metrics
            if found.name == metric
            for point in found.data.data_points
        ]


def attributes(span: ReadableSpan) -> dict[str, Any]:
    """Return the attributes of a span."""
    return dict(span.attributes or {})
