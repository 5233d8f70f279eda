"""Measure the time to resume and to cancel on another worker: two workers as processes, one Valkey.

    python -m tests.benchmarks.surviving [--sessions 100] [--rounds 3]

Resuming: all sessions stream from one worker, 20 chunks a second each; every line is cut, and each page comes back at
once to the other worker. Measured from the request to the next event in the page's hands.

Cancelling: DELETE to the worker that does not own the session, until the upstream sees its connection close.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

from tests.system.cluster import Cluster, Script, Session, check_chunks, number_of, running_cluster

CHUNKS = Script(chunks=400, pause=0.05, size=60)


async def resume(cluster: Cluster, sessions: list[Session]) -> list[float]:
    """Seconds from coming back to the next event, of each session."""
    owner, other = cluster.workers

    async def read_and_leave(session: Session) -> str:
        async with session.stream(owner) as connection:
            await connection.take(20)
            assert connection.last_id is not None
            return connection.last_id

    async def come_back(session: Session, cursor: str) -> float:
        started = time.perf_counter()
        async with session.stream(other, cursor) as connection:
            (event,) = await connection.take(1)
            took = time.perf_counter() - started
            check_chunks([event], session.marker, number_of(event) - 1)
            assert number_of(event) == int(cursor.partition("-")[2]) + 1
            return took

    cursors = await asyncio.gather(*map(read_and_leave, sessions))
    return list(await asyncio.gather(*map(come_back, sessions, cursors)))


async def cancel(cluster: Cluster, sessions: list[Session]) -> list[float]:
    """Seconds from the DELETE to the close that the upstream sees, one session after the other."""
    took = []
    for session in sessions:
        call = cluster.upstream.calls[session.marker][0].call
        started = time.perf_counter()
        answer, _ = await asyncio.gather(session.cancel(cluster.workers[1]), call.gone.wait())
        took.append(time.perf_counter() - started)
        assert answer.status == 202
    return took


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    wanted = parser.parse_args()
    async with running_cluster(2) as cluster:
        for _ in range(wanted.rounds):
            sessions = [await cluster.prepare(cluster.workers[0], CHUNKS) for _ in range(wanted.sessions)]
            tell("resume on another worker, next event after", await resume(cluster, sessions))
            tell("cancel from another worker, upstream closed after", await cancel(cluster, sessions))


def tell(what: str, seconds: list[float]) -> None:
    """Print the median and the tail, in ms."""
    *_, tail = statistics.quantiles(seconds, n=20)
    print(
        f"{what}: median {statistics.median(seconds) * 1000:.1f} ms, p95 {tail * 1000:.1f} ms, n={len(seconds)}"
    )


if __name__ == "__main__":
    asyncio.run(main())
