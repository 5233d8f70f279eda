"""Redis as operators run it: a user with few rights, TLS with an own authority, and settings that are wrong."""

from __future__ import annotations

import asyncio
import signal
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest
import redis.asyncio

from tests.secured import make_authority
from tests.servers import server_binary
from tests.system.harness import eventually, free_port, running_broker, running_valkey
from tests.system.proxy import ROOM, prepared
from tests.web.test_redis_rights import rights

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.system.harness import RunningBroker

pytestmark = [pytest.mark.slow, pytest.mark.one_server("its users, certificates and settings")]

EVENTS = {"Accept": "text/event-stream"}


@pytest.mark.parametrize("redis_server", ["valkey", "redis"], indirect=True)
@pytest.mark.usefixtures("redis_server")
async def test_sessions_of_a_dead_worker_end_with_few_rights() -> None:
    async with running_valkey() as valkey, redis.asyncio.Redis(port=valkey.port) as admin:
        words = ("ACL", "SETUSER", "broker", "reset", "on", ">pw", *rights())
        await admin.execute_command(*words)  # type: ignore[no-untyped-call]
        env = {**ROOM, "REDIS_URL": f"redis://broker:pw@127.0.0.1:{valkey.port}/0"}
        async with (
            running_broker(env=env) as owner,
            running_broker(env=env) as other,
            aiohttp.ClientSession() as page,
        ):
            session = await prepared(page, "rehearsal/stall", base=owner.url)
            stream = f"/stream/{session}"
            async with page.get(owner.url + stream, headers=EVENTS) as answer:
                await answer.content.readuntil(b"event: chunk")
                owner.process.send_signal(signal.SIGKILL)
            async with asyncio.timeout(30), page.get(other.url + stream, headers=EVENTS) as answer:
                assert "worker_lost" in await answer.text()
        denied = await admin.execute_command("ACL", "LOG")  # type: ignore[no-untyped-call]
        assert "config|get" in str(denied)  # which shows that the log works
        assert len(denied) == 1, denied


@asynccontextmanager
async def redis_with_tls(folder: Path) -> AsyncIterator[int]:
    """Run the system's Redis, which accepts only clients with a certificate of its authority; gives its port."""
    port = free_port()
    options = {"port": "0", "tls-port": str(port), "bind": "127.0.0.1", "save": "", "tls-auth-clients": "yes"}
    options |= {"tls-ca-cert-file": "ca.crt", "tls-cert-file": "server.crt", "tls-key-file": "server.key"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    process = await asyncio.create_subprocess_exec(
        server_binary("redis"), *words, cwd=folder, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20):
            await process.stdout.readuntil(b"Ready to accept connections")
        yield port
    finally:
        process.kill()
        await process.communicate()


def _says(broker: RunningBroker, text: str) -> bool:
    return text in broker.log()


async def test_redis_over_tls_with_an_own_authority(tmp_path: Path) -> None:
    make_authority(tmp_path)
    files = f"ssl_certfile={tmp_path}/client.crt&ssl_keyfile={tmp_path}/client.key"
    async with redis_with_tls(tmp_path) as port:
        url = f"rediss://127.0.0.1:{port}/0"
        complete = {"REDIS_URL": f"{url}?ssl_ca_certs={tmp_path}/ca.crt&{files}"}
        async with running_broker(env=complete) as broker, aiohttp.ClientSession(broker.url) as page:
            session = await prepared(page, "rehearsal/fast")
            async with page.get(f"/stream/{session}", headers=EVENTS) as answer:
                assert "event: done" in await answer.text()
        wrong = {
            f"{url}?{files}": "CERTIFICATE_VERIFY_FAILED",
            f"{url}?ssl_ca_certs={tmp_path}/ca.crt": "certificate required",
        }
        for broken, why in wrong.items():
            async with running_broker(env={"REDIS_URL": broken}, ready="/health/live") as broker:
                await eventually(partial(_says, broker, why))


@pytest.mark.parametrize(
    ("user", "why"), [("broker:wrong", "AuthenticationError"), ("nobody:pw", "AuthenticationError")]
)
async def test_a_wrong_password_is_named_in_the_log(user: str, why: str) -> None:
    async with running_valkey() as valkey, redis.asyncio.Redis(port=valkey.port) as admin:
        await admin.execute_command("ACL", "SETUSER", "broker", "on", ">pw", *rights())  # type: ignore[no-untyped-call]
        env = {"REDIS_URL": f"redis://{user}@127.0.0.1:{valkey.port}/0"}
        async with running_broker(env=env, ready="/health/live") as broker:
            await eventually(lambda: why in broker.log())
            assert "wrong@" not in broker.log()
