"""Run several workers on one port: the parent that starts, watches, replaces and stops them.

The parent opens the listening sockets once, and each worker inherits them (`broker/worker_process.py`). A connection
waits in the one queue of the kernel until any worker takes it, so none is refused or lost while workers come and go.
Sockets of their own (`SO_REUSEPORT`) would lose what waits for a worker that ends.

The embedded Valkey and the rehearsal upstream belong to the parent, and outlive every worker. The parent relays
nothing and imports no library of the service. A worker is a new interpreter, so a restart runs new code too. What a
worker does when it is replaced or stopped is in `broker/service.py`.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import structlog

from broker.process import BACKLOG, address_line, embedded_store, log_address, raise_file_limit
from broker.settings import SettingsError, setting_name
from broker.worker_process import READY, Order

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping

    from broker.settings import Settings

log = structlog.get_logger(__name__)

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds before a dead worker is replaced. They double with each worker of a place that dies young."""

YOUNG = 60.0
"""Seconds from its start in which the death of a worker counts as young."""

START_TIMEOUT = 60.0
"""Seconds from the start of a worker until it serves."""

STOP_SPARE = 8.0
"""Seconds that a worker may take to end, in addition to the time that its streams have."""

_WORKER = Path(__file__).with_name("worker_main.py")
_MEMORY = Path("/dev/shm")  # noqa: S108 - a private directory is made in it
_FIXED = ("host", "port")


class Command(NamedTuple):
    """How the service was started.

    Attributes:
        flags: settings that were given as flags.
        environment: of the process, as it was at its start.
        rehearsal: run a scripted upstream beside the service and use it.
        embedded: run an embedded Valkey even where the service can be reached from outside.
        load: reads and checks all settings again; raises `SettingsError`.
        say: shows a line to the person who started it.
    """

    flags: Mapping[str, str | None]
    environment: Mapping[str, str]
    rehearsal: bool
    embedded: bool
    load: Callable[[], Settings]
    say: Callable[[str], None]


def serve(settings: Settings, command: Command) -> int:
    """Run the service until it is stopped, and return the exit status.

    Raises:
        OSError: the address is not available.
        StoreUnavailable: the embedded Valkey did not start.
    """
    raise_file_limit()
    with (
        embedded_store(settings, wanted=command.embedded) as redis_url,
        _metrics_directory() as directory,
        asyncio.Runner() as runner,
    ):
        status = runner.run(_serve(settings, command, redis_url, directory))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the loop is about to restore the default
        return status


async def _serve(
    settings: Settings, command: Command, redis_url: str | None, metrics_directory: Path | None
) -> int:
    async with AsyncExitStack() as stack:
        url = None
        if command.rehearsal:
            from broker.rehearsal.app import rehearsal_beside  # noqa: PLC0415 - only here, and it takes time

            url = await stack.enter_async_context(rehearsal_beside())
        sockets = await _listen(settings)
        for each in sockets:
            stack.callback(each.close)
        flags = {**command.flags, "host": settings.host, "port": str(settings.port)}
        order = Order(
            number=0,
            sockets=[each.fileno() for each in sockets],
            flags=flags,
            redis_url=redis_url,
            upstream_url=url,
            metrics_directory=metrics_directory,
            replaces=False,
        )
        start = partial(WorkerProcess.start, environment=command.environment)
        supervisor = Supervisor(settings, order, load=command.load, start=start)
        supervisor.handle_signals()
        running = asyncio.create_task(supervisor.run())
        if await supervisor.is_up():
            port = int(sockets[0].getsockname()[1])
            command.say(address_line(settings, port))
            log_address(settings, port, rehearsal=command.rehearsal)
        await supervisor.stopping.wait()
        for each in sockets:
            each.close()  # from now on only workers listen, and nobody does when they have ended
        return await running


async def _listen(settings: Settings) -> list[socket.socket]:
    """Open the listening sockets; a name such as localhost has several addresses.

    They listen from now on, so that no other program can take the port; who connects waits for the first worker.
    """
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        asyncio.Protocol, settings.host, settings.port, start_serving=False, backlog=BACKLOG
    )
    sockets = [socket.socket(fileno=os.dup(each.fileno())) for each in server.sockets]
    server.close()
    for each in sockets:
        each.listen(BACKLOG)
    return sockets


@contextmanager
def _metrics_directory() -> Iterator[Path | None]:
    """Make a directory for the metrics of this run, in memory where that is possible."""
    memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    try:
        path = Path(tempfile.mkdtemp(prefix="broker-metrics-", dir=memory))
    except OSError as error:
        log.warning("metrics of the workers cannot be added up, each shows its own", why=str(error))
        yield None
        return
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class WorkerProcess:
    """A worker, as its parent sees it.

    Attributes:
        number: of its place, from 1.
        settings: those when it was started.
        expected: its end is wanted.
    """

    def __init__(self, number: int, settings: Settings, process: asyncio.subprocess.Process) -> None:
        self.number = number
        self.settings = settings
        self.expected = False
        self._process = process
        self._input = cast("asyncio.StreamWriter", process.stdin)  # `start` asks for both pipes
        self._output = cast("asyncio.StreamReader", process.stdout)
        self._started = asyncio.get_running_loop().time()

    @classmethod
    async def start(cls, order: Order, settings: Settings, environment: Mapping[str, str]) -> WorkerProcess:
        """Start a worker. It has a session of its own, so that Ctrl-C at the terminal reaches only the parent."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", _WORKER, str(order.number)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=order.sockets,
            start_new_session=True,
            env=environment,
        )
        worker = cls(order.number, settings, process)
        worker._input.write(f"{order.model_dump_json()}\n".encode())
        return worker

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self._process.pid

    @property
    def is_young(self) -> bool:
        """True if it was started a short while ago."""
        return asyncio.get_running_loop().time() - self._started < YOUNG

    async def is_ready(self) -> bool:
        """Wait until it serves. Returns False if it ends before, or has not begun in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT):
                return await self._output.readline() == READY
        return False

    async def ended(self) -> int:
        """Wait for its end. Returns its exit status, or the negative number of a signal."""
        return await self._process.wait()

    def leave(self) -> None:
        """Let it finish its streams, which end by their deadline, and then itself."""
        self.expected = True
        self._input.close()
        asyncio.get_running_loop().call_later(self.settings.deadline + STOP_SPARE, self.kill)

    def stop(self) -> None:
        """Let it drain."""
        self.expected = True
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)


class Supervisor:
    """Keeps a number of workers running.

    Args:
        settings: all settings.
        order: what each worker is told, but for its number.
        load: reads and checks all settings again; raises `SettingsError`.
        start: starts a worker with these settings.
        pause: waits for so many seconds.

    Attributes:
        stopping: set when the service is to end.
        restart_wanted: set when all workers are to be replaced.
    """

    def __init__(
        self,
        settings: Settings,
        order: Order,
        *,
        load: Callable[[], Settings],
        start: Callable[[Order, Settings], Awaitable[WorkerProcess]],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.stopping = asyncio.Event()
        self._settings = settings
        self._order = order
        self._load = load
        self._start = start
        self._pause = pause
        self._places = set(range(1, settings.workers + 1))
        self._serving: dict[int, WorkerProcess] = {}
        self._alive: set[WorkerProcess] = set()
        self._pauses: dict[int, float] = {}
        self._up = asyncio.Event()
        self._one_ended = asyncio.Event()
        self.restart_wanted = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed = False

    def handle_signals(self) -> None:
        """Stop at SIGTERM and SIGINT, end at once at a second one, and restart the workers at SIGHUP."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGHUP, self.restart_wanted.set)

    async def is_up(self) -> bool:
        """Wait until a worker serves. Returns False if the service ends before."""
        waits = [asyncio.create_task(each.wait()) for each in (self._up, self.stopping)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for each in waits:
            each.cancel()
        return self._up.is_set()

    async def run(self) -> int:
        """Keep the workers running until the service is to end, and return the exit status."""
        for number in sorted(self._places):
            self._spawn(self._keep_filled(number))
        self._spawn(self._restart_when_asked())
        await self.stopping.wait()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._end_all()
        return 1 if self._failed else 0

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._report_bug)
        return task

    def _report_bug(self, task: asyncio.Task[None]) -> None:
        """End the service after an exception that nobody expected: a parent that does nothing must not go on."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the parent of the workers failed", exc_info=error)
            self._failed = True
            self.stopping.set()

    async def _keep_filled(self, number: int) -> None:
        """Start workers in a place until one serves."""
        while number in self._places and number not in self._serving:
            await self._pause(self._pauses.get(number, 0))
            await self._fill(number, self._settings)

    async def _fill(self, number: int, settings: Settings, *, replaces: bool = False) -> bool:
        """Start a worker in a place. Returns True once it serves; the one that served there before then leaves."""
        told = {"number": number, "replaces": replaces}
        worker = await self._start(self._order.model_copy(update=told), settings)
        self._alive.add(worker)
        watching = self._spawn(self._watch(worker))
        log.info("worker started", number=number, pid=worker.pid)
        if not await worker.is_ready():
            worker.kill()
            await asyncio.wait([watching])
            return False
        before, self._serving[number] = self._serving.get(number), worker
        if before is not None:
            before.leave()
        if not watching.done():
            self._up.set()
        return True

    async def _watch(self, worker: WorkerProcess) -> None:
        """Wait for the end of a worker, and have it replaced if it was not wanted."""
        status = await worker.ended()
        self._alive.discard(worker)
        self._one_ended.set()
        number = worker.number
        if worker.expected:
            log.info("worker ended", number=number, pid=worker.pid, status=_words(status))
            return
        before = self._pauses.get(number, 0) if worker.is_young else 0
        self._pauses[number] = min(max(before * 2, FIRST_PAUSE), LONGEST_PAUSE)
        log.error(
            "worker died", number=number, pid=worker.pid, status=_words(status), pause=self._pauses[number]
        )
        if not self._up.is_set():  # it will not be better the next time
            self._failed = True
            self.stopping.set()
        if self._serving.get(number) is worker:
            del self._serving[number]
            self._spawn(self._keep_filled(number))

    async def _restart_when_asked(self) -> None:
        while True:
            await self.restart_wanted.wait()
            self.restart_wanted.clear()
            try:
                settings = self._load()
            except SettingsError as error:
                log.warning("workers not restarted, the old ones go on", reason=str(error))
                continue
            await self._restart(settings)

    async def _restart(self, settings: Settings) -> None:
        """Replace all workers one by one; each serves before its predecessor leaves."""
        for field in _FIXED:
            if getattr(settings, field) != getattr(self._settings, field):
                log.warning("setting has changed and needs a restart", name=setting_name(field))
        log.info("restarting the workers", workers=settings.workers)
        for number in range(1, settings.workers + 1):
            await self._few_leave(max(settings.workers, len(self._serving)))
            self._places.add(number)
            if not await self._fill(number, settings, replaces=True):
                log.warning(
                    "workers not restarted, the old ones go on",
                    reason="the new one does not serve",
                    number=number,
                )
                self._places &= self._serving.keys() | set(range(1, self._settings.workers + 1))
                return
        self._places = set(range(1, settings.workers + 1))
        for number in self._serving.keys() - self._places:
            self._serving.pop(number).leave()
        self._settings = settings.model_copy(
            update={field: getattr(self._settings, field) for field in _FIXED}
        )
        log.info("workers restarted", workers=settings.workers)

    async def _few_leave(self, limit: int) -> None:
        """Wait until fewer workers than ``limit`` are leaving, so that many restarts do not fill the memory."""
        while sum(worker.expected for worker in self._alive) >= limit:
            self._one_ended.clear()
            await self._one_ended.wait()

    def _stop(self, number: int) -> None:
        if self.stopping.is_set():
            for worker in self._alive:
                worker.kill()
            os._exit(128 + number)
        self.stopping.set()

    async def _end_all(self) -> None:
        """Let all workers drain at the same time, and kill each that takes too long."""
        if not self._alive:
            return
        log.info("draining", workers=len(self._alive), seconds=self._settings.drain_timeout)
        ends = {asyncio.create_task(worker.ended()) for worker in self._alive}
        for worker in self._alive:
            worker.stop()
        within = max(worker.settings.drain_timeout for worker in self._alive) + STOP_SPARE
        _, late = await asyncio.wait(ends, timeout=within)
        if late:
            log.error("workers did not end in time and are killed", workers=len(late))
            for worker in self._alive:
                worker.kill()
            await asyncio.wait(late)


def _words(status: int) -> str:
    """Return an exit status in words: its number, or the name of the signal."""
    with suppress(ValueError):
        return str(status) if status >= 0 else signal.Signals(-status).name
    return f"signal {-status}"
