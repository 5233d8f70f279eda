"""A proxy to Redis with which a test can delay, block and drop packets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from tests.kinds import needs_one_server
from tests.scripted import PATIENCE


class Wire:
    """A connection to Redis on which a packet can be delayed or lost.

    Attributes:
        url: its address.
        delay: seconds that every packet takes, in each direction.
        block: a packet to Redis with these bytes waits, with all later ones on its connection, until `unblock`.
        drop: a packet from Redis with these bytes is lost, with all later ones on its connection.
        blocked: set when a packet waits.
        sent: all packets that have reached Redis.
        received: all packets that Redis has sent.
        open: the number of connections that are open.
    """

    def __init__(self, socket: str) -> None:
        self.url = ""
        self.delay = 0.0
        self.block = self.drop = b""
        self.blocked = asyncio.Event()
        self.sent: list[bytes] = []
        self.received: list[bytes] = []
        self.open = 0
        self._socket = socket
        self._free = asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()

    def unblock(self) -> None:
        """Let all packets pass, those that wait too, until `block` is set again."""
        self.block = b""
        self._free.set()
        self._free = asyncio.Event()

    async def until_blocked(self) -> None:
        """Wait until a packet is blocked."""
        async with asyncio.timeout(PATIENCE):
            await self.blocked.wait()

    def count(self, session: str) -> int:
        """Return the number of packets about a session that have reached Redis."""
        return sum(session.encode() in packet for packet in self.sent)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection until it ends."""
        if (task := asyncio.current_task()) is not None:
            self._connections.add(task)
        far_reader, far_writer = await asyncio.open_unix_connection(self._socket)
        self.open += 1
        await asyncio.gather(self._up(reader, far_writer), self._down(far_reader, writer))
        self.open -= 1

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for data in _packets(reader, writer, self.delay):
            if self.block and self.block in data:
                self.blocked.set()
                await self._free.wait()
            self.sent.append(data)
            writer.write(data)

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lost = False
        async for data in _packets(reader, writer, self.delay):
            self.received.append(data)
            lost = lost or (bool(self.drop) and self.drop in data)
            if not lost:
                writer.write(data)

    async def close(self) -> None:
        """Wait for the ends of all connections."""
        self.unblock()
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*self._connections)


async def _packets(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float
) -> AsyncIterator[bytes]:
    """Yield the data of one direction, and close the other side at its end."""
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            await asyncio.sleep(delay)
            yield data
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


@asynccontextmanager
async def wire_to(valkey_url: str) -> AsyncIterator[Wire]:
    needs_one_server("a proxy of the test stands before it")
    wire = Wire(valkey_url.removeprefix("unix://"))
    server = await asyncio.start_server(wire.connected, "127.0.0.1", 0)
    wire.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    try:
        yield wire
    finally:
        server.close()
        await wire.close()
