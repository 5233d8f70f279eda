"""Background tasks: what a drain waits for, what `close` cancels, and that a loop which breaks starts again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest_asyncio
from structlog.testing import capture_logs

from broker.relay.tasks import PAUSE, Tasks, keep_running
from tests.clock import Clock, run_ready_tasks


class Work:
    """Work that ends when the test lets it.

    Attributes:
        may_end: lets it end.
        ended: how it ended: "done", "cancelled", or None.
    """

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.ended: str | None = None

    async def run(self) -> None:
        try:
            await self.may_end.wait()
            self.ended = "done"
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise


@pytest_asyncio.fixture
async def tasks() -> AsyncIterator[Tasks]:
    tasks = Tasks()
    yield tasks
    await tasks.close()


async def broken() -> None:
    raise ValueError("a bug")


async def test_a_drain_waits_for_spawned_and_adopted_work(tasks: Tasks) -> None:
    spawned, adopted = Work(), Work()
    tasks.spawn(spawned.run())
    tasks.adopt(asyncio.create_task(adopted.run()))
    draining = asyncio.create_task(tasks.finish(60))
    for work in (spawned, adopted):
        await run_ready_tasks()
        assert not draining.done()
        work.may_end.set()
    await draining
    assert (spawned.ended, adopted.ended) == ("done", "done")


async def test_a_drain_waits_for_work_that_work_starts(tasks: Tasks) -> None:
    second = Work()

    async def first() -> None:
        tasks.spawn(second.run())

    tasks.spawn(first())
    draining = asyncio.create_task(tasks.finish(60))
    await run_ready_tasks()
    assert not draining.done()
    second.may_end.set()
    await draining


async def test_a_drain_does_not_wait_for_extra_work_and_loops(tasks: Tasks) -> None:
    extra, loop = Work(), Work()
    tasks.spawn_extra(extra.run())
    tasks.keep_running({"loop": loop.run})
    await tasks.finish(60)
    assert (extra.ended, loop.ended) == (None, None)


async def test_a_drain_ends_when_its_time_is_over(tasks: Tasks) -> None:
    endless = Work()
    tasks.spawn(endless.run())
    await tasks.finish(0.01)
    assert endless.ended is None


async def test_a_drain_without_time_returns_at_once(tasks: Tasks) -> None:
    tasks.spawn(Work().run())
    await tasks.finish(0)


async def test_close_cancels_everything_and_waits_for_it(tasks: Tasks) -> None:
    works = [Work(), Work(), Work()]
    tasks.spawn(works[0].run())
    tasks.spawn_extra(works[1].run())
    tasks.keep_running({"loop": works[2].run})
    await run_ready_tasks()
    await tasks.close()
    assert [work.ended for work in works] == ["cancelled"] * 3


async def test_an_exception_in_work_is_logged_and_harms_no_other(tasks: Tasks) -> None:
    other = Work()
    with capture_logs() as lines:
        tasks.spawn(broken())
        tasks.spawn_extra(broken())
        tasks.spawn(other.run())
        await run_ready_tasks()
    assert [line["event"] for line in lines] == ["background work broke"] * 2
    other.may_end.set()
    await tasks.finish(60)
    assert other.ended == "done"


async def test_work_that_was_cancelled_is_not_logged(tasks: Tasks) -> None:
    with capture_logs() as lines:
        tasks.spawn(Work().run())
        await run_ready_tasks()
        await tasks.close()
    assert lines == []


async def test_a_loop_that_raises_or_returns_starts_again() -> None:
    clock, starts = Clock(), 0

    async def loop() -> None:
        nonlocal starts
        starts += 1
        if starts == 1:
            raise ValueError("a bug")

    with capture_logs() as lines:
        task = asyncio.create_task(keep_running("name", loop, pause=clock.pause))
        await clock.advance(PAUSE - 0.1)
        assert starts == 1
        await clock.advance(0.1)
        assert starts == 2
        await clock.advance(PAUSE)
        assert starts == 3
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert [(line["event"], line["loop"]) for line in lines] == [("background loop broke", "name")]


async def test_a_cancelled_loop_does_not_start_again() -> None:
    work = Work()
    task = asyncio.create_task(keep_running("name", work.run))
    await run_ready_tasks()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (task.cancelled(), work.ended) == (True, "cancelled")
