"""GET /models: the upstream's list, with only the models that the caller may use and that match the query."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import ETag, web

from broker.core.errors import InvalidRequest
from broker.web.keys import CATALOG, LIMITS, RESOLVER, SETTINGS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from broker.core.model_entry import Listing

# Caches may store a copy but must check it each time, because the list may change at any time.
HEADERS = {"Cache-Control": "no-cache"}


async def get_models(request: web.Request) -> web.Response:
    """Answer with ``{"data": [...]}``, or with 304 where the caller has the same list already.

    Raises:
        InvalidRequest: the query is not valid.
        ModelsUnavailable: there is no list.
    """
    limits = request.app[LIMITS].of(await request.app[RESOLVER].check(request))
    free = _only_free(request.query)
    listing = await request.app[CATALOG].listing(
        request.app[SETTINGS].allowed_models,
        also=limits.models,
        q=request.query.get("q", ""),
        free=free,
    )
    if _has(request, listing):
        response = web.Response(status=304, headers=HEADERS)
    else:
        response = web.Response(body=listing.body, content_type="application/json", headers=HEADERS)
    response.etag = ETag(listing.etag)
    return response


def _only_free(query: Mapping[str, str]) -> bool:
    free = query.get("free", "false")
    if free not in {"true", "false"}:
        raise InvalidRequest(details=[{"field": "free", "message": "must be true or false"}])
    return free == "true"


def _has(request: web.Request, listing: Listing) -> bool:
    """Return True if ``If-None-Match`` names this answer; weak validators count (RFC 9110, section 13.1.2)."""
    return not {tag.value for tag in request.if_none_match or ()}.isdisjoint({listing.etag, "*"})
