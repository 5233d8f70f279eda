"""GET /usage: what the caller has used today, and what is left of its limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.core.pricing import to_usd
from broker.web.errors import json_response
from broker.web.keys import ACCOUNTS, IDENTIFIER, QUOTAS

if TYPE_CHECKING:
    from aiohttp import web

    from broker.core.accounts import Quotas
    from broker.store.accounts import Day


async def get_usage(request: web.Request) -> web.Response:
    """Answer with the caller's own day (UTC)."""
    client = await request.app[IDENTIFIER].identify(request)
    day = await request.app[ACCOUNTS].day(client.name)
    return json_response(day_to_json(day, request.app[QUOTAS]))


def day_to_json(day: Day, quotas: Quotas) -> dict[str, Any]:
    """Return a day as JSON, in tokens and USD. A limit that is not set is null, and so is what is left of it."""
    tokens = day.prompt + day.completion
    return {
        "day": day.day.isoformat(),
        "requests": day.requests,
        "promptTokens": day.prompt,
        "completionTokens": day.completion,
        "totalTokens": tokens,
        "cost": to_usd(day.cost),
        "estimatedRequests": day.estimated,
        "limits": {
            "tokens": _limit(quotas.daily_tokens, tokens),
            "cost": {
                name: None if nano is None else to_usd(nano)
                for name, nano in _limit(quotas.daily_cost, day.cost).items()
            },
        },
    }


def _limit(limit: int, used: int) -> dict[str, int | None]:
    if not limit:
        return {"limit": None, "left": None}
    return {"limit": limit, "left": max(0, limit - used)}
