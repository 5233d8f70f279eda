"""A storm of large bodies: a worker that answers them goes on with its streams, and nobody takes it for dead."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.system.cluster import check_whole, question, running_cluster

if TYPE_CHECKING:
    from tests.events import Connection, Event
    from tests.system.cluster import NumberedCall, Worker

pytestmark = pytest.mark.slow

BODIES = 30
MAX_BODY = 1024 * 1024
MAX_VALUES = 50_000
GAP = 1.5
"""Seconds that may lie between two chunks of another stream."""

TRIES = 3
"""Storms, one of which has to keep the gap: other work on this machine may stretch it."""

PACE = 0.05
ANSWERED = 60.0


def body(objects: int) -> bytes:
    """A request of exactly 1 MiB with so many small objects, each of two values, and colons in a text."""
    document = {**question("many :: colons ::"), "trace": {"x": [{"": 0}] * objects, "y": ""}}
    size = len(json.dumps(document, separators=(",", ":")))
    document["trace"] = {"x": [{"": 0}] * objects, "y": "::" * ((MAX_BODY - size) // 2) + "." * (size % 2)}
    text = json.dumps(document, separators=(",", ":")).encode()
    assert len(text) == MAX_BODY
    return text


LEGAL = body((MAX_VALUES - 10) // 2)
TOO_MANY = body((MAX_BODY - 1000) // 8)


class Upload:
    """A POST whose last byte is held back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, last: bytes) -> None:
        self.reader = reader
        self.writer = writer
        self.last = last

    async def status(self) -> int:
        """Read the answer and return its status."""
        async with asyncio.timeout(ANSWERED):
            head = await self.reader.readuntil(b"\r\n\r\n")
        self.writer.close()
        return int(head.split(b" ")[1])


async def begin(worker: Worker, data: bytes) -> Upload:
    """Send a /prepare but for its last byte."""
    parts = urlsplit(worker.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    head = f"POST /prepare HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[:-1])
    await writer.drain()
    return Upload(reader, writer, data[-1:])


async def storm(worker: Worker, data: bytes) -> list[int]:
    """Let the last bytes of all bodies arrive together, and return what each was answered."""
    uploads = await asyncio.gather(*(begin(worker, data) for _ in range(BODIES)))
    for upload in uploads:
        upload.writer.write(upload.last)
    return await asyncio.gather(*(upload.status() for upload in uploads))


class Page:
    """Reads a stream and notes when each event came."""

    def __init__(self, connection: Connection) -> None:
        self.events: list[Event] = []
        self.times: list[float] = []
        self.task = asyncio.create_task(self._read(connection))

    async def _read(self, connection: Connection) -> None:
        while (event := await connection.event()) is not None:
            self.events.append(event)
            self.times.append(asyncio.get_running_loop().time())

    def gap(self, start: float, end: float) -> float:
        """The longest time without an event within these times."""
        times = [start, *(at for at in self.times if start <= at <= end), end]
        return max(later - earlier for earlier, later in pairwise(times))


async def write_on(call: NumberedCall) -> None:
    """Send chunks at an even pace until cancelled."""
    while True:
        call.chunks()
        await asyncio.sleep(PACE)


@pytest.mark.parametrize(
    ("data", "status"), [(LEGAL, 201), (TOO_MANY, 422)], ids=["legal", "too many values"]
)
async def test_thirty_large_bodies_at_once_delay_no_stream(data: bytes, status: int) -> None:
    loop = asyncio.get_running_loop()
    async with running_cluster(max_prepared_bytes="512MiB", total_prepared_bytes="1GiB") as cluster:
        owner, other = cluster.workers
        session = await cluster.prepare(owner)
        gaps: list[float] = []
        async with session.stream(owner) as near, session.stream(other) as far:
            call = await session.call()
            pages = [Page(near), Page(far)]
            writing = asyncio.create_task(write_on(call))
            try:
                while len(gaps) < TRIES and min(gaps, default=GAP + 1) > GAP:
                    await asyncio.sleep(5 * PACE)  # so that the storm comes into a stream that flows
                    start = loop.time()
                    assert await storm(owner, data) == [status] * BODIES
                    await asyncio.sleep(5 * PACE)
                    gaps.append(pages[0].gap(start, loop.time()))
            finally:
                writing.cancel()
            call.done()
            await asyncio.gather(*(page.task for page in pages))
        for page in pages:
            assert check_whole(page.events, session.marker).kind == "done"
        assert session.calls == 1
        print("longest gaps:", [round(gap, 2) for gap in gaps])
        assert min(gaps) <= GAP
