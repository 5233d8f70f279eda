"""The booking of each kind of end: once, before the end is sent, and as exactly as possible."""

from __future__ import annotations

import asyncio
import json
from operator import methodcaller
from typing import TYPE_CHECKING, Any

import pytest

from broker.core.accounts import Quotas, Usage, WorstCase
from broker.core.chat_answer import ChatAnswer
from broker.core.pricing import NANO
from broker.core.session import State
from broker.relay.settlement import RECORD_DELAYS, estimated_usage, usage_in_record
from broker.store.accounts import AccountStore, Reservation
from broker.store.usage_ledger import UsageLedger
from broker.web import keys
from tests.broker import Broker, running
from tests.clock import Clock, run_ready_tasks
from tests.kinds import Servers, running_servers
from tests.money import (
    MODEL,
    PRICE,
    Ledger,
    due_records,
    ledger,
    let_time_pass,
    open_reservations,
    price_list,
    slots,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from broker.store.connection import Store
    from tests.scripted import Call, ScriptedUpstream

GENERATION = "gen-chunk"
RECORD = {
    "total_cost": 0.000123,
    "native_tokens_prompt": 11,
    "native_tokens_completion": 7,
    "native_tokens_cached": 3,
}


@pytest.fixture
async def broker(valkey_url: str, upstream: ScriptedUpstream) -> AsyncIterator[Broker]:
    """One whose upstream has prices, by which it is known for OpenRouter."""
    upstream.models = price_list()
    async with running(valkey_url, upstream) as broker:
        await broker.ask("GET", "/models")
        yield broker


async def prepared(broker: Broker, **fields: Any) -> tuple[str, int]:
    """A new session, and the estimate of its prompt."""
    answer = await broker.post(
        {"model": MODEL, "messages": [{"role": "user", "content": "Say it."}], **fields}
    )
    assert answer.status == 201, answer.text
    return answer.json["sessionId"], answer.json["promptTokens"]


async def counts(broker: Broker) -> dict[str, int]:
    """Return the only entry of the ledger."""
    _, [line] = await UsageLedger(broker.app[keys.STORE]).rows(None)
    return line.counts


async def booked(broker: Broker) -> Ledger:
    """Return the spending of all clients; something is reserved only where an estimate may still be corrected."""
    redis = broker.redis
    account = await ledger(redis)
    if not await due_records(redis):
        assert (account.reserved_tokens, account.reserved_cost) == (0, 0)
    assert await slots(redis) == await open_reservations(redis) == 0
    return account._replace(reserved_tokens=0, reserved_cost=0)


def answer_with(*usage: Mapping[str, Any], text: str = "Hello") -> Callable[[Call], None]:
    """An answer that ends well, with a usage or none."""

    def reply(call: Call) -> None:
        call.open()
        call.chunk(text, finish="stop")
        for each in usage:
            call.usage(**each)
        call.done()

    return reply


# The upstream's word


async def test_the_reported_cost_is_booked_before_the_end_is_sent(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    details = {
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    upstream.replies = [answer_with({"cost": 0.0000015, **details})]
    session, _ = await prepared(broker)
    async with broker.stream(session) as connection:
        *_, end = await connection.take(3)
        assert await booked(broker) == Ledger(1, 0, 15, 1500)
    assert (end.json["cost"], end.json["estimated"]) == (0.0000015, False)
    assert end.json["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    counted = await counts(broker)
    assert counted == {
        **dict.fromkeys(counted, 0),
        "requests": 1,
        "prompt": 10,
        "completion": 5,
        "cached": 4,
        "reasoning": 2,
        "cost": 1500,
    }


async def test_zero_is_zero_and_no_estimate(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [
        answer_with({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0, "cost": 0})
    ]
    session, _ = await prepared(broker)
    end = (await broker.read(session))[-1]
    assert (end.json["cost"], end.json["estimated"]) == (0, False)
    assert await booked(broker) == Ledger(1)
    assert upstream.looks == []


CACHE = {
    "prompt": "0.000002",
    "completion": "0.000003",
    "input_cache_read": "0.000001",
    "request": "0.000005",
}
THOUGHT = {"prompt": "0", "completion": "0.000003", "internal_reasoning": "0.000004"}
LONG = {**CACHE, "overrides": [{"min_prompt_tokens": 9, "prompt": "0.000007"}]}


@pytest.mark.parametrize(
    ("pricing", "nano"),
    [
        (CACHE, 6 * 2000 + 4 * 1000 + 5 * 3000 + 5000),
        (THOUGHT, 3 * 3000 + 2 * 4000),
        (LONG, 6 * 7000 + 4 * 1000 + 5 * 3000 + 5000),
        ({"prompt": "0", "completion": "0"}, 0),
    ],
)
async def test_a_bill_without_a_cost_is_priced_by_the_list(
    valkey_url: str, upstream: ScriptedUpstream, pricing: dict[str, Any], nano: int
) -> None:
    """10 tokens of prompt, 4 of them cached; 5 of the answer, 2 of them thought."""
    details = {
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    upstream.models, upstream.replies = price_list(**{MODEL: pricing}), [answer_with(details)]
    async with running(valkey_url, upstream) as broker:
        session, _ = await prepared(broker)
        end = (await broker.read(session))[-1]
        assert (end.json["cost"], end.json["estimated"]) == (nano / NANO, False)
        assert await booked(broker) == Ledger(1, 0, 15, nano)


@pytest.mark.parametrize("pricing", [None, {"prompt": "-1", "completion": "-1"}])
async def test_an_answer_without_a_price_has_a_null_cost(
    valkey_url: str, upstream: ScriptedUpstream, pricing: dict[str, str] | None
) -> None:
    upstream.models, upstream.replies = price_list(**{MODEL: pricing}), [answer_with({})]
    async with running(valkey_url, upstream) as broker:
        session, _ = await prepared(broker)
        assert (await broker.read(session))[-1].json["cost"] is None
        assert await booked(broker) == Ledger(1, 0, 15, 0)
        assert (await counts(broker))["unpriced"] == 1


async def test_a_bill_above_its_reservation_is_booked_whole(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.models = price_list()
    upstream.replies = [answer_with({"prompt_tokens": 1000, "completion_tokens": 2000, "cost": 0.5})]
    async with running(valkey_url, upstream, daily_cost="0.0001", daily_tokens=100) as broker:
        session, _ = await prepared(broker, max_tokens=20)
        await broker.read(session)
        assert await booked(broker) == Ledger(1, 0, 3000, NANO // 2)
        usage = (await broker.ask("GET", "/usage")).json
        assert usage["limits"] == {"tokens": {"limit": 100, "left": 0}, "cost": {"limit": 0.0001, "left": 0}}


# Our own count


async def test_an_answer_without_usage_is_estimated(valkey_url: str, upstream: ScriptedUpstream) -> None:
    upstream.models, upstream.replies = price_list(), [answer_with(text="é" * 30)]
    async with running(valkey_url, upstream) as broker:
        session, prompt = await prepared(broker)
        end = (await broker.read(session))[-1]
        assert (end.json["usage"], end.json["estimated"]) == (None, True)
        assert end.json["cost"] == (prompt + 20) * PRICE / NANO
        assert await booked(broker) == Ledger(1, 1, prompt + 20, (prompt + 20) * PRICE)


async def test_an_estimate_is_no_more_than_was_reserved(valkey_url: str, upstream: ScriptedUpstream) -> None:
    """The upstream knows how much it may write, but its tokens may be longer than ours."""
    upstream.models, upstream.replies = price_list(), [answer_with(text="x" * 600)]
    async with running(valkey_url, upstream) as broker:
        session, prompt = await prepared(broker, max_tokens=100)
        await broker.read(session)
        assert (await booked(broker)).spent_tokens == prompt + 100


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 422, 429, 502, 503, 529])
async def test_a_refused_request_costs_nothing(
    valkey_url: str, upstream: ScriptedUpstream, status: int
) -> None:
    upstream.models = price_list()
    upstream.replies = [lambda call: call.reply(status, {"error": {"code": status, "message": "No."}})]
    async with running(valkey_url, upstream, max_retries=0) as broker:
        session, _ = await prepared(broker)
        assert (await broker.read(session))[-1].kind == "error"
        assert await booked(broker) == Ledger(1)
        counted = await counts(broker)
        assert (counted["failed"], counted["estimated"], counted["unpriced"]) == (1, 0, 0)


async def test_an_upstream_that_is_not_there_costs_nothing(valkey_url: str) -> None:
    async with running(valkey_url, "http://127.0.0.1:9/v1", max_retries=0) as broker:
        session, _ = await prepared(broker)
        assert (await broker.read(session))[-1].json["code"] == "upstream_unavailable"
        assert await booked(broker) == Ledger(1)


@pytest.mark.parametrize("status", [408, 500, 504, 524])
async def test_where_something_may_be_billed_the_prompt_is(
    valkey_url: str, upstream: ScriptedUpstream, status: int
) -> None:
    upstream.models = price_list()
    upstream.replies = [lambda call: call.reply(status, {"error": {"code": status, "message": "No."}})]
    async with running(valkey_url, upstream) as broker:
        session, prompt = await prepared(broker)
        await broker.read(session)
        assert await booked(broker) == Ledger(1, 1, prompt, prompt * PRICE)
        assert len(upstream.calls) == 1


def cut(call: Call) -> None:
    call.open()
    call.chunk("x" * 30)
    call.close()


def broken(call: Call) -> None:
    call.open()
    call.chunk("x" * 30)
    call.event(json.dumps({"error": {"code": 502, "message": "It broke."}}).encode())
    call.end()


def hung_up(call: Call) -> None:
    call.close()


@pytest.mark.parametrize(
    ("reply", "written", "code"),
    [(cut, 10, "upstream_interrupted"), (broken, 10, "upstream_error"), (hung_up, 0, "upstream_interrupted")],
)
async def test_a_failure_is_paid_for_as_far_as_it_got(
    valkey_url: str, upstream: ScriptedUpstream, reply: Callable[[Call], None], written: int, code: str
) -> None:
    upstream.models, upstream.replies = price_list(), [reply]
    async with running(valkey_url, upstream) as broker:
        session, prompt = await prepared(broker)
        assert (await broker.read(session))[-1].json["code"] == code
        assert await booked(broker) == Ledger(1, 1, prompt + written, (prompt + written) * PRICE)
        assert (await counts(broker))["failed"] == 1


async def test_a_failure_that_brings_its_bill_is_paid_by_it(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    def reply(call: Call) -> None:
        usage = {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15, "cost": 0.001}
        call.open()
        call.chunk("Hello")
        call.event(json.dumps({"error": {"code": 502, "message": "It broke."}, "usage": usage}).encode())
        call.close()

    upstream.replies = [reply]
    session, _ = await prepared(broker)
    assert (await broker.read(session))[-1].kind == "error"
    assert await booked(broker) == Ledger(1, 0, 15, 1_000_000)


async def test_a_cancelled_answer_is_paid_for_as_far_as_it_got(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.models = price_list()
    async with running(valkey_url, upstream) as broker:
        session, prompt = await prepared(broker)
        async with broker.stream(session) as connection:
            call = (await upstream.call()).open()
            call.chunk("x" * 30)
            await connection.take(1)
            assert (await broker.cancel(session)).status == 202
            assert await booked(broker) == Ledger(1, 1, prompt + 10, (prompt + 10) * PRICE)
            [end] = await connection.rest()
        assert (end.json["finishReason"], end.json["estimated"]) == ("cancelled", True)
        counted = await counts(broker)
        assert (counted["cancelled"], counted["failed"]) == (1, 0)


async def test_a_worker_that_never_prepared_knows_the_prices_too(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.models = price_list()
    async with running(valkey_url, upstream) as one, running(valkey_url, upstream) as another:
        session, prompt = await prepared(one)
        await until(lambda: asyncio.sleep(0, another.app[keys.CATALOG].has_list))
        async with another.stream(session) as connection:
            call = (await upstream.call()).open()
            call.chunk("x" * 30)
            await connection.take(1)
            await one.cancel(session)
            [end] = await connection.rest()
        assert end.json["cost"] == (prompt + 10) * PRICE / NANO


async def test_a_cancel_before_the_claim_is_not_a_request(broker: Broker) -> None:
    session, _ = await prepared(broker)
    await broker.cancel(session)
    await broker.read(session)
    assert await booked(broker) == Ledger()
    _, lines = await UsageLedger(broker.app[keys.STORE]).rows(None)
    assert lines == []


async def test_a_page_that_leaves_pays_for_the_written_text(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.models = price_list()
    async with running(valkey_url, upstream, disconnect_grace=0) as broker:
        session, prompt = await prepared(broker)
        async with broker.stream(session) as connection:
            call = (await upstream.call()).open()
            call.chunk("x" * 30)
            await connection.take(1)
        await call.wait_gone()
        redis = broker.redis
        await until(lambda: _settled(redis))
        assert await booked(broker) == Ledger(1, 1, prompt + 10, (prompt + 10) * PRICE)
        assert (await counts(broker))["failed"] == 1


async def _settled(redis: Any) -> bool:
    return (await ledger(redis)).requests > 0


async def test_a_page_that_leaves_pays_for_an_answer_that_continues(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    session, _ = await prepared(broker)
    async with broker.stream(session):
        call = await upstream.call()
    answer_with({"cost": 0.002})(call)
    await until(lambda: _settled(broker.redis))
    assert await booked(broker) == Ledger(1, 0, 15, 2_000_000)


# The upstream's records


async def estimated(broker: Broker, upstream: ScriptedUpstream) -> int:
    """End a session without usage; returns what was estimated, in tokens."""
    upstream.replies = [answer_with()]
    session, _ = await prepared(broker)
    await broker.read(session)
    account = await ledger(broker.redis)
    assert account.estimated == 1
    return account.spent_tokens


async def test_an_estimate_is_corrected_by_the_upstreams_record(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    upstream.generations[GENERATION] = RECORD
    await estimated(broker, upstream)

    async def corrected() -> bool:
        return (await ledger(broker.redis)).estimated == 0

    await until(corrected)
    assert await booked(broker) == Ledger(1, 0, 18, 123_000)
    counted = await counts(broker)
    assert (counted["requests"], counted["cached"], counted["estimated"], counted["unpriced"]) == (1, 3, 0, 0)
    assert upstream.looks == [GENERATION]


def clock_of_settlement(broker: Broker) -> Clock:
    """A clock by which the broker waits before it fetches a record."""
    clock, settlement = Clock(), broker.app[keys.WORKER]._settlement
    settlement._clock, settlement._pause = clock, clock.pause
    return clock


async def test_a_record_that_is_late_is_fetched_again(broker: Broker, upstream: ScriptedUpstream) -> None:
    clock = clock_of_settlement(broker)
    began = clock.now
    upstream.generations[GENERATION] = None
    await estimated(broker, upstream)
    await clock.end_pause()
    await until(lambda: asyncio.sleep(0, len(upstream.looks) == 1))
    upstream.generations[GENERATION] = RECORD

    async def corrected() -> bool:
        return (await ledger(broker.redis)).estimated == 0

    await clock.end_pause()
    await until(corrected)
    assert clock.now - began == RECORD_DELAYS[1]
    assert await booked(broker) == Ledger(1, 0, 18, 123_000)


async def test_the_reservation_stays_until_the_record_is_there(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    clock = clock_of_settlement(broker)
    upstream.generations[GENERATION] = None
    tokens = await estimated(broker, upstream)
    redis = broker.redis
    account = await ledger(redis)
    assert account.spent_tokens == tokens
    assert account.spent_tokens + account.reserved_tokens == account.reserved_tokens + tokens > 4096
    assert account.reserved_cost > 0
    await clock.end_pause()
    await until(lambda: asyncio.sleep(0, len(upstream.looks) == 1))
    assert await ledger(redis) == account
    upstream.generations[GENERATION] = RECORD

    async def corrected() -> bool:
        return await ledger(redis) == Ledger(1, 0, 18, 123_000)

    await clock.end_pause()
    await until(corrected)


@pytest.mark.parametrize("unknown", [True, False])
async def test_a_missing_record_does_not_stop_later_requests(
    broker: Broker, upstream: ScriptedUpstream, unknown: bool
) -> None:
    """A 404 of a proxy, once or for long, says nothing of the next generation."""
    clock = clock_of_settlement(broker)
    if not unknown:
        upstream.generations[GENERATION] = None
    await estimated(broker, upstream)
    for asked in range(1, 4):
        await clock.end_pause()
        await until(lambda asked=asked: asyncio.sleep(0, len(upstream.looks) == asked))  # type: ignore[misc]
    upstream.generations[GENERATION] = RECORD
    session, _ = await prepared(broker)
    await broker.read(session)
    await until(lambda: asyncio.sleep(0, clock.pauses.count(RECORD_DELAYS[0]) == 2))
    await clock.end_pause()
    await until(lambda: asyncio.sleep(0, len(upstream.looks) == 4))


async def test_the_estimate_of_a_dead_worker_is_asked_for_at_once(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    """Its next time by the table may be 90 s away."""
    clock = clock_of_settlement(broker)
    upstream.generations[GENERATION] = None
    await estimated(broker, upstream)
    settlement, redis = broker.app[keys.WORKER]._settlement, broker.redis
    [key] = await redis.keys("*:{a*}:reservation:*")
    seconds, _ = await redis.time()
    await redis.hset(key, "ended", (seconds - 40) * 1000)
    upstream.generations[GENERATION] = RECORD
    settlement._asking.clear()  # this worker knows nothing of it, as another one
    await let_time_pass(redis, "estimates")

    async def corrected() -> bool:
        return (await ledger(redis)).estimated == 0

    await until(corrected, within=60)
    assert await booked(broker) == Ledger(1, 0, 18, 123_000)
    assert clock.pauses == [RECORD_DELAYS[0]], "the first one still waits, and the second one did not"


async def test_an_upstream_that_is_not_openrouter_is_never_asked(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.models = b'{"object": "list", "data": [{"id": "scripted/model-1", "object": "model"}]}'
    async with running(valkey_url, upstream, upstream_kind="auto") as broker:
        clock = clock_of_settlement(broker)
        await broker.ask("GET", "/models")
        await estimated(broker, upstream)
        assert (await ledger(broker.redis)).reserved_tokens == 0
        await run_ready_tasks()
        assert clock.pauses == [], "nothing waits to fetch a record"
    assert upstream.looks == []


async def test_a_reported_cost_needs_no_record(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.generations[GENERATION] = RECORD
    upstream.replies = [answer_with({"cost": 0.001})]
    session, _ = await prepared(broker)
    clock = clock_of_settlement(broker)
    await broker.read(session)
    await run_ready_tasks()
    assert clock.pauses == [], "nothing waits to fetch a record"
    assert upstream.looks == []


# Redis away at the end


@pytest.mark.slow
@pytest.mark.parametrize("hurt", [methodcaller("freeze"), methodcaller("kill")], ids=["freeze", "kill"])
async def test_an_end_without_redis_is_settled_once_when_it_is_back(
    exposed_broker: Broker,
    valkey: Servers,
    upstream: ScriptedUpstream,
    hurt: Callable[[Servers], None],
) -> None:
    broker = exposed_broker
    """Killed, it comes back empty, and has forgotten the reservation too."""
    session, _ = await prepared(broker)
    async with broker.stream(session) as connection:
        call = await upstream.call()
        hurt(valkey)
        answer_with({"cost": 0.002})(call)
        assert [event.kind for event in await connection.rest()] == ["chunk", "chunk", "done"]
    if not valkey.is_running:
        await valkey.start()
    valkey.thaw()
    await until(lambda: _settled(broker.redis), within=10)
    await asyncio.sleep(2)  # long enough for a second try, should there be one
    assert await booked(broker) == Ledger(1, 0, 15, 2_000_000)


@pytest.mark.slow
async def test_a_lost_reservation_is_taken_again_and_settled_once(
    redis_server: str,
    upstream: ScriptedUpstream,
) -> None:
    upstream.models = price_list()
    async with running_servers() as valkey, running(valkey.url, upstream, daily_cost="1") as broker:
        session, prompt = await prepared(broker, max_tokens=50)
        async with broker.stream(session) as connection:
            call = await upstream.call()
            valkey.kill()
            await valkey.start()
            redis = broker.redis

            stored = broker.app[keys.STORE].session_keys(session)["session"]

            async def is_back() -> bool:
                """Return True if the reservation and the session are there again: they may be on two servers."""
                return bool(await redis.exists(stored)) and await ledger(redis) == Ledger(
                    reserved_tokens=prompt + 50, reserved_cost=(prompt + 50) * PRICE
                )

            await until(is_back)
            assert await slots(redis) == await open_reservations(redis) == 1
            answer_with({"cost": 0.000002})(call)
            assert (await connection.rest())[-1].kind == "done"
        assert await booked(broker) == Ledger(1, 0, 15, 2000)
        assert (await broker.ask("GET", "/health/ready")).json["status"] != "degraded"


# Without a service


@pytest.mark.parametrize(
    ("record", "spent"),
    [
        (RECORD, Usage(11, 7, 3, 0, 123_000)),
        ({"total_cost": 0, "tokens_prompt": 1, "tokens_completion": 2}, Usage(1, 2)),
        (
            {
                "total_cost": 0,
                "native_tokens_prompt": 4,
                "native_tokens_completion": 3,
                "native_tokens_reasoning": 9,
            },
            Usage(4, 3, 0, 3),
        ),
        (
            {"total_cost": 0, "native_tokens_prompt": None, "tokens_prompt": 1, "tokens_completion": 2},
            Usage(1, 2),
        ),
        ({"total_cost": None, "tokens_prompt": 1, "tokens_completion": 2}, None),
        ({"total_cost": -1, "tokens_prompt": 1, "tokens_completion": 2}, None),
        ({"total_cost": 0, "tokens_prompt": 1}, None),
        ({}, None),
    ],
)
def test_a_record_is_read_by_its_native_counts(record: dict[str, Any], spent: Usage | None) -> None:
    assert usage_in_record(record) == spent


def test_an_estimate_does_not_exceed_the_reservation() -> None:
    answer = ChatAnswer()
    answer.text_bytes = 31
    for reserved, written in ((50, 11), (21, 1), (20, 0), (10, 0)):
        reservation = Reservation("t", "s", "c", "m", WorstCase(reserved, 0))
        usage = {"prompt_tokens": 20, "completion_tokens": written}
        assert estimated_usage(answer, reservation, 20) == usage


async def test_only_estimates_are_replaced_by_better_usage(store: Store) -> None:
    """A worker that was frozen wakes after another has estimated for it."""
    accounts = AccountStore(store, Quotas(0, 1, 0, 0, 0))
    wanted = Reservation("t", "s", "c", "m", WorstCase(100, 100))
    reservation = await accounts.reserve(wanted)
    await accounts.settle(reservation, Usage(9, 9, cost=9, estimated=True), State.LOST)
    await accounts.settle(reservation, Usage(5, 5, cost=50, estimated=True), State.LOST)
    assert await ledger(store.redis) == Ledger(1, 1, 18, 9)
    await accounts.settle(reservation, Usage(5, 5, cost=50), State.LOST)
    await accounts.settle(reservation, Usage(6, 6, cost=60), State.LOST)
    assert await ledger(store.redis) == Ledger(1, 0, 10, 50)


# The names in the usage ledger


async def booked_models(broker: Broker, *models: str) -> list[str]:
    for model in models:
        session, _ = await prepared(broker, model=model)
        await broker.read(session)
    _, lines = await UsageLedger(broker.app[keys.STORE]).rows(None)
    return [line.model for line in lines]


async def test_the_ledger_names_only_models_of_the_list(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [answer_with({"cost": 0.001})]
    invented = [f"{MODEL}:x{number}" for number in range(3)] + ["no/such", "z" * 200]
    assert await booked_models(broker, MODEL, *invented) == ["other", MODEL]


async def test_without_a_list_the_ledger_names_models_that_answered(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [
        answer_with({"cost": 0.001}),
        lambda call: call.reply(404, {"error": {"code": 404, "message": "No such model."}}),
    ]
    async with running(valkey_url, upstream) as broker:
        assert await booked_models(broker, "local/llama", "no/such", "nor/such") == ["local/llama", "other"]
