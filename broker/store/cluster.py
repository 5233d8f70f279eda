"""A Redis Cluster: which node serves a key, and the calls that are sent to each.

The keys of one call are in one slot, so each call has one node. The calls of a round trip are split by node and sent at
the same time. What a node answers about slots that have moved is followed within the time limit of the calls.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import structlog
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as LineError

from broker.store.call import command_call

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence

    from redis.asyncio import Redis
    from redis.asyncio.client import PubSub

    from broker.store.call import Call
    from broker.store.node import Node

log = structlog.get_logger(__name__)

MAX_HOPS: Final = 16
"""Maximum number of times that one call is sent: each move of a slot needs one more, and each missing script."""

AGAIN: Final = 0.02
"""Seconds after which a call is repeated whose keys are about to move."""

ASK_MAP: Final = 1.0
"""Maximum seconds of a question for the map of slots: a first connection with TLS takes five round trips until then."""

MAP_PAUSE: Final = 0.1
"""Seconds between two such questions while nodes cannot be reached."""

LEFT_AFTER: Final = 5.0
"""Seconds after which the connections to a node that has left are closed. Its calls have ended by then."""

MAX_ASKED: Final = 8
"""Maximum number of nodes that are asked at a time."""

MAX_NOTIFYING: Final = 256
"""Maximum number of calls that send notifications at a time. Further ones are dropped: they only save time."""

_ASKING: Final = command_call("ASKING")
_SLOTS: Final = command_call("CLUSTER", "SLOTS")
_LOST = (RedisError, OSError, TimeoutError)


class _Step(NamedTuple):
    """One call that is to be sent.

    Attributes:
        at: its place among the calls.
        node: where it is sent; None if nobody serves its slot.
        asks: True if the slot is about to move there.
        loads: True if the scripts have to be loaded before.
    """

    at: int
    node: Node | None
    asks: bool = False
    loads: bool = False


class Cluster:
    """The nodes of a cluster.

    Args:
        seeds: host and port of some nodes.
        open_node: makes a node; no connection is opened yet.
        scripts: returns the calls that load all scripts.
    """

    def __init__(
        self,
        seeds: Iterable[tuple[str, int]],
        open_node: Callable[[str, int], Node],
        scripts: Callable[[], list[Call]],
    ) -> None:
        self._seeds = tuple(seeds)
        self._open_node = open_node
        self._scripts = scripts
        self._nodes: dict[tuple[str, int], Node] = {}
        self._slots: list[Node | None] = []
        self._mapping: asyncio.Task[None] | None = None
        self._mapped_at = float("-inf")
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def redis(self) -> Redis:
        """The client of the library for one of the nodes."""
        return self._node(*self._seeds[0]).redis

    @property
    def is_lost(self) -> bool:
        """True if the connection to one of the nodes was lost."""
        return any(node.is_lost for node in self._nodes.values())

    @property
    def is_prompt(self) -> bool:
        """False: the calls of one round trip may go to several nodes, of which one may be away."""
        return False

    @property
    def takes_any_keys(self) -> bool:
        """False: the keys of a call have to be in one slot."""
        return False

    # Calls

    async def run(self, calls: Sequence[Call], give_up_at: float) -> list[Any]:
        """Send each call to the node of its key, all at the same time; those to one node in this order.

        Returns their replies; that of a refused one, or of one whose node does not answer, is an error.

        Args:
            calls: the calls.
            give_up_at: the time of the event loop until which the replies are waited for.

        Raises:
            RedisError, OSError, TimeoutError: no node answers. Some calls may have run or may still run.
        """
        if not self._slots:
            async with asyncio.timeout_at(give_up_at):
                await self._know_slots()
        replies: list[Any] = [None] * len(calls)
        steps = [_Step(at, self._serving(call)) for at, call in enumerate(calls)]
        for _ in range(MAX_HOPS):
            steps, pause = await self._hop(calls, steps, replies, give_up_at)
            if not steps or asyncio.get_running_loop().time() + pause >= give_up_at:
                break
            await asyncio.sleep(pause)
        for at, call in enumerate(calls):
            if isinstance(replies[at], AskError | TryAgainError | ClusterDownError):
                replies[at] = LineError(str(replies[at]))  # nothing has run
            elif call.tells and isinstance(replies[at], list):
                notifications, *reply = replies[at]
                replies[at] = reply[0] if reply else None
                self._notify(notifications)
        if replies and all(
            isinstance(each, _LOST) and not isinstance(each, ResponseError) for each in replies
        ):
            raise replies[0]
        return replies

    async def _hop(
        self, calls: Sequence[Call], steps: Sequence[_Step], replies: list[Any], give_up_at: float
    ) -> tuple[list[_Step], float]:
        """Send calls once and note the replies. Returns what is to be sent again, and seconds to wait before."""
        by_node: dict[Node | None, list[_Step]] = {}
        for step in steps:
            by_node.setdefault(step.node, []).append(step)
        parts = [self._send(node, calls, part, give_up_at) for node, part in by_node.items()]
        found = await asyncio.gather(*parts) if len(parts) > 1 else [await parts[0]] if parts else []
        again: list[_Step] = []
        pause = 0.0
        for (node, part), answers in zip(by_node.items(), found, strict=True):
            for step, reply in zip(part, answers, strict=True):
                replies[step.at] = reply
                if not isinstance(reply, Exception) or node is None:
                    continue
                if isinstance(reply, NoScriptError):
                    again.append(step._replace(loads=True))
                elif isinstance(reply, MovedError):
                    self._slots[reply.slot_id] = moved = self._node(
                        reply.host or self._host_of(node), reply.port
                    )
                    self._map_soon()
                    again.append(_Step(step.at, moved))
                elif isinstance(reply, AskError):
                    target = self._node(reply.host or self._host_of(node), reply.port)
                    again.append(_Step(step.at, target, asks=True))
                elif isinstance(reply, TryAgainError):
                    pause = AGAIN
                    again.append(step)
                elif isinstance(reply, ClusterDownError):
                    self._map_soon()
        return again, pause

    async def _send(
        self, node: Node | None, calls: Sequence[Call], part: Sequence[_Step], give_up_at: float
    ) -> list[Any]:
        """Send calls to one node. Returns their replies; the same error for all if it does not answer."""
        if node is None:
            self._map_soon()
            return [LineError("No node serves this slot.")] * len(part)
        packed = self._scripts() if any(step.loads for step in part) else []
        wanted = []
        for step in part:
            if step.asks:
                packed.append(_ASKING)
            wanted.append(len(packed))
            packed.append(calls[step.at])
        try:
            replies = await node.send(packed, give_up_at)
        except _LOST as error:
            self._map_soon()
            return [error] * len(part)
        return [replies[at] for at in wanted]

    async def everywhere(self, calls: Sequence[Call]) -> list[Call]:
        """Return these calls once for each node that serves slots.

        Raises:
            RedisError, OSError, TimeoutError: the nodes are not known.
        """
        async with asyncio.timeout(ASK_MAP):
            await self._know_slots()
        slots: dict[Node, int] = {}
        for slot, node in enumerate(self._slots):
            if node is not None and node not in slots:
                slots[node] = slot
        return [call._replace(key=slot) for slot in slots.values() for call in calls]

    async def leave_old_primary(self) -> None:
        """Do nothing: the other nodes tell one that is replaced at once."""

    # Notifications

    @asynccontextmanager
    async def subscribed(self, channel: str) -> AsyncIterator[PubSub]:
        """Subscribe to a sharded channel during the block."""
        await self._know_slots()
        node = self._slots[key_slot(channel.encode())]
        if node is None:
            self._map_soon()
            raise LineError("No node serves this slot.")
        try:
            async with node.subscribed(channel, sharded=True) as pubsub:
                yield pubsub
        except _LOST:
            self._map_soon()  # the channel may have moved
            raise

    def _notify(self, notifications: Sequence[bytes]) -> None:
        """Send notifications in the background: their channels are in other slots than the keys of a script."""
        if not notifications or len(self._tasks) >= MAX_NOTIFYING:
            return
        calls = [
            command_call("SPUBLISH", channel, text)
            for channel, text in zip(notifications[::2], notifications[1::2], strict=True)
        ]
        self._spawn(self._notify_all(calls))

    async def _notify_all(self, calls: Sequence[Call]) -> None:
        try:
            await self.run(calls, asyncio.get_running_loop().time() + ASK_MAP)
        except _LOST as error:
            log.debug("notifications lost", error=type(error).__name__)

    # The map of slots

    def _serving(self, call: Call) -> Node | None:
        key = call.key
        if not isinstance(key, int):
            key = key_slot(key if isinstance(key, bytes) else key.encode(errors="surrogateescape"))
        return self._slots[key]

    def _node(self, host: str, port: int) -> Node:
        node = self._nodes.get((host, port))
        if node is None:
            node = self._nodes[host, port] = self._open_node(host, port)
        return node

    def _host_of(self, node: Node) -> str:
        return next((host for (host, _), each in self._nodes.items() if each is node), self._seeds[0][0])

    async def _know_slots(self) -> None:
        """Wait until the slots are known.

        Raises:
            ConnectionError: no node tells.
        """
        if not self._slots:
            self._map_soon()
            if self._mapping is not None:
                await asyncio.shield(self._mapping)
            if not self._slots:
                raise LineError("No node of the cluster tells which slots it has.")

    def _map_soon(self) -> None:
        """Ask for the slots, in the background, unless somebody asks already."""
        if self._mapping is None:
            self._mapping = self._spawn(self._map())

    async def _map(self) -> None:
        """Ask several nodes for the slots, and use the first answer."""
        loop = asyncio.get_running_loop()
        asked: list[asyncio.Task[tuple[list[Any], str]]] = []
        try:
            await asyncio.sleep(max(0.0, self._mapped_at + MAP_PAUSE - loop.time()))
            nodes = list(dict.fromkeys([*self._nodes.values(), *(self._node(*seed) for seed in self._seeds)]))
            give_up_at = loop.time() + ASK_MAP
            asked = [
                asyncio.create_task(self._ask_for_slots(node, give_up_at))
                for node in random.sample(nodes, min(MAX_ASKED, len(nodes)))
            ]
            for answer in asyncio.as_completed(asked):
                ranges, host = await answer
                if ranges:
                    self._take(ranges, host)
                    break
        finally:
            self._mapping = None
            self._mapped_at = loop.time()
            for each in asked:
                each.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _ask_for_slots(self, node: Node, give_up_at: float) -> tuple[list[Any], str]:
        """Return the slots as a node knows them, and its host; nothing if it does not answer."""
        try:
            [ranges] = await node.send([_SLOTS], give_up_at)
        except _LOST as error:
            return [], type(error).__name__
        if isinstance(ranges, Exception):
            log.warning("a node of the cluster does not tell its slots", error=str(ranges)[:200])
            return [], ""
        return ranges, self._host_of(node)

    def _take(self, ranges: Sequence[Any], host: str) -> None:
        """Use a new map of the slots, and close the connections to nodes that have left."""
        slots: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for first, last, (name, port, *_), *_ in ranges:
            told = (name or b"").decode()
            node = self._node(host if told in ("", "?") else told, int(port))
            slots[first : last + 1] = [node] * (last + 1 - first)
        self._slots = slots
        serving = set(slots)
        for address, node in tuple(self._nodes.items()):
            if node not in serving and address not in self._seeds:
                del self._nodes[address]
                self._spawn(_close_later(node))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name="cluster")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Close all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for node in self._nodes.values():
            await node.close()


async def _close_later(node: Node) -> None:
    try:
        await asyncio.sleep(LEFT_AFTER)
    finally:
        await node.close()
