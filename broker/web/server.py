"""The level below the application: connections, and answers to bytes that are not an HTTP request.

The library bounds the parts of a head, but neither the whole of it nor the time that it may take, and waits for ever
for a client that takes nothing of an answer. Both are bounded here.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import _ErrInfo

from broker.core.errors import BrokerError, ExpectationFailed, MalformedRequest, RequestTooSlow
from broker.web.errors import error_response
from broker.web.middleware import new_request_id
from broker.web.security_headers import add_security_headers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.streams import StreamReader
    from aiohttp.web_request import BaseRequest

    from broker.settings import Settings

log = structlog.get_logger(__name__)

KEEPALIVE = 75.0
"""Seconds that a connection may be open without a complete request."""

MAX_LINE = 32 * 1024
"""Bytes of a request line, and of a header. A browser sends the cookies of a host to all of its ports, and a
developer's localhost may have many."""

MAX_HEAD = 128 * 1024
"""Bytes of a head that arrives in more than one piece, which may be 64 KiB more when it is refused."""

HEAD_TIMEOUT = 10.0
"""Seconds from the first piece of a head to its end. Before the first byte, `KEEPALIVE` counts: browsers open
connections in advance."""

STALL_TIMEOUT = 30.0
"""Minimum seconds that a client may take nothing of an answer. A stream ends itself after `BROKER_SEND_TIMEOUT`."""


class Runner(web.AppRunner):
    """Serves an application.

    A handler whose client leaves is cancelled, which is not aiohttp's default. Bodies are not decompressed: we accept
    no compressed ones, and the library fails on a broken one even after it was refused.
    """

    def __init__(
        self,
        app: web.Application,
        *,
        head_timeout: float = HEAD_TIMEOUT,
        stall_timeout: float = STALL_TIMEOUT,
    ) -> None:
        self._timeouts = (head_timeout, stall_timeout)
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
            timeouts=self._timeouts,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            **made._kwargs,  # noqa: SLF001 - the only way to choose the class of its connections
        )


def runner_for(app: web.Application, settings: Settings) -> Runner:
    """Return a runner whose connections are not closed before `BROKER_SEND_TIMEOUT` is over."""
    return Runner(app, stall_timeout=max(STALL_TIMEOUT, settings.send_timeout))


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
    def __init__(self, *args: Any, timeouts: tuple[float, float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timeouts = timeouts

    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _HeadTooSlowError(HttpProcessingError):
    """The head of a request did not arrive in time."""


class _HeadTooLongError(HttpProcessingError):
    """The head of a request is too long as a whole."""


class _Connection(web.RequestHandler):
    """One connection. Errors quote nothing of what could not be parsed: it may be anything, such as a key."""

    __slots__ = ("_body", "_head_size", "_head_timeout", "_head_timer", "_refused", "stall_timeout")

    def __init__(self, server: _Server, **kwargs: Any) -> None:
        super().__init__(server, **kwargs)
        self._head_timeout, self.stall_timeout = server.timeouts
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_size = 0
        self._body: StreamReader = EMPTY_PAYLOAD
        self._refused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let the kernel close a connection whose client takes nothing, also while nobody here waits for it."""
        super().connection_made(transport)
        option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux only
        tcp = transport.get_extra_info("socket")
        if option is not None and tcp is not None and tcp.family in (socket.AF_INET, socket.AF_INET6):
            tcp.setsockopt(socket.IPPROTO_TCP, option, int(self.stall_timeout * 1000))

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop the timer of a head."""
        self._head_ended()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse a piece. One that belongs to no body, and completes no head, is the part of a head."""
        if self._refused:
            return
        in_body, requests = not self._body.is_eof(), self._request_count
        super().data_received(data)
        if self._request_count != requests:
            self._body = self._messages[-1][1]
            self._head_ended()
        elif data and not in_body and not self._close:
            self._head_grew(len(data))

    def _head_grew(self, size: int) -> None:
        if self._head_timer is None:
            self._head_timer = self._loop.call_later(self._head_timeout, self._refuse, _HeadTooSlowError())
        self._head_size += size
        if self._head_size > MAX_HEAD:
            self._refuse(_HeadTooLongError())

    def _head_ended(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self._head_size = 0

    def _refuse(self, error: HttpProcessingError) -> None:
        """Answer the unfinished head with an error, after the requests before it, and read nothing more."""
        self._head_ended()
        self._refused = True
        self._messages.append((_ErrInfo(400, error, ""), EMPTY_PAYLOAD))
        self._request_count += 1
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

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
        response = error_response(self._error(exc))
        request_id = response.headers["X-Request-Id"] = new_request_id()
        add_security_headers(response.headers)
        response.force_close()
        log.info("request not understood", why=type(exc).__name__, request_id=request_id)
        return response

    def _error(self, error: HttpProcessingError) -> BrokerError:
        match error:
            case LineTooLong():
                return MalformedRequest(f"A line of the request is longer than {MAX_LINE} bytes.")
            case _HeadTooLongError():
                return MalformedRequest(f"The head of the request is longer than {MAX_HEAD} bytes.")
            case _HeadTooSlowError():
                return RequestTooSlow(f"The head of the request took longer than {self._head_timeout:g} s.")
        return MalformedRequest()
