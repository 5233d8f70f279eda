"""The usage that an upstream sends after an error is booked, and nobody waits for it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from broker.relay import upstream_reader
from tests.broker import running
from tests.money import MODEL, PRICE, Ledger, ledger, price_list, slots, until
from tests.scripted import PATIENCE

if TYPE_CHECKING:
    from tests.scripted import ScriptedUpstream

USAGE = {"prompt_tokens": 100, "completion_tokens": 900, "total_tokens": 1000}
CHUNK: dict[str, Any] = {"id": "gen-x", "model": MODEL, "choices": [{"index": 0, "delta": {"content": "ab"}}]}
TOLD = {**CHUNK, "choices": [], "usage": USAGE}
FAILURES: list[dict[str, Any]] = [
    {"error": {"code": 502, "message": "It broke."}},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "error"}]},
]


def lines(*chunks: dict[str, Any], end: str = "\n\n") -> bytes:
    return "".join(f"data: {json.dumps(chunk)}{end}" for chunk in chunks).encode()


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("way", ["same read", "later", "CRLF and cut", "no blank line", "never", "too late"])
async def test_usage_behind_an_error_is_booked_without_delaying_it(
    valkey_url: str,
    upstream: ScriptedUpstream,
    way: str,
    failure: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_vain = way in {"never", "too late"}
    monkeypatch.setattr(upstream_reader, "AFTER_ERROR", 0.2 if in_vain else PATIENCE)
    upstream.models = price_list()
    async with running(valkey_url, upstream) as broker:
        redis = broker.redis
        answer = await broker.post({"model": MODEL, "messages": [{"role": "user", "content": "Say it."}]})
        async with broker.stream(answer.json["sessionId"]) as connection:
            call = await upstream.call(1)
            call.open()
            call.send(lines(CHUNK, failure, *([TOLD] if way == "same read" else [])))
            events = await connection.rest()
        assert [event.kind for event in events] == ["chunk", "error"]  # while the upstream is still open

        async def settled() -> bool:
            return (await ledger(redis)).requests == 1 and await slots(redis) == 0

        await until(settled)
        paid = Ledger(1, 0, 1000, 1000 * PRICE)
        if way == "same read":
            assert await ledger(redis) == paid
            return
        guess = await ledger(redis)
        assert guess.estimated == 1
        if in_vain:
            await call.wait_gone()
            if way == "too late":
                call.send(lines(TOLD))
            assert await ledger(redis) == guess
            return
        assert not call.gone.is_set(), "it is still read"
        if way == "later":
            call.send(b": still there\n\n")
            call.send(lines(TOLD))
        elif way == "CRLF and cut":
            told = lines(TOLD, end="\r\n\r\n")
            call.send(told[:40])
            call.send(told[40:])
        else:
            call.send(lines(TOLD, end=""))
            call.end()

        async def corrected() -> bool:
            return (await ledger(redis)).estimated == 0

        await until(corrected)
        assert await ledger(redis) == paid
        if way != "no blank line":  # a body that ended by itself leaves its connection for the next request
            await call.wait_gone()
        assert await ledger(redis) == paid
