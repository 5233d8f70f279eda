"""The load of the benchmarks: pages that stream, in a process of its own.

A stream is complete only if every chunk came once, in order, then the end of the stream, then the end of the answer.
Anything else is a lost stream, counted under its reason.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import orjson

from tests.benchmarks.http_reply import Reply
from tests.benchmarks.upstream import MARK, Answer

Mode = Literal["direct", "broker", "prepare"]
"""Straight to the upstream; through the broker; or only the first of its two steps."""

PROGRESS_INTERVAL = 0.1
"""Seconds from one `Progress` to the next."""

_ADDRESSES = 200 if sys.platform == "linux" else 1  # elsewhere the loopback has one address
_CONNECT_TIMEOUT = 10.0
_SECOND = 1_000_000_000
_ERROR = re.compile(rb"event: error\n(?:id: .*\n)?data: (.*)\n")
_REQUEST = {
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Explain server-sent events in one paragraph, please."},
    ]
}


class Work(NamedTuple):
    """What is asked for.

    Attributes:
        answer: how the upstream answers each stream.
        streams: in all.
        concurrent: at a time.
        ramp: seconds over which the first streams are started.
        timeout: seconds after which what still runs is lost.
        timed: keep the times of each chunk. Where chunks come as fast as they are taken, they say how full the
            buffers are, and nothing of the broker.
        rate: sessions begun in a second at most; 0 is no limit.
    """

    answer: Answer
    streams: int
    concurrent: int
    ramp: float = 0.0
    timeout: float = 120.0
    timed: bool = True
    rate: float = 0.0


class Progress(NamedTuple):
    """How far a load is.

    Attributes:
        chunks: received.
        ended: streams that are complete or lost.
        steady: all streams at a time are receiving chunks, and none has ended.
    """

    chunks: int
    ended: int
    steady: bool


@dataclass
class Outcome:
    """What has come of a load. Times are nanoseconds.

    Attributes:
        complete: streams.
        lost: streams, by the reason.
        seconds: from the first request to the last end.
        cpu: seconds of CPU of this process.
        latencies: from the upstream's clock in a chunk to its arrival.
        gaps: from one chunk of a stream to the next.
        firsts: from the request for a stream to its first chunk.
        prepares: from the request to /prepare to its answer.
    """

    complete: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    chunks: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    latencies: array[int] = field(default_factory=lambda: array("q"))
    gaps: array[int] = field(default_factory=lambda: array("q"))
    firsts: array[int] = field(default_factory=lambda: array("q"))
    prepares: array[int] = field(default_factory=lambda: array("q"))


async def run(mode: Mode, port: int, work: Work, tell: Callable[[Progress], None]) -> Outcome:
    """Do the work on a port of 127.0.0.1, telling the progress now and then."""
    load = _Load(mode, port, work)
    watcher = asyncio.create_task(_watch(load, tell))
    cpu, started = time.process_time(), time.monotonic()
    slots = [asyncio.create_task(load.slot(n)) for n in range(min(work.concurrent, work.streams))]
    await asyncio.wait(slots, timeout=work.timeout)
    load.outcome.seconds = time.monotonic() - started
    load.outcome.cpu = time.process_time() - cpu
    if missing := work.streams - load.outcome.complete - load.outcome.lost.total():
        load.outcome.lost["not ended in time"] += missing
    for task in (watcher, *slots):
        task.cancel()
    await asyncio.gather(watcher, *slots, return_exceptions=True)
    return load.outcome


async def _watch(load: _Load, tell: Callable[[Progress], None]) -> None:
    while True:
        await asyncio.sleep(PROGRESS_INTERVAL)
        tell(load.progress())


class _Load:
    """What the pages of one load share."""

    def __init__(self, mode: Mode, port: int, work: Work) -> None:
        self.mode = mode
        self.port = port
        self.work = work
        self.outcome = Outcome()
        self.receiving = 0
        self._begun = 0
        self._started = time.monotonic()
        stream = {"stream": True} if mode == "direct" else {}
        body = orjson.dumps({"model": work.answer.model, **stream, **_REQUEST})
        path = b"/v1/chat/completions" if mode == "direct" else b"/prepare"
        self.first_request = (
            b"POST %b HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\nAccept: */*\r\n"
            b"Authorization: Bearer sk-none\r\nContent-Length: %d\r\n\r\n%b" % (path, port, len(body), body)
        )
        if mode != "direct":
            self.first_request = self.first_request.replace(b"Authorization: Bearer sk-none\r\n", b"")

    def stream_request(self, session: str) -> bytes:
        """The second step, as a browser's EventSource sends it."""
        return (
            f"GET /stream/{session} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nAccept: text/event-stream\r\n"
            "Cache-Control: no-cache\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64)\r\n"
            "Accept-Encoding: identity\r\n\r\n"
        ).encode()

    def take(self) -> bool:
        """Take the next stream; returns False if there is none."""
        if self._begun >= self.work.streams:
            return False
        self._begun += 1
        return True

    def give_back(self) -> None:
        """Return a stream that was not begun after all."""
        self._begun -= 1

    def pause(self) -> float:
        """Seconds until the next stream may begin."""
        if not self.work.rate:
            return 0.0
        return max(0.0, self._started + self._begun / self.work.rate - time.monotonic())

    def progress(self) -> Progress:
        ended = self.outcome.complete + self.outcome.lost.total()
        steady = not ended and self.receiving == min(self.work.concurrent, self.work.streams)
        return Progress(self.outcome.chunks, ended, steady)

    async def slot(self, n: int) -> None:
        """Run streams one after the other, on one connection for as long as it stays open."""
        await asyncio.sleep(self.work.ramp * n / self.work.concurrent)
        own = (f"127.0.0.{2 + n % _ADDRESSES}", 0) if _ADDRESSES > 1 else None
        while self._begun < self.work.streams:
            try:
                async with asyncio.timeout(_CONNECT_TIMEOUT):
                    _, page = await asyncio.get_running_loop().create_connection(
                        lambda: _Page(self), "127.0.0.1", self.port, local_addr=own
                    )
            except (OSError, TimeoutError):
                if self.take():
                    self.outcome.lost["not connected"] += 1
                continue
            try:
                await page.closed
            finally:
                page.close()


class _Page(asyncio.Protocol):
    """One connection, and the streams on it.

    Attributes:
        closed: done when the connection is closed.
    """

    def __init__(self, load: _Load) -> None:
        self._load = load
        self._outcome = load.outcome
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._used = False
        self._reply: Reply | None = None
        self._first_step = True
        self._preparing = False
        self._body = b""
        self._asked_at = 0
        self._next = 0
        self._last_at = 0
        self._over = False
        self._wrong = ""

    def close(self) -> None:
        """Drop the connection."""
        self._reply = None
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        if (reply := self._reply) is not None:
            if reply.end_of_connection():
                self._answered(time.monotonic_ns())
            elif (
                self._used and self._first_step and not reply.status
            ):  # it was closed while nothing was asked
                self._load.give_back()
            else:
                self._lose("connection lost")
        self._reply = None
        if not self.closed.done():
            self.closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        if (reply := self._reply) is None:
            self._transport.abort()
            return
        body = reply.feed(data)
        if self._preparing:
            self._body += body
        elif body:
            self._read(body, now)
        if reply.ended:
            self._answered(now)

    def _begin(self) -> None:
        if pause := self._load.pause():
            asyncio.get_running_loop().call_later(pause, self._begin)
            return
        if self._transport.is_closing() or not self._load.take():
            self._transport.close()
            return
        self._next = 0
        self._over, self._wrong = False, ""
        self._first_step, self._preparing = True, self._load.mode != "direct"
        self._ask(self._load.first_request)

    def _ask(self, request: bytes) -> None:
        self._reply, self._body = Reply(), b""
        self._asked_at = time.monotonic_ns()
        self._transport.write(request)

    def _read(self, body: bytes, now: int) -> None:
        """Count the chunks of whole events, and keep the beginning of the next one."""
        body = self._body + body
        if (last := body.rfind(b"\n\n")) < 0:
            self._body = body
            return
        events, self._body = body[: last + 2], body[last + 2 :]
        for emitted, number in MARK.findall(events):
            if int(number) != self._next or self._over:
                self._wrong = self._wrong or "out of order"
            self._next += 1
            self._outcome.chunks += 1
            if self._next == 1:
                self._load.receiving += 1
                self._outcome.firsts.append(now - self._asked_at)
            elif self._load.work.timed:
                self._outcome.gaps.append(now - self._last_at)
            if self._load.work.timed:
                self._outcome.latencies.append(now - int(emitted))
                self._last_at = now
        if b"event: done\n" in events or b"data: [DONE]\n" in events:
            self._over = True
        if b"event: error\n" in events:
            self._wrong = _error_code(events)

    def _answered(self, now: int) -> None:
        """Go on after a whole answer: from /prepare to the stream, from the stream to the next one."""
        assert self._reply is not None
        status, closes, self._reply, self._used = self._reply.status, self._reply.closes, None, True
        if self._preparing:
            self._prepared(status, now)
            return
        if self._next:
            self._load.receiving -= 1
        if status != 200:
            self._lose(f"status {status}")
        elif self._wrong:
            self._lose(self._wrong)
        elif self._next != self._load.work.answer.chunks or not self._over:
            self._lose("incomplete")
        else:
            self._outcome.complete += 1
        self._next_one(closes)

    def _prepared(self, status: int, now: int) -> None:
        if status != 201:
            self._lose(f"/prepare {status}")
            self._next_one(closes=True)
            return
        self._outcome.prepares.append(now - self._asked_at)
        session = str(orjson.loads(self._body)["sessionId"])
        if self._load.mode == "prepare":
            self._outcome.complete += 1
            self._next_one(closes=False)
            return
        self._first_step = self._preparing = False
        self._ask(self._load.stream_request(session))

    def _next_one(self, closes: bool) -> None:
        if closes:
            self._transport.close()
        else:
            self._begin()

    def _lose(self, why: str) -> None:
        self._outcome.lost[why] += 1


def _error_code(events: bytes) -> str:
    """Say which `error` event it was."""
    found = _ERROR.search(events)
    try:
        return f"error {orjson.loads(found[1])['code']}" if found else "error"
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return "error"
