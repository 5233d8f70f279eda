"""Any value in place of a usage: nothing raises, the session has its one end, and it is settled once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any, cast

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.core.accounts import Usage
from broker.core.pricing import MAX_COST, Prices, parse_prices
from broker.core.session import State, Terminal
from broker.relay.config import Money
from broker.relay.reaper import spent_in_end
from broker.relay.settlement import Settlement
from broker.store.accounts import Reservation
from tests.relay.fakes import watched
from tests.relay.test_last_resort import WORST, World, generation_in

NAMES = [
    *(
        "prompt_tokens",
        "completion_tokens",
        "total_tokens",
        "cost",
        "cost_in_usd_ticks",
        "total_cost",
        "is_byok",
    ),
    *(
        "cost_details",
        "upstream_inference_cost",
        "prompt_tokens_details",
        "cached_tokens",
        "cache_write_tokens",
    ),
    *("completion_tokens_details", "reasoning_tokens", "", "x"),
]
NUMBERS = (
    st.integers(-3, 40)
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.sampled_from([2**31, 2**31 + 1, 2**53, 2**63, 2**64, 1e308, 1e-320, -0.0, 0.5])
)
SCALARS = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.text(max_size=5)
    | st.sampled_from(
        ["12", "1e9999999", "-1", "NaN", "Infinity", "0.000001", "\ud800", "9" * 500, "1" + "0" * 60]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6),
    max_leaves=12,
)
USAGES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=10) | VALUES
PRICES = cast("Prices", parse_prices({"pricing": {"prompt": "0.000001", "completion": "0.000002"}}))

PLACES = ["before", "at the finish", "after", "x_groq", "error", "completion"]


def nested(depth: int) -> Any:
    value: Any = 0
    for level in range(depth):
        value = {"a": value} if level % 2 else [value]
    return value


class Telling(World):
    """An upstream that sends this usage in this place, and accounts that note what is settled."""

    def __init__(self, usage: object, place: str, prices: Prices | None) -> None:
        super().__init__()
        self.usage, self.place = usage, place
        money = Money(
            prices_of=self.prices_of,
            has_prices=lambda: True,
            name_of=lambda model: model,
            fetch_generation=cast("Any", None),
            keeps_records=lambda: False,
            learn=cast("Any", None),
            speed_of=self.speed_of,
            learn_speed=cast("Any", None),
        )
        self.prices = prices
        self.rows: list[Usage] = []
        self.settlement = Settlement(cast("Any", Accounts(self.rows)), money, spawn=lambda work: work.close())

    async def prices_of(self, _model: str) -> Prices | None:
        return self.prices

    def close(self) -> None:
        self.relayed.set()  # or it never will be: the first chunk was no JSON

    async def speed_of(self, _model: str) -> float | None:
        return 50.0

    async def blocks(self, _max_body: int) -> AsyncGenerator[bytes]:
        if self.place == "completion":
            choice = {"message": {"content": "Hello"}, "finish_reason": "stop"}
            self.whole = cast("Any", {"choices": [choice], "usage": self.usage})
            self.relayed.set()
            return
        text = {"choices": [{"delta": {"content": "Hello"}}]}
        finish = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
        yield event({**text, **({"usage": self.usage} if self.place == "before" else {})})
        self.relayed.set()
        if self.how == "stop":
            await self.over.wait()
        if self.place == "error":
            yield event({"error": {"code": 500, "message": "It broke."}, "usage": self.usage})
        yield event({**finish, **({"usage": self.usage} if self.place == "at the finish" else {})})
        if self.place == "after":
            yield event({"choices": [], "usage": self.usage})
        elif self.place == "x_groq":
            yield event({"choices": [], "x_groq": {"usage": self.usage}})
        yield b"data: [DONE]\n\n"


class Accounts:
    """Notes what is settled."""

    def __init__(self, rows: list[Usage]) -> None:
        self._rows = rows

    async def settle(self, _reservation: Reservation, usage: Usage, _state: State, **_: object) -> None:
        self._rows.append(usage)


def event(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk)}\n\n".encode()


async def told_of(world: Telling) -> Terminal:
    async with asyncio.timeout(20), generation_in(world, settlement=world.settlement) as generation:
        with watched(generation):
            if world.how == "stop":
                await world.relayed.wait()
                generation.cancel()
            await generation.ended()
    # Samples are taken after the end.
    generation.finishing.sample()
    generation.finishing.speed()
    assert generation.feed.end is not None
    return generation.feed.end


def check(how: str, place: str, usage: object, prices: Prices | None) -> None:
    """Let a session end with this usage."""
    world = Telling(usage, place, prices)
    world.how = how
    end = asyncio.run(told_of(world))
    assert world.written == [end]
    assert world.late == []
    assert end.state in (State.DONE, State.FAILED, State.CANCELLED)
    assert len(end.data) < 80_000
    told = orjson.loads(end.data)
    if end.event == "done":
        assert told["usage"] is None or isinstance(told["usage"], dict)
    [row] = world.rows
    counts = (row.prompt, row.completion, row.cached, row.reasoning)
    assert all(type(count) is int and 0 <= count <= 2**32 for count in counts)
    assert row.cost is None or (type(row.cost) is int and 0 <= row.cost <= MAX_COST)
    # The same from what is stored, as another worker reads it.
    spent_in_end(end.data, WORST)


WAYS = [(how, place) for how in ("read on", "stop") for place in PLACES]


@pytest.mark.parametrize(("how", "place"), WAYS)
@given(usage=USAGES, prices=st.sampled_from([PRICES, None]))
@settings(max_examples=20)
def test_any_usage_leads_to_one_end_and_one_settlement(
    how: str, place: str, usage: object, prices: Prices | None
) -> None:
    check(how, place, usage, prices)


@pytest.mark.parametrize(("how", "place"), WAYS)
@pytest.mark.parametrize("prices", [PRICES, None], ids=["priced", "unpriced"])
@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 1, "completion_tokens": 1, "x": nested(300)},
        {"prompt_tokens": nested(200), "cost": nested(200)},
        {"prompt_tokens": float("nan"), "completion_tokens": float("inf"), "cost": 1e308},
        {f"k{n}": "x" * 900 for n in range(200)},
        {"cost": {"total_cost": "9" * 5000}, "is_byok": True, "cost_details": []},
    ],
    ids=["deep", "deep counts", "no numbers", "large", "long number"],
)
def test_known_attacks_end_and_are_settled(
    how: str, place: str, usage: object, prices: Prices | None
) -> None:
    check(how, place, usage, prices)
