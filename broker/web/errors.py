"""Errors as responses: one JSON shape for everything that is not 2xx."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from aiohttp import hdrs, web

from broker.core.errors import (
    BodyTooLarge,
    BrokerError,
    Forbidden,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    RateLimited,
    ServiceError,
    Unauthorized,
    UnsupportedMediaType,
)
from broker.core.json_to_keep import json_to_keep
from broker.web.rates import rate_headers

RETRY_AFTER = 3
"""Seconds after which a caller may try again where nothing better is known."""


_KINDS: Mapping[int, type[BrokerError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    405: MethodNotAllowed,
    413: BodyTooLarge,
    415: UnsupportedMediaType,
    429: RateLimited,
    503: Overloaded,
}
"""Our code and sentence for the statuses of other errors."""

_LONGEST_MESSAGE = 300

_JSON: Mapping[str, str] = {hdrs.CONTENT_TYPE: "application/json", hdrs.CACHE_CONTROL: "no-store"}


def json_response(data: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return a JSON answer that caches never store."""
    # aiohttp keeps it until the next answer of the same connection, which may be a stream.
    return web.Response(
        body=json_to_keep(data), status=status, headers={**_JSON, **headers} if headers else _JSON
    )


def error_response(error: BrokerError) -> web.Response:
    """Return ``{"error": {"code", "message", "details"?}}`` with the error's status."""
    body: dict[str, Any] = {"code": error.code, "message": error.message}
    if error.details is not None:
        body["details"] = error.details
    response = _error_response(error.status, body, retry_after=error.retry_after)
    response.headers.update(rate_headers(error.rate))
    return response


def http_error_response(error: web.HTTPException) -> web.Response:
    """Return an exception of aiohttp in our form: aiohttp's own, and those of the application around the service.

    The status and the text of the latter are kept. One that is not an error, such as a redirect to a login page,
    becomes a 401: a caller that asks for JSON could not follow it.
    """
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return error_response(BodyTooLarge())
    status = error.status if error.status >= 400 else 401
    kind = _KINDS.get(status, InternalError if status >= 500 else InvalidRequest)
    message = _message(error)[:_LONGEST_MESSAGE] or kind.default_message
    response = _error_response(status, {"code": kind.code, "message": message})
    for header in (hdrs.ALLOW, hdrs.RETRY_AFTER, hdrs.WWW_AUTHENTICATE):
        if header in error.headers:
            response.headers[header] = error.headers[header]
    return response


def _error_response(status: int, body: dict[str, Any], *, retry_after: float | None = None) -> web.Response:
    headers: dict[str, str] = {}
    if status == 401:
        headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
    if status in (429, 503):
        headers[hdrs.RETRY_AFTER] = str(math.ceil(retry_after or RETRY_AFTER))
    return json_response({"error": body}, status=status, headers=headers)


def _message(error: web.HTTPException) -> str:
    """Return the text that was written for the caller; empty where it is only the name of the status."""
    text = error.text if error.content_type == "text/plain" else ""
    if text and text != f"{error.status}: {error.reason}":
        return text
    return error.reason if error.reason != HTTPStatus(error.status).phrase else ""


def may_come_again(error: BrokerError) -> bool:
    """Return True if an EventSource should be asked to reconnect, because nothing is wrong with its session."""
    return isinstance(error, ServiceError) and error.status == 503
