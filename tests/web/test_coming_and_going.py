"""Pages that come and go as they like, to any worker: each sees every event once, in order, and the same end."""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

import pytest

from tests.broker import Broker, running
from tests.scripted import Call, Reply, ScriptedUpstream

if TYPE_CHECKING:
    from tests.events import Connection, Event

PAGES = 6
ENDS: list[Reply] = [
    Call.done,
    Call.reset,
    Call.close,
    lambda call: call.event(b'{"error": {"message": "x"}}'),
]


class Page:
    """A page with a bad connection and a load balancer before it.

    Attributes:
        events: all that it has seen.
    """

    def __init__(self, brokers: list[Broker], session: str, dice: Random) -> None:
        self.events: list[Event] = []
        self._brokers = brokers
        self._session = session
        self._dice = dice

    async def watch(self) -> None:
        while not self._over():
            cursor = self.events[-1].id if self.events else None
            broker = self._dice.choice(self._brokers)
            async with broker.stream(self._session, cursor) as connection:
                assert connection.status == 200
                await self._read(connection, self._dice.randrange(12))
            await asyncio.sleep(self._dice.choice([0, 0, 0.005]))

    async def _read(self, connection: Connection, most: int) -> None:
        for _ in range(most):
            event = await connection.event()
            if event is None:
                return
            self.events.append(event)

    def _over(self) -> bool:
        return bool(self.events) and (self.events[-1].id or "").endswith(".end")


async def speak(call: Call, dice: Random) -> None:
    """Answer in bursts, and end somehow."""
    call.open()
    for number in range(dice.randrange(80)):
        call.chunk(f"{number} " * dice.choice([1, 1, 1, 3000]))
        if dice.random() < 0.5:
            await asyncio.sleep(dice.choice([0, 0, 0.002, 0.03]))
    if dice.random() < 0.7:
        call.chunk("", finish="stop")
    dice.choice(ENDS)(call)


@pytest.mark.parametrize("seed", range(6))
async def test_every_page_sees_the_same_once(
    valkey_url: str, broker: Broker, upstream: ScriptedUpstream, seed: int
) -> None:
    dice = Random(seed)
    async with running(valkey_url, upstream) as other:
        session = await broker.prepare()
        pages = [Page([broker, other], session, Random(dice.random())) for _ in range(PAGES)]
        watching = asyncio.gather(*(page.watch() for page in pages))
        await speak(await upstream.call(), dice)
        if dice.random() < 0.3:
            await dice.choice([broker, other]).cancel(session)
        async with asyncio.timeout(15):
            await watching
    first = pages[0].events
    assert [event.id for event in first] == [*(f"1-{n}" for n in range(1, len(first))), f"1-{len(first)}.end"]
    assert [event.kind for event in first[:-1]] == ["chunk"] * (len(first) - 1)
    for page in pages[1:]:
        assert page.events == first
    assert len(upstream.calls) == 1
