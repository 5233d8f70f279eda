"""Answers whose body does not change while the service runs: the page, the browser client, the OpenAPI document."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from aiohttp import ETag, web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping


def answering(
    body: bytes, headers: Mapping[str, str]
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return a handler that answers with this body and an entity tag, or with 304 to a caller that has it."""
    etag = ETag(sha256(body).hexdigest()[:32])

    async def answer(request: web.Request) -> web.StreamResponse:
        known = {tag.value for tag in request.if_none_match or ()}
        response: web.Response
        if known & {etag.value, "*"}:
            response = web.Response(status=304, headers=headers)
        else:
            response = web.Response(body=body, headers=headers)
        response.etag = etag
        return response

    return answer
