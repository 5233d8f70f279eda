"""Build what pages receive: the data of `done` and `error` events, and the bytes of all events. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from broker.core.json_to_keep import json_to_keep
from broker.core.session import Cursor, State, Terminal
from broker.core.sse import encode_event

if TYPE_CHECKING:
    from collections.abc import Iterable

    from broker.core.answer import Answer
    from broker.core.errors import BrokerError

RELAYED = b"id: 1-%d\nevent: chunk\n%b"
"""The event of one chunk as `chunk_events` returns it, made of its number and the upstream's event, if that is one line
of data. It is filled where it is needed: a call would take longer than this."""


def chunk_events(encoded: Iterable[bytes], first: int) -> bytes:
    """Return the events of several upstream chunks, unchanged, numbered from ``first``, as one block.

    Args:
        encoded: each chunk as `encode_data` returns it.
        first: the number of the first one.
    """
    return b"".join([b"id: 1-%d\nevent: chunk\n%b\n\n" % each for each in enumerate(encoded, first)])


def terminal_event(end: Terminal) -> bytes:
    """Return the event that ends a session."""
    return encode_event(end.event, end.data, str(end.id))


def refusal_event(error: BrokerError, cursor: Cursor | None, *, final: bool = True) -> bytes:
    """Return an `error` event that ends the connection of one viewer and is not part of the session.

    A final one has the viewer's own cursor with `.end` as its id, so that a page which reconnects gets 204.
    """
    at = cursor or Cursor(1, 1)
    event_id = str(Cursor(at.epoch, at.n, end=True)) if final else None
    return encode_event("error", error_data(error, final=final), event_id)


def queued_event(position: int, of: int) -> bytes:
    """Return the event of a page that waits in line. It has no id, because it is not part of the session."""
    return encode_event("queued", orjson.dumps({"position": position, "of": of}))


def error_data(error: BrokerError, *, final: bool = True) -> bytes:
    """Return the data of an `error` event."""
    data: dict[str, Any] = {
        "code": error.code,
        "message": error.message,
        "final": final,
        "retryable": error.retryable,
    }
    if error.retry_after is not None:
        data["retryAfter"] = error.retry_after if error.retry_after % 1 else int(error.retry_after)
    if (status := getattr(error, "upstream_status", None)) is not None:
        data["upstreamStatus"] = status
    return json_to_keep(data)


def done_data(
    answer: Answer,
    *,
    finish_reason: str | None,
    model: str,
    cost: float | None,
    estimated: bool,
    ttft_ms: int | None,
    total_ms: int | None,
) -> bytes:
    """Return the data of a `done` event; unknown values are null.

    Args:
        answer: the facts of the answer.
        finish_reason: that of the upstream, or ``cancelled``.
        model: the requested model, used where the upstream named none.
        cost: USD.
        estimated: the cost is based on our count and not on the upstream's usage.
        ttft_ms: milliseconds from the claim to the first chunk.
        total_ms: milliseconds from the claim to the end.
    """
    return json_to_keep(
        {
            "finishReason": finish_reason,
            "nativeFinishReason": answer.native_finish_reason,
            "model": answer.model or model,
            "provider": answer.provider,
            "generationId": answer.generation_id,
            "usage": answer.usage,
            "cost": cost,
            "estimated": estimated,
            "ttftMs": ttft_ms,
            "totalMs": total_ms,
        },
        default=str,
    )


def unknown_done(finish_reason: str | None) -> bytes:
    """Return the data of a `done` event without anything from the answer."""
    unknown = (
        "nativeFinishReason",
        "model",
        "provider",
        "generationId",
        "usage",
        "cost",
        "ttftMs",
        "totalMs",
    )
    return json_to_keep({"finishReason": finish_reason, "estimated": True, **dict.fromkeys(unknown)})


def cancelled_unseen(cost: float | None) -> bytes:
    """Return the data of the `done` event of a cancelled session of which nothing else is known."""
    known = {"finishReason": "cancelled", "cost": cost, "estimated": False}
    unknown = ("nativeFinishReason", "model", "provider", "generationId", "usage", "ttftMs", "totalMs")
    return json_to_keep(known | dict.fromkeys(unknown))


def cancelled_before_start() -> Terminal:
    """Return the end of a session that was cancelled before its claim: nothing was sent and nothing is billed."""
    return Terminal(State.CANCELLED, "done", Cursor(1, 1, end=True), cancelled_unseen(0))
