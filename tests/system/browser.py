"""A real browser for the system tests, and what stands between it and the broker.

Nothing here knows what a test expects; it starts the browser, listens, and breaks connections when asked to.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from aiohttp import web
from playwright.async_api import Browser, ConsoleMessage, Dialog, Error, Page, async_playwright

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PAGES = Path(__file__).parent / "pages"
README = Path(__file__).parents[2] / "README.md"
QUIETLY = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NO_CHROMIUM = "there is no chromium on this machine"
BAD_GATEWAY = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@asynccontextmanager
async def launched_chromium() -> AsyncIterator[Browser]:
    """The Chromium of the system, without a window. Where there is none the test is skipped, but fails in CI."""
    path = shutil.which("chromium")
    if path is None:
        pytest.fail(NO_CHROMIUM) if os.environ.get("CI") else pytest.skip(NO_CHROMIUM)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=QUIETLY)
        try:
            yield browser
        finally:
            await browser.close()


class Complaints(list[str]):
    """The messages to a page's developer: console errors (violations of its policy too), exceptions, dialogs."""

    def __init__(self, page: Page) -> None:
        super().__init__()
        page.on("console", self._console)
        page.on("pageerror", self._exception)
        page.on("dialog", self._dialog)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.append(message.text)

    def _exception(self, error: Error) -> None:
        self.append(f"{error.name}: {error.message}")

    async def _dialog(self, dialog: Dialog) -> None:
        self.append(f"dialog: {dialog.message}")
        await dialog.dismiss()


def readme_lines(*, short: bool = False) -> str:
    """Return the code of a page for the long or the short form, from the README."""
    name = "javascript" if short else "js"
    found = re.findall(rf"^```{name}\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    (lines,) = [block for block in found if ("events=token" in block) is short]
    return str(lines)


async def _ten_lines(request: web.Request) -> web.Response:
    page = (PAGES / "ten_lines.html").read_text()
    assert page.count("// the README's lines") == 1
    page = page.replace("// the README's lines", readme_lines(short="short" in request.query))
    return web.Response(text=page, content_type="text/html", charset="utf-8")


@asynccontextmanager
async def foreign_site(folder: Path = PAGES) -> AsyncIterator[str]:
    """The test pages on a port of their own, and so of another origin than any broker; gives the URL."""
    app = web.Application()
    app.router.add_get("/ten_lines.html", _ten_lines)
    app.router.add_static("/", folder)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class Cable:
    """Carries bytes to and from a broker until somebody cuts it.

    Attributes:
        down: answer every new connection with a 502, as a proxy does whose backend is away.
        refused: set as soon as a connection was answered so.
    """

    def __init__(self, port: int) -> None:
        self.down = False
        self.refused = asyncio.Event()
        self._port = port
        self._open: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """Break all connections at once; new ones are carried again."""
        for writer in self._open:
            writer.transport.abort()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection of the browser."""
        try:
            await (self._refuse(reader, writer) if self.down else self._connect(reader, writer))
        except OSError:
            pass  # cut, on either side: that is what a cable is for
        finally:
            writer.close()

    async def _refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(BAD_GATEWAY)
        await writer.drain()
        self.refused.set()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, onward = await asyncio.open_connection("127.0.0.1", self._port)
        ends = {writer, onward}
        self._open |= ends
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(_pour(reader, onward))
                both.create_task(_pour(there, writer))
        except* OSError:
            pass
        finally:
            self._open -= ends
            onward.close()


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@asynccontextmanager
async def laid_cable(port: int) -> AsyncIterator[tuple[Cable, str]]:
    """A cable to the broker on that port, and the URL of its near end."""
    cable = Cable(port)
    server = await asyncio.start_server(cable.carry, "127.0.0.1", 0)
    try:
        yield cable, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        cable.cut()
        await server.wait_closed()
