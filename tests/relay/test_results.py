"""An application's function may fail, hang and be slow: nothing waits for it, and all is limited."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Any

import pytest
from structlog.testing import capture_logs

from broker.core.result import Result
from broker.relay import results as module
from broker.relay.results import AT_ONCE, Results
from tests.scripted import PATIENCE

NOW = dt.datetime.now(dt.UTC)


def result(number: int = 0, text: str = "Hello") -> Result:
    return Result(
        id=f"{number:08}-session",
        client="anna",
        model="a/b",
        state="done",
        text=text,
        reasoning="",
        tool_calls=(),
        usage=None,
        cost=0.5,
        estimated=False,
        finish_reason="stop",
        error=None,
        started_at=NOW,
        first_chunk_at=None,
        ended_at=NOW,
    )


class Hanging:
    """An application whose calls do not end until the test lets them.

    Attributes:
        told: what it was told of.
        most: the most at once.
        go: lets all go.
    """

    def __init__(self) -> None:
        self.told: list[Result] = []
        self.most = self._now = 0
        self.go = asyncio.Event()

    async def __call__(self, result: Result) -> None:
        self.told.append(result)
        self._now += 1
        self.most = max(self.most, self._now)
        await self.go.wait()
        self._now -= 1


async def test_results_are_passed_in_order_and_few_at_once() -> None:
    hanging = Hanging()
    results = Results(hanging)
    sent = [result(number) for number in range(3 * AT_ONCE)]
    for each in sent:
        results.add(each)
    for _ in range(3):
        await asyncio.sleep(0)
    assert hanging.told == sent[:AT_ONCE]
    hanging.go.set()
    await results.finish(PATIENCE)
    assert hanging.told == sent
    assert hanging.most == AT_ONCE
    await results.close()


async def test_an_exception_is_logged_and_changes_nothing() -> None:
    told = []

    async def on_end(result: Result) -> None:
        told.append(result.text)
        if result.text == "cancel":
            raise asyncio.CancelledError
        raise ZeroDivisionError

    results = Results(on_end)
    with capture_logs() as lines:
        for text in ("raise", "cancel", "raise"):
            results.add(result(text=text))
        await results.finish(PATIENCE)
    assert told == ["raise", "cancel", "raise"]
    assert [line["event"] for line in lines] == ["on_end failed"] * 2
    await results.close()


async def test_a_plain_function_is_as_good() -> None:
    told: list[Result] = []
    results = Results(told.append)  # type: ignore[arg-type]  # it is not what the types ask for
    results.add(result())
    await results.finish(PATIENCE)
    assert told == [result()]


async def test_a_call_that_hangs_is_cancelled_and_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.05)
    hanging = Hanging()
    results = Results(hanging)
    with capture_logs() as lines:
        for number in range(AT_ONCE + 1):
            results.add(result(number))
        await results.finish(PATIENCE)
    assert len(hanging.told) == AT_ONCE + 1
    assert {line["event"] for line in lines} == {"on_end took too long"}


async def test_a_call_that_cannot_be_cancelled_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.02)
    monkeypatch.setattr(module, "CANCEL_TIMEOUT", 0.05)
    go = asyncio.Event()

    async def stubborn(_result: Result) -> None:
        while not go.is_set():
            try:
                await go.wait()
            except asyncio.CancelledError:
                continue

    results = Results(stubborn)
    results.add(result())
    async with asyncio.timeout(PATIENCE):
        await results.finish(0.1)
        await results.close()
        go.set()
        await results.finish(PATIENCE)


async def test_waiting_results_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 10_000)
    hanging = Hanging()
    results = Results(hanging)
    for number in range(AT_ONCE):
        results.add(result(number))
    with capture_logs() as lines:
        results.add(result(1000, "x" * 20_000))  # one alone may be larger
        for number in range(5):
            results.add(result(2000 + number))
    assert [line["event"] for line in lines] == ["on_end is too slow, a result is dropped"] * 5
    hanging.go.set()
    await results.finish(PATIENCE)
    assert len(hanging.told) == AT_ONCE + 1


async def test_a_shutdown_does_not_wait_for_ever() -> None:
    hanging = Hanging()
    results = Results(hanging)
    for number in range(AT_ONCE + 2):
        results.add(result(number))
    with capture_logs() as lines:
        async with asyncio.timeout(PATIENCE):
            await results.finish(0.05)
            await results.close()
    assert [(line["event"], line["count"]) for line in lines] == [("results are dropped", 2)]
    assert len(hanging.told) == AT_ONCE


async def test_an_odd_generation_is_logged() -> None:
    told: list[Any] = []

    class Odd:
        session_id = "01234567-odd"
        transcript: object = object()

        @property
        def feed(self) -> None:
            raise ValueError("odd")

    results, odd = Results(told.append), Odd()  # type: ignore[arg-type]  # as above
    with capture_logs() as lines:
        results.take(odd)  # type: ignore[arg-type]  # it is odd
    assert [line["event"] for line in lines] == ["no result for on_end"]
    assert odd.transcript is None
    assert told == []
