"""Addresses of other APIs that people try here. The 404 says what to use in their place."""

from __future__ import annotations

from functools import partial
from typing import NoReturn

from aiohttp import hdrs, web

from broker.core.errors import NotFound

PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/models", "/chat/completions", "/chat")


def routes_not_served() -> list[web.RouteDef]:
    """Return one route for each of these addresses, for all methods."""
    return [web.route(hdrs.METH_ANY, path, partial(_refuse, path)) for path in PATHS]


async def _refuse(path: str, request: web.Request) -> NoReturn:
    prefix = request.path.removesuffix(path)  # the application's part of the path
    raise NotFound(
        f"This is not served here: use POST {prefix}/prepare with GET {prefix}/stream/<id> for an answer,"
        f" and GET {prefix}/models for the models."
    )
