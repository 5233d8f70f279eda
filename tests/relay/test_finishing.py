"""The end of a generation: what is proposed, what Redis decides, and what is booked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

import pytest

from broker.core.accounts import Usage, usage_at_worst
from broker.core.chat_answer import ChatAnswer
from broker.core.errors import StoreUnavailable, UpstreamTimeout
from broker.core.lifecycle import CANCELLED, FINISHED, Event, Proposal, Step
from broker.core.replay import Batch
from broker.core.session import Cursor, State, Terminal
from broker.relay import finishing as finishing_module
from broker.relay.feed import Feed
from broker.relay.finishing import END_TRIES, NOTHING, Finishing
from broker.relay.generation import ABANDONED
from broker.store.sessions import EndConflict, SessionStatus
from tests.chunks import events_of
from tests.clock import Clock, run_ready_tasks
from tests.relay.fakes import (
    COUNTED,
    PREPARED,
    RESERVATION,
    USAGE,
    WORST,
    BugError,
    FakeSessions,
    FakeSettlement,
    cancel,
)

if TYPE_CHECKING:
    from broker.relay.upstream_reader import UpstreamReader

FAILED = Proposal(Step.FAIL, UpstreamTimeout())
ELSEWHERE = Terminal(State.LOST, "error", Cursor(2, 3, end=True), b"{}")
CANCEL_ACCEPTED = EndConflict("cancel", 0)
ESTIMATED = Usage(10, 5, cost=3, estimated=True)


def batch(first: int, last: int) -> Batch:
    return Batch(first, last, events_of([b"{}"] * (last - first + 1), first))


class FakeReader:
    """A reader that has read an answer."""

    def __init__(self) -> None:
        self.answer = ChatAnswer()
        self.answer.generation_id = "gen-1"
        self.asked = True
        self.asked_at: float | None = 1000.0
        self.first_chunk_at: float | None = None
        self.may_tell_usage = False
        self.tells_usage = True

    async def read_usage(self) -> bool:
        return self.tells_usage

    async def close(self) -> None:
        """Nothing is open."""


class Ending:
    """The end of a generation that has relayed three events, of which the journal has one."""

    def __init__(self, *answers: SessionStatus | EndConflict | Exception | asyncio.Event) -> None:
        self.clock = Clock(now=1000.0)
        self.sessions = FakeSessions(*answers)
        self.settlement = FakeSettlement()
        self.reader = FakeReader()
        self.feed = Feed()
        self.feed.add(batch(1, 1), 0.0)
        self.feed.add(batch(2, 3), 0.0)
        self.finishing = Finishing(
            RESERVATION,
            PREPARED,
            feed=self.feed,
            reader=cast("UpstreamReader", self.reader),
            unsaved=lambda: batch(2, 3),
            sessions=cast("Any", self.sessions),
            settlement=cast("Any", self.settlement),
            clock=self.clock,
        )

    async def decide(self, proposal: Proposal | None = FINISHED) -> tuple[Event, Terminal]:
        return await self.finishing.decide(proposal, None)


# Deciding


@pytest.mark.parametrize(
    ("proposal", "state", "event"),
    [
        (None, State.DONE, "done"),
        (FINISHED, State.DONE, "done"),
        (CANCELLED, State.CANCELLED, "done"),
        (FAILED, State.FAILED, "error"),
        (ABANDONED, State.ABANDONED, "error"),
    ],
)
async def test_the_proposed_end_is_written_with_the_unsaved_events(
    proposal: Proposal | None, state: State, event: str
) -> None:
    ending = Ending()
    outcome, end = await ending.decide(proposal)
    assert outcome is Event.END_STORED
    assert (end.state, end.event, str(end.id)) == (state, event, "1-4.end")
    assert ending.sessions.sent == [(end, batch(2, 3))]


async def test_an_end_that_redis_has_already_stands() -> None:
    ending = Ending(SessionStatus(State.LOST, end=ELSEWHERE))
    assert await ending.decide() == (Event.END_STORED, ELSEWHERE)


async def test_redis_is_not_asked_where_the_end_is_known() -> None:
    ending = Ending()
    assert await ending.finishing.decide(FINISHED, ELSEWHERE) == (Event.END_STORED, ELSEWHERE)
    assert ending.sessions.sent == []
    assert ending.settlement.counts, "the usage is counted all the same"


async def test_an_accepted_cancel_asks_for_another_end() -> None:
    outcome, _ = await Ending(CANCEL_ACCEPTED).decide()
    assert outcome is Event.CANCEL_FOUND


@pytest.mark.parametrize(
    "answer",
    [StoreUnavailable(), asyncio.Event(), SessionStatus(State.GONE)],
    ids=["away", "too slow", "session gone"],
)
async def test_without_an_answer_the_proposed_end_is_for_later(
    answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finishing_module, "DECIDE_TIMEOUT", 0.01)
    outcome, end = await Ending(answer).decide()
    assert outcome is Event.END_UNREACHABLE
    assert end.state is State.DONE


async def test_a_bug_while_writing_leads_to_a_constant_end() -> None:
    ending = Ending(BugError())
    outcome, end = await ending.decide(FAILED)
    assert (outcome, end.state) == (Event.END_STORED, State.FAILED)
    assert json.loads(end.data)["code"] == "internal_error"
    assert ending.sessions.sent[-1] == (end, NOTHING)


async def test_two_bugs_while_writing_leave_the_end_for_later() -> None:
    outcome, end = await Ending(BugError(), BugError()).decide()
    assert (outcome, end.state) == (Event.END_UNREACHABLE, State.DONE)


# The journal behind the end


async def test_events_that_the_journal_lacks_are_sent_with_the_end() -> None:
    ending = Ending(EndConflict("behind", 0))
    outcome, end = await ending.decide()
    assert outcome is Event.END_STORED
    assert ending.sessions.sent[1] == (end, Batch(1, 3, batch(1, 3).events))


async def test_events_that_left_memory_leave_a_gap_before_the_end() -> None:
    ending = Ending(EndConflict("behind", 0))
    ending.feed.trim(1, keep=0)
    await ending.decide()
    assert ending.sessions.sent[1][1] == NOTHING


async def test_a_journal_that_stays_behind_leaves_the_end_for_later() -> None:
    ending = Ending(*[EndConflict("behind", 0)] * END_TRIES)
    outcome, _ = await ending.decide()
    assert outcome is Event.END_UNREACHABLE
    assert len(ending.sessions.sent) == END_TRIES


# The data of the end


async def test_done_has_the_facts_of_the_answer() -> None:
    ending = Ending()
    answer = ending.reader.answer
    answer.model, answer.provider, answer.finish_reason = "a/b-1", "Provider", "stop"
    answer.usage = USAGE
    ending.reader.first_chunk_at = 1000.25
    ending.clock.now = 1002.5
    _, end = await ending.decide()
    assert json.loads(end.data) == {
        "finishReason": "stop",
        "nativeFinishReason": None,
        "model": "a/b-1",
        "provider": "Provider",
        "generationId": "gen-1",
        "usage": USAGE,
        "cost": 3e-9,
        "estimated": False,
        "ttftMs": 250,
        "totalMs": 2500,
    }


async def test_an_end_may_be_numbered_after_an_earlier_event() -> None:
    assert str(Ending().finishing.terminal(ABANDONED, after=2).id) == "1-3.end"


# Counting and settling


async def test_usage_is_counted_once_with_the_time_since_the_request() -> None:
    ending = Ending()
    await ending.clock.advance(30)
    await ending.decide()
    await ending.clock.advance(30)
    await ending.decide()
    assert ending.settlement.counts == [30]
    assert ending.finishing.usage == COUNTED


@pytest.mark.parametrize(("asked", "usage"), [(True, usage_at_worst(WORST)), (False, Usage())])
async def test_usage_that_cannot_be_counted_is_the_worst_case(asked: bool, usage: Usage) -> None:
    ending = Ending()
    ending.settlement.usage = BugError()
    ending.reader.asked = asked
    await ending.decide()
    assert ending.finishing.usage == usage


async def test_settling_books_the_usage_with_the_generation_id() -> None:
    ending = Ending()
    await ending.decide()
    assert await ending.finishing.settle_in_time(State.DONE)
    assert ending.settlement.settled == [(COUNTED, State.DONE, "gen-1")]


async def test_settling_counts_what_was_not_counted_yet() -> None:
    ending = Ending()
    await ending.finishing.settle(State.FAILED)
    assert ending.settlement.settled == [(COUNTED, State.FAILED, "gen-1")]


@pytest.mark.parametrize(
    "errors",
    [[StoreUnavailable()], [asyncio.Event()], [BugError(), BugError()], [BugError(), StoreUnavailable()]],
    ids=["away", "too slow", "two bugs", "a bug, then away"],
)
async def test_a_settlement_that_fails_is_reported(
    errors: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finishing_module, "DECIDE_TIMEOUT", 0.01)
    ending = Ending()
    await ending.decide()
    ending.settlement.errors = errors
    assert not await ending.finishing.settle_in_time(State.DONE)
    assert ending.settlement.settled == []


async def test_usage_that_cannot_be_booked_is_booked_at_its_worst() -> None:
    ending = Ending()
    await ending.decide()
    ending.settlement.errors = [BugError()]
    assert await ending.finishing.settle_in_time(State.DONE)
    assert ending.settlement.settled == [(usage_at_worst(WORST), State.DONE, None)]


# The usage behind an error


@pytest.mark.parametrize("usage", [COUNTED, ESTIMATED])
@pytest.mark.parametrize("may_tell", [True, False])
async def test_usage_is_awaited_only_where_it_would_correct(usage: Usage, may_tell: bool) -> None:
    ending = Ending()
    ending.settlement.usage = usage
    ending.reader.may_tell_usage = may_tell
    await ending.decide(FAILED)
    assert ending.finishing.wait_for_usage(State.FAILED) is (may_tell and usage.estimated)


@pytest.mark.parametrize("tells", [True, False])
async def test_usage_that_came_late_is_counted_and_settled(tells: bool) -> None:
    ending = Ending()
    ending.settlement.usage = ESTIMATED
    ending.reader.may_tell_usage, ending.reader.tells_usage = True, tells
    await ending.decide(FAILED)
    ending.finishing.wait_for_usage(State.FAILED)
    [(read, _)] = ending.settlement.reading_on
    ending.settlement.usage = COUNTED
    await read()
    assert ending.settlement.settled == ([(COUNTED, State.FAILED, "gen-1")] if tells else [])


# Samples


async def test_an_answer_that_ended_well_gives_a_speed() -> None:
    ending = Ending()
    assert ending.finishing.speed() is None
    answer = ending.reader.answer
    answer.complete, answer.finish_reason = True, "stop"
    answer.usage = {**USAGE, "completion_tokens": 400}
    await ending.clock.advance(4)
    await ending.decide()
    speed = ending.finishing.speed()
    assert speed is not None
    assert (speed.model, speed.client, speed.value) == ("a/b", "client", 100.0)


async def test_a_prompt_that_was_not_measured_gives_no_sample() -> None:
    ending = Ending()
    ending.reader.answer.usage = USAGE
    assert ending.finishing.sample() is None


# Cancellation, at each await

STEPS: dict[str, Callable[[Finishing], Awaitable[object]]] = {
    "count": lambda finishing: finishing.decide(FINISHED, None),
    "end": lambda finishing: finishing.decide(FINISHED, None),
    "settle": lambda finishing: finishing.settle_in_time(State.DONE),
}


@pytest.mark.parametrize("at", STEPS)
async def test_cancel_at_each_await_leaves_a_step_that_can_be_repeated(at: str) -> None:
    never = asyncio.Event()
    ending = Ending(*[never] if at == "end" else [])
    if at == "count":
        ending.settlement.usage = never
    elif at == "settle":
        ending.settlement.errors = [never]
    task = asyncio.ensure_future(STEPS[at](ending.finishing))
    await run_ready_tasks()
    await cancel(task)
    ending.settlement.usage = COUNTED
    outcome, end = await ending.decide()
    assert outcome is Event.END_STORED
    assert await ending.finishing.settle_in_time(end.state)
    assert ending.settlement.settled == [(COUNTED, State.DONE, "gen-1")]
