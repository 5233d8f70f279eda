"""The connection to Redis or Valkey: its bounds, its errors, its scripts. What is stored is not known here.

Redis may be slow, frozen or gone at any moment. So every call is bounded, none is repeated by the client library (a
repeat of a command that had taken effect is a bug of its own), and every failure leaves as `StoreUnavailable`. Scripts
are written so that running one again with the same arguments does no harm; who needs a repeat asks for it.
"""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import asynccontextmanager, contextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import MasterDownError, NoScriptError, ReadOnlyError, RedisError, ResponseError

from broker.core.errors import StoreRefused, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from redis.asyncio.connection import AbstractConnection

log = structlog.get_logger(__name__)

SCHEMA = 1
"""Version of the keys and their contents. Neighbouring releases with another one share a Redis without meeting."""

CALL_TIMEOUT = 1.0
"""Seconds that one call may take in all, the wait for a connection included."""

MAX_CONNECTIONS = 64
"""Connections a worker opens. Commands take microseconds; more would only move the queue into Redis."""


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn whatever redis-py raises, a timeout and a broken socket into `StoreUnavailable`.

    Where Redis answers, and refuses, it is `StoreRefused`: of many calls the others may pass.
    """
    try:
        yield
    except ResponseError as error:
        # Redis answers and refuses: it is full, loading, read-only, or we asked for nonsense.
        log.warning("redis refused", error=str(error)[:300])
        raise StoreRefused from error
    except (RedisError, OSError, TimeoutError) as error:
        raise StoreUnavailable from error


@asynccontextmanager
async def bounded_call(timeout: float = CALL_TIMEOUT) -> AsyncIterator[None]:
    """Bound the calls of a block to ``timeout`` seconds together, and turn every failure into `StoreUnavailable`."""
    with store_errors():
        async with asyncio.timeout(timeout):
            yield


class Store:
    """One worker's way to Redis. Bytes go in and come out.

    Attributes:
        redis: the client, for commands; use it within `store_errors`.
        prefix: what every key begins with: the configured prefix and the schema's version.
        channels: what the name of a worker's channel begins with.
    """

    def __init__(self, url: str, key_prefix: str) -> None:
        self.prefix = f"{key_prefix}:{SCHEMA}"
        self.channels = f"{self.prefix}:bell:"
        self._texts: dict[str, None] = {}
        self._pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=CALL_TIMEOUT,
            # The library would bound each read and write by asyncio.wait_for, which before Python 3.12 swallows a
            # cancellation that comes as the write completes. Each of our calls has a bound of its own.
            socket_timeout=None,
            socket_connect_timeout=CALL_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            driver_info=None,
        )
        self.redis: Redis = Redis(connection_pool=self._pool)

    def session_key(self, kind: str, session_id: str) -> str:
        """A key of a session. The braces put all keys of one session into one slot of a Redis Cluster."""
        return f"{self.prefix}:{kind}:{{{session_id}}}"

    def script(self, name: str) -> Script:
        """The Lua script ``lua/<name>.lua``, ready to be run."""
        text = resources.files("broker.store").joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")
        return Script(self, text)

    async def run(self, calls: Sequence[Call], *, timeout: float = CALL_TIMEOUT) -> list[Any]:
        """Run scripts in one round trip, in this order; returns their replies.

        Raises:
            StoreUnavailable: Redis is away, full, or took longer than ``timeout`` seconds. Some may have run or may
                yet run.
        """
        # As `bounded_call`, written out: its two context managers were a twentieth of a /prepare (measured).
        with store_errors():
            async with asyncio.timeout(timeout):
                replies = await self._answers(calls)
            for reply in replies:
                if isinstance(reply, ResponseError):
                    raise reply
        return replies

    async def run_each(self, calls: Sequence[Call], *, timeout: float = CALL_TIMEOUT) -> list[Any]:
        """As `run`, but where Redis refuses one call, that one's reply is a `StoreRefused` and the others count.

        Raises:
            StoreRefused: Redis refused all of them.
            StoreUnavailable: Redis is away, or took longer than ``timeout`` seconds.
        """
        with store_errors():
            async with asyncio.timeout(timeout):
                replies = await self._answers(calls)
            refused = [reply for reply in replies if isinstance(reply, ResponseError)]
            if refused and len(refused) == len(replies):
                raise refused[0]
        if refused:
            log.warning("redis refused", calls=len(refused), error=str(refused[0])[:300])
        return [StoreRefused() if isinstance(reply, ResponseError) else reply for reply in replies]

    async def _answers(self, calls: Sequence[Call]) -> list[Any]:
        """The replies; an error is among them where Redis refused that call."""
        replies = await self._send([call.packed for call in calls])
        if any(isinstance(reply, ResponseError) for reply in replies):
            unknown = [n for n, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
            if unknown:  # Redis is new, or was restarted
                loads = self._loads()
                again = await self._send([*loads, *(calls[n].packed for n in unknown)])
                for n, reply in zip(unknown, again[len(loads) :], strict=True):
                    replies[n] = reply
        return replies

    async def _send(self, packed: Sequence[bytes]) -> list[Any]:
        """Write commands that are packed already, and read their replies.

        The library's pipeline does the same for 29 to 40 µs a command; this is 13 (measured, 3 KB in a command), which
        is most of what a journal costs.
        """
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]  # as the library has it
        try:
            await connection.send_packed_command([b"".join(packed)])
            replies = [await _read_reply(connection) for _ in packed]
            if any(isinstance(reply, ReadOnlyError | MasterDownError) for reply in replies):
                await connection.disconnect()
                await self._reconnect()
            return replies
        finally:
            await asyncio.shield(self._pool.release(connection))  # a second cancel must not lose a connection

    async def _load(self) -> None:
        """Load every script in one round trip: one after the other they take seconds on a long line."""
        for reply in await self._send(self._loads()):
            if isinstance(reply, ResponseError):
                raise reply

    def _loads(self) -> list[bytes]:
        return [_packed([b"SCRIPT", b"LOAD", text.encode()]) for text in self._texts]

    async def _reconnect(self) -> None:
        """Close the idle connections: they lead to a server that is no primary any more.

        After a failover behind a stable name they would stay there, and be refused every write, for ever.
        """
        await self._pool.disconnect(inuse_connections=False)

    def register(self, text: str) -> None:
        """Know a script, so that it is loaded with all others."""
        self._texts[text] = None

    async def load_scripts(self) -> None:
        """Load every script that is known by now, in one round trip.

        Raises:
            StoreUnavailable: Redis is away. They are loaded when one of them is first run.
        """
        async with bounded_call():
            await self._load()

    async def takes_writes(self) -> bool:
        """Write a key without a meaning. Returns False if Redis answers and refuses.

        Raises:
            StoreUnavailable: it does not answer.
        """
        async with bounded_call():
            try:
                await self.redis.set(f"{self.prefix}:written", "1", px=10_000)
            except ReadOnlyError:
                await self._reconnect()
                return False
            except ResponseError:
                return False
        return True

    async def ping(self) -> None:
        """Ask whether Redis answers.

        Raises:
            StoreUnavailable: it does not.
        """
        async with bounded_call():
            await self.redis.ping()

    async def may_evict(self) -> bool:
        """Whether Redis would throw keys away when it is full, running sessions among them.

        Raises:
            StoreUnavailable: it cannot be asked.
        """
        async with bounded_call():
            memory: dict[str, Any] = await self.redis.info("memory")
        return bool(memory.get("maxmemory_policy", "noeviction") != "noeviction")

    async def may_go_back(self) -> bool:
        """Whether Redis would start again from an old snapshot, and take for new what had happened since.

        Raises:
            StoreUnavailable: it cannot be asked.
        """
        async with bounded_call():
            persistence: dict[str, Any] = await self.redis.info("persistence")
            try:
                snapshots: Any = await self.redis.config_get("save")
            except ResponseError:  # a hosted Redis that does not tell
                return False
        return bool(snapshots.get("save")) and not persistence.get("aof_enabled")

    async def close(self) -> None:
        """Close all connections."""
        await self.redis.aclose()
        await self._pool.aclose()


class Script:
    """A Lua script as an awaitable function with a bound.

    Args:
        store: where it runs.
        text: the source.
    """

    def __init__(self, store: Store, text: str) -> None:
        self.text = text
        self._store = store
        store.register(text)
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self._head = f"$7\r\nEVALSHA\r\n$40\r\n{sha}\r\n".encode()

    async def __call__(
        self, keys: Sequence[str], args: Sequence[Any], *, timeout: float = CALL_TIMEOUT
    ) -> Any:
        """Run it and return its reply.

        Raises:
            StoreUnavailable: Redis is away, full, or took longer than ``timeout`` seconds. The script may have run
                or may yet run.
        """
        return (await self._store.run([self.call(keys, args)], timeout=timeout))[0]

    def call(self, keys: Sequence[str], args: Sequence[Any]) -> Call:
        """The script with its arguments, to be run by `Store.run` together with others."""
        words = [b"%d" % len(keys), *[key.encode() for key in keys]]
        words += [arg if isinstance(arg, bytes) else str(arg).encode() for arg in args]
        # https://valkey.io/topics/protocol/
        packed = b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])
        return Call(self, b"*%d\r\n%b%b" % (len(words) + 2, self._head, packed))


class Call(NamedTuple):
    """A script and its arguments, in the words of the protocol."""

    script: Script
    packed: bytes


def _packed(words: Sequence[bytes]) -> bytes:
    return b"*%d\r\n%b" % (len(words), b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words]))


async def _read_reply(connection: AbstractConnection) -> Any:
    """One reply; an error is returned, so that the replies behind it are read as well."""
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error
