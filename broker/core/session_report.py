"""What the operator is told of a session that has ended: its log line, and the values that the metrics count. No I/O.

A report has no prompt, no answer and no whole session id.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Any

from broker.core.session import State, short

LONGEST_TEXT = 128
"""Characters of a name that a page or an upstream chose."""

_FAILURES = frozenset({State.FAILED, State.LOST})


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionReport:
    """A session that has ended. Unknown values are None.

    Attributes:
        session: the id of the session; the line has only its first 8 characters.
        request_id: of the /prepare that made it.
        client: who pays.
        model: the requested model.
        answered_by: the model that answered, as the upstream names it.
        provider: as the upstream names it.
        state: in which the session ended.
        code: of the error that ended it.
        upstream_status: the HTTP status of the upstream, or the one that its error names.
        generation_id: the upstream's id of the generation.
        finish_reason: that of the upstream, or ``cancelled``.
        prompt_tokens, completion_tokens, cost: the usage that was booked; the cost is in USD.
        estimated: the usage is an estimate.
        ttft_ms: milliseconds from the claim to the first chunk.
        duration_ms: milliseconds from the claim to the end.
        chunks, bytes: of the answer, as they were relayed.
        viewers: connections that watched the session on this worker.
        resumes: those of them that came with a cursor.
        retries: how often the upstream was asked again.
        queued_ms: milliseconds in line for a slot; 0 for a session that did not wait.
        trace_id: of its trace; the line has it only where there are traces.
    """

    session: str
    request_id: str
    client: str
    model: str
    answered_by: str | None = None
    provider: str | None = None
    state: State
    code: str | None = None
    upstream_status: int | None = None
    generation_id: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float | None = None
    estimated: bool = False
    ttft_ms: int | None = None
    duration_ms: int | None = None
    chunks: int = 0
    bytes: int = 0
    viewers: int = 0
    resumes: int = 0
    retries: int = 0
    queued_ms: int | None = None
    trace_id: str | None = None


_NAMES = tuple(each.name for each in fields(SessionReport))


def level_of(report: SessionReport) -> int:
    """Return the level of the log line of a session: `WARNING` if it failed, else `INFO`."""
    return logging.WARNING if report.state in _FAILURES else logging.INFO


def session_line(report: SessionReport) -> dict[str, Any]:
    """Return the fields of the log line of a session."""
    line = {name: _cut(getattr(report, name)) for name in _NAMES}
    line["session"] = short(report.session)
    if report.trace_id is None:
        del line["trace_id"]
    return line


def _cut(value: Any) -> Any:
    return str(value)[:LONGEST_TEXT] if isinstance(value, str) else value
