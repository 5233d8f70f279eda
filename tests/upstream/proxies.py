"""An HTTP proxy for tests: it opens tunnels, or does not."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

AGREED = b"HTTP/1.1 200 Connection established\r\n\r\n"


class Proxy:
    """A proxy.

    Attributes:
        url: its address.
        heads: the requests for tunnels, each until its blank line.
        answers: what is answered to each; the last one answers all further requests. A tunnel is opened after a 200.
            None: nothing is answered, and the connection stays open.
        target: host and port that every tunnel leads to; None for those that the request names.
        passed: what clients sent through tunnels.
        gone: set when a client has left.
    """

    def __init__(self, answers: tuple[bytes | None, ...], target: tuple[str, int] | None) -> None:
        self.url = ""
        self.heads: list[bytes] = []
        self.answers = answers
        self.target = target
        self.passed = b""
        self.gone = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (task := asyncio.current_task()) is not None:
            self.tasks.add(task)
        with suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            try:
                await self._serve(reader, writer)
            finally:
                writer.transport.abort()
                self.gone.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heads.append(await reader.readuntil(b"\r\n\r\n"))
        answer = self.answers[min(len(self.heads), len(self.answers)) - 1]
        if answer is None:
            await reader.read()
            return
        writer.write(answer)
        await writer.drain()
        if b" 200" not in answer[:13]:
            return
        host, _, port = self.heads[-1].split()[1].decode().rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(
            *(self.target or (host.strip("[]"), int(port)))
        )
        try:
            down = asyncio.create_task(self._forward(far_reader, writer))
            await self._forward(reader, far_writer, note=True)
            await down
        finally:
            far_writer.transport.abort()

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, note: bool = False
    ) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                if note:
                    self.passed += data
                writer.write(data)
                await writer.drain()
        writer.close()


@asynccontextmanager
async def running_proxy(
    *answers: bytes | None, tls: ssl.SSLContext | None = None, target: tuple[str, int] | None = None
) -> AsyncIterator[Proxy]:
    """Run a proxy for the block."""
    proxy = Proxy(answers or (AGREED,), target)
    server = await asyncio.start_server(proxy.connected, "127.0.0.1", 0, ssl=tls)
    scheme = "http" if tls is None else "https"
    proxy.url = f"{scheme}://me:s3cr%2Ft@127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        for task in proxy.tasks:
            task.cancel()
        await asyncio.gather(*proxy.tasks, return_exceptions=True)
