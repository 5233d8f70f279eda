"""The shipped nginx configuration in a real nginx, and servers that stand in for brokers behind it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web

from tests.system.harness import POLL_INTERVAL, START_TIMEOUT, free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

SHIPPED = Path(__file__).parents[2] / "deploy" / "nginx"
LARGEST_BODY = 16 * 1024 * 1024
EVENTS = {"Accept": "text/event-stream"}
QUESTION = "Say this back to me."
ROOM = {
    "BROKER_RATE_LIMIT": "1000/minute",
    "BROKER_MAX_CONCURRENT_STREAMS": "50",
    "BROKER_DISCONNECT_GRACE": "2",
}


def program(name: str) -> str:
    """Where a program of the system is. Without it the test is skipped, but fails in CI."""
    if path := shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin"):
        return path
    missing = f"there is no {name} on this machine"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


def tool(name: str) -> str:
    """Where a program of the extra `deploy` is. Without it the test is skipped, but fails in CI."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else program(name)


def make_certificate(directory: Path) -> None:
    """Leave a certificate that nobody has signed there, and its key."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", "tls.key"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = [program("openssl"), "req", "-x509", "-days", "2", *names, *key, "-out", "tls.crt"]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)


def render(directory: Path, port: int, brokers: tuple[int, int]) -> None:
    """Copy the shipped files and fill in what depends on the place: port, certificate, brokers."""
    make_certificate(directory)
    shutil.copytree(SHIPPED, directory / "conf")
    path = directory / "conf" / "nginx.conf"
    text = path.read_text()
    filled_in = {
        "listen 8443 ": f"listen 127.0.0.1:{port} ",
        "/tls/tls.crt": f"{directory}/tls.crt",
        "/tls/tls.key": f"{directory}/tls.key",
        "broker-1:3000 resolve ": f"127.0.0.1:{brokers[0]} ",
        "broker-2:3000 resolve ": f"127.0.0.1:{brokers[1]} ",
    }
    for shipped, here in filled_in.items():
        assert text.count(shipped) == 1, f"{shipped!r} is to stand in nginx.conf once"
        text = text.replace(shipped, here)
    path.write_text(text)


def nginx(directory: Path, *options: str) -> list[str]:
    """The command that runs nginx with what was rendered there."""
    conf = str(directory / "conf" / "nginx.conf")
    return [program("nginx"), "-e", "stderr", "-p", f"{directory}/", "-c", conf, *options]


@dataclass
class Proxy:
    """A proxy that answers.

    Attributes:
        directory: has all files that it reads and writes.
        page: asks it as a page would, with paths in place of URLs.
    """

    port: int
    directory: Path
    page: aiohttp.ClientSession
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        """Where it answers, without a slash at the end."""
        return f"https://{self.host}:{self.port}"

    def said(self) -> str:
        """Both its outputs."""
        return "".join((self.directory / name).read_text(errors="replace") for name in ("out", "err"))

    async def logged(self, count: int) -> list[dict[str, Any]]:
        """Return its log, once it has so many lines: nginx writes each after its request has ended."""
        async with asyncio.timeout(START_TIMEOUT):
            while True:
                lines = (self.directory / "out").read_text().splitlines()
                if len(lines) >= count:
                    return [json.loads(line) for line in lines]
                await asyncio.sleep(POLL_INTERVAL)


@asynccontextmanager
async def running_proxy(*brokers: int) -> AsyncIterator[Proxy]:
    """Run the shipped proxy before the brokers on these ports; where one of the two is not given, nobody listens."""
    first, second = (*brokers, free_port(), free_port())[:2]
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="broker-test-") as name:
        directory = Path(name)
        render(directory, port, (first, second))
        connector = aiohttp.TCPConnector(ssl=False)
        async with (
            _running(directory) as process,
            aiohttp.ClientSession(f"https://127.0.0.1:{port}", connector=connector) as page,
        ):
            proxy = Proxy(port, directory, page)
            await _accepts(proxy, process)
            yield proxy


@asynccontextmanager
async def _running(directory: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    with (directory / "out").open("ab") as out, (directory / "err").open("ab") as err:
        process = await asyncio.create_subprocess_exec(*nginx(directory), stdout=out, stderr=err)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _accepts(proxy: Proxy, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(START_TIMEOUT):
        while process.returncode is None:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            except OSError:
                await asyncio.sleep(POLL_INTERVAL)
            else:
                writer.close()
                return
    pytest.fail(f"nginx has ended:\n{proxy.said()}")


@asynccontextmanager
async def standing_in(handler: Handler) -> AsyncIterator[int]:
    """A server in a broker's place, which answers everything by `handler`; gives its port."""
    app = web.Application(client_max_size=LARGEST_BODY)
    app.router.add_route("*", r"/{anything:[\s\S]*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@asynccontextmanager
async def proxy_before(*handlers: Handler) -> AsyncIterator[Proxy]:
    """The proxy before two brokers that answer by these handlers, or by the same one."""
    async with (
        standing_in(handlers[0]) as first,
        standing_in(handlers[-1]) as second,
        running_proxy(first, second) as proxy,
    ):
        yield proxy


async def prepared(session: aiohttp.ClientSession, model: str, base: str = "") -> str:
    """Prepare a short question, through the proxy or at a broker's own `base`, and give the session's id."""
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}]}
    async with session.post(f"{base}/prepare", json=body) as answer:
        assert answer.status == 201, await answer.text()
        return str((await answer.json())["sessionId"])


async def block(answer: aiohttp.ClientResponse) -> str:
    """The next block of an event stream."""
    async with asyncio.timeout(START_TIMEOUT):
        return (await answer.content.readuntil(b"\n\n")).decode()
