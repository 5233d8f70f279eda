"""One generation: the single upstream call of a session, from its claim to its end.

It is a task of its own and not the request of a page: viewers come and go. What it reads goes to the feed at once and
to the journal behind it. `core.lifecycle.GENERATION` says what happens when; this module does it.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import structlog

from broker.core.dialect import CHAT
from broker.core.errors import (
    Abandoned,
    DeadlineExceeded,
    GenerationFailed,
    ServerShutdown,
    SessionError,
    StoreUnavailable,
    UpstreamInterrupted,
    UpstreamTimeout,
    WorkerLost,
)
from broker.core.events import chunk_events, error_data
from broker.core.lifecycle import CANCELLED, FINISHED, Action, Event, Lifecycle, Proposal, Step
from broker.core.replay import Batch
from broker.core.session import Cursor, State, Terminal, short
from broker.relay.feed import Feed
from broker.relay.finishing import ALL, DECIDE_TIMEOUT, NOTHING, Finishing
from broker.relay.upstream_reader import UpstreamReader
from broker.store.sessions import EndConflict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from broker.relay.config import GenerationLimits
    from broker.relay.settlement import Settlement
    from broker.store.accounts import Reservation
    from broker.store.sessions import Prepared, SessionStore
    from broker.upstream.client import UpstreamClient

log = structlog.get_logger(__name__)

FIRST_VIEWER = 1.0
"""Seconds that a new generation waits for its first viewer at least, however short the grace."""

ABANDONED = Proposal(Step.ABANDON, Abandoned())


class JournalQueue(Protocol):
    """What a generation needs of the journal writer."""

    def flush_soon(self, generation: Generation) -> None:
        """Write this one's events at the next tick."""


class OwnershipWatch(Protocol):
    """What a generation needs of the part that knows whether the session is still this worker's."""

    def check_for_freeze(self, now: float) -> None:
        """Find out whether the process stood still, before anything is shown."""

    def confirm(self, generation: Generation) -> None:
        """Ask Redis whether the session is still ours, and call `confirmed` when that is known or takes too long."""


class Generation:
    """The upstream call of one session, its feed, and the decision of its end.

    Args:
        session_id: whose generation.
        reservation: what it has taken from the accounts, under the token of its claim.
        prepared: what to ask.
        upstream: whom to ask.
        sessions: where the end is decided.
        bounds: how long and how much.
        settlement: who books what it took.
        journal: where its events are written behind the viewers; None where events are not journaled.
        ownership: notices that the process stood still.
        write_later: takes over an end that Redis could not be told of in time.

    Attributes:
        feed: its events.
        lifecycle: where it stands.
        saved: number of the last event in the journal.
        watched_elsewhere: a viewer on another worker was registered when Redis was last asked.
        was_watched: a viewer of this worker has come.
        finishing: what it took, and which end stands.
    """

    def __init__(
        self,
        session_id: str,
        reservation: Reservation,
        prepared: Prepared,
        *,
        upstream: UpstreamClient,
        sessions: SessionStore,
        bounds: GenerationLimits,
        settlement: Settlement,
        journal: JournalQueue | None,
        ownership: OwnershipWatch,
        write_later: Callable[[Generation, Terminal], None],
    ) -> None:
        self.session_id = session_id
        self.reservation = reservation
        self.claim_id = reservation.claim_id
        # Only the reading needs the prompt, and only until it is sent.
        self.prepared = replace(prepared, request=b"")
        self.feed = Feed()
        self.lifecycle = Lifecycle()
        self.saved = 0
        self.watched_elsewhere = False
        self.was_watched = False
        self._sessions = sessions
        self._bounds = bounds
        self._journal = journal
        self._ownership = ownership
        self._write_later = write_later
        self._loop = asyncio.get_running_loop()
        self._reader = UpstreamReader(
            prepared, dialect=CHAT, upstream=upstream, bounds=bounds, take=self._take
        )
        self.finishing = Finishing(
            reservation,
            self.prepared,
            feed=self.feed,
            reader=self._reader,
            unsaved=self.unsaved,
            sessions=sessions,
            settlement=settlement,
            images=CHAT.count_pictures(prepared.request),
        )
        self._started_at = self._loop.time()
        self._viewers = 0
        self._unwatched_since: float | None = self._started_at + max(0.0, FIRST_VIEWER - bounds.grace)
        self._to_decide = asyncio.Event()
        self._reading_task: asyncio.Task[SessionError | None] | None = None
        self._abandoning: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None

    # For the worker, the journal and the viewers

    def start(self) -> asyncio.Task[None]:
        """Start the task, which ends by itself and does not raise. It belongs to the caller."""
        self._reading_task = asyncio.create_task(self._read(), name=f"reader {short(self.session_id)}")
        self._task = asyncio.create_task(self._run(), name=f"generation {short(self.session_id)}")
        return self._task

    @property
    def state(self) -> State:
        """`RUNNING`, or how it ended."""
        return State.RUNNING if self.feed.end is None else self.feed.end.state

    def cancel(self) -> bool:
        """Stop because somebody asked for it. Returns True if that decides the end, as far as this worker knows."""
        in_time = self.feed.end is None
        self._handle(Event.CANCEL, CANCELLED)
        return in_time and self.lifecycle.proposal is CANCELLED

    def shut_down(self) -> None:
        """Stop because the worker ends."""
        self._handle(Event.SHUTDOWN, Proposal(Step.FAIL, ServerShutdown()))

    def fence(self, end: Terminal | None) -> None:
        """Stop and write nothing more: the session is another worker's, or has ended.

        Args:
            end: the end that Redis holds; None where the session is gone.
        """
        lost = Terminal(
            State.LOST, "error", Cursor(2, self.feed.shown + 1, end=True), error_data(WorkerLost())
        )
        self._handle(Event.FENCED, standing=end or lost)

    async def ended(self) -> State:
        """Wait for the end and return what it was."""
        if self._task is not None and not self._task.done():
            await asyncio.wait([self._task])
        return self.state

    @property
    def wrote_its_end(self) -> bool:
        """True if the end that stands is this worker's own, so that its feed and the journal tell the same."""
        end = self.feed.end
        return end is not None and end.id.epoch == 1 and end != self.lifecycle.fence

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count a viewer for as long as the block runs."""
        self._viewers += 1
        self.was_watched = True
        self._unwatched_since = None
        try:
            yield
        finally:
            self._viewers -= 1
            self._note_watchers()

    def note_elsewhere(self, *, watched: bool) -> None:
        """Learn whether a viewer on another worker is registered."""
        self.watched_elsewhere = watched
        self._note_watchers()

    def check(self, now: float) -> None:
        """Look at the timers. Called by the ticker a few times a second, so that no timer is set per chunk."""
        if not self.lifecycle.is_open:
            return
        if now >= self._started_at + self._bounds.deadline:
            self._handle(Event.TIMED_OUT, Proposal(Step.FAIL, DeadlineExceeded()))
        elif now >= self._reader.data_due:
            # Once the answer is finished, silence is its end.
            finished = self._reader.answer.finished
            if finished:
                self._reader.answer.accept_usage()
            self._handle(Event.TIMED_OUT, FINISHED if finished else Proposal(Step.FAIL, UpstreamTimeout()))
        elif self._unwatched_since is not None and now >= self._unwatched_since + self._bounds.grace:
            self._handle(Event.GRACE_OVER)

    def froze(self, seconds: float) -> None:
        """Learn that this process stood still for so long.

        The upstream and the pages were not listened to meanwhile, so their silence does not count. The deadline stays.
        """
        if Action.EXTEND_TIMERS in self._handle(Event.FROZE):
            self._reader.data_due += seconds
            if self._unwatched_since is not None:
                self._unwatched_since += seconds

    def confirmed(self) -> None:
        """Learn that the session is still ours, or that Redis did not say otherwise in time."""
        self._handle(Event.CONFIRMED)

    def unsaved(self, limit: int = ALL) -> Batch:
        """Events that the journal does not have yet and should, at most ``limit`` bytes or one batch."""
        if self._journal is None:
            return NOTHING
        if self.lifecycle.end_is_numbered:
            # What came since must not take the number of the end that Redis has been sent.
            return self.feed.after(max(self.saved, self.feed.first - 1), limit)
        return self.feed.unsaved(self.saved, limit)

    def has_unsaved(self) -> bool:
        """True if the journal lacks events that it should have."""
        return self._journal is not None and self.saved < self.feed.last

    # What happens to it

    def _handle(
        self, event: Event, proposal: Proposal | None = None, standing: Terminal | None = None
    ) -> tuple[Action, ...]:
        actions = self.lifecycle.handle(event, proposal=proposal, standing=standing)
        for action in actions:
            self._act(action)
        return actions

    def _act(self, action: Action) -> None:
        if action is Action.HIDE:
            self.feed.hide()
        elif action is Action.SHOW:
            self.feed.show()
        elif action is Action.STOP_READING and self._reading_task is not None:
            self._reading_task.cancel()
        elif action is Action.CONFIRM:
            self._ownership.confirm(self)
        elif action is Action.ABANDON:
            self._abandoning = asyncio.create_task(self._ask_to_abandon())
        elif action is Action.DECIDE:
            self._to_decide.set()
        # The other actions are done where their event is told.

    def _note_watchers(self) -> None:
        if self._viewers or self.watched_elsewhere:
            self._unwatched_since = None
        elif self._unwatched_since is None:
            self._unwatched_since = self._loop.time()
            if self._bounds.grace == 0:
                self._handle(Event.GRACE_OVER)

    async def _ask_to_abandon(self) -> None:
        """Have Redis end the session, which it refuses while somebody watches on another worker."""
        end = self.finishing.terminal(ABANDONED, after=self.feed.shown)
        try:
            answer = await self._sessions.end(
                *(self.session_id, self.claim_id, end, self.unsaved()),
                timeout=DECIDE_TIMEOUT,
                only_if_unwatched=True,
            )
        except StoreUnavailable:
            # Redis may write it yet, so no other end may be proposed.
            self._handle(Event.ABANDON_UNREACHABLE, ABANDONED, end)
            self._write_later(self, end)
            return
        except Exception:
            log.exception("abandoning failed", session=short(self.session_id))
            self._handle(Event.ABANDON_REFUSED, ABANDONED)
            return
        if not isinstance(answer, EndConflict):
            if answer.end is None:
                self._handle(Event.ABANDON_REFUSED, ABANDONED)
            else:
                self._handle(Event.ABANDON_STORED, ABANDONED, answer.end)
        elif answer.kind == "cancel":
            self._handle(Event.CANCEL_FOUND)
        elif answer.kind == "watched":
            self._handle(Event.WATCHED)
            self.note_elsewhere(watched=True)
        else:
            self._handle(Event.ABANDON_REFUSED, ABANDONED)

    # The task

    async def _run(self) -> None:
        read_on = False
        try:
            await self._read_to_the_end()
            await self._to_decide.wait()
            await self._end()
            read_on = self.finishing.wait_for_usage(self.state)
        finally:
            # Both are done unless this task was cancelled, which only the close of the worker does.
            owned = [task for task in (self._reading_task, self._abandoning) if task is not None]
            for task in owned:
                task.cancel()
            await asyncio.gather(*owned, return_exceptions=True)
            if not read_on:
                await self._close_reader()

    async def _read_to_the_end(self) -> None:
        reader = self._reading_task
        if reader is None:
            return
        await asyncio.wait([reader])
        failure = None if reader.cancelled() else reader.result()
        if isinstance(failure, UpstreamInterrupted) and self._reader.answer.finished:
            failure = None  # once the answer is finished, what becomes of the line does not matter
            self._reader.answer.accept_usage()
        self._handle(Event.UPSTREAM_ENDED, FINISHED if failure is None else Proposal(Step.FAIL, failure))
        if not self._reader.answer.complete and not self._reader.may_tell_usage:
            await self._close_reader()

    async def _close_reader(self) -> None:
        try:
            await self._reader.close()
        except Exception:  # what becomes of the line is no part of the session
            log.exception("upstream cannot be closed", session=short(self.session_id))

    async def _read(self) -> SessionError | None:
        """Read until the upstream ends, and return what failed."""
        try:
            await self._reader.run()
        except SessionError as error:
            # A finished session is kept for replay, and the frames of a traceback would keep its prompt with it.
            error.__cause__ = error.__context__ = None
            return error.with_traceback(None)
        except Exception:
            log.exception("generation failed", session=short(self.session_id))
            return GenerationFailed()
        return None

    async def _end(self) -> None:
        """Have Redis decide the end, settle what the answer took, and tell the viewers."""
        while self.feed.end is None:
            event, end = await self.finishing.decide(self.lifecycle.proposal, self.lifecycle.standing)
            actions = self._handle(event, standing=end if event is Event.END_STORED else None)
            if Action.WRITE_LATER in actions or (
                Action.SETTLE in actions and not await self.finishing.settle_in_time(end.state)
            ):
                self._write_later(self, end)
            if Action.TELL in actions:
                self.feed.finish(end)
                log.info(
                    "session ended", session=short(self.session_id), state=end.state, events=self.feed.last
                )

    def _take(self, chunks: list[bytes], now: float) -> None:
        self._ownership.check_for_freeze(now)
        first = self.feed.last + 1
        if self.watched_elsewhere and self._journal is not None:
            self._journal.flush_soon(self)
        self.feed.add(Batch(first, first + len(chunks) - 1, chunk_events(chunks, first)), now)
        if (
            self._journal is None
            and self.feed.live == self._viewers > 0
            and self.feed.shown == self.feed.last
        ):
            self.feed.trim(self.feed.last)  # nobody will ask for it again
