"""A client that never ends the head of its request, before the service as it is started."""

from __future__ import annotations

import asyncio

import pytest

from broker.web.server import HEAD_TIMEOUT
from tests.system.harness import running_broker

pytestmark = pytest.mark.slow


async def test_the_service_gives_up_half_a_head() -> None:
    async with running_broker() as broker:
        reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
        try:
            writer.write(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-Half: ")
            async with asyncio.timeout(HEAD_TIMEOUT * 3):
                answer = await reader.read(-1)
        finally:
            writer.close()
        assert answer.startswith((b"HTTP/1.0 408 ", b"HTTP/1.1 408 "))
        assert b"took longer than 10 s" in answer
