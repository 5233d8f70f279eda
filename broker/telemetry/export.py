"""Send spans and metrics to a collector, as the standard `OTEL_*` variables say. Needs the extra `otel`.

No global provider is set, so an application around the broker keeps its own. The SDK sends in its own threads, from
bounded queues.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

import structlog
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NoOpTracerProvider

from broker.telemetry.otel import OpenTelemetry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

log = structlog.get_logger(__name__)

CLOSE_TIMEOUT = 5.0
"""Seconds at the end of the process for what is not sent yet."""

_PACKAGES = {
    "grpc": "opentelemetry.exporter.otlp.proto.grpc",
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http",
}


def export(
    protocols: Mapping[str, str],
    *,
    upstream_url: str,
    provider: Callable[[], str],
    version: str,
) -> OpenTelemetry:
    """Return telemetry that is sent to a collector.

    Args:
        protocols: of each signal that is sent, ``traces`` and ``metrics``: ``grpc`` or ``http/protobuf``.
        upstream_url: the service that is asked.
        provider: returns its name.
        version: of the broker.

    Raises:
        Exception: a variable cannot be used, or a package of the extra is missing. Nothing runs then.
    """
    shutdowns: list[Callable[[], object]] = []
    try:
        tracers, meters = _providers(protocols, _resource(version), shutdowns)
    except Exception:
        for shutdown in shutdowns:  # they have threads
            shutdown()
        raise

    async def close() -> None:
        await asyncio.gather(*(_bounded(shutdown) for shutdown in shutdowns))

    return OpenTelemetry(
        tracers, meters, upstream_url=upstream_url, provider=provider, version=version, close=close
    )


def _providers(
    protocols: Mapping[str, str], resource: Resource, shutdowns: list[Callable[[], object]]
) -> tuple[Any, Any]:
    """Return the providers of spans and metrics, and add to ``shutdowns`` what ends those that run."""
    tracers: Any = NoOpTracerProvider()
    meters: Any = NoOpMeterProvider()
    if (protocol := protocols.get("traces")) is not None:
        tracers = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = import_module(f"{_PACKAGES[protocol]}.trace_exporter").OTLPSpanExporter()
        tracers.add_span_processor(BatchSpanProcessor(exporter))
        shutdowns.append(tracers.shutdown)
    if (protocol := protocols.get("metrics")) is not None:
        exporter = import_module(f"{_PACKAGES[protocol]}.metric_exporter").OTLPMetricExporter()
        reader = PeriodicExportingMetricReader(exporter)
        # No span is current where a session is counted, so there are no exemplars to look for.
        meters = MeterProvider(
            [reader], resource=resource, exemplar_filter=AlwaysOffExemplarFilter(), shutdown_on_exit=False
        )
        shutdowns.append(meters.shutdown)
    return tracers, meters


async def _bounded(shutdown: Callable[[], object]) -> None:
    """Shut a provider down in a thread that nothing waits for at the end of the process."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        try:
            shutdown()
        except Exception:
            log.exception("telemetry cannot be closed")
        with suppress(RuntimeError):  # the loop is closed by now
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name="close telemetry", daemon=True).start()
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT):
            await done.wait()
    except TimeoutError:
        log.warning("telemetry was not sent in time", seconds=CLOSE_TIMEOUT)


def _resource(version: str) -> Resource:
    """Return the name and version of the service; `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` replace ours."""
    given = Resource.create()
    if str(given.attributes["service.name"]).startswith("unknown_service"):
        given = given.merge(Resource({"service.name": "session-broker"}))
    return Resource({"service.version": version}).merge(given)
