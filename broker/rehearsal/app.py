"""The scripted upstream as a web service: its routes, and its start.

It answers as OpenRouter does under ``/api/v1``, needs no key, and uses no network. All its state is in the application,
so that two of them in one process are independent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from uuid import uuid4

import orjson
from aiohttp import web

from broker.rehearsal.answer import Answer
from broker.rehearsal.ask import Ask, AskError, read_ask, read_responses_ask
from broker.rehearsal.behaviours import MODELS
from broker.rehearsal.ledger import Attempts, Generations, generation_entry
from broker.rehearsal.model_entries import Model, catalog_entry
from broker.rehearsal.responses import ResponsesAnswer
from broker.rehearsal.scripts import unstreamed
from broker.rehearsal.stage import act
from broker.rehearsal.steps import problem

BASE = "/api/v1"
BOOKED_AFTER = 0.5
LARGEST_BODY = 16 * 1024 * 1024
SHUTDOWN_TIMEOUT = 0.1

_PACE = web.AppKey("pace", float)
_GENERATIONS = web.AppKey("generations", Generations)
_ATTEMPTS = web.AppKey("attempts", Attempts)
_MODELS = web.AppKey("models", Mapping[str, Model])


def build_rehearsal(pace: float = 1.0, models: Sequence[Model] = MODELS) -> web.Application:
    """Return the service as an application, for a runner with ``handler_cancellation``.

    Args:
        pace: a factor for every pause; 0.05 runs the scripts twenty times faster.
        models: the models that it serves.
    """
    app = web.Application(client_max_size=LARGEST_BODY)
    app[_PACE] = pace
    app[_GENERATIONS] = Generations(BOOKED_AFTER * pace)
    app[_ATTEMPTS] = Attempts()
    app[_MODELS] = {model.id: model for model in models}
    app.router.add_post(f"{BASE}/chat/completions", complete)
    app.router.add_post(f"{BASE}/responses", respond)
    app.router.add_get(f"{BASE}/models", list_models)
    app.router.add_get(f"{BASE}/generation", tell_generation)
    return app


async def complete(request: web.Request) -> web.StreamResponse:
    """POST /chat/completions."""
    return await _serve(request, read_ask, Answer)


async def respond(request: web.Request) -> web.StreamResponse:
    """POST /responses."""
    return await _serve(request, read_responses_ask, ResponsesAnswer)


async def _serve(
    request: web.Request, read: Callable[[bytes], Ask], kind: type[Answer]
) -> web.StreamResponse:
    try:
        ask = read(await request.read())
    except AskError as error:
        return _refusal(400, str(error))
    model = request.app[_MODELS].get(ask.model)
    if model is None:
        return _refusal(400, f"{ask.model} is not a valid model ID")
    return await _perform(request, model, _answer(request.app, ask, model, kind))


async def list_models(request: web.Request) -> web.Response:
    """GET /models: the complete catalog."""
    entries = [catalog_entry(model) for model in request.app[_MODELS].values()]
    return _json({"data": entries, "total_count": len(entries), "links": {"next": None}})


async def tell_generation(request: web.Request) -> web.Response:
    """GET /generation?id=: the usage of a generation, from half a second after its end."""
    generation_id = request.query.get("id", "")
    entry = request.app[_GENERATIONS].find(generation_id, asyncio.get_running_loop().time())
    if entry is None:
        return _refusal(404, f"Generation {generation_id[:100]} not found")
    return _json({"data": entry})


def _answer(app: web.Application, ask: Ask, model: Model, kind: type[Answer]) -> Answer:
    served = app[_MODELS][model.routes_to] if model.routes_to else model
    created = int(time.time())
    limits = (ask.max_tokens, model.max_completion_tokens, model.context_length)
    return kind(
        ask=ask,
        model=served.id,
        prices=served.prices,
        id=f"gen-{created}-{uuid4().hex[:20]}",
        created=created,
        room=min(limit for limit in limits if limit is not None),
        attempt=app[_ATTEMPTS].count(ask.fingerprint),
    )


async def _perform(request: web.Request, model: Model, answer: Answer) -> web.StreamResponse:
    script = model.script(answer)
    if not answer.ask.stream:
        script = unstreamed(script, answer)
    loop = asyncio.get_running_loop()
    created_at, started = datetime.now(UTC), loop.time()

    def book(*, cancelled: bool) -> None:
        now = loop.time()
        entry = generation_entry(answer, cancelled=cancelled, seconds=now - started, created_at=created_at)
        request.app[_GENERATIONS].record(entry, now)

    try:
        response = await act(script, request, answer.id, request.app[_PACE])
    except asyncio.CancelledError:
        book(cancelled=True)
        raise
    except ConnectionError:
        book(cancelled=True)
        return web.Response()  # nobody gets this; an exception would be logged as a failure
    if response.status < web.HTTPBadRequest.status_code:
        book(cancelled=False)
    return response


def _json(body: Mapping[str, object]) -> web.Response:
    return web.Response(body=orjson.dumps(body), content_type="application/json")


def _refusal(status: int, message: str) -> web.Response:
    reply = problem(status, message)
    return web.Response(status=status, body=reply.body, content_type=reply.content_type)


@asynccontextmanager
async def rehearsal_beside(
    host: str = "127.0.0.1", port: int = 0, pace: float = 1.0, models: Sequence[Model] = MODELS
) -> AsyncIterator[str]:
    """Run the service in this loop during the block, and return its base URL.

    With port 0 it takes a free port. At the end of the block, running scripts are cancelled.

    Raises:
        OSError: the port is not available.
    """
    app = build_rehearsal(pace, models)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=SHUTDOWN_TIMEOUT, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        yield site.name + BASE
    finally:
        await runner.cleanup()
