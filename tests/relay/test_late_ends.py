"""An end that could not be written in time is written, and its usage booked, as soon as Redis is back."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, cast

import pytest
from structlog.testing import capture_logs

from broker.core.errors import StoreUnavailable
from broker.core.lifecycle import CANCELLED, Proposal
from broker.core.session import Cursor, State, Terminal
from broker.relay.late_ends import RETRY, TRIED_FOR, LateEnds
from broker.store.sessions import EndConflict
from tests.clock import Clock, run_ready_tasks
from tests.relay.fakes import RESERVATION, SESSION, BugError, cancel

if TYPE_CHECKING:
    from broker.relay.generation import Generation

DONE = Terminal(State.DONE, "done", Cursor(1, 5, end=True), b"{}")
STOPPED = Terminal(State.CANCELLED, "done", Cursor(1, 5, end=True), b"{}")
LOST = Terminal(State.LOST, "error", Cursor(2, 4, end=True), b"{}")
CANCEL_ACCEPTED = EndConflict("cancel", 0)

Answer = Terminal | EndConflict | Exception | asyncio.Event | None


class FakeFinishing:
    """Answers the next calls with these; then every end is written.

    Attributes:
        stored: the ends that were sent to Redis.
        settled: the states that were settled.
        settle_answers: what the next calls of `settle` raise; an event is waited for.
    """

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.stored: list[Terminal] = []
        self.settled: list[State] = []
        self.settle_answers: list[Exception | asyncio.Event] = []

    async def store(self, end: Terminal) -> Terminal | EndConflict | None:
        self.stored.append(end)
        answer: Answer = self.answers.pop(0) if self.answers else end
        if isinstance(answer, asyncio.Event):
            await answer.wait()
            return end
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def settle(self, state: State) -> None:
        if self.settle_answers:
            answer = self.settle_answers.pop(0)
            if not isinstance(answer, asyncio.Event):
                raise answer
            await answer.wait()
        self.settled.append(state)

    async def settle_in_time(self, state: State) -> bool:
        self.settled.append(state)
        return True

    def terminal(self, proposal: Proposal) -> Terminal:
        assert proposal is CANCELLED
        return STOPPED


class Around:
    """One generation, and all that `LateEnds` needs around it.

    Attributes:
        ended: lets the generation end.
        gone: what the membership says of a session that Redis does not have; an exception is raised.
        pending: generations whose events are counted as waiting for Redis.
        replaced: sessions of the finished cache and the ends that they got.
    """

    session_id = SESSION
    claim_id = RESERVATION.claim_id
    reservation = RESERVATION

    def __init__(self, *answers: Answer) -> None:
        self.finishing = FakeFinishing(*answers)
        self.has_ended = asyncio.Event()
        self.has_ended.set()
        self.gone: list[bool | Exception] = []
        self.pending: list[object] = []
        self.replaced: list[tuple[str, Terminal]] = []
        self.clock = Clock()
        self.tasks: list[asyncio.Task[None]] = []
        me = cast("Any", self)
        self.late_ends = LateEnds(me, me, me, spawn=self._spawn, clock=self.clock, pause=self.clock.pause)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.create_task(work))

    async def ended(self) -> State:
        await self.has_ended.wait()
        return State.DONE

    async def is_gone(self) -> bool:
        answer = self.gone.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def keep_pending(self, generation: Generation) -> None:
        self.pending.append(generation)

    def release_pending(self, generation: Generation) -> None:
        if generation in self.pending:
            self.pending.remove(generation)

    def replace_end(self, session_id: str, end: Terminal) -> None:
        self.replaced.append((session_id, end))

    async def write(self, end: Terminal = DONE) -> asyncio.Task[None]:
        """Hand over an end, and run until the first pause."""
        self.late_ends.add(cast("Generation", self), end)
        await run_ready_tasks()
        return self.tasks[-1]

    def is_over(self) -> bool:
        """Return True if nothing is left to do, and no reservation and no events are kept for it."""
        return self.tasks[-1].done() and not self.late_ends.reservations() and not self.pending


async def test_an_end_is_written_and_settled() -> None:
    around = Around()
    await around.write()
    assert (around.finishing.stored, around.finishing.settled) == ([DONE], [State.DONE])
    assert around.is_over()
    assert around.replaced == []


async def test_nothing_is_written_before_the_generation_has_ended() -> None:
    around = Around()
    around.has_ended.clear()
    await around.write()
    assert around.finishing.stored == []
    assert around.late_ends.reservations() == [RESERVATION]
    around.has_ended.set()
    await run_ready_tasks()
    assert around.is_over()


async def test_reservation_and_events_stay_until_the_end_is_written() -> None:
    around = Around(StoreUnavailable(), StoreUnavailable())
    await around.write()
    for _ in range(2):
        assert around.late_ends.reservations() == [RESERVATION]
        assert around.pending == [around]
        await around.clock.advance(RETRY)
    assert around.is_over()
    assert around.clock.pauses == [RETRY, RETRY]
    assert around.finishing.settled == [State.DONE]


async def test_a_cancel_accepted_meanwhile_is_the_end() -> None:
    around = Around(CANCEL_ACCEPTED)
    await around.write()
    assert around.finishing.stored == [DONE, STOPPED]
    assert around.finishing.settled == [State.CANCELLED]
    assert around.replaced == [(SESSION, STOPPED)]
    assert around.is_over()


async def test_an_end_written_by_another_worker_replaces_ours() -> None:
    around = Around(LOST)
    await around.write()
    assert around.finishing.settled == [State.LOST]
    assert around.replaced == [(SESSION, LOST)], "later readers get the end that stands"
    assert around.is_over()


@pytest.mark.parametrize(
    "answers",
    [(CANCEL_ACCEPTED, CANCEL_ACCEPTED), (CANCEL_ACCEPTED, StoreUnavailable()), (StoreUnavailable(),)],
    ids=["two conflicts", "a conflict, then away", "away"],
)
async def test_an_end_that_was_not_written_is_tried_again(answers: tuple[Answer, ...]) -> None:
    around = Around(*answers)
    await around.write()
    assert not around.is_over()
    await around.clock.advance(RETRY)
    assert around.is_over()


@pytest.mark.parametrize("gone", [False, StoreUnavailable()], ids=["perhaps written again", "away"])
async def test_a_session_that_may_be_written_again_is_waited_for(gone: bool | Exception) -> None:
    around = Around(None, None)
    around.gone = [gone, True]
    await around.write()
    assert around.finishing.settled == []
    await around.clock.advance(RETRY)
    assert around.finishing.settled == [State.DONE]
    assert around.is_over()


async def test_a_settlement_that_fails_is_tried_again() -> None:
    around = Around()
    around.finishing.settle_answers = [StoreUnavailable()]
    await around.write()
    assert not around.is_over()
    await around.clock.advance(RETRY)
    assert around.finishing.settled == [State.DONE]
    assert around.is_over()


async def test_an_unexpected_exception_is_logged_and_tried_again() -> None:
    around = Around(BugError())
    with capture_logs() as lines:
        await around.write()
    assert [line["event"] for line in lines] == ["late end cannot be written"]
    assert around.finishing.settled == [State.DONE]
    await around.clock.advance(RETRY)
    assert around.is_over()


async def test_an_end_is_given_up_when_its_time_is_over() -> None:
    around = Around(StoreUnavailable(), StoreUnavailable(), StoreUnavailable())
    await around.write()
    await around.clock.advance(RETRY)
    assert not around.is_over()
    around.clock.now += TRIED_FOR
    with capture_logs() as lines:
        await around.clock.advance(RETRY)
    assert [line["event"] for line in lines] == ["end given up"]
    assert around.is_over()
    assert around.finishing.settled == []


@pytest.mark.parametrize("at", ["ended", "store", "settle", "pause"])
async def test_cancel_at_each_await_releases_everything(at: str) -> None:
    never = asyncio.Event()
    answers: dict[str, list[Answer]] = {"store": [never], "pause": [StoreUnavailable()]}
    around = Around(*answers.get(at, []))
    if at == "ended":
        around.has_ended.clear()
    elif at == "settle":
        around.finishing.settle_answers = [never]
    await cancel(await around.write())
    assert around.is_over()
    assert around.finishing.settled == []
