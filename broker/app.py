"""The composition root: builds all parts and passes them to each other as arguments."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from broker import __version__
from broker.bytes_per_token import BytesPerToken
from broker.catalog import Catalog
from broker.core.accounts import Quotas
from broker.core.client_limits import LimitsInForce, ServiceLimits
from broker.core.errors import StoreUnavailable
from broker.core.origins import Origins
from broker.core.pricing import to_nano
from broker.core.speed import estimate_speed
from broker.core.upstream_kind import UpstreamKind
from broker.metrics import Metrics
from broker.naming import Naming
from broker.prepare import Admission
from broker.relay.config import GenerationLimits, Money, WorkerConfig
from broker.relay.hub import Hub
from broker.relay.results import Results
from broker.relay.tasks import keep_running
from broker.relay.ticker import tick
from broker.relay.worker import Worker
from broker.settings import otlp_protocols
from broker.store.accounts import AccountStore
from broker.store.bytes_per_token import BytesPerTokenStore
from broker.store.connection import Store, cause_of
from broker.store.idempotency import IdempotencyStore
from broker.store.journal import JournalStore
from broker.store.model_list import CatalogStore
from broker.store.names import NameStore
from broker.store.pending import PendingStore
from broker.store.rates import Rates
from broker.store.sessions import SessionStore
from broker.store.workers import WorkerInfo, WorkerStore
from broker.system_message import SystemMessage
from broker.telemetry.interface import NO_TELEMETRY
from broker.upstream.client import UpstreamClient
from broker.upstream.generations import fetch_generation
from broker.upstream.model_list import fetch_models
from broker.web import keys
from broker.web.metrics_token import MetricsToken
from broker.web.occupancy import Occupancy
from broker.web.refused_origins import RefusedOrigins
from broker.web.turns import Turns
from broker.web.waiting import WaitingPages

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from aiohttp import web

    from broker.core.pricing import Prices
    from broker.identity.known_clients import KnownClients
    from broker.metrics_directory import MetricsDirectory
    from broker.relay.results import OnEnd
    from broker.settings import Settings
    from broker.telemetry.interface import Telemetry
    from broker.web.identity import ClientResolver

log = structlog.get_logger(__name__)

AFTER_DEADLINE = 60
"""Seconds that a running session's keys outlive its deadline and its journal."""

PRICES_TIMEOUT = 2.0
"""Seconds from its start in which a worker without a list lets the end of an answer without a cost wait for prices."""

NO_KEY = "rehearsal-key-that-opens-nothing"
"""Stands for the upstream's key where none is needed. Keys are removed from messages, so this is not a common word."""

LONGEST_REASON = 200
"""Characters of another library's error in a log line."""

SPARE_CONNECTIONS = 20
"""Connections to the upstream in addition to those of streams: for the list of models, and streams that are ending."""


BuildClients = Callable[["Settings", "Naming", "KnownClients"], "ClientResolver"]
"""Builds the part that identifies clients."""


@asynccontextmanager
async def build(
    app: web.Application,
    settings: Settings,
    redis_url: str,
    *,
    clients: BuildClients,
    known: KnownClients,
    on_end: OnEnd | None = None,
    telemetry: Telemetry | None = None,
    metrics_directory: Path | None = None,
) -> AsyncIterator[None]:
    """Give the web application all that it needs, started. At the end, everything is closed in the opposite order.

    Args:
        app: the application of the broker alone.
        settings: all settings.
        redis_url: replaces that of the settings.
        clients: builds the part that identifies clients.
        known: the clients that have keys.
        on_end: gets the result of every answer that ended here.
        telemetry: takes the spans; by default that of the standard variables.
        metrics_directory: where the workers of this host add up their metrics; None for a worker alone.
    """
    async with AsyncExitStack() as stack:
        metrics = app[keys.METRICS] = Metrics()
        store = app[keys.STORE] = Store(redis_url, settings.key_prefix, observe=metrics.asked_redis)
        stack.push_async_callback(store.close)
        kind = UpstreamKind(settings.upstream_kind, settings.upstream_url)
        telemetry = app[keys.TELEMETRY] = telemetry or _telemetry(settings.upstream_url, kind)
        stack.push_async_callback(telemetry.close)
        upstream = await _upstream(stack, settings, store, kind)
        app[keys.UPSTREAM], app[keys.CATALOG] = upstream.client, upstream.catalog
        quotas = _quotas(settings)
        stores = _stores(settings, store, quotas)
        app[keys.ACCOUNTS] = stores.accounts
        results = Results(on_end) if on_end is not None else None
        if results is not None:
            app[keys.RESULTS] = results
            stack.push_async_callback(results.close)
        worker = app[keys.WORKER] = _worker(settings, upstream, stores, results, metrics, telemetry)
        stack.push_async_callback(worker.close)
        limits = app[keys.LIMITS] = _service_limits(settings, quotas)
        app[keys.HUB] = _hub(worker, stores, limits, known)
        waiting = app[keys.WAITING] = WaitingPages()
        metrics.watch(worker, stores.sessions, store, upstream.client, waiting, quotas)
        worker.start()
        _add_checks(app, settings)
        app[keys.TURNS] = Turns(streaming=lambda: bool(worker.viewers))
        app[keys.KNOWN_CLIENTS] = known
        naming = app[keys.NAMING] = await stack.enter_async_context(_naming(settings, store))
        app[keys.RESOLVER] = await stack.enter_async_context(clients(settings, naming, known))
        await stack.enter_async_context(_reading(known))
        system = app[keys.SYSTEM] = SystemMessage(settings.system_file)
        admission = app[keys.ADMISSION] = _admission(settings, store, upstream, stores, limits, system)
        stack.push_async_callback(admission.close)
        await stack.enter_async_context(_timers(settings, worker, metrics, metrics_directory))
        await _prepare_redis(store)
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class _Upstream:
    """The service that is asked, and what is known of its models."""

    client: UpstreamClient
    catalog: Catalog
    bytes_per_token: BytesPerToken
    speeds: BytesPerToken


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stores:
    """What sessions and accounts have in Redis."""

    sessions: SessionStore
    journal: JournalStore
    workers: WorkerStore
    accounts: AccountStore
    pending: PendingStore


async def _upstream(stack: AsyncExitStack, settings: Settings, store: Store, kind: UpstreamKind) -> _Upstream:
    """Build the parts that ask the upstream; ``stack`` closes them."""
    url = settings.upstream_url
    client = UpstreamClient(
        base_url=url,
        api_key=_upstream_key(settings) or NO_KEY,
        title=settings.x_title,
        connect_timeout=settings.connect_timeout,
        max_connections=settings.max_streams + SPARE_CONNECTIONS,
        speaks_openrouter=lambda: kind.openrouter,
        proxy=settings.proxy_for(url),
    )
    stack.push_async_callback(client.close)
    fetch = partial(fetch_models, client.openai)
    catalog = Catalog(fetch, CatalogStore(store, url), kind=kind, ttl=settings.models_ttl)
    stack.push_async_callback(catalog.close)
    await catalog.known((), timeout=0)  # a worker that only streams needs the prices too
    bytes_per_token = BytesPerToken(BytesPerTokenStore(store, url))
    stack.push_async_callback(bytes_per_token.close)
    speeds = BytesPerToken(BytesPerTokenStore(store, url, "speed"), estimate=estimate_speed)
    stack.push_async_callback(speeds.close)
    return _Upstream(client=client, catalog=catalog, bytes_per_token=bytes_per_token, speeds=speeds)


def _stores(settings: Settings, store: Store, quotas: Quotas) -> _Stores:
    """Build the stores of a new worker."""
    worker_id = secrets.token_hex(8)
    running_ttl = _running_ttl(settings)
    return _Stores(
        sessions=SessionStore(
            store,
            session_ttl=settings.session_ttl,
            running_ttl=running_ttl,
            resume_ttl=settings.resume_ttl,
            confirm_by=settings.redis_wait,
        ),
        journal=JournalStore(store, worker=worker_id, running_ttl=running_ttl),
        workers=WorkerStore(store, worker=worker_id, info=_worker_info(worker_id)),
        accounts=AccountStore(store, quotas),
        pending=PendingStore(store, quotas, session_ttl=settings.session_ttl),
    )


def _worker(
    settings: Settings,
    upstream: _Upstream,
    stores: _Stores,
    results: Results | None,
    metrics: Metrics,
    telemetry: Telemetry,
) -> Worker:
    return Worker(
        sessions=stores.sessions,
        journal=stores.journal,
        workers=stores.workers,
        accounts=stores.accounts,
        upstream=upstream.client,
        limits=_generation_limits(settings),
        money=_money(upstream),
        config=_worker_config(settings),
        results=results,
        count=metrics.session_ended,
        note_gap=metrics.gaps.observe,
        telemetry=telemetry,
    )


def _hub(worker: Worker, stores: _Stores, limits: ServiceLimits, known: KnownClients) -> Hub:
    return Hub(
        worker,
        sessions=stores.sessions,
        journal=stores.journal,
        accounts=stores.accounts,
        pending=stores.pending,
        quotas_of=lambda spec: limits.of(known.limits_now(spec.client, spec.limits)).quotas,
    )


def _admission(
    settings: Settings,
    store: Store,
    upstream: _Upstream,
    stores: _Stores,
    limits: ServiceLimits,
    system: SystemMessage,
) -> Admission:
    return Admission(
        store=store,
        settings=settings,
        catalog=upstream.catalog,
        sessions=stores.sessions,
        rates=Rates(store, limit=settings.rate_limit.count, window=settings.rate_limit.seconds),
        pending=stores.pending,
        limits=limits,
        bytes_per_token=upstream.bytes_per_token,
        idempotency=IdempotencyStore(store, ttl=settings.session_ttl + _running_ttl(settings)),
        system=system,
    )


def _add_checks(app: web.Application, settings: Settings) -> None:
    """Give the application what it checks requests with before they reach any other part."""
    app[keys.SETTINGS] = settings
    app[keys.METRICS_TOKEN] = MetricsToken(settings.metrics_token)
    app[keys.ORIGINS] = Origins(
        frozenset(origin.lower() for origin in settings.cors_origins), settings.told_of_loopback
    )
    app[keys.REFUSED_ORIGINS] = RefusedOrigins()
    app[keys.OCCUPANCY] = Occupancy(settings.max_streams, of_a_client=settings.max_concurrent_streams)


def _worker_info(worker_id: str) -> WorkerInfo:
    return WorkerInfo(worker_id, socket.gethostname(), os.getpid(), __version__)


async def _prepare_redis(store: Store) -> None:
    """Load the scripts into Redis, and warn of its settings that do not fit."""
    try:
        await store.load_scripts()
        if await store.may_go_back():
            log.warning(
                "redis may come back with sessions as they were at its last snapshot, which would run a second time:"
                " turn snapshots off (save '') or the append-only file on"
            )
        if await store.may_evict():
            log.warning("redis may throw sessions away: set its maxmemory-policy to noeviction")
    except StoreUnavailable as error:
        log.warning("redis cannot be reached yet", why=cause_of(error))


def _telemetry(upstream_url: str, kind: UpstreamKind) -> Telemetry:
    """Return telemetry as the standard variables say. If they cannot be used, the service runs without it."""
    protocols = otlp_protocols()
    if not protocols:
        return NO_TELEMETRY

    def provider() -> str:
        return "openrouter" if kind.openrouter else "openai"

    try:
        from broker.telemetry.export import export  # noqa: PLC0415 - it needs an extra, and takes time

        return export(protocols, upstream_url=upstream_url, provider=provider, version=__version__)
    except ImportError as error:
        log.warning(
            "an OTEL_* variable names a collector, but session-broker[otel] is not installed", why=str(error)
        )
    except Exception as error:  # noqa: BLE001 - the SDK's exporters raise errors of many kinds
        log.warning(
            "nothing is sent to the collector: an OTEL_* variable cannot be used",
            error=type(error).__name__,
            why=str(error)[:LONGEST_REASON],
        )
    return NO_TELEMETRY


def _upstream_key(settings: Settings) -> str:
    key = settings.openrouter_api_key
    return key.get_secret_value() if key is not None else ""


def _running_ttl(settings: Settings) -> int:
    """Return the seconds for which a running session is stored."""
    return int(settings.deadline) + settings.resume_ttl + AFTER_DEADLINE


def _service_limits(settings: Settings, quotas: Quotas) -> ServiceLimits:
    return ServiceLimits(
        LimitsInForce(quotas, rates=(settings.rate_limit,), max_output_tokens=settings.max_output_tokens)
    )


def _quotas(settings: Settings) -> Quotas:
    return Quotas(
        pending=settings.max_prepared,
        streams=settings.max_concurrent_streams,
        daily_tokens=settings.daily_tokens,
        daily_cost=to_nano(settings.daily_cost) or 0,
        monthly_cost=to_nano(settings.monthly_cost) or 0,
        total_daily_cost=to_nano(settings.total_daily_cost) or 0,
        pending_bytes=settings.max_prepared_bytes,
        total_pending_bytes=settings.total_prepared_bytes,
    )


def _money(upstream: _Upstream) -> Money:
    catalog, speeds = upstream.catalog, upstream.speeds

    async def prices_of(model: str) -> Prices | None:
        found = (await catalog.known([model], timeout=PRICES_TIMEOUT)).get(model)
        return found.prices if found is not None else None

    async def fetch(generation_id: str) -> Mapping[str, Any] | None:
        return await fetch_generation(upstream.client.openai, generation_id)

    async def speed_of(model: str) -> float | None:
        return (await speeds.of([model])).get(model)

    return Money(
        prices_of=prices_of,
        has_prices=lambda: catalog.has_list,
        name_of=catalog.name_in_list,
        fetch_generation=fetch,
        keeps_records=lambda: catalog.openrouter,
        learn=upstream.bytes_per_token.learn,
        speed_of=speed_of,
        learn_speed=speeds.learn,
    )


def _generation_limits(settings: Settings) -> GenerationLimits:
    return GenerationLimits(
        first_data_timeout=settings.first_data_timeout,
        idle_timeout=settings.idle_timeout,
        deadline=settings.deadline,
        grace=settings.grace,
        max_response=settings.max_response,
        max_retries=settings.max_retries,
    )


def _worker_config(settings: Settings) -> WorkerConfig:
    return WorkerConfig(
        max_streams=settings.max_streams,
        session_ttl=settings.session_ttl,
        running_ttl=_running_ttl(settings),
        resume_ttl=settings.resume_ttl,
        journal_interval=settings.journal_interval_ms / 1000,
    )


@asynccontextmanager
async def _naming(settings: Settings, store: Store) -> AsyncIterator[Naming]:
    secret = settings.name_secret
    naming = Naming(NameStore(store), secret.get_secret_value() if secret is not None else None)
    if secret is not None:
        yield naming
        return
    task = asyncio.create_task(keep_running("names", naming.run))
    try:
        yield naming
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def _reading(known: KnownClients) -> AsyncIterator[None]:
    """Read the clients file again when it changes, if there is one."""
    if known.file is None:
        yield
        return
    task = asyncio.create_task(keep_running("clients file", known.file.run))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def _sharing(metrics: Metrics, path: Path | None, worker_id: str) -> AsyncIterator[None]:
    """Add the metrics to those of other workers of this host, if there are any."""
    directory = await _metrics_directory(path, worker_id) if path is not None else None
    if directory is None:
        yield
        return
    metrics.directory = directory
    with closing(directory):
        task = asyncio.create_task(keep_running("metrics", partial(directory.run, metrics.families)))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await directory.write(metrics.families())


async def _metrics_directory(path: Path, worker_id: str) -> MetricsDirectory | None:
    """Return the place of this worker in the directory; None where it cannot be made, because a worker must start."""
    from broker.metrics_directory import MetricsDirectory  # noqa: PLC0415 - not on every platform

    try:
        return await asyncio.to_thread(MetricsDirectory, path, worker_id)
    except OSError as error:
        log.warning("metrics of this worker cannot be added to those of the others", why=str(error))
        return None


@asynccontextmanager
async def _timers(
    settings: Settings, worker: Worker, metrics: Metrics, metrics_directory: Path | None
) -> AsyncIterator[None]:
    work = partial(
        tick,
        worker,
        heartbeat=settings.heartbeat,
        ping_events=settings.ping_events,
        lagged=metrics.loop_lagged,
    )
    task = asyncio.create_task(keep_running("timers", work))
    try:
        async with _sharing(metrics, metrics_directory, worker.id):
            yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
