"""The shipped Caddyfile in a real Caddy."""

from __future__ import annotations

import asyncio
import os
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest

from tests.system.harness import POLL_INTERVAL, START_TIMEOUT, free_port
from tests.system.proxy import Proxy, program

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CADDYFILE = Path(__file__).parents[2] / "deploy" / "caddy" / "Caddyfile"
OWN_CERTIFICATE = "\tskip_install_trust\n\tauto_https disable_redirects\n\tadmin off\n"


@asynccontextmanager
async def running_caddy(*brokers: int) -> AsyncIterator[Proxy]:
    """Run it before the brokers on these ports; where one of the two is not given, nobody listens."""
    first, second = (*brokers, free_port(), free_port())[:2]
    port = free_port()
    text = CADDYFILE.read_text()
    assert text.count("\tadmin off\n") == 1
    with tempfile.TemporaryDirectory(prefix="broker-test-") as name:
        directory = Path(name)
        (directory / "Caddyfile").write_text(text.replace("\tadmin off\n", OWN_CERTIFICATE))
        env = {
            "PATH": os.environ["PATH"],
            "HOME": name,
            "XDG_DATA_HOME": name,
            "BROKER_SITE": f"https://localhost:{port}",
            "BROKERS": f"127.0.0.1:{first} 127.0.0.1:{second}",
        }
        command = [program("caddy"), "run", "--adapter", "caddyfile", "--config", "Caddyfile"]
        with (directory / "out").open("ab") as out, (directory / "err").open("ab") as err:
            process = await asyncio.create_subprocess_exec(
                *command, cwd=directory, env=env, stdout=out, stderr=err
            )
        try:
            connector = aiohttp.TCPConnector(ssl=False)
            async with aiohttp.ClientSession(f"https://localhost:{port}", connector=connector) as page:
                proxy = Proxy(port, directory, page, host="localhost")
                await _answers(proxy, process)
                yield proxy
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def _answers(proxy: Proxy, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(START_TIMEOUT):
        while process.returncode is None:
            try:
                async with proxy.page.get("/metrics") as answer:
                    assert answer.status == 404
                    return
            except aiohttp.ClientError:
                await asyncio.sleep(POLL_INTERVAL)
    pytest.fail(f"caddy has ended:\n{proxy.said()}")
