"""An EventSource for tests, on a raw socket: it reads at the test's pace, stops, or drops the line where it likes.

It reads the format by itself, so that a mistake of ours cannot hide behind the same mistake.
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
    """The line ended in the middle of an answer."""


class Connection:
    """One GET and its answer.

    Attributes:
        status, headers: of the answer; names in lower case.
        blocks: what was read so far, between blank lines: events, comments, retries.
        last_id: what an EventSource would send when it comes back.
        retry: milliseconds after which it would come back.
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
        """The next thing between blank lines; None at the end of the answer.

        Raises:
            Broken: the connection ended and the answer did not.
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
        """The next event; None at the end of the answer."""
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
        """The next events, so many."""
        events = [await self.event() for _ in range(count)]
        assert None not in events, "the answer ended before"
        return [event for event in events if event is not None]

    async def rest(self) -> list[Event]:
        """All events up to the end of the answer."""
        events = []
        while (event := await self.event()) is not None:
            events.append(event)
        return events

    async def body(self) -> bytes:
        """The whole body, as it is."""
        body = b""
        async with asyncio.timeout(PATIENCE):
            while piece := await self._piece():
                body += piece
        return body

    def cut(self) -> None:
        """Drop the line as a page does that is closed."""
        self._writer.transport.abort()

    async def _piece(self) -> bytes:
        """The next piece of the body, empty at its end."""
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
    """Ask for ``target`` as an EventSource does, and drop the line when the block ends.

    Args:
        url: the service.
        target: path and query.
        headers: beside those that an EventSource sends, or instead of them.
        method: of the request.
        receive_buffer: bytes that the system takes for a reader who reads nothing.
        address: of this machine, to come from; otherwise each line has one of its own, as pages have.
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
    # A small limit: the reader takes little from the system that nobody has asked for.
    reader, writer = await asyncio.open_connection(sock=connection, limit=receive_buffer or 65536)
    line = Connection(reader, writer)
    try:
        await line.start(method, target, {"Host": parts.netloc, "Accept": STREAM, **headers})
        yield line
    finally:
        line.cut()
