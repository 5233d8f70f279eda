"""Sentinels that are far away, or stand still: workers find the primary all the same."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from broker.store.connection import Store
from tests.sentinels import sentinel_set
from tests.system import test_several_servers as several

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.scripted import ScriptedUpstream

pytestmark = pytest.mark.slow

ONE_WAY = 0.1
"""Seconds that a packet takes in one direction. A password and a question are two round trips: 0.4 s."""


@asynccontextmanager
async def far_from(port: int) -> AsyncIterator[int]:
    """Run a proxy to a server of this machine that takes `ONE_WAY` with each packet. Yields its port."""
    connections: set[asyncio.Task[None]] = set()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                await asyncio.sleep(ONE_WAY)
                writer.write(data)
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(forward(reader, far_writer), forward(far_reader, writer))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.gather(*connections)


async def test_a_primary_is_found_by_sentinels_far_away() -> None:
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(sentinel_set())
        url = servers.url
        for sentinel in servers.sentinels:
            port = await stack.enter_async_context(far_from(sentinel.port))
            url = url.replace(f":{sentinel.port}", f":{port}")
        store = Store(url, "test")
        stack.push_async_callback(store.close)
        await store.ping()


async def test_a_primary_is_found_where_most_sentinels_stand_still() -> None:
    async with sentinel_set() as servers:
        for sentinel in servers.sentinels[:2]:
            sentinel.freeze()
        store = Store(servers.url, "test")
        try:
            await store.ping()
        finally:
            await store.close()


async def test_a_failover_in_mid_stream_while_a_sentinel_stands_still(upstream: ScriptedUpstream) -> None:
    async with sentinel_set() as servers:
        servers.sentinels[0].freeze()  # the one that is asked first
        await several.test_a_failover_in_mid_stream(servers, upstream)
