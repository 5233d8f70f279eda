"""Handle the body of /prepare: validate it, fit it to the model, check that it can be paid, and store it.

This joins `core`, the catalog and the store. It knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import orjson

from broker.core.accounts import Quotas, WorstCase, beyond_limits
from broker.core.checking import RequestRules, refuse_fetched_images
from broker.core.demand import demand_of
from broker.core.document import SMALL_BODY, check_document, outline, read_json
from broker.core.errors import (
    IdempotencyConflict,
    InvalidRequest,
    ModelNotAllowed,
    Overloaded,
    RequestError,
    StoreUnavailable,
)
from broker.core.fitting import FitRules, FittedRequest, ModelLimits, fit
from broker.core.pricing import Demand, Prices, max_price, narrow_max_price, worst_case
from broker.core.request import parse_request
from broker.store.accounts import check_admitted
from broker.store.sessions import Prepared

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from broker.bytes_per_token import BytesPerToken
    from broker.catalog import Catalog
    from broker.core.fitting import Request
    from broker.core.identity import Client
    from broker.settings import Settings
    from broker.store.accounts import AccountStore
    from broker.store.connection import Call, Store
    from broker.store.idempotency import Binding, IdempotencyStore
    from broker.store.sessions import SessionStore
    from broker.system_message import SystemMessage

CATALOG_TIMEOUT = 1.0
"""Seconds that /prepare waits for the list of models. Unknown limits of a model do not apply."""

NO_LIST_RETRY = 10.0
"""Seconds after which a caller should try again where there is a budget in money and no price is known yet."""

TURN_TIMEOUT = 10.0
"""Seconds that a large body waits for others to be parsed before it."""


class Admitted(NamedTuple):
    """A stored session.

    Attributes:
        answer: the body of the answer, ready for JSON.
        created: True for a new session; False if an earlier request with the same Idempotency-Key made it.
    """

    answer: dict[str, Any]
    created: bool


class RateCheck(Protocol):
    """Counts one prepare against the rate of its client."""

    def call(self) -> Call:
        """Return the call that counts, to be run together with others."""

    def note(self, reply: Sequence[int]) -> None:
        """Handle the reply of `call`; raises `RateLimited`."""

    async def alone(self) -> None:
        """Count with a call of its own; raises `RateLimited`."""


class AdmittedRequest(NamedTuple):
    """A request that can be stored."""

    client: Client
    fitted: FittedRequest
    worst: WorstCase


class Admission:
    """Makes sessions from requests.

    Args:
        store: runs several steps in one round trip.
        settings: the limits and rules.
        catalog: the models.
        sessions: stores the sessions.
        accounts: the spending and the pending sessions of clients.
        quotas: the limits of clients.
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
        accounts: AccountStore,
        quotas: Quotas,
        bytes_per_token: BytesPerToken,
        idempotency: IdempotencyStore,
        system: SystemMessage,
    ) -> None:
        self._store = store
        self._forgetting: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._settings = settings
        self._catalog = catalog
        self._sessions = sessions
        self._accounts = accounts
        self._quotas = quotas
        self._bytes_per_token = bytes_per_token
        self._idempotency = idempotency
        self._system = system
        self._rules = RequestRules(
            default_model=settings.default_model,
            extra_parameters=settings.extra_parameters,
            allowed_models=settings.allowed_models,
            max_messages=settings.max_messages,
        )

    async def admit(
        self, body: bytes, *, client: Client, rate_check: RateCheck, referer: str, idempotency_key: str | None
    ) -> Admitted:
        """Make a session from a request, or find the one that its Idempotency-Key made.

        Args:
            body: the request as JSON.
            client: the client that pays.
            rate_check: counts the prepare, whatever its result.
            referer: the origin of the page, or empty.
            idempotency_key: the key in the request's header, or None.

        Raises:
            RequestError: the body is not a valid request.
            IdempotencyConflict: the key was used with another body.
            RateLimited: the client has prepared too often.
            Overloaded: too many large bodies wait to be parsed, or all stored requests together are too large.
            TooManyStreams: this client has too many pending sessions, or too large ones.
            BudgetExceeded: the budget of today does not cover this.
            StoreUnavailable: Redis cannot be reached.
        """
        bound = None
        if idempotency_key is not None:
            bound = await self._idempotency.find(client.name, idempotency_key)
            if bound is not None and (known := await self._known(bound, body)) is not None:
                return known
        # A large body is counted before it is parsed. A small one is counted in the round trip that stores it.
        early = idempotency_key is not None or len(body) > SMALL_BODY
        if early:
            await rate_check.alone()
        try:
            order = await self._order(body, client)
        except RequestError:
            if not early:
                await rate_check.alone()
            raise
        if idempotency_key is None:
            return Admitted(await self._keep(order, referer, None if early else rate_check), created=True)
        return await self._keep_once(body, order, referer, idempotency_key, bound)

    async def knows(self, client: Client, idempotency_key: str) -> bool:
        """Return True if a session is bound to this key of this client.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        bound = await self._idempotency.find(client.name, idempotency_key)
        return bound is not None and await self._sessions.remaining(bound.session_id) is not None

    async def _order(self, body: bytes, client: Client) -> AdmittedRequest:
        """Return the request as it would be sent, with its worst case."""
        async with self._turn_of(body):
            request = await self._read(body)
        names = request.reachable_models
        known = await self._catalog.known(names, timeout=CATALOG_TIMEOUT)
        if not self._catalog.openrouter:
            refuse_fetched_images(request.image_addresses(), self._settings.extra_parameters)
        limits = {
            name: ModelLimits(model.context_length, model.max_completion_tokens)
            for name, model in known.items()
        }
        rules = FitRules(
            max_prompt_tokens=self._settings.max_prompt_tokens,
            max_output_tokens=self._settings.max_output_tokens,
            switch_off_compression=self._catalog.openrouter,
            user=client.user if self._catalog.openrouter else None,
        )
        bytes_per_token = await self._bytes_per_token.of(names)
        async with self._turn_of(body):
            fitted = fit(request, limits, rules, bytes_per_token)
            await _pause(body)
            prices = [known[name].prices if name in known else None for name in names]
            worst = self._worst(fitted, prices, names)
            if faults := beyond_limits(worst, self._quotas, request.caps[0]):
                raise InvalidRequest(details=faults)
            return AdmittedRequest(client, fitted, worst)

    @asynccontextmanager
    async def _turn_of(self, body: bytes) -> AsyncIterator[None]:
        """Wait for the turn of a large body, and keep it during the block: only one is parsed at a time.

        Raises:
            Overloaded: too many others were before it.
        """
        if len(body) <= SMALL_BODY:
            yield
            return
        try:
            async with asyncio.timeout(TURN_TIMEOUT):
                await self._turn.acquire()
        except TimeoutError:
            raise Overloaded("Too many large requests came at once; try again in a moment.") from None
        try:
            yield
        finally:
            self._turn.release()

    async def _read(self, body: bytes) -> Request:
        """Count, parse, check and validate a body. Between the steps of a large one, the event loop runs."""
        found = outline(body)
        await _pause(body)
        document = read_json(body)
        await _pause(body)
        check_document(document, body, found)
        await _pause(body)
        request = parse_request(document, self._rules)
        await _pause(body)
        return request.with_system(self._system.text)

    def _worst(
        self, fitted: FittedRequest, prices: Sequence[Prices | None], names: Sequence[str]
    ) -> WorstCase:
        """Return the worst case of a request; where there is a budget in money, add the price limit to its body."""
        prompt, output = fitted.reserved_prompt_tokens, fitted.max_output_tokens * fitted.answers
        demand = demand_of(fitted.body, names)
        costs = [worst_case(prompt, output, each, demand) for each in prices]
        known = [each for each in prices if each is not None]
        if None in costs:
            # The cost is reserved without a budget too, because one may be switched on before the claim.
            dearest = self._catalog.dearest
            costs = [worst_case(prompt, output, dearest, demand)]
            known = [dearest] if dearest is not None else []
        if self._quotas.limit_cost:
            self._check_priced(prices, names, demand)
            if known and self._catalog.openrouter:
                provider = fitted.body.get("provider") or {}
                limited = narrow_max_price(provider.get("max_price"), max_price(known, demand))
                fitted.body["provider"] = {**provider, "max_price": limited}
        return WorstCase(prompt + output, max(cost or 0 for cost in costs))

    def _check_priced(self, prices: Sequence[Prices | None], names: Sequence[str], demand: Demand) -> None:
        """Check that a budget in money can cover these models.

        Raises:
            Overloaded: there is no list of prices now.
            ModelNotAllowed: the price of one is not known, and unpriced models are not allowed.
        """
        if not self._catalog.has_list:
            message = "The prices of the models are not known yet, so no budget can cover them."
            raise Overloaded(message, retry_after=NO_LIST_RETRY)
        if self._settings.unpriced_models:
            return
        for name, listed in zip(names, prices, strict=True):
            if worst_case(0, 0, listed, demand) is None:
                raise ModelNotAllowed(f"The price of {name} is not known, so no budget can cover it.")

    async def _keep(
        self, order: AdmittedRequest, referer: str, rate_check: RateCheck | None = None
    ) -> dict[str, Any]:
        session_id = str(uuid.uuid4())
        fitted, settings = order.fitted, self._settings
        prepared = Prepared(
            request=orjson.dumps(fitted.body),
            model=fitted.model,
            prompt_tokens=fitted.reserved_prompt_tokens,
            referer=settings.referer or referer,
            client=order.client.name,
            worst=order.worst,
            calibration_sample=fitted.calibration_sample,
        )
        client, ttl = order.client.name, settings.session_ttl
        # All steps in Redis go in one round trip; if one refuses, the others are undone.
        calls = [
            self._accounts.admitting(client, session_id, order.worst, ttl=ttl, stored=len(prepared.request)),
            self._sessions.preparing(session_id, prepared),
            *([rate_check.call()] if rate_check is not None else []),
        ]
        try:
            admitted, _, *counted = await self._store.run(calls)
            if rate_check is not None:
                rate_check.note(*counted)
            check_admitted(admitted)
        except BaseException:
            self._forget(client, session_id)
            raise
        return {
            "sessionId": session_id,
            "expiresIn": settings.session_ttl,
            "model": fitted.model,
            "promptTokens": fitted.prompt_tokens,
            "maxOutputTokens": fitted.max_output_tokens,
            "droppedMessages": fitted.dropped,
        }

    def _forget(self, client: str, session_id: str) -> None:
        """Remove a session that was not returned to anybody. In the background, because the caller may have left."""

        async def forget() -> None:
            try:
                await self._sessions.forget(session_id)
                await self._accounts.forget(client, session_id)
            except StoreUnavailable:
                pass  # both expire

        task = asyncio.create_task(forget())
        self._forgetting.add(task)
        task.add_done_callback(self._forgetting.discard)

    async def close(self) -> None:
        """Wait for the removals; the store limits their time."""
        await asyncio.gather(*self._forgetting)

    async def _known(self, bound: Binding, body: bytes) -> Admitted | None:
        """Return the session that a key has made; None where it is gone, so that the key is free.

        Raises:
            IdempotencyConflict: the key was used with another body.
        """
        remaining = await self._sessions.remaining(bound.session_id)
        if remaining is None:
            return None
        if bound.digest != _digest(body):
            raise IdempotencyConflict
        return Admitted({**bound.answer, "expiresIn": remaining}, created=False)

    async def _keep_once(
        self, body: bytes, order: AdmittedRequest, referer: str, key: str, bound: Binding | None
    ) -> Admitted:
        client, digest = order.client.name, _digest(body)
        # The session is stored before the key is bound to it, so that a key never leads to nothing. Two requests at
        # the same time both store one; one of them is bound, and the other is removed before it is returned to anybody.
        answer = await self._keep(order, referer)
        try:
            winner = await self._idempotency.bind(client, key, digest, answer, instead_of=bound)
        except BaseException:
            self._forget(client, answer["sessionId"])
            raise
        if winner.session_id == answer["sessionId"]:
            return Admitted(answer, created=True)
        self._forget(client, answer["sessionId"])
        if winner.digest != digest:
            raise IdempotencyConflict
        return Admitted(winner.answer, created=False)


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


async def _pause(body: bytes) -> None:
    if len(body) > SMALL_BODY:
        await asyncio.sleep(0)
