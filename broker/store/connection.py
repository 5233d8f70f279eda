"""The connection to Redis or Valkey: its bounds, its errors and its scripts. It does not know what is stored.

Redis may be slow, frozen or gone at any moment. So every call is bounded, the client library repeats none (a
repeated command could take effect twice), and every failure is raised as `StoreUnavailable`. A script may be run again
with the same arguments without harm. A caller that needs a repeat makes it.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
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
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

    from redis.asyncio.connection import AbstractConnection

log = structlog.get_logger(__name__)

SCHEMA = 2
"""Version of the keys and their contents. Releases with different versions can share a Redis, with separate keys."""

CALL_TIMEOUT = 1.0
"""Maximum seconds of one call, including the wait for a connection."""

_LONGEST_CAUSE = 200

MAX_CONNECTIONS = 64
"""Maximum connections of a worker. Commands take microseconds; more would only move the queue into Redis."""


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn every error of redis-py, a timeout and a broken socket into `StoreUnavailable`.

    If Redis answers and refuses, raise `StoreRefused`: other calls may still be accepted.
    """
    try:
        yield
    except ResponseError as error:
        # Redis answers and refuses: it is full, loading or read-only, or our command is wrong.
        log.warning("redis refused", error=str(error)[:300])
        raise StoreRefused from error
    except (RedisError, OSError, TimeoutError) as error:
        raise StoreUnavailable from error


def cause_of(error: StoreUnavailable) -> str:
    """Return for the log why Redis cannot be reached: a refused connection, a certificate, a wrong password."""
    cause = error.__cause__
    return f"{type(cause).__name__} {cause}".strip()[:_LONGEST_CAUSE] if cause is not None else "not known"


@asynccontextmanager
async def bounded_call(timeout: float = CALL_TIMEOUT) -> AsyncIterator[None]:
    """Bound the calls of a block to ``timeout`` seconds together, and turn every failure into `StoreUnavailable`."""
    with store_errors():
        async with asyncio.timeout(timeout):
            yield


class _CountingPool(BlockingConnectionPool):
    """A pool that calls `on_connect` for every new connection, including those that replace a lost one.

    Args:
        on_connect: is called with the connection; a method of an object that lives as long as the pool.
    """

    def __init__(
        self, *args: Any, on_connect: Callable[[AbstractConnection], Awaitable[None]], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._on_connect = on_connect

    def make_connection(self) -> AbstractConnection:
        """Make a connection. It is opened at its first use."""
        connection: AbstractConnection = super().make_connection()  # type: ignore[no-untyped-call]  # as it has it
        connection.register_connect_callback(self._on_connect)  # type: ignore[no-untyped-call]  # as it has it
        return connection


class Store:
    """The connection of one worker to Redis. Values are bytes.

    Attributes:
        redis: the client for commands; use it within `store_errors`.
        prefix: the prefix of every key: the configured one and the version of the schema.
        channels: the prefix of the name of every worker's channel.
        connections_made: number of connections made so far, including those that replaced a lost one.
        errors: number of script calls that Redis refused or did not answer in time.
        has_answered: True if Redis has answered a script or a command since the start of this worker.
    """

    def __init__(
        self, url: str, key_prefix: str, *, observe: Callable[[str, float], None] | None = None
    ) -> None:
        self.prefix = f"{key_prefix}:{SCHEMA}"
        self.channels = f"{self.prefix}:notifications:"
        self._texts: dict[str, None] = {}
        self.connections_made = self.errors = 0
        self.has_answered = False
        self._observe = observe
        self._pool = _CountingPool.from_url(
            url,
            on_connect=self._on_connect,
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

    async def _on_connect(self, _: AbstractConnection) -> None:
        self.connections_made += 1

    def session_keys(self, session_id: str) -> dict[str, str]:
        """Return the keys of a session by their kinds: `session`, `events` and `viewers`.

        The braces put all keys of one session into one slot of a Redis Cluster.
        """
        return {kind: f"{self.prefix}:{kind}:{{{session_id}}}" for kind in ("session", "events", "viewers")}

    def script(
        self, name: str, constants: Mapping[str, int | str] | None = None, *, before: str = ""
    ) -> Script:
        """Return the Lua script ``lua/<name>.lua``, ready to be run.

        Args:
            name: the name of the script.
            constants: the values of the names under "Constants" in its header.
            before: Lua source that is put before it.
        """
        return Script(self, script_text(name, constants or {}, before=before), name)

    async def run(self, calls: Sequence[Call], *, timeout: float = CALL_TIMEOUT) -> list[Any]:
        """Run scripts in one round trip, in this order. Returns their replies.

        Raises:
            StoreUnavailable: Redis is away or full, or took longer than ``timeout`` seconds. Some scripts may have
                run or may still run.
        """
        # As `bounded_call`, written out: its two context managers were a twentieth of a /prepare (measured).
        began = time.monotonic()
        try:
            with store_errors():
                async with asyncio.timeout(timeout):
                    replies = await self._answers(calls)
                for reply in replies:
                    if isinstance(reply, ResponseError):
                        raise reply
        except StoreUnavailable:
            self.errors += 1
            raise
        finally:
            self._observe_trip(calls, began)
        return replies

    def _observe_trip(self, calls: Sequence[Call], began: float) -> None:
        if self._observe is not None:
            seconds = time.monotonic() - began
            for name in {call.name for call in calls}:
                self._observe(name, seconds)

    async def run_each(self, calls: Sequence[Call], *, timeout: float = CALL_TIMEOUT) -> list[Any]:
        """Run scripts as `run` does. The reply of a call that Redis refuses is a `StoreRefused`; the others count.

        Raises:
            StoreRefused: Redis refused all calls.
            StoreUnavailable: Redis is away, or took longer than ``timeout`` seconds.
        """
        began = time.monotonic()
        try:
            with store_errors():
                async with asyncio.timeout(timeout):
                    replies = await self._answers(calls)
                refused = [reply for reply in replies if isinstance(reply, ResponseError)]
                if refused and len(refused) == len(replies):
                    raise refused[0]
        except StoreUnavailable:
            self.errors += 1
            raise
        finally:
            self._observe_trip(calls, began)
        if refused:
            self.errors += len(refused)
            log.warning("redis refused", calls=len(refused), error=str(refused[0])[:300])
        return [StoreRefused() if isinstance(reply, ResponseError) else reply for reply in replies]

    async def commands(
        self, commands: Sequence[Sequence[Any]], *, timeout: float = CALL_TIMEOUT
    ) -> list[Any]:
        """Run plain commands in one round trip. Returns their replies; the reply of a refused one is an error.

        Raises:
            StoreUnavailable: Redis is away, or took longer than ``timeout`` seconds.
        """
        if not commands:
            return []
        with store_errors():
            async with asyncio.timeout(timeout):
                return await self._send([command_call(*command).packed for command in commands])

    async def _answers(self, calls: Sequence[Call]) -> list[Any]:
        """Return the replies. The reply of a call that Redis refused is an error."""
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
        """Write packed commands and read their replies.

        The pipeline of the library takes 29 to 40 µs for a command of 3 KB, this takes 13 (measured). That is most of
        the cost of a journal.
        """
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]  # as the library has it
        try:
            await connection.send_packed_command([b"".join(packed)])
            replies = [await _read_reply(connection) for _ in packed]
            self.has_answered = True
            if any(isinstance(reply, ReadOnlyError | MasterDownError) for reply in replies):
                await connection.disconnect()
                await self._reconnect()
            return replies
        finally:
            await asyncio.shield(self._pool.release(connection))  # a second cancel must not lose a connection

    async def _load(self) -> None:
        """Load every script in one round trip: one after the other takes seconds if Redis is far away."""
        for reply in await self._send(self._loads()):
            if isinstance(reply, ResponseError):
                raise reply

    def _loads(self) -> list[bytes]:
        return [_packed([b"SCRIPT", b"LOAD", text.encode()]) for text in self._texts]

    async def _reconnect(self) -> None:
        """Close the idle connections, which lead to a server that is not the primary any more.

        After a failover behind a stable name they would stay there, and every write would be refused.
        """
        await self._pool.disconnect(inuse_connections=False)

    def register(self, text: str) -> None:
        """Register a script, so that it is loaded with all others."""
        self._texts[text] = None

    async def load_scripts(self) -> None:
        """Load every registered script in one round trip.

        Raises:
            StoreUnavailable: Redis is away. The scripts are loaded when one of them is first run.
        """
        async with bounded_call():
            await self._load()

    async def takes_writes(self) -> bool:
        """Write a test key. Returns False if Redis answers and refuses.

        Raises:
            StoreUnavailable: Redis does not answer.
        """
        (reply,) = await self.commands([("SET", f"{self.prefix}:written", "1", "PX", 10_000)])
        return not isinstance(reply, ResponseError)

    async def ping(self) -> None:
        """Check that Redis answers.

        Raises:
            StoreUnavailable: Redis does not answer.
        """
        async with bounded_call():
            await self.redis.ping()

    async def may_evict(self) -> bool:
        """Returns True if a full Redis would evict keys, including those of running sessions.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        async with bounded_call():
            memory: dict[str, Any] = await self.redis.info("memory")
        return bool(memory.get("maxmemory_policy", "noeviction") != "noeviction")

    async def may_go_back(self) -> bool:
        """Returns True if a restart of Redis would load an old snapshot and lose all later writes.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        async with bounded_call():
            persistence: dict[str, Any] = await self.redis.info("persistence")
            try:
                snapshots: Any = await self.redis.config_get("save")
            except ResponseError:  # a hosted Redis that does not allow CONFIG
                return False
        return bool(snapshots.get("save")) and not persistence.get("aof_enabled")

    async def close(self) -> None:
        """Close all connections."""
        await self.redis.aclose()
        await self._pool.aclose()


_HEADERS = re.compile(r"^-- (Keys|Args|Constants): (.*(?:\n--     .*)*)", re.MULTILINE)


class ScriptText(NamedTuple):
    """The source of a Lua script, and the names of its keys and arguments in the order of the call.

    Attributes:
        lua: the source.
        keys: the names of its keys. If the last name ends in `...`, it is a list.
        args: the names of its arguments, in the same form.
    """

    lua: str
    keys: tuple[str, ...]
    args: tuple[str, ...]


def script_text(name: str, constants: Mapping[str, int | str], *, before: str = "") -> ScriptText:
    """Read a script and bind the names in its header to its keys, arguments and constants.

    The header has them in comment lines: ``-- Keys: session, events``, ``-- Args: claim_id, first (int)``,
    ``-- Constants: TTL_S``. An argument marked ``(int)`` is a number in Lua. Constants are written into the source,
    so that a time or limit that both sides use is defined in Python alone.

    Raises:
        TypeError: the header has other constants.
    """
    folder = resources.files("broker.store").joinpath("lua")
    source = folder.joinpath(f"{name}.lua").read_text(encoding="utf-8")
    first, _, rest = source.partition("\n")
    flags, body = (f"{first}\n", rest) if first.startswith("#!") else ("", source)
    keys, args = _names(body, "Keys"), _names(body, "Args")
    if set(_names(body, "Constants")) != set(constants):
        raise TypeError(f"{name}.lua has the constants {_names(body, 'Constants')}")
    lines = [f"local {constant} = {_lua_literal(value)}" for constant, value in constants.items()]
    lines += [_local(key, "KEYS", at) for at, key in enumerate(keys, 1)]
    lines += [_local(arg, "ARGV", at) for at, arg in enumerate(args, 1)]
    prelude = folder.joinpath("prelude.lua").read_text(encoding="utf-8")
    lua = "\n".join([flags + prelude, before, *lines, body])
    return ScriptText(lua, keys, tuple(arg.removesuffix(" (int)") for arg in args))


def _names(source: str, header: str) -> tuple[str, ...]:
    """Return the names of one line of a script's header. It may continue in lines that are indented by four more."""
    lines = next((found[2] for found in _HEADERS.finditer(source) if found[1] == header), "")
    return tuple(word.strip() for word in lines.replace("\n--", "").split(",")) if lines else ()


def _local(name: str, table: str, at: int) -> str:
    plain = name.removesuffix(" (int)")
    if name.endswith("..."):
        return f"local {name.removesuffix('...')} = {{unpack({table}, {at})}}"
    return f"local {plain} = " + (f"tonumber({table}[{at}])" if plain != name else f"{table}[{at}]")


def _lua_literal(value: int | str) -> str:
    if isinstance(value, int):
        return str(value)
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


class Script:
    """A Lua script as an awaitable function with a time limit. Its keys and arguments are passed by name.

    Args:
        store: the store on which it runs.
        text: the source.
        name: its name in the metrics.
    """

    def __init__(self, store: Store, text: ScriptText, name: str = "script") -> None:
        self.text = text
        self._name = name
        self._store = store
        self._names = frozenset(name.removesuffix("...") for name in (*text.keys, *text.args))
        store.register(text.lua)
        sha = hashlib.sha1(text.lua.encode(), usedforsecurity=False).hexdigest()
        self._head = f"$7\r\nEVALSHA\r\n$40\r\n{sha}\r\n".encode()

    async def __call__(self, **values: Any) -> Any:
        """Run it and return its reply.

        Raises:
            StoreUnavailable: Redis is away or full, or took longer than `CALL_TIMEOUT`. The script may have run or may
                still run.
        """
        return await self.within(CALL_TIMEOUT, values)

    async def within(self, timeout: float, values: Mapping[str, Any]) -> Any:
        """Run it with a limit of ``timeout`` seconds and return its reply.

        Raises:
            StoreUnavailable: as when it is called.
        """
        return (await self._store.run([self.call(**values)], timeout=timeout))[0]

    def call(self, **values: Any) -> Call:
        """Return a call of the script, to be run by `Store.run` together with others.

        Raises:
            TypeError: the names differ from those in its header.
        """
        if values.keys() != self._names:
            raise TypeError(f"the script takes {sorted(self._names)}, not {sorted(values)}")
        keys = _in_order(self.text.keys, values)
        words = [b"%d" % len(keys), *keys, *_in_order(self.text.args, values)]
        # https://valkey.io/topics/protocol/
        packed = b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])
        return Call(b"*%d\r\n%b%b" % (len(words) + 2, self._head, packed), self._name)


def _in_order(names: Sequence[str], values: Mapping[str, Any]) -> list[bytes]:
    words: list[Any] = []
    for name in names:
        if name.endswith("..."):
            words += values[name.removesuffix("...")]
        else:
            words.append(values[name])
    return [_word(word) for word in words]


def _word(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


class Call(NamedTuple):
    """A script or command with its arguments, encoded in the protocol of Redis."""

    packed: bytes
    name: str = "command"


def command_call(*words: Any) -> Call:
    """Return a call of a plain command, to be run by `Store.run` together with scripts."""
    return Call(_packed([_word(word) for word in words]))


def _packed(words: Sequence[bytes]) -> bytes:
    return b"*%d\r\n%b" % (len(words), b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words]))


async def _read_reply(connection: AbstractConnection) -> Any:
    """Read one reply. An error is returned, not raised, so that the later replies are read as well."""
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error
