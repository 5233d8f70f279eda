"""What the commands for operators share: they read Redis itself, with the settings of the environment and `.env`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from broker.logs import configure_logs
from broker.settings import SettingsError, load_settings, require_served_store
from broker.store.connection import Store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from broker.settings import Settings

_Found = TypeVar("_Found")


def operator_settings(what: str) -> tuple[Settings, str]:
    """Return the settings and the URL of Redis, and configure the logs.

    Args:
        what: what would be read, for the sentence on an embedded Valkey.

    Raises:
        SettingsError: a setting is wrong, or there is no URL.
    """
    settings = load_settings()
    require_served_store(settings)
    if settings.redis_url is None:
        raise SettingsError(f"REDIS_URL must be set: {what} of an embedded Valkey are gone with it")
    configure_logs(settings.log_level, settings.log_format, secrets=settings.secrets)
    return settings, settings.redis_url


def with_store(settings: Settings, redis_url: str, work: Callable[[Store], Awaitable[_Found]]) -> _Found:
    """Return the result of ``work`` with a connection to Redis, which is closed afterwards.

    Raises:
        StoreUnavailable: Redis cannot be reached.
    """
    return asyncio.run(_with_store(settings, redis_url, work))


async def _with_store(
    settings: Settings, redis_url: str, work: Callable[[Store], Awaitable[_Found]]
) -> _Found:
    store = Store(redis_url, settings.key_prefix)
    try:
        return await work(store)
    finally:
        await store.close()
