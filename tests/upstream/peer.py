"""The other end of one connection to the upstream: a test decides every byte, and where a read ends."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from broker.upstream.connection import Connection
from tests.scripted import PATIENCE


class Watched(Connection):
    """A connection that tells how much it has read, and when it was closed."""

    def __init__(self) -> None:
        self.read = 0
        self.closed = asyncio.Event()
        self._changed = asyncio.Event()
        super().__init__()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.read += len(data)
        self._changed.set()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.closed.set()
        self._changed.set()

    async def until_read(self, size: int) -> None:
        """Wait until so many bytes have been read, or the connection is closed."""
        async with asyncio.timeout(PATIENCE):
            while self.read < size and not self.closed.is_set():
                self._changed.clear()
                await self._changed.wait()


class Peer:
    """What the upstream does on one connection.

    Attributes:
        connection: the connection under test.
        said: bytes sent so far.
    """

    def __init__(self, connection: Watched, sock: socket.socket) -> None:
        self.connection = connection
        self.said = 0
        self._socket = sock
        self._loop = asyncio.get_running_loop()

    async def say(self, *pieces: bytes) -> None:
        """Send pieces, each of which is read before the next one is sent."""
        for piece in pieces:
            await self.pour(piece)
            await self.connection.until_read(self.said)

    async def pour(self, data: bytes) -> None:
        """Send bytes and do not wait until they are read."""
        async with asyncio.timeout(PATIENCE):
            await self._loop.sock_sendall(self._socket, data)
        self.said += len(data)

    async def heard(self, size: int = 65536) -> bytes:
        """Return what comes next from the connection; nothing at its end."""
        async with asyncio.timeout(PATIENCE):
            try:
                return await self._loop.sock_recv(self._socket, size)
            except ConnectionResetError:
                return b""

    async def shut(self) -> None:
        """Send nothing more, and wait until the connection is closed for that."""
        self._socket.shutdown(socket.SHUT_WR)
        await self.until_closed()

    async def reset(self) -> None:
        """Break the connection, and wait until that was seen."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()
        await self.until_closed()

    async def until_closed(self) -> None:
        """Wait until the connection is closed."""
        async with asyncio.timeout(PATIENCE):
            await self.connection.closed.wait()

    def close(self) -> None:
        self._socket.close()


@asynccontextmanager
async def connected() -> AsyncIterator[Peer]:
    """Open a connection over TCP for the block."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname())
        far, _ = listening.accept()
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.setblocking(False)
    connection = Watched()
    await asyncio.get_running_loop().create_connection(lambda: connection, sock=near)
    peer = Peer(connection, far)
    try:
        yield peer
    finally:
        connection.abort()
        await peer.until_closed()
        peer.close()
