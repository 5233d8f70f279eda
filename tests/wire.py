"""A line to Redis that a test can slow down, hold up and lose packets on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from tests.scripted import PATIENCE


class Wire:
    """A line to Redis on which a packet can be late, or lost.

    Attributes:
        url: where it begins.
        delay: seconds that every packet takes, either way.
        hold: the packet to Redis with these words waits, and all behind it on its connection, until `let_go`.
        drop: packets from Redis with these words never come.
        held: one waits.
        sent: all that has reached Redis.
    """

    def __init__(self, socket: str) -> None:
        self.url = ""
        self.delay = 0.0
        self.hold = self.drop = b""
        self.held = asyncio.Event()
        self.sent: list[bytes] = []
        self._socket = socket
        self._free = asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()

    def let_go(self) -> None:
        """Hold nothing back any more."""
        self.hold = b""
        self._free.set()

    async def caught(self) -> None:
        """Wait until a packet is held back."""
        async with asyncio.timeout(PATIENCE):
            await self.held.wait()

    def told(self, session: str) -> int:
        """How many packets that have reached Redis were about a session."""
        return sum(session.encode() in packet for packet in self.sent)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection to its end."""
        if (task := asyncio.current_task()) is not None:
            self._connections.add(task)
        far_reader, far_writer = await asyncio.open_unix_connection(self._socket)
        await asyncio.gather(self._up(reader, far_writer), self._down(far_reader, writer))

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for data in _packets(reader, writer, self.delay):
            if self.hold and self.hold in data:
                self.held.set()
                await self._free.wait()
            self.sent.append(data)
            writer.write(data)

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async for data in _packets(reader, writer, self.delay):
            if not self.drop or self.drop not in data:
                writer.write(data)

    async def close(self) -> None:
        """Wait for the connections, whose ends have gone."""
        self.let_go()
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*self._connections)


async def _packets(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float
) -> AsyncIterator[bytes]:
    """What comes on one side; the other is closed behind it."""
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            await asyncio.sleep(delay)
            yield data
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


@asynccontextmanager
async def wire_to(valkey_url: str) -> AsyncIterator[Wire]:
    wire = Wire(valkey_url.removeprefix("unix://"))
    server = await asyncio.start_server(wire.connected, "127.0.0.1", 0)
    wire.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
    try:
        yield wire
    finally:
        server.close()
        await wire.close()
