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
    from collections.abc import Sequence

    from broker.store.connection import Call
    from broker.store.rates import Rates

RATE_STATUS = web.RequestKey("rate_status", RateStatus)
"""How the client of a request stands, once the request was counted."""


class RateCheck:
    """The counting of one prepare: alone, or in one round trip with what else it does.

    Args:
        request: is told how its client stands.
        rates: of all clients.
        client: whose prepare it is.
    """

    def __init__(self, request: web.Request, rates: Rates, client: str) -> None:
        self._request = request
        self._rates = rates
        self._client = client

    def check(self) -> None:
        """Refuse what is sure to be refused.

        Raises:
            RateLimited: the client has had its limit.
        """
        status = self._rates.standing_refusal(self._client)
        if status is not None:
            self._note(status)

    def call(self) -> Call:
        """Return what counts it, for `Store.run`; its reply is for `note`."""
        return self._rates.hitting(self._client)

    def note(self, reply: Sequence[int]) -> None:
        """Take the reply of `call`.

        Raises:
            RateLimited: the client has had its limit.
        """
        self._note(self._rates.read(self._client, reply))

    async def alone(self) -> None:
        """Count it by itself.

        Raises:
            RateLimited: the client has had its limit.
            StoreUnavailable: Redis cannot be reached.
        """
        self._note(await self._rates.hit(self._client))

    def _note(self, status: RateStatus) -> None:
        self._request[RATE_STATUS] = status
        if not status.allowed:
            raise RateLimited(retry_after=status.reset)


async def add_rate_headers(request: web.Request, response: web.StreamResponse) -> None:
    """A signal for every response: what was counted is told, whatever became of the request after that."""
    status = request.get(RATE_STATUS)
    if status is not None:
        response.headers.update(rate_headers(status))


def rate_headers(status: RateStatus) -> dict[str, str]:
    """Return the policy (quota, seconds of its window) and the state (hits left, seconds until that may change)."""
    return {
        "RateLimit-Policy": f'"prepare";q={status.limit};w={status.window}',
        "RateLimit": f'"prepare";r={status.remaining};t={math.ceil(status.reset)}',
    }
