"""Does work for many sessions or reservations. A failed item does not stop the others."""

from __future__ import annotations

import asyncio
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import structlog

from broker.core.errors import StoreRefused, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

T = TypeVar("T")

log = structlog.get_logger(__name__)

MAX_UNREACHABLE = 3
"""Number of items in a row for which Redis could not be reached, after which the round ends. Each of the other items
would wait for Redis as well."""


async def for_each(
    items: Iterable[T], work: Callable[[T], Awaitable[object]], *, doing: str, together: int = 1
) -> list[T]:
    """Do some work for each item, and return the items for which it failed.

    Args:
        items: the items.
        work: is called with each item.
        doing: names the work in the log.
        together: items that are worked on at the same time.

    Raises:
        StoreUnavailable: Redis could not be reached for `MAX_UNREACHABLE` items in a row.
    """
    failed: list[T] = []
    unreachable = 0
    rest = iter(items)
    while part := list(islice(rest, together)):
        outcomes = (
            await asyncio.gather(*(_outcome(work, item) for item in part))
            if len(part) > 1
            else [await _outcome(work, part[0])]
        )
        for item, outcome in zip(part, outcomes, strict=True):
            if outcome is None:
                unreachable = 0
                continue
            if isinstance(outcome, StoreUnavailable) and not isinstance(outcome, StoreRefused):
                unreachable += 1
                if unreachable >= MAX_UNREACHABLE:
                    raise outcome
            else:
                unreachable = 0
                if (
                    not isinstance(outcome, StoreRefused) and not failed
                ):  # the first one is enough for the log
                    log.error("round failed for an item", doing=doing, exc_info=outcome)
            failed.append(item)
    if failed:
        log.warning("round failed for some", doing=doing, count=len(failed))
    return failed


async def _outcome(work: Callable[[T], Awaitable[object]], item: T) -> Exception | None:
    try:
        await work(item)
    except Exception as error:  # noqa: BLE001 - the caller handles each
        return error
    return None
