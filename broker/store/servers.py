"""Which servers a URL of Redis means, and how they are reached. The store knows no difference between them."""

from __future__ import annotations

import asyncio
import weakref
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from redis.asyncio import Redis
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.sentinel import (
    MasterNotFoundError,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.credentials import UsernamePasswordCredentialProvider
from redis.exceptions import InvalidResponse, RedisError

from broker.core.redis_url import Kind, Servers, servers_in
from broker.store.cluster import Cluster
from broker.store.node import Node, Pool

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from redis.asyncio.connection import AbstractConnection

    from broker.store.call import Call

ASK_SENTINEL: Final = 0.6
"""Maximum seconds for which one sentinel is asked. A new connection by TLS takes five round trips, so each may take
120 ms. A call has a second in all, and needs a part of it to connect to the primary."""

NEXT_SENTINEL: Final = 0.1
"""Seconds after which the next sentinel is asked beside the ones before, because those may be frozen or cut off."""

_LOCATION: Final = ("host", "port")


class Credentials(UsernamePasswordCredentialProvider):
    """The user and the password that a new connection shows. They may be replaced."""

    @property
    def if_set(self) -> Credentials | None:
        """Return them, or None if there is nothing to show."""
        return self if self.username or self.password else None

    def take(self, other: Credentials) -> None:
        """Use those of another from now on."""
        self.username, self.password = other.username, other.password


@dataclass(frozen=True, slots=True)
class Address:
    """What a URL of Redis says.

    Attributes:
        options: of each connection to a server, as the client library names them.
        credentials: what such a connection shows.
        several: what the URL says of several servers, without secrets; None if it is the URL of one.
        of_sentinels: what a connection to a sentinel shows.
    """

    options: dict[str, Any]
    credentials: Credentials
    several: Servers | None
    of_sentinels: Credentials

    @property
    def is_cluster(self) -> bool:
        """True if the keys are spread over several servers."""
        return self.several is not None and self.several.kind is Kind.CLUSTER

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read a URL.

        Raises:
            ValueError: it cannot be read.
        """
        several = servers_in(url)
        options: dict[str, Any] = dict(parse_url(url if several is None else several.of_one))
        credentials = Credentials(options.pop("username", None), options.pop("password", None))
        if several is None:
            return cls(options, credentials, None, Credentials(None, None))
        for name in _LOCATION:
            del options[name]
        own = Credentials(several.sentinel_username or None, several.sentinel_password or None)
        several = several._replace(of_one="", sentinel_username="", sentinel_password="")
        return cls(options, credentials, several, own)

    def take_credentials(self, other: Address) -> bool:
        """Use the users and passwords of another address for all new connections.

        Returns False and changes nothing if anything else differs, or if only one of both has a password.
        """
        pairs = ((self.credentials, other.credentials), (self.of_sentinels, other.of_sentinels))
        if (self.options, self.several) != (other.options, other.several) or any(
            (ours.if_set is None) != (theirs.if_set is None) for ours, theirs in pairs
        ):
            return False
        for ours, theirs in pairs:
            ours.take(theirs)
        return True


def open_servers(
    address: Address,
    scripts: Callable[[], list[Call]],
    on_connect: Callable[[AbstractConnection], Awaitable[None]],
) -> Node | Cluster:
    """Return what runs the calls. No connection is opened yet.

    Args:
        address: where the servers are.
        scripts: returns the calls that load all scripts.
        on_connect: is called for every new connection.
    """
    several = address.several
    if several is None:
        return Node(Pool(address.options, address.credentials.if_set, on_connect), scripts)
    if several.kind is Kind.SENTINEL:
        return Node(SentinelPool(address, several, on_connect), scripts)

    def node(host: str, port: int) -> Node:
        options = {**address.options, "host": host, "port": port}
        return Node(Pool(options, address.credentials.if_set, on_connect), scripts)

    return Cluster(several.hosts, node, scripts)


class Named(NamedTuple):
    """What a sentinel says of the primary.

    Attributes:
        address: its host and port.
        lives: it seems to live.
        epoch: the higher, the newer is this primary.
    """

    address: tuple[str, int]
    lives: bool
    epoch: int


class SentinelPool(Pool):
    """Opens connections to the primary that the sentinels name, whichever server that is by then.

    Args:
        address: how to connect.
        several: where the sentinels are.
        on_connect: is called for every new connection.
    """

    # What the connections of the library ask for:
    is_master = True
    check_connection = False

    def __init__(
        self,
        address: Address,
        several: Servers,
        on_connect: Callable[[AbstractConnection], Awaitable[None]],
    ) -> None:
        options = dict(address.options)
        tls = options.pop("connection_class", None) is SSLConnection
        kind = SentinelManagedSSLConnection if tls else SentinelManagedConnection
        # The library holds the pool in each connection, and each connection in the pool.
        pool = weakref.proxy(self)
        super().__init__(
            {**options, "connection_class": kind, "connection_pool": pool},
            address.credentials.if_set,
            on_connect,
        )
        self._service = several.service
        self._epoch = 0
        of_sentinel = {name: value for name, value in address.options.items() if name != "db"}
        self._sentinels = [
            Redis(
                connection_pool=Pool({**of_sentinel, "host": host, "port": port}, address.of_sentinels.if_set)
            )
            for host, port in several.hosts
        ]

    async def get_master_address(self) -> tuple[str, int]:
        """Return host and port of the primary.

        Raises:
            MasterNotFoundError: no sentinel knows one that seems to live.
        """
        causes, older = [], []
        async with aclosing(self._answers()) as answers:
            async for sentinel, named in answers:
                if not isinstance(named, Named):
                    causes.append(f"{type(named).__name__} {named}".strip())
                elif not named.lives:
                    causes.append("the primary is down")
                elif named.epoch < self._epoch:
                    older.append(named)
                else:
                    self._ask_first(sentinel)
                    self._epoch = named.epoch
                    return named.address
        if 2 * len(older) > len(self._sentinels):  # the sentinels were replaced by new ones
            newest = max(older, key=lambda each: each.epoch)
            self._epoch = newest.epoch
            return newest.address
        raise MasterNotFoundError(f"no sentinel names a primary: {'; '.join(dict.fromkeys(causes))}")

    async def find_primary(self) -> tuple[str, int] | None:
        """Return host and port of the primary; None if no sentinel names one that is newer than what is known.

        All sentinels are asked, and the newest answer counts: one that was frozen or cut off, perhaps together with the
        old primary, still names that one.
        """
        asked = self._sentinels
        answers = await asyncio.gather(*(self._ask(each) for each in asked), return_exceptions=True)
        named = [each for each in answers if isinstance(each, Named)]
        newest = max(named, key=lambda each: each.epoch, default=None)
        if newest is None or not newest.lives or newest.epoch < self._epoch:
            return None
        self._ask_first(asked[answers.index(newest)])
        self._epoch = newest.epoch
        return newest.address

    async def _answers(self) -> AsyncGenerator[tuple[Redis, Named | Exception], None]:
        """Ask all sentinels, each `NEXT_SENTINEL` after the one before or when that has answered.

        Yields each answer as it comes. If the caller needs no more, the others are not asked any longer.
        """
        later = list(reversed(self._sentinels))
        asked: dict[asyncio.Task[Named], Redis] = {}
        try:
            while later or asked:
                if later:
                    sentinel = later.pop()
                    asked[asyncio.create_task(self._ask(sentinel))] = sentinel
                done, _ = await asyncio.wait(
                    asked,
                    timeout=NEXT_SENTINEL if later else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for answered in done:
                    yield asked.pop(answered), _named_or_error(answered)
        finally:
            for asking in asked:
                asking.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _ask(self, sentinel: Redis) -> Named:
        async with asyncio.timeout(ASK_SENTINEL):
            state: Any = await sentinel.sentinel_master(self._service)
        try:
            lives = state["is_master"] and not (state["is_sdown"] or state["is_odown"])
            return Named((str(state["ip"]), int(state["port"])), bool(lives), int(state["config-epoch"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidResponse("a sentinel describes the primary in an unknown form") from error

    def _ask_first(self, sentinel: Redis) -> None:
        self._sentinels = [sentinel, *(each for each in self._sentinels if each is not sentinel)]

    async def aclose(self) -> None:
        """Close all connections."""
        await super().aclose()
        pools = [each.connection_pool for each in self._sentinels]
        await asyncio.gather(*(pool.aclose() for pool in pools), return_exceptions=True)


def _named_or_error(asked: asyncio.Task[Named]) -> Named | Exception:
    try:
        return asked.result()
    except (RedisError, OSError, TimeoutError) as error:
        return error
