"""Sentinels and a cluster with TLS alone and a user with few rights: all that works without these works with them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.broker import QUESTION, running
from tests.events import opened
from tests.money import until
from tests.scripted import ScriptedUpstream
from tests.secured import (
    BROKER,
    PASSWORD,
    SENTINEL_PASSWORD,
    WATCHER,
    SecuredCluster,
    SecuredProcess,
    SecuredSentinels,
    change_certificates,
    secured_cluster,
    secured_sentinels,
)
from tests.servers import server_binary
from tests.system import harness
from tests.system import test_several_servers as several
from tests.system.harness import RunningBroker, eventually, running_broker
from tests.system.test_secret_reload import lines, prepared, replace

pytestmark = pytest.mark.slow

Servers = SecuredSentinels | SecuredCluster


@pytest.fixture(scope="module", params=[secured_sentinels, secured_cluster], ids=["sentinels", "cluster"])
def servers(request: pytest.FixtureRequest) -> Iterator[Servers]:
    """The servers of this file, which are started once. The failover comes last."""
    server_binary("redis")
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        patch.setattr(harness, "SERVER", "redis")
        started = request.param()
        servers = runner.run(started.__aenter__())
        try:
            yield servers
        finally:
            runner.run(started.__aexit__(None, None, None))


async def refused(servers: Servers) -> set[str]:
    return {what for each in servers.processes for what in await each.refused()}


async def test_everything_works_there(servers: Servers, upstream: ScriptedUpstream) -> None:
    await several.test_everything_works_there(servers, upstream)


async def test_a_page_resumes_at_another_worker_with_no_other_right(
    servers: Servers, upstream: ScriptedUpstream
) -> None:
    async with several.two_brokers(servers, upstream) as (owner, other):
        before = (await several.usage(owner))["requests"]
        session = await owner.prepare()
        async with owner.stream(session) as line:
            call = (await upstream.call()).open()
            call.chunk("Hello")
            call.chunk(" you")
            await line.take(2)
        async with other.stream(session, "1-1") as line:
            assert [event.id for event in await line.take(1)] == ["1-2"]
            call.chunk("!", finish="stop")
            call.usage(prompt_tokens=3, completion_tokens=4, total_tokens=7)
            call.done()
            assert [event.kind for event in await line.rest()] == ["chunk", "chunk", "done"]
        dropped = await other.prepare()
        assert (await owner.cancel(dropped)).json == {"state": "cancelled"}

        async def is_told() -> bool:
            return bool((await several.usage(other))["requests"] == before + 1)

        await until(is_told)
    assert await refused(servers) == {"config|get"}  # which shows that refusals are noted
    assert len(upstream.calls) == 1


async def rotate(servers: Servers, path: Path, broker: RunningBroker) -> None:
    """Give everybody a new password, as an operator does: the old one goes when the new one is in use."""
    users = [(each, *secret_of(each)) for each in servers.processes]
    for process, user, old in users:
        await process.change_password(user, f">{old}-new")
    text = servers.url
    for secret in (PASSWORD, SENTINEL_PASSWORD):
        text = text.replace(quote(secret, safe=""), quote(f"{secret}-new", safe=""))
    replace(path, text)
    await eventually(lambda: lines(broker, "secrets read again"))
    assert lines(broker, "secrets read again")[0]["changed"] == ["REDIS_URL"]
    for process, user, old in users:
        await process.change_password(user, f"<{old}")


def secret_of(process: SecuredProcess) -> tuple[str, str]:
    return (WATCHER, SENTINEL_PASSWORD) if process.is_sentinel else (BROKER, PASSWORD)


async def test_passwords_are_changed_while_streams_run(
    servers: Servers, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    path = tmp_path / "url"
    path.write_text(servers.url)
    env = {"REDIS_URL_FILE": str(path), "BROKER_UPSTREAM_URL": upstream.url}
    async with running_broker(rehearsal=False, env=env) as broker:
        _, session = await prepared(broker)
        async with opened(broker.url, f"/stream/{session}") as line:
            call = (await upstream.call()).open()
            call.chunk("before")
            await line.take(1)
            connected = [each for each in servers.processes if await each.is_used_by(secret_of(each)[0])]
            await rotate(servers, path, broker)
            call.chunk("meanwhile")  # open connections stay
            await line.take(1)
            for each in servers.processes:
                await each.disconnect(secret_of(each)[0])
            for each in connected:
                if not each.is_sentinel:
                    await until(partial(each.is_used_by, BROKER))

            async def works() -> bool:
                return (await prepared(broker))[0] == 201

            await until(works)
            call.chunk("after", finish="stop")
            call.usage()
            call.done()
            assert [event.kind for event in await line.rest()] == ["chunk", "chunk", "done"]
        log = broker.log()
    assert len(upstream.calls) == 1
    assert "WRONGPASS" not in log
    assert await refused(servers) == {"config|get"}
    assert quote(PASSWORD, safe="") not in log
    assert PASSWORD not in log
    assert SENTINEL_PASSWORD not in log
    for process in servers.processes:  # for the other tests
        user, old = secret_of(process)
        await process.change_password(user, f">{old}")


LARGE = {"messages": [{"role": "user", "content": "What is a broker? " * 6000}]}
"""Calls with it have connections of their own."""


async def test_certificates_are_changed_while_streams_run(
    servers: Servers, upstream: ScriptedUpstream
) -> None:
    """The files keep their names. It happens more often than there are sentinels, so that none is left unused."""
    async with running(servers.url, upstream) as broker:
        session = await broker.prepare(**LARGE)
        async with broker.stream(session) as line:
            call = (await upstream.call()).open()

            async def works() -> bool:
                return (await broker.post({**QUESTION, **LARGE})).status == 201

            for _ in range(4):
                await change_certificates(servers.processes)
                for each in servers.processes:
                    await each.disconnect(secret_of(each)[0])
                await until(works)
                call.chunk("Hello")
                await line.take(1)
            call.chunk("end", finish="stop")
            call.usage()
            call.done()
            assert [event.kind for event in await line.rest()] == ["chunk", "chunk", "done"]


async def test_a_failover_in_mid_stream(servers: Servers, upstream: ScriptedUpstream) -> None:
    await several.test_a_failover_in_mid_stream(servers, upstream)
    assert await refused(servers) <= {"config|get"}
