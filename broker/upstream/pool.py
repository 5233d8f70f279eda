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


class Pool:
    """Connections to one service.

    Args:
        url: the address of the service; only its scheme, host and port are used.
        proxy: address of an HTTP proxy; its user and password are sent to it alone.
        max_connections: connections at the same time; further requests wait for one.
        connect_timeout: seconds for a connection, including the wait for a free one.
    """

    def __init__(self, url: str, *, proxy: str | None, max_connections: int, connect_timeout: float) -> None:
        self._url = urlsplit(url)
        self._proxy = urlsplit(proxy) if proxy else None
        self._timeout = connect_timeout
        self._free = asyncio.Semaphore(max_connections)
        self._idle: list[tuple[Connection, float]] = []
        self._taken: set[Connection] = set()
        self._ahead: deque[asyncio.Task[Connection]] = deque()
        self._sweep: asyncio.TimerHandle | None = None
        self._addresses: tuple[float, list[Any]] = (float("-inf"), [])
        self._tls: ssl.SSLContext | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False

    @property
    def host(self) -> str:
        """The value of the `Host` header: the host, and the port where it is not the usual one."""
        port = self._url.port
        name = self._url.hostname or ""
        name = f"[{name}]" if ":" in name else name
        return name if port in (None, _PORTS.get(self._url.scheme)) else f"{name}:{port}"

    @property
    def is_forwarded(self) -> bool:
        """True if requests are sent to a proxy that reads them: that of a service without TLS."""
        return self._proxy is not None and self._url.scheme == "http"

    @property
    def proxy_authorization(self) -> str | None:
        """The value of the `Proxy-Authorization` header; None without a user."""
        if self._proxy is None or not self._proxy.username:
            return None
        user, password = unquote(self._proxy.username), unquote(self._proxy.password or "")
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    def open_ahead(self) -> None:
        """Begin to open a connection for a request that is likely to follow at once, unless one is idle.

        If no request follows, the connection is kept as an idle one. A failure is raised to the request that follows.
        """
        if self._idle or len(self._ahead) >= MAX_AHEAD:
            return
        opening = asyncio.get_running_loop().create_task(self._open())
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
        if self._free.locked():
            try:
                async with asyncio.timeout(self._timeout):
                    await self._free.acquire()
            except TimeoutError:
                raise ConnectError("all connections are in use") from None
        else:
            await self._free.acquire()
        connection = self._pop_idle()
        if connection is None:
            try:
                connection = await (self._take_ahead() if self._ahead else self._open())
            except BaseException:
                self._free.release()
                raise
        self._taken.add(connection)
        return connection

    def give_back(self, connection: Connection) -> None:
        """Keep a connection for the next request, or close it where that is not possible. May be called twice."""
        if connection not in self._taken:
            return
        self._taken.discard(connection)
        self._free.release()
        self._keep(connection)

    def _keep(self, connection: Connection) -> None:
        """Keep a connection for the next request, or close it where that is not possible."""
        if connection.is_reusable and self._loop is not None and not self._is_closed:
            self._idle.append((connection, self._loop.time()))
            if self._sweep is None:
                self._sweep = self._loop.call_later(KEEPALIVE, self._close_old)
        else:
            connection.abort()

    def close(self) -> None:
        """Close all connections."""
        self._is_closed = True
        for opening in self._ahead:
            opening.cancel()
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in (*self._taken, *(idle for idle, _ in self._idle)):
            connection.abort()
        self._idle.clear()

    def _pop_idle(self) -> Connection | None:
        """Return the connection that was used last, which is the least likely to be closed by the other side."""
        if not self._idle or self._loop is None:
            return None
        connection, since = self._idle.pop()
        if connection.is_open and self._loop.time() - since < KEEPALIVE:
            return connection
        connection.abort()
        return self._pop_idle()

    def _close_old(self) -> None:
        if self._loop is None:
            return
        oldest = self._loop.time() - KEEPALIVE
        for connection, since in self._idle:
            if since <= oldest:
                connection.abort()
        self._idle = [(connection, since) for connection, since in self._idle if since > oldest]
        self._sweep = self._loop.call_later(KEEPALIVE, self._close_old) if self._idle else None

    # Opening

    async def _open(self) -> Connection:
        loop = self._loop = asyncio.get_running_loop()
        first = self._proxy or self._url
        try:
            async with asyncio.timeout(self._timeout):
                connection = Connection()
                if self._proxy is None or self.is_forwarded:
                    await loop.create_connection(
                        lambda: connection, sock=await self._connect(first), **self._tls_of(first)
                    )
                else:
                    await self._open_tunnel(loop, connection, self._proxy)
                return connection
        except (OSError, TimeoutError, ssl.SSLError, ConnectionBroken, UnicodeError) as error:
            raise ConnectError(type(error).__name__) from error

    async def _open_tunnel(
        self, loop: asyncio.AbstractEventLoop, connection: Connection, proxy: SplitResult
    ) -> None:
        """Ask the proxy for a connection to the service, and begin TLS in it."""
        target = f"{self._bracketed}:{self._url.port or _PORTS['https']}"
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if self.proxy_authorization is not None:
            lines.append(f"Proxy-Authorization: {self.proxy_authorization}")
        asking = _Tunnel("\r\n".join((*lines, "", "")).encode(), loop)
        transport, _ = await loop.create_connection(
            lambda: asking, sock=await self._connect(proxy), **self._tls_of(proxy)
        )
        async with _closed_after_failure(transport):
            await asking.opened
            transport.set_protocol(connection)
            tls = await loop.start_tls(
                transport, connection, self._context(), server_hostname=self._url.hostname
            )
            if tls is None:
                raise ConnectionBroken("the proxy has closed the connection")
            connection.connection_made(tls)

    @property
    def _bracketed(self) -> str:
        name = self._url.hostname or ""
        return f"[{name}]" if ":" in name else name

    async def _connect(self, url: SplitResult) -> socket.socket:
        found = await self._resolve(url)
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
        return {"ssl": self._context(), "server_hostname": url.hostname}

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = httpx2.create_ssl_context(trust_env=False)
        return self._tls


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

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        cast("asyncio.Transport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        """Read the head of the answer."""
        self._answer += data
        if self.opened.done():
            return
        if b"\r\n\r\n" in self._answer:
            status = self._answer.split(b" ", 2)[1:2]
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
async def _closed_after_failure(transport: asyncio.BaseTransport) -> AsyncIterator[None]:
    """Close a transport if the block fails or is cancelled."""
    try:
        yield
    except BaseException:
        cast("asyncio.Transport", transport).abort()
        raise
