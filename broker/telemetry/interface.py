"""What the parts of the broker tell of a session while it is prepared and runs, and the form of it that does nothing.

All calls are for a session, never for a chunk.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from broker.core.session_report import SessionReport

NO_HEADERS: Mapping[str, str] = MappingProxyType({})

TraceContext = dict[str, str]
"""The trace of a request as W3C headers, ``traceparent`` and perhaps ``tracestate``."""


def trace_id(context: TraceContext | None) -> str | None:
    """Return the id of a trace, 32 hexadecimal digits; None where there is none."""
    parts = (context or {}).get("traceparent", "").split("-")
    return parts[1] if len(parts) > 1 else None


class PrepareSpan(Protocol):
    """The span of one /prepare."""

    @property
    def context(self) -> TraceContext | None:
        """The context of this span, to be stored with the session; None where there are no traces."""

    def prepared(self, *, session_id: str, status: int, model: str, max_tokens: int, request_id: str) -> None:
        """Note the session that was made."""


class SessionTrace(Protocol):
    """The spans of one session that runs here: of the session, and of its call of the upstream in it."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers for the request to the upstream."""

    def upstream_ended(self, status: int | None) -> None:
        """Note that the call of the upstream ends now, and the HTTP status of its last answer, if there was one."""

    def end(self, report: SessionReport | None) -> None:
        """End the spans; without a report where the end of the session is not known. A second call does nothing."""


class Telemetry(Protocol):
    """Makes spans, and counts in metrics of OpenTelemetry."""

    def preparing(
        self, headers: Mapping[str, str], *, path: str, scheme: str
    ) -> AbstractContextManager[PrepareSpan]:
        """Return the span of a /prepare. Errors that leave its block are noted in it.

        Args:
            headers: of the request.
            path: of the request, with the prefix of an application around the broker.
            scheme: ``http`` or ``https``, of the connection to this process.
        """

    def session(self, session_id: str, model: str, context: TraceContext | None) -> SessionTrace:
        """Begin the spans of a session that starts now.

        Args:
            session_id: the session.
            model: the model that is asked.
            context: as stored by its /prepare.
        """

    def lost(self, report: SessionReport, context: TraceContext | None) -> None:
        """Note the end of a session whose worker is dead."""

    async def close(self) -> None:
        """Send what is not sent yet, for a few seconds."""


class _Nothing:
    """Implements all of these interfaces, and does nothing."""

    context: TraceContext | None = None
    headers = NO_HEADERS

    def prepared(self, *, session_id: str, status: int, model: str, max_tokens: int, request_id: str) -> None:
        pass

    def upstream_ended(self, status: int | None) -> None:
        pass

    def end(self, report: SessionReport | None) -> None:
        pass

    def preparing(self, headers: Mapping[str, str], *, path: str, scheme: str) -> _Nothing:  # noqa: ARG002 - as of a `Telemetry`
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def session(self, session_id: str, model: str, context: TraceContext | None) -> _Nothing:  # noqa: ARG002
        return self

    def lost(self, report: SessionReport, context: TraceContext | None) -> None:
        pass

    async def close(self) -> None:
        pass


NO_TELEMETRY: Telemetry = _Nothing()
NO_TRACE: SessionTrace = _Nothing()
