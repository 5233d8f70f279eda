"""Run the service as a process: its event loop, its signals, its listener, and the order of its shutdown.

The parts of the service are built in `broker.app`. One worker is the whole service, and runs by `serve`. Of several,
each runs by `serve_for_parent`, in a process that `broker.worker_process` prepares and `broker.supervisor` starts.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple, cast

import structlog
from aiohttp import web

from broker.core.errors import StoreUnavailable
from broker.logs import configure_logs
from broker.mount import mount
from broker.process import BACKLOG, address_line, embedded_store, log_address, raise_file_limit
from broker.relay.tasks import keep_running
from broker.secret_reload import SecretReload, SecretUsers
from broker.web import keys
from broker.web.server import runner_for
from broker.web.shared_listener import SharedListener

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path
    from typing import Any

    from broker.settings import LoadedSecrets, Settings

log = structlog.get_logger(__name__)

KNOCK_EVERY = 0.2
"""Seconds between two questions whether Redis answers."""

LINGER = 1.0
"""Seconds that a worker that is replaced still answers on its open connections, with `Connection: close`. Who uses such
a connection often has left it by then, and no request is lost at its close."""


class Parent(NamedTuple):
    """What a worker has from its parent.

    Attributes:
        number: of this worker, from 1.
        sockets: the listening sockets that all workers share.
        redis_url: that of the embedded Valkey; None where the settings name another.
        metrics_directory: where the workers add up their metrics.
        replaces: another worker still serves, and ends when this one is ready: nothing is served before Redis answers.
        report_ready: tells the parent that this worker serves.
        watch: calls a function once the parent wants this worker to leave, or has died itself. It is called with an
            event loop running.
    """

    number: int
    sockets: list[socket.socket]
    redis_url: str | None
    metrics_directory: Path | None
    replaces: bool
    report_ready: Callable[[], None]
    watch: Callable[[Callable[[], None]], None]


def serve(
    settings: Settings,
    *,
    load: Callable[[], LoadedSecrets],
    say: Callable[[str], None],
    rehearsal: bool,
    embedded: bool,
) -> int:
    """Run the service until it is stopped, and return the exit status.

    Args:
        settings: all settings.
        load: reads all secrets again, as `load_secrets` does.
        say: shows a line to the person who started it.
        rehearsal: run a scripted upstream beside the service and use it.
        embedded: run an embedded Valkey even where the service can be reached from outside.
    """
    raise_file_limit()
    with embedded_store(settings, wanted=embedded) as redis_url:
        return _run(_serve(settings, redis_url, load=load, say=say, rehearsal=rehearsal))


def serve_for_parent(settings: Settings, parent: Parent, *, load: Callable[[], LoadedSecrets]) -> int:
    """Run one worker of several until it is stopped, and return the exit status."""
    raise_file_limit()
    return _run(_serve_for_parent(settings, parent, load=load))


def _run(service: Coroutine[Any, Any, None]) -> int:
    with _new_runner() as runner:
        runner.run(service)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the loop is about to restore the default
    return 0


async def _serve(
    settings: Settings,
    redis_url: str | None,
    *,
    load: Callable[[], LoadedSecrets],
    say: Callable[[str], None],
    rehearsal: bool,
) -> None:
    stopping = _stop_on_signals(second=os._exit)
    async with AsyncExitStack() as stack:
        if rehearsal:
            from broker.rehearsal.app import rehearsal_beside  # noqa: PLC0415 - only here, and it takes time

            url = await stack.enter_async_context(rehearsal_beside())
            settings = rehearsed(settings, url)
        runner = await stack.enter_async_context(_running(settings, redis_url, load))
        site = web.TCPSite(runner, settings.host, settings.port, backlog=BACKLOG)
        await site.start()
        port = int(runner.addresses[0][1]) if runner.addresses else settings.port
        say(address_line(settings, port))
        log_address(settings, port, rehearsal=rehearsal)
        _relieve_collector()
        await stopping.wait()
        await runner.app.shutdown()  # drains, while the listener still answers the proxy and the pages
        await site.stop()


async def _serve_for_parent(settings: Settings, parent: Parent, *, load: Callable[[], LoadedSecrets]) -> None:
    # The parent knows whether a second signal means haste, for a service manager may send one to every process.
    stopping, leaving = _stop_on_signals(second=lambda _: None), asyncio.Event()
    parent.watch(leaving.set)
    async with AsyncExitStack() as stack:
        runner = await stack.enter_async_context(_running(settings, parent.redis_url, load, parent))
        if parent.replaces and not await _first_of(_redis_answers(runner.app), stopping, leaving):
            return
        listener = SharedListener(cast("web.Server", runner.server), parent.sockets)
        stack.callback(listener.close)
        listener.start()
        parent.report_ready()
        log.info("worker ready")
        _relieve_collector()
        await _first_of(stopping.wait(), leaving)
        if not stopping.is_set():
            listener.close()  # the others take new connections
            await _first_of(_leave(runner.app, settings), stopping)
        await runner.app.shutdown()


async def _leave(app: web.Application, settings: Settings) -> None:
    """Start nothing new, and finish all streams. None of them can take longer than the deadline."""
    log.info("leaving", streams=len(app[keys.WORKER].running))
    await asyncio.gather(app[keys.WORKER].leave(settings.deadline), asyncio.sleep(LINGER))


async def _redis_answers(app: web.Application) -> None:
    """Wait until Redis has answered once."""
    store = app[keys.STORE]
    while not store.has_answered:
        try:
            await store.takes_writes()
        except StoreUnavailable:
            await asyncio.sleep(KNOCK_EVERY)


async def _first_of(work: Coroutine[Any, Any, object], *events: asyncio.Event) -> bool:
    """Do some work until it is done or an event is set. Returns True if it is done."""
    tasks = [asyncio.create_task(each) for each in (work, *(event.wait() for event in events))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
            return True
        return False
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def rehearsed(settings: Settings, upstream_url: str) -> Settings:
    """Return the settings with the scripted upstream."""
    values = {"upstream_url": upstream_url, "upstream_kind": "openrouter", "upstream_proxy": None}
    return settings.model_copy(update=values)


@asynccontextmanager
async def _running(
    settings: Settings, redis_url: str | None, load: Callable[[], LoadedSecrets], parent: Parent | None = None
) -> AsyncIterator[web.AppRunner]:
    """Run all parts of the service during the block; the caller opens and closes the listener."""
    settings = settings.model_copy(update={"redis_url": redis_url or settings.redis_url})
    app = web.Application()
    mount(app, "", settings, metrics_directory=parent.metrics_directory if parent is not None else None)
    runner = runner_for(app, settings)
    try:
        await runner.setup()
        number = parent.number if parent is not None else None
        async with _reloading_secrets(settings, load, app, store_is_given=redis_url is None, number=number):
            yield runner
    finally:
        await runner.cleanup()


def _new_runner() -> asyncio.Runner:
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        return asyncio.Runner()
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


def _stop_on_signals(*, second: Callable[[int], object]) -> asyncio.Event:
    """Return an event that the first SIGTERM or SIGINT sets. ``second`` is called at each further one."""
    stopping = asyncio.Event()

    def stop(number: int) -> None:
        if stopping.is_set():
            second(128 + number)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    return stopping


@asynccontextmanager
async def _reloading_secrets(
    settings: Settings,
    load: Callable[[], LoadedSecrets],
    app: web.Application,
    *,
    store_is_given: bool,
    number: int | None,
) -> AsyncIterator[None]:
    """Read secrets, system message and clients file again at SIGHUP, which never ends the service.

    They are also read again when their files change.
    """
    reload = SecretReload(
        settings,
        load=load,
        users=SecretUsers(
            upstream=app[keys.UPSTREAM],
            resolver=app[keys.RESOLVER],
            known=app[keys.KNOWN_CLIENTS],
            naming=app[keys.NAMING],
            metrics=app[keys.METRICS_TOKEN],
            store=app[keys.STORE] if store_is_given else None,
        ),
        hide=lambda secrets: configure_logs(
            settings.log_level, settings.log_format, secrets=secrets, worker=number
        ),
    )

    def read_again() -> None:
        reload.ask()
        app[keys.SYSTEM].read_again()
        if (clients := app[keys.KNOWN_CLIENTS].file) is not None:
            clients.ask()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, read_again)
    task = asyncio.create_task(keep_running("secrets", reload.run))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _relieve_collector() -> None:
    """Exclude objects that live as long as the process from garbage collection.

    With openai imported a full collection stops the loop for 49 ms, and after a freeze for 0.001 (measured); objects
    of the service itself are freed by their reference counts.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
