"""The web application: its routes and what surrounds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from broker.web.health import live, ready
from broker.web.middleware import add_headers, guard
from broker.web.models import get_models
from broker.web.not_served import routes_not_served
from broker.web.page import page_routes
from broker.web.prepare import prepare
from broker.web.rates import add_rate_headers
from broker.web.stream import cancel, stream
from broker.web.usage import get_usage

if TYPE_CHECKING:
    from broker.settings import Settings


def build_web(settings: Settings) -> web.Application:
    """The application without what its handlers need: the composition root fills in `web.keys`."""
    app = web.Application(middlewares=[guard], client_max_size=settings.max_body)
    app.on_response_prepare.append(add_headers)
    app.on_response_prepare.append(add_rate_headers)
    app.add_routes(
        [
            web.post("/prepare", prepare),
            # HEAD has a handler that claims nothing; aiohttp's default would run GET's.
            web.get("/stream/{session_id}", stream, allow_head=True),
            web.delete("/stream/{session_id}", cancel),
            web.post("/stream/{session_id}/cancel", cancel),
            web.get("/models", get_models),
            web.get("/usage", get_usage),
            web.get("/health/live", live),
            web.get("/health/ready", ready),
            *routes_not_served(),
        ]
    )
    if settings.page:
        app.add_routes(page_routes())
    return app
