"""Clients of the clients file on several workers: a key that is revoked, and secrets that are rotated."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING

import pytest

from tests.scripted import PATIENCE
from tests.system.cluster import Script, Session, question, running_cluster

if TYPE_CHECKING:
    from pathlib import Path

    from tests.system.cluster import Cluster, Worker

pytestmark = pytest.mark.slow

REFUSED_WITHIN = 3.0
"""Seconds within which a revoked client is refused on every worker."""

ACME, BETA = "the key of acme", "the key of beta"


def table(name: str, key: str) -> str:
    return f'[{name}]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'


def write(path: Path, content: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(content)
    fresh.rename(path)


async def prepare(cluster: Cluster, worker: Worker, key: str) -> tuple[int, Session]:
    """The status of a /prepare, and its session, which is answered by a script."""
    marker = cluster.marker()
    cluster.upstream.scripts[marker] = Script(chunks=2)
    headers = {"Authorization": f"Bearer {key}"}
    answer = await cluster.ask("POST", worker, "/prepare", json=question(marker), headers=headers)
    return answer.status, Session(cluster, str(answer.json.get("sessionId", "")), marker)


async def prepared(cluster: Cluster, worker: Worker, key: str) -> Session:
    status, session = await prepare(cluster, worker, key)
    assert status == 201
    return session


async def test_a_revoked_key_is_refused_by_every_worker_in_time(tmp_path: Path) -> None:
    path = tmp_path / "clients.toml"
    write(path, table("acme", ACME) + table("beta", BETA))
    async with running_cluster(2, clients_file=path) as cluster:
        one, other = cluster.workers
        sessions = [await prepared(cluster, worker, ACME) for worker in (one, other, one, other)]
        running = await prepared(cluster, one, ACME)
        cluster.upstream.scripts.pop(running.marker)
        async with running.stream(one) as line:
            call = await running.call()
            write(path, table("beta", BETA))
            stopwatch = cluster.stopwatch()

            async def refused(worker: Worker) -> float:
                while (await prepare(cluster, worker, ACME))[0] != 401:  # noqa: ASYNC110 - of another process
                    await asyncio.sleep(0.02)
                return stopwatch.seconds

            async with asyncio.timeout(PATIENCE):
                took = await asyncio.gather(refused(one), refused(other))
            assert max(took) < REFUSED_WITHIN
            for number, session in enumerate(sessions):
                for worker in (one, other) if number < 2 else (other, one):
                    [event] = await session.read(worker)
                    assert (event.kind, event.id) == ("error", "1-1.end")
                    assert (event.json["code"], event.json["final"]) == ("unauthorized", True)
                assert session.calls == 0
            call.chunks(2)
            call.done()  # what runs already goes on
            assert (await line.rest())[-1].kind == "done"
        assert (await (await prepared(cluster, other, BETA)).read(one))[-1].kind == "done"


async def test_keys_overlap_while_a_client_rotates_its_key(tmp_path: Path) -> None:
    old, new = (hashlib.sha256(key.encode()).hexdigest() for key in (ACME, BETA))
    path = tmp_path / "clients.toml"
    write(path, f'[acme]\nsha256 = "{old}"\n')
    async with running_cluster(2, clients_file=path) as cluster:
        one, other = cluster.workers
        session = await prepared(cluster, one, ACME)

        async def until_status(key: str, status: int) -> None:
            async with asyncio.timeout(20):
                for worker in (one, other):
                    while (await prepare(cluster, worker, key))[0] != status:  # noqa: ASYNC110 - as above
                        await asyncio.sleep(0.02)

        write(path, f'[acme]\nsha256 = ["{old}", "{new}"]\n')
        await until_status(BETA, 201)
        await until_status(ACME, 201)
        write(path, f'[acme]\nsha256 = ["{new}"]\n')
        await until_status(ACME, 401)
        await until_status(BETA, 201)
        # The client is still there, and so are its sessions.
        assert (await session.read(other))[-1].kind == "done"
