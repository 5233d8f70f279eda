"""The operator's commands against real brokers: what runs on all workers, and ending it."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import pytest
import pytest_asyncio

from tests.cli.fake_broker import run
from tests.events import opened
from tests.kinds import Servers, running_servers
from tests.system.harness import RunningBroker, running_broker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.events import Connection

pytestmark = pytest.mark.slow

KEYS = {"acme": "acme-key-0123456789abcdef0123456789", "globex": "globex-key-0123456789abcdef0123456"}


class Stage(NamedTuple):
    """Two brokers on one Valkey, and an HTTP client."""

    workers: tuple[RunningBroker, RunningBroker]
    valkey: Servers
    http: aiohttp.ClientSession

    async def broker(self, *args: str) -> tuple[int, str, str]:
        """Run the command line, where Redis can be reached and no broker."""
        return await run(*args, env={"REDIS_URL": self.valkey.url, "COLUMNS": "80"})

    async def listed(self, *args: str) -> list[dict[str, Any]]:
        status, out, err = await self.broker("sessions", "--json", *args)
        assert (status, err) == (0, "")
        found: list[dict[str, Any]] = json.loads(out)["sessions"]
        return found

    async def until(self, count: int, *args: str) -> list[dict[str, Any]]:
        """List again until so many sessions are listed."""
        async with asyncio.timeout(30):
            while len(found := await self.listed(*args)) != count:
                pass
        return found

    async def prepare(self, client: str, model: str, worker: int = 0) -> str:
        async with self.http.post(
            self.workers[worker].url + "/prepare",
            json={"model": model, "messages": [{"role": "user", "content": "Hello"}]},
            headers={"Authorization": f"Bearer {KEYS[client]}"},
        ) as answer:
            assert answer.status == 201, await answer.text()
            return str((await answer.json())["sessionId"])

    @asynccontextmanager
    async def streaming(self, client: str, model: str, worker: int) -> AsyncIterator[tuple[str, Connection]]:
        """Run a session on a worker during the block."""
        session_id = await self.prepare(client, model, worker)
        async with opened(self.workers[worker].url, f"/stream/{session_id}") as connection:
            yield session_id, connection


@pytest_asyncio.fixture
async def stage() -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        valkey = await stack.enter_async_context(running_servers())
        keys = ",".join(f"{name}:{key}" for name, key in KEYS.items())
        env = {"REDIS_URL": valkey.url, "BROKER_API_KEYS": keys}
        one, two = [await stack.enter_async_context(running_broker(env=env)) for _ in range(2)]
        http = await stack.enter_async_context(aiohttp.ClientSession())
        yield Stage((one, two), valkey, http)


async def test_sessions_of_all_workers_are_listed(stage: Stage) -> None:
    async with (
        stage.streaming("acme", "rehearsal/stall", 0) as (first, talking),
        stage.streaming("globex", "rehearsal/hang", 1) as (second, _),
    ):
        await talking.take(3)
        async with asyncio.timeout(30):
            while not all(each["firstChunk"] for each in await stage.listed("--client", "acme")):
                pass
        found = {each["id"]: each for each in await stage.listed()}
        assert set(found) == {first[:8], second[:8]}
        assert found[first[:8]]["client"] == "key:acme"
        assert found[first[:8]]["events"] >= 3
        assert found[second[:8]] == {**found[second[:8]], "model": "rehearsal/hang", "events": 0}
        assert {each["host"].rpartition(":")[2] for each in found.values()} == {
            str(worker.process.pid) for worker in stage.workers
        }
        status, out, _ = await stage.broker("sessions")
        assert (status, len(out.splitlines())) == (0, 3)
        assert first not in out
    for worker in stage.workers:
        assert first not in worker.log()


async def test_a_session_is_ended_by_its_shown_id_anywhere(stage: Stage) -> None:
    async with (
        stage.streaming("acme", "rehearsal/hang", 0) as (first, ended),
        stage.streaming("acme", "rehearsal/hang", 1) as (second, _),
    ):
        await stage.until(2)
        assert await stage.broker("sessions", "cancel", first[:8]) == (0, "Cancelled: 1 session ended.\n", "")
        [*_, last] = await ended.rest()
        assert (last.kind, last.json["finishReason"]) == ("done", "cancelled")
        assert [each["id"] for each in await stage.until(1)] == [second[:8]]


async def test_an_unknown_id_is_a_clear_error(stage: Stage) -> None:
    told = "broker: No running session has an id that begins with 01234567.\n"
    assert await stage.broker("sessions", "cancel", "01234567-89ab") == (1, "", told)
    assert await stage.broker("sessions", "cancel", "--client", "acme") == (
        1,
        "",
        "broker: Nothing of acme runs or waits.\n",
    )


async def test_everything_of_a_client_ends_and_nothing_else(stage: Stage) -> None:
    async with (
        stage.streaming("acme", "rehearsal/hang", 0) as (_, one),
        stage.streaming("acme", "rehearsal/hang", 1) as (_, two),
        stage.streaming("globex", "rehearsal/hang", 1) as (other, _),
    ):
        prepared = await stage.prepare("acme", "rehearsal/plain")
        await stage.until(3)
        told = "Cancelled: 2 sessions ended and 1 that was prepared will not start.\n"
        assert await stage.broker("sessions", "cancel", "--client", "acme") == (0, told, "")
        for connection in (one, two):
            [*_, last] = await connection.rest()
            assert (last.kind, last.json["finishReason"]) == ("done", "cancelled")
        async with opened(stage.workers[0].url, f"/stream/{prepared}") as late:
            [*_, last] = await late.rest()
            assert last.json["finishReason"] == "cancelled"
        assert [each["id"] for each in await stage.until(1)] == [other[:8]]


async def test_without_redis_the_commands_say_so() -> None:
    for args in (("sessions",), ("sessions", "cancel", "01234567")):
        status, out, err = await run(*args)
        assert (status, out) == (2, "")
        assert err == "broker: REDIS_URL must be set: an embedded Valkey can be read by its service alone\n"
        status, out, err = await run(*args, env={"REDIS_URL": "redis://127.0.0.1:1/0"})
        told = "broker: Redis cannot be reached (connection refused).\n"
        assert (status, out, err) == (1, "", told)
