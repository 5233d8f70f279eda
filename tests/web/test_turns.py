"""Requests begin a few in one turn of the event loop, in the order in which they came."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from broker.web.turns import A_TURN, Turns


class Rush:
    """Requests that all come in the same turn.

    Attributes:
        began: their numbers, in the order in which they began.
        in_turn: how many of them began in each turn.
        requests: their tasks.
    """

    def __init__(self, turns: Turns, count: int) -> None:
        self.began: list[int] = []
        self.in_turn: Counter[int] = Counter()
        self._turn = 0
        self.requests = [asyncio.create_task(self._request(turns, number)) for number in range(count)]

    async def over(self) -> None:
        """Count turns until all have begun or were cancelled."""
        while not all(request.done() for request in self.requests):
            await asyncio.sleep(0)
            self._turn += 1

    async def _request(self, turns: Turns, number: int) -> None:
        await turns.wait()
        self.began.append(number)
        self.in_turn[self._turn] += 1


def busy() -> Turns:
    return Turns(streaming=lambda: True)


async def test_no_more_than_a_few_begin_in_one_turn() -> None:
    rush = Rush(busy(), 9 * A_TURN)
    await rush.over()
    assert rush.began == list(range(9 * A_TURN))
    assert max(rush.in_turn.values()) <= A_TURN
    assert len(rush.in_turn) >= 9


async def test_they_begin_at_once_while_nothing_streams() -> None:
    rush = Rush(Turns(streaming=lambda: False), 100)
    await rush.over()
    assert len(rush.in_turn) == 1


async def test_one_that_comes_later_does_not_overtake() -> None:
    turns = busy()
    rush = Rush(turns, 2 * A_TURN + 1)
    await asyncio.sleep(0)
    turns._streaming = lambda: False
    await turns.wait()
    assert len(rush.began) == len(rush.requests)


@pytest.mark.parametrize("staying", [0, 1, 5])
async def test_a_client_that_leaves_gives_its_place_to_the_next(staying: int) -> None:
    turns = busy()
    rush = Rush(turns, 8 * A_TURN + staying)
    await asyncio.sleep(0)
    for request in rush.requests[A_TURN : 8 * A_TURN]:
        request.cancel()
    await rush.over()
    assert len(rush.began) == A_TURN + staying
    for _ in range(3):  # no turn is counted any more
        await asyncio.sleep(0)
    assert not turns._counting
    await turns.wait()
