"""A round does its work for every item, whichever of them fail, and ends early only where Redis is away."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from broker.core.errors import StoreRefused, StoreUnavailable
from broker.relay.rounds import MAX_UNREACHABLE, for_each


class Work:
    """Work that fails for some items.

    Args:
        errors: what is raised, by item.
    """

    def __init__(self, errors: dict[int, Exception] | None = None) -> None:
        self.errors = errors or {}
        self.done: list[int] = []
        self.most_at_once = 0
        self._at_once = 0

    async def __call__(self, item: int) -> None:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await asyncio.sleep(0)
            if item in self.errors:
                raise self.errors[item]
            self.done.append(item)
        finally:
            self._at_once -= 1


def away_for(*items: int) -> dict[int, Exception]:
    return {item: StoreUnavailable() for item in items}


@pytest.mark.parametrize("together", [1, 3, 100])
async def test_every_item_is_worked_on(together: int) -> None:
    work = Work()
    assert await for_each(range(10), work, doing="test", together=together) == []
    assert work.done == list(range(10))
    assert work.most_at_once == min(together, 10)


async def test_a_round_over_nothing_does_nothing() -> None:
    assert await for_each([], Work(), doing="test") == []


@pytest.mark.parametrize("error", [ValueError("a bug"), StoreRefused(), StoreUnavailable()])
@pytest.mark.parametrize("together", [1, 4])
async def test_items_that_fail_are_returned_and_stop_no_other(error: Exception, together: int) -> None:
    work = Work({3: error, 7: error})
    assert await for_each(range(10), work, doing="test", together=together) == [3, 7]
    assert work.done == [0, 1, 2, 4, 5, 6, 8, 9]


@pytest.mark.parametrize("together", [1, 2])
async def test_a_round_ends_where_redis_is_away(together: int) -> None:
    work = Work(away_for(*range(2, 100)))
    with pytest.raises(StoreUnavailable):
        await for_each(range(100), work, doing="test", together=together)
    assert work.done == [0, 1]


@pytest.mark.parametrize("between", [None, ValueError("a bug"), StoreRefused()])
async def test_any_answer_of_redis_shows_that_it_is_there(between: Exception | None) -> None:
    errors = away_for(*(item for item in range(30) if item % MAX_UNREACHABLE))
    if between is not None:
        errors |= dict.fromkeys(range(0, 30, MAX_UNREACHABLE), between)
    work = Work(errors)
    assert await for_each(range(30), work, doing="test") == sorted(errors)


async def test_the_log_has_the_first_bug_and_the_number_of_failures() -> None:
    work = Work({item: ValueError(str(item)) for item in range(5)})
    with capture_logs() as lines:
        await for_each(range(5), work, doing="some work")
    first, last = lines
    assert (first["log_level"], str(first["exc_info"])) == ("error", "0")
    assert (last["doing"], last["count"]) == ("some work", 5)


async def test_a_cancelled_round_stops() -> None:
    started = asyncio.Event()

    async def work(item: int) -> None:
        started.set()
        await asyncio.Event().wait()

    task: asyncio.Task[Any] = asyncio.create_task(for_each(range(3), work, doing="test", together=2))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
