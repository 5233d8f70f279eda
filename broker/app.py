"""The composition root: builds everything, hands it down as arguments, runs it and takes it down again.

What the service does is elsewhere; here is only who gets whom, and in which order things start and stop.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import secrets
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import structlog
from aiohttp import web

from broker.admission import Admission
from broker.catalog import Catalog
from broker.core.origins import Origins
from broker.relay.reading import Bounds
from broker.relay.registry import Limits, Registry
from broker.relay.ticker import tick
from broker.store.catalog import CatalogStore
from broker.store.connection import Store
from broker.store.idempotency import IdempotencyStore
from broker.store.journal import JournalStore
from broker.store.sessions import SessionStore
from broker.store.workers import WorkerStore
from broker.upstream.client import UpstreamClient
from broker.upstream.models import fetch_models
from broker.web import keys
from broker.web.identity import Identifier
from broker.web.routes import build_web

if TYPE_CHECKING:
    from broker.core.pricing import Prices
    from broker.settings import Settings

log = structlog.get_logger(__name__)

AFTER_DEADLINE = 60
"""Seconds that a running session's keys outlive its deadline and its journal."""

SPARE_CONNECTIONS = 20
"""Connections to the upstream beside those of the streams: the list of models, streams that are just ending."""

BACKLOG = 4096
"""Connections that may wait to be accepted: pages that lost a worker all come at once."""


def serve(settings: Settings, *, rehearsal: bool, embedded: bool) -> int:
    """Run the service until it is told to stop; returns the exit status.

    Args:
        settings: all of them.
        rehearsal: run a scripted upstream beside the service and use that.
        embedded: run a Valkey of our own even where the service can be reached from outside.
    """
    _raise_file_limit()
    with _embedded_store(settings, wanted=embedded or settings.redis_url is None) as redis_url:
        runner = _new_runner()
        with runner:
            return runner.run(_serve(settings, redis_url, rehearsal=rehearsal))


async def _serve(settings: Settings, redis_url: str, *, rehearsal: bool) -> int:
    stopping = _stop_on_signals()
    async with AsyncExitStack() as stack:
        upstream_url = settings.upstream_url
        if rehearsal:
            from broker.rehearsal.app import rehearsal_beside  # noqa: PLC0415 - only here, and it takes time

            upstream_url = await stack.enter_async_context(rehearsal_beside())
        app = await stack.enter_async_context(build(settings, redis_url, upstream_url))
        registry = app[keys.REGISTRY]
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, settings.host, settings.port, backlog=BACKLOG)
        await site.start()
        _tell_where(runner, settings, rehearsal=rehearsal)
        _calm_collector()
        await stopping.wait()
        log.info("draining", seconds=settings.drain_timeout)
        await registry.drain(settings.drain_timeout)
        await site.stop()
    return 0


@asynccontextmanager
async def build(settings: Settings, redis_url: str, upstream_url: str) -> AsyncIterator[web.Application]:
    """The application with all it needs, started; on the way out, everything is closed in the opposite order."""
    async with AsyncExitStack() as stack:
        store = Store(redis_url, settings.key_prefix)
        stack.push_async_callback(store.close)
        upstream = _upstream(settings, upstream_url)
        stack.push_async_callback(upstream.close)
        catalog = _catalog(settings, store, upstream, upstream_url)
        stack.push_async_callback(catalog.close)
        running_ttl = int(settings.deadline) + settings.resume_ttl + AFTER_DEADLINE
        sessions = SessionStore(
            store,
            session_ttl=settings.session_ttl,
            running_ttl=running_ttl,
            resume_ttl=settings.resume_ttl,
        )
        registry = _registry(settings, store, sessions, upstream, catalog, running_ttl)
        stack.push_async_callback(registry.close)
        registry.start()
        app = build_web(settings)
        app[keys.SETTINGS] = settings
        app[keys.STORE] = store
        app[keys.STORE_SEEN] = asyncio.Event()
        app[keys.CATALOG] = catalog
        app[keys.REGISTRY] = registry
        app[keys.ORIGINS] = Origins(
            frozenset(origin.lower() for origin in settings.cors_origins), settings.listens_on_loopback
        )
        key = settings.openrouter_api_key
        app[keys.IDENTIFIER] = Identifier(key.get_secret_value() if key is not None else "")
        idempotency = IdempotencyStore(store, ttl=settings.session_ttl + running_ttl)
        app[keys.ADMISSION] = Admission(
            settings=settings, catalog=catalog, sessions=sessions, idempotency=idempotency
        )
        await stack.enter_async_context(
            _background(tick(registry, heartbeat=settings.heartbeat, ping_events=settings.ping_events))
        )
        yield app


def _upstream(settings: Settings, url: str) -> UpstreamClient:
    key = settings.openrouter_api_key
    return UpstreamClient(
        base_url=url,
        api_key=key.get_secret_value() if key is not None else "rehearsal",
        title=settings.x_title,
        connect_timeout=settings.connect_timeout,
        max_connections=settings.max_streams + SPARE_CONNECTIONS,
    )


def _catalog(settings: Settings, store: Store, upstream: UpstreamClient, url: str) -> Catalog:
    async def fetch() -> bytes:
        return await fetch_models(upstream.openai)

    return Catalog(fetch, CatalogStore(store, url), ttl=settings.models_ttl)


def _registry(
    settings: Settings,
    store: Store,
    sessions: SessionStore,
    upstream: UpstreamClient,
    catalog: Catalog,
    running_ttl: int,
) -> Registry:
    worker = secrets.token_hex(8)

    async def prices_of(model: str) -> Prices | None:
        found = (await catalog.known([model], timeout=0)).get(model)
        return found.prices if found is not None else None

    return Registry(
        sessions=sessions,
        journal=JournalStore(store, worker=worker, running_ttl=running_ttl),
        workers=WorkerStore(store, worker=worker),
        upstream=upstream,
        bounds=Bounds(
            first_data_timeout=settings.first_data_timeout,
            idle_timeout=settings.idle_timeout,
            deadline=settings.deadline,
            grace=settings.grace,
            max_response=settings.max_response,
            max_retries=settings.max_retries,
        ),
        prices_of=prices_of,
        limits=Limits(
            max_streams=settings.max_streams,
            session_ttl=settings.session_ttl,
            resume_ttl=settings.resume_ttl,
            journal_interval=settings.journal_interval_ms / 1000,
        ),
    )


@asynccontextmanager
async def _background(work: Coroutine[Any, Any, Any]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


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
    """Set at the first SIGTERM or SIGINT. The second ends the process at once."""
    stopping = asyncio.Event()

    def stop(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    return stopping


def _raise_file_limit() -> None:
    """Each stream takes two files, and the usual soft limit of 1024 is for programs that use `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):
            log.warning("the limit on open files stays low", limit=soft)


def _calm_collector() -> None:
    """Keep the garbage collector off everything that lives as long as the process.

    With openai imported a full collection stops the loop for 49 ms, and after a freeze for 0.001 (measured); what the
    service makes itself is freed by its reference counts.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _tell_where(runner: web.AppRunner, settings: Settings, *, rehearsal: bool) -> None:
    port = runner.addresses[0][1] if runner.addresses else settings.port
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    log.info("listening", url=f"http://{host}:{port}", rehearsal=rehearsal)
