"""Health checks for orchestrators and proxies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import hdrs

from broker.core.errors import BrokerError, Draining, StoreUnavailable
from broker.web.errors import RETRY_AFTER, json_response
from broker.web.keys import STORE, WORKER

if TYPE_CHECKING:
    from aiohttp import web


async def live(request: web.Request) -> web.Response:  # noqa: ARG001 - a handler takes a request
    """Answer that the process runs and its event loop turns."""
    return json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """Answer whether requests should be sent to this worker.

    503 until Redis has answered once, and while draining. When Redis goes away later, all workers lose it at the same
    time, and a proxy that excluded all of them would cut every stream. So the answer is a 200 that names the problem.
    A worker that is replaced answers for the service, whose other workers take what is new.
    """
    if request.app[WORKER].ending:
        return _not_ready("draining", Draining(), "shutting down")
    store = request.app[STORE]
    try:
        writes = await store.takes_writes()
    except StoreUnavailable:
        if store.has_answered:
            return json_response({"status": "degraded", "reason": "redis cannot be reached"})
        return _not_ready("starting", StoreUnavailable(), "redis has not answered yet")
    if not writes:
        return json_response({"status": "degraded", "reason": "redis refuses to write"})
    return json_response({"status": "ok"})


def _not_ready(status: str, error: BrokerError, reason: str) -> web.Response:
    return json_response(
        {"status": status, "reason": reason, "error": {"code": error.code, "message": error.message}},
        status=error.status,
        headers={hdrs.RETRY_AFTER: str(RETRY_AFTER)},
    )
