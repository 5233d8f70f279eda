"""An EventSource for tests, on a raw socket: it reads at the test's pace, stops, or drops the connection at any point.

It has a parser of its own, so that a mistake of the broker's encoder is not hidden by the same mistake here.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tests.scripted import NOTHING, PATIENCE, STREAM

OWN_ADDRESSES = sys.platform == "linux"  # elsewhere the loopback has one address

_addresses = (f"127.0.{n // 250 % 250 + 1}.{n % 250 + 1}" for n in itertools.count())


class Event(NamedTuple):
    """An event as a page gets it."""

    kind: str
    data: str
    id: str | None

    @property
    def json(self) -> Any:
        return json.loads(self.data)


class Broken(Exception):  # noqa: N818 - says what happened
    """The connection ended in the middle of an answer."""


class Connection:
    """One GET and its answer.

    Attributes:
        status, headers: of the answer; names in lower case.
        blocks: what was read so far, split at blank lines: events, comments, retries.
        last_id: what an EventSource would send when it reconnects.
        retry: milliseconds after which it would reconnect.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.blocks: list[bytes] = []
        self.last_id: str | None = None
        self.retry = 0
        self._reader = reader
        self._writer = writer
        self._buffer = b""

    async def start(self, method: str, target: str, headers: Mapping[str, str]) -> None:
        """Send the request and read the head of the answer."""
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        self._writer.write("\r\n".join((*lines, "", "")).encode())
        async with asyncio.timeout(PATIENCE):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        self.status = int(head[0].split(" ")[1])
        for line in filter(None, head[1:]):
            name, _, value = line.partition(":")
            self.headers[name.lower()] = value.strip()

    async def block(self) -> bytes | None:
        """Return the next block; None at the end of the answer.

        Raises:
            Broken: the connection ended before the answer did.
        """
        async with asyncio.timeout(PATIENCE):
            while b"\n\n" not in self._buffer:
                piece = await self._piece()
                if not piece:
                    assert not self._buffer, "half an event at the end"
                    return None
                self._buffer += piece
        block, _, self._buffer = self._buffer.partition(b"\n\n")
        self.blocks.append(block)
        return block

    async def event(self) -> Event | None:
        """Return the next event; None at the end of the answer."""
        while (block := await self.block()) is not None:
            fields: dict[str, list[str]] = {}
            for line in block.decode().split("\n"):
                name, _, value = line.partition(":")
                fields.setdefault(name, []).append(value.removeprefix(" "))
            if "retry" in fields:
                self.retry = int(fields["retry"][-1])
            if "data" in fields:
                event_id = fields["id"][-1] if "id" in fields else None
                self.last_id = event_id or self.last_id
                return Event(fields.get("event", ["message"])[-1], "\n".join(fields["data"]), event_id)
        return None

    async def take(self, count: int) -> list[Event]:
        """Return the next ``count`` events."""
        events = [await self.event() for _ in range(count)]
        assert None not in events, "the answer ended before"
        return [event for event in events if event is not None]

    async def rest(self) -> list[Event]:
        """Return all events up to the end of the answer."""
        events = []
        while (event := await self.event()) is not None:
            events.append(event)
        return events

    async def body(self) -> bytes:
        """Return the complete body."""
        body = b""
        async with asyncio.timeout(PATIENCE):
            while piece := await self._piece():
                body += piece
        return body

    def cut(self) -> None:
        """Drop the connection, as a page does that is closed."""
        self._writer.transport.abort()

    async def _piece(self) -> bytes:
        """Return the next piece of the body; empty at its end."""
        try:
            if "chunked" not in self.headers.get("transfer-encoding", ""):
                return await self._reader.read(int(self.headers.get("content-length", "65536")))
            size = int((await self._reader.readuntil(b"\r\n")).strip(), 16)
            piece = await self._reader.readexactly(size + 2)
            return piece[:-2]
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise Broken from error


@asynccontextmanager
async def opened(
    url: str,
    target: str,
    headers: Mapping[str, str] = NOTHING,
    *,
    method: str = "GET",
    receive_buffer: int | None = None,
    address: str | None = None,
) -> AsyncIterator[Connection]:
    """Ask for ``target`` as an EventSource does, and drop the connection at the end of the block.

    Args:
        url: the service.
        target: path and query.
        headers: in addition to those of an EventSource, or instead of them.
        method: of the request.
        receive_buffer: bytes that the system buffers for a reader that reads nothing.
        address: of this machine, to connect from; by default each connection has its own, as pages have.
    """
    parts = urlsplit(url)
    connection = socket.socket()
    connection.setblocking(False)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        if parts.hostname == "127.0.0.1" and (address or OWN_ADDRESSES):
            connection.bind((address or next(_addresses), 0))
        await asyncio.get_running_loop().sock_connect(connection, (parts.hostname, parts.port))
    except BaseException:
        connection.close()
        raise
    # A small limit, so that the reader takes only little from the system in advance.
    reader, writer = await asyncio.open_connection(sock=connection, limit=receive_buffer or 65536)
    line = Connection(reader, writer)
    try:
        await line.start(method, target, {"Host": parts.netloc, "Accept": STREAM, **headers})
        yield line
    finally:
        line.cut()
