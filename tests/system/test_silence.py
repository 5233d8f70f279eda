"""A model that is silent for two minutes, through the real proxies with their real time limits."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.system.caddy import running_caddy
from tests.system.harness import running_broker
from tests.system.proxy import EVENTS, ROOM, prepared, running_proxy

if TYPE_CHECKING:
    from tests.system.proxy import Proxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

COMMENTS = 9
"""The first comes with the stream, and each other one after 15 s of silence: two minutes."""


async def silent(proxy: Proxy) -> None:
    address = f"/stream/{await prepared(proxy.page, 'rehearsal/hang')}"
    async with proxy.page.get(address, headers=EVENTS) as answer:
        for _ in range(COMMENTS):
            await answer.content.readuntil(b"\n: ")
        async with proxy.page.delete(address) as cancelled:
            assert cancelled.status == 202
        assert "event: done" in await answer.text()


async def test_two_minutes_of_silence_pass_every_proxy() -> None:
    env = {**ROOM, "BROKER_FIRST_DATA_TIMEOUT": "300"}
    async with (
        running_broker(env=env) as broker,
        running_proxy(broker.port) as nginx,
        running_caddy(broker.port, broker.port) as caddy,
        asyncio.TaskGroup() as both,
    ):
        both.create_task(silent(nginx))
        both.create_task(silent(caddy))
