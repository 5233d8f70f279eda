"""The web application: its routes, middleware and signals."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from broker.web.health import live, ready
from broker.web.metrics import get_metrics
from broker.web.middleware import add_headers, guard
from broker.web.models import get_models
from broker.web.not_served import routes_not_served
from broker.web.openapi import OpenApi
from broker.web.page import client_routes, page_routes, to_page
from broker.web.prepare import prepare
from broker.web.stream import cancel, stream
from broker.web.usage import get_usage

if TYPE_CHECKING:
    from broker.settings import Settings


def add_web(app: web.Application, settings: Settings, *, prefix: str = "") -> None:
    """Add routes and middleware to an application. The composition root adds what handlers need, under `web.keys`.

    Args:
        app: the application of the broker alone.
        settings: the settings of this broker.
        prefix: the prefix under which that application will be found.
    """
    app.middlewares.append(guard)
    # It is stored here which application adds the headers: a middleware around us may prepare the response itself.
    app.on_response_prepare.append(partial(add_headers, app))
    app.add_routes(
        [
            web.post("/prepare", prepare),
            # HEAD has a handler that claims nothing; aiohttp would run that of GET
            web.get("/stream/{session_id}", stream, allow_head=True),
            web.delete("/stream/{session_id}", cancel),
            web.post("/stream/{session_id}/cancel", cancel),
            web.get("/models", get_models),
            web.get("/usage", get_usage),
            web.get("/metrics", get_metrics),
            web.get("/health/live", live),
            web.get("/health/ready", ready),
            web.get("/openapi.json", OpenApi(prefix, page=settings.page).answer),
            *client_routes(),
            *routes_not_served(),
        ]
    )
    if settings.page:
        app.add_routes(page_routes())
        if prefix:
            app.add_routes([web.get("", to_page)])
