"""POST /prepare."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from aiohttp import hdrs, web

from broker.core.errors import BodyTooLarge, InvalidJson, InvalidRequest, UnsupportedMediaType
from broker.core.session import short
from broker.web.errors import json_response
from broker.web.keys import ADMISSION, LIMITS, LOGGED, REQUEST_ID, RESOLVER, SETTINGS, TELEMETRY, TURNS
from broker.web.rates import rate_headers

if TYPE_CHECKING:
    from broker.telemetry.interface import PrepareSpan

BODY_TIMEOUT = 30.0
"""Seconds for a body to arrive."""

_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


async def prepare(request: web.Request) -> web.Response:
    """Validate a chat request, trim it to fit, and store it for the stream that will claim it."""
    telemetry = request.app[TELEMETRY]
    with telemetry.preparing(request.headers, path=request.path, scheme=request.scheme) as span:
        return await _prepare(request, span)


async def _prepare(request: web.Request, span: PrepareSpan) -> web.Response:
    app = request.app
    await app[TURNS].wait()
    client = await app[RESOLVER].identify(request)
    origin = request.headers.get(hdrs.ORIGIN, "")
    app[LIMITS].of(client.limits).check_origin(origin)
    key = _idempotency_key(request)
    admission = app[ADMISSION]
    await admission.check_rate(client, key)
    body = await _body(request, app[SETTINGS].max_body)
    admitted = await admission.admit(
        body,
        client=client,
        referer=origin,
        idempotency_key=key,
        request_id=request[REQUEST_ID],
        trace=span.context,
    )
    answer, status = admitted.answer, 201 if admitted.created else 200
    session_id = answer["sessionId"]
    request[LOGGED] = {"session": short(session_id)}
    span.prepared(
        session_id=session_id,
        status=status,
        model=answer["model"],
        max_tokens=answer["maxOutputTokens"],
        request_id=request[REQUEST_ID],
    )
    return json_response(
        answer,
        status=status,
        headers={
            hdrs.LOCATION: f"{_prefix(request)}/stream/{session_id}",
            **rate_headers(admitted.rate),
        },
    )


def _prefix(request: web.Request) -> str:
    """Return the part of the path before ours, where the service is a part of an application."""
    return request.rel_url.raw_path.removesuffix("/prepare")


async def _body(request: web.Request, limit: int) -> bytes:
    if request.content_type != "application/json":
        raise UnsupportedMediaType
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
        raise UnsupportedMediaType("The body must not be compressed.")
    if (request.content_length or 0) > limit:
        raise BodyTooLarge(f"The body may have at most {limit} bytes.")
    content = request.content
    if content.is_eof() and not content.at_eof():
        body = content.read_nowait()  # it came with its head, as most do: nothing is waited for
    else:
        body = await _arriving_body(request, limit)
    if len(body) > limit:
        raise BodyTooLarge(f"The body may have at most {limit} bytes.")
    return body


async def _arriving_body(request: web.Request, limit: int) -> bytes:
    """Return a body of which a part is still to come, or that somebody has read before us."""
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            return await _with_our_limit(request, limit).read()
    except TimeoutError:
        raise InvalidJson("The body did not arrive in time.") from None


def _with_our_limit(request: web.Request, limit: int) -> web.BaseRequest:
    """Return the request with our limit of its body; the application around us may have another one."""
    try:
        return request.clone(client_max_size=limit)
    except RuntimeError:  # a middleware of that application has read it already
        return request


def _idempotency_key(request: web.Request) -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
        message = "must be 1 to 255 visible ASCII characters"
        raise InvalidRequest(details=[{"field": "Idempotency-Key", "message": message}])
    return key
