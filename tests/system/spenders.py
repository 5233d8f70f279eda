"""Many pages that spend while workers and Redis are hurt, and the judgement of the accounts during and after it."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
from redis.exceptions import RedisError

from tests.events import Broken
from tests.money import PRICE, TOTAL, Ledger, ledger
from tests.redis_client import free_lost_connections
from tests.scripted import PATIENCE
from tests.system.biller import MAX_TOKENS
from tests.system.cluster import Session, question
from tests.system.faults import freeze_primary, kill_primary
from tests.system.harness import ValkeyProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from random import Random

    from redis.asyncio import Redis

    from tests.system.biller import Bill, Biller
    from tests.system.cluster import Cluster, Worker

AWAY = (OSError, TimeoutError, aiohttp.ClientError, Broken, asyncio.IncompleteReadError)
RESPONSES = 0.3
"""Share of sessions that speak the Responses dialect."""

NOT_YET_JOURNALED = 1.0
"""Seconds for which what a worker has learned may be in its memory alone."""


@dataclass
class Spender:
    """A page: one session to its end, or until it has had enough."""

    cluster: Cluster
    random: Random
    session: Session | None = None
    prompt: int = 0
    refused: int = 0
    waited: int = 0

    async def run(self) -> None:
        try:
            await self._prepare()
        except AWAY:
            return
        if self.session is None:
            return
        leaves_after = self.random.choice([0, 1, 5, 1000, 1000, 1000])
        if self.random.random() < 0.25:
            await asyncio.gather(self._watch(leaves_after), self._cancel(self.random.uniform(0, 2)))
        else:
            await self._watch(leaves_after)

    def _worker(self) -> Worker:
        return self.random.choice(self.cluster.workers)

    async def _prepare(self) -> None:
        marker = self.cluster.marker()
        in_responses = self.random.random() < RESPONSES
        cap = "max_output_tokens" if in_responses else "max_tokens"
        answer = await self.cluster.ask(
            "POST",
            self._worker(),
            "/prepare",
            json={**question(marker, in_responses=in_responses), cap: MAX_TOKENS},
            headers={"Authorization": f"Bearer {self.random.choice(['one', 'two', 'three'])}"},
        )
        if answer.status == 201:
            self.session = Session(self.cluster, answer.json["sessionId"], marker)
            self.prompt = answer.json["promptTokens"]
        else:
            assert answer.status in (429, 503), answer
            self.refused += 1

    async def _watch(self, leaves_after: int) -> None:
        assert self.session is not None
        cursor: str | None = None
        for _ in range(40):
            try:
                async with self.session.stream(self._worker(), cursor) as line:
                    while leaves_after >= 0 and (event := await line.event()) is not None:
                        leaves_after -= 1
                        if event.kind == "done" or (event.kind == "error" and event.json["final"]):
                            return
                        self.refused += event.kind == "error"
                        self.waited += event.kind == "queued"
                    cursor = line.last_id or cursor
            except AWAY:
                pass
            if leaves_after < 0:
                return
            await asyncio.sleep(self.random.uniform(0.1, 0.8))

    async def _cancel(self, after: float) -> None:
        assert self.session is not None
        await asyncio.sleep(after)
        with suppress(*AWAY):
            await self.session.cancel(self._worker())


@dataclass
class Spenders:
    """A run.

    Attributes:
        limits: the limits of accounts in nano-USD, by the ends of their keys.
        monthly: the same for a month, where there is one.
        findings: what was wrong while it ran.
        troubles: how many there were of each kind.
        kills: when workers were killed, by the loop's clock.
        estimates: sessions whose true price nobody learned.
        highest: the highest amount of an account.
    """

    cluster: Cluster
    biller: Biller
    random: Random
    limits: Mapping[str, int]
    monthly: Mapping[str, int] = field(default_factory=dict)
    pages: list[Spender] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    troubles: Counter[str] = field(default_factory=Counter)
    kills: list[float] = field(default_factory=list)
    estimates: int = 0
    highest: int = 0

    async def run(self, seconds: float) -> None:
        """Spend and hurt for so long, then heal and let all pages come to an end."""
        over = asyncio.Event()
        watching = asyncio.create_task(self._watch_the_law(over))
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + seconds
        hurting = asyncio.create_task(self._hurt(ends_at))
        running: set[asyncio.Task[None]] = set()
        while loop.time() < ends_at:
            await asyncio.sleep(self.random.uniform(0, 0.15))
            running = {task for task in running if not task.done()}
            if len(running) < 30:
                self.pages.append(Spender(self.cluster, self.random))
                running.add(asyncio.create_task(self.pages[-1].run()))
        await hurting
        if running:
            _, late = await asyncio.wait(running, timeout=40)
            for task in late:
                task.cancel()
            self.findings += [
                f"{error!r}" for error in await asyncio.gather(*running, return_exceptions=True) if error
            ]
        over.set()
        await watching

    async def _hurt(self, ends_at: float) -> None:
        loop = asyncio.get_running_loop()
        faults: list[Callable[[], Any]] = [self._kill, self._freeze, self._restart_redis, self._freeze_redis]
        first: list[Callable[[], Any]] = []
        if not isinstance(self.cluster.valkey, ValkeyProcess):
            first = [self._freeze_primary, self._kill_primary]  # each run has both
            faults += first
        while first or loop.time() < ends_at - 5:
            await asyncio.sleep(self.random.uniform(1, 4))
            fault = first.pop() if first else self.random.choice(faults)
            self.troubles[fault.__name__.strip("_")] += 1
            await fault()

    async def _kill(self) -> None:
        worker = self.random.choice(self.cluster.workers)
        await worker.kill()
        self.kills.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self.random.uniform(0, 2))
        await worker.start(ready="/health/live")

    async def _freeze(self) -> None:
        worker = self.random.choice(self.cluster.workers)
        worker.freeze()
        await asyncio.sleep(self.random.choice([0.5, 2, 7]))
        worker.thaw()

    async def _restart_redis(self) -> None:
        self.cluster.valkey.kill()
        await asyncio.sleep(self.random.uniform(0, 2))
        await self.cluster.valkey.start()

    async def _freeze_redis(self) -> None:
        self.cluster.valkey.freeze()
        servers = self.cluster.valkey
        # A sentinel that has stood still for 2 s replaces nothing for the next 30 s.
        await asyncio.sleep(
            self.random.choice([0.2, 1.5, 5] if isinstance(servers, ValkeyProcess) else [0.2, 1.5])
        )
        servers.thaw()
        if not isinstance(servers, ValkeyProcess):
            await servers.settled()

    async def _kill_primary(self) -> None:
        await kill_primary(self.cluster.valkey, self.random)

    async def _freeze_primary(self) -> None:
        await freeze_primary(self.cluster.valkey, self.random, self.random.choice([2, 4]))

    async def _watch_the_law(self, over: asyncio.Event) -> None:
        """Each account is one key, so each reading is of one moment.

        Ends by an event: the library for Redis can lose a cancellation, and then this would go on for ever.
        """
        while not over.is_set():
            await asyncio.sleep(0.02)
            try:
                for primary in await self._primaries():
                    await self._check_accounts(primary)
            except (RedisError, OSError, TimeoutError):
                continue
        free_lost_connections()

    async def _primaries(self) -> list[ValkeyProcess]:
        servers = self.cluster.valkey
        if isinstance(servers, ValkeyProcess):
            return [servers]
        async with asyncio.timeout(1):
            return await servers.primaries()

    async def _check_accounts(self, primary: ValkeyProcess) -> None:
        # Only the commands have a limit: the library loses a connection whose closing is cancelled.
        async with primary.client() as redis, asyncio.timeout(1):
            for name, limit in self.limits.items():
                keys: Any = await redis.keys(name)
                for key in keys:
                    self._check(name, key.decode(), limit, await redis.hgetall(key))

    def _check(self, name: str, key: str, limit: int, fields: Any) -> None:
        days, months = (
            sum(
                int(value)
                for name, value in fields.items()
                if name.endswith((b"spent_cost", b"reserved_cost")) and (b"-" in name) == of_months
            )
            for of_months in (False, True)
        )
        self.highest = max(self.highest, days)
        if days > limit:
            self.findings.append(f"{key} holds {days} of {limit}")
        if months > self.monthly.get(name, limit):
            self.findings.append(f"{key} holds {months} in its month, of {self.monthly[name]}")
        if name != TOTAL and days != months:  # all days of a run are of one month, unless it ends meanwhile
            self.findings.append(f"{key} holds {days} in its days and {months} in its months")

    # Afterwards

    async def judge(self, redis: Redis) -> list[str]:
        """Compare every account with the bills."""
        findings = [*dict.fromkeys(self.findings)]
        records, account, months = await _accounts(redis)
        self.estimates = total = 0
        # While the truth behind an estimate can still come, what was reserved above it stays so.
        kept = sum(int(each.get("kept_cost", 0)) for found in records.values() for each in found)
        for page in self.pages:
            if page.session is None:
                continue
            found = records.pop(page.session.id, [])
            total += sum(booked(record).cost for record in found)
            findings += self._judge(page, found, self.biller.bills.get(page.session.marker, []))
        findings += [f"{session} is nobody's" for session in records]
        if account.spent_cost != total:
            findings.append(f"{account.spent_cost} is spent, and the sessions together are {total}")
        if account.reserved_cost != kept:
            findings.append(f"{account} is still reserved, and estimates keep {kept}")
        if months != account._replace(spent_tokens=0, reserved_tokens=0):
            findings.append(f"{months} in the months, and {account} in the days")
        return findings

    def _judge(self, page: Spender, records: list[dict[str, str]], bills: list[Bill]) -> list[str]:
        assert page.session is not None
        name = page.session.marker
        if len(records) > 1:
            return [f"{name} was settled {len(records)} times"]
        if not records:
            return [f"{name} was asked for and never settled"] if bills else []
        [record] = records
        figures = booked(record)
        cost = figures.cost
        billed = sum(bill.cost for bill in bills)
        if sum(bill.tokens > 0 for bill in bills) > 1:
            return [f"{name} was generated more than once"]
        if not figures.estimated:
            return [] if cost == billed else [f"{name}: {cost} is booked and {billed} was billed"]
        if cost != (figures.prompt + figures.completion) * PRICE or cost < page.prompt * PRICE:
            return [f"{name}: an estimate of {cost} for a prompt of {page.prompt}"]
        self.estimates += 1
        late = [bill for bill in bills if bill.recorded and bill.named and not self._is_excused(bill)]
        return [f"{name} was never corrected: {record}" for _ in late]

    def _is_excused(self, bill: Bill) -> bool:
        """A record can only be fetched by a worker that got its id, and a killed worker may not have passed it on."""
        return bill.left_at_once or any(
            bill.began_at <= at <= bill.over_at + NOT_YET_JOURNALED for at in self.kills
        )

    def summary(self, account: Ledger) -> str:
        """Return one line on what happened."""
        refused = sum(page.refused for page in self.pages)
        waited = sum(page.waited for page in self.pages)
        return (
            f"{len(self.pages)} pages, {refused} refusals, {waited} waits in line, "
            f"{self.estimates} estimates left, {account},"
            f" {dict(self.troubles)}, at most {self.highest}"
        )


class Booked(NamedTuple):
    """The booked usage in a settled reservation, as `settle.lua` writes it."""

    prompt: int
    completion: int
    cached: int
    reasoning: int
    cost: int
    estimated: int
    unpriced: int


def booked(record: dict[str, str]) -> Booked:
    """Read a settled reservation."""
    return Booked(*map(int, record["booked"].split()))


async def _accounts(redis: Redis) -> tuple[dict[str, list[dict[str, str]]], Ledger, Ledger]:
    """The settled reservations, and the sums of days and months, all of one moment.

    The truth behind an estimate may come while they are read. Then they are read again.
    """
    async with asyncio.timeout(PATIENCE):
        while True:
            before = await ledger(redis)
            records, months = await _settled(redis), await ledger(redis, months=True)
            if await ledger(redis) == before:
                return records, before, months


async def _settled(redis: Redis) -> dict[str, list[dict[str, str]]]:
    """The settled reservations, by session."""
    found: dict[str, list[dict[str, str]]] = {}
    keys: Any = await redis.keys("*:{a*}:reservation:*")
    sessions: dict[str, str] = {}
    for key in keys:
        fields: Any = await redis.hgetall(key)
        record = {name.decode(): value.decode() for name, value in fields.items()}
        if record["state"] != "settled":
            continue
        session = record.get("session")
        if (
            session is None
        ):  # a failover had forgotten the reservation, so that its settlement wrote a new record
            sessions = sessions or await _sessions_by_claim(redis)
            session = sessions.get(key.decode().rpartition(":")[2], key.decode())
        found.setdefault(session, []).append(record)
    return found


async def _sessions_by_claim(redis: Redis) -> dict[str, str]:
    """The ids of the sessions, by those of their claims."""
    found: dict[str, str] = {}
    keys: Any = await redis.keys("*:session:{*}")
    for key in keys:
        claim: Any = await redis.hget(key, "claim_id")
        if claim:
            found[claim.decode()] = key.decode().rpartition("{")[2].rstrip("}")
    return found
