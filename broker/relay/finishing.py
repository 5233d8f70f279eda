"""The end of one generation: count its usage, propose an end, and have Redis decide which end stands.

The first end that is written to Redis stands. It is written in the same step as the events that are not yet journaled.
The usage is booked before viewers are sent the end. Where Redis does not answer in time, viewers get the end that this
worker proposes, and it is written later.
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
"""Seconds that Redis has for deciding the end. Without an answer, the end that the owner proposes stands."""

END_TRIES = 4
"""Answers of Redis to one end before it is left for later; each answer changes the events that are sent with it."""

ALL = 1 << 62
"""A limit in bytes that is no limit."""

NOTHING = Batch(1, 0, b"")
"""No events."""

LAST_RESORT = {
    State.DONE: ("done", unknown_done(None)),
    State.CANCELLED: ("done", unknown_done("cancelled")),
    State.ABANDONED: ("error", error_data(Abandoned())),
    State.FAILED: ("error", error_data(GenerationFailed())),
}
"""Event and data of a constant end of each kind. They hold nothing of the answer, so no answer can make them fail."""


class Bill:
    """What a generation has used, and who pays. Small: it stays in memory with the finished session.

    Args:
        reservation: the generation's reservation.
        settlement: books usage.

    Attributes:
        usage: tokens and cost, once they have been counted.
        worst: booked where the usage cannot be.
        generation_id: the upstream's id, once it is known.
        is_counted: True once `usage` has been counted.
    """

    __slots__ = ("_reservation", "_settlement", "generation_id", "is_counted", "usage", "worst")

    def __init__(self, reservation: Reservation, settlement: Settlement) -> None:
        self.usage = self.worst = Usage()
        self.generation_id: str | None = None
        self.is_counted = False
        self._reservation = reservation
        self._settlement = settlement

    async def settle(self, state: State) -> None:
        """Book the usage, or the worst case where the usage cannot be booked. May be called again.

        Raises:
            StoreUnavailable: it could not be booked now, or is not counted yet: nothing must not be booked for it.
        """
        if not self.is_counted:
            raise StoreUnavailable
        try:
            await self._settlement.settle(self._reservation, self.usage, state, self.generation_id)
        except StoreUnavailable:
            raise
        except Exception:
            log.exception("usage cannot be settled as counted", session=short(self._reservation.session_id))
            self.usage = self.worst
            await self._settlement.settle(self._reservation, self.usage, state, None)


class Finishing:
    """Proposes, decides and books the end of one generation.

    Args:
        reservation: the generation's reservation.
        prepared: the request.
        feed: the events.
        reader: reads the answer.
        unsaved: returns the events that are not journaled yet.
        sessions: decides the end.
        settlement: counts and books usage.
        images: pictures in the prompt.
        clock: seconds that only go forward; by default the event loop's.

    Attributes:
        bill: what the generation has used.
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
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.bill = Bill(reservation, settlement)
        self._reservation = reservation
        self._prepared = prepared
        self._feed = feed
        self._reader = reader
        self._unsaved = unsaved
        self._sessions = sessions
        self._settlement = settlement
        self._name = short(reservation.session_id)
        self._clock = clock or asyncio.get_running_loop().time
        self._started_at = self._clock()
        self._seconds: float | None = None
        self._images = images

    @property
    def usage(self) -> Usage:
        """Tokens and cost of the generation, once they have been counted."""
        return self.bill.usage

    async def decide(self, proposal: Proposal | None, standing: Terminal | None) -> tuple[Event, Terminal]:
        """Count the usage, and have Redis decide the end.

        Args:
            proposal: the end that this worker proposes.
            standing: the end that stands already, if there is one.

        Returns:
            `END_STORED` and the end that stands; `CANCEL_FOUND` where the end of a cancel has to be proposed; or
            `END_UNREACHABLE` and the end that viewers get although Redis does not have it.
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
        # Redis is away, or came back empty; in the second case the session may just be written again as running.
        return Event.END_UNREACHABLE, end

    async def store(self, end: Terminal) -> Terminal | EndConflict | None:
        """Write an end to Redis, with the events that are not journaled yet.

        Where that fails by a bug, write a constant end of the same kind without events.

        Returns:
            The end that stands; a conflict where a cancel was accepted and another end is proposed; or None where
            Redis has no such session.

        Raises:
            StoreUnavailable: the end could not be written now.
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
            # The journal lacks events: send those that follow its last one, or end it with a gap that readers see.
            rest = self._feed.unsaved(answer.last, ALL)
            if rest.first > answer.last + 1:
                rest = NOTHING
        raise StoreUnavailable

    async def settle_in_time(self, state: State) -> bool:
        """Settle. Returns False if Redis did not answer in time or the usage could not be settled."""
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
        """Book the usage, or the worst case where the usage cannot be booked. May be called again.

        Raises:
            StoreUnavailable: it could not be booked now.
        """
        await self._count_once()
        await self.bill.settle(state)

    def wait_for_usage(self, state: State) -> bool:
        """Start reading on for the usage behind an error, to correct the estimate with it.

        Returns:
            True if that has started. The background work then closes the reader.
        """
        return (
            self.usage.estimated
            and self._reader.may_tell_usage
            and self._settlement.read_on(partial(self._read_on, state), self._reader.close)
        )

    async def _read_on(self, state: State) -> None:
        if not await self._reader.read_usage():
            return
        await self._count_now()
        # Books what could not be booked yet, or corrects what was booked as an estimate.
        await self._settlement.settle_later(
            self._reservation, self.usage, state, self._reader.answer.generation_id
        )

    def sample(self) -> Sample | None:
        """Return a sample of the model's bytes per token, or None if this answer gives none."""
        answer = self._reader.answer
        return sample_of(
            model=self._prepared.model,
            answered=answer.model,
            client=self._prepared.client,
            size=self._prepared.calibration_sample,
            usage=answer.counts,
        )

    def speed(self) -> Sample | None:
        """Return a sample of the model's tokens per second, or None if this answer gives none."""
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
        """Count the usage, unless that is done."""
        if not self.bill.is_counted:
            await self._count_now()

    async def _count_now(self) -> None:
        """Count the usage. Where it cannot be counted, it is all that was reserved."""
        bill = self.bill
        bill.worst = usage_at_worst(self._reservation.worst) if self._reader.asked else Usage()
        bill.generation_id = self._reader.answer.generation_id
        try:
            bill.usage = await self._count()
        except Exception:
            log.exception("usage cannot be counted", session=self._name)
            bill.usage = bill.worst
        bill.is_counted = True

    async def _count(self) -> Usage:
        if self._seconds is None and self._reader.asked_at is not None:
            self._seconds = self._clock() - self._reader.asked_at
        return await self._settlement.count(
            self._reader.answer,
            self._reservation,
            prompt_tokens=self._prepared.prompt_tokens,
            asked=self._reader.asked,
            seconds=self._seconds or 0.0,
            images=self._images,
        )

    def terminal(self, proposal: Proposal, *, after: int | None = None) -> Terminal:
        """Return the proposed end, with the number that follows event ``after``, or all events.

        Where it cannot be built, return a constant end of the same kind.
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
            cost=None if self.usage.cost is None else to_usd(self.usage.cost),
            estimated=self.usage.estimated,
            ttft_ms=self._milliseconds(self._reader.first_chunk_at),
            total_ms=self._milliseconds(self._clock()),
        )
        return Terminal(state, "done", at, data)

    def _milliseconds(self, at: float | None) -> int | None:
        return None if at is None else round((at - self._started_at) * 1000)


def _constant(state: State, at: Cursor) -> Terminal:
    event, data = LAST_RESORT.get(state, LAST_RESORT[State.FAILED])
    return Terminal(state, event, at, data)
