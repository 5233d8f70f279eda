"""The rate limit of a client in HTTP: the refusal, and two headers on every answer to a counted request.

The headers are those of https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/ (revision 11), both of
them lists of structured fields (RFC 9651). The draft requires that `Retry-After` is not less than `t`; here they are
equal.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from aiohttp import web

from broker.core.errors import RateLimited
from broker.store.rates import RateStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broker.store.connection import Call
    from broker.store.rates import Rates

RATE_STATUS = web.RequestKey("rate_status", RateStatus)
"""The state of the client's rate, once the request was counted."""


class RateCheck:
    """Counts one prepare: with a call of its own, or together with others in one round trip.

    Args:
        request: stores the state of the rate.
        rates: counts for all clients.
        client: the client of the request.
    """

    def __init__(self, request: web.Request, rates: Rates, client: str) -> None:
        self._request = request
        self._rates = rates
        self._client = client

    def check(self) -> None:
        """Refuse a request whose client is known to have reached its limit.

        Raises:
            RateLimited: the client has reached its limit.
        """
        status = self._rates.standing_refusal(self._client)
        if status is not None:
            self._note(status)

    def call(self) -> Call:
        """Return the call that counts, for `Store.run`; its reply is for `note`."""
        return self._rates.hitting(self._client)

    def note(self, reply: Sequence[int]) -> None:
        """Handle the reply of `call`.

        Raises:
            RateLimited: the client has reached its limit.
        """
        self._note(self._rates.read(self._client, reply))

    async def alone(self) -> None:
        """Count with a call of its own.

        Raises:
            RateLimited: the client has reached its limit.
            StoreUnavailable: Redis cannot be reached.
        """
        self._note(await self._rates.hit(self._client))

    def _note(self, status: RateStatus) -> None:
        self._request[RATE_STATUS] = status
        if not status.allowed:
            raise RateLimited(retry_after=status.reset)


async def add_rate_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Add the rate headers to the response of a counted request, whatever its status. A signal of aiohttp."""
    status = request.get(RATE_STATUS)
    if status is not None:
        response.headers.update(rate_headers(status))


def rate_headers(status: RateStatus) -> dict[str, str]:
    """Return the policy (quota, seconds of its window) and the state (hits left, seconds until that may change)."""
    return {
        "RateLimit-Policy": f'"prepare";q={status.limit};w={status.window}',
        "RateLimit": f'"prepare";r={status.remaining};t={math.ceil(status.reset)}',
    }
