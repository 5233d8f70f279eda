"""Measure the cost of relaying, with the journal and without: CPU of one worker for each chunk.

    python -m tests.benchmarks.relaying [--streams 100] [--seconds 8] [--rounds 3]

Two workers run side by side, one of them with BROKER_RESUME_TTL=0, and are given the same streams in turn. Only a
window in which all streams run and none begins or ends is counted. The ratio of the two is the figure; the rest is of
this machine at this hour.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
from contextlib import AsyncExitStack
from pathlib import Path

from tests.system.cluster import Cluster, Script, Session, running_cluster

PER_SECOND = 20


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    wanted = parser.parse_args()
    ratios = []
    async with running_cluster(1) as journaled, running_cluster(1, resume_ttl=0) as bare:
        for _ in range(wanted.rounds):
            without = await measure(bare, wanted.streams, wanted.seconds)
            with_journal = await measure(journaled, wanted.streams, wanted.seconds)
            ratios.append(with_journal / without)
            print(
                f"without the journal {without:.1f} µs a chunk, with it {with_journal:.1f}: {ratios[-1]:.2f} times"
            )
    print(f"median {statistics.median(ratios):.2f} times, {wanted.streams} streams of {PER_SECOND} chunks/s")


async def measure(cluster: Cluster, streams: int, seconds: float) -> float:
    """Microseconds of CPU for each chunk, over the middle of a run."""
    worker = cluster.workers[0]
    script = Script(chunks=int((seconds + 4) * PER_SECOND), pause=1 / PER_SECOND, size=60)
    sessions = [await cluster.prepare(worker, script) for _ in range(streams)]
    async with AsyncExitStack() as stack:
        readers = [asyncio.create_task(read(cluster, session)) for session in sessions]
        stack.callback(lambda: [reader.cancel() for reader in readers])
        await asyncio.gather(*(cluster.upstream.call(session.marker) for session in sessions))
        await asyncio.sleep(2)
        calls = [cluster.upstream.calls[session.marker][0] for session in sessions]
        cpu, sent = cpu_seconds(worker.process.pid), sum(call.sent for call in calls)
        await asyncio.sleep(seconds)
        cpu = cpu_seconds(worker.process.pid) - cpu
        sent = sum(call.sent for call in calls) - sent
        await asyncio.gather(*(session.cancel(worker) for session in sessions))
        await asyncio.gather(*readers)
    return cpu * 1e6 / sent


async def read(cluster: Cluster, session: Session) -> None:
    """Read a stream without parsing it."""
    async with session.stream(cluster.workers[0]) as connection:
        while await connection.block() is not None:
            pass


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    asyncio.run(main())
