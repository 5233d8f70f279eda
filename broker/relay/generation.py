"""One generation: the single upstream call of a session, from its claim to its end.

It is a task of its own and not the request of a page: viewers come and go. What it reads goes to the feed at once and
to the journal behind it; when it is over, for whatever reason, the end is decided in Redis and only then told.

There is one way to stop a generation from outside, `stop`, and everything uses it: a cancel, the timers, the end of
grace, the shutdown, the fence. The first reason given is the one that counts.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

import structlog

from broker.core.errors import (
    Abandoned,
    DeadlineExceeded,
    GenerationFailed,
    SessionError,
    StoreUnavailable,
    UpstreamInterrupted,
    UpstreamTimeout,
    WorkerLost,
)
from broker.core.events import chunk_events, error_data
from broker.core.replay import Batch
from broker.core.session import Cursor, State, Step, Terminal, short
from broker.relay.ending import ALL, DECIDE_TIMEOUT, NOTHING, Ending
from broker.relay.feed import Feed
from broker.relay.reading import Reading
from broker.store.sessions import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from broker.relay.settling import Settler
    from broker.relay.terms import Bounds
    from broker.store.accounts import Reservation
    from broker.store.sessions import Prepared, SessionStore
    from broker.upstream.client import UpstreamClient

log = structlog.get_logger(__name__)

FIRST_VIEWER = 1.0
"""Seconds that a new generation waits for its first viewer at least, however short the grace."""


class Halt(Enum):
    """Reasons to stop that are no failure."""

    CANCELLED = "cancelled"
    QUIET = "quiet"
    DECIDED = "decided"


class Generation:
    """The upstream call of one session, its feed, and the decision of its end.

    Args:
        session_id: whose generation.
        reservation: what it has taken from the accounts, under the token of its claim.
        prepared: what to ask.
        upstream: whom to ask.
        sessions: where the end is decided.
        bounds: how long and how much.
        settler: who books what it took.
        journaled: whether its events are journaled at all.
        write_later: takes over an end that Redis could not be told of in time.
        took: is told of every read that brought events.

    Attributes:
        feed: its events.
        state: `RUNNING`, then how it ended.
        saved: number of the last event in the journal.
        watched_elsewhere: a viewer on another worker was registered when Redis was last asked.
        fenced: the session is no longer this worker's.
        was_watched: a viewer of this worker has come.
        ending: what it took, and which end stands.
    """

    def __init__(
        self,
        session_id: str,
        reservation: Reservation,
        prepared: Prepared,
        *,
        upstream: UpstreamClient,
        sessions: SessionStore,
        bounds: Bounds,
        settler: Settler,
        journaled: bool,
        write_later: Callable[[Generation, Terminal], None],
        took: Callable[[Generation, float], None],
    ) -> None:
        self.session_id = session_id
        self.reservation = reservation
        self.token = reservation.token
        # Only the reading needs the prompt, and only until it is sent.
        self.prepared = replace(prepared, request=b"")
        self.feed = Feed()
        self.state = State.RUNNING
        self.saved = 0
        self.watched_elsewhere = False
        self.fenced = False
        self.was_watched = False
        self._sessions = sessions
        self._bounds = bounds
        self._journaled = journaled
        self._write_later = write_later
        self._took = took
        self._loop = asyncio.get_running_loop()
        self._reading = Reading(prepared, upstream=upstream, bounds=bounds, take=self._take)
        self.ending = Ending(
            reservation,
            self.prepared,
            feed=self.feed,
            reading=self._reading,
            unsaved=self.unsaved,
            sessions=sessions,
            settler=settler,
            write_later=partial(write_later, self),
        )
        self._started_at = self._loop.time()
        self._viewers = 0
        self._unwatched_since: float | None = self._started_at + max(0.0, FIRST_VIEWER - bounds.grace)
        self._begun = False
        self._open = True
        self._stop: SessionError | Halt | None = None
        self._decided: Terminal | None = None
        self._task: asyncio.Task[None] | None = None
        self._abandoning: asyncio.Task[None] | None = None

    # For the registry, the journal, the ticker and the viewers

    def start(self) -> asyncio.Task[None]:
        """Begin. The task belongs to the caller; it ends by itself and does not raise."""
        self._task = asyncio.create_task(self._run(), name=f"generation {short(self.session_id)}")
        return self._task

    def stop(self, reason: SessionError | Halt) -> bool:
        """Stop reading from the upstream and end for this reason; whether that is now certain."""
        if not self._open:
            return False
        if self._stop is None:
            self._stop = reason
            if (
                self._begun and self._task is not None
            ):  # a task cancelled before its first step would never run
                self._task.cancel()
        return self._stop is reason

    async def cancel(self) -> bool:
        """Stop because somebody asked for it; False where it has ended, or is about to, in something else."""
        if self._abandoning is not None:
            await asyncio.shield(self._abandoning)
        return self.stop(Halt.CANCELLED)

    async def ended(self) -> State:
        """Wait for the end and tell what it was."""
        if self._task is not None and not self._task.done():
            await asyncio.wait([self._task])
        return self.state

    def fence(self, end: Terminal | None) -> None:
        """The session is another's now, or gone: stop, write nothing more, and give the viewers the end that stands."""
        if not self._open:  # its end is being decided, or has just been written and told on another line
            return
        self.fenced = True
        self._decided = end or Terminal(
            State.LOST, "error", Cursor(2, self.feed.shown + 1, end=True), error_data(WorkerLost())
        )
        self.stop(Halt.DECIDED)

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
        if not self._open:
            return
        if now >= self._started_at + self._bounds.deadline:
            self.stop(DeadlineExceeded())
        elif now >= self._reading.data_due:
            self.stop(Halt.QUIET if self._reading.answer.finished else UpstreamTimeout())
        elif self._unwatched_since is not None and now >= self._unwatched_since + self._bounds.grace:
            self._abandon()

    def excuse(self, seconds: float) -> None:
        """Move the timers by the time that this process stood still.

        Whoever was not listened to meanwhile, upstream or page, was not silent. The deadline stays.
        """
        self._reading.data_due += seconds
        if self._unwatched_since is not None:
            self._unwatched_since += seconds

    def unsaved(self, limit: int = ALL) -> Batch:
        """Events that the journal does not have yet and should."""
        if not self._journaled:
            return NOTHING
        if self._abandoning is not None or self._decided is not None:
            # Its end has its number already, and what came since must not take that.
            return self.feed.after(max(self.saved, self.feed.first - 1), limit)
        return self.feed.unsaved(self.saved, limit)

    def has_unsaved(self) -> bool:
        """Whether there are any."""
        return self._journaled and self.saved < self.feed.last

    # Nobody watches

    def _note_watchers(self) -> None:
        if self._viewers or self.watched_elsewhere:
            self._unwatched_since = None
        elif self._unwatched_since is None:
            self._unwatched_since = self._loop.time()
            if self._bounds.grace == 0:
                self._abandon()

    def _abandon(self) -> None:
        """Begin the end of grace: Redis is asked first, for somebody may watch on another worker by now."""
        if self._open and self._abandoning is None:
            self.feed.pause()
            self._abandoning = asyncio.create_task(self._try_to_abandon())

    async def _try_to_abandon(self) -> None:
        failure = Abandoned()
        end = Terminal(
            State.ABANDONED, "error", Cursor(1, self.feed.shown + 1, end=True), error_data(failure)
        )
        try:
            answer = await self._sessions.end(
                self.session_id,
                self.token,
                end,
                self.unsaved(),
                timeout=DECIDE_TIMEOUT,
                only_if_unwatched=True,
            )
        except StoreUnavailable:
            self._decided = end  # and no other one: Redis may yet write it
            self._write_later(self, end)
            self.stop(failure)
            return
        finally:
            self._abandoning = None
        if not isinstance(answer, Refusal):
            self._decided = answer.end or end
            if answer.end is None:
                self._write_later(self, end)
            self.stop(Halt.DECIDED)
            return
        self.feed.resume()
        if answer.kind == "cancel":
            self.stop(Halt.CANCELLED)
        elif answer.kind == "watched":
            self.note_elsewhere(watched=True)
        else:
            self.stop(failure)

    # The task

    async def _run(self) -> None:
        self._begun = True
        try:
            step, failure = await self._read_all()
            if self._abandoning is not None:
                await asyncio.wait([self._abandoning])
            end = await self.ending.decide(self._decided, step, failure)
            self.state = end.state
            self.feed.finish(end)
            log.info("session ended", session=short(self.session_id), state=end.state, events=self.feed.last)
        finally:
            await self._reading.let_go()

    async def _read_all(self) -> tuple[Step, SessionError | None]:
        """Relay the whole answer and tell how it ended."""
        failure = await self._read()
        self._open = False
        self.feed.pause()  # what is held back now is shown with the end, where that counts it
        answer = self._reading.answer
        if isinstance(self._stop, SessionError):
            failure = self._stop
        if isinstance(failure, UpstreamInterrupted) and answer.finished:
            failure = None  # once the answer is finished, what becomes of the line is of no interest
        if not answer.complete:
            await self._reading.let_go()
        if failure is not None:
            return (Step.ABANDON if isinstance(failure, Abandoned) else Step.FAIL), failure
        return (Step.CANCEL if self._stop is Halt.CANCELLED else Step.FINISH), None

    async def _read(self) -> SessionError | None:
        """Read until the upstream or `stop` ends it, and tell what failed."""
        try:
            if self._stop is None:
                await self._reading.run()
        except asyncio.CancelledError:
            if self._stop is None:
                raise
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
        except SessionError as error:
            return error
        except Exception:
            log.exception("generation failed", session=short(self.session_id))
            return GenerationFailed()
        return None

    def _take(self, chunks: list[bytes], now: float) -> None:
        first = self.feed.last + 1
        self._took(self, now)
        self.feed.add(Batch(first, first + len(chunks) - 1, chunk_events(chunks, first)), now)
        if not self._journaled and self.feed.live == self._viewers > 0 and self.feed.shown == self.feed.last:
            self.feed.trim(self.feed.last)  # nobody will ask for it again
