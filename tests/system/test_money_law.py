"""The law of money: whatever happens, no account holds more than its limit, and every bill is booked.

It has a file of its own because it takes long, and files run side by side.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from tests.money import NANO, TOTAL, ledger, until
from tests.system.bank import ASKED, SETTLED, all_settled, running_bank
from tests.system.biller import Biller
from tests.system.spenders import Spenders

if TYPE_CHECKING:
    from pathlib import Path

    from redis.asyncio import Redis

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.parametrize("redis_server", ["valkey", "redis"], indirect=True),
    pytest.mark.usefixtures("redis_server"),
]


async def is_judged_well(spenders: Spenders, redis: Redis) -> bool:
    return await spenders.judge(redis) == []


def clients(path: Path, limit: int) -> None:
    """Write tables for two of the clients; the third one has the limits of the service."""
    tables = [
        f'[{name}]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n'
        f"daily_cost = {limit * day / NANO:.9f}\nmonthly_cost = {limit * month / NANO:.9f}\n"
        for name, key, day, month in (("ann", "one", 0.5, 0.25), ("bob", "two", 0.3, 0.9))
    ]
    path.write_text("".join(tables))


def account(name: str) -> str:
    return f"*:{{a*}}:account:key:{name}"


async def test_no_account_exceeds_its_limit_under_faults(tmp_path: Path) -> None:
    """At no time more than the limit is spent and reserved; in the end each session has cost what it was billed."""
    await check_the_law(tmp_path, seconds=50.0)


async def check_the_law(tmp_path: Path, *, seconds: float, **settings: Any) -> None:
    """Let pages spend for so many seconds under faults.

    Args:
        tmp_path: for the clients' file.
        seconds: how long.
        settings: more of `running_bank`.
    """
    seed = int(os.environ.get("LAW_SEED") or secrets.randbelow(2**32))
    print(f"seed {seed}")
    random = Random(seed)
    limit = NANO * 15 // 1000
    path = tmp_path / "clients.toml"
    clients(path, limit)
    async with running_bank(
        keeps=True,
        key="three",
        api_keys="cyd:three",
        clients_file=path,
        total_daily_cost=f"{limit / NANO}",
        daily_cost=f"{limit * 0.4 / NANO}",
        monthly_cost=f"{limit * 0.35 / NANO}",
        max_concurrent_streams=6,
        disconnect_grace=1,
        first_data_timeout=3,
        idle_timeout=3,
        **settings,
    ) as (cluster, _):
        biller = Biller(cluster.upstream.scripted, Random(random.random()))
        spenders = Spenders(
            cluster,
            biller,
            random,
            {
                TOTAL: limit,
                account("ann"): limit * 50 // 100,
                account("bob"): limit * 30 // 100,
                account("cyd"): limit * 40 // 100,
            },
            monthly={
                account("ann"): limit * 25 // 100,
                account("bob"): limit * 90 // 100,
                account("cyd"): limit * 35 // 100,
            },
        )
        try:
            await spenders.run(seconds)
            async with cluster.redis() as redis:  # one of before would know servers that are gone
                await until(lambda: all_settled(redis), within=SETTLED + 15)
                with suppress(TimeoutError):
                    await until(lambda: is_judged_well(spenders, redis), within=ASKED)
                findings = await spenders.judge(redis)
                summary = spenders.summary(await ledger(redis))
        finally:
            await biller.close()
        print(summary)
        assert findings == [], f"seed {seed}"
        assert len(biller.bills) > 100
