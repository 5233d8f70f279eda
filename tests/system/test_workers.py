"""Several workers of one service: one port, one parent, and what pages notice when workers come and go: nothing."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections import Counter
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.events import Broken
from tests.money import until
from tests.system.cluster import Script, check_whole, running_cluster
from tests.system.harness import eventually, running_broker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.events import Connection
    from tests.system.cluster import Session, Worker
    from tests.system.harness import RunningBroker

pytestmark = pytest.mark.slow

TWO_WORKERS: dict[str, Any] = {"WORKERS": 2}
"""``BROKER_WORKERS``; in lower case the name means services of a cluster."""

LONG = Script(chunks=90, pause=0.1)
RUNNING = 60
NEW_EVERY = 0.05
STREAMS = 6


def lines(log: str, event: str) -> list[dict[str, Any]]:
    found = []
    for line in log.splitlines():
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return [line for line in found if line["event"] == event]


def workers_of(parent: int) -> set[int]:
    """The processes of the workers of a service."""
    found = set()
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with suppress(OSError):  # it has ended meanwhile
            if "worker_main.py" in Path(f"/proc/{pid}/cmdline").read_text():
                found.add(int(pid))
    return found


def metrics_directory(worker: int) -> Path:
    files = []
    for path in Path(f"/proc/{worker}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed meanwhile
            files.append(path.readlink())
    [directory] = {path.parent for path in files if path.suffix == ".lock"}
    return directory


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def all_serve(service: RunningBroker | Worker) -> None:
    """Wait until both workers take connections; a service is ready when one does."""
    await eventually(lambda: len(lines(service.log(), "worker ready")) == 2)


async def answered(broker: RunningBroker) -> bool:
    """Return True if a chat is answered to its end."""
    body = {"messages": [{"role": "user", "content": "Who are you?"}]}
    async with aiohttp.ClientSession(broker.url) as http:
        async with http.post("/prepare", json={**body, "model": "rehearsal/fast"}) as answer:
            session = (await answer.json())["sessionId"]
        async with http.get(f"/stream/{session}", headers={"Accept": "text/event-stream"}) as stream:
            return "event: done" in await stream.text()


async def metric(broker: RunningBroker | Worker, name: str) -> float:
    """The sum of a metric over its labels."""
    async with aiohttp.ClientSession(broker.url) as http, http.get("/metrics") as answer:
        families = text_string_to_metric_families(await answer.text())
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


async def test_rolling_restarts_under_load_are_noticed_by_no_page() -> None:
    async with running_cluster(1, retry_ms=500, **TWO_WORKERS) as cluster:
        [service] = cluster.workers
        await all_serve(service)
        parent = service.process.pid
        first = workers_of(parent)

        async def page(script: Script) -> None:
            session = await cluster.prepare(service, script)
            end = check_whole(await session.read_through(service), session.marker)
            assert (end.kind, session.calls) == ("done", 1)

        running = [asyncio.create_task(page(LONG)) for _ in range(RUNNING)]
        await eventually(lambda: len(cluster.upstream.open_calls()) == RUNNING)
        service.signal(signal.SIGHUP)
        fresh = []
        while "workers restarted" not in service.log():
            fresh.append(asyncio.create_task(page(Script(chunks=3))))
            await asyncio.sleep(NEW_EVERY)
        assert len(fresh) > 20
        await asyncio.gather(*running, *fresh)
        await eventually(lambda: not first & workers_of(parent))
        assert len(workers_of(parent)) == 2
        assert not lines(service.log(), "worker died")


async def test_a_dead_worker_is_replaced_and_others_notice_nothing() -> None:
    async with running_cluster(1, **TWO_WORKERS) as cluster, AsyncExitStack() as stack:
        [service] = cluster.workers
        await all_serve(service)
        victim, other = workers_of(service.process.pid)
        sessions = [await cluster.prepare(service) for _ in range(STREAMS)]
        connections, calls = [], []
        for number, session in enumerate(sessions):
            with frozen(other if number < STREAMS // 2 else victim):  # so the other one takes it
                connections.append(await stack.enter_async_context(session.stream(service)))
                calls.append(await session.call())
        for call, connection in zip(calls, connections, strict=True):
            call.chunks(2)
            await connection.take(2)
        for session in sessions:
            await cluster.journaled(session, 2)
        os.kill(victim, signal.SIGKILL)
        await eventually(lambda: len(workers_of(service.process.pid) - {victim, other}) == 1)
        assert [line["status"] for line in lines(service.log(), "worker died")] == ["SIGKILL"]
        for call in calls:
            call.done()

        async def end(session: Session, connection: Connection) -> str:
            try:
                return check_whole(await connection.rest(), session.marker, after=2).kind
            except Broken:
                last = (await session.read_through(service, connection.last_id))[-1]
                return str(last.json["code"])

        ends = Counter(await asyncio.gather(*map(end, sessions, connections)))
        assert ends == {"worker_lost": STREAMS // 2, "done": STREAMS // 2}

        async def all_are_counted() -> bool:
            """Whichever worker answers."""
            return {await metric(service, "broker_sessions_total") for _ in range(8)} == {STREAMS}

        await until(all_are_counted)


async def test_parts_beside_the_workers_outlive_them_and_end_with_the_parent() -> None:
    async with running_broker(env={"BROKER_WORKERS": "2"}) as broker:
        await all_serve(broker)
        assert broker.log().count("Open http://") == 1
        assert await answered(broker)
        workers = workers_of(broker.process.pid)
        os.kill(min(workers), signal.SIGKILL)
        assert await answered(broker)
        metrics = metrics_directory(max(workers))
        broker.process.kill()
        await eventually(lambda: not any(map(runs, workers | {broker.process.pid})))
        with socket.create_server(("127.0.0.1", broker.port)):
            pass  # nobody listens there
        await eventually(lambda: not metrics.exists())


async def test_bad_settings_at_sighup_leave_the_workers_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "system"
    file.write_text("Be kind.")
    env = {"BROKER_WORKERS": "2", "BROKER_SYSTEM_FILE": str(file)}
    async with running_broker(env=env) as broker:
        await all_serve(broker)
        parent = broker.process.pid
        before = workers_of(parent)
        file.unlink()
        broker.process.send_signal(signal.SIGHUP)
        await eventually(lambda: lines(broker.log(), "workers not restarted, the old ones go on"))
        [line] = lines(broker.log(), "workers not restarted, the old ones go on")
        assert "BROKER_SYSTEM_FILE" in line["reason"]
        assert workers_of(parent) == before


async def test_a_service_of_several_workers_drains_all_of_them() -> None:
    async with running_cluster(1, **TWO_WORKERS) as cluster, AsyncExitStack() as stack:
        [service] = cluster.workers
        await all_serve(service)
        workers = workers_of(service.process.pid)
        sessions = [await cluster.prepare(service) for _ in range(STREAMS)]
        connections = [await stack.enter_async_context(each.stream(service)) for each in sessions]
        calls = [await each.call() for each in sessions]
        for worker in workers:
            os.kill(worker, signal.SIGTERM)  # a service manager may send it to each process
        service.terminate()
        await eventually(lambda: len(lines(service.log(), "draining")) == 3)
        for call in calls:
            call.chunks(1)
            call.done()
        for session, connection in zip(sessions, connections, strict=True):
            assert check_whole(await connection.rest(), session.marker).kind == "done"
        assert await service.ended() == 0
        assert not any(map(runs, workers))
