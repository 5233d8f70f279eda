"""The limits of streams of one session and of one address; all places are given back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager

import pytest

from broker.core.errors import Overloaded
from broker.web import keys
from broker.web.occupancy import STREAMS_OF_AN_ADDRESS, VIEWERS_OF_A_SESSION, Occupancy
from tests.broker import Broker, running
from tests.events import Connection
from tests.money import until
from tests.scripted import ScriptedUpstream

HERE = "127.0.0.1"


async def comes_again(connection: Connection) -> bool:
    """Return True if a page is asked to reconnect: 200, a `retry:` of about 3 s, no event, closed."""
    assert connection.status == 200
    assert await connection.rest() == []
    [retry] = [block for block in connection.blocks if b"retry:" in block]
    return 2400 <= int(retry.partition(b"retry:")[2].split()[0]) <= 3600


def places(broker: Broker) -> int:
    """Return the number of sessions and addresses with a place."""
    occupancy = broker.app[keys.OCCUPANCY]
    return len(occupancy._of_session) + len(occupancy._of_address)


async def all_free(broker: Broker) -> None:
    await until(lambda: asyncio.sleep(0, places(broker) == 0))


async def test_a_session_has_so_many_viewers(broker: Broker, upstream: ScriptedUpstream) -> None:
    session = await broker.prepare()
    async with AsyncExitStack() as watching:
        lines = [
            await watching.enter_async_context(broker.stream(session)) for _ in range(VIEWERS_OF_A_SESSION)
        ]
        call = (await upstream.call()).open()
        for cursor in (None, "1-0"):
            async with broker.stream(session, cursor) as line:
                assert await comes_again(line)
        refused = await broker.ask("GET", f"/stream/{session}")
        assert (refused.status, refused.code) == (503, "overloaded")
        assert int(refused.headers["Retry-After"]) > 0
        await watching.enter_async_context(
            broker.stream(await broker.prepare())
        )  # another session has places
        call.chunk("x", finish="stop")
        call.done()
        for line in lines:
            assert (await line.rest())[-1].kind == "done"
        assert (await broker.read(session))[-1].kind == "done"
    await all_free(broker)


async def test_an_address_has_so_many_streams(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with (
        running(
            valkey_url,
            upstream,
            max_concurrent_streams=STREAMS_OF_AN_ADDRESS,
            api_keys=(("one", "key-of-the-first-client"), ("two", "key-of-the-second-client")),
        ) as broker,
        AsyncExitStack() as watching,
    ):
        keys_of_clients = ["first"] * STREAMS_OF_AN_ADDRESS + ["second"]
        prepared = [
            await broker.post(headers={"Authorization": f"Bearer key-of-the-{name}-client"})
            for name in keys_of_clients
        ]
        sessions = [answer.json["sessionId"] for answer in prepared]
        first = await watching.enter_async_context(broker.stream(sessions[0], address=HERE))
        call = (await upstream.call()).open()
        for session in sessions[1:-1]:
            await watching.enter_async_context(broker.stream(session, address=HERE))
        async with broker.stream(sessions[-1], address=HERE) as connection:
            assert await comes_again(connection)
        refused = await broker.ask("GET", f"/stream/{sessions[-1]}")
        assert (refused.status, refused.code) == (503, "overloaded")
        async with broker.stream(sessions[-1], address="127.0.0.9") as connection:
            assert connection.status == 200
            await upstream.call(len(sessions) - 1)
        call.chunk("x", finish="stop")
        call.done()
        assert (await first.rest())[-1].kind == "done"
        await until(lambda: asyncio.sleep(0, len(upstream.calls) == len(sessions)))
        async with broker.stream(sessions[0], "1-0", address=HERE) as connection:
            assert (await connection.rest())[-1].kind == "done"
        await watching.aclose()
        await all_free(broker)


@contextmanager
def taken(occupancy: Occupancy, session: str, address: str) -> Iterator[None]:
    """Take a place during the block."""
    with occupancy.place() as place:
        place.take(session, address)
        yield


def test_an_address_may_have_the_streams_of_a_client() -> None:
    occupancy = Occupancy(1000, of_a_client=STREAMS_OF_AN_ADDRESS + 2)
    with ExitStack() as held:
        for n in range(STREAMS_OF_AN_ADDRESS + 2):
            held.enter_context(taken(occupancy, f"s{n}", "a"))
        with pytest.raises(Overloaded), taken(occupancy, "s", "a"):
            pass


async def test_the_address_of_a_trusted_proxys_header_counts(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with (
        running(
            valkey_url, upstream, trusted_proxies=("private",), max_concurrent_streams=STREAMS_OF_AN_ADDRESS
        ) as broker,
        AsyncExitStack() as watching,
    ):

        async def come(address: str) -> Connection:
            headers = {"X-Forwarded-For": address}
            return await watching.enter_async_context(
                broker.stream(await broker.prepare(), headers=headers, address=HERE)
            )

        for n in range(STREAMS_OF_AN_ADDRESS):
            await come(f"2001:db8:0:1::{n:x}")
        assert await comes_again(await come("2001:db8:0:1:ffff::1"))
        assert (await come("2001:db8:0:2::1")).status == 200
        await upstream.call(STREAMS_OF_AN_ADDRESS)


async def test_simultaneous_streams_do_not_exceed_the_limit(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    session = await broker.prepare()
    async with AsyncExitStack() as watching:
        lines = await asyncio.gather(
            *(watching.enter_async_context(broker.stream(session)) for _ in range(3 * VIEWERS_OF_A_SESSION))
        )
        call = await upstream.call()
        call.open().chunk("x")
        events = await asyncio.gather(*(line.event() for line in lines))
        assert sum(event is not None for event in events) == VIEWERS_OF_A_SESSION
    await all_free(broker)


@pytest.mark.parametrize("target", ["/stream/nonsense", "/stream/00000000-1111-4222-8333-444444444444"])
async def test_a_refused_stream_takes_no_place(broker: Broker, target: str) -> None:
    for _ in range(STREAMS_OF_AN_ADDRESS + 1):
        assert (await broker.ask("GET", target)).status == 404
    await all_free(broker)


def test_a_place_is_always_given_back() -> None:
    occupancy = Occupancy(1000)
    for _ in range(3 * STREAMS_OF_AN_ADDRESS):
        with pytest.raises(KeyError), taken(occupancy, "s", "a"):
            raise KeyError
    with ExitStack() as held:
        for n in range(VIEWERS_OF_A_SESSION):
            held.enter_context(taken(occupancy, "s", f"a{n}"))
        with pytest.raises(Overloaded), taken(occupancy, "s", "b"):
            pass
    with taken(occupancy, "s", "b"):
        pass


def test_a_worker_has_so_many_streams_and_no_more() -> None:
    occupancy = Occupancy(2)
    with taken(occupancy, "s", "a"), taken(occupancy, "t", "b"):
        with pytest.raises(Overloaded), taken(occupancy, "u", "c"):
            pass
    with taken(occupancy, "u", "c"):
        pass


async def test_another_worker_takes_viewers_up_to_its_limit(
    valkey_url: str, broker: Broker, upstream: ScriptedUpstream
) -> None:
    session = await broker.prepare()
    async with AsyncExitStack() as watching:
        owner = await watching.enter_async_context(broker.stream(session))
        call = (await upstream.call()).open()
        other = await watching.enter_async_context(running(valkey_url, upstream, max_streams=5))
        lines = await asyncio.gather(*(watching.enter_async_context(other.stream(session)) for _ in range(8)))
        call.chunk("x", finish="stop")
        call.done()
        ends = [[event.kind for event in await line.rest()] for line in lines]
        assert sorted(ends) == [[]] * 3 + [["chunk", "done"]] * 5
        assert (await owner.rest())[-1].kind == "done"
