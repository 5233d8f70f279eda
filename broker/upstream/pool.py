"""The connections to the upstream: opened directly or by a proxy, kept for the next request, and limited in number.

TLS certificates are verified against the authorities of the system, as the SDK does it. Every failure to open a
connection is a `ConnectError`: nothing was sent, so the request may be sent again.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import socket
import ssl
from collections import deque
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import SplitResult, unquote, urlsplit

import aiohappyeyeballs
import httpx2

from broker.upstream.connection import Connection, ConnectionBroken

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

KEEPALIVE = 4.0
"""Seconds that an idle connection is kept. Servers close theirs at some time, many after 5 s. A request that is sent at
that moment is lost, because it must not be sent twice."""

ADDRESSES_FOR = 10.0
"""Seconds that the addresses of the upstream's name are used again."""

NEXT_ADDRESS = 0.25
"""Seconds after which the next address is tried beside the one before, as RFC 8305 advises."""

MAX_PROXY_HEAD = 16 * 1024
"""Bytes of a proxy's answer to CONNECT."""

MAX_AHEAD = 64
"""Connections that are opened ahead at the same time."""

_PORTS = {"http": 80, "https": 443}


class ConnectError(Exception):
    """No connection could be opened in time. Nothing was sent."""


def tls_context(url: str, proxy: str | None) -> ssl.SSLContext:
    """Return how certificates of this service and of its proxy are verified.

    Reading the authorities of the system takes a tenth of a second. Where neither speaks TLS none are read, and no
    certificate would be accepted.
    """
    if "https" in (urlsplit(url).scheme, urlsplit(proxy or "").scheme):
        return httpx2.create_ssl_context(trust_env=False)
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Pool:
    """Connections to one service.

    Args:
        url: the address of the service; only its scheme, host and port are used.
        proxy: address of an HTTP proxy; its user and password are sent to it alone.
        max_connections: connections at the same time; further requests wait for one.
        connect_timeout: seconds for a connection, including the wait for a free one.
        tls: how certificates are verified; by default with the authorities of the system.
    """

    def __init__(
        self,
        url: str,
        *,
        proxy: str | None,
        max_connections: int,
        connect_timeout: float,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        # The library writes the name of a host as DNS and HTTP have it: in ASCII and in lower case.
        self._service = httpx2.URL(url)
        self._url = urlsplit(str(self._service))
        self._proxy = urlsplit(proxy) if proxy else None
        self._timeout = connect_timeout
        self._max = max_connections
        self._free = asyncio.Semaphore(max_connections)
        self._in_use = 0  # taken, or being opened to be taken
        self._idle: list[tuple[Connection, float]] = []
        self._taken: set[Connection] = set()
        self._ahead: deque[asyncio.Task[Connection]] = deque()
        self._sweep: asyncio.TimerHandle | None = None
        self._addresses: tuple[float, list[Any]] = (float("-inf"), [])
        self._tls = tls or tls_context(url, proxy)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False

    @property
    def host(self) -> str:
        """The value of the `Host` header: the host, and the port where it is not the usual one."""
        return self._service.netloc.decode()

    @property
    def is_forwarded(self) -> bool:
        """True if requests are sent to a proxy that reads them: that of a service without TLS."""
        return self._proxy is not None and self._url.scheme == "http"

    @property
    def proxy_authorization(self) -> str | None:
        """The value of the `Proxy-Authorization` header; None without a user."""
        credentials = _credentials(self._proxy) if self._proxy is not None else ""
        return f"Basic {credentials}" if credentials else None

    def open_ahead(self) -> None:
        """Begin to open a connection for a request that is likely to follow at once, unless one is idle.

        If no request follows, the connection is kept as an idle one. A failure is raised to the request that follows.
        """
        room = min(MAX_AHEAD, self._max - self._in_use)
        if self._idle or self._is_closed or self._free.locked() or len(self._ahead) >= room:
            return
        loop = self._loop = asyncio.get_running_loop()
        opening = loop.create_task(self._open(loop.time() + self._timeout))
        self._ahead.append(opening)
        opening.add_done_callback(self._opened_ahead)

    def _opened_ahead(self, opening: asyncio.Task[Connection]) -> None:
        """Keep a connection that was opened ahead and that nobody waits for."""
        failed = opening.cancelled() or opening.exception() is not None
        if opening in self._ahead:
            self._ahead.remove(opening)
            if not failed:
                self._keep(opening.result())

    async def _take_ahead(self) -> Connection:
        """Wait for the connection whose opening began first."""
        opening = self._ahead.popleft()
        try:
            return await opening
        except asyncio.CancelledError:
            # It may have been opened in the same moment.
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                self._keep(opening.result())
            raise

    async def take(self) -> Connection:
        """Return a connection for one request. It must be given to `give_back`.

        Raises:
            ConnectError: none could be opened in time.
        """
        loop = self._loop = asyncio.get_running_loop()
        until = loop.time() + self._timeout
        if self._free.locked():
            try:
                async with asyncio.timeout_at(until):
                    await self._free.acquire()
            except TimeoutError:
                raise ConnectError("all connections are in use") from None
        else:
            # This does not wait. A limit of time would be half the cost of taking a connection.
            await self._free.acquire()
        self._in_use += 1
        try:
            self._check_open()
            connection = self._pop_idle() or await (self._take_ahead() if self._ahead else self._open(until))
        except BaseException:
            self._release()
            raise
        if self._is_closed:  # it was closed while this task was about to go on
            connection.abort()
        if not connection.is_open:  # nothing has been sent yet, so this is no broken answer
            self._release()
            raise ConnectError("the connection was closed at once")
        self._taken.add(connection)
        return connection

    def give_back(self, connection: Connection) -> None:
        """Keep a connection for the next request, or close it where that is not possible. May be called twice."""
        if connection not in self._taken:
            return
        self._taken.discard(connection)
        self._release()
        self._keep(connection)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConnectError("closed")

    def _release(self) -> None:
        self._in_use -= 1
        self._free.release()

    def _keep(self, connection: Connection) -> None:
        """Keep a connection for the next request, or close it where that is not possible."""
        if connection.is_reusable and self._loop is not None and not self._is_closed:
            self._idle.append((connection, self._loop.time()))
            if self._sweep is None:
                self._sweep = self._loop.call_later(KEEPALIVE, self._close_old)
        else:
            connection.abort()

    async def close(self) -> None:
        """Close all connections, and open no more."""
        self._is_closed = True
        ahead = tuple(self._ahead)
        for opening in ahead:
            opening.cancel()
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in (*self._taken, *(idle for idle, _ in self._idle)):
            connection.abort()
        self._idle.clear()
        await asyncio.gather(*ahead, return_exceptions=True)

    def _pop_idle(self) -> Connection | None:
        """Return the connection that was used last, which is the least likely to be closed by the other side."""
        while self._idle and self._loop is not None:
            connection, since = self._idle.pop()
            if connection.is_open and self._loop.time() - since < KEEPALIVE:
                return connection
            connection.abort()
        return None

    def _close_old(self) -> None:
        """Close the connections that are idle for `KEEPALIVE`, and come again when the next one will be."""
        self._sweep = None
        if self._loop is None:
            return
        now = self._loop.time()
        fresh = []
        for connection, since in self._idle:
            if connection.is_open and now - since < KEEPALIVE:
                fresh.append((connection, since))
            else:
                connection.abort()
        self._idle = fresh
        if fresh:  # the first one is the oldest
            self._sweep = self._loop.call_at(fresh[0][1] + KEEPALIVE, self._close_old)

    # Opening

    async def _open(self, until: float) -> Connection:
        loop = asyncio.get_running_loop()
        first = self._proxy or self._url
        connection = Connection()
        try:
            async with asyncio.timeout_at(until), _aborted_after_failure(connection):
                if self._proxy is None or self.is_forwarded:
                    await loop.create_connection(
                        lambda: connection, sock=await self._connect(first), **self._tls_of(first)
                    )
                else:
                    await self._open_tunnel(loop, connection, self._proxy)
        # uvloop raises a `RuntimeError` where asyncio has an `OSError`.
        except (OSError, ConnectionBroken, UnicodeError, RuntimeError) as error:
            raise ConnectError(type(error).__name__) from error
        return connection

    async def _open_tunnel(
        self, loop: asyncio.AbstractEventLoop, connection: Connection, proxy: SplitResult
    ) -> None:
        """Ask the proxy for a connection to the service, and begin TLS in it."""
        target = self.host if self._url.port else f"{self.host}:{_PORTS['https']}"
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if self.proxy_authorization is not None:
            lines.append(f"Proxy-Authorization: {self.proxy_authorization}")
        asking = _Tunnel("\r\n".join((*lines, "", "")).encode(), loop)
        async with _aborted_after_failure(asking):
            transport, _ = await loop.create_connection(
                lambda: asking, sock=await self._connect(proxy), **self._tls_of(proxy)
            )
            await asking.opened
            transport.set_protocol(connection)
            options = self._tls_of(self._url)
            tls = await loop.start_tls(transport, connection, options.pop("ssl"), **options)
            if tls is None:
                raise ConnectionBroken("the proxy has closed the connection")
            connection.connection_made(tls)

    async def _connect(self, url: SplitResult) -> socket.socket:
        found = await self._resolve(url)
        try:
            return await _connect_to(found)
        except BaseException:
            self._addresses = (float("-inf"), [])  # the service may have moved
            raise

    async def _resolve(self, url: SplitResult) -> list[Any]:
        """Return the addresses of a host. Those of a name are kept for a short time."""
        host, port = url.hostname or "", url.port or _PORTS.get(url.scheme, 80)
        with suppress(ValueError):
            address = ipaddress.ip_address(host)
            family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
            return [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port))]
        loop = asyncio.get_running_loop()
        at, known = self._addresses
        if not known or loop.time() - at > ADDRESSES_FOR:
            known = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            self._addresses = (loop.time(), known)
        return known

    def _tls_of(self, url: SplitResult) -> dict[str, Any]:
        if url.scheme != "https":
            return {}
        return {"ssl": self._tls, "server_hostname": url.hostname}


def secrets_of_proxy(url: str) -> tuple[str, ...]:
    """Return what no message may contain of a proxy's address: the password in each form in which it is written."""
    proxy = urlsplit(url)
    if not proxy.password:
        return ()
    return tuple(filter(None, (_credentials(proxy), proxy.password, unquote(proxy.password))))


def _credentials(proxy: SplitResult) -> str:
    """Return user and password as `Proxy-Authorization` has them; empty without a user."""
    if not proxy.username:
        return ""
    user, password = unquote(proxy.username), unquote(proxy.password or "")
    return base64.b64encode(f"{user}:{password}".encode()).decode()


async def _connect_to(found: list[Any]) -> socket.socket:
    """Return a connection to one of these addresses."""
    if len(found) > 1:
        return await aiohappyeyeballs.start_connection(found, happy_eyeballs_delay=NEXT_ADDRESS)
    family, kind, protocol, _, address = found[0]  # a race of one costs half a millisecond (measured)
    connected = socket.socket(family, kind, protocol)
    try:
        connected.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connected, address)
    except BaseException:
        connected.close()
        raise
    return connected


class _Tunnel(asyncio.Protocol):
    """Asks a proxy for a tunnel, and waits for its answer. Nothing but that answer comes before we send more.

    Attributes:
        opened: done when the proxy has agreed.
    """

    def __init__(self, request: bytes, loop: asyncio.AbstractEventLoop) -> None:
        self.opened: asyncio.Future[None] = loop.create_future()
        self.opened.add_done_callback(
            lambda done: done.cancelled() or done.exception()
        )  # nobody may wait any more
        self._request = request
        self._answer = b""
        self._transport: asyncio.Transport | None = None

    def abort(self) -> None:
        """Close the connection to the proxy at once, with all that is in it."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Read the head of the answer."""
        if self.opened.done():
            return
        self._answer += data
        if b"\r\n\r\n" in self._answer:
            status = self._answer.split(maxsplit=2)[1:2]
            if status and len(status[0]) == 3 and status[0].startswith(b"2"):
                self.opened.set_result(None)
            else:
                self.opened.set_exception(ConnectionBroken("the proxy refuses"))
        elif len(self._answer) > MAX_PROXY_HEAD:
            self.opened.set_exception(ConnectionBroken("the answer of the proxy is too large"))

    def connection_lost(self, _: Exception | None) -> None:
        """Note that the proxy has closed the connection."""
        if not self.opened.done():
            self.opened.set_exception(ConnectionBroken("the proxy has closed the connection"))


@asynccontextmanager
async def _aborted_after_failure(opening: Connection | _Tunnel) -> AsyncIterator[None]:
    """Close a connection at once if the block fails or is cancelled.

    The event loop closes it too, but over TLS it waits for the other side first.
    """
    try:
        yield
    except BaseException:
        opening.abort()
        raise
