"""No way of leaving early costs less than what was written: every dialect, left in every way."""

from __future__ import annotations

import asyncio
import json
import math
import random
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from broker.core.tokens import DEFAULT_BYTES_PER_TOKEN
from broker.web import keys
from tests import responses as events
from tests.broker import Broker, running
from tests.clock import Clock
from tests.money import MODEL, PRICE, Ledger, ledger, price_list, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.scripted import Call, ScriptedUpstream

ZEROS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
RANDOM = random.Random(20261126)
ALPHABETS = ("abcdefghij ", "äöüéß ", "漢字かな", "🙂🚀", "0123456789{}")


def words() -> str:
    return "".join(RANDOM.choices(RANDOM.choice(ALPHABETS), k=RANDOM.randint(20, 120)))


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields}]}


def thinking(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": [{"type": "text", "text": text}]}


def calling(text: str) -> dict[str, Any]:
    return {"index": 0, "function": {"arguments": text}}


DIALECTS: dict[str, Callable[[str], dict[str, Any]]] = {
    "text": lambda text: delta(content=text),
    "reasoning": lambda text: delta(content="", reasoning=text),
    "another name of it": lambda text: delta(content=None, reasoning_content=text),
    "a list of parts": lambda text: delta(content=[{"type": "text", "text": text}]),
    "thoughts in parts": lambda text: delta(content=[thinking(text)]),
    "bare strings in parts": lambda text: delta(content=[text]),
    "a message": lambda text: {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]},
    "a refusal": lambda text: delta(content=None, refusal=text),
    "a tool call": lambda text: delta(tool_calls=[calling(text)]),
    "details of reasoning": lambda text: delta(
        content="", reasoning_details=[{"type": "reasoning.text", "text": text}]
    ),
    "encrypted reasoning": lambda text: delta(
        content="", reasoning_details=[{"type": "reasoning.encrypted", "data": text}]
    ),
    "zeros at first": lambda text: {**delta(content=text), "usage": ZEROS},
    "the prompt at first": lambda text: {**delta(content=text), "usage": {**ZEROS, "prompt_tokens": 1}},
    "zeros of Groq": lambda text: {**delta(content=text), "x_groq": {"usage": ZEROS}},
    "a finish reason on every chunk": lambda text: {
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}],
        "usage": ZEROS,
    },
    "text of a response": partial(events.delta, kind="output_text"),
    "a refusal of a response": partial(events.delta, kind="refusal"),
    "reasoning of a response": partial(events.delta, kind="reasoning_text"),
    "a summary of reasoning": partial(events.delta, kind="reasoning_summary_text"),
    "arguments of a call": partial(events.delta, kind="function_call_arguments"),
    "encrypted reasoning of a response": lambda text: events.item_done(
        {"type": "reasoning", "summary": [], "encrypted_content": text}
    ),
    "a message that comes whole": lambda text: events.item_done(
        {"type": "message", "content": [{"type": "output_text", "text": text}]}
    ),
}


def write(call: Call, chunk: dict[str, Any]) -> None:
    call.event(json.dumps({"id": "gen-chunk", "model": MODEL, **chunk}).encode())


async def cancel(broker: Broker, session: str, _: Call) -> None:
    assert (await broker.cancel(session)).status == 202


async def end_of_file(_: Broker, __: str, call: Call) -> None:
    call.end()


async def reset(_: Broker, __: str, call: Call) -> None:
    call.close()


async def error_chunk(_: Broker, __: str, call: Call) -> None:
    write(call, {"error": {"code": 502, "message": "It broke."}})
    call.end()


async def nothing(_: Broker, __: str, ___: Call) -> None:
    pass


WAYS: list[Callable[[Broker, str, Call], Awaitable[None]]] = [
    cancel,
    end_of_file,
    reset,
    error_chunk,
    nothing,  # the page closes, and that is all
]


async def left(
    broker: Broker, upstream: ScriptedUpstream, chunks: list[dict[str, Any]], way: Any
) -> tuple[Ledger, int]:
    """Stream these chunks, leave, and return what that added to the ledger, and the estimate of the prompt."""
    redis = broker.redis
    before = await ledger(redis)
    is_response = str(chunks[0].get("type")).startswith("response.")
    conversation = (
        {"input": "Say it."} if is_response else {"messages": [{"role": "user", "content": "Say it."}]}
    )
    answer = await broker.post({"model": MODEL, **conversation})
    session = answer.json["sessionId"]
    number = len(upstream.calls) + 1
    async with broker.stream(session) as connection:
        call = await upstream.call(number)
        call.open()
        for chunk in chunks:
            write(call, chunk)
        await connection.take(len(chunks))
        await way(broker, session, call)
        if way is not nothing:
            await connection.rest()

    async def settled() -> bool:
        return (await ledger(redis)).requests > before.requests

    await until(settled)
    with suppress(Exception):
        call.close()
    after = await ledger(redis)
    added = [new - old for new, old in zip(after, before, strict=True)]
    return Ledger(*added), int(answer.json["promptTokens"])


@pytest.mark.parametrize("way", WAYS)
async def test_leaving_costs_the_written_text_in_every_shape(
    valkey_url: str, upstream: ScriptedUpstream, way: Any
) -> None:
    upstream.models = price_list()
    async with running(valkey_url, upstream, disconnect_grace=0, rate_limit="1000/minute") as broker:
        for name, dialect in DIALECTS.items():
            texts = [words() for _ in range(RANDOM.randint(3, 12))]
            written = sum(len(text.encode()) for text in texts)
            booked, prompt = await left(broker, upstream, [dialect(text) for text in texts], way)
            least = prompt + math.ceil(written / DEFAULT_BYTES_PER_TOKEN)
            assert booked.spent_tokens >= least, name
            assert booked.spent_cost >= least * PRICE, name
            assert booked.estimated == 1, name


@pytest.mark.parametrize("way", WAYS)
async def test_leaving_costs_no_less_than_the_upstream_reported(
    valkey_url: str, upstream: ScriptedUpstream, way: Any
) -> None:
    """Cumulative usage on every chunk, of which nothing else can be seen."""
    upstream.models = price_list()
    async with running(valkey_url, upstream, disconnect_grace=0) as broker:
        chunks = [
            {**delta(content="x"), "usage": {"prompt_tokens": 700, "completion_tokens": 0, "total_tokens": n}}
            for n in (700, 900, 1234)
        ]
        booked, _ = await left(broker, upstream, chunks, way)
        assert booked == Ledger(1, 1, 1234, 1234 * PRICE, *booked[4:])


async def test_hidden_reasoning_is_estimated_by_its_time(valkey_url: str, upstream: ScriptedUpstream) -> None:
    upstream.models = price_list()

    def teach(call: Call) -> None:
        call.open()
        clock.now += 0.2
        call.chunk("x", finish="stop")
        call.usage(prompt_tokens=10, completion_tokens=400, cost=0)
        call.done()

    clock = Clock(now=asyncio.get_running_loop().time())
    async with running(valkey_url, upstream, max_concurrent_streams=5) as broker:
        broker.app[keys.WORKER].clock = clock
        redis = broker.redis
        question = {"model": MODEL, "messages": [{"role": "user", "content": "Say it."}]}
        upstream.replies = [teach]
        for _ in range(4):
            await broker.read((await broker.post(question)).json["sessionId"])
        upstream.replies = []
        before = await ledger(redis)
        answer = (await broker.post(question)).json
        async with broker.stream(answer["sessionId"]) as connection:
            (await upstream.call(5)).open()
            clock.now += 1.0
            await broker.cancel(answer["sessionId"])
            [end] = await connection.rest()
        assert end.json["estimated"] is True
        written = (await ledger(redis)).spent_tokens - before.spent_tokens - answer["promptTokens"]
        assert written == 2000 <= answer["maxOutputTokens"]
        # and never more than was reserved
        short = (await broker.post({**question, "max_tokens": 50})).json
        async with broker.stream(short["sessionId"]) as connection:
            (await upstream.call(6)).open()
            before = await ledger(redis)
            clock.now += 0.5
            await broker.cancel(short["sessionId"])
            await connection.rest()
        assert (await ledger(redis)).spent_tokens - before.spent_tokens == short["promptTokens"] + 50
