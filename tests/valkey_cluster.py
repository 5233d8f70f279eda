"""A Redis Cluster of three primaries with a replica each, which can lose a primary and move slots."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from redis.crc import key_slot

from tests.money import until
from tests.redis_client import client_of
from tests.system.harness import ValkeyProcess, free_port, running_valkey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio import Redis

PRIMARIES = 3
SLOTS = 16384
FAILOVER = 40.0
"""Seconds within which a replica must have been promoted."""

DOWN_AFTER_MS = 800
"""Milliseconds of silence after which a primary is replaced."""

OPTIONS = (
    *("--cluster-enabled", "yes"),
    *("--cluster-replica-validity-factor", "0"),
    *("--repl-diskless-sync-delay", "0"),
)


async def ask(node: ValkeyProcess, *words: Any) -> Any:
    """Run a command on this very node, and return its reply."""
    async with node.client() as client:
        return await client.execute_command(*words)  # type: ignore[no-untyped-call]  # as the library has it


class ValkeyCluster:
    """The servers.

    Attributes:
        url: for the broker.
        nodes: the servers; the first three are the primaries at first, each of the others replicates one of them.
        failed: the server that was ended by `fail`.
    """

    def __init__(self, nodes: list[ValkeyProcess]) -> None:
        self.nodes = nodes
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes[:PRIMARIES])
        self.failed: ValkeyProcess | None = None

    @property
    def is_running(self) -> bool:
        """True between a start and a kill of all."""
        return any(node.is_running for node in self.nodes)

    @property
    def pids(self) -> list[int]:
        """The processes that run."""
        return [pid for each in self.nodes for pid in each.pids]

    def freeze(self) -> None:
        """Freeze all of them, so that none replaces another."""
        for node in reversed(self.nodes):
            node.freeze()

    def thaw(self) -> None:
        """Let all of them go on where they were frozen."""
        for node in self.nodes:
            node.thaw()

    def kill(self) -> None:
        """End all of them as a power cut would."""
        for node in reversed(self.nodes):
            node.kill()

    async def start(self) -> None:
        """Start the nodes that do not run. A file tells each the other nodes and their slots."""
        await asyncio.gather(*(node.start() for node in self.nodes if not node.is_running))
        await until(self.is_healthy)

    def client(self) -> Redis:
        """Return a client of all primaries; close it."""
        return client_of(self.url)

    async def found(self) -> None:
        """Let all of them know each other, and spread the slots."""
        share = SLOTS // PRIMARIES + 1
        for number, node in enumerate(self.nodes):
            if number < PRIMARIES:
                first, last = number * share, min(SLOTS, (number + 1) * share) - 1
                await ask(node, "CLUSTER", "ADDSLOTSRANGE", first, last)
            await ask(node, "CLUSTER", "MEET", "127.0.0.1", self.nodes[0].port, self.nodes[0].options[-1])
        await until(self._knows_all)
        for replica, primary in zip(self.nodes[PRIMARIES:], self.nodes, strict=False):
            await ask(replica, "CLUSTER", "REPLICATE", await self.id_of(primary))
        await until(self.is_healthy)

    async def _knows_all(self) -> bool:
        known = [await self._facts(node) for node in self.nodes]
        return all(each[b"cluster_known_nodes"] == str(len(self.nodes)).encode() for each in known)

    async def is_healthy(self) -> bool:
        """Return True if every node sees all slots served, and every replica is connected."""
        for node in self.nodes:
            if node.process is None:
                continue
            if (await self._facts(node))[b"cluster_state"] != b"ok":
                return False
            role = await ask(node, "ROLE")
            if role[0] == b"slave" and role[3] != b"connected":
                return False
        return True

    async def _facts(self, node: ValkeyProcess) -> dict[bytes, bytes]:
        pairs = (line.partition(b":") for line in (await ask(node, "CLUSTER", "INFO")).split())
        return {name: value for name, _, value in pairs}

    async def id_of(self, node: ValkeyProcess) -> str:
        """Return the name of a node in the cluster."""
        return str((await ask(node, "CLUSTER", "MYID")).decode())

    async def serving(self, key: str) -> ValkeyProcess:
        """Return the node that serves a key."""
        slot = key_slot(key.encode())
        for node in self.nodes:
            if node.process is None:
                continue
            ranges = await ask(node, "CLUSTER", "SLOTS")
            for first, last, (_, port, *_), *_ in ranges:
                if first <= slot <= last:
                    return next(each for each in self.nodes if each.port == port)
        raise AssertionError(key)

    async def in_step(self) -> None:
        """Wait until every replica has all that its primary has now."""
        for node in await self.primaries():
            wanted = (await self._replication(node))["master_repl_offset"]

            async def has_all(node: ValkeyProcess = node, wanted: int = wanted) -> bool:
                told = await self._replication(node)
                replicas = [told[f"slave{n}"]["offset"] for n in range(told["connected_slaves"])]
                return min(replicas, default=wanted) >= wanted

            await until(has_all)

    async def _replication(self, node: ValkeyProcess) -> Any:
        async with node.client() as client:
            return await client.info("replication")

    async def fail(self, session: str) -> None:
        """End the primary of a session as a power cut would."""
        self.lose(await self.serving(f"{{{session}}}"))

    def lose(self, primary: ValkeyProcess) -> None:
        """End a primary as a power cut would."""
        self.failed = primary
        primary.kill()

    async def fail_over(self, primary: ValkeyProcess) -> None:
        """End a primary as a power cut would, and wait until its replica has been promoted."""
        self.lose(primary)
        await until(self.is_replaced, within=FAILOVER)

    async def settled(self) -> None:
        """Wait until all slots are served and every replica is connected, as after a freeze."""
        await until(self.is_healthy, within=FAILOVER)
        await self.in_step()

    async def is_replaced(self) -> bool:
        """Return True if all slots are served again."""
        return await self._are_served_by([node for node in self.nodes if node.process is not None])

    async def is_replaced_for(self, frozen: ValkeyProcess) -> bool:
        """Return True if all others agree that this node, which does not answer, serves nothing any more."""
        return await self._are_served_by([node for node in self.nodes if node is not frozen])

    async def _are_served_by(self, alive: list[ValkeyProcess]) -> bool:
        for node in alive:
            if (await self._facts(node))[b"cluster_state"] != b"ok":
                return False
            ranges = await ask(node, "CLUSTER", "SLOTS")
            if not {port for _, _, (_, port, *_), *_ in ranges} <= {each.port for each in alive}:
                return False
        return True

    async def heal(self) -> None:
        """Start the server again that was ended. It follows the one that has replaced it."""
        if self.failed is not None:
            await self.failed.start()
            self.failed = None
            await until(self.is_healthy)

    async def move(self, key: str) -> None:
        """Move the slot of a key to another primary, key by key, as `valkey-cli --cluster reshard` does."""
        slot = key_slot(key.encode())
        old = await self.serving(key)
        new = next(node for node in await self.primaries() if node is not old)
        await self.mark(slot, old, new)
        await self.finish_move(slot, old, new)

    async def mark(self, slot: int, old: ValkeyProcess, new: ValkeyProcess) -> None:
        """Let a slot be about to move."""
        await ask(new, "CLUSTER", "SETSLOT", slot, "IMPORTING", await self.id_of(old))
        await ask(old, "CLUSTER", "SETSLOT", slot, "MIGRATING", await self.id_of(new))

    async def move_key(self, key: str | bytes, old: ValkeyProcess, new: ValkeyProcess) -> None:
        """Move one key of such a slot."""
        await ask(old, "MIGRATE", "127.0.0.1", new.port, key, 0, 5000)

    async def finish_move(self, slot: int, old: ValkeyProcess, new: ValkeyProcess) -> None:
        """Move all keys of such a slot, and then the slot."""
        while keys := await ask(old, "CLUSTER", "GETKEYSINSLOT", slot, 1):
            await self.move_key(keys[0], old, new)
        for node in (new, old):
            await ask(node, "CLUSTER", "SETSLOT", slot, "NODE", await self.id_of(new))

    async def primaries(self) -> list[ValkeyProcess]:
        """Return the primaries that run."""
        return [node for node in self.nodes if await self._is_primary(node)]

    async def _is_primary(self, node: ValkeyProcess) -> bool:
        return node.process is not None and (await self._replication(node))["role"] == "master"

    async def empty(self) -> None:
        """Remove all keys."""
        for node in await self.primaries():
            await ask(node, "FLUSHALL")


@asynccontextmanager
async def valkey_cluster(
    *, keeps: bool = False, down_after_ms: int = DOWN_AFTER_MS
) -> AsyncIterator[ValkeyCluster]:
    """Run the servers during the block; with ``keeps`` they survive a power cut."""
    options = [*OPTIONS, "--cluster-node-timeout", str(down_after_ms)]
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(
                running_valkey(keeps=keeps, options=[*options, "--cluster-port", str(free_port())])
            )
            for _ in range(2 * PRIMARIES)
        ]
        cluster = ValkeyCluster(nodes)
        await cluster.found()
        yield cluster


@asynccontextmanager
async def one_address() -> AsyncIterator[ValkeyProcess]:
    """Run a server that is known by one address and refuses a call with keys of several slots, as some services do."""
    async with running_valkey(options=("--cluster-enabled", "yes")) as server:
        await ask(server, "CLUSTER", "ADDSLOTSRANGE", 0, SLOTS - 1)

        async def serves() -> bool:
            return b"cluster_state:ok" in await ask(server, "CLUSTER", "INFO")

        await until(serves)
        yield server
