"""A session can be cancelled on any worker, in any state, and then it ends in nothing else."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.system.cluster import (
    BURIED,
    Cluster,
    Script,
    Session,
    Worker,
    check_chunks,
    check_whole,
    running_cluster,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.events import Event
    from tests.system.cluster import NumberedCall

pytestmark = pytest.mark.asyncio(loop_scope="module")

ANYWHERE = pytest.mark.parametrize("where", [0, 1])
EITHER_WAY = pytest.mark.parametrize("post", [False, True])
AT_ONCE = 1.0
"""Seconds within which the upstream sees the line close."""

WITHOUT_BELLS = 3.0
"""The same where pub/sub is dead."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster(2) as cluster:
        yield cluster


async def cancelled(session: Session, worker: Worker, *, post: bool = False) -> None:
    answer = await session.cancel(worker, post=post)
    assert (answer.status, answer.json) == (202, {"state": "cancelled"})


async def gone(cluster: Cluster, call: NumberedCall, within: float) -> None:
    stopwatch = cluster.stopwatch()
    await call.call.wait_gone()
    assert stopwatch.seconds < within


def is_cancelled(end: Event) -> bool:
    return end.kind == "done" and end.json["finishReason"] == "cancelled"


@ANYWHERE
@EITHER_WAY
async def test_prepared(cluster: Cluster, where: int, post: bool) -> None:
    session = await cluster.prepare(cluster.workers[0], Script())
    await cancelled(session, cluster.workers[where], post=post)
    for worker in cluster.workers:
        [end] = await session.read(worker)
        assert is_cancelled(end)
        assert end.id == "1-1.end"
        assert end.json["cost"] == 0
    assert session.calls == 0


@ANYWHERE
@EITHER_WAY
async def test_before_the_first_token(cluster: Cluster, where: int, post: bool) -> None:
    session = await cluster.prepare(cluster.workers[0])
    async with session.stream(cluster.workers[0]) as connection:
        call = await cluster.upstream.call(session.marker)
        await cancelled(session, cluster.workers[where], post=post)
        await gone(cluster, call, AT_ONCE)
        [end] = await connection.rest()
        assert is_cancelled(end)
    assert [end] == await session.read(cluster.workers[1])


@ANYWHERE
@EITHER_WAY
async def test_in_the_middle(cluster: Cluster, where: int, post: bool) -> None:
    owner, other = cluster.workers
    session = await cluster.prepare(owner)
    async with session.stream(owner) as connection, session.stream(other) as far:
        call = await session.call()
        call.chunks(3)
        await connection.take(3)
        await cancelled(session, cluster.workers[where], post=post)
        await gone(cluster, call, AT_ONCE)
        end = check_whole(await connection.rest(), session.marker, after=3)
        assert is_cancelled(end)
        assert check_whole(await far.rest(), session.marker) == end
    for worker in cluster.workers:
        assert check_whole(await session.read(worker), session.marker) == end


@ANYWHERE
async def test_with_nobody_watching(cluster: Cluster, where: int) -> None:
    session = await cluster.prepare(cluster.workers[0])
    async with session.stream(cluster.workers[0]) as connection:
        call = await session.call()
        call.chunks(2)
        await connection.take(2)
    await cancelled(session, cluster.workers[where])
    await gone(cluster, call, AT_ONCE)
    assert is_cancelled(check_whole(await session.read(cluster.workers[1]), session.marker))


@ANYWHERE
async def test_while_it_ends(cluster: Cluster, where: int) -> None:
    """The finish and the cancel race: whichever wins, the answer to the cancel is right."""
    for _ in range(20):
        session = await cluster.prepare(cluster.workers[0])
        async with session.stream(cluster.workers[0]) as connection:
            call = await session.call()
            call.chunks(2)
            await connection.take(2)
            cancelling = asyncio.create_task(session.cancel(cluster.workers[where]))
            call.done()
            answer = await cancelling
            end = check_whole(await connection.rest(), session.marker, after=2)
        if answer.status == 202:
            assert is_cancelled(end)
        else:
            assert (answer.status, answer.json["state"]) == (
                200,
                "cancelled" if is_cancelled(end) else "done",
            )
        assert check_whole(await session.read(cluster.workers[1]), session.marker) == end


@ANYWHERE
@EITHER_WAY
async def test_after_the_end(cluster: Cluster, where: int, post: bool) -> None:
    for script, state in ((Script(), "done"), (Script(ending="truncated"), "failed")):
        session = await cluster.prepare(cluster.workers[0], script)
        before = await session.read(cluster.workers[0])
        answer = await session.cancel(cluster.workers[where], post=post)
        assert (answer.status, answer.json) == (200, {"state": state})
        assert await session.read(cluster.workers[where]) == before


@pytest.mark.parametrize("second", [0, 1])
@ANYWHERE
async def test_twice(cluster: Cluster, where: int, second: int) -> None:
    session = await cluster.prepare(cluster.workers[0])
    async with session.stream(cluster.workers[0]) as connection:
        call = await session.call()
        call.chunks(1)
        await connection.take(1)
        answers = await asyncio.gather(
            session.cancel(cluster.workers[where]), session.cancel(cluster.workers[second], post=True)
        )
        assert all(answer.json == {"state": "cancelled"} for answer in answers)
        assert 202 in {answer.status for answer in answers}
        assert is_cancelled(check_whole(await connection.rest(), session.marker, after=1))
    again = await session.cancel(cluster.workers[second])
    assert (again.status, again.json) == (200, {"state": "cancelled"})


@ANYWHERE
@EITHER_WAY
async def test_prepared_twice(cluster: Cluster, where: int, post: bool) -> None:
    session = await cluster.prepare(cluster.workers[0])
    await cancelled(session, cluster.workers[0], post=post)
    again = await session.cancel(cluster.workers[where], post=post)
    assert (again.status, again.json) == (200, {"state": "cancelled"})


@ANYWHERE
@EITHER_WAY
@pytest.mark.parametrize("session_id", ["00000000-0000-4000-8000-000000000000", "nonsense"])
async def test_unknown(cluster: Cluster, where: int, post: bool, session_id: str) -> None:
    answer = await Session(cluster, session_id, "none").cancel(cluster.workers[where], post=post)
    assert (answer.status, answer.json["error"]["code"]) == (404, "session_not_found")


async def test_claimed_and_cancelled_at_once(cluster: Cluster) -> None:
    """Nobody may be answered that it is cancelled and then be sent an answer."""
    for number in range(20):
        session = await cluster.prepare(cluster.workers[0], Script(chunks=300, pause=0.01))
        reading = asyncio.create_task(session.read(cluster.workers[number % 2]))
        for _ in range(number // 2):
            await asyncio.sleep(0)
        await cancelled(session, cluster.workers[number // 2 % 2])
        assert is_cancelled(check_whole(await reading, session.marker))
        assert session.calls <= 1


# Where something is broken


@asynccontextmanager
async def without_bells(cluster: Cluster) -> AsyncIterator[None]:
    """Cut every subscription the moment it is made, for as long as the block runs."""

    done = asyncio.Event()

    async def cut() -> None:
        async with cluster.redis() as client:
            while not done.is_set():
                await client.client_kill_filter(_type="pubsub")
                await asyncio.sleep(0.001)

    async with cluster.redis() as client:
        cutting = asyncio.create_task(cut())
        try:
            async with asyncio.timeout(5):
                while await client.pubsub_channels():  # noqa: ASYNC110 - Redis tells nobody
                    await asyncio.sleep(0)
            yield
        finally:
            done.set()
            await cutting


@pytest.mark.parametrize("started", [False, True])
async def test_where_pub_sub_is_dead(cluster: Cluster, started: bool) -> None:
    session = await cluster.prepare(cluster.workers[0])
    async with session.stream(cluster.workers[0]) as connection:
        call = await cluster.upstream.call(session.marker)
        if started:
            call.call.open()
            call.chunks(2)
            await connection.take(2)
        async with without_bells(cluster):
            await cancelled(session, cluster.workers[1])
            await gone(cluster, call, WITHOUT_BELLS)
            assert is_cancelled((await connection.rest())[-1])
            assert is_cancelled((await session.read(cluster.workers[1]))[-1])


async def test_where_pub_sub_is_dead_others_follow_all_the_same(cluster: Cluster) -> None:
    session = await cluster.prepare(cluster.workers[0])
    async with session.stream(cluster.workers[0]), session.stream(cluster.workers[1]) as far:
        call = await session.call()
        call.chunks(1)
        await far.take(1)
        async with without_bells(cluster):
            call.chunks(5)
            check_chunks(await far.take(5), session.marker, after=1)
            call.done()
            check_whole(await far.rest(), session.marker, after=6)


@pytest.mark.slow
@pytest.mark.parametrize("where", [0, 1])
async def test_a_cancel_that_was_accepted_outlives_the_owner(where: int) -> None:
    """Through the owner, it is in Redis before it is accepted; through another, the owner may never learn of it."""
    async with running_cluster(2) as cluster:
        owner, other = cluster.workers
        session = await cluster.prepare(owner)
        async with session.stream(owner) as connection, session.stream(other) as far:
            call = await session.call()
            call.chunks(2)
            await connection.take(2)
            await far.take(2)
            if where == 1:
                owner.freeze()
            await cancelled(session, cluster.workers[where])
            await owner.kill()
            async with asyncio.timeout(BURIED):
                while (event := await far.event()) is None or event.kind == "chunk":
                    pass
            assert is_cancelled(event)
            for _ in range(2):
                assert (await session.read(other))[-1] == event
        assert session.calls == 1


@pytest.mark.slow
async def test_without_redis_only_the_owner_accepts_a_cancel() -> None:
    async with running_cluster(2) as cluster:
        owner, other = cluster.workers
        session = await cluster.prepare(owner)
        async with session.stream(owner) as connection:
            call = await session.call()
            call.chunks(2)
            await connection.take(2)
            await cluster.journaled(session, 2)
            cluster.valkey.kill()
            answer = await session.cancel(other)
            assert (answer.status, answer.json["error"]["code"]) == (503, "store_unavailable")
            await cancelled(session, owner)
            await gone(cluster, call, AT_ONCE)
            end = check_whole(await connection.rest(), session.marker, after=2)
            assert is_cancelled(end)
        await cluster.valkey.start()
        async with asyncio.timeout(10):
            while not (events := await session.read(other)):
                pass  # asked to reconnect
        assert check_whole(events, session.marker) == end
