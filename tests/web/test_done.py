"""The data of `done`: reasons, names, usage and cost."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.broker import Broker, running
from tests.replies import plain
from tests.scripted import Call, ScriptedUpstream, chunk, usage_chunk


async def test_done_has_all_facts(broker: Broker, upstream: ScriptedUpstream) -> None:
    def reply(call: Call) -> None:
        call.open(x_generation_id="gen-header")
        call.chunk("Hello", finish="length")
        call.usage(cost=0.00123, completion_tokens_details={"reasoning_tokens": 2})
        call.done()

    upstream.replies = [reply]
    done = (await broker.read(await broker.prepare()))[-1]
    facts = done.json
    ttft, total = facts.pop("ttftMs"), facts.pop("totalMs")
    assert done.kind == "done"
    assert facts == {
        "finishReason": "length",
        "nativeFinishReason": "native_length",
        "model": "scripted/model-1",
        "provider": "Scripted",
        "generationId": "gen-header",
        "usage": usage_chunk(cost=0.00123, completion_tokens_details={"reasoning_tokens": 2})["usage"],
        "cost": 0.00123,
        "estimated": False,
    }
    assert isinstance(ttft, int)
    assert 0 <= ttft <= total < 5000


async def test_the_first_chunk_has_the_generation_id_without_a_header(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    assert (await broker.read(await broker.prepare()))[-1].json["generationId"] == "gen-chunk"


def with_prices(*, model: str = "scripted/model-1") -> bytes:
    entry = {"id": model, "context_length": 8192, "pricing": {"prompt": "0.000001", "completion": "0.000002"}}
    return json.dumps({"data": [entry]}).encode()


async def test_without_a_reported_cost_the_prices_decide(valkey_url: str, upstream: ScriptedUpstream) -> None:
    def reply(call: Call) -> None:
        call.open()
        call.chunk("Hello", finish="stop")
        call.usage()
        call.done()

    upstream.models, upstream.replies = with_prices(), [reply]  # the list is asked for at the start
    async with running(valkey_url, upstream) as broker:
        facts = (await broker.read(await broker.prepare()))[-1].json
    assert facts["cost"] == pytest.approx(10 * 0.000001 + 5 * 0.000002)
    assert facts["estimated"] is False


async def test_without_a_cost_and_prices_the_cost_is_unknown(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    def reply(call: Call) -> None:
        call.open()
        call.chunk("Hello", finish="stop")
        call.usage()
        call.done()

    upstream.replies = [reply]
    facts = (await broker.read(await broker.prepare()))[-1].json
    assert facts["cost"] is None
    assert facts["estimated"] is False


async def test_without_usage_the_cost_is_estimated_from_the_text(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    def reply(call: Call) -> None:
        call.open()
        call.chunk("x" * 300, finish="stop")
        call.done()

    upstream.models, upstream.replies = with_prices(), [reply]
    async with running(valkey_url, upstream) as broker:
        answer = await broker.post()
        facts = (await broker.read(answer.json["sessionId"]))[-1].json
    assert facts["usage"] is None
    assert facts["estimated"] is True
    assert facts["cost"] == pytest.approx(answer.json["promptTokens"] * 0.000001 + 100 * 0.000002)


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk("a", finish="stop"), usage_chunk(cost=1)],
        [chunk("a"), chunk("b", finish="stop", usage={"cost": 1})],
        [chunk("a", finish="stop"), {"usage": {"cost": 1}}],
        [
            chunk("a", usage={"cost": 0.5}),
            chunk("b", usage=None),
            chunk("c", finish="stop", usage={"cost": 1}),
        ],
    ],
)
async def test_usage_is_found_on_any_chunk(
    broker: Broker, upstream: ScriptedUpstream, chunks: list[Any]
) -> None:
    def reply(call: Call) -> None:
        call.open()
        for each in chunks:
            call.event(json.dumps(each).encode())
        call.done()

    upstream.replies = [reply]
    events = await broker.read(await broker.prepare())
    assert [event.json for event in events[:-1]] == chunks
    assert events[-1].json["cost"] == 1
    assert events[-1].json["estimated"] is False


async def test_nothing_follows_the_end(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    async with broker.stream(await broker.prepare()) as connection:
        body = await connection.body()
    assert body.count(b".end\n") == 1
    assert body.rpartition(b"id: ")[2].startswith(b"1-5.end\nevent: done\ndata: ")
    assert body.endswith(b"\n\n")
