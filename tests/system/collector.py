"""A collector of OpenTelemetry's protocol, on gRPC and on HTTP, that keeps what it gets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from aiohttp import web
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb2
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc


class Collector:
    """What was received.

    Attributes:
        requests: all of them.
    """

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def spans(self) -> dict[str, Any]:
        """Return all spans by name."""
        return {
            span.name: span
            for request in self.requests
            for resource in getattr(request, "resource_spans", ())
            for scope in resource.scope_spans
            for span in scope.spans
        }

    def metrics(self) -> set[str]:
        """Return the names of all metrics."""
        return {
            metric.name
            for request in self.requests
            for resource in getattr(request, "resource_metrics", ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def services(self) -> set[str]:
        """Return who has sent something."""
        return self._of_senders("service.name")

    def instances(self) -> set[str]:
        """Return which processes have sent something."""
        return self._of_senders("service.instance.id")

    def _of_senders(self, name: str) -> set[str]:
        """Return the values of an attribute of those who have sent something."""
        resources = [
            each.resource
            for request in self.requests
            for each in (*getattr(request, "resource_spans", ()), *getattr(request, "resource_metrics", ()))
        ]
        named = [each for resource in resources for each in resource.attributes]
        return {each.value.string_value for each in named if each.key == name}

    async def Export(self, request: Any, _context: object) -> Any:  # noqa: N802 - the protocol's name
        """Take a request of gRPC."""
        self.requests.append(request)
        is_trace = isinstance(request, trace_pb2.ExportTraceServiceRequest)
        return (
            trace_pb2.ExportTraceServiceResponse() if is_trace else metrics_pb2.ExportMetricsServiceResponse()
        )

    async def take(self, request: web.Request) -> web.Response:
        """Take a request of HTTP."""
        kinds: dict[str, Any] = {
            "/v1/traces": trace_pb2.ExportTraceServiceRequest,
            "/v1/metrics": metrics_pb2.ExportMetricsServiceRequest,
        }
        self.requests.append(kinds[request.path].FromString(await request.read()))
        return web.Response(content_type="application/x-protobuf")


@asynccontextmanager
async def collecting(protocol: str) -> AsyncIterator[tuple[Collector, str]]:
    """Run a collector of ``grpc`` or ``http/protobuf``, and give it and its address."""
    collector = Collector()
    if protocol == "grpc":
        server = grpc.aio.server()
        # The generated code has no types.
        trace_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
        metrics_grpc.add_MetricsServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield collector, f"http://127.0.0.1:{port}"
        finally:
            await server.stop(None)
        return
    app = web.Application()
    app.add_routes([web.post("/v1/traces", collector.take), web.post("/v1/metrics", collector.take)])
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield collector, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
