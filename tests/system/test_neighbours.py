"""Two releases side by side on one Redis: ours, and one with the schema of the keys before, which drains."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from broker.store.connection import SCHEMA
from tests.scripted import PATIENCE
from tests.system.cluster import SETTINGS, Cluster, Worker, check_whole, running_cluster
from tests.system.harness import running_program

pytestmark = pytest.mark.slow

RELEASE = "import broker.store.connection as c; c.SCHEMA = {schema}; from broker.cli import main; main()"
"""Runs the command line with keys of another schema."""


class OtherRelease(Worker):
    """A worker of the release before."""

    def __init__(self, env: Mapping[str, str], cwd: Path) -> None:
        super().__init__(env)
        self._cwd = cwd

    async def start(self, *, ready: str = "/health/ready") -> None:
        self.broker = await self._stack.enter_async_context(
            running_program(
                ["-c", RELEASE.format(schema=SCHEMA - 1), "serve"],
                self._port,
                env={"OPENROUTER_API_KEY": "sk-test", **self._env},
                cwd=self._cwd,
                ready=ready,
            )
        )


@asynccontextmanager
async def running_release(cluster: Cluster, cwd: Path) -> AsyncIterator[OtherRelease]:
    """Run a worker of the release before on the Redis of a cluster."""
    env = {**SETTINGS, "REDIS_URL": cluster.valkey.url, "BROKER_UPSTREAM_URL": cluster.upstream.url}
    worker = OtherRelease(env, cwd)
    try:
        await worker.start()
        yield worker
    finally:
        await worker.close()


async def prefixes(cluster: Cluster) -> set[str]:
    async with cluster.redis() as client:
        return {b":".join(key.split(b":")[:2]).decode() async for key in client.scan_iter()}


async def test_a_release_with_other_keys_drains_beside_ours(tmp_path: Path) -> None:
    async with running_cluster(1) as cluster, running_release(cluster, tmp_path) as before:
        [ours] = cluster.workers
        theirs, mine = await cluster.prepare(before), await cluster.prepare(ours)
        async with theirs.stream(before) as there, mine.stream(ours) as here:
            calls = [await theirs.call(), await mine.call()]
            for call in calls:
                call.chunks(2)
            await there.take(2)
            await here.take(2)
            for session, other in ((theirs, ours), (mine, before)):
                [event] = await session.read(other)
                assert event.json["code"] == "session_not_found"
                [event] = await session.read(other, "1-1")
                assert event.json["code"] == "session_expired"
                assert (await session.cancel(other)).status == 404
            before.terminate()
            for call in calls:
                call.chunks(3)
                call.done()
            for session, connection in ((theirs, there), (mine, here)):
                end = check_whole(await connection.rest(), session.marker, after=2)
                assert (end.kind, session.calls) == ("done", 1)
        assert await before.ended(PATIENCE) == 0
        assert await prefixes(cluster) == {f"broker:{SCHEMA - 1}", f"broker:{SCHEMA}"}
        assert await cluster.keys_without_ttl() == []
        usage = await cluster.ask("GET", ours, "/usage")
        assert usage.json["requests"] == 1, "accounts are not shared either"
