"""The random walk: pages come and go on three real workers while everything around them is hurt at random.

After each round every session is judged: each page saw one gapless sequence with the upstream's own numbering and text,
in the long form, the short one, or both by turns; the same end as every other page, from one upstream call at most; and
nothing is left behind.

    python -m tests.system.walk --seconds 3600 --seed 1

prints the sessions, the faults by kind, and the findings; its status is 1 where there are any.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import aiohttp

from tests import kinds
from tests.servers import SERVERS
from tests.system import harness
from tests.system.cluster import Script, running_cluster
from tests.system.faults import DRAINED, Faults
from tests.system.walkers import SHORT, Page, Walk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.system.cluster import Cluster, Session

BUSY = 12.0
"""Seconds of a round in which sessions begin and things are hurt."""

SETTLED = 60.0
"""Seconds after that within which every page must have its end."""

LATE = 15.0
"""Seconds within which a session that has ended must be told from its start."""

SESSIONS = 40
"""Sessions at once."""

SLOTS = 15
"""Slots of the one client, so that now and then pages wait in line."""

GRACE = 4
"""Seconds of the workers' disconnect grace."""


DOWN_AFTER_MS = 800
"""Milliseconds of silence after which a primary is replaced in rounds that hurt primaries."""

RESPONSES = 0.3
"""Share of sessions that speak the Responses dialect."""


class Profile(NamedTuple):
    """The things that are hurt in a round."""

    workers: bool
    redis: bool
    primaries: bool = False


PROFILES = (
    Profile(workers=True, redis=False),
    Profile(workers=False, redis=True),
    Profile(workers=True, redis=True),
)

ON_SEVERAL = (
    *PROFILES,
    Profile(workers=False, redis=False, primaries=True),
    Profile(workers=True, redis=False, primaries=True),
)
"""Those of servers that replace a lost primary."""


def profiles() -> tuple[Profile, ...]:
    """Return those of this run's kind of servers."""
    return PROFILES if harness.KIND == "plain" else ON_SEVERAL


@dataclass
class Report:
    """The result of a walk."""

    sessions: int = 0
    pages: int = 0
    rounds: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.rounds} rounds, {self.sessions} sessions, {self.pages} pages"]
        lines += [f"  {count:6} {kind}" for kind, count in self.ends.most_common()]
        lines += ["faults"] + [f"  {count:6} {kind}" for kind, count in self.faults.most_common()]
        lines += [f"{len(self.findings)} findings", *(f"  {finding}" for finding in self.findings)]
        return "\n".join(lines)


async def walk(seconds: float, seed: int, *, rounds: int | None = None) -> Report:
    """Walk for about so long, in whole rounds, and report."""
    report = Report()
    random = Random(seed)
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at and (rounds is None or report.rounds < rounds):
        profile = profiles()[report.rounds % len(profiles())]
        found = len(report.findings)
        await _round(random, profile, report)
        report.rounds += 1
        for finding in report.findings[found:]:
            sys.stderr.write(f"round {report.rounds} {profile}: {finding}\n")
    return report


async def _round(random: Random, profile: Profile, report: Report) -> None:
    async with running_cluster(
        3,
        down_after_ms=DOWN_AFTER_MS if profile.primaries else kinds.DOWN_AFTER_MS,
        redis_wait=int(profile.primaries),
        disconnect_grace=GRACE,
        idle_timeout=12,
        first_data_timeout=12,
        drain_timeout=20,
        max_concurrent_streams=SLOTS,
    ) as cluster:
        faults = Faults(cluster, random)
        walks: list[Walk] = []
        begun = asyncio.create_task(_begin(cluster, walks, random))
        await faults.run(BUSY, **profile._asdict())
        running = await begun
        await _settle(running)
        late = await _read_late(cluster, walks, random)
        report.findings += [
            f"{walk.session.id[:8]} {finding}"
            for walk in walks
            for finding in walk.judge(faults.troubles, GRACE)
        ]
        report.findings += faults.findings + late + await _leftovers(cluster)
        report.sessions += len(walks)
        report.pages += sum(len(walk.pages) for walk in walks)
        report.ends += Counter(page.code for walk in walks for page in walk.pages)
        report.faults += faults.counts


async def _begin(cluster: Cluster, walks: list[Walk], random: Random) -> set[asyncio.Task[None]]:
    """Begin sessions for as long as a round is busy; returns those that still run."""
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + BUSY
    running: set[asyncio.Task[None]] = set()
    while loop.time() < ends_at:
        await asyncio.sleep(random.uniform(0.0, 0.2))
        running = {task for task in running if not task.done()}
        script = _script(random)
        if len(running) >= SESSIONS or (session := await _prepare(cluster, script, random)) is None:
            continue
        walk = Walk(session, script, [Page() for _ in range(random.choice([1, 1, 2, 3, 5]))], loop.time())
        walks.append(walk)
        running.add(asyncio.create_task(walk.run(cluster, random)))
    return running


def _script(random: Random) -> Script:
    ending = random.choice(["done"] * 6 + ["silent", "truncated", "reset", "error", "hang"])
    chunks = random.choice([0, 1, 10, 100, 300])
    pause, size = random.choice([0.0, 0.001, 0.02, 0.03]), random.choice([5, 20, 500])
    return Script(chunks, pause, size, ending, responses=random.random() < RESPONSES)


async def _prepare(cluster: Cluster, script: Script, random: Random) -> Session | None:
    try:
        return await cluster.prepare(random.choice(cluster.workers), script)
    except (OSError, TimeoutError, AssertionError, aiohttp.ClientError):
        return None  # a worker, or Redis, is away


async def _settle(running: set[asyncio.Task[None]]) -> None:
    """Wait until every page has its end, or has not got it in time."""
    if not running:
        return
    _, late = await asyncio.wait(running, timeout=SETTLED)
    for task in late:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def _read_late(cluster: Cluster, walks: list[Walk], random: Random) -> list[str]:
    """Read every session once more from its start, as one more page."""
    for walk in walks:
        page = Page()
        gives_up_at = time.monotonic() + LATE
        while page.end is None and time.monotonic() < gives_up_at:
            await page.visit(walk.session, random.choice(cluster.workers), short=random.random() < SHORT)
        walk.pages.append(page)
    return []


async def _leftovers(cluster: Cluster) -> list[str]:
    """Return what is left: keys without a TTL, calls that nobody reads, workers that do not stop, errors in logs."""
    findings = [f"no TTL: {key}" for key in await cluster.keys_without_ttl()]
    findings += [f"the call of {marker} is still open" for marker in cluster.upstream.open_calls()]
    for worker in cluster.workers:
        worker.terminate()
    began = time.monotonic()
    for worker in cluster.workers:
        status = await worker.ended(DRAINED)
        if status != 0:
            findings.append(f"a worker ended with status {status}")
    if time.monotonic() - began > 5:
        findings.append(f"the workers took {time.monotonic() - began:.1f} s to end")
    if cluster.upstream.connections:
        findings.append(f"{cluster.upstream.connections} upstream connections are left")
    complaints = Counter(line for worker in cluster.workers for line in _complaints(worker.log()))
    return findings + [f"logged {count} times: {line}" for line, count in complaints.items()]


def _complaints(log: str) -> Iterator[str]:
    """Yield the bugs in a log."""
    for line in log.splitlines():
        if line.startswith(("Open http://", "Listening at http://")):
            continue  # the first line of a start, for people
        try:
            entry = json.loads(line)
        except ValueError:
            yield line  # an uncaught traceback
        else:
            if entry.get("level") in ("error", "critical"):
                yield f"{entry.get('event')}: {entry.get('exception', '')[-400:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Hurt three workers at random and judge what pages saw.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--servers", choices=kinds.KINDS, default="plain")
    parser.add_argument("--redis-program", choices=SERVERS, default="valkey")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    arguments = parser.parse_args()
    harness.KIND, harness.SERVER = arguments.servers, arguments.redis_program
    print(f"seed {arguments.seed}", flush=True)
    report = asyncio.run(walk(arguments.seconds, arguments.seed))
    print(report)
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
