"""The list of models across workers: stored in Redis, fetched once, served during failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import orjson
import pytest
import pytest_asyncio
from aiohttp import web
from openai import AsyncOpenAI, DefaultAioHttpClient

from broker.catalog import MAX_LISTINGS, Catalog
from broker.core.errors import ModelsUnavailable, StoreUnavailable
from broker.core.upstream_kind import UpstreamKind
from broker.store.connection import Store
from broker.store.embedded import embedded_valkey
from broker.store.model_list import KEPT, LOCK_TTL, CatalogStore
from broker.upstream import model_list as upstream_models
from broker.upstream.model_list import fetch_models
from tests.stopwatch import Stopwatch

if TYPE_CHECKING:
    from broker.core.model_entry import Models

T = TypeVar("T")
Pass = Callable[[int], Awaitable[None]]
Worker = Callable[..., Catalog]
URL = "https://models.example/v1"
TTL = 600
SHORTENED_MS = round(LOCK_TTL * 750)
"""Milliseconds after which a lock that a test has shortened expires, unless it is renewed."""


def body_of(*ids: str) -> bytes:
    return orjson.dumps({"data": [{"id": model_id, "pricing": {}} for model_id in ids]})


def ids(models: Models) -> list[str]:
    return [model.id for model in models.entries]


async def soon(awaitable: Awaitable[T]) -> T:
    return await asyncio.wait_for(awaitable, 5)


class Clock:
    """A worker's clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Upstream:
    """A model service that answers GET /models as it is told to, once its gate is open."""

    def __init__(self) -> None:
        self.status = 200
        self.body = body_of("a", "b")
        self.headers: dict[str, str] = {}
        self.authorization = ""
        self.fetches = 0
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def answer(self, request: web.Request) -> web.Response:
        self.fetches += 1
        self.authorization = request.headers["Authorization"]
        self.asked.set()
        await self.gate.wait()
        return web.Response(
            status=self.status, body=self.body, content_type="application/json", headers=self.headers
        )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def upstream() -> Upstream:
    return Upstream()


@pytest_asyncio.fixture
async def client(upstream: Upstream) -> AsyncIterator[AsyncOpenAI]:
    app = web.Application()
    app.router.add_get("/v1/models", upstream.answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    client = AsyncOpenAI(
        api_key="upstream-key",
        base_url=f"http://127.0.0.1:{port}/v1",
        max_retries=0,
        http_client=DefaultAioHttpClient(),
    )
    yield client
    await client.close()
    await runner.cleanup()


@pytest_asyncio.fixture
async def workers() -> AsyncIterator[list[Catalog]]:
    made: list[Catalog] = []
    yield made
    await asyncio.gather(*(catalog.close() for catalog in made))


@pytest.fixture
def worker(client: AsyncOpenAI, store: Store, clock: Clock, workers: list[Catalog]) -> Worker:
    """Makes the catalogs of any number of workers."""

    def make(store: Store = store, fetch: Callable[[], Awaitable[bytes]] | None = None) -> Catalog:
        workers.append(
            Catalog(
                fetch or partial(fetch_models, client),
                CatalogStore(store, URL),
                kind=UpstreamKind("auto", URL),
                ttl=TTL,
                clock=clock,
            )
        )
        return workers[-1]

    return make


@pytest.fixture
def pass_time(store: Store, clock: Clock, workers: list[Catalog]) -> Pass:
    """Makes seconds pass, once all is quiet: for the workers' clock and for the list in Redis."""

    async def grow_older(seconds: int) -> None:
        for task in [catalog._task for catalog in workers if catalog._task is not None]:
            await soon(asyncio.wait({task}))
        clock.now += seconds
        for key in await keys(store, ":list"):
            await store.redis.pexpire(key, await store.redis.pttl(key) - seconds * 1000)

    return grow_older


@pytest_asyncio.fixture
async def away() -> AsyncIterator[Store]:
    """A store without a Redis."""
    store = Store("unix:///nonexistent/valkey", "test")
    yield store
    await store.close()


async def keys(store: Store, ending: str = "") -> list[bytes]:
    return [key async for key in store.redis.scan_iter() if key.endswith(ending.encode())]


# The store


async def test_a_saved_list_comes_back_byte_for_byte_with_its_age(store: Store, pass_time: Pass) -> None:
    catalog = CatalogStore(store, URL)
    assert await catalog.load() is None
    await catalog.save(b"\x00list\xff")
    await pass_time(90)
    stored = await catalog.load()
    assert stored is not None
    assert stored.body == b"\x00list\xff"
    assert stored.age == pytest.approx(90, abs=5)


async def test_a_list_is_kept_for_a_day(store: Store, pass_time: Pass) -> None:
    catalog = CatalogStore(store, URL)
    await catalog.save(b"list")
    await pass_time(KEPT)
    assert await catalog.load() is None


async def test_every_key_expires(store: Store) -> None:
    catalog = CatalogStore(store, URL)
    await catalog.save(b"list")
    await catalog.acquire("me")
    assert len(await keys(store)) == 2
    assert all([await store.redis.ttl(key) > 0 for key in await keys(store)])
    await catalog.release("me", failures=1, pause=60)
    assert all([await store.redis.ttl(key) > 0 for key in await keys(store)])


async def test_upstreams_are_kept_apart_by_their_address(store: Store) -> None:
    await CatalogStore(store, URL).save(b"list")
    assert await CatalogStore(store, "https://other.example/v1").load() is None
    assert await CatalogStore(store, URL + "/").load() is not None


async def test_one_holder_at_a_time_may_fetch(store: Store) -> None:
    catalog = CatalogStore(store, URL)
    assert await catalog.acquire("mine") is None
    busy = await catalog.acquire("yours")
    assert busy is not None
    assert busy.failures == 0
    await catalog.release("yours")
    assert await catalog.acquire("yours") is not None
    await catalog.release("mine")
    assert await catalog.acquire("yours") is None


async def test_a_lock_that_is_held_does_not_expire(store: Store) -> None:
    catalog = CatalogStore(store, URL)
    await catalog.acquire("mine")
    [lock] = await keys(store, ":lock")
    await store.redis.pexpire(lock, SHORTENED_MS)
    assert await catalog.hold("mine")
    assert await store.redis.pttl(lock) > SHORTENED_MS


async def test_a_lock_that_was_lost_is_not_held(store: Store) -> None:
    catalog = CatalogStore(store, URL)
    await catalog.acquire("mine")
    [lock] = await keys(store, ":lock")
    await store.redis.delete(lock)
    assert not await catalog.hold("mine")
    await catalog.acquire("yours")
    await store.redis.pexpire(lock, SHORTENED_MS)
    assert not await catalog.hold("mine")
    assert await store.redis.pttl(lock) <= SHORTENED_MS


async def test_a_worker_without_the_lock_cannot_report_a_failure(store: Store) -> None:
    catalog = CatalogStore(store, URL)
    await catalog.acquire("mine")
    await catalog.release("late", failures=4, pause=60)
    busy = await catalog.acquire("other")
    assert busy is not None
    assert busy.failures == 0


async def test_a_reported_failure_pauses_all_workers_for_its_time(store: Store) -> None:
    catalog = CatalogStore(store, URL)
    await catalog.acquire("mine")
    await catalog.release("mine", failures=3, pause=20)
    busy = await catalog.acquire("yours")
    assert busy is not None
    assert busy.failures == 3
    assert busy.seconds == pytest.approx(20, abs=5)
    [lock] = await keys(store, ":lock")
    await store.redis.pexpire(lock, 0)
    assert await catalog.acquire("yours") is None


async def test_a_redis_that_is_away_is_reported(away: Store) -> None:
    catalog = CatalogStore(away, URL)
    for call in (catalog.load(), catalog.save(b""), catalog.acquire("me"), catalog.release("me")):
        with pytest.raises(StoreUnavailable):
            await call


# The fetch


async def test_a_fetch_shows_the_key_and_returns_the_bytes_as_they_came(
    client: AsyncOpenAI, upstream: Upstream
) -> None:
    upstream.body = b'{ "data" : [{"id":"a","pricing":{"prompt":"0.10"}}] }'
    assert await fetch_models(client) == upstream.body
    assert upstream.authorization == "Bearer upstream-key"


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 502])
async def test_a_refusal_is_reported_without_the_request(
    client: AsyncOpenAI, upstream: Upstream, status: int
) -> None:
    upstream.status = status
    with pytest.raises(ModelsUnavailable) as refused:
        await fetch_models(client)
    assert refused.value.__cause__ is None
    assert upstream.fetches == 1


async def test_an_upstream_that_hangs_is_left_in_time(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.gate.clear()
    stopwatch = Stopwatch()
    with pytest.raises(ModelsUnavailable):
        await fetch_models(client, timeout=0.2)
    assert stopwatch.seconds < 2


async def test_a_list_without_end_is_refused(
    client: AsyncOpenAI, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream_models, "MAX_LIST_BYTES", 1000)
    upstream.body = b" " * 1001
    with pytest.raises(ModelsUnavailable):
        await fetch_models(client)


async def test_a_body_that_cannot_be_unpacked_is_refused(client: AsyncOpenAI, upstream: Upstream) -> None:
    upstream.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(ModelsUnavailable):
        await fetch_models(client)


async def test_an_upstream_that_does_not_listen_is_unavailable() -> None:
    async with AsyncOpenAI(
        api_key="k", base_url="http://127.0.0.1:1/v1", max_retries=0, http_client=DefaultAioHttpClient()
    ) as client:
        with pytest.raises(ModelsUnavailable):
            await fetch_models(client)


# The catalog of one worker, and of several


async def test_two_workers_and_many_callers_fetch_once(worker: Worker, upstream: Upstream) -> None:
    upstream.gate.clear()
    one, two = worker(), worker()
    asking = [asyncio.create_task(catalog.models()) for catalog in (one, two, one, two)]
    await soon(upstream.asked.wait())
    upstream.gate.set()
    for models in await soon(asyncio.gather(*asking)):
        assert ids(models) == ["a", "b"]
    assert upstream.fetches == 1


async def test_a_worker_that_comes_later_reads_what_another_fetched(
    worker: Worker, upstream: Upstream
) -> None:
    await worker().models()
    assert ids(await worker().models()) == ["a", "b"]
    assert upstream.fetches == 1


async def test_a_fresh_list_is_served_from_memory(worker: Worker, upstream: Upstream, store: Store) -> None:
    catalog = worker()
    first = await catalog.models()
    await store.redis.flushall()
    upstream.status = 500
    assert await catalog.models() is first
    assert upstream.fetches == 1


async def test_a_list_that_is_no_longer_fresh_is_fetched_again(
    worker: Worker, upstream: Upstream, pass_time: Pass
) -> None:
    catalog = worker()
    await catalog.models()
    upstream.body = body_of("c")
    await pass_time(TTL - 1)
    assert ids(await catalog.models()) == ["a", "b"]
    await pass_time(1)
    assert ids(await catalog.models()) == ["c"]


async def test_the_same_answer_stays_the_same_version(
    worker: Worker, upstream: Upstream, pass_time: Pass
) -> None:
    catalog = worker()
    first = await catalog.models()
    await pass_time(TTL)
    assert await catalog.models() is first
    assert upstream.fetches == 2


@pytest.mark.parametrize(
    "answer", [(500, b""), (401, b"{}"), (200, b"<html>"), (200, b'{"error":{"code":429}}')]
)
async def test_the_last_good_list_is_served_while_the_upstream_fails(
    worker: Worker, upstream: Upstream, answer: tuple[int, bytes], pass_time: Pass
) -> None:
    one = worker()
    await one.models()
    upstream.status, upstream.body = answer
    await pass_time(TTL)
    assert ids(await one.models()) == ["a", "b"]
    assert ids(await worker().models()) == ["a", "b"]
    await pass_time(KEPT - TTL - 60)
    assert ids(await one.models()) == ["a", "b"]


async def test_after_a_day_without_a_new_one_there_is_no_list(
    worker: Worker, upstream: Upstream, pass_time: Pass
) -> None:
    catalog = worker()
    await catalog.models()
    upstream.status = 500
    await pass_time(KEPT)
    with pytest.raises(ModelsUnavailable):
        await catalog.models()
    assert await catalog.known(["a"]) == {}


async def test_a_failing_upstream_is_asked_less_and_less(
    worker: Worker, upstream: Upstream, away: Store, clock: Clock
) -> None:
    upstream.status = 503
    catalog = worker(away)
    tried_at = []
    for second in range(200):
        clock.now = 1000.0 + second
        before = upstream.fetches
        with pytest.raises(ModelsUnavailable):
            await catalog.models()
        if upstream.fetches > before:
            tried_at.append(second)
    assert tried_at == [0, 5, 15, 35, 75, 135, 195]


async def test_a_failure_says_when_to_come_again(worker: Worker, upstream: Upstream) -> None:
    upstream.status = 503
    with pytest.raises(ModelsUnavailable) as failed:
        await worker().models()
    assert (failed.value.status, failed.value.code) == (502, "upstream_unavailable")
    assert failed.value.retry_after == pytest.approx(5)


async def test_one_workers_failure_spares_the_upstream_the_others_tries(
    worker: Worker, upstream: Upstream
) -> None:
    upstream.status = 503
    for _ in range(3):
        with pytest.raises(ModelsUnavailable):
            await worker().models()
    assert upstream.fetches == 1


async def test_failures_in_a_row_are_counted_across_workers(
    worker: Worker, upstream: Upstream, store: Store, clock: Clock
) -> None:
    upstream.status = 503
    one, two = worker(), worker()
    for catalog in (one, two):
        with pytest.raises(ModelsUnavailable):
            await catalog.models()
    [lock] = await keys(store, ":lock")
    await store.redis.pexpire(lock, 0)
    clock.now += 5
    with pytest.raises(ModelsUnavailable) as failed:
        await two.models()
    assert upstream.fetches == 2
    assert failed.value.retry_after == pytest.approx(10)


async def test_an_upstream_that_recovers_is_forgiven(
    worker: Worker, upstream: Upstream, away: Store, clock: Clock
) -> None:
    upstream.status = 503
    catalog = worker(away)
    with pytest.raises(ModelsUnavailable):
        await catalog.models()
    upstream.status = 200
    clock.now += 5
    assert ids(await catalog.models()) == ["a", "b"]


async def test_a_dead_fetcher_delays_the_others_until_its_lock_expires(worker: Worker, store: Store) -> None:
    await CatalogStore(store, URL).acquire("dead worker")
    assert ids(await worker().models()) == ["a", "b"]


async def test_a_fetcher_that_fails_uses_what_another_worker_has_fetched_meanwhile(
    worker: Worker, store: Store
) -> None:
    """It stood still, so that its fetch took too long and its lock was given to the other one."""

    async def too_late() -> bytes:
        await CatalogStore(store, URL).save(body_of("c"))
        raise ModelsUnavailable

    assert ids(await worker(fetch=too_late).models()) == ["c"]


async def test_a_fetch_that_takes_longer_than_the_lock_lasts_stays_the_only_one(
    worker: Worker, upstream: Upstream, store: Store
) -> None:
    upstream.gate.clear()
    fetching = asyncio.create_task(worker().models())
    await soon(upstream.asked.wait())
    waiting = asyncio.create_task(worker().models())
    [lock] = await keys(store, ":lock")
    for _ in range(3):
        await store.redis.pexpire(lock, SHORTENED_MS)
        await soon(prolonged(store, lock))
    upstream.gate.set()
    assert ids(await fetching) == ids(await waiting) == ["a", "b"]
    assert upstream.fetches == 1


async def prolonged(store: Store, lock: bytes) -> None:
    """Wait until the lock has been renewed."""
    while await store.redis.pttl(lock) <= SHORTENED_MS:
        assert await store.redis.exists(lock)
        await asyncio.sleep(0.01)


async def test_a_stored_list_that_cannot_be_read_is_replaced(
    worker: Worker, store: Store, pass_time: Pass
) -> None:
    kept = CatalogStore(store, URL)
    await kept.save(b"<html>")
    assert ids(await worker().models()) == ["a", "b"]
    await pass_time(1)
    stored = await kept.load()
    assert stored is not None
    assert stored.body == body_of("a", "b")


async def test_without_redis_every_worker_fetches_for_itself(
    worker: Worker, upstream: Upstream, away: Store
) -> None:
    for _ in range(2):
        catalog = worker(away)
        assert await catalog.models() is await catalog.models()
    assert upstream.fetches == 2


async def test_the_list_in_memory_is_served_when_redis_is_gone(
    worker: Worker, upstream: Upstream, pass_time: Pass
) -> None:
    with embedded_valkey() as url:
        store = Store(url, "test")
        catalog = worker(store)
        await catalog.models()
    assert ids(await catalog.models()) == ["a", "b"]
    await pass_time(TTL)
    upstream.body = body_of("c")
    assert ids(await catalog.models()) == ["c"]
    await pass_time(TTL)
    upstream.status = 500
    assert ids(await catalog.models()) == ["c"]
    await store.close()


async def test_a_bug_in_a_refresh_is_paced_and_costs_only_the_list(worker: Worker, away: Store) -> None:
    tries = 0

    async def broken() -> bytes:
        nonlocal tries
        tries += 1
        raise ZeroDivisionError

    catalog = worker(away, broken)
    for _ in range(3):
        assert await catalog.known(["a"]) == {}
        with pytest.raises(ModelsUnavailable):
            await catalog.models()
    assert tries == 1


# What /prepare asks


async def test_known_models_are_returned_and_the_rest_is_missing(worker: Worker) -> None:
    catalog = worker()
    known = await catalog.known(["a", "b:nitro", "c"])
    assert {name: model.id for name, model in known.items()} == {"a": "a", "b:nitro": "b"}


async def test_the_kind_of_upstream_is_known_by_its_list(worker: Worker, upstream: Upstream) -> None:
    upstream.body = b'{"data":[{"id":"llama3:8b","pricing":{"prompt":"0.1","completion":"0.1"}}]}'
    catalog = worker()
    assert not catalog.openrouter
    await catalog.models()
    assert catalog.openrouter


async def test_a_hanging_upstream_delays_first_callers_by_their_timeout(
    worker: Worker, upstream: Upstream
) -> None:
    upstream.gate.clear()
    catalog = worker()
    stopwatch = Stopwatch()
    assert await catalog.known(["a"], timeout=0.3) == {}
    assert stopwatch.elapsed > 0.2
    assert stopwatch.seconds < 0.9


async def test_a_late_caller_does_not_wait_for_a_hanging_fetch(
    worker: Worker, upstream: Upstream, clock: Clock
) -> None:
    upstream.gate.clear()
    catalog = worker()
    await catalog.known([], timeout=0)
    await soon(upstream.asked.wait())
    clock.now += 2
    stopwatch = Stopwatch()
    assert await catalog.known(["a"], timeout=2) == {}
    assert stopwatch.seconds < 1
    upstream.gate.set()
    await catalog.models()
    assert list(await catalog.known(["a"])) == ["a"]


async def test_callers_do_not_wait_again_after_a_failed_fetch(
    worker: Worker, upstream: Upstream, away: Store, clock: Clock
) -> None:
    upstream.status = 500
    catalog = worker(away)
    assert await catalog.known(["a"]) == {}
    clock.now += 5
    upstream.gate.clear()
    upstream.asked.clear()
    stopwatch = Stopwatch()
    assert await catalog.known(["a"], timeout=3) == {}
    assert stopwatch.seconds < 1
    await soon(upstream.asked.wait())


async def test_an_old_list_is_used_at_once_and_renewed_behind_it(
    worker: Worker, upstream: Upstream, pass_time: Pass
) -> None:
    catalog = worker()
    await catalog.models()
    await pass_time(TTL)
    upstream.body = body_of("c")
    upstream.gate.clear()
    upstream.asked.clear()
    assert list(await catalog.known(["a", "c"])) == ["a"]
    await soon(upstream.asked.wait())
    upstream.gate.set()
    await catalog.models()
    assert list(await catalog.known(["a", "c"])) == ["c"]


async def test_an_old_list_in_redis_is_used_while_the_upstream_hangs(
    worker: Worker, upstream: Upstream, store: Store, pass_time: Pass
) -> None:
    await CatalogStore(store, URL).save(body_of("old"))
    await pass_time(TTL)
    upstream.gate.clear()
    stopwatch = Stopwatch()
    assert list(await worker().known(["old"], timeout=5)) == ["old"]
    assert stopwatch.seconds < 2


async def test_a_caller_that_leaves_does_not_end_the_fetch_for_others(
    worker: Worker, upstream: Upstream
) -> None:
    upstream.gate.clear()
    catalog = worker()
    leaving = [asyncio.create_task(catalog.known(["a"])), asyncio.create_task(catalog.models())]
    await soon(upstream.asked.wait())
    for task in leaving:
        task.cancel()
    await asyncio.wait(leaving)
    assert all(task.cancelled() for task in leaving)
    upstream.gate.set()
    assert ids(await catalog.models()) == ["a", "b"]
    assert upstream.fetches == 1


async def test_closing_ends_a_fetch_and_releases_the_lock(
    worker: Worker, upstream: Upstream, store: Store
) -> None:
    upstream.gate.clear()
    catalog = worker()
    waiting = asyncio.create_task(catalog.models())
    await soon(upstream.asked.wait())
    await catalog.close()
    with pytest.raises(ModelsUnavailable):
        await soon(waiting)
    assert await CatalogStore(store, URL).acquire("next worker") is None


async def test_a_closed_catalog_fetches_nothing_more(worker: Worker, upstream: Upstream) -> None:
    catalog = worker()
    await catalog.close()
    assert await catalog.known(["a"]) == {}
    with pytest.raises(ModelsUnavailable):
        await catalog.models()
    assert upstream.fetches == 0


# Answers ready to be sent


async def test_an_answer_is_written_once_a_version_and_query(
    worker: Worker, upstream: Upstream, pass_time: Pass
) -> None:
    catalog = worker()
    listing = await catalog.listing(("*",), q="A")
    assert await catalog.listing(("*",), q="a") is listing
    assert orjson.loads(listing.body) == {"data": [{"id": "a", "pricing": {}}]}
    upstream.body = body_of("aa", "b")
    await pass_time(TTL)
    assert (await catalog.listing(("*",), q="a")).etag != listing.etag


async def test_only_so_many_answers_are_kept(worker: Worker) -> None:
    catalog = worker()
    rare = await catalog.listing(("*",), q="b")
    asked_for_often = await catalog.listing(("*",))
    for number in range(MAX_LISTINGS):
        await catalog.listing(("*",), q=str(number))
        assert await catalog.listing(("*",)) is asked_for_often
    assert await catalog.listing(("*",), q="b") is not rare
