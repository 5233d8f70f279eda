"""A client of the servers behind a URL of Redis, for tests that look at what is stored there."""

from __future__ import annotations

import gc
import warnings
from typing import TYPE_CHECKING, Any, cast

from redis.asyncio import Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster

from broker.core.redis_url import Kind, Servers
from broker.store.connection import Store
from broker.store.servers import Address, SentinelPool

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection


class PrimaryPool(SentinelPool):
    """The connections to the primary that sentinels name, which nobody counts."""

    def __init__(self, address: Address, several: Servers) -> None:
        super().__init__(address, several, self._ignore)

    async def _ignore(self, _: AbstractConnection) -> None:
        pass


class PrimaryOfSentinels(Redis):
    """A client of the primary that sentinels name. Its pool is its own."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close all connections, those to sentinels too."""
        await super().aclose(close_connection_pool)
        await self.connection_pool.aclose()


OF_ALL = frozenset({"CONFIG SET", "ACL SETUSER", "ACL DELUSER", "CLIENT KILL"})
"""Commands about servers, and not about what is stored."""


class AllPrimaries(RedisCluster):
    """A client of a cluster whose commands without a key are about the whole of it, as on one server."""

    async def keys(self, pattern: Any = "*", **_: Any) -> Any:
        """Return the keys of all primaries."""
        return list(dict.fromkeys([key async for key in self.scan_iter(pattern)]))

    async def dbsize(self, **_: Any) -> Any:
        """Return the number of keys of all primaries."""
        return len(await self.keys())

    async def pubsub_channels(self, pattern: Any = "*", **_: Any) -> Any:
        """Return the channels of all primaries; those of workers are sharded in a cluster."""
        return await self.pubsub_shardchannels(pattern, target_nodes=self.PRIMARIES)

    async def pubsub_numsub(self, *channels: Any, **_: Any) -> Any:
        """Return how many listen to sharded channels."""
        return await self.pubsub_shardnumsub(*channels, target_nodes=self.PRIMARIES)

    async def publish(self, channel: Any, message: Any, **_: Any) -> Any:
        """Send a message to a sharded channel."""
        return await self.spublish(channel, message)

    async def aclose(self) -> None:
        """Close all connections. The lost ones are freed too."""
        await super().aclose()
        free_lost_connections()

    async def execute_command(self, *words: Any, **options: Any) -> Any:
        """Run a command, on all nodes if it is about the servers themselves."""
        if words[0] in OF_ALL:
            options.setdefault("target_nodes", self.ALL_NODES)
        return await super().execute_command(*words, **options)


def free_lost_connections() -> None:
    """Free the connections that the library has lost, so that no other test fails because of them.

    The library may lose a connection if a command is cancelled, or the closing of its client.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


async def info_of_all(redis: Redis, section: str) -> list[dict[str, Any]]:
    """Return a section of INFO of each primary."""
    client: Any = redis
    if not isinstance(client, AllPrimaries):
        return [await client.info(section)]
    found = await client.info(section, target_nodes=client.PRIMARIES)
    return list(found.values())


def client_of(url: str) -> Redis:
    """Return a client of one server, of the primary of a Sentinel set, or of all primaries of a cluster; close it."""
    address = Address.parse(url)
    several = address.several
    if several is None:
        return Redis.from_url(url, protocol=2)
    if several.kind is Kind.SENTINEL:
        return PrimaryOfSentinels(connection_pool=PrimaryPool(address, several))
    return cast(
        "Redis", AllPrimaries(startup_nodes=[ClusterNode(*host) for host in several.hosts], protocol=2)
    )


class SeenStore(Store):
    """A store whose attribute `redis` sees all that is stored, on several servers too."""

    def __init__(self, url: str, *others: Any, **options: Any) -> None:
        super().__init__(url, *others, **options)
        self._seen = client_of(url)

    @property
    def redis(self) -> Redis:
        """A client of all primaries."""
        return self._seen

    async def close(self) -> None:
        """Close all connections."""
        await self._seen.aclose()
        await super().close()
