"""A primary, its replica, and three sentinels that promote the replica when the primary is gone."""

from __future__ import annotations

import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from redis.asyncio import Redis

from tests.money import until
from tests.system.harness import ValkeyProcess, free_port, running_valkey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SERVICE = "main"
USER, PASSWORD = "watcher", "for/sentinels+only"
"""What the sentinels ask for."""

WATCH = {"down-after-milliseconds": 800, "failover-timeout": 3000, "parallel-syncs": 1}


class SentinelProcess(ValkeyProcess):
    """A sentinel."""

    def arguments(self) -> list[str]:
        """Return its command line behind the program."""
        file = self.directory / "sentinel.conf"
        file.write_text(
            f"port {self.port}\nbind 127.0.0.1\n"
            f"user default off\nuser {USER} on >{PASSWORD} +@all allchannels\n"
            f"sentinel sentinel-user {USER}\nsentinel sentinel-pass {PASSWORD}\n",
            encoding="utf-8",
        )
        return [str(file), "--sentinel"]

    def client(self) -> Redis:
        """Return a client of it."""
        return Redis(port=self.port, username=USER, password=PASSWORD)


class SentinelSet:
    """The servers.

    Attributes:
        url: for the broker.
        primary: the server that is the primary at first.
        replica: the server that replaces it.
        sentinels: the sentinels.
    """

    def __init__(
        self, primary: ValkeyProcess, replica: ValkeyProcess, sentinels: list[SentinelProcess]
    ) -> None:
        self.primary, self.replica, self.sentinels = primary, replica, sentinels
        hosts = ",".join(f"127.0.0.1:{each.port}" for each in sentinels)
        secret = f"sentinel_username={USER}&sentinel_password={quote(PASSWORD, safe='')}"
        self.url = f"redis+sentinel://{hosts}/{SERVICE}/0?{secret}"

    async def start(self) -> None:
        """Let all of them know each other."""
        async with Redis(port=self.replica.port) as replica:
            await replica.replicaof("127.0.0.1", self.primary.port)
        await self.in_step()
        for each in self.sentinels:
            async with each.client() as sentinel:
                await sentinel.sentinel_monitor(SERVICE, "127.0.0.1", self.primary.port, 2)
                for name, value in WATCH.items():
                    await sentinel.sentinel_set(SERVICE, name, value)
        await until(self._all_see_all)

    async def _all_see_all(self) -> bool:
        found: list[Any] = []
        for each in self.sentinels:
            async with each.client() as sentinel:
                found.append(await sentinel.sentinel_master(SERVICE))
        return all(each["num-other-sentinels"] == 2 and each["num-slaves"] == 1 for each in found)

    async def empty(self) -> None:
        """Remove all keys."""
        async with Redis(port=self.primary.port) as primary:
            await primary.flushall()

    async def in_step(self) -> None:
        """Wait until the replica has all that the primary has now."""
        async with Redis(port=self.primary.port) as primary, Redis(port=self.replica.port) as replica:
            wanted = (await primary.info("replication"))["master_repl_offset"]

            async def has_all() -> bool:
                followed = await replica.info("replication")
                return bool(
                    followed.get("master_link_status") == "up" and followed["slave_repl_offset"] >= wanted
                )

            await until(has_all)

    async def fail(self, _: str) -> None:
        """End the primary of a session as a power cut would."""
        self.primary.kill()

    async def is_replaced(self) -> bool:
        """Return True if the replica is the primary now."""
        async with Redis(port=self.replica.port) as replica:
            return bool((await replica.info("replication"))["role"] == "master")


@asynccontextmanager
async def sentinel_set() -> AsyncIterator[SentinelSet]:
    """Run the servers during the block."""
    async with AsyncExitStack() as stack:
        at_once = ["--repl-diskless-sync-delay", "0"]
        primary = await stack.enter_async_context(running_valkey(options=at_once))
        replica = await stack.enter_async_context(running_valkey(options=at_once))
        sentinels = []
        for _ in range(3):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="broker-test-")))
            sentinels.append(SentinelProcess(free_port(), folder))
            stack.callback(sentinels[-1].kill)
            await sentinels[-1].start()
        servers = SentinelSet(primary, replica, sentinels)
        await servers.start()
        yield servers
