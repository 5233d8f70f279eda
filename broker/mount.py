"""Being a part of an aiohttp application: the whole service under a prefix of it, as many times as wanted.

`setup` is for other people's applications; `broker serve` is the smallest of them. What the service consists of is
`broker.app`'s.
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
from broker.logs import log_into_application
from broker.settings import (
    SettingsError,
    contradictions,
    not_yet_served,
    open_door,
    read_system_file,
    require_served_store,
)
from broker.web import keys
from broker.web.application_clients import ApplicationClients
from broker.web.identity import ClientResolver
from broker.web.routes import add_web

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from broker.relay.results import OnEnd
    from broker.settings import Settings
    from broker.web.application_clients import Identify

log = structlog.get_logger(__name__)

_PARTS = web.AppKey("broker_parts", list[web.Application])
"""The brokers of an application, which drain together."""


def setup(
    app: web.Application,
    prefix: str = "",
    *,
    settings: Settings,
    identify: Identify | None = None,
    on_end: OnEnd | None = None,
) -> None:
    """Put the whole service under a prefix of an application, for as long as that runs.

    Everything starts with the application and ends with it: while it shuts down, nothing new is claimed, and running
    answers have ``settings.drain_timeout`` seconds to finish. Called again with another prefix, it adds another broker.

    Args:
        app: not started yet.
        prefix: such as ``/ai``. Empty, or ``/``, makes all of the application the broker's: its checks and its form of
            errors then hold for every request, and there can be only one.
        settings: ``host`` says where the application listens, as far as that matters. With a loopback address, other
            names in ``Host`` are refused, and without a ``redis_url`` a Valkey is run for the life of the application.
            Where it is not given, `setup` does not know, so it does neither. ``port``, ``workers``, ``log_level`` and
            ``log_format`` are for ``broker serve`` alone.
        identify: is given the request to ``/prepare``, ``/models`` or ``/usage`` and says who it is from: a `Client`,
            by whose name all is counted. It may be a coroutine function, and has ten seconds. A `web.HTTPException`
            that it raises is answered in our form of errors, with its status and text; anything else is a 500. Without
            it, clients are told apart by API keys, tokens and addresses, as the settings say.
        on_end: is awaited with a `Result` for every answer that was begun in this process and has ended, however it
            ended; a session that was cancelled before it was claimed is none. Best effort: a call has ten seconds,
            32 run at once, and what it raises is logged and changes nothing. A process that is killed tells nothing.
            While the application shuts down, its results are awaited for ten seconds, before any clean-up.

    Raises:
        SettingsError: a setting that is needed is missing, or cannot be served.
        ValueError: the prefix does not begin with a slash.
    """
    _check(prefix, settings)
    app.cleanup_ctx.append(partial(_telling, settings, open_door(settings) if identify is None else None))
    mount(app, prefix, settings, identify=identify, on_end=on_end)


def mount(
    app: web.Application,
    prefix: str,
    settings: Settings,
    *,
    identify: Identify | None = None,
    on_end: OnEnd | None = None,
) -> web.Application:
    """Do what `setup` promises, without its checks and warnings; return the part that is the broker's."""
    prefix = prefix.rstrip("/")
    part = web.Application() if prefix else app
    add_web(part, settings, prefix=prefix)
    if prefix:
        app.add_subapp(prefix, part)
    # Of the outer application, whose clean-up contexts end in the opposite order: what was set up before the broker, a
    # database for one, outlives it. Those of a sub-application would end after all others.
    app.cleanup_ctx.append(partial(_running, part, settings, identify, on_end))
    if _PARTS not in app:
        app[_PARTS] = []
        app.on_shutdown.append(_drain_all)
    app[_PARTS].append(part)
    return part


def _check(prefix: str, settings: Settings) -> None:
    """Check what no setting can tell by itself, before anything is added to the application.

    Raises:
        SettingsError: something that is needed is not set.
        ValueError: the prefix does not begin with a slash.
    """
    if prefix and not prefix.startswith("/"):
        raise ValueError("a prefix begins with a slash")
    asks_openrouter = UpstreamKind("auto", settings.upstream_url).openrouter
    if asks_openrouter and settings.openrouter_api_key is None:
        raise SettingsError("openrouter_api_key must be set, or upstream_url to another service")
    require_served_store(settings)
    if settings.system_file is not None:
        read_system_file(settings.system_file)
    if settings.redis_url is None and not settings.told_of_loopback:
        raise SettingsError(
            "redis_url must be set;"
            ' only an application that says host="127.0.0.1" keeps sessions in a Valkey of its own'
        )


@asynccontextmanager
async def _telling(settings: Settings, warning: str | None, _app: web.Application) -> AsyncIterator[None]:
    """Find out where our lines go, and warn of settings that do not do what they seem to."""
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
    identify: Identify | None,
    on_end: OnEnd | None,
    app: web.Application,
) -> AsyncIterator[None]:
    """Run the service of one part."""
    clients = (
        partial(ApplicationClients, app=app, identify=identify) if identify is not None else ClientResolver
    )
    async with AsyncExitStack() as stack:
        redis_url = settings.redis_url
        if redis_url is None:
            from broker.store.embedded import embedded_valkey  # noqa: PLC0415 - only where it is used

            redis_url = stack.enter_context(embedded_valkey())
        await stack.enter_async_context(build(part, settings, redis_url, clients=clients, on_end=on_end))
        yield


async def _drain_all(app: web.Application) -> None:
    """Let what runs come to its end; all brokers of an application at once, so that it takes no longer for two."""
    ends = await asyncio.gather(*(_drain(part) for part in app[_PARTS]), return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):
            log.error("draining failed", exc_info=end)  # the application closes all the same


async def _drain(part: web.Application) -> None:
    worker, settings = part[keys.WORKER], part[keys.SETTINGS]
    if worker.draining:  # `broker serve` drains before it closes its listener
        return
    log.info("draining", seconds=settings.drain_timeout)
    await worker.drain(settings.drain_timeout)
    if (results := part.get(keys.RESULTS)) is not None:
        await results.finish()
