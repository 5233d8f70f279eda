"""A step that is tried until Redis takes it."""

from __future__ import annotations

import asyncio

import pytest

from broker.core.errors import StoreRefused, StoreUnavailable
from broker.relay.retries import until_stored
from tests.clock import Clock


class Step:
    """Fails with these errors, one after the other, and then returns `stored`."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.tries = 0

    async def __call__(self) -> str:
        self.tries += 1
        if self.errors:
            raise self.errors.pop(0)
        return "stored"


async def done(step: Step, clock: Clock, seconds: float = 100.0) -> str:
    task = asyncio.create_task(
        until_stored(step, give_up_after=10.0, retry=2.0, clock=clock, pause=clock.pause)
    )
    await clock.advance(seconds)
    return await task


async def test_a_step_that_succeeds_is_done_once() -> None:
    clock, step = Clock(), Step()
    assert await done(step, clock) == "stored"
    assert (step.tries, clock.pauses) == (1, [])


@pytest.mark.parametrize("error", [StoreUnavailable, StoreRefused])
async def test_a_step_that_fails_is_tried_again_after_a_pause(error: type[StoreUnavailable]) -> None:
    clock, step = Clock(), Step(error(), error())
    assert await done(step, clock) == "stored"
    assert (step.tries, clock.pauses) == (3, [2.0, 2.0])


async def test_it_is_given_up_after_its_time() -> None:
    clock, step = Clock(), Step(*[StoreUnavailable() for _ in range(100)])
    with pytest.raises(StoreUnavailable):
        await done(step, clock)
    assert step.tries == 6


async def test_another_error_is_not_tried_again() -> None:
    clock, step = Clock(), Step(ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        await done(step, clock)
    assert step.tries == 1


async def test_waiting_can_be_cancelled() -> None:
    clock, step = Clock(), Step(StoreUnavailable())
    task = asyncio.create_task(until_stored(step, give_up_after=10, clock=clock, pause=clock.pause))
    await clock.advance(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
