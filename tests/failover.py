"""Two Redis servers behind one stable name, as a hosted Redis has them: a primary, a replica, and a failover."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from redis.asyncio import Redis

from tests.money import let_time_pass, until
from tests.system.harness import ValkeyProcess, running_valkey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class StableName:
    """An address that leads to the primary, and after a failover to what was its replica.

    Attributes:
        url: the address.
    """

    def __init__(self, primary: ValkeyProcess, replica: ValkeyProcess) -> None:
        self.url = ""
        self._primary, self._replica = primary, replica
        self._leads_to = primary
        self._connections: set[asyncio.Task[None]] = set()

    async def replicate(self) -> None:
        """Let the replica follow the primary, and wait until it has all that the primary has."""
        async with Redis.from_url(self._replica.url) as replica, Redis.from_url(self._primary.url) as primary:
            await replica.replicaof("127.0.0.1", self._primary.port)

            async def has_all() -> bool:
                told, followed = await primary.info("replication"), await replica.info("replication")
                return bool(
                    followed.get("master_link_status") == "up"
                    and told["master_repl_offset"] == followed.get("slave_repl_offset")
                )

            await until(has_all, within=20)

    async def stop_replicating(self) -> None:
        """From now on the replica misses what is written: those are the last writes, which a failover forgets."""
        async with Redis.from_url(self._replica.url) as replica:
            await replica.replicaof("NO", "ONE")

    async def are_renewed(self, count: int) -> None:
        """Wait until so many reservations are renewed in the replica."""
        async with Redis.from_url(self._replica.url) as replica:

            async def renewed() -> bool:
                now_ms = (await replica.time())[0] * 1000
                keys = await replica.keys("*:{a*}:open")
                return sum([await replica.zcount(key, now_ms, "inf") for key in keys]) == count

            await until(renewed)

    async def let_renewals_be_missed(self) -> None:
        """Let the replica have missed the last renewals of all reservations."""
        async with Redis.from_url(self._replica.url) as replica:
            await let_time_pass(replica, "open")

    async def state_in_replica(self, session_id: str) -> str:
        """What the replica knows of a session."""
        async with Redis.from_url(self._replica.url) as replica:
            [key] = await replica.keys(f"*:session:{{{session_id}}}")
            state: Any = await replica.hget(key, "state")
            return str(state.decode())

    def fail_over(self) -> None:
        """The primary is gone, and the name leads to the replica."""
        self._primary.kill()
        self._leads_to = self._replica
        for connection in self._connections:
            connection.cancel()

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection to its end."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        with suppress(OSError, asyncio.CancelledError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._leads_to.port)
            with suppress(asyncio.CancelledError):
                await asyncio.gather(_pipe(reader, far_writer), _pipe(far_reader, writer))
            far_writer.close()
        writer.close()

    async def close(self) -> None:
        """Cut every connection."""
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def primary_and_replica() -> AsyncIterator[StableName]:
    """Run two servers and the name that leads to them, until the block ends."""
    async with running_valkey() as primary, running_valkey() as replica:
        name = StableName(primary, replica)
        await name.replicate()
        server = await asyncio.start_server(name.connected, "127.0.0.1", 0)
        name.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
        try:
            yield name
        finally:
            server.close()
            await name.close()
