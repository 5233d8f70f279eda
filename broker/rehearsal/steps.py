"""The steps of a script, as plain values. The stage executes them.

Only the kinds of steps belong here. A new kind of fault is usually a new order of these five.
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
    """Write these bytes now, in one write. The first one opens the event stream."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Pause:
    """Write nothing for so many seconds, multiplied by the pace of the service."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer with a complete body in place of an event stream, and end the script."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reset:
    """Reset the TCP connection, and end the script."""


Step: TypeAlias = Send | Pause | Reply | Reset
Script: TypeAlias = Generator[Step, None, None]
"""At the end of its steps, a script closes the stream cleanly."""


def comment() -> Send:
    """Return the comment that OpenRouter writes while a model is busy."""
    return Send(PROCESSING)


def event(body: Mapping[str, Any]) -> Send:
    """Return one event with this JSON, with its characters as UTF-8 and not escaped."""
    return Send(b"data: " + orjson.dumps(body) + b"\n\n")


def problem(status: int, message: str, *, retry_after: int | None = None, **more: Any) -> Reply:
    """Return an error body in OpenRouter's form; ``more`` goes into its ``error`` object."""
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return Reply(
        status, orjson.dumps({"error": {"code": status, "message": message, **more}}), headers=headers
    )
