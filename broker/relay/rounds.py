"""Rounds over many sessions or reservations, in which a bad one does not keep the others from their turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import structlog

from broker.core.errors import StoreRefused, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

T = TypeVar("T")

log = structlog.get_logger(__name__)

MAX_UNREACHABLE = 3
"""Items in a row for which Redis could not be reached; then it is away, and the others would only wait for it too."""


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[object]], *, doing: str) -> list[T]:
    """Do some work for each item, and return those for which it failed.

    Args:
        items: the items.
        work: what is done for each.
        doing: what that is, for the log.

    Raises:
        StoreUnavailable: Redis is away.
    """
    failed: list[T] = []
    unreachable = 0
    for item in items:
        try:
            await work(item)
        except StoreRefused:
            unreachable = 0
        except StoreUnavailable:
            unreachable += 1
            if unreachable >= MAX_UNREACHABLE:
                raise
        except Exception:
            unreachable = 0
            if not failed:  # one of a kind is enough for a log
                log.exception("round failed for an item", doing=doing)
        else:
            unreachable = 0
            continue
        failed.append(item)
    if failed:
        log.warning("round failed for some", doing=doing, count=len(failed))
    return failed
