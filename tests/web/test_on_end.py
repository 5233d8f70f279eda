"""The results that an application gets at the end of each answer, for every kind of end."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from broker.core.identity import Client
from broker.core.result import Result
from broker.mount import setup
from broker.web import keys
from tests.broker import Broker
from tests.replies import plain, refuse, streaming
from tests.responses import CALL, CREATED, USAGE, completed, delta, item_done, send
from tests.scripted import PATIENCE, Call, ScriptedUpstream, chunk
from tests.web.test_mount import chosen, served, under


class Told:
    """An application that keeps its results."""

    def __init__(self) -> None:
        self._results: asyncio.Queue[Result] = asyncio.Queue()

    async def __call__(self, result: Result) -> None:
        self._results.put_nowait(result)

    async def next(self) -> Result:
        async with asyncio.timeout(PATIENCE):
            return await self._results.get()

    @property
    def is_empty(self) -> bool:
        return self._results.empty()


@asynccontextmanager
async def embedded(
    valkey_url: str, upstream: ScriptedUpstream, on_end: Any, **settings: Any
) -> AsyncIterator[Broker]:
    app = web.Application()
    setup(
        app,
        prefix="/ai",
        settings=chosen(valkey_url, upstream, **settings),
        identify=lambda _request: Client("anna"),
        on_end=on_end,
    )
    async with served(app) as root:
        yield under(root, "/ai")


async def test_a_result_has_the_whole_answer(valkey_url: str, upstream: ScriptedUpstream) -> None:
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    choices = [{"index": 0, "delta": {"reasoning": "Hm.", "tool_calls": [call]}, "finish_reason": None}]

    def reply(call: Call) -> None:
        call.open()
        call.event(json.dumps(chunk(choices=choices)).encode())
        for text in ("Hello", " world"):
            call.chunk(text)
        call.chunk("", finish="stop")
        call.usage(cost=0.00123)
        call.done()

    upstream.replies, told, before = [reply], Told(), dt.datetime.now(dt.UTC)
    async with embedded(valkey_url, upstream, told) as broker:
        session = await broker.prepare()
        done = (await broker.read(session))[-1].json
        result = await told.next()
        assert told.is_empty
    assert (result.id, result.client, result.model) == (session, "anna", "scripted/model-1")
    assert (result.state, result.finish_reason, result.error) == ("done", "stop", None)
    assert (result.text, result.reasoning) == ("Hello world", "Hm.")
    assert [dict(each) for each in result.tool_calls] == [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    ]
    assert (result.usage, result.cost, result.estimated) == (done["usage"], 0.00123, False)
    assert result.first_chunk_at is not None
    assert before <= result.started_at <= result.first_chunk_at <= result.ended_at <= dt.datetime.now(dt.UTC)


async def test_a_response_has_a_result_like_a_chat(valkey_url: str, upstream: ScriptedUpstream) -> None:
    def reply(call: Call) -> None:
        call.open()
        thought = delta("Hm.", "reasoning_summary_text")
        send(call, CREATED, thought, delta("Hel"), delta("lo"), item_done(CALL, 1), completed())
        call.end()

    upstream.replies, told = [reply], Told()
    async with embedded(valkey_url, upstream, told) as broker:
        answer = await broker.post({"model": "scripted/model-1", "input": "Say it."})
        await broker.read(answer.json["sessionId"])
        result = await told.next()
    assert (result.state, result.text, result.reasoning) == ("done", "Hello", "Hm.")
    assert [call["function"] for call in result.tool_calls] == [{"name": "look", "arguments": '{"a":1}'}]
    assert result.usage == USAGE


@pytest.mark.parametrize(
    ("reply", "error", "text"),
    [
        (refuse(401), "upstream_unauthorized", ""),
        (streaming(chunk("Hel")), "upstream_interrupted", "Hel"),
        (streaming(chunk("Hel"), {"error": {"code": 502, "message": "No."}}), "upstream_error", "Hel"),
    ],
)
async def test_a_failure_has_a_result_with_the_text_so_far(
    valkey_url: str, upstream: ScriptedUpstream, reply: Callable[[Call], None], error: str, text: str
) -> None:
    upstream.replies, told = [reply], Told()
    async with embedded(valkey_url, upstream, told) as broker:
        await broker.read(await broker.prepare())
        result = await told.next()
    assert (result.state, result.error, result.finish_reason) == ("failed", error, None)
    assert (result.text, result.usage) == (text, None)
    assert (result.first_chunk_at is None) == (text == "")


async def test_a_cancelled_answer_has_a_result(valkey_url: str, upstream: ScriptedUpstream) -> None:
    told = Told()
    async with embedded(valkey_url, upstream, told) as broker:
        never_claimed = await broker.prepare()
        await broker.cancel(never_claimed)
        session = await broker.prepare()
        async with broker.stream(session) as connection:
            (await upstream.call()).open().chunk("Hel")
            await connection.take(1)
            await broker.cancel(session)
            await connection.rest()
        result = await told.next()
        assert told.is_empty
    assert (result.id, result.state) == (session, "cancelled")
    assert (result.text, result.finish_reason, result.error) == ("Hel", "cancelled", None)


async def test_an_abandoned_answer_has_a_result(valkey_url: str, upstream: ScriptedUpstream) -> None:
    told = Told()
    async with embedded(valkey_url, upstream, told, disconnect_grace=0) as broker:
        async with broker.stream(await broker.prepare()) as connection:
            (await upstream.call()).open().chunk("Hel")
            await connection.take(1)
        result = await told.next()
    assert (result.state, result.text, result.error) == ("abandoned", "Hel", "abandoned")


async def test_a_shutdown_waits_for_the_results(valkey_url: str, upstream: ScriptedUpstream) -> None:
    told: list[str | None] = []

    async def slow(result: Result) -> None:
        await asyncio.sleep(0.2)
        told.append(result.error)

    async with embedded(valkey_url, upstream, slow) as broker:
        line = asyncio.create_task(broker.read(await broker.prepare()))
        (await upstream.call()).open()
    assert told == ["server_shutdown"]
    await line


async def test_an_application_that_hangs_delays_nobody(valkey_url: str, upstream: ScriptedUpstream) -> None:
    upstream.replies, called = [plain], asyncio.Event()

    async def hang(_result: Result) -> None:
        called.set()
        await asyncio.sleep(0.5)
        raise ZeroDivisionError

    async with embedded(valkey_url, upstream, hang) as broker:
        for _ in range(3):
            session = await broker.prepare()
            for _ in range(2):
                assert (await broker.read(session))[-1].kind == "done"
        assert called.is_set()


async def test_nothing_is_collected_without_on_end(broker: Broker, upstream: ScriptedUpstream) -> None:
    session = await broker.prepare()
    async with broker.stream(session) as connection:
        (await upstream.call()).open().chunk("Hello")
        await connection.take(1)
        assert broker.app[keys.WORKER].running[session].transcript is None
