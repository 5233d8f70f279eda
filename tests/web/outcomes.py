"""Helpers to see a session as a page does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.broker import KEY, Broker
from tests.events import Connection, Event
from tests.scripted import Call, ScriptedUpstream


def ids(events: list[Event]) -> list[str | None]:
    return [event.id for event in events]


def text(events: list[Event]) -> str:
    choices = [event.json["choices"] for event in events if event.kind == "chunk"]
    return "".join(choice[0]["delta"]["content"] for choice in choices if choice)


@asynccontextmanager
async def started(broker: Broker, upstream: ScriptedUpstream) -> AsyncIterator[tuple[str, Connection, Call]]:
    """A session whose upstream has begun and sent one chunk, and its first viewer, who has that chunk."""
    session, number = await broker.prepare(), len(upstream.calls) + 1
    async with broker.stream(session) as connection:
        call = (await upstream.call(number)).open()
        call.chunk("Hello")
        await connection.take(1)
        yield session, connection, call


async def outcome(broker: Broker, *, chunks: int = 0) -> dict[str, Any]:
    """The data of the `error` that ends a new session after so many chunks."""
    events = await broker.read(await broker.prepare())
    assert [event.kind for event in events] == ["chunk"] * chunks + ["error"]
    assert [event.id for event in events] == [*(f"1-{n + 1}" for n in range(chunks)), f"1-{chunks + 1}.end"]
    error: dict[str, Any] = events[-1].json
    assert error["final"] is True
    assert error["message"]
    assert KEY not in events[-1].data
    return error


def fields_of(error: dict[str, Any], *names: str) -> list[Any]:
    return [error.get(name) for name in names]
