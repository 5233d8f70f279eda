"""A primary that stands still until its replica has replaced it, and then goes on: nobody may believe it any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import pytest
import pytest_asyncio

from broker.store.running import RunningStore
from broker.web import keys
from tests.money import until
from tests.scripted import ScriptedUpstream
from tests.sentinels import SentinelSet, sentinel_set
from tests.system.harness import ValkeyProcess
from tests.system.test_several_servers import answer, read_whole, two_brokers, usage
from tests.valkey_cluster import ValkeyCluster, valkey_cluster

pytestmark = pytest.mark.slow

Servers = SentinelSet | ValkeyCluster


@pytest_asyncio.fixture(params=[sentinel_set, valkey_cluster], ids=["sentinels", "cluster"])
async def servers(request: pytest.FixtureRequest) -> AsyncIterator[Servers]:
    """Servers of this test's own."""
    async with request.param() as servers:
        yield servers


async def go_on_alone(old: ValkeyProcess) -> None:
    """Let a frozen primary go on that no Sentinel can make a replica, as if none had reached it yet."""
    old.thaw()
    async with old.client() as admin:
        await admin.execute_command("ACL", "SETUSER", "default", "-slaveof", "-replicaof")  # type: ignore[no-untyped-call]


async def is_left(old: ValkeyProcess) -> bool:
    """Return True if no broker has a connection to this primary."""
    async with old.client() as admin:
        role = (await admin.info("replication"))["role"]
        assert role == "master"
        ours = await admin.client_id()
        others = [each for each in await admin.client_list() if int(each["id"]) != ours]
    return all(each["name"].startswith("sentinel-") or set(each["flags"]) & set("MS") for each in others)


async def test_an_old_primary_that_comes_back_does_no_harm(
    servers: Servers, upstream: ScriptedUpstream
) -> None:
    async with two_brokers(servers, upstream) as (owner, other):
        before = await usage(owner)
        session, second = await owner.prepare(), await owner.prepare()
        async with owner.stream(session) as line:
            call = (await upstream.call()).open()
            call.chunk("0")
            await line.take(1)
            reading = asyncio.create_task(read_whole(other, session))
            await servers.in_step()
            old = (
                servers.primary
                if isinstance(servers, SentinelSet)
                else await servers.serving(f"{{{session}}}")
            )
            old.freeze()
            sent, replaced = 1, asyncio.create_task(until(partial(servers.is_replaced_for, old)))
            while not replaced.done():
                call.chunk(str(sent))
                await line.take(1)
                sent += 1
                await asyncio.sleep(0.05)
            await replaced
            if isinstance(servers, SentinelSet):
                await go_on_alone(old)
                claims = [asyncio.create_task(read_whole(each, second)) for each in (owner, other)]
                await until(partial(is_left, old))
            else:
                old.thaw()
                claims = [asyncio.create_task(read_whole(each, second)) for each in (owner, other)]
            answer(await upstream.call(2))
            call.chunk("end", finish="stop")
            call.usage(prompt_tokens=3, completion_tokens=4, total_tokens=7)
            call.done()
            seen = await line.rest()
        events = await reading
        assert [event.kind for event in events] == ["chunk"] * (sent + 2) + ["done"]
        assert events[-len(seen) :] == seen
        assert [event.id for event in events[:-1]] == [f"1-{n}" for n in range(1, sent + 3)]
        assert [(await each)[-1].kind for each in claims] == ["done", "done"]
        assert len(upstream.calls) == 2

        async def is_settled() -> bool:
            return bool((await usage(other))["requests"] == before["requests"] + 2)

        await until(is_settled)
        assert not (await RunningStore(owner.app[keys.STORE]).read()).sessions
