"""What a /prepare leaves in Redis: a session that waits for its claim, or nothing."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from broker.core.accounts import WorstCase
from broker.store.connection import Store
from broker.store.pending import PendingStore
from broker.store.sessions import SessionStore, Spec
from tests.broker import Answer, Broker, running
from tests.kinds import needs_one_server
from tests.money import MODEL, price_list, until
from tests.relay.workers import FREE
from tests.replies import plain
from tests.valkey_cluster import one_address
from tests.wire import Wire, wire_to

if TYPE_CHECKING:
    from tests.scripted import ScriptedUpstream

PROMPT = b"What is a broker?"

REFUSED = [
    ("rate_limited", {"rate_limit": "1/minute"}),
    ("too_many_streams", {"max_prepared": 1}),
    ("too_many_streams", {"max_prepared_bytes": 1024}),
    ("overloaded", {"total_prepared_bytes": 1024}),
    ("budget_exceeded", {"daily_cost": "0.0013"}),
    ("budget_exceeded", {"total_daily_cost": "0.0013"}),
]
"""Limits that refuse the second of two requests, and how: by the rate, the account of the client, that of all."""

Waiting = tuple[int, list[int]]
"""How many sessions are stored, and how many each account counts as pending."""


@pytest.fixture(params=["at once", "in steps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A request is admitted and stored in one round trip, as on one server, or in two, as in a cluster."""
    if request.param == "at once":
        needs_one_server("elsewhere it is done in steps")
    else:
        monkeypatch.setattr(Store, "runs_in_order", False)
    return str(request.param)


async def waiting(store: Store) -> Waiting:
    found: Any = await store.redis.keys("*")
    keys = [key.decode() for key in found]
    places = [await store.redis.zcard(key) for key in keys if ":pending:" in key]
    return sum(":session:" in key for key in keys), places


async def leaves(store: Store, wanted: Waiting) -> bool:
    return await waiting(store) == wanted


async def ask(broker: Broker) -> Answer:
    content = "Say it. " * 80
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    return await broker.post(body)


@pytest.mark.usefixtures("way")
async def test_a_request_is_stored_and_counted_in_both_accounts(
    valkey_url: str, upstream: ScriptedUpstream, store: Store
) -> None:
    async with running(valkey_url, upstream) as broker:
        assert [(await ask(broker)).status for _ in range(3)] == [201] * 3
        assert await waiting(store) == (3, [3, 3])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("code", "limits"), REFUSED)
async def test_a_refused_request_leaves_nothing(
    valkey_url: str, upstream: ScriptedUpstream, store: Store, code: str, limits: dict[str, Any]
) -> None:
    upstream.models = price_list()
    upstream.replies = [plain]
    async with running(valkey_url, upstream, **limits) as broker:
        await broker.ask("GET", "/models")
        first = await ask(broker)
        assert first.status == 201, first.text
        if code == "budget_exceeded":
            await broker.read(first.json["sessionId"])  # which spends most of it
        before = await waiting(store)
        answer = await ask(broker)
        assert answer.code == code, answer.text
        await until(partial(leaves, store, before))


async def test_a_request_that_was_answered_too_late_leaves_nothing(
    valkey_url: str, upstream: ScriptedUpstream, store: Store
) -> None:
    async with wire_to(valkey_url) as wire, running(wire.url, upstream) as broker:
        await broker.ask("GET", "/health/ready")
        wire.block = PROMPT
        answer = await broker.post()
        assert (answer.status, answer.code) == (503, "store_unavailable")
        wire.unblock()
        await until(lambda: has_come(wire))
        await until(partial(leaves, store, (0, [])))


async def test_a_request_whose_reply_was_lost_leaves_nothing(
    valkey_url: str, upstream: ScriptedUpstream, store: Store
) -> None:
    async with wire_to(valkey_url) as wire, running(wire.url, upstream) as broker:
        await broker.ask("GET", "/health/ready")
        wire.drop = b"$2\r\nok"
        answer = await broker.post()
        assert (answer.status, answer.code) == (503, "store_unavailable")
        assert await has_come(wire)
        wire.drop = b""
        await until(partial(leaves, store, (0, [])))
        assert (await broker.post()).status == 201


async def has_come(wire: Wire) -> bool:
    return any(PROMPT in packet for packet in wire.sent)


async def test_a_server_that_stands_for_a_cluster_stores_it_in_steps(upstream: ScriptedUpstream) -> None:
    needs_one_server("it starts one of its own")
    upstream.replies = [plain]
    async with one_address() as server, running(server.url, upstream) as broker:
        await broker.ask("GET", "/health/ready")
        for _ in range(2):
            answer = await ask(broker)
            assert answer.status == 201, answer.text
            assert (await broker.read(answer.json["sessionId"]))[-1].kind == "done"


@pytest.mark.parametrize("admitted_by", [(), (0,), (1,), (0, 1)])
async def test_a_session_is_stored_only_if_both_accounts_have_admitted_it(
    store: Store, admitted_by: tuple[int, ...]
) -> None:
    needs_one_server("its keys are on several nodes")
    sessions = SessionStore(store, session_ttl=600, running_ttl=960, resume_ttl=300)
    keys = PendingStore(store, FREE, session_ttl=600).keys_of("key:ann")
    for key in keys:
        await store.redis.zadd(key, {"another session": 1})
    for n in admitted_by:
        await store.redis.zadd(keys[n], {"session": 1})
    spec = Spec(model=MODEL, prompt_tokens=1, referer="", client="key:ann", worst=WorstCase(1, 0))
    (reply,) = await store.run([sessions.preparing("session", b"{}", spec, if_pending=keys)])
    is_stored = await sessions.describe("session") is not None
    assert bool(int(reply)) == is_stored == (len(admitted_by) == 2)
