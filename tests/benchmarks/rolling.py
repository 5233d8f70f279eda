"""Restart the workers of a service one by one under load, and count what pages notice of it.

    python -m tests.benchmarks.rolling [--streams 200] [--rate 50]

Two workers on one port. So many streams of ten chunks a second run, and so many sessions of three chunks are begun in a
second, each `/prepare` on a kept connection or a new one. Then SIGHUP. A page does what an EventSource does. It counts
as wrong if a connection was refused or broke, or if not each chunk came once, in order, and then `done`.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import time
from collections import Counter
from typing import Any

from tests.system.cluster import Cluster, Script, check_whole, running_cluster
from tests.system.harness import eventually

LONG = Script(chunks=200, pause=0.1, size=60)
SHORT = Script(chunks=3)
TWO_WORKERS: dict[str, Any] = {"WORKERS": 2, "retry_ms": 1000}
WARM_UP = 3.0
AFTER = 2.0


async def page(cluster: Cluster, script: Script, ends: Counter[str]) -> float:
    """Read a session to its end, count how it ended, and return the seconds that it took."""
    [service] = cluster.workers
    started = time.perf_counter()
    try:
        session = await cluster.prepare(service, script)
        end = check_whole(await session.read_through(service), session.marker)
        assert session.calls == 1
        ends[end.kind if end.kind == "done" else str(end.json["code"])] += 1
    except Exception as error:  # noqa: BLE001 - counted, and told
        ends[repr(error)[:200]] += 1
    return time.perf_counter() - started


async def begin(cluster: Cluster, rate: float, ends: Counter[str]) -> list[float]:
    """Begin sessions at an even rate until cancelled; returns the seconds of each, once all have ended."""
    pages: list[asyncio.Task[float]] = []
    started = time.perf_counter()
    try:
        while True:
            pages.append(asyncio.create_task(page(cluster, SHORT, ends)))
            await asyncio.sleep(max(0.0, started + len(pages) / rate - time.perf_counter()))
    except asyncio.CancelledError:
        return list(await asyncio.gather(*pages))


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--rate", type=float, default=50)
    wanted = parser.parse_args()
    long_ends: Counter[str] = Counter()
    short_ends: Counter[str] = Counter()
    async with running_cluster(1, **TWO_WORKERS) as cluster:
        [service] = cluster.workers
        running = [asyncio.create_task(page(cluster, LONG, long_ends)) for _ in range(wanted.streams)]
        before = asyncio.create_task(begin(cluster, wanted.rate, short_ends))
        await asyncio.sleep(WARM_UP)
        before.cancel()
        without = await before
        during = asyncio.create_task(begin(cluster, wanted.rate, short_ends))
        started = time.perf_counter()
        service.signal(signal.SIGHUP)
        await eventually(lambda: "workers restarted" in service.log(), within=60)
        took = time.perf_counter() - started
        await asyncio.sleep(AFTER)
        during.cancel()
        within = await during
        await asyncio.gather(*running)
    print(f"restarted in {took:.1f} s")
    print(f"{wanted.streams} running streams ended: {dict(long_ends)}")
    print(f"{len(without) + len(within)} new sessions ended: {dict(short_ends)}")
    for what, seconds in (("before", without), ("during", within)):
        quantiles = statistics.quantiles(seconds, n=100)
        print(f"a new session {what}: p50 {quantiles[49] * 1000:.0f} ms, p99 {quantiles[98] * 1000:.0f} ms")


if __name__ == "__main__":
    asyncio.run(main())
