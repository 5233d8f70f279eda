"""A page that reads slowly, or not at all, costs little, delays nobody, and can reconnect."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from tests.events import Broken
from tests.system.cluster import Script, check_chunks, check_whole, number_of, running_cluster

pytestmark = pytest.mark.slow

MIB = 1024 * 1024
LONG = Script(chunks=3000, pause=0.0005, size=10_000)
"""30 MB."""

STALLED = 8
"""Readers that read nothing."""


@pytest.mark.parametrize("where", [0, 1])
async def test_stalled_readers_cost_little_and_delay_nobody(where: int) -> None:
    """The same for viewers of one's own sessions and of others'."""
    async with running_cluster(2, send_timeout=60, max_response="64MiB") as cluster:
        owner, worker = cluster.workers[0], cluster.workers[where]
        warm = await cluster.prepare(owner, LONG)
        await asyncio.gather(warm.read(owner), warm.read(worker))
        before = worker.memory()
        session = await cluster.prepare(owner, LONG)
        async with AsyncExitStack() as stack:
            line = await stack.enter_async_context(session.stream(owner))
            for _ in range(STALLED):
                await stack.enter_async_context(session.stream(worker, receive_buffer=4096))
            end = check_whole(await line.rest(), session.marker)
            assert end.kind == "done"
            grown = worker.memory() - before
        assert grown < STALLED * 2 * MIB, f"{grown / MIB:.1f} MiB for {STALLED} stalled readers of 30 MB"


@pytest.mark.parametrize("where", [0, 1])
async def test_a_stalled_reader_is_cut_off_and_can_come_back(where: int) -> None:
    async with running_cluster(2, send_timeout=1, max_response="64MiB") as cluster:
        owner, worker = cluster.workers[0], cluster.workers[where]
        session = await cluster.prepare(owner, LONG)
        async with (
            session.stream(owner) as connection,
            session.stream(worker, receive_buffer=4096) as stalled,
        ):
            events = await stalled.take(3)
            end = check_whole(await connection.rest(), session.marker)
            await asyncio.sleep(3)  # it reads nothing for longer than it may
            with pytest.raises(Broken):
                await stalled.rest()
        back = await session.read(worker, events[-1].id)
        assert check_whole(back, session.marker, after=3) == end
        assert session.calls == 1


async def test_a_slow_reader_that_goes_on_reading_is_not_cut_off() -> None:
    async with running_cluster(1, send_timeout=2, max_response="64MiB") as cluster:
        [worker] = cluster.workers
        session = await cluster.prepare(worker, Script(chunks=2000, size=10_000))
        async with session.stream(worker) as connection:
            seen = 0
            while (event := await connection.event()) is not None and event.kind == "chunk":
                seen = check_chunks([event], session.marker, after=seen)
                if seen % 100 == 0:
                    await asyncio.sleep(0.2)  # far slower than it is written, never silent for long
            assert event is not None
            assert number_of(event) == seen + 1


async def test_many_that_fall_behind_read_their_rest_from_the_journal() -> None:
    async with running_cluster(2, send_timeout=20, max_response="64MiB") as cluster:
        owner, other = cluster.workers
        session = await cluster.prepare(owner, Script(chunks=1500, pause=0.001, size=5_000))
        async with AsyncExitStack() as stack:
            lines = [
                await stack.enter_async_context(session.stream(worker, receive_buffer=4096))
                for worker in (owner, other, owner, other)
            ]
            reader = await stack.enter_async_context(session.stream(other))
            end = check_whole(await reader.rest(), session.marker)
            for line in lines:
                assert check_whole(await line.rest(), session.marker) == end
        assert session.calls == 1


async def test_one_event_larger_than_every_bound_passes_whole() -> None:
    async with running_cluster(2, max_response="64MiB") as cluster:
        owner, other = cluster.workers
        session = await cluster.prepare(owner, Script(chunks=2, size=3 * MIB))
        end = check_whole(await session.read(owner), session.marker)
        assert check_whole(await session.read(other), session.marker) == end
