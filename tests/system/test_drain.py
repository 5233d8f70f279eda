"""SIGTERM: what runs may finish, nothing begins, nobody is lost."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.events import Broken
from tests.system.cluster import Script, came_again, check_chunks, check_whole, running_cluster
from tests.system.harness import eventually

if TYPE_CHECKING:
    from tests.events import Event
    from tests.system.cluster import Cluster, Session, Worker

pytestmark = pytest.mark.slow

PROMPTLY = 12.0
"""Seconds within which a worker that has nothing more to do has ended, on a loaded machine too; a drain takes 25."""


def draining(worker: Worker) -> bool:
    return '"draining"' in worker.log()


async def test_a_drain_finishes_streams_and_starts_none() -> None:
    async with running_cluster(2) as cluster:
        owner, other = cluster.workers
        session, waiting = await cluster.prepare(owner), await cluster.prepare(owner, Script())
        async with session.stream(owner) as connection:
            call = await session.call()
            call.chunks(2)
            await connection.take(2)
            owner.terminate()
            await eventually(lambda: draining(owner))
            ready = await cluster.ask("GET", owner, "/health/ready")
            assert (ready.status, ready.json["status"]) == (503, "draining")
            async with waiting.stream(owner) as refused:
                assert await came_again(refused)
            assert waiting.calls == 0
            call.chunks(3)
            check_chunks(await connection.take(3), session.marker, after=2)
            async with session.stream(owner, "1-1") as again:  # its own session is still served
                check_chunks(await again.take(4), session.marker, after=1)
            call.done()
            end = check_whole(await connection.rest(), session.marker, after=5)
            assert end.kind == "done"
        assert await owner.ended(PROMPTLY) == 0
        assert check_whole(await session.read(other), session.marker) == end
        assert check_whole(await waiting.read(other), waiting.marker).kind == "done"
        assert (session.calls, waiting.calls) == (1, 1)


async def test_a_prepare_is_served_while_draining() -> None:
    async with running_cluster(2) as cluster:
        owner, other = cluster.workers
        session = await cluster.prepare(owner)
        async with session.stream(owner) as connection:
            call = await session.call()
            call.chunks(1)
            await connection.take(1)
            owner.terminate()
            await eventually(lambda: draining(owner))
            late = await cluster.prepare(owner, Script())
            call.done()
            await connection.rest()
        assert check_whole(await late.read(other), late.marker).kind == "done"


async def test_viewers_of_other_workers_are_disconnected_at_once() -> None:
    async with running_cluster(2) as cluster:
        owner, other = cluster.workers
        session, own = await cluster.prepare(owner), await cluster.prepare(other)
        async with (
            session.stream(owner) as connection,
            session.stream(other) as far,
            own.stream(other) as busy,
        ):
            call, own_call = await session.call(), await own.call()
            call.chunks(2)
            check_chunks(await far.take(2), session.marker)
            own_call.chunks(1)
            await busy.take(1)  # this one keeps the worker from ending
            other.terminate()
            assert await far.rest() == [], "its line ends without an end"
            async with session.stream(other, "1-2") as refused:
                assert await came_again(refused)
            async with session.stream(owner, far.last_id) as back:
                call.done()
                assert check_whole(await back.rest(), session.marker, after=2).kind == "done"
            await connection.rest()
            own_call.done()
            assert check_whole(await busy.rest(), own.marker, after=1).kind == "done"
        assert await other.ended(PROMPTLY) == 0


async def test_with_nothing_to_do_it_ends_at_once() -> None:
    async with running_cluster(1) as cluster:
        [worker] = cluster.workers
        session = await cluster.prepare(worker, Script())
        await session.read(worker)
        worker.terminate()
        assert await worker.ended(PROMPTLY) == 0


async def test_unfinished_streams_end_in_a_shutdown_for_all() -> None:
    async with running_cluster(2, drain_timeout=1) as cluster:
        owner, other = cluster.workers
        session = await cluster.prepare(owner)
        async with session.stream(owner) as connection, session.stream(other) as far:
            call = await session.call()
            call.chunks(2)
            await connection.take(2)
            owner.terminate()
            end = check_whole(await connection.rest(), session.marker, after=2)
            assert (end.json["code"], end.json["retryable"]) == ("server_shutdown", True)
            await call.call.wait_gone()
            assert check_whole(await far.rest(), session.marker) == end
        assert await owner.ended(PROMPTLY) == 0
        assert check_whole(await session.read(other), session.marker) == end


async def test_unfinished_streams_without_redis_end_as_well() -> None:
    async with running_cluster(1, drain_timeout=1) as cluster:
        [owner] = cluster.workers
        session = await cluster.prepare(owner)
        async with session.stream(owner) as connection:
            call = await session.call()
            call.chunks(2)
            await connection.take(2)
            cluster.valkey.kill()
            owner.terminate()
            end = check_whole(await connection.rest(), session.marker, after=2)
            assert end.json["code"] == "server_shutdown"
        assert await owner.ended(10) == 0


async def test_a_second_signal_ends_it_at_once() -> None:
    async with running_cluster(1) as cluster:
        [owner] = cluster.workers
        session = await cluster.prepare(owner)
        async with session.stream(owner) as connection:
            call = await session.call()
            call.chunks(1)
            await connection.take(1)
            owner.terminate()
            await eventually(lambda: draining(owner))
            owner.signal(signal.SIGINT)
            assert await owner.ended(PROMPTLY) == 128 + signal.SIGINT
            with pytest.raises(Broken):
                await connection.rest()


async def test_a_stalled_page_does_not_delay_the_end() -> None:
    async with running_cluster(1, drain_timeout=3, max_response="64MiB") as cluster:
        [owner] = cluster.workers
        session = await cluster.prepare(owner, Script(chunks=1500, size=10_000))
        async with session.stream(owner, receive_buffer=4096):
            await cluster.upstream.call(session.marker)
            owner.terminate()
            assert await owner.ended(12) == 0


async def test_a_rolling_restart_under_load_loses_nothing() -> None:
    async with running_cluster(3, drain_timeout=10) as cluster:
        stop = asyncio.Event()
        loads = [asyncio.create_task(load(cluster, number, stop)) for number in range(12)]
        for worker in cluster.workers:
            worker.terminate()
            assert await worker.ended() == 0
            await worker.start()
        stop.set()
        done = await asyncio.gather(*loads)
        assert min(done) >= 3, done
        assert not cluster.upstream.open_calls()
        assert all(len(calls) == 1 for calls in cluster.upstream.calls.values())


async def load(cluster: Cluster, number: int, stop: asyncio.Event) -> int:
    """One page after another, each to its end, on whichever worker serves; returns how many."""
    at = number
    finished = 0
    while not stop.is_set() or finished < 3:
        at += 1
        try:
            session = await cluster.prepare(cluster.workers[at % 3], Script(chunks=60, pause=0.01))
        except (aiohttp.ClientError, TimeoutError):
            continue
        end = await watch(cluster, session, at)
        assert end.kind == "done", end
        assert end.json["finishReason"] == "stop"
        finished += 1
    return finished


async def watch(cluster: Cluster, session: Session, at: int) -> Event:
    """A page that reconnects."""
    seen, cursor = 0, None
    async with asyncio.timeout(30):
        while True:
            at += 1
            try:
                async with session.stream(cluster.workers[at % 3], cursor) as connection:
                    while (event := await connection.event()) is not None:
                        cursor = event.id
                        if event.kind != "chunk":
                            return event
                        seen = check_chunks([event], session.marker, after=seen)
            except (OSError, Broken, asyncio.IncompleteReadError):
                pass
            await asyncio.sleep(0.05)  # as a page waits before it comes again
