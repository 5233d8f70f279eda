"""/prepare while too many bytes are pending."""

from __future__ import annotations

from typing import Any

from tests.broker import QUESTION, Answer, Broker, running
from tests.scripted import ScriptedUpstream

PROXIED = {"trusted_proxies": ("private",)}


async def ask(broker: Broker, size: int, address: str = "203.0.113.1") -> Answer:
    body: dict[str, Any] = {**QUESTION, "messages": [{"role": "user", "content": "x" * size}]}
    return await broker.post(body, headers={"X-Forwarded-For": address})


async def test_pending_requests_of_a_client_are_limited(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, max_prepared_bytes="20KiB", **PROXIED) as broker:
        first = await ask(broker, 9000)
        assert (await ask(broker, 9000)).status == 201
        refused = await ask(broker, 9000)
        assert (refused.status, refused.code) == (429, "too_many_streams")
        assert int(refused.headers["Retry-After"]) > 0
        assert (await ask(broker, 9000, "203.0.113.2")).status == 201
        assert (await broker.cancel(first.json["sessionId"])).status == 202
        second = await ask(broker, 9000)
        assert second.status == 201
        assert (await ask(broker, 9000)).status == 429


async def test_pending_requests_of_all_clients_are_limited(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, total_prepared_bytes="64KiB", **PROXIED) as broker:
        for n in range(4):
            assert (await ask(broker, 9000, f"203.0.113.{n}")).status == 201
        refused = await ask(broker, 9000, "203.0.113.9")
        assert (refused.status, refused.code) == (503, "overloaded")
        assert int(refused.headers["Retry-After"]) > 0
        assert (await ask(broker, 100, "203.0.113.9")).status == 201
