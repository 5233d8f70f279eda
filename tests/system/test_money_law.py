"""The law of money: whatever happens, no account holds more than its limit, and every bill is booked.

It has a file of its own because it takes long, and files run side by side.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING

import pytest

from tests.money import CLIENTS, NANO, TOTAL, ledger, until
from tests.system.bank import ASKED, SETTLED, all_settled, running_bank
from tests.system.biller import Biller
from tests.system.spenders import Spenders

if TYPE_CHECKING:
    from redis.asyncio import Redis

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.parametrize("redis_server", ["valkey", "redis"], indirect=True),
    pytest.mark.usefixtures("redis_server"),
]


async def is_judged_well(spenders: Spenders, redis: Redis) -> bool:
    return await spenders.judge(redis) == []


async def test_no_account_exceeds_its_limit_under_faults() -> None:
    """At no time more than the limit is spent and reserved; in the end each session has cost what it was billed."""
    seed = secrets.randbelow(2**32)
    print(f"seed {seed}")
    random = Random(seed)
    limit = NANO * 15 // 1000
    async with running_bank(
        keeps=True,
        api_keys="ann:one,bob:two,cyd:three",
        total_daily_cost=f"{limit / NANO}",
        daily_cost=f"{limit * 0.4 / NANO}",
        monthly_cost=f"{limit * 0.35 / NANO}",
        max_concurrent_streams=6,
        disconnect_grace=1,
        first_data_timeout=3,
        idle_timeout=3,
    ) as (cluster, redis):
        biller = Biller(cluster.upstream.scripted, Random(random.random()))
        spenders = Spenders(
            cluster,
            biller,
            random,
            {TOTAL: limit, CLIENTS: limit * 4 // 10},
            monthly={CLIENTS: limit * 35 // 100},
        )
        try:
            await spenders.run(50.0)
            await until(lambda: all_settled(redis), within=SETTLED + 15)
            with suppress(TimeoutError):
                await until(lambda: is_judged_well(spenders, redis), within=ASKED)
            findings = await spenders.judge(redis)
        finally:
            await biller.close()
        print(spenders.summary(await ledger(redis)))
        assert findings == [], f"seed {seed}"
        assert len(biller.bills) > 100
