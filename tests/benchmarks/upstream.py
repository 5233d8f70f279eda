"""The upstream of the benchmarks: a process of its own that writes the time into each chunk.

It answers every chat completion with the number of chunks, and at the pace, that the name of the model says
(`Answer.model`). A chunk has the shape and the size of OpenRouter's, about 300 bytes. Its text is
``t=<time>;<number> ``: the time of the monotonic clock in nanoseconds, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from typing import NamedTuple, cast

from tests.benchmarks.pacer import Pacer

MARK = re.compile(rb"t=(\d+);(\d+) ")
"""Time and number in the text of a chunk."""

_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"X-Generation-Id: gen-%d\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_BEFORE = (
    b'data: {"id":"gen-%d","provider":"Bench","model":"bench/model","object":"chat.completion.chunk",'
    b'"created":1760000000,"choices":[{"index":0,"delta":{"role":"assistant","content":"'
)
_AFTER = b'"},"finish_reason":%b,"native_finish_reason":%b,"logprobs":null}]%b}\n\n'
_MORE = _AFTER % (b"null", b"null", b"")
_LAST = _AFTER % (b'"stop"', b'"stop"', b"")
_DONE = b"data: [DONE]\n\n"
_MODEL = re.compile(rb'"model":\s*"bench/(\d+)-(\d+)"')
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)


class Answer(NamedTuple):
    """How a model answers.

    Attributes:
        chunks: with text; one with the usage follows.
        pause: microseconds from one chunk to the next; 0 is as fast as they are taken.
    """

    chunks: int
    pause: int = 0

    @property
    def model(self) -> str:
        """The name of the model that answers so."""
        return f"bench/{self.chunks}-{self.pause}"


class _Connection(asyncio.Protocol):
    """One connection: requests one after the other, each answered before the next is read."""

    def __init__(self, pacer: Pacer, number: Callable[[], int], models: bytes) -> None:
        self._pacer = pacer
        self._number = number
        self._models = models
        self._received = b""
        self._writable = True
        self._waits = False
        self._answer: Answer | None = None
        self._before = b""
        self._sent = 0
        self._due = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._answer = None

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        if self._waits:
            self._waits = False
            self._emit()

    def data_received(self, data: bytes) -> None:
        self._received += data
        while self._answer is None and self._take_request():
            pass

    def _take_request(self) -> bool:
        """Answer the next request; returns False if it is not here as a whole."""
        head, found, rest = self._received.partition(b"\r\n\r\n")
        length = int(m[1]) if (m := _LENGTH.search(head)) else 0
        if not found or len(rest) < length:
            return False
        body, self._received = rest[:length], rest[length:]
        if head.startswith(b"POST ") and (model := _MODEL.search(body)):
            self._begin(Answer(int(model[1]), int(model[2])))
        elif head.startswith(b"GET ") and b"/models" in head.partition(b"\r\n")[0]:
            self._reply(b"200 OK", self._models)
        else:
            self._reply(b"404 Not Found", b'{"error":{"code":404,"message":"There is no such path."}}')
        return True

    def _reply(self, status: bytes, body: bytes) -> None:
        head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self._transport.write(head % (status, len(body)) + body)

    def _begin(self, answer: Answer) -> None:
        number = self._number()
        self._answer, self._sent, self._before = answer, 0, _BEFORE % number
        self._transport.write(_HEAD % number)
        self._due = time.monotonic_ns()
        self._emit()

    def _emit(self) -> None:
        """Send the next chunk, and plan the one after it."""
        if (answer := self._answer) is None:
            return
        if not self._writable:
            self._waits = True
            return
        n, self._sent = self._sent, self._sent + 1
        after = _MORE if self._sent < answer.chunks else _LAST
        event = b"%bt=%d;%d %b" % (self._before, time.monotonic_ns(), n, after)
        self._transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        if self._sent == answer.chunks:
            self._finish(answer.chunks)
        elif answer.pause:
            self._due += answer.pause * 1000
            self._pacer.call_at(self._due, self._emit)
        else:
            asyncio.get_running_loop().call_soon(self._emit)

    def _finish(self, chunks: int) -> None:
        usage = b',"usage":{"prompt_tokens":14,"completion_tokens":%d,"total_tokens":%d}' % (
            chunks,
            chunks + 14,
        )
        event = self._before + _AFTER % (b"null", b"null", usage)
        for piece in (event, _DONE):
            self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self._transport.write(b"0\r\n\r\n")
        self._answer = None
        if self._received:
            self.data_received(b"")


async def serve(port: int, answers: list[Answer], ready: Callable[[], None]) -> None:
    """Listen on 127.0.0.1 until cancelled, and say when it does."""
    models = json.dumps({"data": [_entry(answer) for answer in answers]}).encode()
    pacer, count = Pacer(), 0

    def number() -> int:
        nonlocal count
        count += 1
        return count

    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(pacer, number, models), "127.0.0.1", port, backlog=4096
    )
    ready()
    async with server:
        await server.serve_forever()


def _entry(answer: Answer) -> dict[str, object]:
    return {
        "id": answer.model,
        "name": answer.model,
        "created": 1_760_000_000,
        "context_length": 32_768,
        "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
        "pricing": {"prompt": "0.0000004", "completion": "0.0000016"},
        "top_provider": {"context_length": 32_768, "max_completion_tokens": 8192},
        "supported_parameters": ["max_tokens", "temperature"],
    }
