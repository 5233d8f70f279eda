"""Clients that send or take too slowly, and too much: heads of requests, and answers that nobody reads."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from pydantic import SecretStr

from broker import Settings
from broker.web.server import MAX_HEAD, Runner, _Connection, runner_for
from tests.scripted import PATIENCE
from tests.system.harness import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

SHORT = 0.3
HALF = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-Half: "
LARGE = 64 * 1024 * 1024  # more than the buffers of two sockets hold


class Client:
    """A connection, and the runner at its other end."""

    def __init__(self, runner: Runner, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.runner, self.reader, self.writer = runner, reader, writer

    @property
    def other_end(self) -> _Connection:
        """The connection as the server has it."""
        assert self.runner.server is not None
        (connection,) = self.runner.server.connections
        assert isinstance(connection, _Connection)
        return connection

    async def answers(self) -> bytes:
        """Return everything that comes until the server hangs up."""
        async with asyncio.timeout(PATIENCE):
            return await self.reader.read(-1)


async def hello(request: web.Request) -> web.Response:
    return web.Response(text=f"hello {len(await request.read())}")


async def large(request: web.Request) -> web.Response:
    return web.Response(body=bytes(LARGE))


def connected(
    *, head_timeout: float = PATIENCE, stall_timeout: float = PATIENCE
) -> AbstractAsyncContextManager[Client]:
    return connected_to(partial(Runner, head_timeout=head_timeout, stall_timeout=stall_timeout))


@asynccontextmanager
async def connected_to(make_runner: Callable[[web.Application], Runner]) -> AsyncIterator[Client]:
    app = web.Application()
    app.add_routes([web.get("/health/live", hello), web.post("/prepare", hello), web.get("/models", large)])
    runner = make_runner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        reader, writer = await asyncio.open_connection(*runner.addresses[0])
        try:
            yield Client(runner, reader, writer)
        finally:
            writer.close()
    finally:
        await runner.cleanup()


def refused(answer: bytes, status: int) -> str:
    """Return the message of the only answer, which is an error in our form."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.0 %d " % status, b"HTTP/1.1 %d " % status)), head
    assert b"nosniff" in head
    error = json.loads(body)["error"]
    assert error["code"] == "invalid_request"
    return str(error["message"])


async def test_half_a_head_is_refused_after_a_time() -> None:
    async with connected(head_timeout=SHORT) as client:
        client.writer.write(HALF)
        assert refused(await client.answers(), 408) == "The head of the request took longer than 0.3 s."


async def test_a_byte_now_and_then_does_not_prolong_a_head() -> None:
    async with connected(head_timeout=SHORT) as client:
        client.writer.write(HALF)

        async def drip() -> None:
            while True:
                client.writer.write(b"x")
                await asyncio.sleep(SHORT / 20)

        dripping = asyncio.create_task(drip())
        try:
            await client.answers()  # ends only if the server hangs up
        except ConnectionResetError:
            pass  # so does this: it hung up while a byte was on its way
        finally:
            dripping.cancel()


async def test_the_next_head_of_a_connection_has_a_limit_too() -> None:
    async with connected(head_timeout=SHORT) as client:
        client.writer.write(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await client.reader.readuntil(b"hello 0")).startswith(b"HTTP/1.1 200 ")
        client.writer.write(HALF)
        refused(await client.answers(), 408)


async def test_a_head_in_two_pieces_is_served() -> None:
    async with connected() as client:
        client.writer.write(HALF)
        await eventually(lambda: client.runner.server and client.runner.server.connections)
        await eventually(lambda: client.other_end._head_timer is not None)
        client.writer.write(b"x\r\nConnection: close\r\n\r\n")
        assert (await client.answers()).endswith(b"hello 0")


async def test_a_body_is_not_taken_for_a_head() -> None:
    async with connected() as client:
        client.writer.write(b"POST /prepare HTTP/1.1\r\nHost: localhost\r\nContent-Length: 300000\r\n\r\n")
        for _ in range(3):
            client.writer.write(bytes(100_000))
            await client.writer.drain()
            await eventually(lambda: client.runner.server and client.runner.server.connections)
            assert client.other_end._head_timer is None
        assert (await client.reader.readuntil(b"hello 300000")).startswith(b"HTTP/1.1 200 ")
        assert client.other_end._head_timer is None


async def test_a_head_is_limited_as_a_whole() -> None:
    async with connected() as client:
        client.writer.write(HALF)
        for _ in range(40):  # each line is within its limit
            client.writer.write(b"y" * 20_000 + b"\r\nX-Half: ")
        with suppress(ConnectionResetError):  # it may hang up on what it has not read yet
            assert str(MAX_HEAD) in refused(await client.answers(), 400)


async def test_a_client_that_takes_nothing_is_disconnected() -> None:
    async with connected(stall_timeout=1.0) as client:
        tcp = client.writer.get_extra_info("socket")
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        client.writer.write(b"GET /models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await eventually(lambda: client.runner.server and client.runner.server.connections)
        await eventually(lambda: client.runner.server and not client.runner.server.connections)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel has no such limit")
@pytest.mark.parametrize(("send_timeout", "waits"), [(5, 30), (90, 90)])
async def test_the_kernel_waits_as_long_as_a_stream_may(send_timeout: float, waits: float) -> None:
    settings = Settings(openrouter_api_key=SecretStr("key"), send_timeout=send_timeout)
    async with connected_to(partial(runner_for, settings=settings)) as client:
        await eventually(lambda: client.runner.server and client.runner.server.connections)
        assert client.other_end.transport is not None
        tcp = client.other_end.transport.get_extra_info("socket")
        assert tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == waits * 1000
