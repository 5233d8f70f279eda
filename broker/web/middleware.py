"""What applies to every request: its id, the checks of host and origin, errors as JSON, and one line in the log."""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import TYPE_CHECKING

import structlog
from aiohttp import hdrs, web

from broker.core.errors import BrokerError, HostNotAllowed, InternalError, OriginNotAllowed
from broker.core.origins import Verdict
from broker.core.session import short
from broker.telemetry.interface import NO_TELEMETRY
from broker.web.errors import error_response, http_error_response
from broker.web.keys import LOGGED, METRICS, ORIGINS, REFUSED_ORIGINS, REQUEST_ID, TELEMETRY, WORKER
from broker.web.security_headers import add_security_headers

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

log = structlog.get_logger(__name__)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, Idempotency-Key, Last-Event-ID, If-None-Match",
    "Access-Control-Max-Age": "600",
}
_PREFLIGHT_OF_TRACES = {
    **_PREFLIGHT,
    "Access-Control-Allow-Headers": f"{_PREFLIGHT['Access-Control-Allow-Headers']}, traceparent, tracestate",
}
_EXPOSED = "Location, Retry-After, ETag, RateLimit, RateLimit-Policy, X-Request-Id"


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Handle a request completely. Only a cancellation and a broken connection leave it as an exception."""
    started = time.monotonic()
    request[REQUEST_ID] = _request_id(request)
    response = await _answer(request, handler)
    level = logging.DEBUG if "/health/" in request.path else logging.INFO
    if log.is_enabled_for(level):  # else the line need not be built
        log.log(
            level,
            "request",
            method=request.method,
            path=_shown_path(request.path),
            status=response.status,
            ms=round((time.monotonic() - started) * 1000, 1),
            request_id=request[REQUEST_ID],
            **request.get(LOGGED, {}),
        )
    return response


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        _check_host_and_origin(request)
        if _is_preflight(request):
            traced = request.app[TELEMETRY] is not NO_TELEMETRY
            return web.Response(status=204, headers=_PREFLIGHT_OF_TRACES if traced else _PREFLIGHT)
        return await handler(request)
    except BrokerError as error:
        if error.__cause__ is not None:
            log.warning(
                "refused",
                code=error.code,
                request_id=request[REQUEST_ID],
                cause=type(error.__cause__).__name__,
            )
        request.app[METRICS].refused(error.code)
        return error_response(error)
    except web.HTTPException as error:
        return http_error_response(error)
    except ConnectionError:
        # The client has left, so nobody gets this answer. If it were raised, aiohttp would log it as an error of ours.
        return web.Response(status=499, reason="Client Closed Request")
    except Exception:
        log.exception("internal error", request_id=request[REQUEST_ID])
        request.app[METRICS].refused(InternalError.code)
        return error_response(
            InternalError(f"Something went wrong on our side (request {request[REQUEST_ID]}).")
        )


async def add_headers(app: web.Application, request: web.Request, response: web.StreamResponse) -> None:
    """Add the request's id, the security and the CORS headers to a response, streams included. A signal of aiohttp."""
    headers = response.headers
    if app[WORKER].draining:
        response.force_close()
        headers[hdrs.CONNECTION] = "close"  # the library has set its own before this signal
    headers["X-Request-Id"] = request.get(REQUEST_ID) or new_request_id()
    origin = request.headers.get(hdrs.ORIGIN)
    add_security_headers(headers)
    if origin is None:
        return
    verdict = app[ORIGINS].judge(origin, request.headers.get(hdrs.HOST))
    if verdict is Verdict.REFUSED:
        return
    headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
    headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED
    if verdict is Verdict.CREDENTIALS:
        headers[hdrs.ACCESS_CONTROL_ALLOW_CREDENTIALS] = "true"


def _check_host_and_origin(request: web.Request) -> None:
    origins = request.app[ORIGINS]
    host = request.headers.get(hdrs.HOST)
    if not origins.answers_to(host):
        raise HostNotAllowed
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is not None and origins.judge(origin, host) is Verdict.REFUSED:
        request.app[REFUSED_ORIGINS].note(origin)
        raise OriginNotAllowed


def _is_preflight(request: web.Request) -> bool:
    return (
        request.method == hdrs.METH_OPTIONS
        and hdrs.ORIGIN in request.headers
        and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers
    )


def _request_id(request: web.Request) -> str:
    given = request.headers.get("X-Request-Id", "")
    return given if _REQUEST_ID.fullmatch(given) else new_request_id()


def new_request_id() -> str:
    """Return the id of a request that has none."""
    return secrets.token_hex(8)


def _shown_path(path: str) -> str:
    """Return the path for the log, with only the first 8 characters of a session id."""
    before, stream, session = path.partition("/stream/")
    head, _, rest = session.partition("/")
    return f"{before[:100]}{stream}{short(head)}" + (f"/{short(rest)}" if rest else "")
