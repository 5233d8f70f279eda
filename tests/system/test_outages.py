"""Redis is away or full for very long: sessions that ended are written and paid, and viewers still count."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from broker.store.journal import WATCH_MS
from broker.web import keys
from tests.broker import Broker, running
from tests.kinds import Servers, running_servers
from tests.money import Ledger, ledger, open_reservations, slots, until

if TYPE_CHECKING:
    from broker.relay.worker import Worker
    from broker.store.connection import Store
    from tests.events import Connection, Event
    from tests.scripted import Call, ScriptedUpstream

OUTAGE = 4.5
"""Seconds, longer than an end is kept and than the 3 s that stopped generations have for theirs."""


@asynccontextmanager
async def frozen(valkey: Servers) -> AsyncIterator[None]:
    valkey.freeze()
    try:
        yield
    finally:
        valkey.thaw()


@asynccontextmanager
async def full(valkey: Servers) -> AsyncIterator[None]:
    async with valkey.client() as client:
        await client.config_set("maxmemory", 1)
        try:
            yield
        finally:
            await client.config_set("maxmemory", 0)


def worker_of(broker: Broker) -> Worker:
    return broker.app[keys.WORKER]


def store_of(broker: Broker) -> Store:
    return broker.app[keys.STORE]


async def state_of(broker: Broker, session: str) -> object:
    """A session's state in Redis."""
    return await broker.redis.hget(store_of(broker).session_keys(session)["session"], "state")


def of(events: list[Event]) -> list[tuple[str, str | None]]:
    return [(event.kind, event.id) for event in events]


def finish(call: Call) -> None:
    call.chunk("b", finish="stop")
    call.usage(cost=0.002)
    call.done()


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [frozen, full])
async def test_an_end_in_a_very_long_outage_is_booked_once(
    upstream: ScriptedUpstream, trouble: Callable[[Servers], AbstractAsyncContextManager[None]]
) -> None:
    """With a short time to resume, and with none."""
    async with running_servers() as valkey, AsyncExitStack() as stack:
        brokers = [
            await stack.enter_async_context(running(valkey.url, upstream, resume_ttl=ttl)) for ttl in (1, 0)
        ]
        sessions, lines, calls = [], [], []
        for number, broker in enumerate(brokers, 1):
            sessions.append(await broker.prepare())
            lines.append(await stack.enter_async_context(broker.stream(sessions[-1])))
            calls.append((await upstream.call(number)).open())
            calls[-1].chunk("a")
            await lines[-1].take(1)
        async with trouble(valkey):
            for line, call in zip(lines, calls, strict=True):
                finish(call)
                assert of(await line.rest()) == [("chunk", "1-2"), ("chunk", "1-3"), ("done", "1-4.end")]
            await asyncio.sleep(OUTAGE)  # it is what this is about
        redis = brokers[0].redis

        async def written() -> bool:
            states = [await state_of(brokers[0], session) for session in sessions]
            return states == [b"done", b"done"] and (await ledger(redis)).requests == 2

        await until(written)
        assert await ledger(redis) == Ledger(2, 0, 30, 4_000_000)
        assert await slots(redis) == await open_reservations(redis) == 0


# The only viewer is on another worker


class Watched:
    """A session that runs on one worker and is watched on another only.

    Attributes:
        call: the upstream's side of it.
        far: the viewer's connection, which has had one chunk.
    """

    def __init__(self, valkey: Servers, owner: Broker, session: str, call: Call, far: Connection) -> None:
        self.valkey = valkey
        self.call = call
        self.far = far
        self._redis = owner.redis
        self._keys = store_of(owner).session_keys(session)

    async def is_written(self) -> bool:
        """Return True if Redis has it."""
        return bool(await self._redis.exists(self._keys["session"]))

    async def is_registered(self) -> bool:
        """Return True if the other worker is registered as a viewer."""
        return bool(await self._redis.zcard(self._keys["viewers"]))

    async def lapse(self) -> None:
        """Let the time of the registration be over."""
        await self._redis.delete(self._keys["viewers"])

    async def stays(self, seconds: float) -> None:
        """Check that the upstream's connection is not closed in this time."""
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.call.gone.wait()

    async def goes_on_to_its_end(self) -> None:
        """Make sure that the viewer gets what follows on the second chunk, and a good end."""
        assert of(await self.far.take(1)) == [("chunk", "1-2")]
        finish(self.call)
        assert of(await self.far.rest()) == [("chunk", "1-3"), ("chunk", "1-4"), ("done", "1-5.end")]


@asynccontextmanager
async def watched_elsewhere(
    upstream: ScriptedUpstream, *, grace: float, keeps: bool = False
) -> AsyncIterator[Watched]:
    async with (
        running_servers(keeps=keeps) as valkey,
        running(valkey.url, upstream, disconnect_grace=grace, journal_interval_ms=20) as owner,
        running(valkey.url, upstream) as other,
    ):
        session = await owner.prepare()
        async with owner.stream(session) as connection, other.stream(session) as far:
            call = (await upstream.call()).open()
            call.chunk("a")
            await connection.take(1)
            await far.take(1)
            connection.cut()
            await until(lambda: asyncio.sleep(0, not worker_of(owner).viewers))
            yield Watched(valkey, owner, session, call, far)


@pytest.mark.slow
async def test_viewers_elsewhere_count_while_redis_is_full(upstream: ScriptedUpstream) -> None:
    async with watched_elsewhere(upstream, grace=1) as watched:
        async with full(watched.valkey):
            await watched.lapse()
            await watched.stays(3.5)  # the owner's next check, the grace, and as much again
            assert await watched.is_registered()
            watched.call.chunk("told later")
            await watched.stays(1.5)  # now it has something that it cannot write
        await watched.goes_on_to_its_end()


@pytest.mark.parametrize(
    "keeps",
    [
        pytest.param(True, id="away for long", marks=pytest.mark.slow),
        pytest.param(False, id="come back empty"),
    ],
)
async def test_viewers_elsewhere_count_until_they_can_register_again(
    upstream: ScriptedUpstream, keeps: bool
) -> None:
    """Without any grace: a viewer that is not registered at the first check afterwards counts as gone at once."""
    async with watched_elsewhere(upstream, grace=0, keeps=keeps) as watched:
        watched.valkey.kill()
        if keeps:
            await asyncio.sleep(WATCH_MS / 1000 + 0.5)  # until the registration in Redis has expired
        await watched.valkey.start()
        await until(watched.is_written, within=10)
        watched.call.chunk("written at once, and what Redis says to it counts")
        await watched.goes_on_to_its_end()
