"""The law of money among workers that die, freeze and lose their Redis: nothing is paid twice, and nothing lost."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from broker.store.accounts import LEASE
from tests.money import (
    PRICE,
    Ledger,
    due_records,
    ledger,
    slots,
    until,
)
from tests.system.bank import ASKED, SETTLED, all_asked, all_closed, running_bank
from tests.system.cluster import Session, came_again, question

if TYPE_CHECKING:
    from tests.system.cluster import Cluster, NumberedCall, Worker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.parametrize("redis_server", ["valkey", "redis"], indirect=True),
    pytest.mark.usefixtures("redis_server"),
]


async def prepared(cluster: Cluster, worker: Worker, **fields: Any) -> tuple[Session, int]:
    """A new session, and the estimate of its prompt."""
    marker = cluster.marker()
    answer = await cluster.ask("POST", worker, "/prepare", json={**question(marker), **fields})
    assert answer.status == 201, answer
    return Session(cluster, answer.json["sessionId"], marker), answer.json["promptTokens"]


def bill(call: NumberedCall, cost: float) -> None:
    """End an answer with its usage: 15 tokens."""
    call.call.chunk(finish="stop")
    call.call.usage(cost=cost)
    call.call.done()
    call.over = True


async def test_two_workers_admit_exactly_the_claims_with_room() -> None:
    async with running_bank(total_daily_cost="0.0037") as (cluster, redis):
        sessions = []
        for number in range(500):
            session, prompt = await prepared(cluster, cluster.workers[number % 2], max_tokens=100 - 30)
            sessions.append(session)
        room = 3_700_000 // ((prompt + 70) * PRICE)
        codes: list[str] = []

        async def claim(number: int, session: Session) -> None:
            async with session.stream(cluster.workers[(number // 2) % 2]) as connection:
                event = await connection.event()
                if event is None:  # Redis was busy: the page comes again
                    await claim(number, session)
                    return
                codes.append("ran" if event.kind == "chunk" else event.json["code"])

        claims = [asyncio.create_task(claim(*numbered)) for numbered in enumerate(sessions)]
        await until(lambda: asyncio.sleep(0, len(codes) == 500 - room), within=30)
        assert set(codes) == {"budget_exceeded"}
        account = await ledger(redis)
        assert account.reserved_cost == room * (prompt + 70) * PRICE <= 3_700_000
        calls = [session for session in sessions if session.calls]
        assert len(calls) == room
        for session in calls:
            assert session.calls == 1
            (await session.call()).done()
        await asyncio.gather(*claims)
        assert codes.count("ran") == room
        await until(lambda: all_closed(redis))
        assert await ledger(redis) == Ledger(room, 0, room * 15, room * 15 * PRICE)


async def test_another_worker_settles_for_a_killed_one() -> None:
    # A service without records: nothing more can be learned, so nothing stays reserved.
    async with running_bank(daily_cost="1", max_concurrent_streams=2, upstream_kind="openai") as (
        cluster,
        redis,
    ):
        owner, other = cluster.workers
        silent, prompt = await prepared(cluster, owner)
        told, _ = await prepared(cluster, owner)
        async with silent.stream(owner) as connection, told.stream(owner) as other_line:
            call = await silent.call()
            call.chunks(3, size=10)
            await connection.take(3)
            call = await told.call()
            call.chunks(1)
            call.finish()
            call.call.usage(cost=0.0005)
            await other_line.take(4)
            await cluster.journaled(silent, 3)
            await cluster.journaled(told, 4)
            await owner.kill()
        waiting, _ = await prepared(cluster, other)
        async with waiting.stream(other) as connection:
            [event] = await connection.rest()
            assert event.kind == "queued"
        await until(lambda: all_closed(redis), within=SETTLED)
        assert await ledger(redis) == Ledger(2, 1, prompt + 10 + 15, (prompt + 10) * PRICE + 500_000)
        async with waiting.stream(other) as connection:
            bill(await waiting.call(), 0.001)
            assert (await connection.rest())[-1].kind == "done"
        assert silent.calls == told.calls == 1


async def test_the_record_corrects_an_estimate_for_a_dead_worker() -> None:
    async with running_bank() as (cluster, redis):
        owner, _ = cluster.workers
        cluster.upstream.scripted.generations["gen-chunk"] = {
            "total_cost": 0.0007,
            "native_tokens_prompt": 4,
            "native_tokens_completion": 3,
        }
        session, _ = await prepared(cluster, owner)
        async with session.stream(owner) as connection:
            call = await session.call()
            call.chunks(1)
            await connection.take(1)
            await cluster.journaled(session, 1)
            await owner.kill()

        async def corrected() -> bool:
            return await ledger(redis) == Ledger(1, 0, 7, 700_000)

        await until(corrected, within=SETTLED)


async def test_another_worker_asks_for_a_killed_ones_record() -> None:
    async with running_bank() as (cluster, redis):
        owner, other = cluster.workers
        generations = cluster.upstream.scripted.generations
        generations["gen-chunk"] = None  # not yet
        session, prompt = await prepared(cluster, owner)
        async with session.stream(owner) as connection:
            call = await session.call()
            call.chunks(1)
            await connection.take(1)
            assert (await session.cancel(other)).status == 202
            assert (await connection.rest())[-1].kind == "done"
            await owner.kill()
        assert (await ledger(redis)).estimated == await due_records(redis) == 1
        generations["gen-chunk"] = {
            "total_cost": 0.0007,
            "native_tokens_prompt": 4,
            "native_tokens_completion": 3,
        }
        await until(lambda: all_asked(redis), within=ASKED)
        assert await ledger(redis) == Ledger(1, 0, 7, 700_000) != Ledger(1, 0, prompt, prompt * PRICE)


async def test_a_frozen_owner_that_wakes_corrects_the_estimate() -> None:
    async with running_bank(daily_cost="1") as (cluster, redis):
        owner, _ = cluster.workers
        session, _ = await prepared(cluster, owner)
        async with session.stream(owner) as connection:
            call = await session.call()
            call.chunks(2)
            await connection.take(2)
            owner.freeze()
            bill(call, 0.000_9)  # what it will find when it wakes

            async def estimated() -> bool:
                return (await ledger(redis)).estimated == 1

            await until(estimated, within=SETTLED)
            await until(lambda: all_closed(redis))  # the rest is released once the upstream was asked
            owner.thaw()

            async def corrected() -> bool:
                return await ledger(redis) == Ledger(1, 0, 15, 900_000)

            await until(corrected)
            assert await all_closed(redis)


async def test_a_long_freeze_of_redis_frees_no_slot() -> None:
    """Longer than the leases of workers and of reservations."""
    async with running_bank(daily_cost="1", max_concurrent_streams=5) as (cluster, redis):
        sessions = [(await prepared(cluster, worker))[0] for worker in cluster.workers * 2]
        late, _ = await prepared(cluster, cluster.workers[0])
        lines = [
            session.stream(worker) for session, worker in zip(sessions, cluster.workers * 2, strict=True)
        ]
        async with lines[0] as a, lines[1] as b, lines[2] as c, lines[3] as d:
            calls = [await session.call() for session in sessions]
            cluster.valkey.freeze()
            async with late.stream(cluster.workers[0]) as line:
                assert await came_again(line)
            await asyncio.sleep(LEASE + 2)  # as long as that is
            cluster.valkey.thaw()
            # Its claim was never sent, and its page has left: it is claimed when the page comes again.
            again = asyncio.create_task(late.read_through(cluster.workers[0]))
            calls.append(await late.call())

            async def renewed() -> bool:
                now, _ = await redis.time()
                keys: Any = await redis.keys("*:{a*}:open")
                return sum([await redis.zcount(key, now * 1000, "+inf") for key in keys]) == 5

            await until(renewed)
            assert await slots(redis) == 5
            await asyncio.sleep(12)  # several rounds of the bookkeepers, which must not find anybody dead
            for call in calls:
                bill(call, 0.001)
            for line in (a, b, c, d):
                assert (await line.rest())[-1].kind == "done"
        assert (await again)[-1].kind == "done"
        assert (await late.read(cluster.workers[1]))[-1].kind == "done"
        assert late.calls == 1
        assert await all_closed(redis)
        assert await ledger(redis) == Ledger(5, 0, 75, 5_000_000)
