"""The marker by which workers notice that Redis came back empty, a list of the workers, and their notifications.

The marker is one random word for all workers. If it is missing or has changed, Redis has lost all data. Notifications
are sent to a pub/sub channel of one worker. They only save time: a subscription can break unnoticed, so workers also
read everything that notifications say from Redis. A worker that reads the marker also puts itself on the list of
workers, which is only shown to operators and decides nothing.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
import structlog
from redis.exceptions import ConnectionError as LineError
from redis.exceptions import NoPermissionError

from broker.core.errors import StoreRefused, StoreUnavailable
from broker.core.replay import Batch
from broker.store.connection import Store, store_errors

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from redis.asyncio.client import PubSub

log = structlog.get_logger(__name__)

LISTEN_AGAIN_WITHOUT_RIGHTS = 30.0
"""Seconds until a worker listens again if the Redis user has no rights to channels, the default of Redis 7."""

MARKER_TTL = 86_400
"""Seconds that the marker is stored after a worker last read it."""

WIPED_FOR = 10
"""Seconds after Redis came back empty in which owners may still be writing their sessions again."""

ALIVE_FOR = 15.0
"""Seconds that a worker is listed as alive after it last read the marker."""

LISTEN_TIMEOUT = 5.0
"""Seconds without a message after which a subscription is checked with a ping."""


_RUN_ID = re.compile(r"run_id:(\w+)")


class Notification(NamedTuple):
    """One notification.

    Attributes:
        kind: ``events`` (with the batch), ``ended``, ``cancel``, ``watched``.
        session_id: the id of the session.
        batch: the events, if the kind is ``events``.
    """

    kind: str
    session_id: str
    batch: Batch | None


class MarkerStatus(NamedTuple):
    """The marker and the servers that have the data.

    Attributes:
        marker: the word that all workers know, until Redis loses it.
        wiped: True if a worker has noticed in the last seconds that Redis came back empty.
        servers: the run ids of the server processes, of which a cluster has several; empty if they are not told.
        now_ms: the clock of Redis, in ms.
    """

    marker: str
    wiped: bool
    servers: frozenset[str]
    now_ms: int


class WorkerInfo(NamedTuple):
    """What operators are shown of a worker.

    Attributes:
        id: its id.
        host: the name of its machine.
        pid: the number of its process.
        version: the release that it runs.
    """

    id: str
    host: str = ""
    pid: int = 0
    version: str = ""


class WorkerStore:
    """The marker and notifications. Methods raise `StoreUnavailable` if Redis cannot be reached.

    Args:
        store: the connection.
        worker: this worker's id.
        info: what operators are shown of this worker; by default only its id.
    """

    def __init__(self, store: Store, *, worker: str, info: WorkerInfo | None = None) -> None:
        self.worker = worker
        self._store = store
        self._info = orjson.dumps((info or WorkerInfo(worker))._asdict())
        constants = {"MARKER_S": MARKER_TTL, "ALIVE_MS": round(ALIVE_FOR * 1000)}
        self._read_marker = store.script("marker", constants)
        self._warned = False
        self._names_servers = True

    @property
    def connections_made(self) -> int:
        """Return the number of connections to Redis that this worker has made so far."""
        return self._store.connections_made

    @property
    def is_lost(self) -> bool:
        """True if a connection to Redis was lost, and the next call opens another one."""
        return self._store.is_lost

    async def leave_old_primary(self) -> None:
        """Close the connections to a server that a Sentinel has replaced."""
        await self._store.leave_old_primary()

    async def marker(self) -> MarkerStatus:
        """Return the marker and the servers that have the data. Make the marker if there is none."""
        read = self._read_marker.call(
            marker=self._key("marker"),
            wiped=self._key("wiped"),
            alive=alive_key(self._store),
            new_marker=secrets.token_hex(8),
            worker=self._info,
        )
        if not self._names_servers:
            [found] = await self._store.run([read])
            return self._status(found, frozenset())
        found, *infos = await self._store.run_each([read, *await self._store.everywhere("INFO", "server")])
        if isinstance(found, StoreUnavailable):
            raise found
        if any(isinstance(info, StoreRefused) for info in infos):  # a user without the right to INFO
            log.warning("redis does not tell which server it is; a failover is not noticed")
            self._names_servers = False
            return self._status(found, frozenset())
        for info in infos:
            if isinstance(info, StoreUnavailable):
                raise info
        run_ids = (_RUN_ID.search(info.decode()) for info in infos)
        return self._status(found, frozenset(run_id[1] for run_id in run_ids if run_id))

    def _status(self, reply: list[Any], servers: frozenset[str]) -> MarkerStatus:
        marker, wiped, now_ms = reply
        self._store.clock.saw(int(now_ms))
        return MarkerStatus(marker.decode(), bool(wiped), servers, int(now_ms))

    async def tell_wiped(self) -> None:
        """Report to all workers, including those that start later, that Redis came back empty."""
        await self._store.command("SET", self._key("wiped"), "1", "EX", WIPED_FOR)

    async def listen(self) -> AsyncGenerator[Notification, None]:
        """Yield the notifications of this worker until the subscription breaks.

        Raises:
            StoreUnavailable: it broke. Notifications sent until the next subscription are lost.
        """
        with store_errors():
            async with self._store.subscribed(f"{self._store.channels}{self.worker}") as pubsub:
                try:
                    async for data in _messages(pubsub):
                        yield _notification(data)
                except NoPermissionError as error:
                    if not self._warned:
                        log.warning("the redis user has no rights to channels; stops and events take longer")
                    self._warned = True
                    await asyncio.sleep(LISTEN_AGAIN_WITHOUT_RIGHTS)
                    raise StoreUnavailable from error

    def _key(self, name: str) -> str:
        return _key(self._store, name)


def alive_key(store: Store) -> str:
    """Return the key of the workers that live, each as the JSON of its `WorkerInfo`."""
    return _key(store, "alive")


def _key(store: Store, name: str) -> str:
    """Return a key of the workers. The braces put all of them into one slot of a Redis Cluster."""
    return f"{store.prefix}:{{workers}}:{name}"


async def _messages(pubsub: PubSub) -> AsyncIterator[bytes]:
    asked = False
    while True:
        message: dict[str, Any] | None = await pubsub.get_message(timeout=LISTEN_TIMEOUT)
        if message is None:
            if asked:
                raise TimeoutError("the subscription does not answer")
            await pubsub.ping()
            asked = True
        else:
            asked = False
            if message["type"] in ("message", "smessage"):
                yield message["data"]
            elif message["type"] == "sunsubscribe":
                raise LineError("the channel has moved to another node")


def _notification(data: bytes) -> Notification:
    head, _, events = data.partition(b"\n")
    kind, session_id, *numbers = head.decode().split(" ")
    batch = Batch(int(numbers[0]), int(numbers[1]), events) if len(numbers) == 2 else None
    return Notification(kind, session_id, batch)
