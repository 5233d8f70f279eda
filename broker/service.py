"""Run the service as a process: its event loop, its signals, its listener, and the order of its shutdown.

The parts of the service are built in `broker.app`.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import structlog
from aiohttp import web

from broker.logs import configure_logs
from broker.mount import mount
from broker.relay.tasks import keep_running
from broker.secret_reload import SecretReload, SecretUsers
from broker.settings import open_door
from broker.web import keys
from broker.web.server import runner_for

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from broker.settings import LoadedSecrets, Settings

log = structlog.get_logger(__name__)

_OF_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - nothing is bound here

BACKLOG = 4096
"""Connections that may wait to be accepted, because all pages of a lost worker reconnect at the same time."""


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
    _raise_file_limit()
    with _embedded_store(settings, wanted=embedded or settings.redis_url is None) as redis_url:
        runner = _new_runner()
        with runner:
            status = runner.run(_serve(settings, redis_url, load=load, say=say, rehearsal=rehearsal))
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the loop is about to restore the default
            return status


async def _serve(
    settings: Settings,
    redis_url: str,
    *,
    load: Callable[[], LoadedSecrets],
    say: Callable[[str], None],
    rehearsal: bool,
) -> int:
    stopping = _stop_on_signals()
    async with AsyncExitStack() as stack:
        # The host is given in any case, for here it is known where the application listens.
        given = settings.redis_url == redis_url  # else it is embedded
        settings = settings.model_copy(update={"host": settings.host, "redis_url": redis_url})
        if rehearsal:
            from broker.rehearsal.app import rehearsal_beside  # noqa: PLC0415 - only here, and it takes time

            url = await stack.enter_async_context(rehearsal_beside())
            rehearsed = {"upstream_url": url, "upstream_kind": "openrouter", "upstream_proxy": None}
            settings = settings.model_copy(update=rehearsed)
        app = web.Application()
        mount(app, "", settings)
        runner = runner_for(app, settings)
        stack.push_async_callback(runner.cleanup)
        await runner.setup()
        await stack.enter_async_context(_reloading_secrets(settings, load, app, store_is_given=given))
        site = web.TCPSite(runner, settings.host, settings.port, backlog=BACKLOG)
        await site.start()
        say(_address_line(runner, settings))
        _log_address(runner, settings, rehearsal=rehearsal)
        _relieve_collector()
        await stopping.wait()
        await app.shutdown()  # drains, while the listener still answers the proxy and the pages
        await site.stop()
    return 0


@contextmanager
def _embedded_store(settings: Settings, *, wanted: bool) -> Iterator[str]:
    if not wanted and settings.redis_url is not None:
        yield settings.redis_url
        return
    from broker.store.embedded import embedded_valkey  # noqa: PLC0415 - only where it is used

    with embedded_valkey() as url:
        yield url


def _new_runner() -> asyncio.Runner:
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        return asyncio.Runner()
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


def _stop_on_signals() -> asyncio.Event:
    """Return an event that the first SIGTERM or SIGINT sets. The second one ends the process at once."""
    stopping = asyncio.Event()

    def stop(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)
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
        hide=lambda secrets: configure_logs(settings.log_level, settings.log_format, secrets=secrets),
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


def _raise_file_limit() -> None:
    """Raise the limit of open files. Each stream needs two, and the usual limit is made for programs with `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):
            log.warning("the limit on open files stays low", limit=soft)


def _relieve_collector() -> None:
    """Exclude objects that live as long as the process from garbage collection.

    With openai imported a full collection stops the loop for 49 ms, and after a freeze for 0.001 (measured); objects
    of the service itself are freed by their reference counts.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _address_line(runner: web.AppRunner, settings: Settings) -> str:
    """Return the address to open, as one line for the person who started the service. It is not a log line."""
    # "Every address" cannot be opened in a browser.
    host = _OF_EVERY_ADDRESS.get(settings.host, settings.host)
    verb = "Open" if settings.page else "Listening at"
    return f"{verb} {_url(host, _port(runner, settings))}"


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _port(runner: web.AppRunner, settings: Settings) -> int:
    return int(runner.addresses[0][1]) if runner.addresses else settings.port


def _log_address(runner: web.AppRunner, settings: Settings, *, rehearsal: bool) -> None:
    url = _url(settings.host, _port(runner, settings))
    log.info("listening", url=url, rehearsal=rehearsal, **_limits_in_force(settings))
    if (warning := open_door(settings)) is not None:
        log.warning(warning)


def _limits_in_force(settings: Settings) -> dict[str, str]:
    """Return the limits in force, for the one line at the start."""
    limits = {
        "rate": f"{settings.rate_limit.count}/{settings.rate_limit.seconds}s",
        "streams": str(settings.max_concurrent_streams),
        "daily_tokens": str(settings.daily_tokens or ""),
        "daily_cost": str(settings.daily_cost or ""),
        "monthly_cost": str(settings.monthly_cost or ""),
        "total_daily_cost": str(settings.total_daily_cost or ""),
        "identity": "required" if settings.needs_identity else "address",
    }
    return {name: value for name, value in limits.items() if value}
