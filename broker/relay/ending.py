"""The end of one generation: what it took, which end is proposed, and which one stands.

The end is decided in Redis by whoever writes it first, in the step that also writes the events not yet journaled. What
it took is booked before it is told. Where Redis does not answer in time, the owner's word stands and is written later.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from broker.core.accounts import Spent
from broker.core.density import Sample, sample_of
from broker.core.errors import GenerationFailed, SessionError, StoreUnavailable
from broker.core.events import done_data, error_data
from broker.core.pricing import to_usd
from broker.core.replay import Batch
from broker.core.session import Cursor, State, Step, Terminal, advance, short
from broker.core.speed import speed_of
from broker.store.sessions import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from broker.relay.feed import Feed
    from broker.relay.reading import Reading
    from broker.relay.settling import Settler
    from broker.store.accounts import Reservation
    from broker.store.sessions import Prepared, SessionStore

log = structlog.get_logger(__name__)

DECIDE_TIMEOUT = 0.3
"""Seconds that Redis has for deciding the end; without its word, the owner's stands."""

END_TRIES = 4
"""Answers that an end may be given before it is left for later; each changes what is proposed."""

ALL = 1 << 62
"""More bytes than there are."""

NOTHING = Batch(1, 0, b"")
"""No events."""


class Ending:
    """Proposes, decides and books the end of one generation.

    Args:
        reservation: what it has taken from the accounts, under the token of its claim.
        prepared: what was asked.
        feed: its events.
        reading: its answer.
        unsaved: gives the events that are not journaled yet.
        sessions: where the end is decided.
        settler: who books what it took.
        write_later: takes over an end that Redis could not be told of in time.

    Attributes:
        spent: what it took, once `decide` has counted.
    """

    def __init__(
        self,
        reservation: Reservation,
        prepared: Prepared,
        *,
        feed: Feed,
        reading: Reading,
        unsaved: Callable[[], Batch],
        sessions: SessionStore,
        settler: Settler,
        write_later: Callable[[Terminal], None],
    ) -> None:
        self.spent = Spent()
        self._reservation = reservation
        self._prepared = prepared
        self._feed = feed
        self._reading = reading
        self._unsaved = unsaved
        self._sessions = sessions
        self._settler = settler
        self._write_later = write_later
        self._proposed: Terminal | None = None
        self._loop = asyncio.get_running_loop()
        self._started_at = self._loop.time()
        self._seconds: float | None = None

    async def decide(self, decided: Terminal | None, step: Step, failure: SessionError | None) -> Terminal:
        """Count, decide and book. Whatever goes wrong here, the session ends.

        Args:
            decided: the end, where it stands already.
            step: how it ended.
            failure: why, where that is a failure.
        """
        try:
            self.spent = await self._count()
            return await self._decide(decided, decided or self.terminal(step, failure))
        except Exception:
            log.exception("end failed", session=short(self._reservation.session_id))
            return await self._decide(decided, decided or self.terminal(Step.FAIL, GenerationFailed()))

    async def _decide(self, decided: Terminal | None, end: Terminal) -> Terminal:
        """The end that stands, ours unless another was written first. What it took is booked before that is told."""
        self._proposed = end
        try:
            async with asyncio.timeout(DECIDE_TIMEOUT):
                if decided is None:
                    written = await self.write(end)
                    if written is None:  # Redis came back empty, and this may just be written anew as running
                        self._write_later(self._proposed)
                    self._proposed = written or self._proposed
                await self.settle(self._proposed.state)
        except (StoreUnavailable, TimeoutError):
            self._write_later(self._proposed)
        return self._proposed

    async def write(self, proposed: Terminal) -> Terminal | None:
        """Write an end to Redis, with what is left to be journaled.

        Returns:
            The end that counts, or None where Redis has no such session.

        Raises:
            StoreUnavailable: it could not be written now.
        """
        reservation, rest = self._reservation, self._unsaved()
        for _ in range(END_TRIES):
            answer = await self._sessions.end(reservation.session_id, reservation.token, proposed, rest)
            if not isinstance(answer, Refusal):
                return answer.end
            if answer.kind == "cancel":
                proposed = self._proposed = self.terminal(Step.CANCEL, None)
            else:  # behind: send from where the journal is, or end it with a hole that readers see
                rest = self._feed.unsaved(answer.last, ALL)
                if rest.first > answer.last + 1:
                    rest = NOTHING
        raise StoreUnavailable

    async def settle(self, state: State) -> None:
        """Book what it took; again does no harm.

        Raises:
            StoreUnavailable: it could not be booked now.
        """
        generation_id = self._reading.answer.generation_id
        await self._settler.settle(self._reservation, self.spent, state, generation_id)

    def sample(self) -> Sample | None:
        """What this answer teaches of its model's tokenizer, if it does."""
        answer = self._reading.answer
        return sample_of(
            model=self._prepared.model,
            answered=answer.model,
            client=self._prepared.client,
            size=self._prepared.teaches,
            usage=answer.usage,
        )

    def speed(self) -> Sample | None:
        """What this answer teaches of how fast its model writes, if it does."""
        answer = self._reading.answer
        if not answer.complete or answer.finish_reason is None:
            return None
        return speed_of(
            model=self._prepared.model,
            client=self._prepared.client,
            usage=answer.usage,
            seconds=self._seconds,
        )

    async def _count(self) -> Spent:
        if self._reading.asked_at is not None:
            self._seconds = self._loop.time() - self._reading.asked_at
        return await self._settler.count(
            self._reading.answer,
            self._reservation,
            prompt_tokens=self._prepared.prompt_tokens,
            asked=self._reading.asked,
            seconds=self._seconds or 0.0,
        )

    def terminal(self, step: Step, failure: SessionError | None) -> Terminal:
        """The end that is proposed for a step of the session."""
        state = advance(State.RUNNING, step)
        at = Cursor(1, self._feed.last + 1, end=True)
        if failure is not None:
            return Terminal(state, "error", at, error_data(failure))
        answer = self._reading.answer
        data = done_data(
            answer,
            finish_reason="cancelled" if step is Step.CANCEL else answer.finish_reason,
            model=self._prepared.model,
            cost=None if self.spent.cost is None else to_usd(self.spent.cost),
            estimated=self.spent.estimated,
            ttft_ms=self._milliseconds(self._reading.first_chunk_at),
            total_ms=self._milliseconds(self._loop.time()),
        )
        return Terminal(state, "done", at, data)

    def _milliseconds(self, at: float | None) -> int | None:
        return None if at is None else round((at - self._started_at) * 1000)
