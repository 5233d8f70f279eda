"""Answers whose body does not change while the service runs: the page, the browser client, the OpenAPI document."""

from __future__ import annotations

import gzip
from hashlib import sha256
from typing import TYPE_CHECKING

from aiohttp import ETag, web

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping


def answering(
    body: bytes, headers: Mapping[str, str]
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return a handler that answers with this body and an entity tag, or with 304 to a caller that has it.

    The body is compressed once, for callers that take it so; that form has a tag of its own.
    """
    tag = sha256(body).hexdigest()[:32]
    headers = {**headers, "Vary": "Accept-Encoding"}
    plain = (tag, body, headers)
    packed = (f"{tag}-gzip", gzip.compress(body, mtime=0), {**headers, "Content-Encoding": "gzip"})
    tags = {plain[0], packed[0], "*"}

    async def answer(request: web.Request) -> web.StreamResponse:
        known = {tag.value for tag in request.if_none_match or ()}
        tag, content, fields = packed if "gzip" in request.headers.get("Accept-Encoding", "") else plain
        response: web.Response
        if known & tags:
            response = web.Response(status=304, headers=headers)
        else:
            response = web.Response(body=content, headers=fields)
        response.etag = ETag(tag)
        return response

    return answer
