"""What an answer took, and getting it into the books: once, and as near to the truth as can be had.

The upstream's usage counts. Where a stream ended without it, our own count does, marked as an estimate, and then the
upstream's books are asked and ours corrected.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from broker.core.accounts import Usage, usage_of
from broker.core.errors import StoreUnavailable, UpstreamError
from broker.core.pricing import completion_of, cost_of, count_of, reported_cost, reported_cost_of_record
from broker.core.session import short
from broker.core.tokens import DEFAULT_BYTES_PER_TOKEN, IMAGE_TOKENS, estimate_text
from broker.store.accounts import OTHER, Estimate

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from broker.core.answer import Answer
    from broker.core.session import State
    from broker.relay.config import Money
    from broker.store.accounts import AccountStore, Reservation

    Work = Callable[[], Coroutine[Any, Any, None]]

log = structlog.get_logger(__name__)

LOOKS = (1.0, 3.0, 10.0, 30.0, 120.0, 600.0)
"""Seconds after the end at which the upstream's books are asked."""

MAX_ASKING = 1000
"""Estimates that one worker asks for at once; the others wait in Redis until somebody has room."""

MAX_READING_ON = 200
"""Failed answers that one worker reads on at once for their usage; the estimate of any other stands."""

RETRY = 1.0
"""Seconds between two tries to reach Redis."""

RETRIES = 600
"""Tries before a settlement is given up for lost."""


class Settlement:
    """Counts and books what generations took.

    Args:
        accounts: the books.
        money: whom to ask what models and generations cost.
        spawn: runs work in the background and owns its task.
    """

    def __init__(
        self,
        accounts: AccountStore,
        money: Money,
        *,
        spawn: Callable[[Coroutine[Any, Any, Any]], None],
    ) -> None:
        self._accounts = accounts
        self._money = money
        self._spawn = spawn
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
        """Return what an answer took.

        Args:
            answer: what was learned of it.
            reservation: for what was asked.
            prompt_tokens: our estimate of the prompt.
            asked: the upstream may have generated; if not, nothing is to be paid.
            seconds: from the request to the end, where that is known.
            images: pictures in the prompt.
        """
        if not asked:
            return Usage()
        told = has_counts(answer.counts)
        usage = dict(answer.counts or {})
        if not told:
            speed = await self._money.speed_of(reservation.model) if seconds else None
            usage |= estimated_usage(answer, reservation, prompt_tokens, unseen=int((speed or 0.0) * seconds))
            usage.pop("total_tokens", None)
        cost = cost_of(usage, None)
        if cost is None:
            model = reservation.model
            prices = await self._money.prices_of(answer.model or model) or await self._money.prices_of(model)
            cost = cost_of(usage, prices, minute_of_day=_minute_of_day(), images=images)
            if (least := reported_cost(answer.interim_counts or {})) is not None and not told:
                cost = max(cost or 0, least)
        return usage_of(usage, cost, estimated=not told and reported_cost(usage) is None)

    async def settle(
        self, reservation: Reservation, spent: Usage, state: State, generation_id: str | None
    ) -> None:
        """Book it, and have an estimate corrected in the background.

        Whoever comes after somebody who could only estimate, and knows better, corrects that.

        Raises:
            StoreUnavailable: it could not be booked now.
        """
        ask = spent.estimated and generation_id is not None and self._money.keeps_records()
        await self._accounts.settle(
            reservation,
            spent,
            state,
            generation_id=generation_id if ask else None,
            model=self._name(reservation.model, answered=spent.completion > 0),
        )
        if ask and generation_id is not None:
            self.ask(Estimate(reservation, generation_id, 0.0))

    def read_on(self, read: Work, close: Work) -> bool:
        """Run `read` in the background and `close` behind it, where not too many run already.

        Returns:
            True if that has begun; else neither is run.
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
        self, reservation: Reservation, spent: Usage, state: State, generation_id: str | None
    ) -> None:
        """`settle`, tried until Redis answers, for as long as a settlement is tried."""
        await self._persist(partial(self.settle, reservation, spent, state, generation_id))

    def _name(self, model: str, *, answered: bool) -> str:
        """Return a model's name for the books: of the list; without one, of those that the upstream has answered."""
        name = self._money.name_of(model)
        if name is None:
            return model if answered else OTHER
        return name or OTHER

    @property
    def room(self) -> int:
        """Estimates that may be taken on here."""
        return max(0, MAX_ASKING - len(self._asking))

    def ask(self, estimate: Estimate) -> None:
        """Ask for the truth behind an estimate, at those of `LOOKS` that are still to come, and at least once.

        Where too many are asked for already, this one is left to whoever finds it later.
        """
        claim_id = estimate.reservation.claim_id
        if claim_id not in self._asking and self.room:
            self._asking.add(claim_id)
            self._spawn(self._correct(estimate))

    async def _correct(self, estimate: Estimate) -> None:
        reservation, generation_id, age = estimate
        try:
            ended_at = asyncio.get_running_loop().time() - age
            for after in [look for look in LOOKS if look > age] or [age]:
                await self._wait(reservation.claim_id, ended_at + after)
                if (spent := await self._truth(reservation, generation_id)) is not None:
                    await self._persist(partial(self._accounts.correct, reservation, spent))
                    return
            await self._persist(partial(self._accounts.asked, reservation))
        finally:
            self._asking.discard(reservation.claim_id)

    async def _wait(self, claim_id: str, until: float) -> None:
        loop = asyncio.get_running_loop()
        if (seconds := until - loop.time()) > LOOKS[0]:
            with suppress(StoreUnavailable):  # then another may ask too, which does no harm
                await self._accounts.look_later(claim_id, seconds)
        await asyncio.sleep(until - loop.time())

    async def _truth(self, reservation: Reservation, generation_id: str) -> Usage | None:
        """Return what the upstream's books say now; None where they do not."""
        try:
            record = await self._money.fetch_generation(generation_id)
        except UpstreamError as error:
            log.info("generation not told", session=short(reservation.session_id), code=error.code)
            return None
        return usage_in_record(record) if record is not None else None

    @staticmethod
    async def _persist(step: Callable[[], Coroutine[Any, Any, None]]) -> None:
        for _ in range(RETRIES):
            try:
                await step()
            except StoreUnavailable:
                await asyncio.sleep(RETRY)
            else:
                return


def has_counts(usage: Mapping[str, Any] | None) -> bool:
    """Return True if an upstream's usage says how many tokens there were."""
    if not usage or count_of(usage.get("prompt_tokens")) is None:
        return False
    return completion_of(usage) is not None


def _minute_of_day() -> int:
    now = dt.datetime.now(dt.UTC)
    return now.hour * 60 + now.minute


def estimated_usage(
    answer: Answer, reservation: Reservation, prompt_tokens: int, unseen: int = 0
) -> dict[str, int]:
    """Our own count, never below what the upstream has told on the way.

    The upstream was told to write no more than is reserved, so that is the most that we assume by ourselves.

    Args:
        answer: what was learned of it.
        reservation: for what was asked.
        prompt_tokens: our estimate of the prompt.
        unseen: tokens that the model may have written in its time, shown or not.
    """
    told = answer.interim_counts or {}
    seen = estimate_text(answer.text_bytes, DEFAULT_BYTES_PER_TOKEN) + answer.media * IMAGE_TOKENS
    reserved = max(0, reservation.worst.tokens - prompt_tokens)
    return {
        "prompt_tokens": max(prompt_tokens, count_of(told.get("prompt_tokens")) or 0),
        "completion_tokens": max(min(max(seen, unseen), reserved), completion_of(told) or 0),
    }


def usage_in_record(record: Mapping[str, Any]) -> Usage | None:
    """Return what OpenRouter's record of a generation says; None where it does not say.

    Native counts are those of the model's own tokenizer, by which it is billed.
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
