"""One generation: the single upstream call of a session, from its claim to its end.

It is a task of its own and not the request of a page: viewers come and go. What it reads goes to the feed at once;
when it is over, for whatever reason, the end is decided in Redis and only then told.

There is one way to stop a generation from outside, `stop`, and everything uses it: a cancel, the timers, the end of
grace, the shutdown. The first reason given is the one that counts.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import structlog

from broker.core.answer import Answer
from broker.core.errors import (
    Abandoned,
    DeadlineExceeded,
    GenerationFailed,
    ResponseTooLarge,
    SessionError,
    StoreUnavailable,
    UpstreamError,
    UpstreamInterrupted,
    UpstreamTimeout,
)
from broker.core.events import done_data, error_data
from broker.core.faults import retry_delay
from broker.core.session import Cursor, State, Step, Terminal, advance, short
from broker.core.sse import Decoder, EventTooLarge
from broker.relay.feed import Feed
from broker.relay.settling import PricesOf, settle

if TYPE_CHECKING:
    from broker.store.sessions import Prepared, SessionStore
    from broker.upstream.client import UpstreamClient, UpstreamStream

log = structlog.get_logger(__name__)

QUIET_END = 5.0
"""Seconds that an upstream may stay silent once it has given a finish reason; then the answer is complete."""

DECIDE_TIMEOUT = 0.3
"""Seconds that Redis has for deciding the end; without its word, the owner's stands."""

FIRST_VIEWER = 1.0
"""Seconds that a new generation waits for its first viewer at least, however short the grace."""

LINGER = 1.0
"""Seconds to wait for an upstream's end of stream after its last event, so that the connection can be used again."""


class Halt(Enum):
    """Reasons to stop that are no failure."""

    CANCELLED = "cancelled"
    QUIET = "quiet"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one generation may take: seconds, bytes, and tries."""

    first_data_timeout: float
    idle_timeout: float
    deadline: float
    grace: float
    max_response: int
    max_retries: int


class Generation:
    """The upstream call of one session, its feed, and the decision of its end.

    Args:
        session_id: whose generation.
        token: of the claim that started it.
        prepared: what to ask.
        upstream: whom to ask.
        sessions: where the end is decided.
        bounds: how long and how much.
        prices_of: what models cost.
        write_later: takes over an end that Redis could not be told of in time.

    Attributes:
        feed: its events.
        state: `RUNNING`, then how it ended.
    """

    def __init__(
        self,
        session_id: str,
        token: str,
        prepared: Prepared,
        *,
        upstream: UpstreamClient,
        sessions: SessionStore,
        bounds: Bounds,
        prices_of: PricesOf,
        write_later: Callable[[Generation, Terminal], None],
    ) -> None:
        self.session_id = session_id
        self.token = token
        self.feed = Feed()
        self.state = State.RUNNING
        self._prepared = prepared
        self._upstream = upstream
        self._sessions = sessions
        self._bounds = bounds
        self._prices_of = prices_of
        self._write_later = write_later
        self._loop = asyncio.get_running_loop()
        self._answer = Answer()
        self._decoder = Decoder(bounds.max_response)
        self._started_at = self._loop.time()
        self._first_chunk_at: float | None = None
        self._data_due = self._started_at + bounds.first_data_timeout
        self._viewers = 0
        self._unwatched_since: float | None = self._started_at + max(0.0, FIRST_VIEWER - bounds.grace)
        self._reading = True
        self._stop: SessionError | Halt | None = None
        self._task: asyncio.Task[None] | None = None
        self._stream: UpstreamStream | None = None
        self._blocks: AsyncIterator[bytes] | None = None

    # For the registry, the ticker and the viewers

    def start(self) -> asyncio.Task[None]:
        """Begin. The task belongs to the caller; it ends by itself and does not raise."""
        self._task = asyncio.create_task(self._run(), name=f"generation {short(self.session_id)}")
        return self._task

    def stop(self, reason: SessionError | Halt) -> bool:
        """Stop reading from the upstream and end for this reason; whether that is now certain."""
        if not self._reading:
            return False
        if self._stop is None:
            self._stop = reason
            if self._task is not None:
                self._task.cancel()
        return self._stop is reason

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count a viewer for as long as the block runs."""
        self._viewers += 1
        self._unwatched_since = None
        try:
            yield
        finally:
            self._viewers -= 1
            if self._viewers == 0:
                self._unwatched_since = self._loop.time()
                if self._bounds.grace == 0:
                    self.stop(Abandoned())

    def check(self, now: float) -> None:
        """Look at the timers. Called by the ticker a few times a second, so that no timer is set per chunk."""
        if not self._reading:
            return
        if now >= self._started_at + self._bounds.deadline:
            self.stop(DeadlineExceeded())
        elif now >= self._data_due:
            self.stop(Halt.QUIET if self._answer.finished else UpstreamTimeout())
        elif self._unwatched_since is not None and now >= self._unwatched_since + self._bounds.grace:
            self.stop(Abandoned())

    # The task

    async def _run(self) -> None:
        proposed = await self._outcome()
        end = await self._decide(proposed)
        self.state = end.state
        self.feed.finish(end)
        log.info("session ended", session=short(self.session_id), state=end.state, events=self.feed.last)
        await self._let_go()

    async def _outcome(self) -> Terminal:
        """Relay the whole answer and tell how it ended."""
        failure: SessionError | None = None
        try:
            await self._relay()
        except asyncio.CancelledError:
            if self._stop is None:
                raise
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
            failure = self._stop if isinstance(self._stop, SessionError) else None
        except SessionError as error:
            failure = error
        except Exception:
            log.exception("generation failed", session=short(self.session_id))
            failure = GenerationFailed()
        self._reading = False
        if isinstance(failure, UpstreamInterrupted) and self._answer.finished:
            failure = None  # once the answer is finished, what becomes of the line is of no interest
        if not self._answer.complete:
            await self._let_go()
        return await self._terminal(self._step(failure), failure)

    def _step(self, failure: SessionError | None) -> Step:
        if failure is not None:
            return Step.ABANDON if isinstance(failure, Abandoned) else Step.FAIL
        return Step.CANCEL if self._stop is Halt.CANCELLED else Step.FINISH

    async def _relay(self) -> None:
        if self._stop is not None:  # stopped before the first step of this task
            raise asyncio.CancelledError
        self._stream = await self._open()
        self._answer.generation_id = self._stream.generation_id
        self._blocks = self._stream.blocks()
        async for block in self._blocks:
            self._take(block)
            if self._answer.complete:
                return
        if not self._answer.finished:
            raise UpstreamInterrupted

    async def _open(self) -> UpstreamStream:
        attempt = 0
        while True:
            self._data_due = self._loop.time() + self._bounds.first_data_timeout
            try:
                return await self._upstream.open_chat(self._prepared.request, referer=self._prepared.referer)
            except UpstreamError as error:
                delay = retry_delay(error, attempt, random.random())  # noqa: S311 - jitter is no secret
                if delay is None or attempt >= self._bounds.max_retries:
                    raise
                log.info("upstream retry", session=short(self.session_id), code=error.code, delay=delay)
            attempt += 1
            self._data_due = self._started_at + self._bounds.deadline
            await asyncio.sleep(delay)

    def _take(self, block: bytes) -> None:
        """Relay the chunks of one read."""
        chunks: list[bytes] = []
        now = self._loop.time()
        read = self._answer.read
        try:
            frames = self._decoder.feed(block)
            for frame in frames:
                chunk = read(frame.data)
                if chunk is not None:
                    chunks.append(chunk)
        except EventTooLarge:
            raise ResponseTooLarge from None
        finally:
            if chunks:
                self._append(chunks, now)
        if frames:
            self._data_due = now + (QUIET_END if self._answer.finished else self._bounds.idle_timeout)

    def _append(self, chunks: list[bytes], now: float) -> None:
        if self._first_chunk_at is None:
            self._first_chunk_at = now
        room = self._bounds.max_response - self.feed.size
        if sum(map(len, chunks)) > room:
            raise ResponseTooLarge
        self.feed.append(chunks, now)

    async def _terminal(self, step: Step, failure: SessionError | None) -> Terminal:
        state = advance(State.RUNNING, step)
        at = Cursor(1, self.feed.last + 1, end=True)
        if failure is not None:
            return Terminal(state, "error", at, error_data(failure))
        cost, estimated = await settle(self._answer, self._prepared, self._prices_of)
        data = done_data(
            self._answer,
            finish_reason="cancelled" if step is Step.CANCEL else self._answer.finish_reason or "stop",
            model=self._prepared.model,
            cost=cost,
            estimated=estimated,
            ttft_ms=self._milliseconds(self._first_chunk_at),
            total_ms=self._milliseconds(self._loop.time()),
        )
        return Terminal(state, "done", at, data)

    def _milliseconds(self, at: float | None) -> int | None:
        return None if at is None else round((at - self._started_at) * 1000)

    async def _decide(self, proposed: Terminal) -> Terminal:
        """The end that stands: ours, unless another was written first."""
        try:
            standing = await self._sessions.end(self.session_id, self.token, proposed, timeout=DECIDE_TIMEOUT)
        except StoreUnavailable:
            self._write_later(self, proposed)
            return proposed
        return standing.end or proposed

    async def _let_go(self) -> None:
        """Close the upstream's stream; one that has said its last word gets a moment to end by itself."""
        stream, self._stream = self._stream, None
        if stream is None:
            return
        try:
            if self._answer.complete and self._blocks is not None:
                async with asyncio.timeout(LINGER):
                    async for _ in self._blocks:
                        pass
        except (TimeoutError, UpstreamError):
            pass
        finally:
            try:
                await stream.aclose()
            except UpstreamError:
                log.debug("upstream close failed", session=short(self.session_id))
