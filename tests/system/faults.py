"""The faults of the random walk: workers, Redis and the connections between them, hurt at random and healed again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from redis.exceptions import RedisError

from tests.system.harness import ValkeyProcess

if TYPE_CHECKING:
    from tests.kinds import Servers
    from tests.system.cluster import Cluster, Worker

DRAINED = 30.0
"""Seconds within which a worker that was told to drain must have ended."""


class Trouble(NamedTuple):
    """Something that was wrong for a time.

    Attributes:
        kind: the fault.
        since, until: by the loop's clock.
    """

    kind: str
    since: float
    until: float


async def kill_primary(servers: Servers, random: Random) -> None:
    """End a primary as a power cut would, let its replica replace it, and start it again."""
    assert not isinstance(servers, ValkeyProcess), "it has no replica"
    await servers.fail_over(random.choice(await servers.primaries()))
    await asyncio.sleep(random.uniform(0, 2))
    await servers.heal()


async def freeze_primary(servers: Servers, random: Random, seconds: float) -> None:
    """Freeze a primary, which may be replaced meanwhile, and wait until all servers agree again."""
    assert not isinstance(servers, ValkeyProcess), "it has no replica"
    primary = random.choice(await servers.primaries())
    primary.freeze()
    await asyncio.sleep(seconds)
    primary.thaw()
    await servers.settled()


class Faults:
    """Hurts a cluster until stopped; at any time each worker, and Redis, has one fault at most.

    Args:
        cluster: whom.
        random: what decides.

    Attributes:
        counts: how many there were of each kind.
        troubles: all of them.
        findings: drains that did not end as they should.
    """

    def __init__(self, cluster: Cluster, random: Random) -> None:
        self.counts: Counter[str] = Counter()
        self.troubles: list[Trouble] = []
        self.findings: list[str] = []
        self._cluster = cluster
        self._random = random
        self._hurt: set[object] = set()
        self._loop = asyncio.get_running_loop()

    async def run(self, seconds: float, *, workers: bool, redis: bool, primaries: bool = False) -> None:
        """Hurt for so long, and return when everything is well again."""
        ends_at = self._loop.time() + seconds
        async with asyncio.TaskGroup() as group:
            while self._loop.time() < ends_at:
                await asyncio.sleep(self._random.uniform(0.1, 1.0))
                target, kind, fault = self._choose(workers=workers, redis=redis, primaries=primaries)
                if target not in self._hurt:
                    self._hurt.add(target)
                    group.create_task(self._inflict(target, kind, fault))

    def _choose(
        self, *, workers: bool, redis: bool, primaries: bool
    ) -> tuple[object, str, Callable[[], Awaitable[None]]]:
        worker = self._random.choice(self._cluster.workers)
        hurting_workers: list[tuple[object, str, Callable[[], Awaitable[None]]]] = [
            (worker, "worker killed", lambda: self._kill(worker)),
            (worker, "worker drained", lambda: self._drain(worker)),
            (worker, "worker frozen for long", lambda: self._freeze(worker, 4.5, 9.0)),
        ]
        hurting_redis: list[tuple[object, str, Callable[[], Awaitable[None]]]] = [
            ("redis", "redis killed", self._kill_redis),
            ("redis", "redis frozen", self._freeze_redis),
        ]
        hurting_primaries: list[tuple[object, str, Callable[[], Awaitable[None]]]] = [
            ("redis", "primary killed", self._kill_primary),
            ("redis", "primary frozen", self._freeze_primary),
        ]
        harmless: list[tuple[object, str, Callable[[], Awaitable[None]]]] = [
            (worker, "worker frozen", lambda: self._freeze(worker, 0.1, 2.5)),
            ("redis", "subscriptions cut", lambda: self._cut("pubsub")),
            ("redis", "connections cut", lambda: self._cut("normal")),
        ]
        choices = harmless + (hurting_workers if workers else []) + (hurting_redis if redis else [])
        choices += hurting_primaries if primaries else []
        return self._random.choice(choices)

    async def _inflict(self, target: object, kind: str, fault: Callable[[], Awaitable[None]]) -> None:
        since = self._loop.time()
        try:
            await fault()
        finally:
            self._hurt.discard(target)
            self.counts[kind] += 1
            self.troubles.append(Trouble(kind, since, self._loop.time()))

    async def _kill(self, worker: Worker) -> None:
        await worker.kill()
        await asyncio.sleep(self._random.uniform(0, 3))
        await worker.start(ready="/health/live")

    async def _drain(self, worker: Worker) -> None:
        worker.terminate()
        try:
            status = await worker.ended(DRAINED)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the walk looks for
            self.findings.append(f"a drain did not end: {error!r}")
            await worker.kill()
        else:
            if status != 0:
                self.findings.append(f"a drain ended with status {status}")
        await worker.start(ready="/health/live")

    async def _freeze(self, worker: Worker, least: float, most: float) -> None:
        worker.freeze()
        await asyncio.sleep(self._random.uniform(least, most))
        worker.thaw()

    async def _kill_redis(self) -> None:
        self._cluster.valkey.kill()
        await asyncio.sleep(self._random.uniform(0, 3))
        await self._cluster.valkey.start()

    async def _freeze_redis(self) -> None:
        self._cluster.valkey.freeze()
        await asyncio.sleep(self._random.uniform(0.1, 6))
        self._cluster.valkey.thaw()

    async def _kill_primary(self) -> None:
        await kill_primary(self._cluster.valkey, self._random)

    async def _freeze_primary(self) -> None:
        await freeze_primary(self._cluster.valkey, self._random, self._random.uniform(0.1, 4))

    async def _cut(self, kind: str) -> None:
        try:
            async with self._cluster.redis() as client:
                await client.client_kill_filter(_type=kind, skipme=True)
        except RedisError:
            self.findings.append(f"{kind} connections could not be cut")
