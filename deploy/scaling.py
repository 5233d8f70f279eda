#!/usr/bin/env python3
"""Compute how many workers and how much Redis a number of readers needs, and simulate what we cannot run.

    python deploy/scaling.py [--seed 1] [--seconds 30] [--scale 1.0]

Prints the tables of `scaling.md`. The costs are those that were measured at sizes that run on one machine, see there;
``--scale 0.5`` supposes a machine that takes half of the time for everything. It uses nothing but the standard library.

The simulation is of time steps of a millisecond. In each, every simulated primary of Redis gets a random number of
calls of each kind (Poisson), and works for a millisecond on what waits. A call waits for those before it. A claim is
the sum of its round trips. All primaries have the same load, because keys are spread by a hash, so some of them are
enough to simulate. In the failover one of them does not work for a while: calls for its keys fail, and the journals of
its sessions wait in the memory of the workers, as the journal writer does it.
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from typing import Final

MS: Final = 1000.0
"""Microseconds of a time step."""

SLOTS: Final = 17
"""Turns in which a worker with many sessions writes their journals, within an interval."""

SIMULATED: Final = 4
"""Primaries that are simulated."""

BUCKETS: Final = 256
"""Buckets of the accounts, see `broker/store/buckets.py`."""

BUSY_WORKER: Final = 0.6
"""The part of a worker's core that is planned for: the rest is for bursts and for the streams of a lost worker."""

BUSY_REDIS: Final = 0.5
"""The part of a primary's core that is planned for."""

MOST_PRIMARIES: Final = 64
"""Primaries of one cluster that are planned for. Above it, the readers are divided into cells."""

MOST_WORKERS: Final = 400
"""Workers of one cell: each of them looks at every bucket about once a second."""


@dataclass(frozen=True)
class Costs:
    """Microseconds of CPU and bytes, measured with everything on that is on by default.

    Attributes:
        worker_chunk: a relayed chunk, while nothing else happens.
        worker_session: a whole session of one chunk: /prepare, claim, stream, end, settlement.
        redis_prepare, redis_claim, redis_end: the calls of these steps together, in the server.
        redis_append: a batch of events, besides the events.
        redis_event: each event in it.
        redis_renewal: the renewal of a reservation.
        redis_search: one look at one bucket for reservations of lost workers.
        total_account: what a claim and its settlement take on the one key of the total budget, where there is one.
        event_bytes: of an event in the journal.
        session_bytes: of a session in Redis besides its events.
        stream_bytes: of a stream in a worker's memory.
    """

    worker_chunk: float = 44.0
    worker_session: float = 1700.0
    redis_prepare: float = 130.0
    redis_claim: float = 250.0
    redis_end: float = 240.0
    redis_append: float = 90.0
    redis_event: float = 3.4
    redis_renewal: float = 4.0
    redis_search: float = 1.3
    total_account: float = 300.0
    event_bytes: float = 310.0
    session_bytes: float = 1500.0
    stream_bytes: float = 35 * 1024.0


@dataclass(frozen=True)
class Answer:
    """An answer that a reader gets.

    Attributes:
        chunks: events a second.
        seconds: from the first to the last event.
        kept: seconds for which its journal stays, `BROKER_RESUME_TTL`.
        interval: seconds between two batches of its journal, `BROKER_JOURNAL_INTERVAL_MS`.
        followed: the part of readers who have come back to another worker.
    """

    chunks: float = 20.0
    seconds: float = 30.0
    kept: float = 300.0
    interval: float = 0.5
    followed: float = 0.02


@dataclass(frozen=True)
class Plan:
    """What a number of readers needs.

    Attributes:
        readers: streams at once, of this cell.
        cells: so many of them, each with workers and a Redis of its own.
        sessions: that begin in a second.
        workers, primaries: of a cell.
        redis_busy: the part of a primary's core.
        memory: bytes of all primaries of a cell.
        written: bytes a second into each primary.
        connections: to each primary.
        total_busy: the part of a core that the one key of a total budget takes.
    """

    readers: float
    cells: int
    sessions: float
    workers: int
    primaries: int
    redis_busy: float
    memory: float
    written: float
    connections: int
    total_busy: float


def redis_load(readers: float, workers: int, answer: Answer, costs: Costs) -> float:
    """Return the microseconds of CPU that all primaries together need for a second of these readers."""
    sessions = readers / answer.seconds
    step = costs.redis_prepare + costs.redis_claim + costs.redis_end
    appends = readers / answer.interval * (1 + 9 * answer.followed)  # followed ones are written more often
    return (
        sessions * step
        + appends * costs.redis_append
        + readers * answer.chunks * costs.redis_event
        + readers * costs.redis_renewal
        + workers * BUCKETS * costs.redis_search
    )


def plan(readers: float, answer: Answer, costs: Costs) -> Plan:
    """Return what so many readers at once need."""
    cells = 1
    while True:
        part = readers / cells
        sessions = part / answer.seconds
        worker_load = part * answer.chunks * costs.worker_chunk + sessions * costs.worker_session
        workers = math.ceil(worker_load / 1e6 / BUSY_WORKER)
        load = redis_load(part, workers, answer, costs)
        primaries = math.ceil(load / 1e6 / BUSY_REDIS)
        if primaries <= MOST_PRIMARIES and workers <= MOST_WORKERS:
            break
        cells += 1
    stored = sessions * (answer.seconds / 2 + answer.kept)
    journal = answer.chunks * answer.seconds * costs.event_bytes
    return Plan(
        readers=part,
        cells=cells,
        sessions=sessions,
        workers=workers,
        primaries=primaries,
        redis_busy=load / 1e6 / primaries,
        memory=stored * (journal + costs.session_bytes),
        written=part * answer.chunks * costs.event_bytes / primaries,
        connections=2 * workers,
        total_busy=sessions * costs.total_account / 1e6,
    )


def poisson(random_: random.Random, mean: float) -> int:
    """Return a random number of calls."""
    if mean > 30:
        return max(0, round(random_.gauss(mean, math.sqrt(mean))))
    limit, count, product = math.exp(-mean), 0, random_.random()
    while product > limit:
        count += 1
        product *= random_.random()
    return count


@dataclass
class Simulated:
    """What a simulation found.

    Attributes:
        busy: the part of a primary's core.
        claims: milliseconds of claims, a sample.
        appends: milliseconds of appends.
        refused: claims that failed because a primary was away.
        pending: the most bytes of journals that waited in the memory of all workers for the lost primary.
        recovered: seconds from the return of the primary until its journals lag no more than usual.
    """

    busy: float
    claims: list[float]
    appends: list[float]
    refused: int = 0
    pending: float = 0.0
    recovered: float = 0.0


def simulate(
    wanted: Plan,
    answer: Answer,
    costs: Costs,
    *,
    seed: int,
    seconds: float,
    away: tuple[float, float] = (0.0, 0.0),
    round_trip: float = 0.3,
) -> Simulated:
    """Simulate some primaries of one cell.

    Args:
        wanted: the cell.
        answer: what its readers get.
        costs: microseconds.
        seed: of the random numbers.
        seconds: that are simulated.
        away: from when, and for how many seconds, the first primary does not work.
        round_trip: milliseconds of the network.
    """
    random_ = random.Random(seed)  # noqa: S311 - a simulation
    nodes = min(SIMULATED, wanted.primaries)
    share = wanted.readers / wanted.primaries / MS  # readers of a primary, for what happens in a time step
    sessions = share / answer.seconds
    batch = answer.chunks * answer.interval
    # What a worker writes in one turn arrives together: the sessions of one of its slots, as far as they are here.
    together = max(1.0, wanted.readers / wanted.workers / SLOTS / wanted.primaries)
    append = costs.redis_append + batch * costs.redis_event
    kinds = (
        (sessions, costs.redis_prepare),
        (3 * sessions, costs.redis_claim / 3),
        (2 * sessions, costs.redis_end / 2),
        (share / answer.interval / together, together * append),
        (share * 9 * answer.followed / answer.interval, costs.redis_append),
        (share / 50, 50 * costs.redis_renewal),
        (wanted.workers * BUCKETS / wanted.primaries / MS / 50, 50 * costs.redis_search),
    )
    found = Simulated(0.0, [], [])
    waiting, worked, behind = [0.0] * nodes, 0.0, 0.0
    returned = None
    for step in range(round(seconds * MS)):
        gone = away[0] * MS <= step < (away[0] + away[1]) * MS
        for node in range(nodes):
            if gone and node == 0:
                behind += share * answer.chunks  # events, in memory
                found.refused += poisson(random_, 2 * sessions)  # its account or its session is there
                continue
            if node == 0 and behind:
                # Each session has one batch of all that waits, up to a limit.
                waiting[0] += share * MS * costs.redis_append + behind * costs.redis_event
                found.pending, behind, returned = behind * costs.event_bytes, 0.0, step
            for rate, cost in kinds:
                waiting[node] += poisson(random_, rate) * cost
            worked += min(waiting[node], MS)
            waiting[node] = max(0.0, waiting[node] - MS)
            if node == 0 and returned is not None and not found.recovered and waiting[0] < MS:
                found.recovered = (step - returned + 1) / MS
        if step % 5 == 0 and not gone:
            picks = [random_.choice(waiting) / MS for _ in range(3)]
            found.claims.append(sum(picks) + 3 * round_trip + costs.redis_claim / MS)
            found.appends.append(picks[0] + round_trip + kinds[3][1] / MS)
    found.busy = worked / (nodes * seconds * MS * MS)
    return found


def quantile(values: list[float], part: float) -> float:
    """Return the value below which this part of all lies."""
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def size(count: float) -> str:
    """Return bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def table(rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


SIZES: Final = (1_000, 100_000, 10_000_000)

MEASURED: Final = Answer(followed=0.0, kept=60.0)
"""What was streamed in the measurement that the simulation is compared with."""


def tables(seed: int, seconds: float, scale: float) -> str:
    """Return the tables of `scaling.md`."""
    measured = Costs()
    costs = Costs(
        **{name: value * (1 if name.endswith("_bytes") else scale) for name, value in vars(measured).items()}
    )
    answer = Answer()
    plans = [plan(readers, answer, costs) for readers in SIZES]
    needs = [["readers at once", *(f"{readers:,}" for readers in SIZES)]]
    for label, tell in (
        ("cells", lambda p: f"{p.cells:,}"),
        ("sessions a second, of a cell", lambda p: f"{p.sessions:,.0f}"),
        ("workers of a cell", lambda p: f"{p.workers:,}"),
        ("primaries of a cell", lambda p: f"{p.primaries:,}"),
        ("a primary is busy", lambda p: f"{100 * p.redis_busy:.0f} %"),
        ("memory of Redis, of a cell", lambda p: size(p.memory)),
        ("the same with BROKER_RESUME_TTL=60", lambda p: size(p.memory * 75 / 315)),
        ("written into a primary, a second", lambda p: size(p.written)),
        ("connections to a primary", lambda p: f"{p.connections:,}"),
        ("the key of a total budget is busy", lambda p: f"{100 * p.total_busy:.0f} %"),
    ):
        needs.append([label, *map(tell, plans)])
    runs = [["readers at once", "a primary is busy", "claim p50 / p99, ms", "append p50 / p99, ms"]]
    fails = [
        [
            "readers at once",
            "a primary away, s",
            "claims refused, of a cell",
            "journals in memory of a cell's workers",
            "in order again after, s",
        ]
    ]
    for readers, wanted in zip(SIZES, plans, strict=True):
        run = simulate(wanted, answer, costs, seed=seed, seconds=seconds)
        runs.append(
            [
                f"{readers:,}",
                f"{100 * run.busy:.0f} %",
                f"{quantile(run.claims, 0.5):.1f} / {quantile(run.claims, 0.99):.1f}",
                f"{quantile(run.appends, 0.5):.1f} / {quantile(run.appends, 0.99):.1f}",
            ]
        )
        run = simulate(wanted, answer, costs, seed=seed, seconds=seconds, away=(5.0, 5.0))
        fails.append([f"{readers:,}", "5", f"{run.refused:,}", size(run.pending), f"{run.recovered:.2f}"])
    one = Plan(400, 1, 0.0, 1, 1, 0.0, 0.0, 0.0, 2, 0.0)
    run = simulate(one, MEASURED, costs, seed=seed, seconds=seconds, away=(5.0, 3.0))
    check = [
        ["400 streams, redis away for 3 s", "simulated"],
        ["events in memory", size(run.pending)],
        ["in order again after, s", f"{run.recovered:.2f}"],
    ]
    return "\n\n".join(map(table, (needs, runs, fails, check)))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="that are simulated")
    parser.add_argument("--scale", type=float, default=1.0, help="of all times")
    wanted = parser.parse_args()
    print(tables(wanted.seed, wanted.seconds, wanted.scale))


if __name__ == "__main__":
    main()
