"""Workers in Redis: their leases, the marker by which they know that Redis came back empty, and their notifications.

The marker is one random word for all workers. Where it is gone or another, Redis has lost everything that had been
written. Notifications go to a pub/sub channel of one worker. They only make things faster: a subscription can die
without a word, so everything that they tell can also be found by looking.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from redis.exceptions import NoPermissionError

from broker.core.errors import StoreUnavailable
from broker.core.replay import Batch
from broker.store.connection import CALL_TIMEOUT, Store, bounded_call, store_errors

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable

    from redis.asyncio.client import PubSub

log = structlog.get_logger(__name__)

LISTEN_AGAIN_WITHOUT_RIGHTS = 30.0
"""Seconds until a Redis user without rights to channels, which is the default of Redis 7, is tried again."""

LEASE_MS = 4000
"""Milliseconds that a lease holds."""

MARKER_TTL = 86_400
"""Seconds that the marker is kept after any worker last looked at it."""

WIPED_FOR = 10
"""Seconds after Redis came back empty in which its owners may still be writing their sessions again."""

LISTEN_TIMEOUT = 5.0
"""Seconds of silence after which a subscription is asked whether it lives."""


class Notification(NamedTuple):
    """What a notification says.

    Attributes:
        kind: ``news`` (events, with the batch), ``ended``, ``cancel``, ``watched``.
        session_id: of which session.
        batch: the events of ``news``.
    """

    kind: str
    session_id: str
    batch: Batch | None


class Renewed(NamedTuple):
    """What a renewal tells.

    Attributes:
        marker: the word that all workers know, until Redis loses it.
        wiped: some worker has found lately that Redis came back empty.
    """

    marker: str
    wiped: bool


class WorkerStore:
    """Leases, the marker and notifications. Methods raise `StoreUnavailable` where Redis cannot be reached.

    Args:
        store: the connection.
        worker: this worker's id.
    """

    def __init__(self, store: Store, *, worker: str) -> None:
        self.worker = worker
        self._store = store
        self._renew = store.script("renew")
        self._told = False

    async def renew(self) -> Renewed:
        """Renew this worker's lease and tell the marker, made where there was none."""
        keys = [self._lease(self.worker), self._marker, self._wiped]
        marker, wiped = await self._renew(keys, [LEASE_MS, MARKER_TTL, secrets.token_hex(8)])
        return Renewed(marker.decode(), bool(wiped))

    async def tell_wiped(self) -> None:
        """Tell all workers, those too that are only starting, that Redis came back empty."""
        async with bounded_call():
            await self._store.redis.set(self._wiped, "1", ex=WIPED_FOR)

    async def resign(self) -> None:
        """Give the lease back: this worker owns nothing any more."""
        async with bounded_call():
            await self._store.redis.unlink(self._lease(self.worker))

    async def absent(self, workers: Iterable[str]) -> set[str]:
        """Those of these workers that have no lease."""
        names = list(workers)
        async with bounded_call():
            pipe = self._store.redis.pipeline(transaction=False)
            for name in names:
                pipe.exists(self._lease(name))
            found = await pipe.execute()
        return {name for name, exists in zip(names, found, strict=True) if not exists}

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
                    if not self._told:
                        log.warning("the redis user has no rights to channels; stops and events take longer")
                    self._told = True
                    await asyncio.sleep(LISTEN_AGAIN_WITHOUT_RIGHTS)
                    raise StoreUnavailable from error

    def _lease(self, worker: str) -> str:
        return self._key(f"lease:{worker}")

    @property
    def _marker(self) -> str:
        return self._key("marker")

    @property
    def _wiped(self) -> str:
        return self._key("wiped")

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


def _notification(data: bytes) -> Notification:
    head, _, events = data.partition(b"\n")
    kind, session_id, *numbers = head.decode().split(" ")
    batch = Batch(int(numbers[0]), int(numbers[1]), events) if len(numbers) == 2 else None
    return Notification(kind, session_id, batch)
