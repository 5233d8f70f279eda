"""What a script can do to a connection, as plain values: a script says it, the stage does it.

Only the vocabulary belongs here. A new kind of fault is mostly a new order of these five, hardly ever a sixth.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import orjson

PROCESSING = b": OPENROUTER PROCESSING\n\n"
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Send:
    """Writes these bytes now, as one write; the first one opens the event stream."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Pause:
    """Writes nothing for so many seconds, before the pace of the service is applied."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Reply:
    """Answers with a whole body in place of an event stream, and ends the script."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reset:
    """Resets the TCP connection, and ends the script."""


Step: TypeAlias = Send | Pause | Reply | Reset
Script: TypeAlias = Generator[Step, None, None]
"""A script that runs out of steps closes the stream cleanly."""


def comment() -> Send:
    """The keep-alive line that OpenRouter writes while a model is busy."""
    return Send(PROCESSING)


def event(body: Mapping[str, Any]) -> Send:
    """One event with this JSON in it, its characters as UTF-8 rather than escaped."""
    return Send(b"data: " + orjson.dumps(body) + b"\n\n")


def problem(status: int, message: str, *, retry_after: int | None = None, **more: Any) -> Reply:
    """An error body as OpenRouter sends it; ``more`` goes into its ``error`` object."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return Reply(
        status, orjson.dumps({"error": {"code": status, "message": message, **more}}), headers=headers
    )
