"""Viewers of one session: they see the same, they come and go, and none of them costs another anything."""

from __future__ import annotations

import asyncio
import gc
import json

import pytest

from tests.broker import Broker, running
from tests.events import Event
from tests.scripted import Call, ScriptedUpstream, chunk
from tests.stopwatch import Stopwatch


def plain(call: Call) -> None:
    call.open()
    for word in ("one", "two", "three"):
        call.chunk(word)
    call.chunk("", finish="stop")
    call.done()


async def follow(broker: Broker, session: str) -> list[Event]:
    """Return all that a page gets which reconnects for as long as it is asked to."""
    events: list[Event] = []
    cursor = None
    async with asyncio.timeout(10):
        while not (events and events[-1].kind in ("done", "error")):
            async with broker.stream(session, cursor) as connection:
                assert connection.status == 200
                events += await connection.rest()
                cursor = connection.last_id or cursor
    return events


async def test_many_pages_at_once_are_one_generation(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    session = await broker.prepare()
    views = await asyncio.gather(*(broker.read(session) for _ in range(16)))
    assert all(view == views[0] for view in views)
    assert [event.id for event in views[0]] == ["1-1", "1-2", "1-3", "1-4", "1-5.end"]
    assert len(upstream.calls) == 1


async def test_many_pages_at_two_workers_are_one_generation(
    valkey_url: str, broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    async with running(valkey_url, upstream) as other:
        session = await broker.prepare()
        views = await asyncio.gather(*(follow((broker, other)[n % 2], session) for n in range(32)))
        assert all(view == views[0] for view in views)
        assert views[0][-1].kind == "done"
    assert len(upstream.calls) == 1


async def test_every_session_has_its_own_call(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    sessions = [await broker.prepare() for _ in range(20)]
    views = await asyncio.gather(*(broker.read(session) for session in sessions))
    assert all(view[-1].kind == "done" for view in views)
    assert len(upstream.calls) == 20


async def test_one_page_may_leave_while_another_stays(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, disconnect_grace=0) as broker:
        session = await broker.prepare()
        async with broker.stream(session) as stays:
            call = (await upstream.call()).open()
            async with broker.stream(session) as leaves:
                call.chunk("one")
                await leaves.take(1)
            call.chunk("two", finish="stop")
            call.done()
            assert [event.kind for event in await stays.rest()] == ["chunk", "chunk", "done"]
    assert len(upstream.calls) == 1


# Nobody watches


async def test_a_page_that_leaves_for_good_ends_its_session(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, disconnect_grace=0.5) as broker:
        session = await broker.prepare()
        async with broker.stream(session) as connection:
            call = (await upstream.call()).open()
            call.chunk("one")
            await connection.take(1)
            connection.cut()
            stopwatch = Stopwatch()
            await call.wait_gone()
            assert stopwatch.elapsed > 0.4
            assert stopwatch.seconds < 1.5
        events = await follow(broker, session)
        assert [event.id for event in events] == ["1-1", "1-2.end"]
        assert events[-1].kind == "error"
        assert events[-1].json["code"] == "abandoned"
        assert (await broker.cancel(session)).json == {"state": "abandoned"}


async def test_with_no_grace_it_ends_at_once(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, disconnect_grace=0) as broker:
        session = await broker.prepare()
        async with broker.stream(session) as connection:
            call = (await upstream.call()).open()
            call.chunk("one")
            await connection.take(1)
            connection.cut()
            stopwatch = Stopwatch()
            await call.wait_gone()
            assert stopwatch.seconds < 0.5
        assert (await follow(broker, session))[-1].json["code"] == "abandoned"


async def test_a_page_that_leaves_before_the_first_token_ends_it(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, disconnect_grace=0) as broker:
        async with broker.stream(await broker.prepare()) as connection:
            call = await upstream.call()
            connection.cut()
            await call.wait_gone()


async def test_a_page_that_comes_back_in_time_goes_on_where_it_was(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, disconnect_grace=1) as broker:
        session = await broker.prepare()
        async with broker.stream(session) as connection:
            call = (await upstream.call()).open()
            call.chunk("one")
            await connection.take(1)
        call.chunk("two")
        async with broker.stream(session, connection.last_id) as connection:
            assert [event.id for event in await connection.take(1)] == ["1-2"]
        async with broker.stream(session, connection.last_id) as connection:
            call.chunk("three", finish="stop")
            call.done()
            assert [event.id for event in await connection.rest()] == ["1-3", "1-4.end"]
    assert len(upstream.calls) == 1


async def test_an_answer_that_ends_in_the_grace_can_be_read_later(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    session = await broker.prepare()
    async with broker.stream(session) as connection:
        call = (await upstream.call()).open()
        call.chunk("one")
        await connection.take(1)
    call.chunk("two", finish="stop")
    call.done()
    assert [event.id for event in await follow(broker, session)] == ["1-1", "1-2", "1-3.end"]


async def test_pages_that_leave_at_once_do_no_harm(
    valkey_url: str,
    upstream: ScriptedUpstream,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    async with running(valkey_url, upstream, disconnect_grace=0) as broker:
        host, port = broker.url.removeprefix("http://").split(":")
        for number in range(40):
            session = await broker.prepare()
            _, writer = await asyncio.open_connection(host, int(port))
            head = f"GET /stream/{session} HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n\r\n"
            writer.write(head.encode())
            for _ in range(number % 20):
                await asyncio.sleep(0)
            writer.transport.abort()
        upstream.replies = [plain]
        assert (await broker.read(await broker.prepare()))[-1].kind == "done"
    told = caplog.text + "".join(capfd.readouterr())
    assert "rror" not in told.replace("errors=0", "")


async def test_a_broker_that_crashes_leaves_no_connection_open(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async def fall_over() -> None:
        async with (
            running(valkey_url, upstream) as broker,
            broker.stream(await broker.prepare()) as connection,
        ):
            (await upstream.call()).open().chunk("one")
            await connection.take(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fall_over()
    await upstream.calls[0].wait_gone()
    gc.collect()  # an unclosed connection causes a warning when it is collected


# Slow readers

MEGABYTE = chunk("x" * 1_000_000)


def torrent(call: Call) -> None:
    """Send more than all buffers on the way can take, and no end."""
    call.open()
    for _ in range(7):
        call.event(json.dumps(MEGABYTE).encode())


async def test_a_page_that_stops_reading_is_cut_off(valkey_url: str, upstream: ScriptedUpstream) -> None:
    upstream.replies = [torrent]
    async with running(valkey_url, upstream, send_timeout=0.5, disconnect_grace=0) as broker:
        async with broker.stream(await broker.prepare(), receive_buffer=4096):
            call = await upstream.call()
            await call.wait_gone()  # for its only viewer counts as gone


async def test_a_page_that_stops_reading_slows_nobody_else(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [torrent]
    async with running(valkey_url, upstream, send_timeout=0.5) as broker:
        session = await broker.prepare()
        async with broker.stream(session, receive_buffer=4096), broker.stream(session) as quick:
            events = await quick.take(7)
            call = await upstream.call()
            call.chunk("the end", finish="stop")
            call.done()
            events += await quick.rest()
            assert [event.id for event in events] == [*(f"1-{n}" for n in range(1, 9)), "1-9.end"]
            assert events[0].json == MEGABYTE
        assert await follow(broker, session) == events
    assert len(upstream.calls) == 1


async def test_a_page_that_only_reads_slowly_gets_everything(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [torrent]
    async with running(valkey_url, upstream, send_timeout=2) as broker:
        session = await broker.prepare()
        async with broker.stream(session, receive_buffer=65536) as slow, broker.stream(session) as quick:
            await quick.take(7)
            call = await upstream.call()
            call.chunk("the end", finish="stop")
            call.done()
            end = await quick.rest()
            assert (await slow.rest())[-2:] == end
