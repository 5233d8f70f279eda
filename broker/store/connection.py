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
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from redis.exceptions import RedisError, ResponseError

from broker.core.errors import StoreRefused, StoreUnavailable
from broker.store.call import Call, command_call, packed
from broker.store.clock import RedisClock
from broker.store.servers import Address, open_servers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from redis.asyncio import Redis
    from redis.asyncio.client import PubSub
    from redis.asyncio.connection import AbstractConnection

log = structlog.get_logger(__name__)

SCHEMA = 2
"""Version of the keys and their contents. Releases with different versions can share a Redis, with separate keys."""

CALL_TIMEOUT = 1.0
"""Maximum seconds of one call, including the wait for a connection."""

_LONGEST_CAUSE = 200


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


def failure(error: Exception) -> StoreUnavailable:
    """Return what the error of one call means."""
    found = StoreRefused() if isinstance(error, ResponseError) else StoreUnavailable()
    found.__cause__ = error
    return found


def cause_of(error: StoreUnavailable) -> str:
    """Return for the log why Redis cannot be reached: a refused connection, a certificate, a wrong password."""
    cause = error.__cause__
    return f"{type(cause).__name__} {cause}".strip()[:_LONGEST_CAUSE] if cause is not None else "not known"


class Store:
    """The connection of one worker to Redis. Values are bytes.

    Attributes:
        prefix: the prefix of every key: the configured one and the version of the schema.
        channels: the prefix of the name of every worker's channel.
        connections_made: number of connections made so far, including those that replaced a lost one.
        errors: number of script calls that Redis refused or did not answer in time.
        call_timeout: seconds of a call that has no limit of its own, including the wait for a connection.
        has_answered: True if Redis has answered a script or a command since the start of this worker.
        clock: the clock of Redis.
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
        self.clock = RedisClock()
        self._observe = observe
        self._address = Address.parse(url)
        self._servers = open_servers(self._address, self._loads, self._on_connect)

    @property
    def redis(self) -> Redis:
        """The client of the library, for tests; use it within `store_errors`."""
        return self._servers.redis

    @property
    def is_lost(self) -> bool:
        """True if a connection was lost, and the next call opens another one, perhaps to another server."""
        return self._servers.is_lost

    @property
    def runs_in_order(self) -> bool:
        """True if the calls of one round trip run one after the other now, on one server that answers promptly.

        Then a call may depend on what the one before it has done, and read its keys. Otherwise the calls may be spread
        over the nodes of a cluster, or wait for a server that stands still.
        """
        return self._servers.is_prompt and self._servers.takes_any_keys

    def subscribed(self, channel: str) -> AbstractAsyncContextManager[PubSub]:
        """Subscribe to a channel during a block; use it within `store_errors`."""
        return self._servers.subscribed(channel)

    async def _on_connect(self, _: AbstractConnection) -> None:
        self.connections_made += 1

    def use_credentials(self, url: str) -> bool:
        """Use the user and the password in this URL for all new connections.

        Connections that are open stay as they are: a server forgets none because of a new password.

        Returns False and changes nothing if anything else in the URL differs, or if only one of both has a password.
        """
        return self._address.take_credentials(Address.parse(url))

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
        tells = self._address.is_cluster and "CHANNELS" in (constants or {})
        return Script(self, script_text(name, constants or {}, before=before, tells=tells), name)

    async def run(self, calls: Sequence[Call], *, timeout: float | None = None) -> list[Any]:
        """Run scripts in one round trip. Returns their replies. Those with the same tag run in this order.

        Raises:
            StoreUnavailable: Redis is away or full, or took longer than the ``timeout``. Some scripts may have
                run or may still run.
        """
        replies = await self._trip(calls, timeout)
        for reply in replies:
            if isinstance(reply, Exception):
                self.errors += 1
                raise _store_error(reply) from reply
        return replies

    async def run_each(self, calls: Sequence[Call], *, timeout: float | None = None) -> list[Any]:
        """Run scripts as `run` does. The reply of a call that failed is its error; the others count.

        That is a `StoreRefused` if Redis refused the call, and a `StoreUnavailable` if its node of a cluster is away.

        Raises:
            StoreRefused: Redis refused all calls.
            StoreUnavailable: Redis is away, or took longer than the ``timeout``.
        """
        replies = await self._trip(calls, timeout)
        failed = [reply for reply in replies if isinstance(reply, Exception)]
        if not failed:
            return replies
        if len(failed) == len(replies):
            self.errors += 1
            raise _store_error(failed[0]) from failed[0]
        self.errors += len(failed)
        log.warning("redis failed for some calls", calls=len(failed), error=str(failed[0])[:300])
        return [failure(reply) if isinstance(reply, Exception) else reply for reply in replies]

    async def _trip(self, calls: Sequence[Call], timeout: float | None) -> list[Any]:
        """Return the replies, and count the round trip. The reply of a call that Redis refused is a `ResponseError`."""
        # As `commands`, written out: its context manager was a twentieth of a /prepare (measured).
        began = time.monotonic()
        give_up_at = self._give_up_at(timeout)
        try:
            replies = await self._servers.run(calls, give_up_at)
        except (RedisError, OSError, TimeoutError) as error:
            self.errors += 1
            raise _store_error(error) from error
        else:
            self.has_answered = True
            return replies
        finally:
            if self._observe is not None:
                seconds = time.monotonic() - began
                for name in {call.name for call in calls}:
                    self._observe(name, seconds)

    async def commands(self, commands: Sequence[Sequence[Any]], *, timeout: float | None = None) -> list[Any]:
        """Run plain commands in one round trip. Returns their replies; the reply of one that failed is an error.

        Raises:
            StoreUnavailable: Redis is away, or took longer than the ``timeout``.
        """
        if not commands:
            return []
        give_up_at = self._give_up_at(timeout)
        with store_errors():
            replies = await self._servers.run([command_call(*command) for command in commands], give_up_at)
        self.has_answered = True
        return replies

    async def read(self, commands: Sequence[Sequence[Any]], *, timeout: float | None = None) -> list[Any]:
        """Run plain commands as `commands` does, where all replies are needed. Returns their replies.

        Raises:
            StoreRefused: Redis refused one of them.
            StoreUnavailable: Redis is away, or took longer than the ``timeout``.
        """
        replies = await self.commands(commands, timeout=timeout)
        for reply in replies:
            if isinstance(reply, Exception) and not isinstance(reply, ResponseError):
                raise StoreUnavailable from reply
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

    async def everywhere(self, *words: Any) -> list[Call]:
        """Return the calls of a command, one for each server; a cluster has several.

        Raises:
            StoreUnavailable: the servers are not known.
        """
        with store_errors():
            return await self._servers.everywhere([command_call(*words)])

    async def _run_everywhere(self, calls: Sequence[Call]) -> list[Any]:
        with store_errors():
            calls = await self._servers.everywhere(calls)
        return await self.run(calls)

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
        await self._run_everywhere(self._loads())

    async def leave_old_primary(self) -> None:
        """Close the connections to a server that a Sentinel has replaced. Takes `ASK_SENTINEL` at most."""
        await self._servers.leave_old_primary()

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
        await self._run_everywhere([command_call("PING")])

    async def may_evict(self) -> bool:
        """Returns True if a full Redis would evict keys, including those of running sessions.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        found = await self._run_everywhere([command_call("INFO", "memory")])
        return any(_facts(memory).get("maxmemory_policy", "noeviction") != "noeviction" for memory in found)

    async def may_go_back(self) -> bool:
        """Returns True if a restart of Redis would load an old snapshot and lose all later writes.

        Raises:
            StoreUnavailable: Redis cannot be reached.
        """
        info, saved = await self.commands([("INFO", "persistence"), ("CONFIG", "GET", "save")])  # of one node
        if isinstance(info, ResponseError):
            raise _store_error(info) from info
        if isinstance(saved, ResponseError):  # a hosted Redis that does not allow CONFIG
            return False
        return bool(saved[1:] and saved[1]) and _facts(info).get("aof_enabled") != "1"

    async def close(self) -> None:
        """Close all connections."""
        await self._servers.close()


_HEADERS = re.compile(r"^-- (Keys|Args|Constants): (.*(?:\n--     .*)*)", re.MULTILINE)


class ScriptText(NamedTuple):
    """The source of a Lua script, and the names of its keys and arguments in the order of the call.

    Attributes:
        lua: the source.
        keys: the names of its keys. If the last name ends in `...`, it is a list.
        args: the names of its arguments, in the same form.
        tells: it returns its notifications instead of sending them.
    """

    lua: str
    keys: tuple[str, ...]
    args: tuple[str, ...]
    tells: bool = False


def script_text(
    name: str, constants: Mapping[str, int | str], *, before: str = "", tells: bool = False
) -> ScriptText:
    """Read a script and bind the names in its header to its keys, arguments and constants.

    The header has them in comment lines: ``-- Keys: session, events``, ``-- Args: claim_id, first (int)``,
    ``-- Constants: TTL_S``. An argument marked ``(int)`` is a number in Lua. Constants are written into the source,
    so that a time or limit that both sides use is defined in Python alone.

    A script that ``tells`` returns its notifications, each a channel and a text, in front of its reply. In a cluster
    their channels belong to other nodes.

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
    told = "local told = {}" if tells else "local told"
    if tells:
        body = f"local function step()\n{body}\nend\nreturn {{told, step()}}"
    lua = "\n".join([flags + told, prelude, before, *lines, body])
    return ScriptText(lua, keys, tuple(arg.removesuffix(" (int)") for arg in args), tells)


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
        lists = any(name.endswith("...") for name in self._order)
        # The values of a call in their order, in one step, where none is a list and there are several.
        self._pick = itemgetter(*self._order) if len(self._order) > 1 and not lists else None
        store.register(text.lua)
        sha = hashlib.sha1(text.lua.encode(), usedforsecurity=False).hexdigest()
        self._head = ("EVALSHA", sha)
        self._start = (*self._head, len(text.keys))

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
        if self._pick is not None:
            words = self._pick(values)
            return Call(packed(self._start + words), self._name, False, words[0], self.text.tells)
        key_words = _in_order(keys, values)
        encoded = packed((*self._head, len(key_words), *key_words, *_in_order(args, values)))
        return Call(encoded, self._name, False, key_words[0], self.text.tells)

    def begin(self, *first: str) -> bytes:
        """Return the beginning of a call: its first keys and arguments, which many calls have in common."""
        _, _, head = packed((*self._head, len(self.text.keys), *first)).partition(b"\r\n")
        return b"*%d\r\n%b" % (len(self._head) + 1 + len(self._order), head)

    def call_from(self, beginning: bytes, *rest: bytes, key: str) -> Call:
        """Return a call as `call` does, with all keys and arguments behind its beginning.

        For a step that is done very often: it takes a quarter of the time of `call` (measured).

        Args:
            beginning: what `begin` returned.
            rest: the other arguments.
            key: the first key.
        """
        sized = [part for word in rest for part in (len(word), word)]
        encoded = (b"%b" + b"$%d\r\n%b\r\n" * len(rest)) % (beginning, *sized)
        return Call(encoded, self._name, False, key, self.text.tells)


def _in_order(names: Sequence[str], values: Mapping[str, Any]) -> list[Any]:
    if names and names[-1].endswith("..."):  # only the last one may be a list
        return [*[values[name] for name in names[:-1]], *values[names[-1].removesuffix("...")]]
    return [values[name] for name in names]


def _facts(info: bytes) -> dict[str, str]:
    """Return the reply to INFO by its names."""
    pairs = (line.partition(":") for line in info.decode(errors="replace").splitlines())
    return {name: value for name, colon, value in pairs if colon}
