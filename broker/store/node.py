"""One server of Redis or Valkey: its connections, and the calls that are sent on them.

Small calls share one connection (`shared_connection`), and large ones another, so that they hold up no small one. A
call that Redis may answer much later, or that is very large, has a connection of its own, from the pool of the client
library.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    ClusterCrossSlotError,
    MasterDownError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from broker.store.shared_connection import MAX_UNSENT, SharedConnection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from redis.asyncio.client import PubSub
    from redis.asyncio.connection import AbstractConnection, Connection
    from redis.credentials import CredentialProvider

    from broker.store.call import Call

LOADING = 0.5
"""Seconds that calls may take longer when the scripts must be loaded first."""

CONNECT_TIMEOUT = 1.0
"""Maximum seconds in which a connection is opened, and of the wait for a free one."""

MAX_CONNECTIONS = 64
"""Maximum connections of a worker to a server. Commands take microseconds; more would only move the queue there."""

MAX_SMALL = 64 * 1024
"""Maximum bytes of a small call."""

MAX_LARGE = MAX_UNSENT
"""Maximum bytes of a large call. A larger one would hold up the other large ones: they are the journals."""


class Pool(BlockingConnectionPool):
    """A pool of the client library, with our bounds.

    Args:
        options: where and how to connect, as the library names it.
        credentials: what a new connection shows; None for nothing, for a server refuses what it does not expect.
        on_connect: is called for every new connection, including those that replace a lost one; a method of an object
            that lives as long as the pool, or None.
    """

    def __init__(
        self,
        options: dict[str, Any],
        credentials: CredentialProvider | None,
        on_connect: Callable[[AbstractConnection], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(
            **options,
            credential_provider=credentials,
            max_connections=MAX_CONNECTIONS,
            timeout=CONNECT_TIMEOUT,
            # The library would bound each read and write by asyncio.wait_for, which before Python 3.12 swallows a
            # cancellation that comes as the write completes. Each of our calls has a bound of its own.
            socket_timeout=None,
            socket_connect_timeout=CONNECT_TIMEOUT,
            retry=no_retry(),
            protocol=2,
            driver_info=None,
        )
        self._on_connect = on_connect

    def make_connection(self) -> AbstractConnection:
        """Make a connection. It is opened at its first use."""
        connection: AbstractConnection = super().make_connection()  # type: ignore[no-untyped-call]  # as it has it
        if self._on_connect is not None:
            connection.register_connect_callback(self._on_connect)  # type: ignore[no-untyped-call]  # as it has it
        return connection

    async def release(self, connection: AbstractConnection) -> None:
        """Take a connection back. One that is closed is dropped: it would use the old certificates again."""
        await super().release(connection)
        if not connection.is_connected and connection in self._available_connections:
            self._available_connections.remove(connection)

    async def find_primary(self) -> tuple[str, int] | None:
        """Return host and port of the server that all connections have to lead to; None if it is not known."""
        return None

    async def close_others(self, primary: tuple[str, int]) -> None:
        """Close all connections that lead to another server, without waiting for it. Calls on them fail."""
        for connection in (*self._available_connections, *self._in_use_connections):
            if address_of(connection) != primary:
                await connection.disconnect(nowait=True)

    async def close_idle(self) -> None:
        """Close the connections that nobody uses, without waiting for the server: it may not answer."""
        idle, self._available_connections = self._available_connections, []
        for connection in idle:
            await connection.disconnect(nowait=True)


def address_of(connection: AbstractConnection | None) -> tuple[str, int]:
    """Return host and port of the server that a TCP connection leads to."""
    tcp = cast("Connection", connection)
    return str(tcp.host), int(tcp.port)


def no_retry() -> Retry:
    """Return the rule of the library by which it repeats nothing: a command could take effect twice."""
    return Retry(NoBackoff(), 0)


class _Line:
    """A shared connection, which is opened when it is first needed, and again after it was lost.

    Args:
        pool: opens it.

    Attributes:
        connection: the newest one; None before the first.
    """

    def __init__(self, pool: Pool) -> None:
        self.connection: SharedConnection | None = None
        self._pool = pool
        self._opened_by: AbstractConnection | None = None
        self._opening: asyncio.Future[SharedConnection | Exception] | None = None
        self._holders: set[asyncio.Task[None]] = set()

    async def open(self) -> SharedConnection:
        """Return a new connection. All who need one at the same time wait for the same attempt to open it.

        Raises:
            RedisError, OSError, TimeoutError: it cannot be opened.
        """
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_future()
            holder = asyncio.create_task(self._hold(self._opening), name="shared connection")
            self._holders.add(holder)
            holder.add_done_callback(self._holders.discard)
        opened = await asyncio.shield(self._opening)
        if isinstance(opened, Exception):
            raise opened
        return opened

    async def _hold(self, opening: asyncio.Future[SharedConnection | Exception]) -> None:
        """Open a connection, and have the library close it when it is lost or not used any more."""
        connection = self._pool.make_connection()
        try:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    await connection.connect()  # type: ignore[no-untyped-call]  # as the library has it
                shared = self.connection = SharedConnection(connection)
                self._opened_by = connection
            except (RedisError, OSError, TimeoutError) as error:
                opening.set_result(error)
                return
            finally:
                self._opening = None
            opening.set_result(shared)
            try:
                await shared.closed
            finally:
                shared.close()
        finally:
            await connection.disconnect(nowait=True)

    def leave_others(self, primary: tuple[str, int]) -> None:
        """Close the connection if it leads to another server."""
        if self.connection is not None and address_of(self._opened_by) != primary:
            self.connection.close()

    async def close(self) -> None:
        """Close all connections."""
        for holder in self._holders:
            holder.cancel()
        await asyncio.gather(*self._holders, return_exceptions=True)


class Node:
    """One server, or the primary among several that a Sentinel watches.

    Args:
        pool: opens the connections.
        scripts: returns the calls that load all scripts.

    Attributes:
        redis: the client of the library, for subscriptions.
    """

    def __init__(self, pool: Pool, scripts: Callable[[], list[Call]]) -> None:
        self.redis: Redis = Redis(connection_pool=pool)
        self._pool = pool
        self._scripts = scripts
        self._small = _Line(pool)
        self._large = _Line(pool)
        self._takes_any_keys = True

    @property
    def is_lost(self) -> bool:
        """True if the next small call opens a connection in place of one that was lost, perhaps to another server."""
        return self._small.connection is not None and self._small.connection.retired

    @property
    def is_prompt(self) -> bool:
        """True if a connection is open, and no small call waits on it for long."""
        return self._small.connection is not None and self._small.connection.is_prompt

    @property
    def takes_any_keys(self) -> bool:
        """True unless the server has refused a call with keys of several slots, because it stands for a cluster."""
        return self._takes_any_keys

    async def run(self, calls: Sequence[Call], give_up_at: float) -> list[Any]:
        """Send calls as `send` does, and load the scripts if the server does not know one.

        That may take `LOADING` seconds longer: two more round trips, and a server that has just been started.
        """
        replies = await self.send(calls, give_up_at)
        for reply in replies:
            if isinstance(reply, NoScriptError):  # the server is new, or was restarted
                return await self._run_again(calls, replies, give_up_at)
        return replies

    async def _run_again(self, calls: Sequence[Call], replies: list[Any], give_up_at: float) -> list[Any]:
        """Load all scripts, run those calls again whose script was not known, and return all replies."""
        unknown = [n for n, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        loads = self._scripts()
        again = await self.send([*loads, *(calls[n] for n in unknown)], give_up_at + LOADING)
        found = dict(zip(unknown, again[len(loads) :], strict=True))
        return [found.get(n, reply) for n, reply in enumerate(replies)]

    async def send(self, calls: Sequence[Call], give_up_at: float) -> list[Any]:
        """Send calls in this order. Returns their replies; that of a refused one is an error.

        Args:
            calls: the calls.
            give_up_at: the time of the event loop until which the replies are waited for.

        Raises:
            RedisError, OSError, TimeoutError: the server does not answer. Some calls may have run or may still run.
        """
        if not calls:
            return []
        joined = b"".join([call.packed for call in calls])
        replies = used = None
        if len(joined) <= MAX_LARGE and True not in [call.alone for call in calls]:
            line = self._small if len(joined) <= MAX_SMALL else self._large
            shared = line.connection
            if shared is None or shared.retired:
                async with asyncio.timeout_at(give_up_at):
                    shared = await line.open()
            if shared.takes_calls:
                used = shared
                replies = await shared.ask(joined, len(calls), give_up_at)
        if replies is None:
            async with asyncio.timeout_at(give_up_at):
                replies = await self._send_alone(joined, len(calls))
        for reply in replies:
            if isinstance(reply, Exception):
                await self._note_error(reply, used)
        return replies

    async def _note_error(self, error: Exception, used: SharedConnection | None) -> None:
        """Use other connections if those there are lead to a server that cannot serve us.

        Args:
            error: the reply to a call.
            used: the shared connection of the call, None if it had one of its own.

        Raises:
            Exception: the error, if no command was answered, or none can be.
        """
        if isinstance(error, ClusterCrossSlotError):
            self._takes_any_keys = False
        answered = isinstance(error, ResponseError)
        if not answered or isinstance(error, ReadOnlyError | MasterDownError):
            # Connections that were opened after this one may lead to another server.
            if used in (None, self._small.connection, self._large.connection):
                await self._pool.close_idle()
            if used is not None:
                used.retire()
        if not answered:
            raise error

    async def _send_alone(self, joined: bytes, count: int) -> list[Any]:
        """Write so many packed commands to a connection of their own, and read their replies."""
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]  # as the library has it
        try:
            await connection.send_packed_command([joined])
            replies = [await _read_reply(connection) for _ in range(count)]
            if any(isinstance(reply, ReadOnlyError | MasterDownError) for reply in replies):
                await connection.disconnect(nowait=True)
            return replies
        finally:
            await asyncio.shield(self._pool.release(connection))  # a second cancel must not lose a connection

    async def leave_old_primary(self) -> None:
        """Close all connections that lead to another server than the primary.

        An old primary that was frozen or cut off accepts, until a Sentinel has told it that it is replaced, what will
        be lost.
        """
        primary = await self._pool.find_primary()
        if primary is not None:
            self._small.leave_others(primary)
            self._large.leave_others(primary)
            await self._pool.close_others(primary)

    async def everywhere(self, calls: Sequence[Call]) -> list[Call]:
        """Return these calls once for each server, which is one."""
        return list(calls)

    @asynccontextmanager
    async def subscribed(self, channel: str, *, sharded: bool = False) -> AsyncIterator[PubSub]:
        """Subscribe to a channel during the block; in a cluster to a sharded one."""
        async with self.redis.pubsub() as pubsub:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                if sharded:
                    await pubsub.ssubscribe(channel)
                else:
                    await pubsub.subscribe(channel)
            yield pubsub

    async def close(self) -> None:
        """Close all connections."""
        await self._small.close()
        await self._large.close()
        await self.redis.aclose()
        await self._pool.aclose()


async def _read_reply(connection: AbstractConnection) -> Any:
    """Read one reply. An error is returned, not raised, so that the later replies are read as well."""
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error
