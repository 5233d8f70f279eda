"""Errors as responses: one JSON shape for everything that is not 2xx."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import hdrs, web

from broker.core.errors import (
    BodyTooLarge,
    BrokerError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    ServiceError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

RETRY_AFTER = 3
"""Seconds after which a caller may come back where nothing better is known."""


def json_response(data: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """A JSON answer, never stored by caches."""
    response = web.Response(
        body=orjson.dumps(data), status=status, content_type="application/json", headers=headers
    )
    response.headers.setdefault(hdrs.CACHE_CONTROL, "no-store")
    return response


def error_response(error: BrokerError) -> web.Response:
    """``{"error": {"code", "message", "details"?}}`` with the error's status."""
    body: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.details is not None:
        body["details"] = error.details
    headers: dict[str, str] = {}
    if error.status == 401:
        headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
    if error.status in (429, 503):
        headers[hdrs.RETRY_AFTER] = str(math.ceil(error.retry_after or RETRY_AFTER))
    return json_response({"error": body}, status=error.status, headers=headers)


def from_http(error: web.HTTPException) -> BrokerError | None:
    """The refusals of aiohttp as ours; None for what is no error, such as a redirect."""
    if error.status < 400:
        return None
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return BodyTooLarge()
    if isinstance(error, web.HTTPNotFound):
        return NotFound()
    if isinstance(error, web.HTTPMethodNotAllowed):
        return MethodNotAllowed()
    return InternalError() if error.status >= 500 else InvalidRequest(error.reason)


def may_come_again(error: BrokerError) -> bool:
    """Whether an EventSource should simply be asked to reconnect: nothing is wrong with its session."""
    return isinstance(error, ServiceError) and error.status == 503
