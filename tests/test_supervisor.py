"""The parent of several workers: when it starts one, waits, gives up, and lets one go. No process is started here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from broker.settings import Settings, SettingsError
from broker.supervisor import FIRST_PAUSE, LONGEST_PAUSE, Supervisor, WorkerProcess
from broker.worker_process import Order

ORDER = Order(
    number=0,
    sockets=[],
    flags={},
    redis_url=None,
    upstream_url=None,
    metrics_directory=None,
    replaces=False,
)


class FakeWorker:
    """A worker that does what the test says."""

    def __init__(self, order: Order, settings: Settings) -> None:
        self.number = order.number
        self.replaces = order.replaces
        self.settings = settings
        self.expected = False
        self.is_young = True
        self.left = False
        self.pid = id(self)
        self._ready: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def serve(self) -> None:
        self._ready.set_result(True)

    def end(self, status: int = 0) -> None:
        if not self._status.done():
            self._status.set_result(status)
        if not self._ready.done():
            self._ready.set_result(False)

    async def is_ready(self) -> bool:
        return await self._ready

    async def ended(self) -> int:
        return await asyncio.shield(self._status)

    def leave(self) -> None:
        self.expected = self.left = True

    def stop(self) -> None:
        self.expected = True
        self.end()

    def kill(self) -> None:
        self.end(-9)


class Service:
    """A supervisor of fake workers.

    Attributes:
        workers: all that were started, in order.
        pauses: that were made before a start.
        settings: what is read at a restart; an error is raised.
    """

    def __init__(self, workers: int) -> None:
        self.workers: list[FakeWorker] = []
        self.pauses: list[float] = []
        self.settings: Settings | SettingsError = Settings(workers=workers)
        self.supervisor = Supervisor(
            Settings(workers=workers), ORDER, load=self._load, start=self._start, pause=self._pause
        )

    async def started(self, count: int) -> FakeWorker:
        """Wait until so many workers were started in all, and return the last one."""
        await eventually(lambda: len(self.workers) == count)
        return self.workers[-1]

    async def serving(self) -> None:
        """Let all workers that were started serve."""
        for worker in self.workers:
            worker.serve()
        assert await self.supervisor.is_up()
        await settle()

    def left(self) -> list[FakeWorker]:
        """Return the workers that were told to leave."""
        return [worker for worker in self.workers if worker.left]

    def restart(self) -> None:
        self.supervisor.restart_wanted.set()

    def _load(self) -> Settings:
        if isinstance(self.settings, SettingsError):
            raise self.settings
        return self.settings

    async def _start(self, order: Order, settings: Settings) -> WorkerProcess:
        self.workers.append(FakeWorker(order, settings))
        return cast("WorkerProcess", self.workers[-1])

    async def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)


async def eventually(happened: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not happened():  # noqa: ASYNC110 - what happens sets no event
            await asyncio.sleep(0)


async def settle() -> None:
    """Let all that can happen now happen."""
    for _ in range(20):
        await asyncio.sleep(0)


@asynccontextmanager
async def running(workers: int = 2) -> AsyncIterator[Service]:
    service = Service(workers)
    task = asyncio.create_task(service.supervisor.run())
    try:
        await service.started(workers)
        yield service
    finally:
        service.supervisor.stopping.set()
        await task


async def test_a_dead_worker_is_replaced_in_its_place() -> None:
    async with running(2) as service:
        await service.serving()
        service.workers[1].end(-11)
        fresh = await service.started(3)
        assert (fresh.number, fresh.replaces) == (2, False)
        assert service.pauses[-1] == FIRST_PAUSE


async def test_pauses_grow_while_workers_die_young() -> None:
    async with running(1) as service:
        await service.serving()
        for count in range(2, 11):
            service.workers[-1].end(1)
            await service.started(count)
        expected = [min(FIRST_PAUSE * 2**n, LONGEST_PAUSE) for n in range(9)]
        assert service.pauses[1:] == expected
        assert expected[-1] == LONGEST_PAUSE
        service.workers[-1].serve()
        await settle()
        service.workers[-1].is_young = False
        service.workers[-1].end(1)
        await service.started(11)
        assert service.pauses[-1] == FIRST_PAUSE


async def test_a_service_whose_first_worker_dies_does_not_start() -> None:
    service = Service(2)
    task = asyncio.create_task(service.supervisor.run())
    (await service.started(2)).end(1)
    assert not await service.supervisor.is_up()
    assert await task == 1


async def test_a_restart_replaces_one_worker_after_the_other() -> None:
    async with running(2) as service:
        await service.serving()
        first, second = service.workers
        service.settings = Settings(workers=2, max_streams=7)
        service.restart()
        fresh = await service.started(3)
        assert (fresh.number, fresh.replaces, fresh.settings.max_streams) == (1, True, 7)
        await settle()
        assert service.left() == [], "before the new one serves"
        fresh.serve()
        await service.started(4)
        assert service.left() == [first]
        service.workers[-1].serve()
        await eventually(lambda: second.left)


async def test_a_restart_ends_at_a_worker_that_does_not_serve() -> None:
    async with running(2) as service:
        await service.serving()
        service.restart()
        (await service.started(3)).end(2)
        await settle()
        assert len(service.workers) == 3
        assert not any(worker.left for worker in service.workers)
        service.restart()  # it can be tried again
        assert (await service.started(4)).replaces


async def test_bad_settings_at_a_restart_change_nothing() -> None:
    async with running(2) as service:
        await service.serving()
        service.settings = SettingsError("PORT must be a port")
        service.restart()
        await settle()
        assert len(service.workers) == 2


@pytest.mark.parametrize("count", [1, 3])
async def test_a_restart_changes_the_number_of_workers(count: int) -> None:
    async with running(2) as service:
        await service.serving()
        old = tuple(service.workers)
        service.settings = Settings(workers=count)
        service.restart()
        for n in range(count):
            (await service.started(3 + n)).serve()
        await eventually(lambda: all(worker.left for worker in old))
        assert [worker.number for worker in service.workers[2:]] == list(range(1, count + 1))


async def test_restarts_wait_while_many_workers_still_leave() -> None:
    async with running(2) as service:
        await service.serving()
        old = tuple(service.workers)
        for count in (3, 4):
            service.restart()
            (await service.started(count)).serve()
        await eventually(lambda: all(worker.left for worker in old))
        service.restart()
        await settle()
        assert len(service.workers) == 4
        old[0].end()
        await service.started(5)


async def test_a_worker_that_left_is_not_replaced() -> None:
    async with running(1) as service:
        await service.serving()
        service.restart()
        (await service.started(2)).serve()
        await eventually(lambda: service.workers[0].left)
        service.workers[0].end()
        await settle()
        assert len(service.workers) == 2


async def test_stopping_stops_workers_that_leave_or_begin() -> None:
    service = Service(1)
    task: asyncio.Task[Any] = asyncio.create_task(service.supervisor.run())
    await service.started(1)
    await service.serving()
    service.restart()
    (await service.started(2)).serve()
    await eventually(lambda: service.workers[0].left)
    service.restart()
    service.workers[0].end()
    await service.started(3)
    service.supervisor.stopping.set()
    assert await task == 0
    assert all(worker.expected for worker in service.workers)
