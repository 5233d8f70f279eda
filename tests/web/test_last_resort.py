"""A session gets its end, whatever the objects of an upstream hold."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.broker import Broker, running
from tests.events import Event
from tests.replies import plain
from tests.scripted import Call, ScriptedUpstream


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"0" + b"}" * depth


def usage_event(usage: bytes, *, finish: str = "null") -> bytes:
    choice = b'{"index": 0, "delta": {"content": "Hello"}, "finish_reason": %b}' % finish.encode()
    return b'{"id": "gen-1", "model": "m", "choices": [%b], "usage": %b}' % (choice, usage)


DEEP = b'{"prompt_tokens": 10, "completion_tokens": 5, "cost": 0.5, "x": %b}' % nested(300)
USAGES = {
    "deep": DEEP,
    "deep list": b'{"prompt_tokens": 10, "completion_tokens": 5, "x": %b}' % (b"[" * 250 + b"]" * 250),
    "large": b'{"prompt_tokens": 10, "completion_tokens": 5, "x": "%b"}' % (b"y" * 200_000),
    "wide": b'{"prompt_tokens": 10, "completion_tokens": 5, %b}'
    % b",".join(b'"k%d": %d' % (n, n) for n in range(20_000)),
}


@pytest.mark.parametrize("usage", USAGES.values(), ids=USAGES)
async def test_a_usage_that_is_too_large_is_cut_in_done(
    broker: Broker, upstream: ScriptedUpstream, usage: bytes
) -> None:
    def reply(call: Call) -> None:
        call.open().event(usage_event(usage, finish='"stop"'))
        call.done()

    upstream.replies = [reply]
    session = await broker.prepare()
    end = (await broker.read(session))[-1]
    assert (end.kind, end.json["finishReason"]) == ("done", "stop")
    told = end.json["usage"]
    assert (told["prompt_tokens"], told["completion_tokens"]) == (10, 5)
    assert len(json.dumps(told)) < 70_000
    assert (await broker.read(session))[-1] == end


@pytest.mark.parametrize("usage", USAGES.values(), ids=USAGES)
async def test_such_a_session_can_be_cancelled_on_another_worker(
    valkey_url: str, upstream: ScriptedUpstream, usage: bytes
) -> None:
    limits: dict[str, Any] = {"max_concurrent_streams": 1}
    async with (
        running(valkey_url, upstream, **limits) as broker,
        running(valkey_url, upstream, **limits) as other,
    ):
        session = await broker.prepare()
        async with broker.stream(session) as connection:
            (await upstream.call()).open().event(usage_event(usage))
            await connection.take(1)
            assert (await other.cancel(session)).status == 202
            end = (await connection.rest())[-1]
        assert (end.kind, end.json["finishReason"]) == ("done", "cancelled")
        assert (await other.read(session))[-1] == end
        upstream.replies = [plain]
        following: list[Event] = await other.read(await other.prepare())
        assert following[-1].kind == "done", "the slot is free again"


async def test_names_of_an_upstream_are_cut(broker: Broker, upstream: ScriptedUpstream) -> None:
    def reply(call: Call) -> None:
        call.open().chunk(
            "Hello", finish="stop" * 1000, id="g" * 100_000, model="m" * 100_000, provider="p" * 100_000
        )
        call.done()

    upstream.replies = [reply]
    end = (await broker.read(await broker.prepare()))[-1]
    assert end.kind == "done"
    assert len(end.data) < 5_000
