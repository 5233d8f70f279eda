"""A primary, its replica, and three sentinels that promote the replica when the primary is gone."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.money import until
from tests.redis_client import client_of
from tests.system.harness import ValkeyProcess, free_port, running_valkey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

SERVICE = "main"
USER, PASSWORD = "watcher", "for/sentinels+only"
"""What the sentinels ask for."""

FAILOVER = 40.0
"""Seconds within which a replica must have been promoted; sentinels wait between two attempts."""

DOWN_AFTER_MS = 800
"""Milliseconds of silence after which a primary is replaced."""


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


WATCH: Mapping[str, Any] = {
    "down-after-milliseconds": DOWN_AFTER_MS,
    "failover-timeout": 3000,
    "parallel-syncs": 1,
}
"""How the sentinels watch the primary."""


async def replication_of(server: ValkeyProcess) -> dict[str, Any]:
    """Return what a server says of its role; nothing if it closes the connection, as one does whose role changes."""
    async with server.client() as client:
        try:
            found: dict[str, Any] = await client.info("replication")
        except RedisConnectionError:
            return {}
        return found


class SentinelSet:
    """The servers.

    Attributes:
        url: for the broker.
        primary: the server that is the primary at first.
        replica: the server that replaces it.
        sentinels: the sentinels.
        watch: how they watch the primary.
    """

    watch: Mapping[str, Any] = WATCH

    def __init__(
        self,
        primary: ValkeyProcess,
        replica: ValkeyProcess,
        sentinels: list[SentinelProcess],
        down_after_ms: int = DOWN_AFTER_MS,
    ) -> None:
        self.primary, self.replica, self.sentinels = primary, replica, sentinels
        self.watch = {**self.watch, "down-after-milliseconds": down_after_ms}
        hosts = ",".join(f"127.0.0.1:{each.port}" for each in sentinels)
        secret = f"sentinel_username={USER}&sentinel_password={quote(PASSWORD, safe='')}"
        self.url = f"redis+sentinel://{hosts}/{SERVICE}/0?{secret}"

    @property
    def _all(self) -> list[ValkeyProcess]:
        return [*self.sentinels, self.primary, self.replica]

    @property
    def is_running(self) -> bool:
        """True between a start and a kill of all."""
        return self.primary.is_running or self.replica.is_running

    @property
    def pids(self) -> list[int]:
        """The processes that run."""
        return [pid for each in self._all for pid in each.pids]

    def freeze(self) -> None:
        """Freeze all of them, so that none replaces another."""
        for each in self._all:
            each.freeze()

    def thaw(self) -> None:
        """Let all of them go on where they were frozen."""
        for each in reversed(self._all):
            each.thaw()

    def kill(self) -> None:
        """End all of them as a power cut would."""
        for each in self._all:
            each.kill()

    async def start(self) -> None:
        """Start the servers that do not run, and connect all of them. The first primary becomes the primary again."""
        await asyncio.gather(*(each.start() for each in self._all if not each.is_running))
        async with self.replica.client() as replica:
            await replica.replicaof("127.0.0.1", self.primary.port)
        await self.in_step()
        for each in self.sentinels:
            async with each.client() as sentinel:
                await sentinel.sentinel_monitor(SERVICE, "127.0.0.1", self.primary.port, 2)
                for name, value in self.watch.items():
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
        async with self.client() as client:
            await client.flushall()

    def client(self) -> Redis:
        """Return a client of the primary, whichever that is; close it."""
        return client_of(self.url)

    async def in_step(self) -> None:
        """Wait until the replica has all that the primary has now."""
        async with self.primary.client() as primary:
            wanted = (await primary.info("replication"))["master_repl_offset"]

        async def has_all() -> bool:
            followed = await replication_of(self.replica)
            return bool(
                followed.get("master_link_status") == "up" and followed["slave_repl_offset"] >= wanted
            )

        await until(has_all)

    async def primaries(self) -> list[ValkeyProcess]:
        """Return what is the primary now."""
        return [self.primary]

    async def fail_over(self, primary: ValkeyProcess) -> None:
        """End the primary as a power cut would, and wait until its replica has been promoted."""
        primary.kill()
        await until(self._is_told, within=FAILOVER)

    async def _is_told(self) -> bool:
        """Return True if all sentinels name the replica as the primary, and it agrees."""
        return await self._named() == {self.replica.port} and await self.is_replaced()

    async def _named(self) -> set[int]:
        """Return the ports of the servers that the sentinels name as the primary."""
        found: set[int] = set()
        for each in self.sentinels:
            async with each.client() as sentinel:
                state: Any = await sentinel.sentinel_master(SERVICE)
                found.add(int(state["port"]))
        return found

    async def settled(self) -> None:
        """Wait until all agree on the primary, and the other one follows it, as after a freeze."""
        await until(self._agree, within=FAILOVER)
        await self.in_step()

    async def _agree(self) -> bool:
        named = await self._named()
        if named == {self.replica.port}:
            self.primary, self.replica = self.replica, self.primary
        leads, follows = await replication_of(self.primary), await replication_of(self.replica)
        return bool(
            named == {self.primary.port}
            and leads.get("role") == "master"
            and follows.get("role") == "slave"
            and follows["master_port"] == self.primary.port
        )

    async def heal(self) -> None:
        """Start the server again that was ended. It follows the one that has replaced it."""
        self.primary, self.replica = self.replica, self.primary
        await self.replica.start()
        async with Redis(port=self.replica.port) as replica:
            await replica.replicaof("127.0.0.1", self.primary.port)
        await self.in_step()

    async def fail(self, _: str) -> None:
        """End the primary of a session as a power cut would."""
        self.primary.kill()

    async def is_replaced_for(self, _: ValkeyProcess) -> bool:
        """Return True if the replica is the primary now, and does not follow the one that is frozen."""
        return await self.is_replaced()

    async def is_replaced(self) -> bool:
        """Return True if the replica is the primary now."""
        return bool((await replication_of(self.replica)).get("role") == "master")


@asynccontextmanager
async def sentinel_set(
    *, keeps: bool = False, down_after_ms: int = DOWN_AFTER_MS
) -> AsyncIterator[SentinelSet]:
    """Run the servers during the block; with ``keeps`` they survive a power cut."""
    async with AsyncExitStack() as stack:
        at_once = ["--repl-diskless-sync-delay", "0"]
        primary = await stack.enter_async_context(running_valkey(keeps=keeps, options=at_once))
        replica = await stack.enter_async_context(running_valkey(keeps=keeps, options=at_once))
        sentinels = []
        for _ in range(3):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="broker-test-")))
            sentinels.append(SentinelProcess(free_port(), folder))
            stack.callback(sentinels[-1].kill)
        servers = SentinelSet(primary, replica, sentinels, down_after_ms)
        await servers.start()
        yield servers
