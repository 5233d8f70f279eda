"""A real Firefox for the system tests, driven by WebDriver BiDi.

Playwright drives only its own build of Firefox, which no package has. What the tests need of the protocol is little:
open a page, and evaluate an expression there.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import tempfile
from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.system.npm import missing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PATIENCE = 60.0


class Firefox:
    """One page of a Firefox."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = count(1)
        self._context = ""

    async def start(self) -> None:
        """Begin a session, and find its page."""
        await self.command("session.new", capabilities={})
        tree = await self.command("browsingContext.getTree")
        self._context = tree["contexts"][0]["context"]

    async def goto(self, url: str) -> None:
        """Open a page, and wait until it is loaded."""
        await self.command("browsingContext.navigate", context=self._context, url=url, wait="complete")

    async def evaluate(self, expression: str) -> Any:
        """Return what an expression of the page becomes: text, numbers, lists and objects, by way of JSON.

        Raises:
            AssertionError: it threw.
        """
        told = await self.command(
            "script.evaluate",
            expression=f"(async () => JSON.stringify(await ({expression})))()",
            target={"context": self._context},
            awaitPromise=True,
        )
        assert told["type"] == "success", told["exceptionDetails"]["text"]
        return json.loads(told["result"].get("value", "null"))

    async def command(self, method: str, **params: Any) -> Any:
        """Send one command, and return its result."""
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async with asyncio.timeout(PATIENCE):
            while (answer := await self._socket.receive_json()).get("id") != number:
                pass  # an event
        assert answer["type"] == "success", answer
        return answer["result"]


@asynccontextmanager
async def launched_firefox() -> AsyncIterator[Firefox]:
    """The Firefox of the system, without a window. Where there is none the test is skipped, but fails in CI."""
    path = shutil.which("firefox-esr") or shutil.which("firefox")
    if path is None:
        missing("there is no Firefox on this machine")
    with tempfile.TemporaryDirectory(prefix="firefox-", ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            path,
            *("--headless", "--no-remote", "--profile", profile, "--remote-debugging-port", "0"),
            env={**os.environ, "HOME": profile, "MOZ_DISABLE_CONTENT_SANDBOX": "1"},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with aiohttp.ClientSession() as http:
                async with http.ws_connect(f"{await _address(process)}/session", max_msg_size=0) as socket:
                    firefox = Firefox(socket)
                    await firefox.start()
                    yield firefox
        finally:
            process.kill()
            await process.wait()


async def _address(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    try:
        async with asyncio.timeout(PATIENCE):
            async for line in process.stderr:
                if found := re.search(rb"WebDriver BiDi listening on (ws://\S+)", line):
                    return found.group(1).decode()
    except TimeoutError:
        pass
    pytest.fail("Firefox did not start")
