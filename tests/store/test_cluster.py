"""A Redis Cluster: calls are split by node, slots that move are followed, and one lost node hurts only its own keys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import pytest_asyncio
from redis.crc import key_slot

from broker.core.accounts import WorstCase
from broker.core.errors import StoreRefused, StoreUnavailable
from broker.core.replay import Batch
from broker.core.session import State
from broker.store.accounts import AccountStore, Reservation
from broker.store.buckets import BUCKETS, bucket_prefix
from broker.store.call import command_call
from broker.store.cluster import Cluster
from broker.store.connection import Store
from broker.store.journal import Append, JournalStore
from broker.store.node import Node
from broker.store.running import RunningStore
from broker.store.sessions import Prepared, SessionStore
from broker.store.workers import WorkerStore
from broker.web import keys
from tests.broker import running
from tests.events import Event
from tests.money import price_list, until
from tests.replies import plain
from tests.scripted import PATIENCE, Call, ScriptedUpstream
from tests.store.test_accounts import FREE
from tests.system.harness import eventually
from tests.valkey_cluster import ValkeyCluster, ask, valkey_cluster

if TYPE_CHECKING:
    from tests.system.harness import ValkeyProcess

pytestmark = pytest.mark.slow

NAMES = [f"name {n}" for n in range(60)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[ValkeyCluster]:
    """The cluster of this file."""
    with asyncio.Runner() as runner:
        started = valkey_cluster()
        cluster = runner.run(started.__aenter__())
        try:
            yield cluster
        finally:
            runner.run(started.__aexit__(None, None, None))


@pytest_asyncio.fixture
async def store(cluster: ValkeyCluster) -> AsyncIterator[Store]:
    """A connection to the cluster, which is empty."""
    await cluster.empty()
    store = Store(cluster.url, "test", call_timeout=PATIENCE)
    yield store
    await store.close()


def sessions_in(store: Store) -> SessionStore:
    return SessionStore(store, session_ttl=600, running_ttl=960, resume_ttl=300)


PREPARED = Prepared(
    model="m", prompt_tokens=1, referer="", client="c", worst=WorstCase(1, 1), request=b'{"model":"m"}'
)


async def prepared_in(store: Store) -> str:
    session = str(uuid4())
    await sessions_in(store).prepare(session, PREPARED)
    return session


async def test_replies_come_in_the_order_of_the_calls(store: Store) -> None:
    await store.read([("SET", name, name) for name in NAMES])
    assert await store.read([("GET", name) for name in NAMES]) == [name.encode() for name in NAMES]


async def test_accounts_of_all_nodes_are_settled(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    wanted = [Reservation(str(n), f"s{n}", f"client {n}", "m", WorstCase(10, 100)) for n in range(40)]
    reservations = await asyncio.gather(*(accounts.reserve(each) for each in wanted))
    assert await accounts.renew(reservations) == []
    assert await accounts.overdue(100) == []
    await asyncio.gather(*(accounts.release(each) for each in reservations))
    assert {each.claim_id for each in await accounts.renew(reservations)} == {str(n) for n in range(40)}


async def test_a_slot_that_has_moved_is_found(cluster: ValkeyCluster, store: Store) -> None:
    session = await prepared_in(store)
    await cluster.move(f"{{{session}}}")
    claimed = await sessions_in(store).claim(
        session, "claim", "worker"
    )  # the new node does not know the script
    assert claimed == PREPARED


async def begin_to_move(cluster: ValkeyCluster, session: str) -> tuple[ValkeyProcess, ValkeyProcess]:
    """Let the slot of a session be about to move. Returns the old node and the new one."""
    old = await cluster.serving(f"{{{session}}}")
    new = next(node for node in await cluster.primaries() if node is not old)
    await cluster.mark(key_slot(session.encode()), old, new)
    return old, new


async def test_a_slot_that_moves_is_followed(cluster: ValkeyCluster, store: Store) -> None:
    """A key that has moved is asked for at its new node; keys of a script that are at both are waited for."""
    session = await prepared_in(store)
    sessions, journal = sessions_in(store), JournalStore(store, worker="w", running_ttl=960)
    await sessions.claim(session, "claim", "w")
    await journal.append([Append(session, "claim", Batch(1, 1, b"one"))])
    old, new = await begin_to_move(cluster, session)
    await cluster.move_key(store.session_keys(session)["session"], old, new)
    record = await sessions.describe(session)
    assert record is not None
    assert record.state is State.RUNNING
    append = asyncio.create_task(journal.append([Append(session, "claim", Batch(2, 2, b"two"))]))

    async def is_asked_to_try_again() -> bool:
        return "errorstat_TRYAGAIN" in await ask(old, "INFO", "errorstats")

    await until(is_asked_to_try_again)
    await cluster.finish_move(key_slot(session.encode()), old, new)
    [appended] = await append
    assert appended is not None
    assert appended.last == 2
    [*batches] = await journal.read(session, 0) or []
    assert [batch.events for batch in batches] == [b"one", b"two"]


async def test_notifications_reach_a_worker_on_any_node(cluster: ValkeyCluster, store: Store) -> None:
    heard: list[str] = []
    worker = WorkerStore(store, worker="owner")

    async def listen() -> None:
        while True:
            try:
                async for notification in worker.listen():
                    heard.append(notification.session_id)  # noqa: PERF401 - it is read meanwhile
            except StoreUnavailable:
                await asyncio.sleep(0.02)

    channel = f"{store.channels}owner"
    listening = asyncio.create_task(listen())

    async def is_subscribed() -> bool:
        _, count = await ask(await cluster.serving(channel), "PUBSUB", "SHARDNUMSUB", channel)
        return bool(count == 1)

    await until(is_subscribed)
    sessions = [await prepared_in(store) for _ in range(6)]
    for session in sessions[:3]:
        await sessions_in(store).claim(session, "claim", "owner")
        await JournalStore(store, worker="other", running_ttl=960).follow(session, 0)
    await eventually(lambda: sorted(heard) == sorted(sessions[:3]))
    await cluster.move(channel)
    await until(is_subscribed)
    for session in sessions[3:]:
        await sessions_in(store).claim(session, "claim", "owner")
        await JournalStore(store, worker="other", running_ttl=960).follow(session, 0)
    await eventually(lambda: sorted(heard) == sorted(sessions))
    listening.cancel()


async def test_a_refused_call_changes_no_other_reply(store: Store) -> None:
    replies = await store.run_each([command_call("SET", "a", "1"), command_call("NOSUCH", "b")])
    assert replies[0] == b"OK"
    assert isinstance(replies[1], StoreRefused)


async def test_a_node_that_is_lost_hurts_only_its_keys(cluster: ValkeyCluster, store: Store) -> None:
    await store.read([("SET", name, "1") for name in NAMES])
    before = await WorkerStore(store, worker="w").marker()
    lost = await cluster.serving(NAMES[0])
    theirs = {name for name in NAMES if await cluster.serving(name) is lost}
    await cluster.in_step()
    lost.freeze()
    replies = await store.run_each([command_call("GET", name) for name in NAMES], timeout=0.3)
    for name, reply in zip(NAMES, replies, strict=True):
        assert (type(reply) is StoreUnavailable) == (name in theirs), reply
    cluster.lose(lost)
    with pytest.raises(StoreUnavailable):
        await store.read([("GET", name) for name in NAMES], timeout=0.3)

    async def is_served() -> bool:
        try:
            return await store.read([("GET", name) for name in NAMES], timeout=0.3) == [b"1"] * len(NAMES)
        except StoreUnavailable:
            return False

    await until(is_served)
    after = await WorkerStore(store, worker="w").marker()
    assert len(before.servers - after.servers) == 1
    await cluster.heal()


def finish(call: Call) -> None:
    call.chunk("end", finish="stop")
    call.usage(prompt_tokens=3, completion_tokens=4, total_tokens=7)
    call.done()


async def test_slots_that_move_under_load_lose_nothing(
    cluster: ValkeyCluster, upstream: ScriptedUpstream
) -> None:
    await cluster.empty()
    async with (
        running(cluster.url, upstream, daily_tokens=10**6) as owner,
        running(cluster.url, upstream, daily_tokens=10**6) as other,
    ):
        sessions = [await owner.prepare() for _ in range(8)]
        reading: list[asyncio.Task[list[Event]]] = []
        for number, session in enumerate(sessions[:4], 1):
            reading.append(asyncio.create_task(owner.read(session)))
            (await upstream.call(number)).open()
            reading.append(asyncio.create_task(other.read(session)))
        moving = asyncio.create_task(move_all(cluster, owner.app[keys.STORE], sessions))
        sent = 0
        while not moving.done():
            sent += 1
            for call in upstream.calls[:4]:
                call.chunk(str(sent))
            await asyncio.sleep(0.02)
        await moving
        reading += [asyncio.create_task(other.read(session)) for session in sessions[4:]]
        for number in range(5, 9):
            (await upstream.call(number)).open()
        for call in upstream.calls:
            finish(call)
        for number, events in enumerate(await asyncio.gather(*reading)):
            assert events[-1].kind == "done"
            assert len(events) == (sent if number < 8 else 0) + 3
        assert len(upstream.calls) == 8

        async def are_settled() -> bool:
            return bool((await owner.ask("GET", "/usage")).json["requests"] == 8)

        await until(are_settled)
        assert not (await RunningStore(owner.app[keys.STORE]).read()).sessions


async def move_all(cluster: ValkeyCluster, store: Store, sessions: list[str]) -> None:
    """Move what the sessions need: their own slots, those of their client, and those of all workers."""
    for session in sessions:
        await cluster.move(f"{{{session}}}")
    for bucket in range(BUCKETS):
        if await store.command("EXISTS", f"{bucket_prefix(store, bucket)}:open"):
            await cluster.move(f"{{a{bucket}}}")
    for tag in ("total", "workers", "ledger"):
        await cluster.move(f"{{{tag}}}")


async def round_trips(url: str, upstream: ScriptedUpstream, trips: list[set[str]]) -> int:
    """Return the number of round trips of a prepare and a claim, by a worker that has done the same before."""
    async with running(url, upstream, total_daily_cost="1", unpriced_models=True) as broker:
        await broker.ask("GET", "/models")
        await broker.read(await broker.prepare())
        trips.clear()
        await broker.read(await broker.prepare())
    return sum(not trip.isdisjoint({"admit", "hit", "prepare", "reserve", "claim"}) for trip in trips)


async def test_a_session_takes_no_more_round_trips_than_on_one_server(
    cluster: ValkeyCluster,
    server_sockets: Callable[[str], str],
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trips: list[set[str]] = []
    hop, run = Cluster._hop, Node.run

    async def counted_hop(self: Cluster, calls: Any, steps: Any, *others: Any) -> Any:
        trips.append({calls[step.at].name for step in steps})
        return await hop(self, calls, steps, *others)

    async def counted_run(self: Node, calls: Any, give_up_at: float) -> Any:
        trips.append({call.name for call in calls})
        return await run(self, calls, give_up_at)

    monkeypatch.setattr(Cluster, "_hop", counted_hop)
    monkeypatch.setattr(Node, "run", counted_run)
    upstream.models = price_list()
    upstream.replies = [plain]
    there = await round_trips(cluster.url, upstream, trips)
    assert there == await round_trips(f"unix://{server_sockets('valkey')}", upstream, trips) > 0
