"""The listener of several workers: connections are shared, and none is lost when one of them closes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import ClientSession, TCPConnector, web

from broker.web.shared_listener import SharedListener

BURST = 40


class Worker:
    """Counts the requests that it answers."""

    def __init__(self) -> None:
        self.answered = 0

    async def answer(self, request: web.BaseRequest) -> web.Response:
        self.answered += 1
        return web.Response(text="ok")


@asynccontextmanager
async def listening(shared: socket.socket, worker: Worker) -> AsyncIterator[SharedListener]:
    server = web.Server(worker.answer)
    listener = SharedListener(server, [shared.dup()])
    listener.start()
    try:
        yield listener
    finally:
        listener.close()
        await server.shutdown(0)


async def ask_at_once(shared: socket.socket) -> list[str]:
    port = shared.getsockname()[1]

    async def ask(http: ClientSession) -> str:
        async with http.get(f"http://127.0.0.1:{port}/") as answer:
            return await answer.text()

    async with ClientSession(connector=TCPConnector(limit=0, force_close=True)) as http:
        return list(await asyncio.gather(*(ask(http) for _ in range(BURST))))


async def test_a_burst_is_shared_between_listeners() -> None:
    one, other = Worker(), Worker()
    with socket.create_server(("127.0.0.1", 0), backlog=BURST) as shared:
        async with listening(shared, one), listening(shared, other):
            assert await ask_at_once(shared) == ["ok"] * BURST
    assert min(one.answered, other.answered) >= BURST // 4


async def test_connections_that_wait_go_to_another_listener() -> None:
    one, other = Worker(), Worker()
    with socket.create_server(("127.0.0.1", 0), backlog=BURST) as shared:
        async with listening(shared, one) as first, listening(shared, other):
            first.close()
            assert await ask_at_once(shared) == ["ok"] * BURST
    assert (one.answered, other.answered) == (0, BURST)
