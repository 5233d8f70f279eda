"""A page that does nothing but wait gets its answer: in order, on whatever worker, with all slots in use."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from broker.store.accounts import LINE
from tests.broker import Broker, running
from tests.money import until

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from tests.scripted import Call, ScriptedUpstream

pytestmark = pytest.mark.parametrize("redis_server", ["valkey", "redis"], indirect=True)

PAGES, SLOTS = 200, 5


def quick(call: Call) -> None:
    call.open()
    call.chunk("Hello", finish="stop")
    call.usage(prompt_tokens=3, completion_tokens=4)
    call.done()


async def test_a_waiting_page_gets_its_place_and_a_retry_time(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, max_concurrent_streams=1) as broker:
        sessions = [await broker.prepare() for _ in range(3)]
        async with broker.stream(sessions[0]) as first:
            call = await upstream.call()
            for position, session in enumerate(sessions[1:], 1):
                async with broker.stream(session) as connection:
                    [event] = await connection.rest()
                    assert (event.kind, event.id) == ("queued", None)
                    assert event.json == {"position": position, "of": position}
                    assert connection.retry == 2000
            quick(call)
            assert (await first.rest())[-1].kind == "done"
        upstream.replies = [quick]
        for session in sessions[1:]:
            assert (await broker.read(session))[-1].kind == "done"


async def test_a_caller_without_an_event_stream_takes_no_place(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, max_concurrent_streams=1) as broker:
        first, second = await broker.prepare(), await broker.prepare()
        async with broker.stream(first):
            await upstream.call()
            refused = await broker.ask("GET", f"/stream/{second}", headers={"Accept": "*/*"})
            assert (refused.status, refused.code) == (429, "too_many_streams")
            third = await broker.prepare()
            [event] = await broker.read(third)
            assert event.json == {"position": 1, "of": 1}


async def test_a_cancelled_page_gives_up_its_place(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, max_concurrent_streams=1) as broker:
        running_one, waiting, last = [await broker.prepare() for _ in range(3)]
        async with broker.stream(running_one):
            await upstream.call()
            await broker.read(waiting)
            assert (await broker.read(last))[0].json == {"position": 2, "of": 2}
            assert (await broker.cancel(waiting)).status == 202
            assert (await broker.read(last))[0].json == {"position": 1, "of": 1}


async def test_a_session_that_expires_in_line_gives_up_its_place(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with (
        running(valkey_url, upstream, max_concurrent_streams=1, session_ttl=2) as broker,
        running(valkey_url, upstream, max_concurrent_streams=1) as other,
    ):
        async with broker.stream(await broker.prepare()):
            await upstream.call()
            first, second = await broker.prepare(), await other.prepare()
            assert (await broker.read(first))[0].json == {"position": 1, "of": 1}
            assert (await broker.read(second))[0].json == {"position": 2, "of": 2}
            redis = broker.redis
            await until(lambda: _expired(redis, first), within=20)
            [event] = await broker.read(first)
            assert event.json["code"] == "session_not_found"
            assert (await broker.read(second))[0].json == {"position": 1, "of": 1}


async def _expired(redis: Redis, session: str) -> bool:
    return not await redis.keys(f"*:session:{{{session}}}")


class Page:
    """An EventSource as browsers have it: it comes back after the time that it was told, until the end."""

    def __init__(self, broker: Broker, session: str) -> None:
        self.broker, self.session = broker, session
        self.waits = 0

    async def run(self) -> None:
        while True:
            async with self.broker.stream(self.session) as connection:
                events = await connection.rest()
            if events and events[-1].kind == "done":
                return
            self.waits += 1
            await asyncio.sleep(connection.retry / 1000)


@pytest.mark.slow
async def test_two_hundred_pages_of_one_client_share_five_slots(
    valkey_url: str, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All times are a tenth of the real ones."""
    tenth = {
        "PLACE_MS": 15_000,
        "LATE_MS": 1000,  # this machine may be busy, which must not look like a page that has left
        "MIN_RETRY_MS": 200,
        "MAX_RETRY_MS": 1000,
        "RETRY_STEP_MS": 20,
    }
    for name, value in tenth.items():
        monkeypatch.setitem(LINE, name, value)
    at_once, most = 0, 0
    order: list[str] = []

    def answer(call: Call) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        order.append(call.body["messages"][-1]["content"])

        def end() -> None:
            nonlocal at_once
            at_once -= 1
            quick(call)

        asyncio.get_running_loop().call_later(0.05, end)

    upstream.replies = [answer]
    limits = {"max_concurrent_streams": SLOTS, "max_prepared": PAGES}
    async with running(valkey_url, upstream, **limits) as one, running(valkey_url, upstream, **limits) as two:
        pages: list[Page] = []
        tasks: list[asyncio.Task[None]] = []
        for n in range(PAGES):
            broker = (one, two)[n % 2]
            session = await broker.prepare(messages=[{"role": "user", "content": str(n)}])
            pages.append(Page((two, one)[n % 2], session))
            if n < SLOTS:
                tasks.append(asyncio.create_task(pages[-1].run()))
        for page in pages[SLOTS:]:
            first = await page.broker.read(page.session)
            assert first[-1].kind in ("queued", "done")
            tasks.append(asyncio.create_task(page.run()))
        async with asyncio.timeout(100):
            await asyncio.gather(*tasks)
    assert most <= SLOTS
    assert sorted(map(int, order)) == list(range(PAGES)), "every page was served, and once"
    assert max(abs(n - int(page)) for n, page in enumerate(order)) <= 3 * SLOTS, order
