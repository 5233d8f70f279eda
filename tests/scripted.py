"""A chat service for tests, written by hand on sockets: a test decides every byte of an answer, and when it is sent.

It also records what the client did: its requests, their number, and whether it has left.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

PATIENCE = 20.0
"""Seconds after which a test that waits for an event has failed."""

STREAM = "text/event-stream"
NOTHING: Mapping[str, str] = {}


def chunk(text: str = "", *, finish: str | None = None, **fields: Any) -> dict[str, Any]:
    """Return a chunk in OpenRouter's form."""
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {
        "id": "gen-chunk",
        "provider": "Scripted",
        "model": "scripted/model-1",
        "object": "chat.completion.chunk",
        "choices": [choice | {"native_finish_reason": finish and f"native_{finish}"}],
        **fields,
    }


def usage_chunk(**usage: Any) -> dict[str, Any]:
    """Return the last chunk: usage, and no choice."""
    return chunk(choices=[], usage={"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, **usage})


class Call:
    """One request, with methods to answer it. Writing never waits.

    Attributes:
        headers: by lower-case name.
        body: the parsed JSON.
        gone: set when the client has closed the connection, or it is broken.
        gone_at: the time of that, by the loop's clock.
    """

    def __init__(self, transport: asyncio.Transport, path: str, headers: dict[str, str], body: bytes) -> None:
        self.path = path
        self.headers = headers
        self.body: Any = json.loads(body) if body else None
        self.gone = asyncio.Event()
        self.gone_at = 0.0
        self._transport = transport
        self._chunked = False

    def write(self, data: bytes) -> None:
        """Send these bytes unchanged. A client that has left gets none."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def head(self, status: int = 200, headers: Mapping[str, str] = NOTHING) -> None:
        """Send a status and headers, and nothing else."""
        lines = [f"HTTP/1.1 {status} Scripted", *(f"{name}: {value}" for name, value in headers.items())]
        self.write("\r\n".join((*lines, "", "")).encode())

    def open(self, kind: str = STREAM, **headers: str) -> Call:
        """Begin an answer of status 200 that `end` will end; ``x_a`` stands for the header ``x-a``."""
        self._chunked = True
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.head(200, {"Content-Type": kind, "Transfer-Encoding": "chunked", **named})
        return self

    def send(self, data: bytes) -> None:
        """Send a piece of the body."""
        if data:  # an empty piece would be the end
            self.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def comment(self) -> None:
        """Send the comment that OpenRouter sends while a model thinks."""
        self.send(b": OPENROUTER PROCESSING\n\n")

    def event(self, data: bytes) -> None:
        """Send an event with one line of data."""
        self.send(b"data: %b\n\n" % data)

    def chunk(self, text: str = "", **fields: Any) -> None:
        """Send a chunk."""
        self.event(json.dumps(chunk(text, **fields)).encode())

    def usage(self, **usage: Any) -> None:
        """Send the chunk with the usage."""
        self.event(json.dumps(usage_chunk(**usage)).encode())

    def done(self) -> None:
        """Send the last event and end the body."""
        self.event(b"[DONE]")
        self.end()

    def end(self) -> None:
        """End the body as HTTP does; the connection stays open."""
        self.write(b"0\r\n\r\n")

    def reply(self, status: int, body: object, headers: Mapping[str, str] = NOTHING) -> None:
        """Send a complete answer: JSON of an object, or a text."""
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        kind = "text/html" if isinstance(body, str) else "application/json"
        self.head(status, {"Content-Type": kind, "Content-Length": str(len(data)), **headers})
        self.write(data)

    def close(self) -> None:
        """Close the connection once all is sent."""
        self._transport.close()

    def reset(self) -> None:
        """Break the connection: the other side sees a reset."""
        connection: socket.socket = self._transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    async def wait_gone(self) -> None:
        """Wait until the client has closed the connection."""
        async with asyncio.timeout(PATIENCE):
            await self.gone.wait()

    def lost(self) -> None:
        """Note that the connection is over."""
        if not self.gone.is_set():
            self.gone_at = asyncio.get_running_loop().time()
            self.gone.set()


Reply = Callable[[Call], None]


class ScriptedUpstream:
    """The chat service.

    Attributes:
        replies: answer the first call, the second, ...; the last one answers all further calls. Without replies, only
            the test answers.
        calls: all chat requests so far.
        models: the body of GET /models; None is a 404.
        generations: the records of GET /generation by id; None is "not yet". Without any, the path is unknown.
        looks: the ids that were asked for there.
        connections: the number of connections so far.
    """

    def __init__(self) -> None:
        self.url = ""
        self.replies: list[Reply] = []
        self.calls: list[Call] = []
        self.models: bytes | None = None
        self.generations: dict[str, dict[str, Any] | None] = {}
        self.looks: list[str] = []
        self.connections = 0
        self._open: set[asyncio.Transport] = set()
        self._news = asyncio.Condition()

    async def call(self, number: int = 1) -> Call:
        """Wait for the first, second, ... call."""
        await self._until(lambda: len(self.calls) >= number)
        return self.calls[number - 1]

    async def connected(self, number: int = 1) -> None:
        """Wait for the first, second, ... connection."""
        await self._until(lambda: self.connections >= number)

    async def _until(self, happened: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE), self._news:
            await self._news.wait_for(happened)

    def made(self, transport: asyncio.Transport) -> None:
        """Note that a client has connected."""
        self.connections += 1
        self._open.add(transport)
        self._tell()

    def lost(self, transport: asyncio.Transport) -> None:
        """Note that a connection is over."""
        self._open.discard(transport)

    def asked(self, call: Call) -> None:
        """Handle a complete request."""
        if call.path.endswith("/models"):
            self._answer_models(call)
            return
        if "/generation?" in call.path:
            self._answer_generation(call)
            return
        self.calls.append(call)
        if self.replies:
            self.replies[min(len(self.calls), len(self.replies)) - 1](call)
        self._tell()

    def _answer_models(self, call: Call) -> None:
        if self.models is None:
            call.reply(404, {"error": {"code": 404, "message": "No list."}})
        else:
            call.head(200, {"Content-Type": "application/json", "Content-Length": str(len(self.models))})
            call.write(self.models)

    def _answer_generation(self, call: Call) -> None:
        generation = call.path.rpartition("=")[2]
        self.looks.append(generation)
        record = self.generations.get(generation)
        if not self.generations:
            call.head(404, {"Content-Length": "0"})
        elif record is None:
            call.reply(404, {"error": {"code": 404, "message": "Not yet."}})
        else:
            call.reply(200, {"data": record})
        self._tell()

    def _tell(self) -> None:
        task = asyncio.ensure_future(self._notify())
        self._telling = task  # the loop itself keeps no task alive

    async def _notify(self) -> None:
        async with self._news:
            self._news.notify_all()

    def hang_up(self) -> None:
        """Break every connection."""
        for transport in tuple(self._open):
            transport.abort()


class _Connection(asyncio.Protocol):
    """Reads requests, one at a time, as HTTP without pipelining has them."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self._upstream = upstream
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self._call: Call | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._upstream.made(self._transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (request := self._next()) is not None:
            self._call = request
            self._upstream.asked(request)

    def _next(self) -> Call | None:
        assert self._transport is not None
        raw_head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return None
        first, *lines = raw_head.decode("latin-1").split("\r\n")
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)
        }
        length = int(headers.get("content-length", "0"))
        if len(rest) < length:
            return None
        self._buffer = rest[length:]
        return Call(self._transport, first.split(" ")[1], headers, rest[:length])

    def eof_received(self) -> None:
        self._lost()

    def connection_lost(self, exc: Exception | None) -> None:
        assert self._transport is not None
        self._lost()
        self._upstream.lost(self._transport)

    def _lost(self) -> None:
        if self._call is not None:
            self._call.lost()


@asynccontextmanager
async def scripted_upstream(tls: ssl.SSLContext | None = None) -> AsyncIterator[ScriptedUpstream]:
    """Run a scripted upstream on a free port during the block, over TLS if there is a context for it."""
    upstream = ScriptedUpstream()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(upstream), "127.0.0.1", 0, ssl=tls)
    host, port = server.sockets[0].getsockname()
    upstream.url = f"{'http' if tls is None else 'https'}://{host}:{port}/api/v1"
    try:
        yield upstream
    finally:
        server.close()
        upstream.hang_up()
        await server.wait_closed()
