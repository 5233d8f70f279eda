"""GET /usage: each client's own day and month, and what is left of them."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import TYPE_CHECKING, Any

from tests.broker import QUESTION, Broker, running
from tests.money import price_list, until

if TYPE_CHECKING:
    from tests.scripted import Call, ScriptedUpstream

ANN = {"Authorization": "Bearer one"}
BOB = {"Authorization": "Bearer two"}


def told(call: Call) -> None:
    call.open()
    call.chunk("Hello", finish="stop")
    call.usage(cost=0.0025)
    call.done()


def untold(call: Call) -> None:
    call.open()
    call.chunk("x" * 30, finish="stop")
    call.done()


async def run(broker: Broker, headers: dict[str, str]) -> int:
    """One session to its end; returns the estimate of its prompt."""
    answer = await broker.post({**QUESTION, "max_tokens": 20}, headers)
    assert answer.status == 201, answer.text
    await broker.read(answer.json["sessionId"])
    return int(answer.json["promptTokens"])


async def usage(broker: Broker, headers: dict[str, str]) -> dict[str, Any]:
    answer = await broker.ask("GET", "/usage", headers=headers)
    assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
    body: dict[str, Any] = answer.json
    today = dt.datetime.now(dt.UTC).date()
    assert body.pop("day") == today.isoformat()
    assert body["month"].pop("month") == today.isoformat()[:7]
    return body


async def test_each_client_sees_its_own_day(valkey_url: str, upstream: ScriptedUpstream) -> None:
    upstream.models, upstream.replies = price_list(), [told, told, untold]
    limits = {
        "daily_tokens": 1000,
        "daily_cost": "0.01",
        "monthly_cost": "0.1",
        "total_daily_cost": "5",
    }
    async with running(valkey_url, upstream, api_keys="ann:one,bob:two", **limits) as broker:
        for _ in range(2):
            await run(broker, ANN)
        prompt = await run(broker, BOB)
        totals = {
            "requests": 2,
            "promptTokens": 20,
            "completionTokens": 10,
            "totalTokens": 30,
            "cost": 0.005,
            "estimatedRequests": 0,
        }
        assert await usage(broker, ANN) == {
            **totals,
            "limits": {"tokens": {"limit": 1000, "left": 970}, "cost": {"limit": 0.01, "left": 0.005}},
            "month": {**totals, "limits": {"cost": {"limit": 0.1, "left": 0.095}}},
        }
        bob = await usage(broker, BOB)
        assert (bob["requests"], bob["promptTokens"], bob["completionTokens"]) == (1, prompt, 10)
        assert bob["estimatedRequests"] == 1
        assert bob["limits"]["tokens"]["left"] == 1000 - prompt - 10


async def test_a_new_client_sees_zeros_and_no_limits(broker: Broker) -> None:
    totals = {
        "requests": 0,
        "promptTokens": 0,
        "completionTokens": 0,
        "totalTokens": 0,
        "cost": 0,
        "estimatedRequests": 0,
    }
    none = {"limit": None, "left": None}
    assert await usage(broker, {}) == {
        **totals,
        "limits": {"tokens": none, "cost": none},
        "month": {**totals, "limits": {"cost": none}},
    }


async def test_a_running_answer_is_not_used_yet(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, daily_tokens=1000) as broker:
        session = await broker.prepare(max_tokens=20)
        async with broker.stream(session) as connection:
            call = await upstream.call()
            assert (await usage(broker, {}))["limits"]["tokens"]["left"] == 1000
            told(call)
            await connection.rest()
        assert (await usage(broker, {}))["limits"]["tokens"]["left"] == 985


async def test_all_workers_answer_the_same(valkey_url: str, upstream: ScriptedUpstream) -> None:
    upstream.replies = [told]
    async with running(valkey_url, upstream) as one, running(valkey_url, upstream) as other:
        await asyncio.gather(run(one, {}), run(other, {}))
        assert await usage(one, {}) == await usage(other, {})
        assert (await usage(one, {}))["requests"] == 2


async def test_an_estimate_that_was_corrected_counts_as_one_no_more(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [untold]
    upstream.generations["gen-chunk"] = {"total_cost": 0.5, "tokens_prompt": 3, "tokens_completion": 4}
    await run(broker, {})

    async def corrected() -> bool:
        return not (await usage(broker, {}))["estimatedRequests"]

    await until(corrected)
    body = await usage(broker, {})
    assert (body["requests"], body["totalTokens"], body["cost"]) == (1, 7, 0.5)
    month = body["month"]
    assert (month["requests"], month["totalTokens"], month["cost"]) == (1, 7, 0.5)
    assert month["estimatedRequests"] == 0
