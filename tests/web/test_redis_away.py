"""Redis frozen or gone at each step of a session: pages that watch notice nothing, and nothing is asked twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import pytest_asyncio

from tests.broker import Broker, running
from tests.scripted import PATIENCE, ScriptedUpstream
from tests.stopwatch import Stopwatch
from tests.system.harness import ValkeyProcess, healed
from tests.wire import wire_to

UNKNOWN = "00000000-1111-4222-8333-444444444444"

PROMPT = b"What is a broker?"

Hurt = Callable[[ValkeyProcess], None]
HURTS = pytest.mark.parametrize("hurt", [ValkeyProcess.freeze, ValkeyProcess.kill])


@pytest_asyncio.fixture
async def broker(exposed_broker: Broker) -> Broker:
    """A broker that has reached its Redis once."""
    assert (await exposed_broker.ask("GET", "/health/ready")).status == 200
    return exposed_broker


async def is_asked_to_come_again(broker: Broker, session: str, cursor: str | None = None) -> bool:
    """Return True if a page is asked to reconnect, and gets nothing else."""
    async with broker.stream(session, cursor) as connection:
        return connection.status == 200 and await connection.rest() == [] and len(connection.blocks) == 2


@HURTS
async def test_prepare_is_refused_in_time(broker: Broker, valkey: ValkeyProcess, hurt: Hurt) -> None:
    hurt(valkey)
    stopwatch = Stopwatch()
    for answer in await asyncio.gather(broker.post(), broker.post(headers={"Idempotency-Key": "k"})):
        assert (answer.status, answer.code, answer.headers["Retry-After"]) == (503, "store_unavailable", "3")
    assert stopwatch.seconds < 3


@HURTS
async def test_a_session_may_be_known_later(broker: Broker, valkey: ValkeyProcess, hurt: Hurt) -> None:
    hurt(valkey)
    stopwatch = Stopwatch()
    *told, plain, cancelled = await asyncio.gather(
        is_asked_to_come_again(broker, UNKNOWN),
        is_asked_to_come_again(broker, UNKNOWN, "1-1"),
        broker.ask("GET", f"/stream/{UNKNOWN}"),
        broker.cancel(UNKNOWN),
    )
    assert told == [True, True]
    assert (plain.status, plain.code) == (cancelled.status, cancelled.code) == (503, "store_unavailable")
    assert stopwatch.seconds < 3


async def test_a_claim_whose_reply_was_lost_is_found_again(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with wire_to(valkey_url) as wire, running(wire.url, upstream) as broker:
        session = await broker.prepare()
        wire.drop = PROMPT  # the reply of the claim has the prompt in it
        stopwatch = Stopwatch()
        pages = [is_asked_to_come_again(broker, session) for _ in range(2)]
        assert await asyncio.gather(*pages) == [True, True]
        assert stopwatch.seconds < 2
        wire.drop = b""
        call = (await upstream.call()).open()  # though nobody has asked again
        async with broker.stream(session) as connection:
            call.chunk("Hello", finish="stop")
            call.done()
            assert [event.id for event in await connection.rest()] == ["1-1", "1-2.end"]
        assert len(upstream.calls) == 1


async def test_a_claim_that_nobody_comes_back_for_is_abandoned(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with (
        wire_to(valkey_url) as wire,
        running(wire.url, upstream, disconnect_grace=0.5) as broker,
    ):
        session = await broker.prepare()
        wire.drop = PROMPT
        assert await is_asked_to_come_again(broker, session)
        wire.drop = b""
        await (await upstream.call()).wait_gone()
        async with broker.stream(session) as connection:
            [event] = await connection.rest()
            assert event.json["code"] == "abandoned"
        assert len(upstream.calls) == 1


async def test_an_unwanted_claim_starts_nothing_when_redis_returns(
    broker: Broker, valkey: ValkeyProcess, upstream: ScriptedUpstream
) -> None:
    session = await broker.prepare()
    valkey.freeze()
    assert await is_asked_to_come_again(broker, session)
    valkey.thaw()
    await wait_until_back(broker)
    assert upstream.calls == []
    async with broker.stream(session) as connection:  # the page reconnects as it was asked to
        call = (await upstream.call()).open()
        call.chunk("Hello", finish="stop")
        call.done()
        assert [event.id for event in await connection.rest()] == ["1-1", "1-2.end"]
    assert len(upstream.calls) == 1


@HURTS
async def test_a_pursued_claim_can_be_cancelled_without_redis(
    broker: Broker, valkey: ValkeyProcess, upstream: ScriptedUpstream, hurt: Hurt
) -> None:
    session = await broker.prepare()
    hurt(valkey)
    asked, answer = await asyncio.gather(is_asked_to_come_again(broker, session), broker.cancel(session))
    assert (asked, answer.status, answer.code) == (True, 503, "store_unavailable")
    if not valkey.is_running:
        await valkey.start()
    valkey.thaw()
    await wait_until_back(broker)
    assert upstream.calls == []


async def wait_until_back(broker: Broker) -> None:
    """Wait until the broker has reached Redis again, and has done all that it still wanted there."""
    async with asyncio.timeout(PATIENCE):
        while (await broker.post()).status != 201:
            pass
    await asyncio.sleep(1.0)  # there is no event for something that does not happen


async def test_a_claim_with_a_lost_reply_is_seen_elsewhere(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with (
        wire_to(valkey_url) as wire,
        running(wire.url, upstream) as broker,
        running(wire.url, upstream) as other,
    ):
        session = await broker.prepare()
        wire.drop = PROMPT
        assert await is_asked_to_come_again(broker, session)
        async with other.stream(session) as connection:
            wire.drop = b""
            call = (await upstream.call()).open()
            call.chunk("Hello", finish="stop")
            call.done()
            assert (await connection.rest())[-1].kind == "done"
    assert len(upstream.calls) == 1


@HURTS
async def test_a_page_that_watches_notices_nothing(
    broker: Broker, valkey: ValkeyProcess, upstream: ScriptedUpstream, hurt: Hurt
) -> None:
    session = await broker.prepare()
    async with broker.stream(session) as connection:
        call = (await upstream.call()).open()
        call.chunk("one")
        await connection.take(1)
        hurt(valkey)
        for word in ("two", "three"):
            stopwatch = Stopwatch()
            call.chunk(word)
            await connection.take(1)
            assert stopwatch.seconds < 0.5
        async with broker.stream(session, "1-1") as late:
            assert [event.id for event in await late.take(2)] == ["1-2", "1-3"]
        stopwatch = Stopwatch()
        call.chunk("", finish="stop")
        call.done()
        assert [event.id for event in await connection.rest()] == ["1-4", "1-5.end"]
        assert stopwatch.seconds < 0.8  # 300 ms for Redis to answer, and some for a busy machine
    async with broker.stream(session, "1-4") as connection:
        assert [event.id for event in await connection.rest()] == ["1-5.end"]


async def test_events_of_an_outage_are_written_when_redis_returns(
    broker: Broker, valkey: ValkeyProcess, upstream: ScriptedUpstream
) -> None:
    session = await broker.prepare()
    async with broker.stream(session) as connection:
        call = (await upstream.call()).open()
        call.chunk("one")
        events = await connection.take(1)
        valkey.freeze()
        call.chunk("two", finish="stop")
        call.done()
        events += await connection.rest()
    valkey.thaw()
    async with running(valkey.url, upstream) as other:
        seen: list[object] = []
        async with asyncio.timeout(PATIENCE):
            while seen != events:
                async with other.stream(session) as there:
                    seen = list(await there.rest())
    assert len(upstream.calls) == 1


async def test_the_owner_cancels_without_redis(
    broker: Broker, valkey: ValkeyProcess, upstream: ScriptedUpstream
) -> None:
    session = await broker.prepare()
    async with broker.stream(session) as connection:
        call = (await upstream.call()).open()
        call.chunk("one")
        await connection.take(1)
        valkey.freeze()
        stopwatch = Stopwatch()
        answer = await broker.cancel(session)
        assert (answer.status, answer.json) == (202, {"state": "cancelled"})
        await call.wait_gone()
        assert stopwatch.seconds < 1
        [event] = await connection.rest()
        assert event.json["finishReason"] == "cancelled"
    assert (await broker.cancel(session)).json == {"state": "cancelled"}


async def test_an_ending_session_is_not_cancelled_any_more(
    broker: Broker, valkey: ValkeyProcess, upstream: ScriptedUpstream
) -> None:
    session = await broker.prepare()
    async with broker.stream(session) as connection:
        call = (await upstream.call()).open()
        valkey.freeze()  # so that to decide the end takes a while
        call.chunk("one", finish="stop")
        call.event(b"[DONE]")
        await connection.take(1)
        answer = await broker.cancel(session)
        [event] = await connection.rest()
    assert (answer.status, answer.json) == (200, {"state": "done"})
    assert event.json["finishReason"] == "stop"


async def test_a_page_that_leaves_in_an_outage_ends_its_session(
    valkey: ValkeyProcess, upstream: ScriptedUpstream
) -> None:
    async with running(valkey.url, upstream, disconnect_grace=0.3) as broker, healed(valkey):
        session = await broker.prepare()
        async with broker.stream(session) as connection:
            call = (await upstream.call()).open()
            call.chunk("one")
            await connection.take(1)
            valkey.freeze()
        await call.wait_gone()
        async with broker.stream(session) as connection:
            assert (await connection.rest())[-1].json["code"] == "abandoned"


async def test_redis_may_come_back_empty(
    broker: Broker, valkey: ValkeyProcess, upstream: ScriptedUpstream
) -> None:
    session = await broker.prepare()
    async with broker.stream(session) as connection:
        call = (await upstream.call()).open()
        call.chunk("one")
        events = await connection.take(1)
        valkey.kill()
        await valkey.start()
        call.chunk("two", finish="stop")
        call.done()
        events += await connection.rest()
        assert [event.id for event in events] == ["1-1", "1-2", "1-3.end"]
    async with broker.stream(session) as connection:
        assert await connection.rest() == events
    async with asyncio.timeout(PATIENCE):
        while (await broker.post()).status != 201:
            pass
