"""Spans and metrics of OpenTelemetry. This module needs the extra `otel`, so it is imported only where they are on.

The page's trace, as its `traceparent`, is the parent of the span of /prepare. That span is stored with the session and
is the parent of the session's span, also on another worker. It is a parent and not a link, because one session belongs
to one /prepare. The call of the upstream is a client span in it, and its context goes to the upstream.

Names are those of the conventions for HTTP and for generative AI. Values that a page or an upstream chose are cut.
"""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import structlog
from aiohttp import web
from opentelemetry.trace import SpanKind, StatusCode, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from broker.core.errors import BrokerError, InternalError
from broker.core.session import State, short
from broker.core.session_report import LONGEST_TEXT
from broker.telemetry.names import ModelNames

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from opentelemetry.context import Context
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, TracerProvider

    from broker.core.session_report import SessionReport
    from broker.telemetry.interface import TraceContext

log = structlog.get_logger(__name__)

SCOPE = "session-broker"
LONGEST_TRACE_STATE = 512
"""Characters of a `tracestate`, as many as W3C asks for. A longer one is not read and not carried on."""

MOST_MEMBERS = 32
"""Members of a `tracestate`, as W3C says."""

TOKENS = [4**power for power in range(14)]
SECONDS = [0.01 * 2**power for power in range(14)]
FIRST_TOKEN = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]
"""Bounds of histograms, as the conventions ask for them."""

_W3C = TraceContextTextMapPropagator()
_MEMBER = re.compile(
    r"(?:[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})"  # the key
    r"=[ -+\--<>-~]{0,255}[!-+\--<>-~]"  # the value: visible characters and spaces, but no comma and no `=`
)


class OpenTelemetry:
    """Makes the spans of sessions, and counts them.

    Args:
        tracers: makes the tracer.
        meters: makes the metrics.
        upstream_url: the service that is asked.
        provider: returns its name, as ``gen_ai.provider.name``.
        version: of the broker.
        close: sends what is not sent yet.
    """

    def __init__(
        self,
        tracers: TracerProvider,
        meters: MeterProvider,
        *,
        upstream_url: str,
        provider: Callable[[], str],
        version: str,
        close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._tracer = tracers.get_tracer(SCOPE, version)
        self._counted = _Counted(meters, version)
        self._provider = provider
        parts = urlsplit(upstream_url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        self._server = {"server.address": parts.hostname or "", "server.port": port}
        self._close = close

    @contextmanager
    def preparing(self, headers: Mapping[str, str], *, path: str, scheme: str) -> Iterator[_PrepareSpan]:
        """Make the span of a /prepare, in the trace of the page or of the application around the broker."""
        around = get_current_span().get_span_context().is_valid
        span = self._tracer.start_span(
            f"POST {path}",
            context=None if around else _W3C.extract(_trace_of(headers)),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": "POST",
                "http.route": path,  # it has no variable part
                "url.path": path,
                "url.scheme": _scheme_of_page(headers) or scheme,
            },
        )
        try:
            yield _PrepareSpan(span)
        except BaseException as error:
            _note_error(span, error)
            raise
        finally:
            span.end()

    def session(self, session_id: str, model: str, context: TraceContext | None) -> _SessionTrace:
        """Begin the spans of a session."""
        span = self._session_span(session_id, _W3C.extract(context or {}))
        asked = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": self._provider(),
            "gen_ai.request.model": _cut(model),
            **self._server,
        }
        call = self._tracer.start_span(
            f"chat {_cut(model)}",
            context=set_span_in_context(span),
            kind=SpanKind.CLIENT,
            attributes={**asked, "gen_ai.request.stream": True},
        )
        return _SessionTrace(span, call, asked, self._counted)

    def lost(self, report: SessionReport, context: TraceContext | None) -> None:
        """Make a span for a session whose worker is dead, and so has not sent its own. Does not raise."""
        span = self._session_span(report.session, _W3C.extract(context or {}))
        try:
            _describe_session(span, report)
        except Exception:
            log.exception("session cannot be traced")
        finally:
            span.end()

    def _session_span(self, session_id: str, parent: Context) -> Span:
        attributes = {"broker.session": short(session_id)}
        return self._tracer.start_span("session", context=parent, attributes=attributes)

    async def close(self) -> None:
        """Send what is not sent yet."""
        if self._close is not None:
            await self._close()


class _PrepareSpan:
    """The span of one /prepare."""

    def __init__(self, span: Span) -> None:
        self._span = span

    @property
    def context(self) -> TraceContext:
        """The context of this span, to be stored with the session."""
        return _headers_of(self._span)

    def prepared(self, *, session_id: str, status: int, model: str, max_tokens: int, request_id: str) -> None:
        """Note the session that was made."""
        self._span.set_attributes(
            {
                "http.response.status_code": status,
                "gen_ai.request.model": _cut(model),
                "gen_ai.request.max_tokens": max_tokens,
                "broker.session": short(session_id),
                "broker.request_id": request_id,
            }
        )


class _SessionTrace:
    """The spans of one session that runs here."""

    __slots__ = ("_asked", "_began", "_call", "_counted", "_ended", "_is_over", "_span", "_status", "headers")

    def __init__(self, span: Span, call: Span, asked: Mapping[str, Any], counted: _Counted) -> None:
        self.headers: Mapping[str, str] = _headers_of(call)
        self._span = span
        self._call = call
        self._asked = asked
        self._counted = counted
        self._began = time.time_ns()
        self._ended = 0
        self._status: int | None = None
        self._is_over = False

    def upstream_ended(self, status: int | None) -> None:
        """Note that the call of the upstream ends now, with this HTTP status."""
        self._ended, self._status = time.time_ns(), status

    def end(self, report: SessionReport | None) -> None:
        """End both spans. Does not raise: the end of a session must not depend on its spans."""
        if self._is_over:
            return
        self._is_over = True
        ended = self._ended or time.time_ns()
        try:
            if report is not None:
                _describe_call(self._call, report, self._status)
                _describe_session(self._span, report)
                self._counted.add(report, self._asked, (ended - self._began) / 1e9)
        except Exception:
            log.exception("session cannot be traced")
        finally:
            self._call.end(ended)
            self._span.end()


class _Counted:
    """The metrics, under the names of the conventions."""

    def __init__(self, meters: MeterProvider, version: str) -> None:
        meter = meters.get_meter(SCOPE, version)
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            "{token}",
            "Number of input and output tokens used.",
            explicit_bucket_boundaries_advisory=TOKENS,
        )
        self._duration = meter.create_histogram(
            "gen_ai.client.operation.duration",
            "s",
            "GenAI operation duration.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self._first_chunk = meter.create_histogram(
            "gen_ai.client.operation.time_to_first_chunk",
            "s",
            "Time to receive the first chunk.",
            explicit_bucket_boundaries_advisory=FIRST_TOKEN,
        )
        self._first_token = meter.create_histogram(
            "gen_ai.server.time_to_first_token",
            "s",
            "Time to generate first token for successful responses.",
            explicit_bucket_boundaries_advisory=FIRST_TOKEN,
        )
        self._models = ModelNames()

    def add(self, report: SessionReport, asked: Mapping[str, Any], seconds: float) -> None:
        """Count one session that ended."""
        answered = report.state is State.DONE
        labels = {**asked, "gen_ai.request.model": self._models.name(report.model, answered=answered)}
        if report.answered_by:
            labels["gen_ai.response.model"] = self._models.name(report.answered_by, answered=answered)
        for kind, tokens in (("input", report.prompt_tokens), ("output", report.completion_tokens)):
            if tokens is not None:
                self._tokens.record(tokens, {**labels, "gen_ai.token.type": kind})
        if report.ttft_ms is not None:
            self._first_chunk.record(report.ttft_ms / 1000, labels)
            if answered:
                self._first_token.record(report.ttft_ms / 1000, labels)
        failed = {"error.type": report.code} if report.code else {}
        self._duration.record(seconds, {**labels, **failed})


def _describe_call(span: Span, report: SessionReport, status: int | None) -> None:
    if not span.is_recording():
        return
    span.set_attributes(
        _known(
            {
                "gen_ai.response.model": report.answered_by,
                "gen_ai.response.id": report.generation_id,
                "gen_ai.response.finish_reasons": [_cut(report.finish_reason)]
                if report.finish_reason
                else None,
                "gen_ai.response.time_to_first_chunk": _seconds(report.ttft_ms),
                "gen_ai.usage.input_tokens": report.prompt_tokens,
                "gen_ai.usage.output_tokens": report.completion_tokens,
                "http.response.status_code": status,
                "http.request.resend_count": report.retries or None,
                "broker.upstream.provider": report.provider,
            }
        )
    )
    _note_failure(span, report)


def _describe_session(span: Span, report: SessionReport) -> None:
    if not span.is_recording():
        return
    span.set_attributes(
        _known(
            {
                "broker.state": report.state.value,
                "broker.cost_usd": report.cost,
                "broker.chunks": report.chunks,
                "broker.bytes": report.bytes,
                "broker.viewers": report.viewers,
                # Each attribute costs CPU when it is set and when it is sent, so these are left out while 0 or false.
                "broker.resumes": report.resumes or None,
                "broker.queued_ms": report.queued_ms or None,
                "broker.estimated": report.estimated or None,
            }
        )
    )
    _note_failure(span, report)


def _note_failure(span: Span, report: SessionReport) -> None:
    if report.code is not None:
        span.set_attribute("error.type", report.code)
    if report.state in (State.FAILED, State.LOST):
        span.set_status(StatusCode.ERROR)


def _note_error(span: Span, error: BaseException) -> None:
    """Note why a /prepare was refused. The text of an error stays out: it may quote the request.

    For a server, the conventions count only statuses from 500 as errors.
    """
    if isinstance(error, BrokerError):
        status, code = error.status, error.code
    elif isinstance(error, web.HTTPException):
        status, code = error.status, str(error.status)
    elif isinstance(error, Exception) and not isinstance(error, ConnectionError):
        status, code = InternalError.status, InternalError.code
    else:  # the page has left, so it got no answer
        span.set_attribute("error.type", "cancelled")
        return
    span.set_attributes({"http.response.status_code": status, "broker.error_code": code})
    if status >= 500:
        span.set_attribute("error.type", code)
        span.set_status(StatusCode.ERROR)


def _trace_of(headers: Mapping[str, str]) -> TraceContext:
    """Return the trace of a request, without a `tracestate` that is not valid: the library would log its content."""
    trace = {"traceparent": headers.get("traceparent", "")}
    state = headers.get("tracestate", "")
    if len(state) <= LONGEST_TRACE_STATE:
        members = [member for each in state.split(",") if (member := each.strip(" \t"))]
        if len(members) <= MOST_MEMBERS and all(map(_MEMBER.fullmatch, members)):
            trace["tracestate"] = ",".join(members)
    return trace


def _scheme_of_page(headers: Mapping[str, str]) -> str | None:
    """Return the scheme that a proxy names. It is only shown, so it does not matter whether the proxy is trusted."""
    named = headers.get("X-Forwarded-Proto", "").lower()
    return named if named in {"http", "https"} else None


def _headers_of(span: Span) -> TraceContext:
    headers: dict[str, str] = {}
    _W3C.inject(headers, set_span_in_context(span))
    if len(headers.get("tracestate", "")) > LONGEST_TRACE_STATE:
        del headers["tracestate"]
    return headers


def _known(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _cut(value) for name, value in attributes.items() if value is not None}


def _cut(value: Any) -> Any:
    return value[:LONGEST_TEXT] if isinstance(value, str) else value


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
