"""An end is sent, written and settled once, whichever part fails while it is made."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from broker.core.accounts import Usage, WorstCase, usage_at_worst
from broker.core.errors import StoreUnavailable, UpstreamTimeout
from broker.core.replay import Batch
from broker.core.session import State, Terminal
from broker.relay.config import GenerationLimits
from broker.relay.generation import Generation
from broker.relay.journal_writer import JournalWriter
from broker.relay.late_ends import LateEnds
from broker.store.accounts import Reservation
from broker.store.sessions import EndConflict, Prepared, SessionStatus
from tests.relay.fakes import Relaying, watched

WORST = WorstCase(tokens=5000, cost=700)
COUNTED = Usage(10, 5, cost=3)
LIMITS = GenerationLimits(
    first_data_timeout=60, idle_timeout=60, deadline=60, grace=0, max_response=1 << 20, max_retries=0
)
CHUNK = b'data: {"id":"gen-1","choices":[{"delta":{"content":"Hello"}}]}\n\n'

ENDS = {
    "finish": (State.DONE, "done"),
    "cancel": (State.CANCELLED, "done"),
    "fail": (State.FAILED, "error"),
    "abandon": (State.ABANDONED, "error"),
}


class BugError(Exception):
    """An error that nobody has thought of."""


class Unwritable:
    """A name that cannot be written as JSON."""

    def __str__(self) -> str:
        raise BugError


class World(Relaying):
    """Everything around a generation. Each part of it can be made to fail.

    Args:
        breaks: names of the parts that break, and how many times each.
    """

    secrets = ()
    generation_id = None
    status = 200
    tick_due = float("-inf")
    whole: dict[str, Any] | None = None

    def __init__(self, **breaks: int) -> None:
        self.breaks = breaks
        self.written: list[Terminal] = []
        self.settled: list[tuple[Usage, State]] = []
        self.late: list[Terminal] = []
        self.cancel_was_accepted = False
        self.reachable = True
        self.how = ""
        self.write_later: Callable[[Generation, Terminal], None] = lambda _, end: self.late.append(end)
        self.relayed = asyncio.Event()
        self.over = asyncio.Event()

    def step(self, name: str) -> None:
        if self.breaks.get(name, 0) > 0:
            self.breaks[name] -= 1
            raise BugError(name)

    # The upstream and its stream

    async def ask(self, *_: object, **__: object) -> World:
        if self.how == "never asked":
            self.step("open")
        return self

    async def blocks(self, _max_body: int) -> AsyncGenerator[bytes]:
        yield CHUNK
        self.relayed.set()
        await self.over.wait()
        if self.how == "fail":
            raise UpstreamTimeout("\ud800" if self.breaks.get("build") else "It is late.")
        yield b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'

    def close(self) -> None:
        self.step("close")

    # The sessions in Redis

    async def end(
        self, _id: str, _claim: str, end: Terminal, _rest: Batch, **_: object
    ) -> SessionStatus | EndConflict:
        self.step("write")
        if not self.reachable:
            raise StoreUnavailable
        if self.cancel_was_accepted and end.state is not State.CANCELLED:
            return EndConflict("cancel", 1)
        if not self.written:
            self.written.append(end)
        return SessionStatus(self.written[0].state, end=self.written[0])

    # The settlement

    async def count(self, *_: object, **__: object) -> Usage:
        self.step("count")
        return COUNTED

    async def settle(self, _reservation: Reservation, spent: Usage, state: State, _id: str | None) -> None:
        self.step("settle")
        self.settled.append((spent, state))

    # The journal, the watch on ownership, and the finished sessions

    def flush_soon(self, _generation: Generation) -> None:
        """Nobody waits for the journal."""

    def check_for_freeze(self, _now: float) -> None:
        """Nothing froze."""

    def replace_end(self, session_id: str, end: Terminal) -> None:
        """Nothing is cached."""


@asynccontextmanager
async def generation_in(world: World, **others: Any) -> AsyncIterator[Generation]:
    """A generation that has relayed one chunk and is watched."""
    parts: dict[str, Any] = dict.fromkeys(
        ("upstream", "sessions", "settlement", "journal", "ownership"), world
    )
    parts |= others
    generation = Generation(
        "01234567-session",
        Reservation("claim", "01234567-session", "anna", "m", WORST),
        Prepared(request=b"{}", model="m", prompt_tokens=100, referer="", client="anna", worst=WORST),
        limits=LIMITS,
        write_later=world.write_later,
        **parts,
    )
    task = generation.start()
    try:
        yield generation
        await task
    finally:
        task.cancel()


async def end_of(world: World, how: str) -> Terminal:
    """Let a generation end in this way, and return the end that its viewers get."""
    world.how = how
    async with asyncio.timeout(20), generation_in(world) as generation:
        with watched(generation):
            await world.relayed.wait()
            if world.breaks.get("build"):
                generation._reader.answer.provider = cast("Any", Unwritable())
            if how == "cancel":
                generation.cancel()
            elif how != "abandon":
                world.over.set()
            if how != "abandon":
                await generation.ended()
        await generation.ended()
    assert generation.feed.end is not None
    return generation.feed.end


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("part", ["nothing", "count", "build", "write", "settle", "close"])
async def test_any_single_bug_leaves_an_end_of_its_kind(how: str, part: str) -> None:
    state, event = ENDS[how]
    world = World(**{part: 1})
    end = await end_of(world, how)
    assert (end.state, end.event, str(end.id)) == (state, event, f"1-{int(str(end.id)[2:-4])}.end")
    assert world.written == [end]
    assert world.late == []
    spent = usage_at_worst(WORST) if part in ("count", "settle") else COUNTED
    assert world.settled == [(spent, state)]


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("part", ["write", "settle"])
async def test_an_end_that_cannot_be_written_is_tried_later(how: str, part: str) -> None:
    world = World(**{part: 100})
    end = await end_of(world, how)
    assert (end.state, end.event) == ENDS[how]
    assert world.late == [end]


async def test_constant_ends_have_the_fields_of_the_contract() -> None:
    ends = {how: json.loads((await end_of(World(build=1), how)).data) for how in ENDS}
    assert (ends["fail"]["code"], ends["fail"]["final"]) == ("internal_error", True)
    assert ends["abandon"]["code"] == "abandoned"
    assert ends["cancel"]["finishReason"] == "cancelled"
    whole = json.loads((await end_of(World(), "cancel")).data)
    assert ends["cancel"].keys() == ends["finish"].keys() == whole.keys()


@pytest.mark.parametrize("how", ["finish", "fail"])
@pytest.mark.parametrize("part", ["nothing", "count", "build"])
async def test_a_cancel_accepted_elsewhere_stands_despite_a_bug(how: str, part: str) -> None:
    world = World(**{part: 1})
    world.cancel_was_accepted = True
    end = await end_of(world, how)
    assert end.state is State.CANCELLED
    assert json.loads(end.data)["finishReason"] == "cancelled"
    assert [state for _, state in world.settled] == [State.CANCELLED]


async def test_an_end_of_another_worker_stands_without_a_count() -> None:
    world = World(count=1)
    async with asyncio.timeout(20), generation_in(world) as generation:
        with watched(generation):
            await world.relayed.wait()
            generation.fence(None)
            await generation.ended()
    assert generation.state is State.LOST
    assert world.settled == [(usage_at_worst(WORST), State.LOST)]


async def test_a_request_never_sent_costs_nothing_despite_a_bug() -> None:
    world = World(count=1)
    world.how = "never asked"
    async with asyncio.timeout(20), generation_in(world) as generation:
        with watched(generation):
            generation.cancel()  # before its task had its first turn
            await generation.ended()
    assert world.settled == [(Usage(), State.CANCELLED)]


class Joined:
    """Runs what is spawned at once, to be awaited."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    def spawn(self, work: Any) -> None:
        self.tasks.append(asyncio.create_task(work))


@pytest.mark.parametrize("part", ["nothing", "write", "settle"])
async def test_a_late_end_is_written_once_despite_a_bug(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.relay.late_ends.RETRY", 0.01)
    world, joined = World(), Joined()
    world.reachable = False
    journal = JournalWriter(cast("Any", None), interval=0.5)
    late = LateEnds(cast("Any", world), cast("Any", world), journal, spawn=joined.spawn)
    world.write_later = late.add
    end = await end_of(world, "finish")
    assert late.reservations()
    world.breaks, world.reachable = {part: 3}, True
    await asyncio.wait_for(asyncio.gather(*joined.tasks), 20)
    assert [each.state for each in world.written] == [end.state]
    assert {state for _, state in world.settled} == {State.DONE}
    assert late.reservations() == []
