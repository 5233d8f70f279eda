"""Bytes per token across workers: samples are stored in Redis within bounds and read at times."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

import pytest
import pytest_asyncio

from broker.bytes_per_token import (
    FRESH,
    LEARN_AGAIN,
    MAX_COUNTED,
    MAX_IN_MEMORY,
    MAX_READS,
    PAUSE,
    BytesPerToken,
)
from broker.core.bytes_per_token import Sample, estimate
from broker.core.errors import StoreUnavailable
from broker.store.bytes_per_token import KEPT_OF_CLIENT, KEPT_OF_MODEL, MAX_MODELS, TTL, BytesPerTokenStore
from broker.store.connection import Store
from tests.stopwatch import Stopwatch

T = TypeVar("T")
Worker = Callable[[BytesPerTokenStore], BytesPerToken]
URL = "https://models.example/v1"


def sample(bytes_per_token: float, client: str = "me", model: str = "a/b") -> Sample:
    return Sample(model, client, bytes_per_token)


def values(samples: Iterable[Sample]) -> list[float]:
    return [sample.value for sample in samples]


async def soon(awaitable: Awaitable[T]) -> T:
    return await asyncio.wait_for(awaitable, 5)


class Clock:
    """A worker's clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Gated(BytesPerTokenStore):
    """A store that counts what is asked of it, answers once its gate is open, and breaks when it is told to."""

    def __init__(self, store: Store, upstream_url: str = URL) -> None:
        super().__init__(store, upstream_url)
        self.loads: list[list[str]] = []
        self.lessons = 0
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None

    async def load(self, models: Sequence[str]) -> dict[str, list[Sample]]:
        self.loads.append(list(models))
        await self._pass()
        return await super().load(models)

    async def learn(self, sample: Sample) -> list[Sample]:
        self.lessons += 1
        await self._pass()
        return await super().learn(sample)

    async def _pass(self) -> None:
        self.asked.set()
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def density(store: Store) -> BytesPerTokenStore:
    return BytesPerTokenStore(store, URL)


@pytest.fixture
def gated(store: Store) -> Gated:
    return Gated(store)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest_asyncio.fixture
async def worker(clock: Clock) -> AsyncIterator[Worker]:
    """Makes the values of any number of workers."""
    made: list[BytesPerToken] = []

    def make(store: BytesPerTokenStore) -> BytesPerToken:
        made.append(BytesPerToken(store, clock=clock))
        return made[-1]

    yield make
    await asyncio.gather(*(bytes_per_token.close() for bytes_per_token in made))


@pytest_asyncio.fixture
async def away() -> AsyncIterator[Store]:
    """A store without a Redis."""
    store = Store("unix:///nonexistent/valkey", "test")
    yield store
    await store.close()


async def reads_done(bytes_per_token: BytesPerToken) -> None:
    reads = set(bytes_per_token._reads.values())
    if reads:
        await soon(asyncio.wait(reads))


# The store


async def test_samples_come_back_the_newest_first(density: BytesPerTokenStore) -> None:
    assert await density.load(["a/b"]) == {"a/b": []}
    await density.learn(sample(4.0))
    kept = await density.learn(sample(2.12345))
    assert values(kept) == [2.123, 4.0]
    assert await density.load(["c/d", "a/b"]) == {"c/d": [], "a/b": kept}


async def test_clients_are_told_apart_and_not_named(store: Store, density: BytesPerTokenStore) -> None:
    await density.learn(sample(4.0, "ann@example.com"))
    await density.learn(sample(4.0, "bob: with\nspaces \ud800"))
    kept = await density.learn(sample(5.0, "ann@example.com"))
    assert len({found.client for found in kept}) == 2
    assert kept[0].client == kept[2].client
    [key] = [key async for key in store.redis.scan_iter() if key.endswith(b":samples")]
    assert b"ann" not in (await store.redis.dump(key) or b"")


async def test_only_the_newest_samples_of_one_client_are_kept(density: BytesPerTokenStore) -> None:
    for number in range(KEPT_OF_CLIENT + 5):
        kept = await density.learn(sample(1 + number / 10))
    assert len(kept) == KEPT_OF_CLIENT
    assert kept[0].value == pytest.approx(1 + (KEPT_OF_CLIENT + 4) / 10)
    assert kept[-1].value == pytest.approx(1.5)


async def test_one_client_takes_a_quarter_of_the_samples_at_most(
    density: BytesPerTokenStore,
) -> None:
    for number in range(KEPT_OF_MODEL):
        await density.learn(sample(4.0, f"c{number}"))
    for _ in range(KEPT_OF_MODEL):
        kept = await density.learn(sample(1.0, "odd"))
    assert len(kept) == KEPT_OF_MODEL
    assert values(kept).count(4.0) == KEPT_OF_MODEL - KEPT_OF_CLIENT


async def test_no_sample_is_lost_among_many_at_once(density: BytesPerTokenStore) -> None:
    lessons = [sample(1 + number / 10, f"c{number % 5}") for number in range(40)]
    await asyncio.gather(*(density.learn(lesson) for lesson in lessons))
    found = await density.load(["a/b"])
    assert sorted(values(found["a/b"])) == pytest.approx(sorted(values(lessons)))


async def test_the_model_with_the_oldest_sample_is_removed(density: BytesPerTokenStore) -> None:
    await density.learn(sample(4.0, model="first"))
    await density.learn(sample(4.0, model="second"))
    await density.learn(sample(4.0, model="first"))
    await asyncio.gather(
        *(density.learn(sample(4.0, model=f"m{number}")) for number in range(MAX_MODELS - 1))
    )
    found = await density.load(["first", "second"])
    assert (len(found["first"]), len(found["second"])) == (2, 0)
    assert await density._store.redis.hlen(density._samples_key) == MAX_MODELS
    assert await density._store.redis.zcard(density._heard_key) == MAX_MODELS


async def test_a_model_is_removed_after_a_long_time_without_use(
    store: Store, density: BytesPerTokenStore
) -> None:
    await density.learn(sample(4.0, model="old"))
    await density.learn(sample(4.0, model="new"))
    await store.redis.zincrby(density._heard_key, -TTL, "old")
    await density.learn(sample(4.0))
    assert await store.redis.hkeys(density._samples_key) == [b"new", b"a/b"]
    assert await store.redis.zcard(density._heard_key) == 2


async def test_every_key_expires_unless_it_is_used(store: Store, density: BytesPerTokenStore) -> None:
    for _ in range(2):
        await density.learn(sample(4.0))
        keys = [key async for key in store.redis.scan_iter()]
        assert len(keys) == 2
        for key in keys:
            assert TTL - 5 < await store.redis.ttl(key) <= TTL
            await store.redis.expire(key, 100)


async def test_upstreams_are_kept_apart_and_their_keys_in_one_slot(
    store: Store, density: BytesPerTokenStore
) -> None:
    await density.learn(sample(4.0))
    assert await BytesPerTokenStore(store, "https://other.example/v1").load(["a/b"]) == {"a/b": []}
    assert (await BytesPerTokenStore(store, URL + "/").load(["a/b"]))["a/b"]
    tags = {key.partition(b"{")[2].partition(b"}")[0] async for key in store.redis.scan_iter()}
    assert len(tags) == 1


async def test_a_redis_that_is_away_is_reported(away: Store) -> None:
    density = BytesPerTokenStore(away, URL)
    with pytest.raises(StoreUnavailable):
        await density.learn(sample(4.0))
    with pytest.raises(StoreUnavailable):
        await density.load(["a/b"])


# The workers


async def test_nothing_is_known_of_an_unused_model(density: BytesPerTokenStore, worker: Worker) -> None:
    bytes_per_token = worker(density)
    assert await bytes_per_token.of(["a/b", "c/d:nitro"]) == {}
    assert await bytes_per_token.of([]) == {}


async def test_a_worker_knows_at_once_what_it_has_learned(
    density: BytesPerTokenStore, worker: Worker
) -> None:
    bytes_per_token = worker(density)
    assert await bytes_per_token.of(["a/b"]) == {}
    for _ in range(20):
        await bytes_per_token.learn(sample(5.0))
    assert await bytes_per_token.of(["a/b", "a/b:nitro", "c/d"]) == {"a/b": 5.0, "a/b:nitro": 5.0}


async def test_a_new_worker_knows_what_others_have_learned(
    density: BytesPerTokenStore, worker: Worker
) -> None:
    learner = worker(density)
    for _ in range(20):
        await learner.learn(sample(5.0))
    assert await read(worker(density), "a/b") == 5.0


async def read(bytes_per_token: BytesPerToken, model: str) -> float:
    """What there is to know of a model: on a busy machine, reading it may take longer than a request waits."""
    async with asyncio.timeout(5):
        while not (found := await bytes_per_token.of([model])):
            pass
    return found[model]


async def test_other_workers_know_a_little_later(gated: Gated, worker: Worker, clock: Clock) -> None:
    learner, other = worker(gated), worker(gated)
    assert await other.of(["a/b"]) == {}
    for _ in range(20):
        await learner.learn(sample(5.0))
    clock.now += FRESH - 0.1
    assert await other.of(["a/b"]) == {}
    assert gated.loads == [["a/b"]]
    clock.now += 0.2
    await other.of(["a/b"])
    await reads_done(other)
    assert await other.of(["a/b"]) == {"a/b": 5.0}
    assert gated.loads == [["a/b"]] * 2


async def test_several_models_are_read_together_and_variants_once(gated: Gated, worker: Worker) -> None:
    await worker(gated).of(["a/b", "a/b:free", "c/d", "e/f"])
    assert gated.loads == [["a/b", "c/d", "e/f"]]


async def test_values_in_memory_are_returned_without_waiting(
    gated: Gated, worker: Worker, clock: Clock
) -> None:
    bytes_per_token = worker(gated)
    for _ in range(20):
        await bytes_per_token.learn(sample(5.0))
    gated.gate.clear()
    clock.now += FRESH
    stopwatch = Stopwatch()
    for _ in range(100):
        assert await bytes_per_token.of(["a/b"]) == {"a/b": 5.0}
    assert stopwatch.seconds < 1
    assert len(bytes_per_token._reads) == 1


async def test_the_first_caller_waits_for_a_moment_only(gated: Gated, worker: Worker) -> None:
    gated.gate.clear()
    bytes_per_token = worker(gated)
    stopwatch = Stopwatch()
    assert await bytes_per_token.of(["a/b"]) == {}
    assert stopwatch.seconds < 0.5
    gated.gate.set()
    await reads_done(bytes_per_token)
    assert "a/b" in bytes_per_token._cached


async def test_all_who_ask_at_once_share_one_read(gated: Gated, worker: Worker) -> None:
    for _ in range(20):
        await worker(gated).learn(sample(5.0))
    bytes_per_token = worker(gated)
    found = await asyncio.gather(*(bytes_per_token.of(["a/b"]) for _ in range(50)))
    assert found == [{"a/b": 5.0}] * 50
    assert gated.loads == [["a/b"]]


async def test_reads_at_once_are_bounded(gated: Gated, worker: Worker) -> None:
    gated.gate.clear()
    bytes_per_token = worker(gated)
    await asyncio.gather(*(bytes_per_token.of([f"m{number}"]) for number in range(MAX_READS + 20)))
    assert len(gated.loads) == MAX_READS
    gated.gate.set()
    await reads_done(bytes_per_token)
    assert await bytes_per_token.of([f"m{MAX_READS}"]) == {}
    assert gated.loads[-1] == [f"m{MAX_READS}"]


async def test_memory_is_bounded(gated: Gated, worker: Worker) -> None:
    bytes_per_token = worker(gated)
    await bytes_per_token.of(f"m{number}" for number in range(MAX_IN_MEMORY))
    await bytes_per_token.of(["one more"])
    assert len(bytes_per_token._cached) == MAX_IN_MEMORY
    assert "m0" not in bytes_per_token._cached


# When Redis fails


async def test_nothing_is_known_or_raised_while_redis_is_away(away: Store, worker: Worker) -> None:
    bytes_per_token = worker(BytesPerTokenStore(away, URL))
    assert await bytes_per_token.of(["a/b"]) == {}
    await bytes_per_token.learn(sample(5.0))


async def test_values_in_memory_stay_while_redis_is_away(gated: Gated, worker: Worker, clock: Clock) -> None:
    bytes_per_token = worker(gated)
    for _ in range(20):
        await bytes_per_token.learn(sample(5.0))
    gated.failure = StoreUnavailable()
    clock.now += 100 * FRESH
    for _ in range(3):
        assert await bytes_per_token.of(["a/b"]) == {"a/b": 5.0}
        await reads_done(bytes_per_token)


@pytest.mark.parametrize("failure", [StoreUnavailable(), RuntimeError("a bug")], ids=["away", "a bug"])
async def test_after_a_failure_redis_is_left_alone_for_a_while(
    gated: Gated, worker: Worker, clock: Clock, failure: Exception
) -> None:
    bytes_per_token = worker(gated)
    gated.failure = failure
    assert await bytes_per_token.of(["a/b"]) == {}
    gated.failure = None
    clock.now += PAUSE - 0.1
    assert await bytes_per_token.of(["a/b"]) == {}
    await bytes_per_token.learn(sample(5.0))
    assert (gated.loads, gated.lessons) == ([["a/b"]], 0)
    clock.now += 0.2
    await bytes_per_token.of(["a/b"])
    await bytes_per_token.learn(sample(5.0))
    assert (gated.loads, gated.lessons) == ([["a/b"]] * 2, 1)


async def test_a_failed_sample_is_lost_and_pauses_too(gated: Gated, worker: Worker) -> None:
    for failure in (StoreUnavailable(), RuntimeError("a bug")):
        bytes_per_token = worker(gated)
        gated.failure = failure
        await bytes_per_token.learn(sample(5.0))
        assert await bytes_per_token.of(["a/b"]) == {}
    assert gated.loads == []


async def test_values_in_memory_survive_a_redis_that_lost_them(
    store: Store, gated: Gated, worker: Worker, clock: Clock
) -> None:
    bytes_per_token = worker(gated)
    for _ in range(20):
        await bytes_per_token.learn(sample(5.0))
    await store.redis.flushall()
    clock.now += FRESH
    await bytes_per_token.of(["a/b"])
    await reads_done(bytes_per_token)
    assert await bytes_per_token.of(["a/b"]) == {"a/b": 5.0}


# When it is cancelled


async def test_a_caller_that_leaves_costs_the_others_nothing(gated: Gated, worker: Worker) -> None:
    for _ in range(20):
        await worker(gated).learn(sample(5.0))
    gated.asked.clear()
    gated.gate.clear()
    bytes_per_token = worker(gated)
    leaving = asyncio.create_task(bytes_per_token.of(["a/b"]))
    await soon(gated.asked.wait())
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    gated.gate.set()
    await reads_done(bytes_per_token)
    assert await bytes_per_token.of(["a/b"]) == {"a/b": 5.0}


async def test_learning_can_be_cancelled(gated: Gated, worker: Worker) -> None:
    gated.gate.clear()
    bytes_per_token = worker(gated)
    learning = asyncio.create_task(bytes_per_token.learn(sample(5.0)))
    await soon(gated.asked.wait())
    learning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await learning
    gated.gate.set()
    await soon(bytes_per_token.learn(sample(5.0)))
    assert gated.lessons == 2


async def test_close_cancels_reads(gated: Gated, worker: Worker) -> None:
    gated.gate.clear()
    bytes_per_token = worker(gated)
    await bytes_per_token.of(["a/b"])
    reads = set(bytes_per_token._reads.values())
    await soon(bytes_per_token.close())
    assert [read.cancelled() for read in reads] == [True]
    assert await bytes_per_token.of(["c/d"]) == {}
    assert gated.loads == [["a/b"]]


# All together


@pytest.mark.parametrize("truth", [1.5, 3.0, 6.0])
@pytest.mark.parametrize("clients", [1, 3, 20])
async def test_every_worker_estimates_well_after_twenty_answers(
    density: BytesPerTokenStore, worker: Worker, truth: float, clients: int
) -> None:
    noise = random.Random(7)
    workers = [worker(density) for _ in range(3)]
    for number in range(20):
        told = truth * noise.uniform(0.85, 1.15)
        await workers[number % 3].learn(sample(told, f"c{number % clients}"))
    assert await read(worker(density), "a/b") == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize("odd", [1.0, 2.0, 6.0, 8.0])
async def test_many_odd_answers_of_one_client_change_estimates_little(
    density: BytesPerTokenStore, worker: Worker, odd: float
) -> None:
    bytes_per_token = worker(density)
    for number in range(20):
        await bytes_per_token.learn(sample(4.0, f"c{number % 4}"))
    for _ in range(300):
        await bytes_per_token.learn(sample(odd, "odd"))
    found = await bytes_per_token.of(["a/b"])
    assert found["a/b"] == pytest.approx(4.0, rel=0.05)
    assert found["a/b"] == estimate((await density.load(["a/b"]))["a/b"])


async def test_many_answers_at_once_are_not_all_stored(gated: Gated, clock: Clock, worker: Worker) -> None:
    """Redis keeps so many of a client; more would only replace each other."""
    known = worker(gated)
    for _ in range(KEPT_OF_CLIENT + 10):
        await known.learn(sample(4.0))
    assert gated.lessons == KEPT_OF_CLIENT
    await known.learn(sample(4.0, client="another"))
    await known.learn(sample(4.0, model="another/model"))
    assert gated.lessons == KEPT_OF_CLIENT + 2
    clock.now += LEARN_AGAIN
    await known.learn(sample(4.0))
    assert gated.lessons == KEPT_OF_CLIENT + 3


async def test_the_counts_of_clients_are_bounded(gated: Gated, worker: Worker) -> None:
    known = worker(gated)
    for number in range(MAX_COUNTED + 5):
        known._has_enough(sample(4.0, client=f"client {number}"))
    assert len(known._learned) == MAX_COUNTED
