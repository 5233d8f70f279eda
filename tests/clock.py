"""A clock that a test moves, for code that is given its clock and its pauses as arguments."""

from __future__ import annotations

import asyncio

PATIENCE = 20.0
"""Seconds after which a test that waits for a pause has failed."""

TURNS = 50
"""Turns of the event loop after which every task has done what it can do without input from outside."""


async def run_ready_tasks() -> None:
    """Let every task run until it waits for something."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


class Clock:
    """Seconds that pass only in `advance`.

    Attributes:
        now: the current time.
        pauses: the seconds of every pause that was asked for.
    """

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.pauses: list[float] = []
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []
        self._paused = asyncio.Event()

    def __call__(self) -> float:
        return self.now

    async def pause(self, seconds: float) -> None:
        """Wait until the clock has moved by ``seconds``; stands for `asyncio.sleep`."""
        self.pauses.append(seconds)
        sleeper = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.now + seconds, sleeper))
        self._paused.set()
        await sleeper

    async def end_pause(self) -> None:
        """Wait until a task pauses, and move the clock to the end of the pause that ends first."""
        async with asyncio.timeout(PATIENCE):
            await self._paused.wait()
        await self.advance(max(0.0, min(until for until, _ in self._sleepers) - self.now))

    async def advance(self, seconds: float) -> None:
        """Move the clock, and run the tasks whose pauses end, in the order in which they end."""
        target = self.now + seconds
        await run_ready_tasks()
        while due := [each for each in self._sleepers if each[0] <= target]:
            first = min(due, key=lambda each: each[0])
            self._sleepers.remove(first)
            if not self._sleepers:
                self._paused.clear()
            self.now = max(self.now, first[0])
            if not first[1].done():  # else its task was cancelled
                first[1].set_result(None)
            await run_ready_tasks()
        self.now = target
