"""Count the usage of generations and book it once, as exactly as possible.

The usage that the upstream sends is booked. If a stream ends without it, this broker counts by itself and marks the
result as an estimate. The upstream's own record is then fetched, and the estimate is corrected.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from broker.core.accounts import Usage, usage_of
from broker.core.errors import StoreUnavailable, UpstreamError
from broker.core.pricing import completion_of, cost_of, count_of, reported_cost, reported_cost_of_record
from broker.core.session import short
from broker.core.tokens import DEFAULT_BYTES_PER_TOKEN, IMAGE_TOKENS, estimate_text
from broker.relay.retries import until_stored
from broker.store.accounts import Estimate
from broker.store.usage_ledger import OTHER

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping

    from broker.core.answer import Answer
    from broker.core.session import State
    from broker.relay.config import Money
    from broker.store.accounts import AccountStore, Reservation

    Work = Callable[[], Coroutine[Any, Any, None]]

log = structlog.get_logger(__name__)

RECORD_DELAYS = (1.0, 3.0, 10.0, 30.0, 120.0, 600.0)
"""Seconds after the end at which the upstream is asked for its record."""

MAX_ASKING = 1000
"""Estimates that one worker asks about at the same time. Others wait in Redis until a worker has room."""

MAX_READING_ON = 200
"""Failed answers that one worker reads on for their usage at the same time. The estimates of others stay."""

PRICES_AWAITED = 60.0
"""Seconds from its start in which a worker without a list of prices does not settle the sessions of dead workers."""

GIVE_UP_AFTER = 600.0
"""Seconds after which a settlement that Redis does not take is given up."""


class Settlement:
    """Counts and books the usage of generations.

    Args:
        accounts: the accounts and the usage ledger.
        money: functions that know about prices and records.
        spawn: runs work in the background and owns its task.
        clock: seconds that only go forward.
        pause: waits for so many seconds.
    """

    def __init__(
        self,
        accounts: AccountStore,
        money: Money,
        *,
        spawn: Callable[[Coroutine[Any, Any, Any]], None],
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._accounts = accounts
        self._money = money
        self._spawn = spawn
        self._clock = clock
        self._pause = pause
        self._started = clock()
        self._asking: set[str] = set()
        self._reading_on = 0

    async def count(
        self,
        answer: Answer,
        reservation: Reservation,
        *,
        prompt_tokens: int,
        asked: bool,
        seconds: float = 0.0,
        images: int = 0,
    ) -> Usage:
        """Return the usage of an answer.

        Args:
            answer: the facts of the answer.
            reservation: the reservation of its generation.
            prompt_tokens: our estimate of the prompt.
            asked: the upstream may have generated; if not, nothing is to be paid.
            seconds: from the request to the end; 0 where unknown.
            images: pictures in the prompt.
        """
        if not asked:
            return Usage()
        reported = has_counts(answer.counts)
        usage = dict(answer.counts or {})
        if not reported:
            speed = await self._money.speed_of(reservation.model) if seconds else None
            usage |= estimated_usage(answer, reservation, prompt_tokens, unseen=int((speed or 0.0) * seconds))
            usage.pop("total_tokens", None)
        cost = cost_of(usage, None)
        if cost is None:
            model = reservation.model
            prices = await self._money.prices_of(answer.model or model) or await self._money.prices_of(model)
            cost = cost_of(usage, prices, minute_of_day=_minute_of_day(), images=images)
            if (least := reported_cost(answer.interim_counts or {})) is not None and not reported:
                cost = max(cost or 0, least)
        return usage_of(usage, cost, estimated=not reported and reported_cost(usage) is None)

    def awaits_prices(self, reservation: Reservation) -> bool:
        """Return True if this worker has just started and knows no prices, so that it cannot tell this cost yet.

        The request had a price when it was admitted, so there is a list of prices, which this worker will have soon.
        """
        return (
            reservation.worst.cost > 0
            and not self._money.has_prices()
            and self._clock() - self._started < PRICES_AWAITED
        )

    async def settle(
        self, reservation: Reservation, usage: Usage, state: State, generation_id: str | None
    ) -> None:
        """Book the usage. If it is an estimate, have it corrected in the background.

        A later call with a final usage corrects an estimate that was booked before.

        Raises:
            StoreUnavailable: it could not be booked now.
        """
        ask = usage.estimated and generation_id is not None and self._money.keeps_records()
        await self._accounts.settle(
            reservation,
            usage,
            state,
            generation_id=generation_id if ask else None,
            model=self._name(reservation.model, answered=usage.completion > 0),
        )
        if ask and generation_id is not None:
            self.ask(Estimate(reservation, generation_id, 0.0))

    def read_on(self, read: Work, close: Work) -> bool:
        """Run `read` in the background and then `close`, unless too many run already.

        Returns:
            True if that has started; else neither is run.
        """
        if self._reading_on >= MAX_READING_ON:
            return False
        self._reading_on += 1
        self._spawn(self._read_on(read, close))
        return True

    async def _read_on(self, read: Work, close: Work) -> None:
        try:
            await read()
        finally:
            self._reading_on -= 1
            await close()

    async def settle_later(
        self, reservation: Reservation, usage: Usage, state: State, generation_id: str | None
    ) -> None:
        """Call `settle` until Redis can be reached, with a limited number of tries."""
        await self._persist(partial(self.settle, reservation, usage, state, generation_id))

    def _name(self, model: str, *, answered: bool) -> str:
        """Return the name of a model in the usage ledger: that of the list; without a list, only if it has answered."""
        name = self._money.name_of(model)
        if name is None:
            return model if answered else OTHER
        return name or OTHER

    @property
    def room(self) -> int:
        """The number of further estimates that this worker can take."""
        return max(0, MAX_ASKING - len(self._asking))

    def ask(self, estimate: Estimate) -> None:
        """Fetch the record for an estimate at those times of `RECORD_DELAYS` that are still to come.

        That of another worker is fetched now as well: nobody did it at the time that has passed.

        If there are too many estimates already, this one is left to be found later by any worker.
        """
        claim_id = estimate.reservation.claim_id
        if claim_id not in self._asking and self.room:
            self._asking.add(claim_id)
            self._spawn(self._correct(estimate))

    async def _correct(self, estimate: Estimate) -> None:
        reservation, generation_id, age = estimate
        try:
            ended_at = self._clock() - age
            to_come = [delay for delay in RECORD_DELAYS if delay > age]
            for after in [age, *to_come] if age else to_come:
                if after > age:
                    await self._wait(reservation, ended_at + after)
                if (usage := await self._fetch_usage(reservation, generation_id)) is not None:
                    await self._persist(partial(self._accounts.correct, reservation, usage))
                    return
            await self._persist(partial(self._accounts.accept_estimate, reservation))
        finally:
            self._asking.discard(reservation.claim_id)

    async def _wait(self, reservation: Reservation, until: float) -> None:
        if (seconds := until - self._clock()) > RECORD_DELAYS[0]:
            with suppress(StoreUnavailable):  # then another worker may ask too, which does no harm
                await self._accounts.ask_later(reservation, seconds)
        await self._pause(until - self._clock())

    async def _fetch_usage(self, reservation: Reservation, generation_id: str) -> Usage | None:
        """Return the usage in the upstream's record; None where there is none."""
        try:
            record = await self._money.fetch_generation(generation_id)
        except UpstreamError as error:
            log.info("record cannot be fetched", session=short(reservation.session_id), code=error.code)
            return None
        return usage_in_record(record) if record is not None else None

    async def _persist(self, step: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await until_stored(step, give_up_after=GIVE_UP_AFTER, clock=self._clock, pause=self._pause)
        except StoreUnavailable:
            log.exception("settlement given up")


def has_counts(usage: Mapping[str, Any] | None) -> bool:
    """Return True if an upstream's usage has the numbers of tokens."""
    if not usage or count_of(usage.get("prompt_tokens")) is None:
        return False
    return completion_of(usage) is not None


def _minute_of_day() -> int:
    now = dt.datetime.now(dt.UTC)
    return now.hour * 60 + now.minute


def estimated_usage(
    answer: Answer, reservation: Reservation, prompt_tokens: int, unseen: int = 0
) -> dict[str, int]:
    """Return our own count, never below what the upstream reported before.

    The upstream was asked to write no more than is reserved, so the estimate does not exceed that.

    Args:
        answer: the facts of the answer.
        reservation: the reservation of its generation.
        prompt_tokens: our estimate of the prompt.
        unseen: tokens that the model may have written in its time, shown or not.
    """
    reported = answer.interim_counts or {}
    seen = estimate_text(answer.text_bytes, DEFAULT_BYTES_PER_TOKEN) + answer.media * IMAGE_TOKENS
    reserved = max(0, reservation.worst.tokens - prompt_tokens)
    return {
        "prompt_tokens": max(prompt_tokens, count_of(reported.get("prompt_tokens")) or 0),
        "completion_tokens": max(min(max(seen, unseen), reserved), completion_of(reported) or 0),
    }


def usage_in_record(record: Mapping[str, Any]) -> Usage | None:
    """Return the usage in OpenRouter's record of a generation; None where it is not complete.

    Native counts are those of the model's own tokenizer, which is used for billing.
    """
    cost = reported_cost_of_record(record)
    prompt = _first(record, "native_tokens_prompt", "tokens_prompt")
    completion = _first(record, "native_tokens_completion", "tokens_completion")
    if cost is None or prompt is None or completion is None:
        return None
    cached = min(_first(record, "native_tokens_cached") or 0, prompt)
    reasoning = min(_first(record, "native_tokens_reasoning") or 0, completion)
    return Usage(prompt, completion, cached, reasoning, cost, estimated=False)


def _first(record: Mapping[str, Any], *names: str) -> int | None:
    counts = (count_of(record.get(name)) for name in names)
    return next((count for count in counts if count is not None), None)
