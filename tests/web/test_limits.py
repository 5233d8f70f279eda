"""Identity and limits at /prepare, slots and budgets at the claim."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import TYPE_CHECKING, Any

import pytest

from tests.broker import QUESTION, Answer, Broker, running
from tests.money import NANO, PRICE, ledger, open_reservations, price_list, slots, until
from tests.system.harness import ValkeyProcess

if TYPE_CHECKING:
    from broker.store.connection import Store
    from tests.events import Event
    from tests.scripted import Call, ScriptedUpstream

ANN = {"Authorization": "Bearer one"}
BOB = {"Authorization": "Bearer two"}
KEYS = "ann:one,bob:two"
CURL = {"Accept": "*/*"}
WORST = 60
"""Tokens that a small request may take at most, and not much less."""


def plain(call: Call) -> None:
    call.open()
    call.chunk("Hello", finish="stop")
    call.usage(cost=0.000015)
    call.done()


def small(**fields: Any) -> dict[str, Any]:
    return {**QUESTION, "max_tokens": 20, **fields}


async def worst_of(broker: Broker) -> int:
    """Tokens that a small request may take at most."""
    answer = await broker.post(small())
    await broker.cancel(answer.json["sessionId"])
    return int(answer.json["promptTokens"]) + 20


async def session_of(broker: Broker, headers: dict[str, str] | None = None, **fields: Any) -> str:
    answer = await broker.post(small(**fields), headers or {})
    assert answer.status == 201, answer.text
    return str(answer.json["sessionId"])


def dollars(nano: int) -> str:
    return f"{nano / NANO:.9f}"


def until_midnight() -> float:
    now = dt.datetime.now(dt.UTC)
    return 86_400 - (now - now.replace(hour=0, minute=0, second=0, microsecond=0)).total_seconds()


def check_refused(answer: Answer, code: str) -> int:
    """Make sure that this is a refusal of a limit, and return the seconds to wait."""
    assert (answer.status, answer.code) == (429, code), answer.text
    return int(answer.headers["Retry-After"])


def check_waits(events: list[Event], blocks: list[bytes], code: str, retry: int) -> None:
    """Make sure that an EventSource was told to stay and wait its turn."""
    [event] = events
    assert (event.kind, event.id) == ("error", None)
    assert (event.json["code"], event.json["final"], event.json["retryable"]) == (code, False, True)
    assert blocks[0].startswith(b"retry: %d" % retry)


# Who


@pytest.mark.parametrize("shown", [{}, {"Authorization": "Bearer three"}, {"Authorization": "Basic b25l"}])
async def test_where_keys_are_set_up_one_is_needed(
    valkey_url: str, upstream: ScriptedUpstream, shown: dict[str, str]
) -> None:
    upstream.models = price_list()
    async with running(valkey_url, upstream, api_keys=KEYS) as broker:
        for answer in (
            await broker.post(headers=shown),
            await broker.ask("GET", "/models", headers=shown),
            await broker.ask("GET", "/usage", headers=shown),
        ):
            assert (answer.status, answer.code) == (401, "unauthorized")
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        assert (await broker.post(headers=ANN)).status == 201
        assert (await broker.ask("GET", "/models", headers=ANN)).status == 200
        assert (await broker.ask("GET", "/usage", headers=ANN)).status == 200


async def test_a_session_needs_no_identity_but_its_id(valkey_url: str, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    async with running(valkey_url, upstream, api_keys=KEYS) as broker:
        assert [e.kind for e in await broker.read(await session_of(broker, ANN))][-1] == "done"
        assert (await broker.cancel(await session_of(broker, ANN))).status == 202
        assert (await broker.ask("GET", "/health/ready")).status == 200
        asked = {"Origin": "http://localhost:9", "Access-Control-Request-Method": "POST"}
        assert (await broker.ask("OPTIONS", "/prepare", headers=asked)).status in (200, 204)


async def test_the_upstream_gets_a_hash_of_the_client(valkey_url: str, upstream: ScriptedUpstream) -> None:
    upstream.replies = [plain]
    async with running(valkey_url, upstream, api_keys=KEYS) as broker:
        for headers in (ANN, ANN, BOB):
            await broker.read(await session_of(broker, headers))
        await broker.read(await session_of(broker, ANN, user="page-4"))
        ann, again, bob, own = [call.body["user"] for call in upstream.calls]
        assert ann == again != bob
        assert "ann" not in ann
        assert "one" not in ann
        assert own == "page-4"


# The rate


async def test_the_rate_is_sent_and_enforced(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, rate_limit="2/minute", api_keys=KEYS) as broker:
        first = await broker.post(headers=ANN)
        assert first.headers["RateLimit-Policy"] == '"prepare";q=2;w=60'
        assert first.headers["RateLimit"].startswith('"prepare";r=1;')
        assert (await broker.post(headers=ANN)).status == 201
        refused = await broker.post(headers=ANN)
        assert 0 < check_refused(refused, "rate_limited") <= 60
        assert refused.headers["RateLimit"].startswith('"prepare";r=0;')
        assert (await broker.post(headers=BOB)).status == 201


async def test_all_workers_count_the_same_rate(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with (
        running(valkey_url, upstream, rate_limit="2/minute") as one,
        running(valkey_url, upstream, rate_limit="2/minute") as other,
    ):
        assert [(await each.post()).status for each in (one, other, one, other)] == [201, 201, 429, 429]


# Sessions that wait


async def test_so_many_sessions_wait_and_a_cancel_frees_the_place(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, max_prepared=2, api_keys=KEYS) as broker:
        first = await session_of(broker, ANN)
        await session_of(broker, ANN)
        assert check_refused(await broker.post(headers=ANN), "too_many_streams") > 0
        await session_of(broker, BOB)
        for _ in range(2):
            await broker.cancel(first)
        await session_of(broker, ANN)
        check_refused(await broker.post(headers=ANN), "too_many_streams")


async def test_a_claim_frees_the_place(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, max_prepared=1) as broker:
        async with broker.stream(await session_of(broker)):
            await upstream.call()
            await session_of(broker)
            check_refused(await broker.post(), "too_many_streams")


async def test_expiry_frees_the_place(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, max_prepared=1, session_ttl=1) as broker:
        await session_of(broker)
        assert check_refused(await broker.post(), "too_many_streams") == 1

        async def free() -> bool:
            return (await broker.post()).status == 201

        await until(free)


async def test_a_refused_session_takes_no_place(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, max_prepared=1, daily_tokens=100) as broker:
        assert (await broker.post({**QUESTION, "max_tokens": 4000})).status == 422
        await session_of(broker)


async def test_a_repeated_key_takes_one_place(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, max_prepared=2) as broker:
        answers = await asyncio.gather(*(broker.post(headers={"Idempotency-Key": "k"}) for _ in range(2)))
        assert len({answer.json["sessionId"] for answer in answers}) == 1
        repeated = await broker.post(headers={"Idempotency-Key": "k"})
        assert repeated.status == 200
        await session_of(broker)
        check_refused(await broker.post(), "too_many_streams")


async def test_a_repeated_key_is_answered_though_the_budget_is_used_up(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.replies = [plain]
    async with running(
        valkey_url, upstream, daily_tokens=await fresh_worst_of(valkey_url, upstream) + 5
    ) as broker:
        first = await broker.post(small(), {"Idempotency-Key": "k"})
        await broker.read(first.json["sessionId"])
        check_refused(await broker.post(small()), "budget_exceeded")
        again = await broker.post(small(), {"Idempotency-Key": "k"})
        assert (again.status, again.json["sessionId"]) == (200, first.json["sessionId"])


# Budgets at the door


async def test_prepare_enforces_the_token_budget(valkey_url: str, upstream: ScriptedUpstream) -> None:
    """15 tokens are spent by each answer; what a request may take at most must fit into what is left."""
    upstream.replies = [plain]
    async with running(valkey_url, upstream, api_keys=KEYS) as broker:
        worst = int((await broker.post(small(), ANN)).json["promptTokens"]) + 20
    async with running(valkey_url, upstream, api_keys=KEYS, daily_tokens=worst + 15) as broker:
        for _ in range(2):
            await broker.read(await session_of(broker, ANN))
        refused = await broker.post(small(), ANN)
        assert abs(check_refused(refused, "budget_exceeded") - until_midnight()) < 3
        assert (await broker.post({**QUESTION, "max_tokens": 4}, ANN)).status == 201
        await session_of(broker, BOB)


async def fresh_worst_of(valkey_url: str, upstream: ScriptedUpstream) -> int:
    """Return the tokens that `small()` may take, as a broker without budgets tells it."""
    async with running(valkey_url, upstream) as broker:
        return await worst_of(broker)


async def test_a_request_that_no_budget_can_cover_is_not_valid(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.models = price_list()
    async with running(valkey_url, upstream, daily_tokens=1000) as broker:
        refused = await broker.post({**QUESTION, "max_tokens": 1000})
        assert (refused.status, refused.code) == (422, "invalid_request")
        [detail] = refused.json["error"]["details"]
        assert (detail["field"], detail["limit"]) == ("max_tokens", 1000)
        assert detail["worstCase"] > 1000
        assert str(detail["worstCase"]) in detail["message"]
    for budget in ("daily_cost", "monthly_cost", "total_daily_cost"):
        async with running(valkey_url, upstream, **{budget: "0.0005"}) as broker:
            refused = await broker.post({**QUESTION, "max_tokens": 1000})
            assert (refused.status, refused.code) == (422, "invalid_request")
            [detail] = refused.json["error"]["details"]
            assert detail["worstCase"] > detail["limit"] == 0.0005


async def test_a_claim_without_room_ends_for_good(valkey_url: str, upstream: ScriptedUpstream) -> None:
    """Two are prepared while there is room for one; the other's end takes the room away."""
    upstream.replies = [plain]
    limit = await fresh_worst_of(valkey_url, upstream) + 5
    async with running(valkey_url, upstream, daily_tokens=limit, session_ttl=60) as broker:
        first, second = await session_of(broker), await session_of(broker)
        await broker.read(first)
        if until_midnight() < 90:
            return  # a new day would make room for it
        [event] = await broker.read(second)
        assert (event.kind, event.id) == ("error", "1-1.end")
        assert (event.json["code"], event.json["final"]) == ("budget_exceeded", True)


@pytest.mark.parametrize("budget", ["daily_cost", "monthly_cost"])
async def test_prepare_enforces_the_cost_budget(
    valkey_url: str, upstream: ScriptedUpstream, budget: str
) -> None:
    upstream.models, upstream.replies = price_list(), [plain]
    async with running(valkey_url, upstream, api_keys=KEYS) as broker:
        worst = int((await broker.post(small(), ANN)).json["promptTokens"]) + 20
    limit = dollars(worst * PRICE + 14_999)
    async with running(valkey_url, upstream, api_keys=KEYS, **{budget: limit}) as broker:
        await broker.read(await session_of(broker, ANN))
        check_refused(await broker.post(small(), ANN), "budget_exceeded")
        await session_of(broker, BOB)


async def test_prepare_enforces_the_total_budget(valkey_url: str, upstream: ScriptedUpstream) -> None:
    upstream.models, upstream.replies = price_list(), [plain]
    async with running(valkey_url, upstream, api_keys=KEYS) as broker:
        worst = int((await broker.post(small(), ANN)).json["promptTokens"]) + 20
    limit = dollars(worst * PRICE + 14_999)
    async with running(valkey_url, upstream, api_keys=KEYS, total_daily_cost=limit) as broker:
        await broker.read(await session_of(broker, ANN))
        check_refused(await broker.post(small(), BOB), "budget_exceeded")


async def test_reservations_of_others_do_not_count_at_prepare(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, daily_tokens=WORST) as broker:
        async with broker.stream(await session_of(broker)):
            await upstream.call()
            await session_of(broker)


async def test_a_model_without_a_price_is_refused_with_a_budget(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    upstream.models = price_list(**{"scripted/varies": {"prompt": "-1", "completion": "-1"}})
    async with running(valkey_url, upstream, daily_cost="1") as broker:
        for fields in (
            {"model": "scripted/unknown"},
            {"model": "scripted/varies"},
            {"models": ["scripted/varies"]},
        ):
            answer = await broker.post(small(**fields))
            assert (answer.status, answer.code) == (403, "model_not_allowed")
        await session_of(broker)
    async with running(valkey_url, upstream, daily_cost="1", unpriced_models=True) as broker:
        await session_of(broker, model="scripted/unknown")
    async with running(valkey_url, upstream, daily_tokens=1000) as broker:
        await session_of(broker, model="scripted/unknown")


async def reserved_cost(broker: Broker, upstream: ScriptedUpstream, **fields: Any) -> int:
    """Return what is reserved, in nano-USD, while one generation runs."""
    async with broker.stream(await session_of(broker, **fields)):
        call = await upstream.call()
        reserved = (await ledger(broker.redis)).reserved_cost
        plain(call)
    return reserved


async def test_an_unpriced_model_is_reserved_at_the_highest_prices(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    dear = {"prompt": "0.00001", "completion": "0.00002"}
    upstream.models = price_list(
        **{"a/dear": dear, "scripted/varies": {"prompt": "-1", "completion": "-1"}, "a/none": None}
    )
    async with running(valkey_url, upstream, daily_cost="1", unpriced_models=True) as broker:
        prompt = (await broker.post(small())).json["promptTokens"]
        for model in ("scripted/unknown", "scripted/varies", "a/none"):
            assert await reserved_cost(broker, upstream, model=model) == prompt * 10_000 + 20 * 20_000
            assert upstream.calls[-1].body["provider"]["max_price"] == {"prompt": 10.0, "completion": 20.0}
            await until(lambda: _nothing_reserved(broker))


async def _nothing_reserved(broker: Broker) -> bool:
    return (await ledger(broker.redis)).reserved_cost == 0


@pytest.mark.parametrize("unpriced_models", [False, True])
async def test_a_cost_budget_needs_a_list_of_prices(
    valkey_url: str, upstream: ScriptedUpstream, unpriced_models: bool
) -> None:
    upstream.models = b"<html>It broke.</html>"
    settings: dict[str, Any] = {"daily_cost": "1", "unpriced_models": unpriced_models}
    async with running(valkey_url, upstream, **settings) as broker:
        answer = await broker.post(small())
        assert (answer.status, answer.code) == (503, "overloaded")
        assert int(answer.headers["Retry-After"]) > 0
    async with running(valkey_url, upstream, daily_tokens=1000) as broker:
        await session_of(broker)


async def test_pictures_are_reserved_at_their_own_price(valkey_url: str, upstream: ScriptedUpstream) -> None:
    seeing = {"prompt": "0.000001", "completion": "0.000001", "image": "0.01", "request": "0.002"}
    upstream.models = price_list(**{"a/seeing": seeing})
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    message = {"role": "user", "content": [picture] * 7}
    async with running(valkey_url, upstream, daily_cost="1") as broker:
        fields = {"model": "a/seeing", "messages": [message]}
        prompt = (await broker.post(small(**fields))).json["promptTokens"]
        reserved = await reserved_cost(broker, upstream, **fields)
        assert reserved == (prompt + 20) * PRICE + 7 * 10_000_000 + 2_000_000
        sent = {"prompt": 1.0, "completion": 1.0, "request": 0.002, "image": 0.01}
        assert upstream.calls[-1].body["provider"]["max_price"] == sent
    async with running(valkey_url, upstream, daily_cost=dollars(reserved - 1)) as broker:
        assert (await broker.post(small(**fields))).status == 422


@pytest.mark.parametrize(
    ("own", "sent"),
    [
        (None, {"prompt": 2.0, "completion": 3.0}),
        ({"max_price": {"prompt": 0.5, "completion": 9}}, {"prompt": 0.5, "completion": 3.0}),
        ({"max_price": {"prompt": "1.5", "image": 4}}, {"prompt": 1.5, "completion": 3.0, "image": 4}),
    ],
)
async def test_the_upstream_gets_the_reserved_price_as_its_limit(
    valkey_url: str, upstream: ScriptedUpstream, own: dict[str, Any] | None, sent: dict[str, float]
) -> None:
    """The dearest of all models that the request can reach."""
    upstream.models = price_list(**{"scripted/dear": {"prompt": "0.000002", "completion": "0.000003"}})
    upstream.replies = [plain]
    async with running(valkey_url, upstream, daily_cost="1") as broker:
        fields: dict[str, Any] = {"models": ["scripted/dear"]}
        if own is not None:
            fields["provider"] = {"order": ["Scripted"], **own}
        await broker.read(await session_of(broker, **fields))
        provider = upstream.calls[0].body["provider"]
        assert provider["max_price"] == sent
        assert provider.get("order") == (["Scripted"] if own else None)


async def test_without_a_cost_budget_no_price_is_sent(valkey_url: str, upstream: ScriptedUpstream) -> None:
    upstream.models, upstream.replies = price_list(), [plain]
    async with running(valkey_url, upstream, daily_tokens=100_000) as broker:
        await broker.read(await session_of(broker))
        assert "max_price" not in upstream.calls[0].body.get("provider", {})


async def test_prepare_without_redis_is_refused(exposed_broker: Broker, valkey: ValkeyProcess) -> None:
    broker = exposed_broker
    await session_of(broker)
    valkey.kill()
    answer = await broker.post(small())
    assert (answer.status, answer.code) == (503, "store_unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    usage = await broker.ask("GET", "/usage")
    assert (usage.status, usage.code) == (503, "store_unavailable")
    await valkey.start()


# The claim


async def test_a_page_waits_for_a_slot_and_gets_it(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream, max_concurrent_streams=1) as broker:
        first, second = await session_of(broker), await session_of(broker)
        async with broker.stream(first) as running_line:
            call = await upstream.call()
            async with broker.stream(second) as connection:
                [place] = await connection.rest()
                assert (place.kind, place.id, place.json) == ("queued", None, {"position": 1, "of": 1})
                assert connection.retry == 2000
            curl = await broker.ask("GET", f"/stream/{second}", headers=CURL)
            assert check_refused(curl, "too_many_streams") == 5
            plain(call)
            await running_line.rest()
        upstream.replies = [plain]
        assert [event.kind for event in await broker.read(second)] == ["chunk", "chunk", "done"]
        assert len(upstream.calls) == 2


async def test_a_page_waits_for_a_budget_and_gets_it(valkey_url: str, upstream: ScriptedUpstream) -> None:
    async with running(valkey_url, upstream) as broker:
        worst = await worst_of(broker)
    async with running(valkey_url, upstream, daily_tokens=worst * 2 - 1) as broker:
        first, second = await session_of(broker), await session_of(broker)
        async with broker.stream(first):
            await upstream.call()
            async with broker.stream(second) as connection:
                check_waits(await connection.rest(), connection.blocks, "budget_exceeded", 30_000)
            curl = await broker.ask("GET", f"/stream/{second}", headers=CURL)
            assert check_refused(curl, "budget_exceeded") == 30
            await broker.cancel(first)
        upstream.replies = [plain]
        assert [event.kind for event in await broker.read(second)][-1] == "done"


async def test_a_refused_claim_leaves_the_session_to_be_cancelled(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, max_concurrent_streams=1, max_prepared=1) as broker:
        first = await session_of(broker)
        async with broker.stream(first):
            await upstream.call()
            second = await session_of(broker)
            await broker.read(second)
            check_refused(await broker.post(), "too_many_streams")  # it still waits
            assert (await broker.cancel(second)).json == {"state": "cancelled"}
            await session_of(broker)


async def test_slots_belong_to_the_client_that_prepared(valkey_url: str, upstream: ScriptedUpstream) -> None:
    """Nobody shows a key to /stream, and both come from one address."""
    async with running(valkey_url, upstream, max_concurrent_streams=1, api_keys=KEYS) as broker:
        of_ann, of_bob, more_of_ann = [await session_of(broker, who) for who in (ANN, BOB, ANN)]
        async with broker.stream(of_ann), broker.stream(of_bob):
            await upstream.call(2)
            async with broker.stream(more_of_ann, headers=BOB) as connection:
                [event] = await connection.rest()
                assert event.kind == "queued"


async def test_many_viewers_of_one_session_take_one_slot(
    valkey_url: str, upstream: ScriptedUpstream, store: Store
) -> None:
    async with running(valkey_url, upstream, max_concurrent_streams=1) as broker:
        session = await session_of(broker)
        readers = [asyncio.create_task(broker.read(session)) for _ in range(10)]
        call = await upstream.call()
        assert await slots(store.redis) == await open_reservations(store.redis) == 1
        plain(call)
        assert {events[-1].kind for events in await asyncio.gather(*readers)} == {"done"}
        assert len(upstream.calls) == 1
        assert await slots(store.redis) == 0
        assert (await ledger(store.redis)).reserved_tokens == 0


async def test_a_claim_that_comes_too_late_takes_nothing(
    valkey_url: str, upstream: ScriptedUpstream, store: Store
) -> None:
    async with running(valkey_url, upstream) as one, running(valkey_url, upstream) as other:
        session = await session_of(one)
        readers = [asyncio.create_task(each.read(session)) for each in (one, other) * 5]
        call = await upstream.call()

        async def alone() -> bool:
            return await slots(store.redis) == await open_reservations(store.redis) == 1

        await until(alone)
        plain(call)
        assert {events[-1].kind for events in await asyncio.gather(*readers)} == {"done"}
        assert len(upstream.calls) == 1
        assert await ledger(store.redis) == (1, 0, 15, 15_000, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["slots", "tokens", "cost", "month", "total"])
async def test_exactly_the_claims_with_room_run(
    valkey_url: str, upstream: ScriptedUpstream, store: Store, limit: str
) -> None:
    upstream.models = price_list()
    free: dict[str, Any] = {
        "max_prepared": 1000,
        "max_concurrent_streams": 1000,
        "rate_limit": "100000/minute",
    }
    async with running(valkey_url, upstream, **free) as broker:
        worst = await worst_of(broker)
    room: dict[str, dict[str, Any]] = {
        "slots": {"max_concurrent_streams": 37},
        "tokens": {"daily_tokens": worst * 38 - 1},
        "cost": {"daily_cost": dollars(worst * 38 * PRICE - 1)},
        "month": {"monthly_cost": dollars(worst * 38 * PRICE - 1)},
        "total": {"total_daily_cost": dollars(worst * 38 * PRICE - 1)},
    }
    settings = {**free, **room[limit]}
    async with (
        running(valkey_url, upstream, **settings) as one,
        running(valkey_url, upstream, **settings) as other,
    ):
        sessions = [await session_of(one) for _ in range(500)]
        codes: list[str] = []

        async def claim(number: int, session: str) -> None:
            async with (one, other)[number % 2].stream(session) as connection:
                event = await connection.event()
                if event is None:  # Redis was busy: the page comes again
                    await claim(number, session)
                    return
                codes.append("ran" if event.kind == "chunk" else event.json.get("code", event.kind))
                if event.kind == "chunk":
                    await connection.rest()

        claims = [asyncio.create_task(claim(*numbered)) for numbered in enumerate(sessions)]
        await until(lambda: asyncio.sleep(0, len(codes) == 500 - 37), within=60)
        for call in [await upstream.call(number) for number in range(1, 38)]:
            plain(call)
        await asyncio.gather(*claims)
        refusal = "queued" if limit == "slots" else "budget_exceeded"
        assert (codes.count("ran"), codes.count(refusal)) == (37, 463)
        assert len(upstream.calls) == 37
        assert await ledger(store.redis) == (37, 0, 37 * 15, 37 * 15_000, 0, 0)
        assert await slots(store.redis) == await open_reservations(store.redis) == 0


async def test_a_claim_whose_reply_is_lost_runs_once_and_is_paid_once(
    exposed_broker: Broker, valkey: ValkeyProcess, upstream: ScriptedUpstream
) -> None:
    broker = exposed_broker
    upstream.replies = [plain]
    session = await session_of(broker)
    valkey.freeze()
    async with broker.stream(session) as connection:
        assert await connection.rest() == []
    valkey.thaw()
    assert [event.kind for event in await broker.read(session)] == ["chunk", "chunk", "done"]
    assert len(upstream.calls) == 1
    redis = broker.redis
    assert await ledger(redis) == (1, 0, 15, 15_000, 0, 0)
    assert await slots(redis) == 0


async def test_a_page_that_leaves_early_pays_for_pictures(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    seeing = {"prompt": "0.000001", "completion": "0.000001", "image": "0.01"}
    upstream.models = price_list(**{"scripted/model-1": seeing})
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    text = {"type": "text", "text": '{"type":"image_url"}'}
    message = {"role": "user", "content": [picture, text, picture, picture]}
    async with running(valkey_url, upstream, daily_cost="1") as broker:
        answer = await broker.post(small(messages=[message]))
        session = answer.json["sessionId"]
        async with broker.stream(session) as connection:
            (await upstream.call()).open().chunk("x")
            await connection.take(1)
            assert (await broker.cancel(session)).status == 202
            await connection.rest()
        told = (await broker.ask("GET", "/usage")).json
        # Each picture has its own price, and counts 2,000 tokens.
        assert 3 * (0.01 + 0.002) <= told["cost"] < 0.037
