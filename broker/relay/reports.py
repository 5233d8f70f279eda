"""Report each session at its end: write one line to the log, and count it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson
import structlog

from broker.core.pricing import to_usd
from broker.core.session import State, short
from broker.core.session_report import SessionReport, level_of, session_line
from broker.telemetry.interface import trace_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from broker.relay.generation import Generation
    from broker.store.sessions import SessionRecord

log = structlog.get_logger(__name__)


def ignore(_: object) -> None:
    """Count nothing."""


def report_end(generation: Generation, count: Callable[[SessionReport], None] = ignore) -> None:
    """Write the line of a generation whose end was just sent to its viewers, and count it. Does not raise.

    An end that another worker wrote is counted there.
    """
    try:
        report = report_of(generation)
    except Exception:  # the objects of an upstream may be odd
        log.exception("session cannot be reported", session=short(generation.session_id))
        generation.trace.end(None)
        return
    write_line(report)
    generation.trace.end(report)
    if generation.wrote_its_end:
        count(report)


def write_line(report: SessionReport) -> None:
    """Write the log line of a session."""
    level = level_of(report)
    if log.is_enabled_for(level):  # else the line need not be built
        log.log(level, "session ended", **session_line(report))


def report_of(generation: Generation) -> SessionReport:
    """Return the report of a generation that has an end."""
    end, answer, prepared = generation.feed.end, generation.answer, generation.prepared
    data = orjson.loads(end.data) if end is not None else {}
    usage, started_at = generation.finishing.usage, generation.started_at

    def milliseconds(at: float | None) -> int | None:
        return None if at is None else round((at - started_at) * 1000)

    return SessionReport(
        session=generation.session_id,
        request_id=prepared.request_id,
        client=prepared.client,
        model=prepared.model,
        answered_by=answer.model,
        provider=answer.provider,
        state=generation.state,
        code=data.get("code"),
        upstream_status=data.get("upstreamStatus") or generation.upstream_status,
        generation_id=answer.generation_id,
        finish_reason=data.get("finishReason") or answer.finish_reason,
        prompt_tokens=usage.prompt,
        completion_tokens=usage.completion,
        cost=None if usage.cost is None else to_usd(usage.cost),
        estimated=usage.estimated,
        ttft_ms=milliseconds(generation.first_chunk_at),
        duration_ms=milliseconds(generation.clock()),
        chunks=generation.feed.last,
        bytes=generation.relayed,
        viewers=generation.seen_viewers,
        resumes=generation.resumes,
        retries=generation.retries,
        queued_ms=generation.reservation.waited_ms,
        trace_id=trace_id(prepared.trace),
    )


def report_of_lost(session_id: str, session: SessionRecord, state: State) -> SessionReport:
    """Return the report of a session whose worker is dead: what was stored of it."""
    return SessionReport(
        session=session_id,
        request_id=session.spec.request_id,
        client=session.spec.client,
        model=session.spec.model,
        state=state,
        code="worker_lost" if state is State.LOST else None,
        finish_reason="cancelled" if state is State.CANCELLED else None,
        estimated=True,
        trace_id=trace_id(session.spec.trace),
    )
