"""One generation: what its viewers get, its timers, how it is abandoned, and how it ends after a bug."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest
from structlog.testing import capture_logs

from broker.core.errors import StoreUnavailable, UpstreamInterrupted
from broker.core.lifecycle import Phase
from broker.core.session import Cursor, State, Terminal
from broker.relay.config import GenerationLimits
from broker.relay.feed import WINDOW
from broker.relay.finishing import NOTHING
from broker.relay.generation import FIRST_VIEWER, UNCHECKED, Generation
from broker.relay.upstream_reader import QUIET_END
from broker.store.sessions import EndConflict, SessionStatus
from tests.clock import Clock, run_ready_tasks
from tests.relay.fakes import (
    COUNTED,
    DONE,
    ERROR,
    FINISH,
    HELLO,
    PREPARED,
    RESERVATION,
    SESSION,
    BugError,
    FakeSessions,
    FakeSettlement,
    FakeStream,
    FakeUpstream,
    data,
    text,
    watched,
)

if TYPE_CHECKING:
    pass

GRACE, FIRST_DATA, IDLE, DEADLINE = 20.0, 120.0, 60.0, 600.0
LIMITS = GenerationLimits(
    first_data_timeout=FIRST_DATA,
    idle_timeout=IDLE,
    deadline=DEADLINE,
    grace=GRACE,
    max_response=100_000,
    max_retries=0,
)
ELSEWHERE = Terminal(State.LOST, "error", Cursor(2, 2, end=True), b"{}")
WATCHED, CANCEL_ACCEPTED = EndConflict("watched", 0), EndConflict("cancel", 0)


class FakeOwnership:
    """Confirms nothing.

    Attributes:
        to_confirm: generations that asked to be confirmed.
        error: is raised by the next check for a freeze.
    """

    tick_due = float("-inf")

    def __init__(self) -> None:
        self.to_confirm: list[Generation] = []
        self.error: Exception | None = None

    def check_for_freeze(self, _now: float) -> None:
        if self.error is not None:
            raise self.error

    def confirm(self, generation: Generation) -> None:
        self.to_confirm.append(generation)


class FakeJournal:
    """Notes what is urgent."""

    def __init__(self) -> None:
        self.urgent: list[Generation] = []

    def flush_soon(self, generation: Generation) -> None:
        self.urgent.append(generation)


class LiveViewer:
    """Notes what the feed pushes."""

    def __init__(self) -> None:
        self.events = b""

    def push(self, batch: tuple[int, int, bytes], now: float) -> None:
        self.events += batch[2]

    def wake(self) -> None:
        """The tests read the end from the feed."""


class Running:
    """A generation, and everything around it.

    Attributes:
        later: ends that were handed over to be written later.
        later_error: is raised when one is handed over.
    """

    def __init__(
        self,
        *answers: SessionStatus | EndConflict | Exception | asyncio.Event,
        limits: GenerationLimits = LIMITS,
        journaled: bool = True,
        opens: bool = True,
    ) -> None:
        self.clock = Clock(now=1000.0)
        self.stream = FakeStream()
        self.upstream = FakeUpstream(self.clock, *[self.stream] if opens else [])
        self.sessions = FakeSessions(*answers)
        self.settlement = FakeSettlement()
        self.ownership = FakeOwnership()
        self.journal = FakeJournal()
        self.later: list[Terminal] = []
        self.later_error: Exception | None = None
        self.generation = Generation(
            SESSION,
            RESERVATION,
            PREPARED,
            upstream=cast("Any", self.upstream),
            sessions=cast("Any", self.sessions),
            limits=limits,
            settlement=cast("Any", self.settlement),
            journal=self.journal if journaled else None,
            ownership=self.ownership,
            write_later=self._write_later,
            clock=self.clock,
        )
        self.feed = self.generation.feed

    def _write_later(self, _generation: Generation, end: Terminal) -> None:
        if self.later_error is not None:
            raise self.later_error
        self.later.append(end)

    async def read(self, *reads: bytes | Exception | None) -> None:
        """Let the upstream send these."""
        self.stream.send(*reads)
        await run_ready_tasks()

    async def at(self, seconds: float) -> None:
        """Check the timers as the worker does, until so many seconds after now."""
        until = self.clock.now + seconds
        self.check()
        while self.clock.now < until:
            await self.clock.advance(min(UNCHECKED / 2, until - self.clock.now))
            self.check()
        await run_ready_tasks()

    def check(self) -> None:
        if self.clock.now >= self.generation.check_at:
            self.generation.check(self.clock.now)

    @property
    def phase(self) -> Phase:
        return self.generation.lifecycle.phase

    async def code(self) -> str:
        """Wait for the end, and return its error code, or its finish reason."""
        async with asyncio.timeout(20):
            await self.generation.ended()
        assert self.feed.end is not None
        data = json.loads(self.feed.end.data)
        return str(data["code"] if self.feed.end.event == "error" else data["finishReason"])


@asynccontextmanager
async def running(
    *answers: Any, reads: tuple[bytes, ...] = (HELLO,), **options: Any
) -> AsyncIterator[Running]:
    """A generation that has read this much, and that nobody watches."""
    run = Running(*answers, **options)
    task = run.generation.start()
    try:
        await run.read(*reads)
        yield run
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# Events for viewers


async def test_a_chunk_is_pushed_to_live_viewers_at_once() -> None:
    viewer = LiveViewer()
    async with running(reads=()) as run:
        run.feed.go_live(viewer)
        await run.read(HELLO + HELLO, HELLO)
        assert [line for line in viewer.events.split(b"\n") if line.startswith(b"id")] == [
            b"id: 1-1",
            b"id: 1-2",
            b"id: 1-3",
        ]


async def test_the_end_is_written_and_settled_before_viewers_get_it() -> None:
    written, settled = asyncio.Event(), asyncio.Event()
    async with running(written) as run:
        run.settlement.errors = [settled]
        await run.read(FINISH, DONE, None)
        assert run.feed.end is None
        written.set()
        await run_ready_tasks()
        assert run.feed.end is None
        settled.set()
        assert await run.code() == "stop"
        assert run.settlement.settled == [(COUNTED, State.DONE, "gen-1")]
        assert run.generation.wrote_its_end


async def test_an_end_that_cannot_be_written_is_written_later() -> None:
    async with running(StoreUnavailable()) as run:
        await run.read(FINISH, DONE, None)
        assert await run.code() == "stop"
        assert run.later == [run.feed.end]


async def test_an_end_that_cannot_be_settled_is_settled_later() -> None:
    async with running() as run:
        run.settlement.errors = [StoreUnavailable()]
        await run.read(FINISH, DONE, None)
        assert await run.code() == "stop"
        assert run.later == [run.feed.end]


async def test_events_are_journaled_soon_while_watched_elsewhere() -> None:
    async with running() as run:
        assert run.journal.urgent == []
        run.generation.note_elsewhere(watched=True)
        await run.read(HELLO)
        assert run.journal.urgent == [run.generation]


async def test_without_a_journal_memory_holds_only_what_a_viewer_lacks() -> None:
    large = data(text("x" * WINDOW))
    async with running(journaled=False, limits=replace(LIMITS, max_response=10 * WINDOW)) as run:
        assert run.generation.unsaved() == NOTHING
        with watched(run.generation):
            await run.read(large, large)
            assert run.feed.size > 2 * WINDOW
            run.feed.go_live(LiveViewer())
            await run.read(HELLO)
            assert run.feed.size < WINDOW


# Ends from outside


@pytest.mark.parametrize("opens", [True, False], ids=["while reading", "before an answer"])
@pytest.mark.parametrize(("stop", "code"), [("cancel", "cancelled"), ("shut_down", "server_shutdown")])
async def test_a_generation_is_stopped(stop: str, code: str, opens: bool) -> None:
    async with running(opens=opens, reads=(HELLO,) if opens else ()) as run:
        getattr(run.generation, stop)()
        assert await run.code() == code
        assert run.stream.closed.is_set() is opens
        assert len(run.settlement.settled) == 1


async def test_a_cancel_counts_only_before_the_end() -> None:
    async with running() as run:
        assert run.generation.cancel()
        assert run.generation.cancel(), "again"
        await run.code()
        assert not run.generation.cancel()


async def test_a_cancel_accepted_elsewhere_replaces_the_end() -> None:
    async with running(CANCEL_ACCEPTED) as run:
        await run.read(FINISH, DONE, None)
        assert await run.code() == "cancelled"


@pytest.mark.parametrize("end", [ELSEWHERE, None])
async def test_a_fenced_generation_writes_nothing_more(end: Terminal | None) -> None:
    async with running() as run:
        run.generation.fence(end)
        await run.generation.ended()
        assert run.feed.end == end or run.generation.state is State.LOST
        assert run.sessions.sent == []
        assert not run.generation.wrote_its_end
        assert run.stream.closed.is_set()


# Ends of the upstream


async def test_an_error_of_the_upstream_ends_the_session() -> None:
    async with running() as run:
        await run.read(ERROR)
        assert await run.code() == "upstream_error"


@pytest.mark.parametrize(("finish", "code"), [((), "upstream_interrupted"), ((FINISH,), "stop")])
async def test_a_reset_matters_only_before_the_finish(finish: tuple[bytes, ...], code: str) -> None:
    async with running() as run:
        await run.read(*finish, UpstreamInterrupted())
        assert await run.code() == code


async def test_usage_behind_an_error_is_read_on_in_the_background() -> None:
    async with running() as run:
        run.settlement.usage = COUNTED._replace(estimated=True)
        await run.read(ERROR)
        await run.code()
        assert len(run.settlement.reading_on) == 1
        assert not run.stream.closed.is_set(), "it is closed by the background work"


# Timers


@pytest.mark.parametrize(
    ("reads", "seconds", "code"),
    [
        ((), FIRST_DATA, "upstream_timeout"),
        ((HELLO,), IDLE, "upstream_timeout"),
        ((HELLO, FINISH), QUIET_END, "stop"),
    ],
    ids=["first data", "between data", "after the finish"],
)
async def test_silence_of_the_upstream_ends_the_session(
    reads: tuple[bytes, ...], seconds: float, code: str
) -> None:
    async with running(reads=reads) as run:
        with watched(run.generation):
            await run.at(seconds - 0.1)
            assert run.phase is Phase.RELAYING
            await run.at(0.1)
            assert await run.code() == code


async def test_the_deadline_ends_an_answer_that_goes_on() -> None:
    async with running() as run:
        with watched(run.generation):
            while run.clock.now < 1000.0 + DEADLINE - 50:
                await run.at(50)
                await run.read(HELLO)
            assert run.phase is Phase.RELAYING
            await run.at(50)
            assert await run.code() == "deadline_exceeded"


async def test_an_unwatched_session_is_abandoned_after_the_grace() -> None:
    async with running() as run:
        await run.at(GRACE - 0.1)
        assert run.phase is Phase.RELAYING
        await run.at(0.1)
        assert await run.code() == "abandoned"


async def test_the_grace_begins_when_the_last_viewer_leaves() -> None:
    async with running() as run:
        with watched(run.generation):
            await run.at(30)
        await run.at(GRACE - 0.1)
        assert run.phase is Phase.RELAYING
        with watched(run.generation):  # a viewer returns in time
            await run.read(HELLO)
            await run.at(20)
        await run.at(GRACE)
        assert await run.code() == "abandoned"


async def test_a_viewer_elsewhere_keeps_a_session_alive() -> None:
    async with running() as run:
        run.generation.note_elsewhere(watched=True)
        await run.at(30)
        assert run.phase is Phase.RELAYING
        run.generation.note_elsewhere(watched=False)
        await run.at(GRACE)
        assert await run.code() == "abandoned"


async def test_a_grace_that_is_shorter_than_the_time_between_checks_is_kept() -> None:
    async with running(limits=replace(LIMITS, grace=UNCHECKED / 4)) as run:
        with watched(run.generation):
            run.check()
            assert run.generation.check_at >= run.clock.now + UNCHECKED / 2
        await run.clock.advance(UNCHECKED / 4)
        run.check()
        assert run.phase is Phase.ABANDONING


async def test_timers_are_not_checked_while_nothing_can_be_due() -> None:
    async with running() as run:
        for _ in range(10):
            run.check()
            assert run.generation.check_at == run.clock.now + UNCHECKED
            await run.clock.advance(UNCHECKED)
        assert run.phase is Phase.RELAYING


async def test_without_grace_a_session_ends_with_its_last_viewer() -> None:
    async with running(limits=replace(LIMITS, grace=0)) as run:
        with watched(run.generation):
            await run.at(50)
            assert run.phase is Phase.RELAYING
        assert await run.code() == "abandoned"


async def test_without_grace_the_first_viewer_has_a_moment_to_come() -> None:
    async with running(limits=replace(LIMITS, grace=0)) as run:
        await run.at(FIRST_VIEWER - 0.1)
        assert run.phase is Phase.RELAYING
        await run.at(0.1)
        assert await run.code() == "abandoned"


# Freezes


async def test_after_a_freeze_nothing_is_shown_until_confirmed() -> None:
    async with running() as run:
        run.generation.froze(5)
        assert run.ownership.to_confirm == [run.generation]
        await run.read(HELLO)
        assert (run.feed.shown, run.feed.last) == (1, 2)
        run.generation.confirmed()
        assert run.feed.shown == 2


async def test_a_freeze_moves_all_timers_but_the_deadline() -> None:
    async with running() as run:
        run.clock.now += 100  # frozen
        run.generation.froze(100)
        run.generation.confirmed()
        await run.at(GRACE - 0.1)
        assert run.phase is Phase.RELAYING
        run.clock.now += DEADLINE
        run.generation.froze(DEADLINE)
        run.generation.confirmed()
        await run.at(0)
        assert await run.code() == "deadline_exceeded"


# Abandoning


async def test_redis_refuses_to_abandon_what_is_watched_elsewhere() -> None:
    async with running(WATCHED) as run:
        await run.at(GRACE)
        assert run.phase is Phase.CONFIRMING
        run.generation.confirmed()
        assert run.generation.watched_elsewhere
        await run.read(HELLO, FINISH, DONE, None)
        assert await run.code() == "stop"


@pytest.mark.parametrize(
    ("answer", "code", "later"),
    [
        (CANCEL_ACCEPTED, "cancelled", False),
        (StoreUnavailable(), "abandoned", True),
        (EndConflict("behind", 0), "abandoned", False),
        (SessionStatus(State.GONE), "abandoned", False),
        (BugError(), "abandoned", False),
    ],
    ids=["cancelled elsewhere", "away", "behind", "gone", "a bug"],
)
async def test_an_abandoned_session_ends_with_any_answer_of_redis(
    answer: Any, code: str, later: bool
) -> None:
    async with running(answer) as run:
        await run.at(GRACE)
        assert await run.code() == code
        assert bool(run.later) is later
        assert run.stream.closed.is_set()
        assert len(run.settlement.settled) == 1


async def test_events_that_come_while_redis_is_asked_are_not_shown() -> None:
    asked = asyncio.Event()
    async with running(asked) as run:
        await run.at(GRACE)
        await run.read(HELLO)
        assert (run.feed.shown, run.feed.last) == (1, 2)
        asked.set()
        assert await run.code() == "abandoned"
        assert run.feed.last == 1


async def test_an_end_during_an_abandon_waits_for_its_answer() -> None:
    asked = asyncio.Event()
    async with running(asked) as run:
        await run.at(GRACE)
        run.generation.cancel()
        await run_ready_tasks()
        assert run.phase is Phase.ABANDONING_STOPPED
        assert run.stream.closed.is_set()
        asked.set()
        assert await run.code() == "abandoned"


# Bugs, in each task


def is_settled_as(run: Running, state: State) -> bool:
    """Return True if usage and end are booked and written, or are handed over for that."""
    return bool(run.later) or [settled[1] for settled in run.settlement.settled] == [state]


async def test_a_bug_while_reading_is_an_internal_error() -> None:
    async with running() as run:
        await run.read(BugError())
        assert await run.code() == "internal_error"
        assert is_settled_as(run, State.FAILED)
        assert run.stream.closed.is_set()


async def test_a_bug_while_chunks_are_taken_is_an_internal_error() -> None:
    async with running() as run:
        run.ownership.error = BugError()
        await run.read(HELLO)
        assert await run.code() == "internal_error"
        assert is_settled_as(run, State.FAILED)


async def test_a_bug_before_the_end_is_an_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as run:

        def broken(_: Generation) -> None:
            raise BugError

        monkeypatch.setattr(Generation, "_read_to_the_end", broken)
        monkeypatch.setattr(Generation, "shut_down", broken)
        with capture_logs() as lines:
            task = asyncio.create_task(run.generation._run())
            await asyncio.wait_for(task, 20)
        assert await run.code() == "internal_error"
        assert run.later == [run.feed.end]
        assert run.stream.closed.is_set()
        assert "generation broke" in [line["event"] for line in lines]


async def test_a_bug_while_the_end_is_decided_still_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as run:

        async def broken(*_: object) -> None:
            raise BugError

        monkeypatch.setattr(run.generation.finishing, "decide", broken)
        await run.read(FINISH, DONE, None)
        assert await run.code() == "stop"
        assert run.later == [run.feed.end]


async def test_a_viewer_that_breaks_at_the_end_prevents_no_settlement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken(LiveViewer):
        def wake(self) -> None:
            raise BugError

    async with running() as run:

        async def broken(*_: object) -> None:
            raise BugError

        monkeypatch.setattr(run.generation.finishing, "decide", broken)
        run.feed.go_live(Broken())
        await run.read(FINISH, DONE, None)
        async with asyncio.timeout(20):
            await run.generation.ended()
        assert run.later == [run.feed.end]


async def test_a_bug_while_abandoning_is_an_internal_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running() as run:
        build = run.generation.finishing.terminal
        broken = iter([BugError()])

        def terminal(*args: Any, **options: Any) -> Terminal:
            for error in broken:
                raise error
            return build(*args, **options)

        monkeypatch.setattr(run.generation.finishing, "terminal", terminal)
        await run.at(GRACE)
        assert await run.code() == "internal_error"
        assert run.later == [run.feed.end]
        assert run.stream.closed.is_set()


async def test_a_bug_in_handing_over_an_end_does_not_hide_it() -> None:
    async with running(StoreUnavailable()) as run:
        run.later_error = BugError()
        await run.read(FINISH, DONE, None)
        async with asyncio.timeout(20):
            await run.generation.ended()
        assert run.feed.end is not None


async def test_a_bug_while_the_stream_is_closed_changes_nothing() -> None:
    async with running() as run:
        run.stream.close_error = BugError()
        await run.read(FINISH, DONE, None)
        assert await run.code() == "stop"
        assert is_settled_as(run, State.DONE)


# Cancellation, as the close of a worker does it


@pytest.mark.parametrize("at", ["asking", "reading", "abandoning", "deciding", "settling"])
async def test_a_cancelled_generation_leaves_nothing_open(at: str) -> None:
    never = asyncio.Event()
    answers = [never] if at in {"abandoning", "deciding"} else []
    run = Running(*answers, opens=at != "asking")
    task = run.generation.start()
    await run.read(HELLO)
    if at == "settling":
        run.settlement.errors = [never]
    if at == "abandoning":
        await run.at(GRACE)
    elif at in {"deciding", "settling"}:
        await run.read(FINISH, DONE, None)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()
    assert run.stream.closed.is_set() is (at != "asking")
    assert [each.get_name() for each in asyncio.all_tasks() if each is not asyncio.current_task()] == []
