"""What /prepare does with a body: validate it, fit it to the model, store it. Nothing is sent upstream.

It joins `core`, the catalog and the store, and knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from broker.core.chat import ChatRules, parse_chat
from broker.core.document import parse_json
from broker.core.fitting import FitRules, FittedChat, ModelLimits, fit
from broker.store.sessions import Prepared

if TYPE_CHECKING:
    from broker.catalog import Catalog
    from broker.settings import Settings
    from broker.store.idempotency import IdempotencyStore
    from broker.store.sessions import SessionStore

CATALOG_TIMEOUT = 1.0
"""Seconds that /prepare waits for the list of models; what is not known of a model does not bind."""


class Admitted(NamedTuple):
    """A stored session.

    Attributes:
        answer: what the page is told, JSON-ready.
        created: it is new; else an earlier request with the same Idempotency-Key made it.
    """

    answer: dict[str, Any]
    created: bool


class Admission:
    """Makes sessions.

    Args:
        settings: the rules.
        catalog: what is known of the models.
        sessions: where sessions are kept.
        idempotency: which keys have been used.
        label: turns a client's name into a stable one that tells the upstream nothing of it.
    """

    def __init__(
        self, *, settings: Settings, catalog: Catalog, sessions: SessionStore, idempotency: IdempotencyStore
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._sessions = sessions
        self._idempotency = idempotency
        self._rules = ChatRules(
            default_model=settings.default_model,
            extra_parameters=settings.extra_parameters,
            allowed_models=settings.allowed_models,
            max_messages=settings.max_messages,
        )

    async def admit(self, body: bytes, *, client: str, referer: str, idempotency_key: str | None) -> Admitted:
        """Make a session of a request, or find the one that its Idempotency-Key made.

        Args:
            body: the request as JSON.
            client: who asks: a stable name that reveals nothing.
            referer: origin of the page, or empty.
            idempotency_key: of the request's header.

        Raises:
            RequestError: the body is not a request that may be sent.
            IdempotencyConflict: the key was used with another body.
            StoreUnavailable: Redis cannot be reached.
        """
        fitted = await self._fit(body, client)
        if idempotency_key is None:
            return Admitted(await self._store(str(uuid.uuid4()), fitted, referer), created=True)
        return await self._store_once(body, fitted, referer, client, idempotency_key)

    async def _fit(self, body: bytes, client: str) -> FittedChat:
        request = parse_chat(parse_json(body), self._rules)
        known = await self._catalog.known(request.reachable_models, timeout=CATALOG_TIMEOUT)
        limits = {
            name: ModelLimits(model.context_length, model.max_completion_tokens)
            for name, model in known.items()
        }
        rules = FitRules(
            max_prompt_tokens=self._settings.max_prompt_tokens,
            max_output_tokens=self._settings.max_output_tokens,
            switch_off_compression=self._catalog.openrouter,
            user=client,
        )
        return fit(request, limits, rules)

    async def _store(self, session_id: str, fitted: FittedChat, referer: str) -> dict[str, Any]:
        prepared = Prepared(
            request=orjson.dumps(fitted.body),
            model=fitted.model,
            prompt_tokens=fitted.prompt_tokens,
            output_cap=fitted.max_output_tokens,
            referer=self._settings.referer or referer,
        )
        await self._sessions.prepare(session_id, prepared)
        return {
            "sessionId": session_id,
            "expiresIn": self._settings.session_ttl,
            "model": fitted.model,
            "promptTokens": fitted.prompt_tokens,
            "maxOutputTokens": fitted.max_output_tokens,
            "droppedMessages": fitted.dropped_messages,
        }

    async def _store_once(
        self, body: bytes, fitted: FittedChat, referer: str, client: str, key: str
    ) -> Admitted:
        digest = hashlib.sha256(body).hexdigest()
        bound = await self._idempotency.find(client, key, digest)
        if bound is not None and (remaining := await self._sessions.remaining(bound.session_id)) is not None:
            return Admitted({**bound.answer, "expiresIn": remaining}, created=False)
        # The session is stored before the key is bound to it, so that a key never leads to nothing: of two requests at
        # once both store one, one is bound, and the other is forgotten before anybody was told of it.
        answer = await self._store(str(uuid.uuid4()), fitted, referer)
        winner = await self._idempotency.bind(client, key, digest, answer, instead_of=bound)
        if winner.session_id == answer["sessionId"]:
            return Admitted(answer, created=True)
        await self._sessions.forget(answer["sessionId"])
        return Admitted(winner.answer, created=False)
