"""GET /usage: what the caller has used today and in this month, and what is left of its limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from broker.core.pricing import to_usd
from broker.web.errors import json_response
from broker.web.keys import ACCOUNTS, LIMITS, RESOLVER

if TYPE_CHECKING:
    from aiohttp import web

    from broker.core.accounts import Quotas
    from broker.store.accounts import Period, Totals


async def get_usage(request: web.Request) -> web.Response:
    """Answer with the caller's own day and month (UTC)."""
    client = await request.app[RESOLVER].identify(request)
    period = await request.app[ACCOUNTS].totals(client.name)
    return json_response(usage_to_json(period, request.app[LIMITS].of(client.limits).quotas))


def usage_to_json(period: Period, quotas: Quotas) -> dict[str, Any]:
    """Return a day and its month as JSON, in tokens and USD.

    A limit that is not set is null, and so is what is left of it.
    """
    day, month = period.day, period.month
    return {
        "day": period.today.isoformat(),
        **_totals(day),
        "limits": {
            "tokens": _limit(quotas.daily_tokens, day.prompt + day.completion),
            "cost": _money_limit(quotas.daily_cost, day.cost),
        },
        "month": {
            "month": f"{period.today:%Y-%m}",
            **_totals(month),
            "limits": {"cost": _money_limit(quotas.monthly_cost, month.cost)},
        },
    }


def _totals(totals: Totals) -> dict[str, Any]:
    return {
        "requests": totals.requests,
        "promptTokens": totals.prompt,
        "completionTokens": totals.completion,
        "totalTokens": totals.prompt + totals.completion,
        "cost": to_usd(totals.cost),
        "estimatedRequests": totals.estimated,
    }


def _limit(limit: int, used: int) -> dict[str, int | None]:
    if not limit:
        return {"limit": None, "left": None}
    return {"limit": limit, "left": max(0, limit - used)}


def _money_limit(limit: int, used: int) -> dict[str, float | None]:
    found = _limit(limit, used)
    return {name: None if nano is None else to_usd(nano) for name, nano in found.items()}
