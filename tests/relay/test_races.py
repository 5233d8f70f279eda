"""Races: packets that are late, a worker that was frozen, one that died; and what stays in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from broker.core.accounts import Quotas, Usage, WorstCase
from broker.core.errors import Overloaded
from broker.core.session import State
from broker.relay.claiming import Claiming
from broker.relay.config import Money
from broker.relay.feed import WINDOW
from broker.relay.reaper import Reaper
from broker.relay.settlement import Settlement
from broker.store.accounts import LEASE, AccountStore, Reservation
from broker.store.connection import Store
from broker.store.journal import JournalStore
from broker.store.pending import PendingStore
from broker.store.sessions import Prepared, SessionStatus, SessionStore
from broker.web import keys
from broker.web.eventstream import EventStream
from tests.broker import Broker, running
from tests.memory import bytes_with
from tests.money import Ledger, due_estimates, ledger, let_time_pass, open_reservations, slots, until
from tests.wire import wire_to

if TYPE_CHECKING:
    from broker.relay.generation import Generation
    from tests.scripted import Call, ScriptedUpstream

FREE = Quotas(pending=1000, streams=10_000, daily_tokens=0, daily_cost=0, total_daily_cost=0)
ENOUGH = 128 * 1024
"""Bytes that say a piece of something is left somewhere, and not all of it."""


def generation_of(broker: Broker, session: str) -> Generation:
    return broker.app[keys.WORKER].running[session]


async def journaled(broker: Broker, session: str, n: int) -> None:
    """Wait until event number ``n`` is in the journal."""
    await until(lambda: asyncio.sleep(0, generation_of(broker, session).saved >= n))


async def is_written(store: Store, session: str) -> bool:
    """Return True if Redis has an end of a session."""
    return bool(await store.redis.hexists(store.session_keys(session)["session"], "end_id"))


# Late packets


@pytest.mark.parametrize("in_time", [True, False], ids=["in time", "too late"])
async def test_events_after_an_abandoning_end_are_not_in_the_session(
    valkey_url: str, upstream: ScriptedUpstream, in_time: bool
) -> None:
    """In time, the owner learns that it was written; too late, it goes on without, and Redis has it later."""
    async with (
        wire_to(valkey_url) as wire,
        running(wire.url, upstream, disconnect_grace=0, journal_interval_ms=20) as owner,
        running(valkey_url, upstream) as other,
    ):
        session = await owner.prepare()
        async with owner.stream(session) as connection:
            call = (await upstream.call()).open()
            call.chunk("a")
            [first] = await connection.take(1)
            wire.block = b"abandoned"
        await wire.until_blocked()
        generation, told = generation_of(owner, session), wire.count(session)
        call.chunk("b")
        await until(lambda: asyncio.sleep(0, generation.feed.last == 2))
        if in_time:  # the journal has had its turn
            await until(lambda: asyncio.sleep(0, wire.count(session) > told or call.gone.is_set()))
        else:
            await generation.ended()
        wire.unblock()
        await until(lambda: is_written(other.app[keys.STORE], session))
        seen = [await worker.read(session) for worker in (owner, other)]
        assert seen[0] == seen[1]
        assert seen[0][0] == first
        assert [(event.kind, event.id) for event in seen[0][1:]] == [("error", "1-2.end")]
        assert seen[0][1].json["code"] == "abandoned"


async def test_a_cancel_accepted_elsewhere_is_the_end_for_all(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    """The owner gets no notification, and writes the end too late for its own viewers to wait for it."""
    async with (
        wire_to(valkey_url) as wire,
        running(wire.url, upstream) as owner,
        running(valkey_url, upstream) as other,
    ):
        session = await owner.prepare()
        async with owner.stream(session) as connection:
            call = (await upstream.call()).open()
            call.chunk("a")
            await connection.take(1)
            await journaled(owner, session, 1)  # so that the owner does not ask again before the end
            wire.drop, wire.block = b"cancel " + session.encode(), b'"finishReason":"cancelled"'
            assert (await other.cancel(session)).status == 202
            call.chunk("b", finish="stop")
            call.usage()
            call.done()
            *_, end = await connection.rest()
        assert wire.blocked.is_set()
        assert (end.kind, end.json["finishReason"]) == ("done", "cancelled")
        wire.unblock()
        assert [(await worker.read(session))[-1] for worker in (owner, other)] == [end, end]


# Somebody else's reservations


def wanted(claim_id: str, session: str = "") -> Reservation:
    return Reservation(claim_id, session or f"session-{claim_id}", "client", "model", WorstCase(10, 100))


async def reserved(accounts: AccountStore, claim_id: str) -> Reservation:
    return await accounts.reserve(wanted(claim_id))


async def come(store: Store, name: str) -> None:
    """Make every member of a set due."""
    await let_time_pass(store.redis, name)


@asynccontextmanager
async def far_accounts(valkey_url: str) -> AsyncIterator[AccountStore]:
    """Yield the accounts of a worker whose packets take 10 ms to Redis and 10 ms back."""
    async with wire_to(valkey_url) as wire:
        wire.delay = 0.01
        store = Store(wire.url, "test")
        yield AccountStore(store, FREE)
        await store.close()


async def test_a_worker_far_from_redis_finds_a_hundred_orphans(store: Store, valkey_url: str) -> None:
    accounts = AccountStore(store, FREE)
    for n in range(100):
        await accounts.reserve(wanted(str(n)))
    await come(store, "open")
    async with far_accounts(valkey_url) as far:
        assert {orphan.claim_id for orphan in await far.overdue(100)} == {str(n) for n in range(100)}


async def test_a_worker_far_from_redis_finds_a_hundred_estimates(store: Store, valkey_url: str) -> None:
    accounts = AccountStore(store, FREE)
    guess = Usage(1, 1, cost=7, estimated=True)
    for n in range(100):
        await accounts.settle(await reserved(accounts, str(n)), guess, State.LOST, generation_id=f"gen-{n}")
    await come(store, "estimates")
    async with far_accounts(valkey_url) as far:
        found = {each.reservation.claim_id: each.generation_id for each in await due_estimates(far)}
        assert found == {str(n): f"gen-{n}" for n in range(100)}


async def unknown(_: object) -> None:
    return None


NO_MONEY = Money(unknown, lambda: True, lambda model: model, unknown, lambda: True, unknown, unknown, unknown)


def reaper_of(
    store: Store,
    accounts: AccountStore,
    clock: Callable[[], float] = time.monotonic,
    money: Money = NO_MONEY,
) -> Reaper:
    def spawn(work: Coroutine[Any, Any, Any]) -> None:
        work.close()
        pytest.fail("there is nothing to ask the upstream")

    return Reaper(
        accounts,
        SessionStore(store, session_ttl=600, running_ttl=960, resume_ttl=300),
        JournalStore(store, worker="living", running_ttl=960),
        Settlement(accounts, money, spawn=spawn, clock=clock),
        clock,
    )


async def test_an_orphan_without_a_session_is_booked_at_its_worst(store: Store) -> None:
    """All workers were away for longer than the journal is stored."""
    accounts = AccountStore(store, FREE)
    await accounts.renew([await reserved(accounts, "ran")])
    await come(store, "open")
    for _ in range(2):
        await reaper_of(store, accounts)._reap()
        assert await ledger(store.redis) == Ledger(1, 1, 10, 100)
    assert await slots(store.redis) == await open_reservations(store.redis) == 0


async def test_an_orphan_that_never_ran_is_given_back(store: Store) -> None:
    accounts = AccountStore(store, FREE)
    await reserved(accounts, "idle")
    sessions = SessionStore(store, session_ttl=600, running_ttl=960, resume_ttl=300)
    await sessions.prepare(
        "session-idle",
        Prepared(
            request=b"{}",
            model="model",
            prompt_tokens=1,
            referer="",
            client="client",
            worst=WorstCase(10, 100),
        ),
    )
    await come(store, "open")
    await reaper_of(store, accounts)._reap()
    assert await ledger(store.redis) == Ledger()
    assert await slots(store.redis) == await open_reservations(store.redis) == 0


# A worker that was frozen


class StandingLoop(asyncio.SelectorEventLoop):
    """An event loop that can be frozen: only its clock goes on meanwhile."""

    stood_still = 0.0

    def time(self) -> float:
        return super().time() + self.stood_still


class InSteps(AccountStore):
    """The accounts of a worker that reserves first and claims when it has the reply, as in a cluster."""

    def reserving(self, reservation: Reservation, **limits: Any) -> None:
        return None


class FrozenAfterReserving(InSteps):
    """The accounts of a worker that is frozen after it has reserved, for longer than the lease.

    Meanwhile its reservation is found and given back, and another takes the only slot.
    """

    thawed: Reservation | None = None

    async def reserve(self, reservation: Reservation, **options: Any) -> Reservation:
        reserved = await super().reserve(reservation, **options)
        if self.thawed is None:
            self.thawed = reservation
            await self.release(reservation)
            await super().reserve(wanted("another"))
            loop = asyncio.get_running_loop()
            assert isinstance(loop, StandingLoop)
            loop.stood_still += LEASE
        return reserved


def test_a_freeze_before_a_claim_does_not_exceed_the_limit(valkey_url: str) -> None:
    async def story() -> None:
        store = Store(valkey_url, "test")
        sessions = SessionStore(store, session_ttl=600, running_ttl=960, resume_ttl=300)
        accounts = FrozenAfterReserving(store, replace(FREE, streams=1))
        begun: list[str] = []
        tasks: set[asyncio.Task[None]] = set()

        def begin(session: str, reservation: Reservation, prepared: Prepared) -> Any:
            begun.append(session)
            return SessionStatus(State.RUNNING)

        claims = Claiming(
            sessions,
            accounts,
            PendingStore(store, FREE, session_ttl=600),
            worker="frozen",
            give_up_after=100,
            begin=begin,
            spawn=lambda work: tasks.add(asyncio.create_task(work)),
        )
        await sessions.prepare(
            "session",
            Prepared(
                request=b"{}",
                model="model",
                prompt_tokens=1,
                referer="",
                client="client",
                worst=WorstCase(10, 100),
            ),
        )
        with pytest.raises(Overloaded):
            await claims.claim("session")
        described = await sessions.describe("session")
        assert described is not None
        assert (described.state, begun) == (State.PREPARED, [])
        assert await slots(store.redis) == await open_reservations(store.redis) == 1
        await accounts.release(wanted("another"))
        await claims.claim("session")  # as a page does that is asked to reconnect
        assert begun == ["session"]
        await asyncio.gather(*tasks)
        await store.close()

    with asyncio.Runner(loop_factory=StandingLoop) as runner:
        runner.run(story())


async def test_a_page_that_leaves_before_its_stream_begins_is_counted_no_longer(
    broker: Broker, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(*_: object) -> None:
        raise ConnectionResetError

    session = await broker.prepare()
    async with broker.stream(session) as connection:
        call = (await upstream.call()).open()
        call.chunk("a")
        await connection.take(1)
        worker, generation = broker.app[keys.WORKER], generation_of(broker, session)
        with monkeypatch.context() as patched:
            patched.setattr(EventStream, "open", gone)
            answer = await broker.ask("GET", f"/stream/{session}", headers={"Last-Event-ID": "1-1"})
        assert answer.status == 499
        assert generation.seen_viewers > 1
        assert (len(worker.viewers), generation._viewers) == (1, 1)
        call.done()


# What stays in memory


async def test_a_session_that_was_refused_keeps_no_prompt(broker: Broker, upstream: ScriptedUpstream) -> None:
    upstream.replies = [lambda call: call.reply(400, {"error": {"code": 400, "message": "No."}})]
    session = await broker.prepare(messages=[{"role": "user", "content": "prompt " * 100_000}])
    assert (await broker.read(session))[-1].kind == "error"
    await broker.ask("GET", "/health/live")  # a connection keeps its last request until the next one comes
    upstream.hang_up()
    upstream.calls.clear()
    await until(lambda: asyncio.sleep(0, bytes_with(b"prompt prompt") < ENOUGH))
    assert (await broker.read(session))[-1].kind == "error", "its end is stored all the same"


async def test_a_stream_keeps_no_prompt_once_it_runs(broker: Broker, upstream: ScriptedUpstream) -> None:
    session = await broker.prepare(messages=[{"role": "user", "content": "prompt " * 100_000}])
    async with broker.stream(session) as connection:
        call = (await upstream.call()).open()
        call.chunk("a")
        await connection.take(1)
        # A connection keeps its last request until the next one comes.
        await broker.ask("GET", "/health/live")
        upstream.calls.clear()
        await until(lambda: asyncio.sleep(0, bytes_with(b"prompt prompt") < ENOUGH))
        call.chunk("b")
        call.done()
        assert [event.kind for event in await connection.take(2)] == ["chunk", "done"]


async def test_a_session_that_broke_off_keeps_no_partial_event(
    broker: Broker, upstream: ScriptedUpstream
) -> None:
    def half(call: Call) -> None:
        call.open()
        call.chunk("a")
        call.send(b'data: {"x": "' + b"half " * 600_000)
        call.close()

    upstream.replies = [half]
    session = await broker.prepare()
    assert [event.kind for event in await broker.read(session)] == ["chunk", "error"]
    await until(lambda: asyncio.sleep(0, bytes_with(b"half half") < ENOUGH))
    assert [event.kind for event in await broker.read(session)] == ["chunk", "error"], (
        "its end is stored all the same"
    )


async def test_a_long_answer_leaves_memory_without_resuming(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, resume_ttl=0) as broker:
        session = await broker.prepare()
        async with broker.stream(session) as connection:
            call = (await upstream.call()).open()
            for _ in range(40):
                call.chunk("x" * 50_000)
                await connection.take(1)
            assert generation_of(broker, session).feed.size <= WINDOW
            call.done()


async def test_hidden_events_stay_in_memory_without_resuming(
    valkey_url: str, upstream: ScriptedUpstream
) -> None:
    async with running(valkey_url, upstream, resume_ttl=0) as broker:
        session = await broker.prepare()
        async with broker.stream(session) as connection:
            call = (await upstream.call()).open()
            call.chunk("first")
            await connection.take(1)
            feed = generation_of(broker, session).feed
            feed.hide()  # as after a freeze
            for _ in range(12):
                call.chunk("x" * 50_000)
            await until(lambda: asyncio.sleep(0, feed.last == 13))
            feed.show()
            events = await connection.take(12)
            assert [event.id for event in events] == [f"1-{n}" for n in range(2, 14)]
            call.done()
            assert (await connection.rest())[-1].kind == "done"
