"""With BROKER_RESUME_TTL=0 a session is streamed strictly once, on whichever worker."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from tests.system.cluster import Cluster, Script, check_chunks, check_whole, running_cluster

if TYPE_CHECKING:
    from tests.events import Event

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster(2, resume_ttl=0) as cluster:
        yield cluster


def is_refused(events: list[Event]) -> bool:
    return len(events) == 1 and events[0].kind == "error" and events[0].json["code"] == "already_claimed"


@pytest.mark.parametrize("here", [0, 1])
async def test_a_second_viewer_is_refused_while_it_runs(cluster: Cluster, here: int) -> None:
    owner = cluster.workers[0]
    session = await cluster.prepare(owner)
    async with session.stream(owner) as connection:
        call = await session.call()
        call.chunks(2)
        check_chunks(await connection.take(2), session.marker)
        for _ in range(3):
            assert is_refused(await session.read(cluster.workers[here]))
            assert is_refused(await session.read(cluster.workers[here], "1-1"))
        call.done()
        check_whole(await connection.rest(), session.marker, after=2)
    assert session.calls == 1


@pytest.mark.parametrize("here", [0, 1])
async def test_a_second_viewer_is_refused_after_the_end(cluster: Cluster, here: int) -> None:
    session = await cluster.prepare(cluster.workers[0], Script())
    check_whole(await session.read(cluster.workers[0]), session.marker)
    for _ in range(3):
        assert is_refused(await session.read(cluster.workers[here]))
        assert is_refused(await session.read(cluster.workers[here], "1-1"))
    assert session.calls == 1


async def test_one_of_many_simultaneous_viewers_is_served(cluster: Cluster) -> None:
    for _ in range(5):
        session = await cluster.prepare(cluster.workers[0], Script(chunks=20, pause=0.005))
        seen = await asyncio.gather(*(session.read(worker) for worker in cluster.workers * 5))
        counts = Counter(is_refused(events) for events in seen)
        assert counts == {True: 9, False: 1}, counts
        check_whole(next(events for events in seen if not is_refused(events)), session.marker)
        assert session.calls == 1


@pytest.mark.parametrize("here", [0, 1])
async def test_leaving_ends_it(cluster: Cluster, here: int) -> None:
    owner = cluster.workers[0]
    session = await cluster.prepare(owner)
    async with session.stream(owner) as connection:
        call = await session.call()
        call.chunks()
        await connection.take(1)
        assert is_refused(await session.read(cluster.workers[here])), (
            "and whoever was refused watches nothing"
        )
    await call.call.wait_gone()
    assert is_refused(await session.read(cluster.workers[here]))


@pytest.mark.parametrize("here", [0, 1])
async def test_it_can_be_cancelled_from_anywhere(cluster: Cluster, here: int) -> None:
    owner = cluster.workers[0]
    session = await cluster.prepare(owner)
    async with session.stream(owner) as connection:
        call = await session.call()
        call.chunks()
        await connection.take(1)
        answer = await session.cancel(cluster.workers[here])
        assert (answer.status, answer.json) == (202, {"state": "cancelled"})
        end = check_whole(await connection.rest(), session.marker, after=1)
        assert end.json["finishReason"] == "cancelled"
    await call.call.wait_gone()


async def test_no_answer_stays_in_redis(cluster: Cluster) -> None:
    session = await cluster.prepare(cluster.workers[0], Script(chunks=50))
    check_whole(await session.read(cluster.workers[0]), session.marker)
    async with cluster.redis() as client:
        for key in [key async for key in client.scan_iter(f"*{session.id}*")]:
            dumped = await client.dump(key)
            assert session.marker.encode() not in (dumped or b""), key
