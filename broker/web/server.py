"""The level below the application: connections, and answers to bytes that are not an HTTP request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from broker.core.errors import ExpectationFailed, MalformedRequest
from broker.web.errors import error_response
from broker.web.middleware import new_request_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.web_request import BaseRequest

log = structlog.get_logger(__name__)

KEEPALIVE = 75.0
"""Seconds that a connection may be open without a complete request."""

MAX_LINE = 32 * 1024
"""Bytes of a request line, and of a header. A browser sends the cookies of a host to all of its ports, and a
developer's localhost may have many."""


class Runner(web.AppRunner):
    """Serves an application.

    A handler whose client leaves is cancelled, which is not aiohttp's default. Bodies are not decompressed: we accept
    no compressed ones, and the library fails on a broken one even after it was refused.
    """

    def __init__(self, app: web.Application) -> None:
        super().__init__(
            app,
            handler_cancellation=True,
            auto_decompress=False,
            keepalive_timeout=KEEPALIVE,
            max_line_size=MAX_LINE,
            max_field_size=MAX_LINE,
            access_log=None,
            shutdown_timeout=1.0,
        )

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            _answering_expectations(made.request_handler),
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            **made._kwargs,  # noqa: SLF001 - the only way to choose the class of its connections
        )


def _answering_expectations(
    handler: Callable[[BaseRequest], Awaitable[web.StreamResponse]],
) -> Callable[[BaseRequest], Awaitable[web.StreamResponse]]:
    """Answer an unsupported `Expect` like any other error. Otherwise aiohttp refuses it before any middleware."""

    async def handle(request: BaseRequest) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPExpectationFailed:
            return error_response(ExpectationFailed())

    return handle


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    """One connection. Errors quote nothing of what could not be parsed: it may be anything, such as a key."""

    __slots__ = ()

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer bytes that could not be parsed in our form of errors, and close."""
        if not isinstance(exc, HttpProcessingError) or request.writer.output_size > 0:
            return super().handle_error(request, status, exc, message)
        too_long = isinstance(exc, LineTooLong)
        response = error_response(
            MalformedRequest(f"A line of the request is longer than {MAX_LINE} bytes." if too_long else "")
        )
        request_id = response.headers["X-Request-Id"] = new_request_id()
        response.headers[hdrs.VARY] = hdrs.ORIGIN
        response.force_close()
        log.info("request not understood", why=type(exc).__name__, request_id=request_id)
        return response
