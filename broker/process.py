"""What a service of one process (`broker/service.py`) and one of several (`broker/supervisor.py`) have in common.

The parent of several workers imports this module and must stay small, so that it imports no library of the service.
"""

from __future__ import annotations

import resource
from contextlib import contextmanager
from typing import TYPE_CHECKING

import structlog

from broker.settings import open_door

if TYPE_CHECKING:
    from collections.abc import Iterator

    from broker.settings import Settings

log = structlog.get_logger(__name__)

_OF_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - nothing is bound here

BACKLOG = 4096
"""Connections that may wait to be accepted, because all pages of a lost worker reconnect at the same time."""


@contextmanager
def embedded_store(settings: Settings, *, wanted: bool) -> Iterator[str | None]:
    """Run an embedded Valkey during the block where it is wanted or no other is named, and yield its URL, else None.

    Raises:
        StoreUnavailable: it did not start.
    """
    if not wanted and settings.redis_url is not None:
        yield None
        return
    from broker.store.embedded import embedded_valkey  # noqa: PLC0415 - only where it is used

    with embedded_valkey() as url:
        yield url


def raise_file_limit() -> None:
    """Raise the limit of open files. Each stream needs two, and the usual limit is made for programs with `select`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):
            log.warning("the limit on open files stays low", limit=soft)


def address_line(settings: Settings, port: int) -> str:
    """Return the address to open, as one line for the person who started the service. It is not a log line."""
    # "Every address" cannot be opened in a browser.
    host = _OF_EVERY_ADDRESS.get(settings.host, settings.host)
    verb = "Open" if settings.page else "Listening at"
    return f"{verb} {_url(host, port)}"


def log_address(settings: Settings, port: int, *, rehearsal: bool) -> None:
    """Log the address, and the limits in force, in one line. Warn where anybody who can connect can spend."""
    log.info("listening", url=_url(settings.host, port), rehearsal=rehearsal, **_limits_in_force(settings))
    if (warning := open_door(settings)) is not None:
        log.warning(warning)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _limits_in_force(settings: Settings) -> dict[str, str]:
    limits = {
        "rate": f"{settings.rate_limit.count}/{settings.rate_limit.seconds}s",
        "streams": str(settings.max_concurrent_streams),
        "daily_tokens": str(settings.daily_tokens or ""),
        "daily_cost": str(settings.daily_cost or ""),
        "monthly_cost": str(settings.monthly_cost or ""),
        "total_daily_cost": str(settings.total_daily_cost or ""),
        "identity": "required" if settings.needs_identity else "address",
        "workers": str(settings.workers) if settings.workers > 1 else "",
    }
    return {name: value for name, value in limits.items() if value}
