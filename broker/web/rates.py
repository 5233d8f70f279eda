"""The rate of a client as HTTP tells it: a refusal, and two headers on every answer to a counted request.

The headers are those of https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/ (revision 11), both of
them lists of structured fields (RFC 9651). The draft wants no `Retry-After` that lies before `t`; here they are equal.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from aiohttp import web

from broker.core.errors import RateLimited
from broker.store.rates import RateStatus

if TYPE_CHECKING:
    from broker.store.rates import Rates

RATE_STATUS = web.RequestKey("rate_status", RateStatus)
"""How the client of a request stands, once the request was counted."""


async def count_prepare(request: web.Request, rates: Rates, client: str) -> None:
    """Count a prepare of a client.

    Raises:
        RateLimited: the client has had its limit.
        StoreUnavailable: Redis cannot be reached.
    """
    status = await rates.hit(client)
    request[RATE_STATUS] = status
    if not status.allowed:
        raise RateLimited(retry_after=status.reset)


async def add_rate_headers(request: web.Request, response: web.StreamResponse) -> None:
    """A signal for every response: what was counted is told, whatever became of the request after that."""
    status = request.get(RATE_STATUS)
    if status is not None:
        response.headers.update(rate_headers(status))


def rate_headers(status: RateStatus) -> dict[str, str]:
    """The policy (quota, window in seconds) and where the client stands (hits left, seconds until that may change)."""
    return {
        "RateLimit-Policy": f'"prepare";q={status.limit};w={status.window}',
        "RateLimit": f'"prepare";r={status.remaining};t={math.ceil(status.reset)}',
    }
