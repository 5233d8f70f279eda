"""Handle /prepare: check the rate, validate the body, fit it to the model, check that it can be paid, store it.

This joins `core`, the catalog and the store. It knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import orjson

from broker.core.accounts import WorstCase, beyond_limits
from broker.core.checking import RequestRules, refuse_fetched_images
from broker.core.demand import demand_of
from broker.core.document import SMALL_BODY, check_document, outline, read_json
from broker.core.errors import (
    BrokerError,
    IdempotencyConflict,
    InternalError,
    InvalidRequest,
    ModelNotAllowed,
    Overloaded,
    RateLimited,
    RequestError,
    StoreRefused,
    StoreUnavailable,
)
from broker.core.fitting import FitRules, FittedRequest, ModelLimits, fit
from broker.core.pricing import Demand, Prices, max_price, narrow_max_price, worst_case
from broker.core.request import parse_request
from broker.store.clock import IN_TIME_MS
from broker.store.sessions import Spec

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from broker.bytes_per_token import BytesPerToken
    from broker.catalog import Catalog
    from broker.core.client_limits import ClientLimits, LimitsInForce, ServiceLimits
    from broker.core.fitting import Request
    from broker.core.identity import Client
    from broker.core.model_entry import Model
    from broker.core.rates import RateStatus
    from broker.settings import Settings
    from broker.store.call import Call
    from broker.store.connection import Store
    from broker.store.idempotency import Binding, IdempotencyStore
    from broker.store.pending import PendingStore
    from broker.store.rates import Rates
    from broker.store.sessions import SessionStore
    from broker.system_message import SystemMessage
    from broker.telemetry.interface import TraceContext

T = TypeVar("T")

CATALOG_TIMEOUT = 1.0
"""Seconds that /prepare waits for the list of models. Unknown limits of a model are not enforced."""

NO_LIST_RETRY = 10.0
"""Seconds after which a caller tries again if there is a budget in money and no prices are known yet."""

TURN_TIMEOUT = 10.0
"""Seconds that a large body waits for other large bodies before it."""


class Admitted(NamedTuple):
    """A stored session.

    Attributes:
        answer: the body of the answer, ready for JSON.
        created: True for a new session; False if an earlier request with the same Idempotency-Key made it.
        rate: the rate status of its client, if this prepare was counted.
    """

    answer: dict[str, Any]
    created: bool
    rate: RateStatus | None = None


class ReadyRequest(NamedTuple):
    """A valid request that may be stored, if the limits of its client allow it.

    Attributes:
        client: the client that pays.
        limits: all limits of that client.
        body: the body for the upstream, JSON.
        fitted: the request as fitted to its models.
        worst: the most that it can use.
    """

    client: Client
    limits: LimitsInForce
    body: bytes
    fitted: FittedRequest
    worst: WorstCase


class Admission:
    """Makes sessions.

    Args:
        store: runs several steps in one round trip.
        settings: the limits and rules.
        catalog: the models.
        sessions: stores the sessions.
        rates: counts the prepares of each client.
        pending: counts the pending sessions.
        limits: the limits of clients.
        bytes_per_token: the learned values of the models.
        idempotency: the used keys.
        system: the operator's system message.
    """

    def __init__(
        self,
        *,
        store: Store,
        settings: Settings,
        catalog: Catalog,
        sessions: SessionStore,
        rates: Rates,
        pending: PendingStore,
        limits: ServiceLimits,
        bytes_per_token: BytesPerToken,
        idempotency: IdempotencyStore,
        system: SystemMessage,
    ) -> None:
        self._store = store
        self._removing: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._settings = settings
        self._catalog = catalog
        self._sessions = sessions
        self._rates = rates
        self._pending = pending
        self._limits = limits
        self._bytes_per_token = bytes_per_token
        self._idempotency = idempotency
        self._system = system
        self._rules = RequestRules(
            default_model=settings.default_model,
            extra_parameters=settings.extra_parameters,
            allowed_models=settings.allowed_models,
            max_messages=settings.max_messages,
        )

    async def check_rate(self, client: Client, idempotency_key: str | None) -> None:
        """Refuse a client that was refused a moment ago, before its body is read.

        A request with a known key is still answered, because that costs very little.

        Raises:
            RateLimited: the client has reached its limit, and that cannot have changed yet.
            StoreUnavailable: Redis cannot be reached.
        """
        status = self._rates.standing_refusal(client.name, self._limits.of(client.limits).rates)
        if status is not None and not (idempotency_key and await self._knows(client, idempotency_key)):
            raise _rate_limited(status)

    async def admit(
        self,
        body: bytes,
        *,
        client: Client,
        referer: str,
        idempotency_key: str | None,
        request_id: str = "",
        trace: TraceContext | None = None,
    ) -> Admitted:
        """Make a session of a request, or find the one that its Idempotency-Key made.

        Args:
            body: the request as JSON.
            client: the client that pays.
            referer: the origin of the page, or empty.
            idempotency_key: the key in the request's header, or None.
            request_id: the id of the request, for the log lines of the session.
            trace: the trace of the request, for the spans of the session.

        Raises:
            RequestError: the body is not a valid request.
            IdempotencyConflict: the key was used with another body.
            RateLimited: the client has prepared too often.
            Overloaded: too many large bodies wait to be parsed, or all stored requests together are too large.
            TooManyStreams: this client has too many pending sessions, or too large ones.
            BudgetExceeded: the budget of today does not cover this.
            StoreUnavailable: Redis cannot be reached.

        Each of them has the rate status of the client in `rate`, if the prepare was counted.
        """
        bound = None
        if idempotency_key is not None:
            bound = await self._idempotency.find(client.name, idempotency_key)
            if bound is not None and (known := await self._known(bound, body)) is not None:
                return known
        rate: RateStatus | None = None
        try:
            # A large body is counted before it is read, a small one in the round trip that admits it.
            if idempotency_key is not None or len(body) > SMALL_BODY:
                rate = await self._count(client)
            try:
                ready = await self._make_ready(body, client)
            except RequestError:
                rate = rate or await self._count(client)
                raise
            session_id = str(uuid.uuid4())
            spec = self._spec(ready, referer, request_id, trace)
            rate = await self._store_session(session_id, ready, spec, rate)
            answer = self._answer(session_id, ready.fitted)
            if idempotency_key is None:
                return Admitted(answer, True, rate)
            return (await self._bind(body, client, answer, idempotency_key, bound))._replace(rate=rate)
        except BrokerError as error:
            error.rate = error.rate or rate
            raise

    async def _count(self, client: Client) -> RateStatus:
        """Count a prepare by itself.

        Raises:
            RateLimited: the client has reached its limit.
        """
        return _allowed(await self._rates.hit(client.name, self._limits.of(client.limits).rates))

    async def _knows(self, client: Client, idempotency_key: str) -> bool:
        """Returns True if a session is bound to this key of this client."""
        bound = await self._idempotency.find(client.name, idempotency_key)
        return bound is not None and await self._sessions.remaining(bound.session_id) is not None

    async def _make_ready(self, body: bytes, client: Client) -> ReadyRequest:
        """Return the request for the upstream and the most that it can use."""
        own = self._limits.of(client.limits)
        request = await self._stepwise(body, self._read(body, own))
        names = request.reachable_models
        known = await self._catalog.known(names, timeout=CATALOG_TIMEOUT)
        if not self._catalog.openrouter:
            refuse_fetched_images(request.image_addresses(), self._settings.extra_parameters)
        bytes_per_token = await self._bytes_per_token.of(names)
        return await self._stepwise(body, self._fit(request, client, own, known, bytes_per_token))

    async def _stepwise(self, body: bytes, steps: Generator[None, None, T]) -> T:
        """Do the steps for a body, and return their result.

        The event loop runs between the steps for a large body, and only one large body is handled at a time. The steps
        for a small one are done at once, which is what most requests need.

        Raises:
            Overloaded: too many other large bodies came before it.
        """
        if len(body) <= SMALL_BODY:
            return _do_at_once(steps)
        try:
            async with asyncio.timeout(TURN_TIMEOUT):
                await self._turn.acquire()
        except TimeoutError:
            raise Overloaded("Too many large requests came at once; try again in a moment.") from None
        try:
            while True:
                next(steps)
                await asyncio.sleep(0)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            self._turn.release()

    def _read(self, body: bytes, limits: LimitsInForce) -> Generator[None, None, Request]:
        """Count, parse, check and validate a body, in steps."""
        found = outline(body)
        yield
        document = read_json(body)
        yield
        check_document(document, body, found)
        yield
        request = parse_request(document, self._rules)
        yield
        limits.check_models(request.reachable_models)
        return request.with_system(limits.system).with_system(self._system.text)

    def _fit(
        self,
        request: Request,
        client: Client,
        own: LimitsInForce,
        known: Mapping[str, Model],
        bytes_per_token: Mapping[str, float],
    ) -> Generator[None, None, ReadyRequest]:
        """Fit a request to its models, and compute the most that it can use, in steps."""
        names, openrouter = request.reachable_models, self._catalog.openrouter
        limits = {
            name: ModelLimits(model.context_length, model.max_completion_tokens)
            for name, model in known.items()
        }
        rules = FitRules(
            max_prompt_tokens=self._settings.max_prompt_tokens,
            max_output_tokens=own.max_output_tokens,
            switch_off_compression=openrouter,
            user=client.user if openrouter else None,
        )
        fitted = fit(request, limits, rules, bytes_per_token)
        yield
        prices = [known[name].prices if name in known else None for name in names]
        demand = demand_of(fitted.body, names)
        if own.quotas.limit_cost:
            self._check_priced(prices, names, demand)
        priced = self._prices_to_reserve(prices, demand)
        worst = _worst_of(fitted, priced, demand)
        if faults := beyond_limits(worst, own.quotas, request.caps[0]):
            raise InvalidRequest(details=faults)
        to_send = self._with_max_price(fitted.body, priced, demand) if own.quotas.limit_cost else fitted.body
        return ReadyRequest(client, own, orjson.dumps(to_send), fitted, worst)

    def _prices_to_reserve(self, prices: Sequence[Prices | None], demand: Demand) -> list[Prices]:
        """Return the prices of which the highest is reserved, or none if no price is known.

        If the price of a model is not known, return the highest price of the list. This is done without a budget too,
        because a budget may be switched on before the claim.
        """
        known = [each for each in prices if each is not None]
        if len(known) == len(prices) and None not in [worst_case(0, 0, each, demand) for each in known]:
            return known
        dearest = self._catalog.dearest
        return [dearest] if dearest is not None else []

    def _with_max_price(self, body: dict[str, Any], prices: list[Prices], demand: Demand) -> dict[str, Any]:
        """Return the body with the reserved price as its limit, for a client with a budget in money."""
        if not (prices and self._catalog.openrouter):
            return body
        provider = body.get("provider") or {}
        limited = narrow_max_price(provider.get("max_price"), max_price(prices, demand))
        return {**body, "provider": {**provider, "max_price": limited}}

    def _check_priced(self, prices: Sequence[Prices | None], names: Sequence[str], demand: Demand) -> None:
        """Check that a budget in money can cover these models.

        Raises:
            Overloaded: there is no list of prices now.
            ModelNotAllowed: the price of a model is not known, and unpriced models are not allowed.
        """
        if not self._catalog.has_list:
            message = "The prices of the models are not known yet, so no budget can cover them."
            raise Overloaded(message, retry_after=NO_LIST_RETRY)
        if self._settings.unpriced_models:
            return
        for name, listed in zip(names, prices, strict=True):
            if worst_case(0, 0, listed, demand) is None:
                raise ModelNotAllowed(f"The price of {name} is not known, so no budget can cover it.")

    def _spec(self, ready: ReadyRequest, referer: str, request_id: str, trace: TraceContext | None) -> Spec:
        """Return the values that are stored besides the request."""
        fitted = ready.fitted
        return Spec(
            model=fitted.model,
            prompt_tokens=fitted.reserved_prompt_tokens,
            referer=self._settings.referer or referer,
            client=ready.client.name,
            worst=ready.worst,
            calibration_sample=fitted.calibration_sample,
            dialect=fitted.dialect,
            request_id=request_id,
            trace=trace,
            limits=_to_store(ready.client),
        )

    async def _store_session(
        self, session_id: str, ready: ReadyRequest, spec: Spec, rate: RateStatus | None
    ) -> RateStatus:
        """Count the session as pending, store it, and count the prepare unless that was done already.

        Raises:
            RateLimited, TooManyStreams, Overloaded, BudgetExceeded, StoreUnavailable: as `admit`. What was stored
                or counted is removed in the background.
        """
        try:
            is_stored, rate = await self._store_at_once(session_id, ready, spec, rate)
            if not is_stored:
                calls = self._admitting(session_id, ready, rate)
                replies = await self._store.run(calls)
                rate = self._admitted(ready, replies, rate)
                await self._sessions.prepare(session_id, spec.with_request(ready.body))
        except BaseException as error:
            self._forget(ready.client.name, session_id)
            if isinstance(error, BrokerError):
                error.rate = error.rate or rate
            raise
        return _allowed(rate)

    async def _store_at_once(
        self, session_id: str, ready: ReadyRequest, spec: Spec, rate: RateStatus | None
    ) -> tuple[bool, RateStatus | None]:
        """Do all of `_store_session` in one round trip, if the request is small and the clock of Redis is known.

        A page gets its answer a sixth earlier (measured). A refused request is stored too, until its removal a moment
        later. It is small, and few are refused at the same time.

        Returns:
            True if the session is stored. False if it was not possible in this way; it is not refused, and the steps
            have to be done one after the other. And the rate status, if the prepare was counted.

        Raises:
            RateLimited, TooManyStreams, Overloaded, BudgetExceeded, StoreUnavailable: as `_store_session`.
        """
        now_ms = self._store.clock.now_ms()
        if len(ready.body) > SMALL_BODY or now_ms is None:
            return False, rate
        # Redis might get later calls after their removal, which is sent when nobody waits for them any more.
        before_ms = now_ms + IN_TIME_MS
        calls = self._admitting(session_id, ready, rate, before_ms=before_ms)
        storing = self._sessions.preparing(session_id, ready.body, spec, before_ms=before_ms)
        *replies, stored = await self._store.run_each([*calls, storing])
        try:
            rate = self._admitted(ready, replies, rate)
            ends_ms = int(_answered(stored))
        except StoreRefused as error:  # too late, or Redis is full
            return False, error.rate or rate
        if not ends_ms:  # too late
            return False, rate
        self._sessions.note_prepared(session_id, spec, ends_ms)
        return True, rate

    def _admitting(
        self, session_id: str, ready: ReadyRequest, rate: RateStatus | None, *, before_ms: int = 0
    ) -> list[Call]:
        """Return the calls that count a session as pending, and count the prepare where there is no rate status yet."""
        client, limits = ready.client.name, ready.limits
        calls = self._pending.admitting(
            *(client, session_id, ready.worst),
            stored=len(ready.body),
            quotas=limits.quotas,
            before_ms=before_ms,
        )
        return calls if rate is not None else [*calls, self._rates.hitting(client, limits.rates)]

    def _admitted(self, ready: ReadyRequest, replies: list[Any], rate: RateStatus | None) -> RateStatus:
        """Return the rate status, after the replies to the calls of `_admitting`.

        Raises:
            RateLimited, TooManyStreams, Overloaded, BudgetExceeded, StoreUnavailable: as `_store_session`. Its rate
                status is that of the prepare, if it was counted.
        """
        own, total, *counted = replies
        if counted:
            rate = self._rates.read(ready.client.name, _answered(counted[0]), ready.limits.rates)
        try:
            rate = _allowed(rate)
            self._pending.check([_answered(own), _answered(total)])
        except BrokerError as error:
            error.rate = rate
            raise
        return rate

    def _answer(self, session_id: str, fitted: FittedRequest) -> dict[str, Any]:
        """Return the body of the answer for a stored session."""
        return {
            "sessionId": session_id,
            "expiresIn": self._settings.session_ttl,
            "model": fitted.model,
            "promptTokens": fitted.prompt_tokens,
            "maxOutputTokens": fitted.max_output_tokens,
            "droppedMessages": fitted.dropped,
        }

    def _forget(self, client: str, session_id: str) -> None:
        """Remove a session that was not returned to anybody, in the background: the caller may have left.

        Without Redis it expires.
        """

        async def remove() -> None:
            calls = [self._sessions.forgetting(session_id), *self._pending.forgetting(client, session_id)]
            with suppress(StoreUnavailable):
                await self._store.run_each(calls)

        task = asyncio.create_task(remove())
        self._removing.add(task)
        task.add_done_callback(self._removing.discard)

    async def close(self) -> None:
        """Wait for the removals; the store limits their time."""
        await asyncio.gather(*self._removing)

    async def _known(self, bound: Binding, body: bytes) -> Admitted | None:
        """Return the session that a key has made, None if it is gone, so that the key is free.

        Raises:
            IdempotencyConflict: the key was used with another body.
        """
        remaining = await self._sessions.remaining(bound.session_id)
        if remaining is None:
            return None
        if bound.digest != _digest(body):
            raise IdempotencyConflict
        return Admitted({**bound.answer, "expiresIn": remaining}, created=False)

    async def _bind(
        self, body: bytes, client: Client, answer: dict[str, Any], key: str, bound: Binding | None
    ) -> Admitted:
        """Bind a key to a stored session, or remove that session if the key is bound to another one by now.

        The session is stored before the key is bound to it, so that a bound key always has a session. If two requests
        come at the same time, both store a session; one is bound, the other is removed and never returned.
        """
        digest = _digest(body)
        try:
            winner = await self._idempotency.bind(client.name, key, digest, answer, instead_of=bound)
        except BaseException:
            self._forget(client.name, answer["sessionId"])
            raise
        if winner.session_id == answer["sessionId"]:
            return Admitted(answer, created=True)
        self._forget(client.name, answer["sessionId"])
        if winner.digest != digest:
            raise IdempotencyConflict
        return Admitted(winner.answer, created=False)


def _worst_of(fitted: FittedRequest, prices: Sequence[Prices], demand: Demand) -> WorstCase:
    """Return the most that a request can use at the highest of these prices; without prices, its tokens alone."""
    prompt, output = fitted.reserved_prompt_tokens, fitted.max_output_tokens * fitted.answers
    costs = [worst_case(prompt, output, each, demand) or 0 for each in prices]
    return WorstCase(prompt + output, max(costs, default=0))


def _to_store(client: Client) -> ClientLimits | None:
    """Return the limits to store with a session: those of a JWT. Those of the clients file are read at the claim."""
    return client.limits if client.limits is not None and client.limits.narrows else None


def _allowed(status: RateStatus | None) -> RateStatus:
    """Return the status of a hit that was counted.

    Raises:
        RateLimited: it was refused.
    """
    if status is None:
        raise InternalError  # every prepare is counted once
    if not status.allowed:
        raise _rate_limited(status)
    return status


def _answered(reply: Any) -> Any:
    """Return the reply to a call.

    Raises:
        StoreUnavailable: Redis refused the call.
    """
    if isinstance(reply, StoreUnavailable):
        raise reply
    return reply


def _rate_limited(status: RateStatus) -> RateLimited:
    error = RateLimited(retry_after=status.reset)
    error.rate = status
    return error


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _do_at_once(steps: Generator[None, None, T]) -> T:
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result: T = end.value
        return result
