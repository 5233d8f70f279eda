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
from contextlib import contextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import UsernamePasswordCredentialProvider
from redis.exceptions import MasterDownError, NoScriptError, ReadOnlyError, RedisError, ResponseError

from broker.core.errors import StoreRefused, StoreUnavailable
from broker.store.call import Call, command_call, packed
from broker.store.shared_connection import SharedConnection

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from redis.asyncio.connection import AbstractConnection

log = structlog.get_logger(__name__)

SCHEMA = 2
"""Version of the keys and their contents. Releases with different versions can share a Redis, with separate keys."""

CALL_TIMEOUT = 1.0
"""Maximum seconds of one call, including the wait for a connection."""

_LONGEST_CAUSE = 200

MAX_CONNECTIONS = 64
"""Maximum connections of a worker. Commands take microseconds; more would only move the queue into Redis."""


MAX_SHARED = 64 * 1024
"""Maximum bytes of a call on the shared connection. A larger one would hold up the others."""


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn every error of redis-py, a timeout and a broken socket into `StoreUnavailable`.

    If Redis answers and refuses, raise `StoreRefused`: other calls may still be accepted.
    """
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        raise _store_error(error) from error


def _store_error(error: Exception) -> StoreUnavailable:
    if not isinstance(error, ResponseError):
        return StoreUnavailable()
    # Redis answers and refuses: it is full, loading or read-only, or our command is wrong.
    log.warning("redis refused", error=str(error)[:300])
    return StoreRefused()


def cause_of(error: StoreUnavailable) -> str:
    """Return for the log why Redis cannot be reached: a refused connection, a certificate, a wrong password."""
    cause = error.__cause__
    return f"{type(cause).__name__} {cause}".strip()[:_LONGEST_CAUSE] if cause is not None else "not known"


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

    async def close_idle(self) -> None:
        """Close the connections that nobody uses, without waiting for the server: it may not answer."""
        for connection in tuple(self._available_connections):
            await connection.disconnect(nowait=True)


class _Credentials(UsernamePasswordCredentialProvider):
    """The user and the password that a new connection shows. They may be replaced."""

    @classmethod
    def take_from(cls, options: dict[str, Any]) -> _Credentials:
        """Return those in the options of a connection, and remove them there."""
        return cls(options.pop("username", None), options.pop("password", None))

    @property
    def are_set(self) -> bool:
        """True if there is anything to show."""
        return bool(self.username or self.password)


class Store:
    """The connection of one worker to Redis. Values are bytes.

    Attributes:
        redis: the client for commands; use it within `store_errors`.
        prefix: the prefix of every key: the configured one and the version of the schema.
        channels: the prefix of the name of every worker's channel.
        connections_made: number of connections made so far, including those that replaced a lost one.
        errors: number of script calls that Redis refused or did not answer in time.
        call_timeout: seconds of a call that has no limit of its own, including the wait for a connection.
        has_answered: True if Redis has answered a script or a command since the start of this worker.
    """

    def __init__(
        self,
        url: str,
        key_prefix: str,
        *,
        observe: Callable[[str, float], None] | None = None,
        call_timeout: float = CALL_TIMEOUT,
    ) -> None:
        self.call_timeout = call_timeout
        self.prefix = f"{key_prefix}:{SCHEMA}"
        self.channels = f"{self.prefix}:notifications:"
        self._texts: dict[str, None] = {}
        self.connections_made = self.errors = 0
        self.has_answered = False
        self._observe = observe
        options: dict[str, Any] = dict(parse_url(url))
        self._credentials = _Credentials.take_from(options)
        self._options = options
        self._pool = _CountingPool(
            **options,
            # Without a password, the server would refuse the attempt to show one.
            credential_provider=self._credentials if self._credentials.are_set else None,
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
        self._shared: SharedConnection | None = None
        self._opening: asyncio.Future[SharedConnection | Exception] | None = None
        self._holders: set[asyncio.Task[None]] = set()

    async def _on_connect(self, _: AbstractConnection) -> None:
        self.connections_made += 1

    def use_credentials(self, url: str) -> bool:
        """Use the user and the password in this URL for all new connections.

        Connections that are open stay as they are: a server forgets none because of a new password.

        Returns False and changes nothing if anything else in the URL differs, or if only one of both has a password.
        """
        options: dict[str, Any] = dict(parse_url(url))
        credentials = _Credentials.take_from(options)
        if options != self._options or credentials.are_set != self._credentials.are_set:
            return False
        self._credentials.username, self._credentials.password = credentials.username, credentials.password
        return True

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

    async def run(self, calls: Sequence[Call], *, timeout: float | None = None) -> list[Any]:
        """Run scripts in one round trip, in this order. Returns their replies.

        Raises:
            StoreUnavailable: Redis is away or full, or took longer than the ``timeout``. Some scripts may have
                run or may still run.
        """
        replies = await self._trip(calls, timeout)
        for reply in replies:
            if isinstance(reply, ResponseError):
                self.errors += 1
                raise _store_error(reply) from reply
        return replies

    async def run_each(self, calls: Sequence[Call], *, timeout: float | None = None) -> list[Any]:
        """Run scripts as `run` does. The reply of a call that Redis refuses is a `StoreRefused`; the others count.

        Raises:
            StoreRefused: Redis refused all calls.
            StoreUnavailable: Redis is away, or took longer than the ``timeout``.
        """
        replies = await self._trip(calls, timeout)
        refused = [reply for reply in replies if isinstance(reply, ResponseError)]
        if not refused:
            return replies
        if len(refused) == len(replies):
            self.errors += 1
            raise _store_error(refused[0]) from refused[0]
        self.errors += len(refused)
        log.warning("redis refused", calls=len(refused), error=str(refused[0])[:300])
        return [StoreRefused() if isinstance(reply, ResponseError) else reply for reply in replies]

    async def _trip(self, calls: Sequence[Call], timeout: float | None) -> list[Any]:
        """Return the replies, and count the round trip. The reply of a call that Redis refused is a `ResponseError`."""
        # As `commands`, written out: its context manager was a twentieth of a /prepare (measured).
        began = time.monotonic()
        give_up_at = self._give_up_at(timeout)
        try:
            replies = await self._send(calls, give_up_at)
            for reply in replies:
                if isinstance(reply, NoScriptError):  # Redis is new, or was restarted
                    return await self._send_again(calls, replies, give_up_at)
            return replies
        except (RedisError, OSError, TimeoutError) as error:
            self.errors += 1
            raise _store_error(error) from error
        finally:
            if self._observe is not None:
                seconds = time.monotonic() - began
                for name in {call.name for call in calls}:
                    self._observe(name, seconds)

    async def commands(self, commands: Sequence[Sequence[Any]], *, timeout: float | None = None) -> list[Any]:
        """Run plain commands in one round trip. Returns their replies; the reply of a refused one is an error.

        Raises:
            StoreUnavailable: Redis is away, or took longer than the ``timeout``.
        """
        if not commands:
            return []
        give_up_at = self._give_up_at(timeout)
        with store_errors():
            return await self._send([command_call(*command) for command in commands], give_up_at)

    async def read(self, commands: Sequence[Sequence[Any]], *, timeout: float | None = None) -> list[Any]:
        """Run plain commands as `commands` does, where all replies are needed. Returns their replies.

        Raises:
            StoreRefused: Redis refused one of them.
            StoreUnavailable: Redis is away, or took longer than the ``timeout``.
        """
        replies = await self.commands(commands, timeout=timeout)
        for reply in replies:
            if isinstance(reply, ResponseError):
                raise StoreRefused(f"Redis refuses to be read: {str(reply)[:_LONGEST_CAUSE]}") from reply
        return replies

    async def command(self, *words: Any, timeout: float | None = None) -> Any:
        """Run one plain command and return its reply.

        Raises:
            StoreRefused: Redis refused it.
            StoreUnavailable: Redis is away, or took longer than the ``timeout``.
        """
        return (await self.run([command_call(*words)], timeout=timeout))[0]

    async def now_ms(self) -> int:
        """Return the time in milliseconds since 1970, by the clock of Redis.

        Raises:
            StoreUnavailable: Redis does not answer.
        """
        seconds, micros = await self.command("TIME")
        return int(seconds) * 1000 + int(micros) // 1000

    def _give_up_at(self, timeout: float | None) -> float:
        return asyncio.get_running_loop().time() + (self.call_timeout if timeout is None else timeout)

    async def _send_again(self, calls: Sequence[Call], replies: list[Any], give_up_at: float) -> list[Any]:
        """Load all scripts, run those calls again whose script Redis did not know, and return all replies."""
        unknown = [n for n, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        loads = self._loads()
        again = await self._send([*loads, *(calls[n] for n in unknown)], give_up_at)
        found = dict(zip(unknown, again[len(loads) :], strict=True))
        return [found.get(n, reply) for n, reply in enumerate(replies)]

    async def _send(self, calls: Sequence[Call], give_up_at: float) -> list[Any]:
        """Send calls until this time of the event loop, and return their replies: that of a refused one is an error."""
        if not calls:
            return []
        joined = b"".join([call.packed for call in calls])
        replies = used = None
        if len(joined) <= MAX_SHARED and True not in [call.alone for call in calls]:
            shared = self._shared
            if shared is None or shared.retired:
                async with asyncio.timeout_at(give_up_at):
                    shared = await self._open_shared()
            if shared.takes_calls:
                used = shared
                replies = await shared.ask(joined, len(calls), give_up_at)
        if replies is None:
            async with asyncio.timeout_at(give_up_at):
                replies = await self._send_alone(joined, len(calls))
        for reply in replies:
            if isinstance(reply, Exception):
                await self._note_error(reply, used)
        self.has_answered = True
        return replies

    async def _note_error(self, error: Exception, used: SharedConnection | None) -> None:
        """Use other connections if those there are lead to a server that cannot serve us.

        Args:
            error: the reply to a call.
            used: the shared connection of the call, None if it had one of its own.

        Raises:
            Exception: the error, if no command was answered, or none can be.
        """
        answered = isinstance(error, ResponseError)
        if not answered or isinstance(error, ReadOnlyError | MasterDownError):
            # Connections that were opened after this one may lead to another server.
            if used is None or used is self._shared:
                await self._pool.close_idle()
            if used is not None:
                used.retire()
        if not answered:
            raise error

    async def _open_shared(self) -> SharedConnection:
        """Return a new shared connection. All who need one at the same time wait for the same attempt to open it."""
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_future()
            holder = asyncio.create_task(self._hold_shared(self._opening), name="shared connection")
            self._holders.add(holder)
            holder.add_done_callback(self._holders.discard)
        opened = await asyncio.shield(self._opening)
        if isinstance(opened, Exception):
            raise opened
        return opened

    async def _hold_shared(self, opening: asyncio.Future[SharedConnection | Exception]) -> None:
        """Open a shared connection, and have the library close it when it is lost or not used any more."""
        connection = self._pool.make_connection()
        try:
            try:
                async with asyncio.timeout(CALL_TIMEOUT):
                    await connection.connect()  # type: ignore[no-untyped-call]  # as the library has it
                shared = self._shared = SharedConnection(connection)
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

    async def _send_alone(self, joined: bytes, count: int) -> list[Any]:
        """Write so many packed commands to a connection of their own, and read their replies.

        The pipeline of the library takes 29 to 40 µs for a command of 3 KB, this takes 13 (measured). That is most of
        the cost of a journal.
        """
        connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]  # as the library has it
        try:
            await connection.send_packed_command([joined])
            replies = [await _read_reply(connection) for _ in range(count)]
            if any(isinstance(reply, ReadOnlyError | MasterDownError) for reply in replies):
                await connection.disconnect(nowait=True)
            return replies
        finally:
            await asyncio.shield(self._pool.release(connection))  # a second cancel must not lose a connection

    def _loads(self) -> list[Call]:
        return [command_call("SCRIPT", "LOAD", text) for text in self._texts]

    def register(self, text: str) -> None:
        """Register a script, so that it is loaded with all others."""
        self._texts[text] = None

    async def load_scripts(self) -> None:
        """Load every registered script in one round trip: one after the other takes seconds if Redis is far away.

        Raises:
            StoreUnavailable: Redis is away. The scripts are loaded when one of them is first run.
        """
        await self.run(self._loads())

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
        await self.command("PING")

    async def may_evict(self) -> bool:
        """Returns True if a full Redis would evict keys, including those of running sessions.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        memory = _facts(await self.command("INFO", "memory"))
        return memory.get("maxmemory_policy", "noeviction") != "noeviction"

    async def may_go_back(self) -> bool:
        """Returns True if a restart of Redis would load an old snapshot and lose all later writes.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        info, saved = await self.commands([("INFO", "persistence"), ("CONFIG", "GET", "save")])
        if isinstance(info, ResponseError):
            raise _store_error(info) from info
        if isinstance(saved, ResponseError):  # a hosted Redis that does not allow CONFIG
            return False
        return bool(saved[1:] and saved[1]) and _facts(info).get("aof_enabled") != "1"

    async def close(self) -> None:
        """Close all connections."""
        for holder in self._holders:
            holder.cancel()
        await asyncio.gather(*self._holders, return_exceptions=True)
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
        self._order = (*text.keys, *text.args)
        self._lists = any(name.endswith("...") for name in self._order)
        store.register(text.lua)
        sha = hashlib.sha1(text.lua.encode(), usedforsecurity=False).hexdigest()
        self._head = ("EVALSHA", sha)

    async def __call__(self, **values: Any) -> Any:
        """Run it and return its reply.

        Raises:
            StoreUnavailable: Redis is away or full, or took longer than its time limit. The script may have run or may
                still run.
        """
        return await self.within(None, values)

    async def within(self, timeout: float | None, values: Mapping[str, Any]) -> Any:
        """Run it with a limit of ``timeout`` seconds, by default the store's, and return its reply.

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
        keys, args = self.text.keys, self.text.args
        if not self._lists:
            words = [values[name] for name in self._order]
            return Call(packed((*self._head, len(keys), *words)), self._name)
        key_words = _in_order(keys, values)
        return Call(packed((*self._head, len(key_words), *key_words, *_in_order(args, values))), self._name)


def _in_order(names: Sequence[str], values: Mapping[str, Any]) -> list[Any]:
    if names and names[-1].endswith("..."):  # only the last one may be a list
        return [*[values[name] for name in names[:-1]], *values[names[-1].removesuffix("...")]]
    return [values[name] for name in names]


def _facts(info: bytes) -> dict[str, str]:
    """Return the reply to INFO by its names."""
    pairs = (line.partition(":") for line in info.decode(errors="replace").splitlines())
    return {name: value for name, colon, value in pairs if colon}


async def _read_reply(connection: AbstractConnection) -> Any:
    """Read one reply. An error is returned, not raised, so that the later replies are read as well."""
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error
