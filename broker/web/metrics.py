"""GET /metrics, for callers that have the token; without a token, for this machine only."""

from __future__ import annotations

import ipaddress

from aiohttp import hdrs, web
from prometheus_client import CONTENT_TYPE_LATEST

from broker.core.errors import Unauthorized
from broker.core.identity import bearer
from broker.core.origins import names_this_machine
from broker.web.keys import METRICS, METRICS_TOKEN

_OF_PROXIES = (hdrs.FORWARDED, hdrs.X_FORWARDED_FOR, "X-Real-IP", hdrs.VIA)


async def get_metrics(request: web.Request) -> web.Response:
    """Answer with all metrics as text.

    Raises:
        Unauthorized: a token is set, and the request has another one, or none.
        HTTPNotFound: no token is set, and the request may come from another machine.
    """
    token = request.app[METRICS_TOKEN]
    if token.is_set:
        if not token.is_shown(bearer(request.headers.getall(hdrs.AUTHORIZATION, ()))):
            raise Unauthorized
    elif not _is_from_this_machine(request):
        raise web.HTTPNotFound
    headers = {hdrs.CONTENT_TYPE: CONTENT_TYPE_LATEST, hdrs.CACHE_CONTROL: "no-store"}
    return web.Response(body=await request.app[METRICS].text_of_host(), headers=headers)


def _is_from_this_machine(request: web.Request) -> bool:
    """Return True if the request came directly from a program of this machine: a proxy here speaks for others."""
    if any(name in request.headers for name in _OF_PROXIES):
        return False
    try:
        peer = ipaddress.ip_address(request.remote or "")
    except ValueError:  # a unix socket, or no connection any more
        return False
    mapped = peer.ipv4_mapped if isinstance(peer, ipaddress.IPv6Address) else None
    return (mapped or peer).is_loopback and names_this_machine(request.headers.get(hdrs.HOST))
