"""What a /prepare leaves in Redis: a session that waits for its claim, or nothing."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from broker.prepare import Admission
from broker.store.clock import IN_TIME_MS
from broker.store.sessions import SessionStore
from broker.web import keys
from tests.broker import Answer, Broker, running
from tests.kinds import needs_one_server
from tests.money import MODEL, price_list, until
from tests.replies import plain
from tests.scripted import PATIENCE
from tests.valkey_cluster import one_address
from tests.wire import wire_to

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from broker.store.connection import Store
    from tests.scripted import ScriptedUpstream

PROMPT = b"What is a broker?"

REFUSED = [
    ("rate_limited", {"rate_limit": "1/minute"}),
    ("too_many_streams", {"max_prepared": 1}),
    ("too_many_streams", {"max_prepared_bytes": 1024}),
    ("overloaded", {"total_prepared_bytes": 1024}),
    ("budget_exceeded", {"daily_cost": "0.0013"}),
    ("budget_exceeded", {"total_daily_cost": "0.0013"}),
]
"""Limits that refuse the second of two requests, and how: by the rate, the account of the client, that of all."""

Waiting = tuple[int, list[int]]
"""How many sessions are stored, and how many each account counts as pending."""


@pytest.fixture(params=["at once", "in steps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is admitted and stored in one round trip, or in two, as where the clock of Redis is not known."""

    async def fail(*_: object) -> None:
        raise AssertionError("stored in steps")

    if request.param == "at once":
        monkeypatch.setattr(SessionStore, "prepare", fail)
    else:
        monkeypatch.setattr(Admission, "_store_at_once", not_possible)


async def not_possible(_: object, session: object, ready: object, spec: object, rate: object) -> object:
    return False, rate


@asynccontextmanager
async def ready(url: str, upstream: ScriptedUpstream, **settings: Any) -> AsyncIterator[Broker]:
    """A broker that has a connection to Redis and knows its clock."""
    async with running(url, upstream, **settings) as broker:
        await broker.until_clock_is_known()
        yield broker


async def waiting(store: Store) -> Waiting:
    found: Any = await store.redis.keys("*")
    names = [name.decode() for name in found]
    places = [await store.redis.zcard(name) for name in names if ":pending:" in name]
    return sum(":session:" in name for name in names), places


async def leaves(store: Store, wanted: Waiting) -> bool:
    return await waiting(store) == wanted


async def ask(broker: Broker) -> Answer:
    content = "Say it. " * 80
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    return await broker.post(body)


@pytest.mark.usefixtures("way")
async def test_a_request_is_stored_and_counted_in_both_accounts(
    valkey_url: str, upstream: ScriptedUpstream, store: Store
) -> None:
    async with ready(valkey_url, upstream) as broker:
        assert [(await ask(broker)).status for _ in range(3)] == [201] * 3
        assert await waiting(store) == (3, [3, 3])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("code", "limits"), REFUSED)
async def test_a_refused_request_leaves_nothing(
    valkey_url: str, upstream: ScriptedUpstream, store: Store, code: str, limits: dict[str, Any]
) -> None:
    upstream.models = price_list()
    upstream.replies = [plain]
    async with ready(valkey_url, upstream, **limits) as broker:
        await broker.ask("GET", "/models")
        first = await ask(broker)
        assert first.status == 201, first.text
        if code == "budget_exceeded":
            await broker.read(first.json["sessionId"])  # which spends most of it
        before = await waiting(store)
        answer = await ask(broker)
        assert answer.code == code, answer.text
        await until(partial(leaves, store, before))


async def test_a_request_that_redis_gets_behind_its_removal_leaves_nothing(
    valkey_url: str, upstream: ScriptedUpstream, store: Store
) -> None:
    async with wire_to(valkey_url) as wire, ready(wire.url, upstream) as broker:
        wire.block = PROMPT
        answer = await broker.post()
        assert (answer.status, answer.code) == (503, "store_unavailable")
        await until(lambda: is_in(wire.sent, b"UNLINK"))
        wire.unblock()
        await until(lambda: is_in(wire.received, b"late"))
        assert await waiting(store) == (0, [])


async def test_a_request_that_is_a_little_late_is_stored(
    valkey_url: str, upstream: ScriptedUpstream, store: Store
) -> None:
    async with wire_to(valkey_url) as wire, ready(wire.url, upstream) as broker:
        broker.app[keys.STORE].call_timeout = PATIENCE
        wire.block = PROMPT
        asking = asyncio.create_task(broker.post())
        await wire.until_blocked()
        await asyncio.sleep(IN_TIME_MS / 1000)  # and so it is late
        wire.unblock()
        assert (await asking).status == 201
        assert await is_in(wire.received, b"late")
        assert await waiting(store) == (1, [1, 1])


async def test_a_request_that_is_admitted_in_time_and_stored_late_is_stored_again(
    valkey_url: str, upstream: ScriptedUpstream, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis may do the calls of a round trip at different times, each by its own clock in a cluster."""
    preparing = SessionStore.preparing

    def late(self: SessionStore, *values: Any, before_ms: int = 0) -> Any:
        return preparing(self, *values, before_ms=min(before_ms, 1))

    monkeypatch.setattr(SessionStore, "preparing", late)
    async with ready(valkey_url, upstream) as broker:
        assert (await ask(broker)).status == 201
        assert await waiting(store) == (1, [1, 1])


async def test_scripts_that_redis_does_not_know_are_told_to_it(
    valkey_url: str, upstream: ScriptedUpstream, store: Store
) -> None:
    """Workers with other limits have other scripts to admit a request, and the same one to store it."""
    async with (
        ready(valkey_url, upstream) as one,
        ready(valkey_url, upstream, max_prepared=40) as other,
    ):
        for broker in (one, other):
            assert (await ask(broker)).status == 201
        await store.redis.script_flush()
        for broker in (other, one):
            assert (await ask(broker)).status == 201
        assert await waiting(store) == (4, [4, 4])


async def test_a_request_whose_reply_was_lost_leaves_nothing(
    valkey_url: str, upstream: ScriptedUpstream, store: Store
) -> None:
    async with wire_to(valkey_url) as wire, ready(wire.url, upstream) as broker:
        wire.drop = b"$2\r\nok"
        answer = await broker.post()
        assert (answer.status, answer.code) == (503, "store_unavailable")
        assert await is_in(wire.sent, PROMPT)
        wire.drop = b""
        await until(partial(leaves, store, (0, [])))
        assert (await broker.post()).status == 201


async def is_in(packets: list[bytes], words: bytes) -> bool:
    return any(words in packet for packet in packets)


async def test_a_server_that_stands_for_a_cluster_stores_it(upstream: ScriptedUpstream) -> None:
    needs_one_server("it starts one of its own")
    upstream.replies = [plain]
    async with one_address() as server, ready(server.url, upstream) as broker:
        for _ in range(2):
            answer = await ask(broker)
            assert answer.status == 201, answer.text
            assert (await broker.read(answer.json["sessionId"]))[-1].kind == "done"
