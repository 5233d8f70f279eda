"""Workers in Redis: the marker by which they know that Redis came back empty, and their notifications.

The marker is one random word for all workers. Where it is gone or another, Redis has lost everything that had been
written. Notifications go to a pub/sub channel of one worker. They only make things faster: a subscription can die
without a word, so everything that they tell can also be found by looking.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from redis.exceptions import NoPermissionError

from broker.core.errors import StoreRefused, StoreUnavailable
from broker.core.replay import Batch
from broker.store.connection import CALL_TIMEOUT, Store, bounded_call, command_call, store_errors

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from redis.asyncio.client import PubSub

log = structlog.get_logger(__name__)

LISTEN_AGAIN_WITHOUT_RIGHTS = 30.0
"""Seconds until a Redis user without rights to channels, which is the default of Redis 7, is tried again."""

MARKER_TTL = 86_400
"""Seconds that the marker is kept after any worker last looked at it."""

WIPED_FOR = 10
"""Seconds after Redis came back empty in which its owners may still be writing their sessions again."""

LISTEN_TIMEOUT = 5.0
"""Seconds of silence after which a subscription is asked whether it lives."""


_RUN_ID = re.compile(r"run_id:(\w+)")


class Notification(NamedTuple):
    """What a notification says.

    Attributes:
        kind: ``events`` (with the batch), ``ended``, ``cancel``, ``watched``.
        session_id: of which session.
        batch: the events of ``events``.
    """

    kind: str
    session_id: str
    batch: Batch | None


class MarkerStatus(NamedTuple):
    """What Redis says of the marker.

    Attributes:
        marker: the word that all workers know, until Redis loses it.
        wiped: some worker has found lately that Redis came back empty.
        server: names the process of the server; empty where it does not tell.
        now_ms: the clock of Redis, in ms.
    """

    marker: str
    wiped: bool
    server: str
    now_ms: int


class WorkerStore:
    """The marker and notifications. Methods raise `StoreUnavailable` where Redis cannot be reached.

    Args:
        store: the connection.
        worker: this worker's id.
    """

    def __init__(self, store: Store, *, worker: str) -> None:
        self.worker = worker
        self._store = store
        self._read_marker = store.script("marker", {"MARKER_S": MARKER_TTL})
        self._warned = False
        self._names_server = True

    @property
    def connections_made(self) -> int:
        """How many connections to Redis this worker has made so far."""
        return self._store.connections_made

    async def marker(self) -> MarkerStatus:
        """Return the marker, made where there was none, and the server that has it."""
        read = self._read_marker.call(
            marker=self._key("marker"), wiped=self._key("wiped"), new_marker=secrets.token_hex(8)
        )
        if not self._names_server:
            [found] = await self._store.run([read])
            return _marker_status(found, "")
        found, info = await self._store.run_each([read, command_call("INFO", "server")])
        if isinstance(found, StoreRefused):
            raise found
        if isinstance(info, StoreRefused):  # a user without the right to INFO
            log.warning("redis does not tell which server it is; a failover is not noticed")
            self._names_server = False
            return _marker_status(found, "")
        run_id = _RUN_ID.search(info.decode())
        return _marker_status(found, run_id[1] if run_id else "")

    async def tell_wiped(self) -> None:
        """Tell all workers, those too that are only starting, that Redis came back empty."""
        async with bounded_call():
            await self._store.redis.set(self._key("wiped"), "1", ex=WIPED_FOR)

    async def listen(self) -> AsyncGenerator[Notification, None]:
        """This worker's notifications, until the subscription breaks.

        Raises:
            StoreUnavailable: it broke. Nothing says what was rung in between.
        """
        with store_errors():
            async with self._store.redis.pubsub() as pubsub:
                async with asyncio.timeout(CALL_TIMEOUT):
                    await pubsub.subscribe(f"{self._store.channels}{self.worker}")
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
        """A key of the workers; the braces put all of them into one slot of a Redis Cluster."""
        return f"{self._store.prefix}:{{workers}}:{name}"


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
            if message["type"] == "message":
                yield message["data"]


def _marker_status(reply: list[Any], server: str) -> MarkerStatus:
    marker, wiped, now_ms = reply
    return MarkerStatus(marker.decode(), bool(wiped), server, int(now_ms))


def _notification(data: bytes) -> Notification:
    head, _, events = data.partition(b"\n")
    kind, session_id, *numbers = head.decode().split(" ")
    batch = Batch(int(numbers[0]), int(numbers[1]), events) if len(numbers) == 2 else None
    return Notification(kind, session_id, batch)
