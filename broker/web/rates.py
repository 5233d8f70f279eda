"""The rate limit of a client in HTTP: two headers on every answer to a counted request.

The headers are those of https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/ (revision 11), both of
them lists of structured fields (RFC 9651). The draft requires that `Retry-After` is not less than `t`; here they are
equal.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.core.rates import RateStatus


def rate_headers(status: RateStatus | None) -> dict[str, str]:
    """Return the policy (quota, window in seconds) and the state of the client (hits left, seconds until a change).

    Without a status there are none.
    """
    if status is None:
        return {}
    return {
        "RateLimit-Policy": f'"prepare";q={status.limit};w={status.window}',
        "RateLimit": f'"prepare";r={status.remaining};t={math.ceil(status.reset)}',
    }
