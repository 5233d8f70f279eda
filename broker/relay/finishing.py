"""The end of one generation: what it took, which end is proposed, and which one stands.

The end is decided in Redis by whoever writes it first, in the step that also writes the events not yet journaled. What
it took is booked before it is told. Where Redis does not answer in time, the owner's word stands and is written later.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import structlog

from broker.core.accounts import Usage, usage_at_worst
from broker.core.bytes_per_token import Sample, sample_of
from broker.core.errors import Abandoned, GenerationFailed, StoreUnavailable
from broker.core.events import done_data, error_data, unknown_done
from broker.core.lifecycle import FINISHED, SESSION, Event, Proposal, Step
from broker.core.pricing import to_usd
from broker.core.replay import Batch
from broker.core.session import Cursor, State, Terminal, short
from broker.core.speed import speed_of
from broker.store.sessions import EndConflict

if TYPE_CHECKING:
    from collections.abc import Callable

    from broker.relay.feed import Feed
    from broker.relay.settlement import Settlement
    from broker.relay.upstream_reader import UpstreamReader
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

LAST_RESORT = {
    State.DONE: ("done", unknown_done(None)),
    State.CANCELLED: ("done", unknown_done("cancelled")),
    State.ABANDONED: ("error", error_data(Abandoned())),
    State.FAILED: ("error", error_data(GenerationFailed())),
}
"""Event and data of an end of each kind that holds nothing of the answer, so that no answer can prevent it."""


class Finishing:
    """Proposes, decides and books the end of one generation.

    Args:
        reservation: what it has taken from the accounts, under the token of its claim.
        prepared: what was asked.
        feed: its events.
        reader: its answer.
        unsaved: gives the events that are not journaled yet.
        sessions: where the end is decided.
        settlement: who books what it took.
        images: pictures in the prompt.

    Attributes:
        spent: what it took, once `decide` has counted.
    """

    def __init__(
        self,
        reservation: Reservation,
        prepared: Prepared,
        *,
        feed: Feed,
        reader: UpstreamReader,
        unsaved: Callable[[], Batch],
        sessions: SessionStore,
        settlement: Settlement,
        images: int = 0,
    ) -> None:
        self.spent = Usage()
        self._reservation = reservation
        self._prepared = prepared
        self._feed = feed
        self._reader = reader
        self._unsaved = unsaved
        self._sessions = sessions
        self._settlement = settlement
        self._name = short(reservation.session_id)
        self._counted = False
        self._loop = asyncio.get_running_loop()
        self._started_at = self._loop.time()
        self._seconds: float | None = None
        self._images = images

    async def decide(self, proposal: Proposal | None, standing: Terminal | None) -> tuple[Event, Terminal]:
        """Count what the answer took, and have Redis decide the end.

        Args:
            proposal: the end that this worker proposes.
            standing: the end that stands already, if there is one.

        Returns:
            `END_STORED` and the end that stands, `CANCEL_FOUND` where another end has to be proposed, or
            `END_UNREACHABLE` and the end that is told without Redis.
        """
        await self._count_once()
        if standing is not None:
            return Event.END_STORED, standing
        end = self.terminal(proposal or FINISHED)
        answer: Terminal | EndConflict | None = None
        try:
            async with asyncio.timeout(DECIDE_TIMEOUT):
                answer = await self.store(end)
        except (StoreUnavailable, TimeoutError):
            pass
        except Exception:
            log.exception("end cannot be written", session=self._name)
        if isinstance(answer, EndConflict) and end.state is not State.CANCELLED:
            return Event.CANCEL_FOUND, end
        if isinstance(answer, Terminal):
            return Event.END_STORED, answer
        # Redis is away, or came back empty, and then this may just be written again as running.
        return Event.END_UNREACHABLE, end

    async def store(self, end: Terminal) -> Terminal | EndConflict | None:
        """Write an end to Redis, with what is left to be journaled; a constant end of its kind where that fails.

        Returns:
            The end that stands, a refusal where a cancel was accepted and another end proposed, or None where Redis
            has no such session.

        Raises:
            StoreUnavailable: it could not be written now.
        """
        try:
            return await self._store(end, self._unsaved())
        except StoreUnavailable:
            raise
        except Exception:
            log.exception("end cannot be written with its events", session=self._name)
            return await self._store(_constant(end.state, end.id), NOTHING)

    async def _store(self, end: Terminal, rest: Batch) -> Terminal | EndConflict | None:
        reservation = self._reservation
        for _ in range(END_TRIES):
            answer = await self._sessions.end(reservation.session_id, reservation.claim_id, end, rest)
            if not isinstance(answer, EndConflict):
                return answer.end
            if answer.kind == "cancel":
                return answer
            # Events are missing in the journal: send from where it is, or end it with a hole that readers see.
            rest = self._feed.unsaved(answer.last, ALL)
            if rest.first > answer.last + 1:
                rest = NOTHING
        raise StoreUnavailable

    async def settle_in_time(self, state: State) -> bool:
        """Settle, and return True if that is done; False if Redis did not answer in time."""
        try:
            async with asyncio.timeout(DECIDE_TIMEOUT):
                await self.settle(state)
        except (StoreUnavailable, TimeoutError):
            return False
        except Exception:
            log.exception("usage cannot be settled", session=self._name)
            return False
        return True

    async def settle(self, state: State) -> None:
        """Book what it took, or the worst case where that cannot be booked. Again does no harm.

        Raises:
            StoreUnavailable: it could not be booked now.
        """
        generation_id = self._reader.answer.generation_id
        try:
            await self._settlement.settle(self._reservation, self.spent, state, generation_id)
        except StoreUnavailable:
            raise
        except Exception:
            log.exception("usage cannot be settled as counted", session=self._name)
            self.spent = self._at_worst()
            await self._settlement.settle(self._reservation, self.spent, state, None)

    def wait_for_usage(self, state: State) -> bool:
        """Read on in the background for the usage behind an error, and correct the estimate with it.

        Returns:
            True if that has begun; the reading is then closed by it.
        """
        return (
            self.spent.estimated
            and self._reader.may_tell_usage
            and self._settlement.read_on(partial(self._read_on, state), self._reader.close)
        )

    async def _read_on(self, state: State) -> None:
        if not await self._reader.read_usage():
            return
        self._counted = False
        await self._count_once()
        # An end that could not be booked yet is booked with this; one that was booked as an estimate is corrected.
        await self._settlement.settle_later(
            self._reservation, self.spent, state, self._reader.answer.generation_id
        )

    def sample(self) -> Sample | None:
        """What this answer teaches of its model's tokenizer, if it does."""
        answer = self._reader.answer
        return sample_of(
            model=self._prepared.model,
            answered=answer.model,
            client=self._prepared.client,
            size=self._prepared.calibration_sample,
            usage=answer.counts,
        )

    def speed(self) -> Sample | None:
        """What this answer teaches of how fast its model writes, if it does."""
        answer = self._reader.answer
        if not answer.complete or answer.finish_reason is None:
            return None
        return speed_of(
            model=self._prepared.model,
            client=self._prepared.client,
            usage=answer.counts,
            seconds=self._seconds,
        )

    async def _count_once(self) -> None:
        """Count what the answer took; all that is reserved where it cannot be counted."""
        if self._counted:
            return
        try:
            self.spent = await self._count()
        except Exception:
            log.exception("usage cannot be counted", session=self._name)
            self.spent = self._at_worst()
        self._counted = True

    def _at_worst(self) -> Usage:
        return usage_at_worst(self._reservation.worst) if self._reader.asked else Usage()

    async def _count(self) -> Usage:
        if self._seconds is None and self._reader.asked_at is not None:
            self._seconds = self._loop.time() - self._reader.asked_at
        return await self._settlement.count(
            self._reader.answer,
            self._reservation,
            prompt_tokens=self._prepared.prompt_tokens,
            asked=self._reader.asked,
            seconds=self._seconds or 0.0,
            images=self._images,
        )

    def terminal(self, proposal: Proposal, *, after: int | None = None) -> Terminal:
        """Return the end that is proposed, numbered behind event ``after``, or behind all events.

        Where it cannot be built, it is a constant one of its kind.
        """
        state = SESSION[proposal.step][State.RUNNING]
        at = Cursor(1, (self._feed.last if after is None else after) + 1, end=True)
        try:
            return self._build(proposal, state, at)
        except Exception:
            log.exception("end cannot be built", session=self._name)
            return _constant(state, at)

    def _build(self, proposal: Proposal, state: State, at: Cursor) -> Terminal:
        step, failure = proposal
        if failure is not None:
            return Terminal(state, "error", at, error_data(failure))
        answer = self._reader.answer
        data = done_data(
            answer,
            finish_reason="cancelled" if step is Step.END_CANCELLED else answer.finish_reason,
            model=self._prepared.model,
            cost=None if self.spent.cost is None else to_usd(self.spent.cost),
            estimated=self.spent.estimated,
            ttft_ms=self._milliseconds(self._reader.first_chunk_at),
            total_ms=self._milliseconds(self._loop.time()),
        )
        return Terminal(state, "done", at, data)

    def _milliseconds(self, at: float | None) -> int | None:
        return None if at is None else round((at - self._started_at) * 1000)


def _constant(state: State, at: Cursor) -> Terminal:
    event, data = LAST_RESORT.get(state, LAST_RESORT[State.FAILED])
    return Terminal(state, event, at, data)
