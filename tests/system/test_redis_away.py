"""Redis dies, comes back empty, freezes, or never returns: streaming pages notice nothing, and nothing is lost."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from broker.store.connection import SCHEMA
from tests.system.cluster import Script, came_again, check_chunks, check_whole, running_cluster
from tests.system.harness import POLL_INTERVAL

if TYPE_CHECKING:
    from tests.events import Event
    from tests.system.cluster import Cluster, Session, Worker

pytestmark = pytest.mark.slow

MIB = 1024 * 1024


async def come_back(
    session: Session, worker: Worker, cursor: str | None = None, within: float = 15
) -> list[Event]:
    """Return what a page gets that reconnects as often as it is asked to."""
    async with asyncio.timeout(within):
        while not (events := await session.read(worker, cursor)):  # noqa: ASYNC110 - so do pages
            await asyncio.sleep(0.1)  # as a page waits before it comes again
    return events


async def status(cluster: Cluster, worker: Worker) -> str:
    return str((await cluster.ask("GET", worker, "/health/ready")).json["status"])


async def until_healthy(cluster: Cluster) -> None:
    async with asyncio.timeout(10):
        for worker in cluster.workers:
            await until_ok(cluster, worker)


# Killed, and started empty


async def test_streaming_pages_do_not_notice_an_outage() -> None:
    async with running_cluster(2) as cluster:
        owner, other = cluster.workers
        session = await cluster.prepare(owner)
        async with session.stream(owner) as line, session.stream(other) as far:
            call = await session.call()
            call.chunks(3)
            await line.take(3)
            await far.take(3)
            cluster.valkey.kill()
            call.chunks(3)
            check_chunks(await line.take(3), session.marker, after=3)
            await cluster.valkey.start()
            check_chunks(await far.take(3), session.marker, after=3)
            async with session.stream(other, "1-2") as late:
                call.chunks(1)
                check_chunks(await late.take(5), session.marker, after=2)
            call.done()
            end = check_whole(await line.rest(), session.marker, after=6)
            assert end.kind == "done"
            assert check_whole(await far.rest(), session.marker, after=6) == end
        for worker in cluster.workers:
            assert check_whole(await session.read(worker), session.marker) == end
        assert session.calls == 1
        assert not await cluster.keys_without_ttl()


async def test_a_finished_session_is_written_again() -> None:
    async with running_cluster(2) as cluster:
        owner, other = cluster.workers
        session = await cluster.prepare(owner, Script(50))
        before = await session.read(owner)
        cluster.valkey.kill()
        assert await session.read(owner) == before
        await cluster.valkey.start()
        assert await come_back(session, other) == before
        assert not await cluster.keys_without_ttl()


async def test_a_lost_prepared_session_is_retried_then_not_found() -> None:
    async with running_cluster(2) as cluster:
        session = await cluster.prepare(cluster.workers[0], Script())
        cluster.valkey.kill()
        lost = cluster.stopwatch()
        await cluster.valkey.start()
        await until_healthy(cluster)
        healthy = cluster.stopwatch()
        async with session.stream(cluster.workers[1]) as line:
            assert await came_again(line)
        [event] = await come_back(session, cluster.workers[1])
        assert event.json["code"] == "session_not_found"
        assert lost.elapsed > 8
        assert healthy.seconds < 12
        assert session.calls == 0


async def test_a_worker_started_in_an_outage_loses_no_sessions() -> None:
    """It knows no marker of before, and the owner may need a moment."""
    async with running_cluster(2) as cluster:
        owner, other = cluster.workers
        session = await cluster.prepare(owner)
        async with session.stream(owner) as line:
            call = await session.call()
            call.chunks(3)
            await line.take(3)
            await other.kill()
            cluster.valkey.kill()
            await other.start(ready="/health/live")
            owner.freeze()
            await cluster.valkey.start()
            await until_ok(cluster, other)
            async with session.stream(other, "1-2") as late:
                assert await came_again(late)
            owner.thaw()
            await until_there(session, other)
            call.done()
            check_whole(await line.rest(), session.marker, after=3)
        assert session.calls == 1


async def test_a_worker_started_after_a_loss_learns_of_it() -> None:
    async with running_cluster(3) as cluster:
        owner, _, late = cluster.workers
        session = await cluster.prepare(owner)
        async with session.stream(owner) as line:
            call = await session.call()
            call.chunks(3)
            await line.take(3)
            await late.kill()
            owner.freeze()
            cluster.valkey.kill()
            await cluster.valkey.start()
            await until_wiped(cluster)
            await late.start()
            async with session.stream(late, "1-2") as far:
                assert await came_again(far)
            owner.thaw()
            await until_there(session, late)
            call.done()
            check_whole(await line.rest(), session.marker, after=3)
        assert session.calls == 1


async def until_wiped(cluster: Cluster) -> None:
    """Wait until somebody has found that Redis came back empty."""
    async with asyncio.timeout(10), cluster.redis() as client:
        while not await client.exists(f"broker:{SCHEMA}:{{workers}}:wiped"):  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(POLL_INTERVAL)


async def until_ok(cluster: Cluster, worker: Worker) -> None:
    async with asyncio.timeout(10):
        while await status(cluster, worker) != "ok":  # noqa: ASYNC110 - it happens in another process
            await asyncio.sleep(POLL_INTERVAL)


async def until_there(session: Session, worker: Worker) -> None:
    """Reconnect until a worker knows a session with events."""
    async with asyncio.timeout(15):
        while True:
            async with session.stream(worker) as line:
                if (event := await line.event()) is not None:
                    check_chunks([event], session.marker)
                    return
            await asyncio.sleep(0.05)  # as a page waits before it comes again


async def test_an_end_during_the_outage_is_written_afterwards() -> None:
    async with running_cluster(2) as cluster:
        owner, other = cluster.workers
        session = await cluster.prepare(owner)
        async with session.stream(owner) as line:
            call = await session.call()
            call.chunks(3)
            await line.take(3)
            cluster.valkey.kill()
            call.chunks(2)
            call.done()
            stopwatch = cluster.stopwatch()
            end = check_whole(await line.rest(), session.marker, after=3)
            assert stopwatch.seconds < 0.8, "300 ms for Redis, and what the rest takes"
        await cluster.valkey.start()
        assert check_whole(await come_back(session, other), session.marker) == end
        assert await session.read(owner, "1-3") == (await session.read(other, "1-3"))
        assert not await cluster.keys_without_ttl()


async def test_redis_dies_again_and_again() -> None:
    async with running_cluster(2) as cluster:
        owner, other = cluster.workers
        session = await cluster.prepare(owner)
        async with session.stream(owner) as line:
            call = await session.call()
            for at in range(0, 12, 3):
                call.chunks(3)
                check_chunks(await line.take(3), session.marker, after=at)
                cluster.valkey.kill()
                await cluster.valkey.start()
            await until_there(session, other)
            async with session.stream(other, "1-1") as far:
                check_chunks(await far.take(11), session.marker, after=1)
                call.done()
                end = check_whole(await line.rest(), session.marker, after=12)
                assert check_whole(await far.rest(), session.marker, after=12) == end
        assert session.calls == 1


async def test_a_session_that_ends_while_rewritten_stays_ended() -> None:
    async with running_cluster(2) as cluster:
        owner, other = cluster.workers
        for _ in range(8):
            session = await cluster.prepare(owner)
            async with session.stream(owner) as line:
                call = await session.call()
                call.chunks(2)
                await line.take(2)
                owner.freeze()
                cluster.valkey.kill()
                await cluster.valkey.start()
                call.done()
                owner.thaw()
                end = check_whole(await line.rest(), session.marker, after=2)
            assert check_whole(await come_back(session, other), session.marker) == end


# Frozen


async def test_streams_continue_after_a_freeze_of_redis() -> None:
    async with running_cluster(2) as cluster:
        owner, other = cluster.workers
        session = await cluster.prepare(owner)
        async with session.stream(owner) as line, session.stream(other) as far:
            call = await session.call()
            call.chunks(3)
            await line.take(3)
            await far.take(3)
            cluster.valkey.freeze()
            for second in range(8):
                call.chunks(1)
                check_chunks(await line.take(1), session.marker, after=3 + second)
                await asyncio.sleep(1)
            cluster.valkey.thaw()
            check_chunks(await far.take(8), session.marker, after=3)
            await asyncio.sleep(4)  # as long as it takes to call somebody dead
            call.done()
            end = check_whole(await line.rest(), session.marker, after=11)
            assert end.kind == "done"
            assert check_whole(await far.rest(), session.marker, after=11) == end
        assert session.calls == 1


async def test_a_claim_with_a_lost_reply_makes_one_call() -> None:
    async with running_cluster(2) as cluster:
        for patience in (0, 1, 2):
            session = await cluster.prepare(cluster.workers[0], Script(chunks=20))
            cluster.valkey.freeze()
            try:
                for _ in range(patience + 1):
                    async with session.stream(cluster.workers[0]) as line:
                        assert await came_again(line)
            finally:
                cluster.valkey.thaw()
            seen = await asyncio.gather(*(come_back(session, worker) for worker in cluster.workers))
            for events in seen:
                assert check_whole(events, session.marker).kind == "done"
            assert session.calls == 1


async def test_claims_of_two_workers_in_one_freeze_make_one_call() -> None:
    async with running_cluster(2) as cluster:
        session = await cluster.prepare(cluster.workers[0], Script(chunks=20))
        cluster.valkey.freeze()
        try:
            async with (
                session.stream(cluster.workers[0]) as here,
                session.stream(cluster.workers[1]) as there,
            ):
                assert await came_again(here)
                assert await came_again(there)
        finally:
            cluster.valkey.thaw()
        seen = await asyncio.gather(*(come_back(session, worker) for worker in cluster.workers))
        assert check_whole(seen[0], session.marker) == check_whole(seen[1], session.marker)
        assert session.calls == 1


# Gone for good


async def test_without_redis_streams_finish_and_the_door_says_later() -> None:
    async with running_cluster(1) as cluster:
        [worker] = cluster.workers
        session, waiting = await cluster.prepare(worker), await cluster.prepare(worker)
        async with session.stream(worker) as line:
            call = await session.call()
            call.chunks(3)
            await line.take(3)
            cluster.valkey.kill()
            async with waiting.stream(worker) as refused:
                assert await came_again(refused)
            stopwatch = cluster.stopwatch()
            answer = await cluster.ask("POST", worker, "/prepare", json={"model": "m", "messages": []})
            assert answer.status in (422, 503)
            marker = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
            answer = await cluster.ask("POST", worker, "/prepare", json=marker)
            assert (answer.status, answer.json["error"]["code"]) == (503, "store_unavailable")
            assert "Retry-After" in answer.headers
            assert stopwatch.seconds < 3
            assert await status(cluster, worker) == "degraded"
            async with session.stream(worker, "1-1") as again:  # its own session needs no Redis
                check_chunks(await again.take(2), session.marker, after=1)
            call.done()
            end = check_whole(await line.rest(), session.marker, after=3)
            assert end.kind == "done"
            assert check_whole(await session.read(worker), session.marker) == end


async def test_without_redis_nothing_grows_without_bound() -> None:
    """Sessions that nobody can claim, and answers that nobody can journal."""
    async with running_cluster(1, max_response="64MiB") as cluster:
        [worker] = cluster.workers
        waiting = [await cluster.prepare(worker, Script()) for _ in range(20)]
        session = await cluster.prepare(worker, Script(chunks=3000, pause=0.0005, size=10_000))
        async with session.stream(worker) as line:
            await line.take(1)
            cluster.valkey.kill()
            check_whole(await line.rest(), session.marker, after=1)
        before = worker.memory()
        for _ in range(5):
            async with AsyncExitStack() as stack:
                for one in waiting:
                    refused = await stack.enter_async_context(one.stream(worker))
                    assert await came_again(refused)
        assert worker.memory() - before < 8 * MIB
        assert all(one.calls == 0 for one in waiting)


async def test_afterwards_everything_works_without_a_restart() -> None:
    async with running_cluster(2) as cluster:
        owner, other = cluster.workers
        for hurt in ("kill", "freeze"):
            if hurt == "kill":
                cluster.valkey.kill()
                await asyncio.sleep(2)  # it is away for a while
                await cluster.valkey.start()
            else:
                cluster.valkey.freeze()
                await asyncio.sleep(3)
                cluster.valkey.thaw()
            await until_healthy(cluster)
            session = await cluster.prepare(owner)
            async with session.stream(owner) as line, session.stream(other) as far:
                call = await session.call()
                call.chunks(2)
                check_chunks(await line.take(2), session.marker)
                check_chunks(await far.take(2), session.marker)
                assert (await session.cancel(other)).status == 202
                end = check_whole(await line.rest(), session.marker, after=2)
                assert check_whole(await far.rest(), session.marker, after=2) == end
            assert end.json["finishReason"] == "cancelled"
