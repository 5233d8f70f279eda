"""Make the service a part of an aiohttp application: under a prefix of it, as many times as wanted.

`setup` is for applications of others; `broker serve` is the smallest such application. The parts of the service are
built in `broker.app`.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import structlog
from aiohttp import web

from broker.app import build
from broker.core.upstream_kind import UpstreamKind
from broker.identity.known_clients import KnownClients
from broker.logs import log_into_application
from broker.settings import (
    SettingsError,
    contradictions,
    not_yet_served,
    open_door,
    read_system_file,
)
from broker.web import keys
from broker.web.application_clients import ApplicationClients
from broker.web.identity import ClientResolver
from broker.web.routes import add_web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from broker.relay.results import OnEnd
    from broker.settings import Settings
    from broker.telemetry.interface import Telemetry
    from broker.web.application_clients import Identify

log = structlog.get_logger(__name__)

_PARTS = web.AppKey("broker_parts", list[web.Application])
"""The brokers of an application, which drain at the same time."""


def setup(
    app: web.Application,
    prefix: str = "",
    *,
    settings: Settings,
    identify: Identify | None = None,
    on_end: OnEnd | None = None,
) -> None:
    """Put the whole service under a prefix of an application, for the life of the application.

    The service starts with the application and ends with it: while the application shuts down, nothing new is claimed,
    and running answers have ``settings.drain_timeout`` seconds to finish. Another call with another prefix adds
    another broker.

    Args:
        app: the application, not started yet.
        prefix: such as ``/ai``. Empty, or ``/``, makes the whole application the broker's: its checks and its form of
            errors then apply to every request, and there can be only one broker.
        settings: ``host`` is the address on which the application listens. With a loopback address, other names in
            ``Host`` are refused, and without a ``redis_url`` an embedded Valkey runs for the life of the application.
            Without ``host``, the address is unknown, and neither is done. ``port``, ``workers``, ``log_level`` and
            ``log_format`` apply only to ``broker serve``.
        identify: is called with a request to ``/prepare``, ``/models`` or ``/usage`` and returns its `Client`, by whose
            name everything is counted. It may be a coroutine function, and has ten seconds. A `web.HTTPException` that
            it raises is answered in our form of errors, with its status and text; any other exception is a 500. Without
            it, clients are identified by API keys, tokens and addresses, according to the settings.
        on_end: is awaited with a `Result` for every answer that was started in this process and has ended, in any way.
            A session that was cancelled before its claim has no result. Best effort: a call has ten seconds, 32 run at
            the same time, and exceptions are logged and change nothing. A process that is killed gives no results.
            While the application shuts down, results are awaited for ten seconds, before any clean-up.

    Raises:
        SettingsError: a setting that is needed is missing, or is not supported.
        ValueError: the prefix does not begin with a slash.
    """
    _check(prefix, settings)
    app.cleanup_ctx.append(partial(_logging, settings, open_door(settings) if identify is None else None))
    mount(app, prefix, settings, identify=identify, on_end=on_end)


def mount(
    app: web.Application,
    prefix: str,
    settings: Settings,
    *,
    identify: Identify | None = None,
    on_end: OnEnd | None = None,
    telemetry: Telemetry | None = None,
    metrics_directory: Path | None = None,
) -> web.Application:
    """Do the work of `setup` without its checks and warnings, and return the broker's part of the application.

    ``telemetry`` takes the spans; by default that of the standard variables does. In ``metrics_directory`` several
    workers of one host add up their metrics; each of them shows the sum.

    Raises:
        SettingsError: the clients file cannot be used.
    """
    # An application knows its clients itself; keys do not distinguish them.
    known = KnownClients.of_settings(settings) if identify is None else KnownClients()
    prefix = prefix.rstrip("/")
    part = web.Application() if prefix else app
    add_web(part, settings, prefix=prefix)
    if prefix:
        app.add_subapp(prefix, part)
    # These are of the outer application, whose clean-up contexts end in the opposite order: what was set up before the
    # broker, such as a database, outlives it. Those of a sub-application would end after all others.
    app.cleanup_ctx.append(
        partial(_running, part, settings, known, identify, on_end, telemetry, metrics_directory)
    )
    if _PARTS not in app:
        app[_PARTS] = []
        app.on_shutdown.append(_drain_all)
    app[_PARTS].append(part)
    return part


def _check(prefix: str, settings: Settings) -> None:
    """Check the settings against this use, before anything is added to the application.

    Raises:
        SettingsError: a setting that is needed is not set.
        ValueError: the prefix does not begin with a slash.
    """
    if prefix and not prefix.startswith("/"):
        raise ValueError("a prefix begins with a slash")
    asks_openrouter = UpstreamKind("auto", settings.upstream_url).openrouter
    if asks_openrouter and settings.openrouter_api_key is None:
        raise SettingsError("openrouter_api_key must be set, or upstream_url to another service")
    if settings.system_file is not None:
        read_system_file(settings.system_file)
    if settings.redis_url is None and not settings.told_of_loopback:
        raise SettingsError(
            "redis_url must be set;"
            ' only an application that says host="127.0.0.1" stores sessions in an embedded Valkey'
        )


@asynccontextmanager
async def _logging(settings: Settings, warning: str | None, _app: web.Application) -> AsyncIterator[None]:
    """Find out where the broker's log lines go, and warn of settings that do not do what they seem to."""
    log_into_application(settings.secrets)
    for sentence in (warning, *contradictions(settings)):
        if sentence is not None:
            log.warning(sentence)
    for name in not_yet_served(settings):
        log.warning("setting has no effect in this release", name=name)
    yield


@asynccontextmanager
async def _running(
    part: web.Application,
    settings: Settings,
    known: KnownClients,
    identify: Identify | None,
    on_end: OnEnd | None,
    telemetry: Telemetry | None,
    metrics_directory: Path | None,
    app: web.Application,
) -> AsyncIterator[None]:
    """Run the service of one part of the application."""
    clients = (
        partial(ApplicationClients, app=app, identify=identify) if identify is not None else ClientResolver
    )
    async with AsyncExitStack() as stack:
        redis_url = settings.redis_url
        if redis_url is None:
            from broker.store.embedded import embedded_valkey  # noqa: PLC0415 - only where it is used

            redis_url = stack.enter_context(embedded_valkey())
        parts = build(
            part,
            settings,
            redis_url,
            clients=clients,
            known=known,
            on_end=on_end,
            telemetry=telemetry,
            metrics_directory=metrics_directory,
        )
        await stack.enter_async_context(parts)
        yield


async def _drain_all(app: web.Application) -> None:
    """Drain all brokers of an application at the same time, so that two take no longer than one."""
    ends = await asyncio.gather(*(_drain(part) for part in app[_PARTS]), return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):
            log.error("draining failed", exc_info=end)  # the application is closed all the same


async def _drain(part: web.Application) -> None:
    worker, settings = part[keys.WORKER], part[keys.SETTINGS]
    if worker.ending:  # `broker serve` drains before it closes its listener
        return
    log.info("draining", seconds=settings.drain_timeout)
    await worker.drain(settings.drain_timeout)
    if (results := part.get(keys.RESULTS)) is not None:
        await results.finish()
