"""What the commands for operators share: they read Redis itself, with the settings of the environment and `.env`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from broker.cli.words import reason
from broker.core.errors import StoreRefused, StoreUnavailable
from broker.logs import configure_logs
from broker.settings import SettingsError, load_settings
from broker.store.connection import Store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from broker.settings import Settings

TRIES = 3
"""Tries to reach Redis. A command begins without a connection, and one with TLS may take longer than a call may."""

_LONGEST_CAUSE = 200

_Found = TypeVar("_Found")


def operator_settings() -> tuple[Settings, str]:
    """Return the settings and the URL of Redis, and configure the logs.

    Raises:
        SettingsError: a setting is wrong, or there is no URL.
    """
    settings = load_settings()
    if settings.redis_url is None:
        raise SettingsError("REDIS_URL must be set: an embedded Valkey can be read by its service alone")
    # A refused call is a warning of the service. These commands say it in words, and `top` owns the screen.
    configure_logs("error", settings.log_format, secrets=settings.secrets)
    return settings, settings.redis_url


def with_store(settings: Settings, redis_url: str, work: Callable[[Store], Awaitable[_Found]]) -> _Found:
    """Return the result of ``work`` with a connection to Redis, which is closed afterwards.

    Raises:
        StoreUnavailable: Redis cannot be reached.
    """
    return asyncio.run(_with_store(settings, redis_url, work))


def redis_problem(error: StoreUnavailable) -> str:
    """Return for an operator why Redis cannot be read, as a sentence. The one for clients tells no cause."""
    if error.message != error.default_message:
        return error.message
    does = "refuses to be read" if isinstance(error, StoreRefused) else "cannot be reached"
    return f"Redis {does} ({_cause(error)[:_LONGEST_CAUSE].rstrip('.')})."


def _cause(error: StoreUnavailable) -> str:
    cause = error.__cause__
    below = cause.__context__ if cause is not None else None  # the library's own words repeat the address
    return reason(below) if isinstance(below, OSError) else str(cause or "") or "no answer in time"


async def reach(store: Store) -> None:
    """Open the connection to Redis, and give a slow one more time than a call of a worker has.

    Raises:
        StoreUnavailable: Redis cannot be reached.
    """
    for tries in range(1, TRIES + 1):
        try:
            await store.now_ms()
        except StoreRefused:
            return  # reached; the command itself says what is refused
        except StoreUnavailable as error:
            if tries == TRIES or "no answer in time" not in redis_problem(error):
                raise
        else:
            return


async def _with_store(
    settings: Settings, redis_url: str, work: Callable[[Store], Awaitable[_Found]]
) -> _Found:
    store = Store(redis_url, settings.key_prefix)
    try:
        await reach(store)
        return await work(store)
    finally:
        await store.close()
