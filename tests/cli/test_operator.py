"""Reaching Redis from the command line: a slow first connection is waited for, one that is refused is not."""

from __future__ import annotations

from typing import cast

import pytest

from broker.cli.operator import TRIES, reach
from broker.core.errors import StoreRefused, StoreUnavailable
from broker.store.connection import Store


class FakeStore:
    """A store whose calls fail with these errors, in this order, and then succeed.

    Attributes:
        calls: how many there were.
    """

    def __init__(self, *errors: BaseException) -> None:
        self._errors = list(errors)
        self.calls = 0

    async def now_ms(self) -> int:
        """Return a time, or raise the next error."""
        self.calls += 1
        if self._errors:
            raise self._errors.pop(0)
        return 0


def unavailable(cause: BaseException) -> StoreUnavailable:
    error = StoreUnavailable()
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("slow", range(TRIES))
async def test_a_slow_connection_is_tried_again(slow: int) -> None:
    store = FakeStore(*[unavailable(TimeoutError())] * slow)
    await reach(cast("Store", store))
    assert store.calls == slow + 1


async def test_the_tries_have_a_limit() -> None:
    store = FakeStore(*[unavailable(TimeoutError())] * TRIES)
    with pytest.raises(StoreUnavailable):
        await reach(cast("Store", store))
    assert store.calls == TRIES


async def test_a_server_that_refuses_connections_is_reported_at_once() -> None:
    store = FakeStore(unavailable(ConnectionError("Connection refused.")))
    with pytest.raises(StoreUnavailable):
        await reach(cast("Store", store))
    assert store.calls == 1


async def test_a_server_that_refuses_a_command_is_reached() -> None:
    store = FakeStore(StoreRefused())
    await reach(cast("Store", store))
    assert store.calls == 1
