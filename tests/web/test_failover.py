"""A failover forgets the last writes of a primary: the owners of sessions write them again before others claim."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.broker import Broker, running
from tests.failover import primary_and_replica

if TYPE_CHECKING:
    from tests.events import Event
    from tests.scripted import ScriptedUpstream

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("redis_server", ["valkey", "redis"], indirect=True),
    pytest.mark.usefixtures("redis_server"),
]


async def read_whole(broker: Broker, session: str, cursor: str | None = None) -> list[Event]:
    """Return what a page gets that reconnects as often as it is asked to."""
    async with asyncio.timeout(30):
        while not (events := await broker.read(session, cursor)):  # noqa: ASYNC110 - so do pages
            await asyncio.sleep(0.1)
    return events


async def test_a_claim_that_was_forgotten_is_not_made_again(upstream: ScriptedUpstream) -> None:
    async with (
        primary_and_replica() as redis,
        running(redis.url, upstream) as owner,
        running(redis.url, upstream) as other,
    ):
        session = await owner.prepare()
        await redis.replicate()
        await redis.stop_replicating()  # the replica knows the session as prepared
        async with owner.stream(session) as line:
            call = (await upstream.call()).open()
            call.chunk("Hello")
            first = await line.take(1)
            redis.fail_over()
            reading = asyncio.create_task(read_whole(other, session))
            call.chunk(" you", finish="stop")
            call.usage()
            call.done()
            seen = [*first, *await line.rest()]
        assert seen[-1].kind == "done"
        assert await reading == seen
        assert len(upstream.calls) == 1


async def test_an_end_that_was_forgotten_is_told(upstream: ScriptedUpstream) -> None:
    async with (
        primary_and_replica() as redis,
        running(redis.url, upstream) as owner,
        running(redis.url, upstream) as other,
    ):
        session = await owner.prepare()
        async with owner.stream(session) as line:
            call = (await upstream.call()).open()
            call.chunk("Hello")
            first = await line.take(1)
            await redis.replicate()
            await redis.stop_replicating()  # the replica knows the session as running
            call.chunk(" you", finish="stop")
            call.usage()
            call.done()
            seen = [*first, *await line.rest()]
        assert seen[-1].kind == "done"
        redis.fail_over()
        assert await read_whole(other, session) == seen
        assert len(upstream.calls) == 1


async def test_a_claim_that_a_replica_confirmed_is_not_forgotten(upstream: ScriptedUpstream) -> None:
    async with primary_and_replica() as redis, running(redis.url, upstream, redis_wait=1) as owner:
        session = await owner.prepare()
        async with owner.stream(session):
            await upstream.call()  # comes after the confirmation
            await redis.stop_replicating()
            assert await redis.state_in_replica(session) == "running"


async def test_a_claim_that_nobody_confirms_counts_with_a_warning(
    upstream: ScriptedUpstream, capsys: pytest.CaptureFixture[str]
) -> None:
    async with primary_and_replica() as redis, running(redis.url, upstream, redis_wait=1) as owner:
        await redis.stop_replicating()
        session = await owner.prepare()
        async with owner.stream(session):
            await upstream.call()
        assert "claim not confirmed by a replica" in capsys.readouterr().out


async def test_other_sessions_are_claimed_again_afterwards(upstream: ScriptedUpstream) -> None:
    async with primary_and_replica() as redis, running(redis.url, upstream) as broker:
        session = await broker.prepare()
        await redis.replicate()
        await redis.stop_replicating()
        redis.fail_over()
        reading = asyncio.create_task(read_whole(broker, session))
        call = (await upstream.call()).open()
        call.chunk("Hello", finish="stop")
        call.usage()
        call.done()
        assert (await reading)[-1].kind == "done"


async def test_a_session_whose_renewals_were_forgotten_is_not_lost(
    upstream: ScriptedUpstream, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first search for lost sessions finds all reservations overdue, before their owner can renew them there."""
    async with (
        primary_and_replica() as redis,
        running(redis.url, upstream) as owner,
        running(redis.url, upstream) as other,
    ):
        sessions = [await owner.prepare() for _ in range(4)]
        reading = [asyncio.create_task(read_whole(owner, session)) for session in sessions]
        calls = [(await upstream.call(number)).open() for number in range(1, 5)]
        await redis.replicate()
        await redis.stop_replicating()
        await redis.let_renewals_be_missed()
        redis.fail_over()
        await redis.are_renewed(4)
        reading += [asyncio.create_task(read_whole(other, session)) for session in sessions]
        for call in calls:
            call.chunk("Hello", finish="stop")
            call.usage()
            call.done()
        assert {(await each)[-1].kind for each in reading} == {"done"}
    assert "worker lost" not in capsys.readouterr().out
