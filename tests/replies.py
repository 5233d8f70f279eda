"""Replies for a scripted upstream, and a drip that keeps a connection busy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from tests.scripted import NOTHING, Call, Reply


def plain(call: Call) -> None:
    """Send an answer that ends well."""
    call.open()
    call.chunk("Hello")
    call.chunk(" world")
    call.chunk("", finish="stop")
    call.usage(cost=0.00123)
    call.done()


def refuse(status: int, error: object = None, headers: Any = NOTHING, *, secret: str = "us") -> Reply:
    """Return a reply in OpenRouter's form."""
    body = {
        "error": error if error is not None else {"code": status, "message": f"Secret words about {secret}."}
    }
    return lambda call: call.reply(status, body, headers)


def streaming(*events: object) -> Reply:
    """Return a reply with chunks or raw data that ends cleanly, without a mark of the end."""

    def reply(call: Call) -> None:
        call.open()
        for event in events:
            call.event(event if isinstance(event, bytes) else json.dumps(event).encode())
        call.end()

    return reply


def body_of(kind: str, text: str) -> Reply:
    """Return a reply with status 200 and a body that is not an event stream."""

    def reply(call: Call) -> None:
        call.open(kind)
        call.send(text.encode())
        call.end()

    return reply


def after_a_chunk(*then: Reply) -> Reply:
    """Return a reply with one chunk, and then these steps."""

    def reply(call: Call) -> None:
        call.open()
        call.chunk("Hello")
        for step in then:
            step(call)

    return reply


@asynccontextmanager
async def dripping(drip: Callable[[], None]) -> AsyncIterator[None]:
    """Send something again and again, faster than any timer of these tests."""

    async def run() -> None:
        while True:
            drip()
            await asyncio.sleep(0.03)

    task = asyncio.create_task(run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
