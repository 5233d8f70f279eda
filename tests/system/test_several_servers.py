"""Several Redis servers, of which one takes over when another dies: nobody but an operator notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import pytest

from broker.store.running import RunningStore
from broker.web import keys
from tests.broker import Broker, running
from tests.cli.fake_broker import run
from tests.events import Event
from tests.money import MODEL, price_list, until
from tests.scripted import Call, ScriptedUpstream
from tests.sentinels import sentinel_set
from tests.stopwatch import Stopwatch
from tests.valkey_cluster import valkey_cluster
from tests.web.test_cancel import (
    test_a_session_can_be_cancelled_from_another_worker,
    test_a_session_that_is_being_claimed_can_be_cancelled,
)
from tests.web.test_limits import (
    test_a_page_waits_for_a_budget_and_gets_it,
    test_a_repeated_key_takes_one_place,
    test_all_workers_count_the_same_rate,
    test_prepare_enforces_the_total_budget,
)
from tests.web.test_line import test_a_cancelled_page_gives_up_its_place
from tests.web.test_usage import test_all_workers_answer_the_same
from tests.web.test_viewers import (
    test_a_page_that_leaves_for_good_ends_its_session,
    test_many_pages_at_two_workers_are_one_generation,
)

pytestmark = pytest.mark.slow

__all__ = [  # tests of other files that run here too, on these servers
    "test_a_cancelled_page_gives_up_its_place",
    "test_a_page_that_leaves_for_good_ends_its_session",
    "test_a_page_waits_for_a_budget_and_gets_it",
    "test_a_repeated_key_takes_one_place",
    "test_a_session_can_be_cancelled_from_another_worker",
    "test_a_session_that_is_being_claimed_can_be_cancelled",
    "test_all_workers_answer_the_same",
    "test_all_workers_count_the_same_rate",
    "test_many_pages_at_two_workers_are_one_generation",
    "test_prepare_enforces_the_total_budget",
]

BUDGETS = {"daily_cost": "1", "monthly_cost": "1", "total_daily_cost": "1", "redis_wait": 1}


class Servers(Protocol):
    """Several servers, one of which can be lost."""

    url: str

    async def empty(self) -> None:
        """Remove all keys."""

    async def in_step(self) -> None:
        """Wait until every replica has all that its primary has."""

    async def fail(self, session: str) -> None:
        """End the primary of a session as a power cut would."""

    async def is_replaced(self) -> bool:
        """Return True if another one serves in its place."""


@pytest.fixture(scope="module", params=[sentinel_set, valkey_cluster], ids=["sentinels", "cluster"])
def servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    """The servers of this file, which are started once. The failover comes last."""
    with asyncio.Runner() as runner:
        started = request.param()
        servers = runner.run(started.__aenter__())
        try:
            yield servers
        finally:
            runner.run(started.__aexit__(None, None, None))


@asynccontextmanager
async def two_brokers(servers: Servers, upstream: ScriptedUpstream) -> AsyncIterator[tuple[Broker, Broker]]:
    """Run two workers with every limit on."""
    upstream.models = price_list()
    async with (
        running(servers.url, upstream, **BUDGETS) as owner,
        running(servers.url, upstream, **BUDGETS) as other,
    ):
        await owner.ask("GET", "/models")
        yield owner, other


def answer(call: Call) -> None:
    call.open()
    call.chunk("Hello", finish="stop")
    call.usage(prompt_tokens=3, completion_tokens=4, total_tokens=7)
    call.done()


async def usage(broker: Broker) -> dict[str, Any]:
    found = (await broker.ask("GET", "/usage")).json
    assert isinstance(found, dict)
    return found


async def read_whole(broker: Broker, session: str) -> list[Event]:
    """Return what a page gets that reconnects as often as it is asked to."""
    async with asyncio.timeout(30):
        while not (events := await broker.read(session)):  # noqa: ASYNC110 - so do pages
            await asyncio.sleep(0.1)
    return events


async def prepared(broker: Broker) -> str:
    """Prepare a session, as often as the broker asks to try again."""
    async with asyncio.timeout(30):
        while (found := await broker.post()).status == 503:  # noqa: ASYNC110 - so do pages
            await asyncio.sleep(0.05)
    return str(found.json["sessionId"])


async def run_command(servers: Servers, *words: str) -> str:
    status, out, err = await run(*words, env={"REDIS_URL": servers.url, "COLUMNS": "80"})
    assert (status, err) == (0, "")
    return out


@pytest.fixture
def valkey_url(servers: Servers) -> str:
    """The servers for the tests of other files that run here too, without any key."""
    asyncio.run(servers.empty())
    return servers.url


async def test_everything_works_there(servers: Servers, upstream: ScriptedUpstream) -> None:
    async with two_brokers(servers, upstream) as (owner, other):
        session = await owner.prepare()
        async with owner.stream(session) as line:
            call = (await upstream.call()).open()
            call.chunk("Hello")
            await line.take(1)
            listed, top = await asyncio.gather(
                run_command(servers, "sessions"),
                run_command(servers, "top", "--once", "--url", owner.url),
            )
            assert session[:8] in listed
            assert " workers" in top
            reading = asyncio.create_task(read_whole(other, session))
            call.chunk(" you")
            await line.take(1)
            assert (await other.cancel(session)).status == 202
            assert (await line.rest())[-1].json["finishReason"] == "cancelled"
        assert (await reading)[-1].json["finishReason"] == "cancelled"
        assert MODEL in await run_command(servers, "usage", "--by", "model", "--csv")


async def test_a_failover_in_mid_stream(servers: Servers, upstream: ScriptedUpstream) -> None:
    """The viewers of the owner notice nothing, those of others a pause; nothing is asked or billed twice."""
    async with two_brokers(servers, upstream) as (owner, other):
        before = await usage(owner)
        session = await owner.prepare()
        async with owner.stream(session) as line:
            call = (await upstream.call()).open()
            call.chunk("0")
            await line.take(1)
            reading = asyncio.create_task(read_whole(other, session))
            await servers.in_step()
            await servers.fail(session)
            sent, longest, replaced = 1, 0.0, asyncio.create_task(until(servers.is_replaced))
            while not replaced.done():
                stopwatch = Stopwatch()
                call.chunk(str(sent))
                await line.take(1)
                longest = max(longest, stopwatch.seconds)
                sent += 1
                await asyncio.sleep(0.05)
            assert longest < 1
            stopwatch = Stopwatch()
            fresh = await prepared(owner)
            assert stopwatch.seconds < 2
            call.chunk("end", finish="stop")
            call.usage(prompt_tokens=3, completion_tokens=4, total_tokens=7)
            call.done()
            assert (await line.rest())[-1].kind == "done"
        events = await reading
        assert [event.kind for event in events] == ["chunk"] * (sent + 2) + ["done"]
        upstream.replies = [answer]
        assert (await read_whole(other, fresh))[-1].kind == "done"
        assert len(upstream.calls) == 2

        async def is_settled() -> bool:
            return bool((await usage(owner))["requests"] == before["requests"] + 2)

        await until(is_settled)
        now = await usage(owner)
        assert now["cost"] - before["cost"] == pytest.approx(14e-6)
        assert not (await RunningStore(owner.app[keys.STORE]).read()).sessions  # nothing is reserved any more
