"""Micro-benchmarks of the Lua scripts on an embedded Valkey, one session after the other.

The times of the table are whole steps: our side, the round trip, and the script. `test_a_round_trip` is one without a
script. What the script alone takes in the server is listed below the table, and is in the JSON as ``redis_us``.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import uvloop

from broker.core.accounts import Quotas, Usage, WorstCase
from broker.core.replay import Batch
from broker.core.session import Cursor, State, Terminal
from broker.store.accounts import AccountStore, Reservation
from broker.store.connection import Store
from broker.store.embedded import embedded_valkey
from broker.store.journal import Append, JournalStore
from broker.store.pending import PendingStore
from broker.store.sessions import Prepared, SessionStore
from tests.benchmarks.conftest import ScriptTimes
from tests.benchmarks.micro import CHUNK, Benchmark, body_of
from tests.chunks import events_of

ROUNDS = 300
CLIENT = "client"
WORKER = "worker"
WORST = WorstCase(5000, 3_000_000)
RUNNING_TTL = 960
PREPARED = Prepared(
    model="bench/model", prompt_tokens=14, referer="", client=CLIENT, worst=WORST, request=body_of(1)
)
DONE = Terminal(State.DONE, "done", Cursor(1, 11, end=True), b'{"finishReason":"stop"}')
QUOTAS = Quotas(
    pending=10**6,
    streams=10**6,
    daily_tokens=10**12,
    daily_cost=10**15,
    total_daily_cost=0,
    pending_bytes=2**40,
    total_pending_bytes=2**40,
)


class Steps:
    """The steps of sessions, each on a session of its own."""

    def __init__(self, url: str, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._count = itertools.count()
        self.store = Store(url, "bench")
        self.sessions = SessionStore(self.store, session_ttl=600, running_ttl=RUNNING_TTL, resume_ttl=300)
        self.accounts = AccountStore(self.store, QUOTAS)
        self.pending = PendingStore(self.store, QUOTAS, session_ttl=600)
        self.journal = JournalStore(self.store, worker=WORKER, running_ttl=RUNNING_TTL)
        self.run(self.store.load_scripts())

    def run(self, step: Awaitable[Any]) -> Any:
        """Run a step to its end."""

        async def awaited() -> Any:
            return await step

        return self._runner.run(awaited())

    async def fresh(self) -> str:
        """An id that no session has."""
        return f"session-{next(self._count)}"

    async def prepared(self) -> str:
        """A session that can be claimed."""
        session = await self.fresh()
        await self.sessions.prepare(session, PREPARED)
        return session

    async def running(self) -> str:
        """A session that runs. Its claim has the same id."""
        session = await self.prepared()
        await self.sessions.claim(session, session, WORKER)
        return session

    async def reserved(self) -> Reservation:
        """A reservation."""
        return await self.accounts.reserve(reservation(await self.fresh()))


def reservation(session: str) -> Reservation:
    """What a claim asks for."""
    return Reservation(session, session, CLIENT, "bench/model", WORST)


@pytest.fixture
def steps() -> Iterator[Steps]:
    """The steps, on a Valkey of their own."""
    with embedded_valkey() as url, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        steps = Steps(url, runner)
        yield steps
        steps.run(steps.store.close())


@pytest.fixture
def measure(
    benchmark: Benchmark, steps: Steps, script_times: ScriptTimes, request: pytest.FixtureRequest
) -> Callable[[Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[Any]]], Any]:
    """A function that measures a step, given what makes ready for it."""
    total = {"calls": 0, "usec": 0}

    def collect() -> None:
        said = steps.run(steps.store.redis.info("commandstats")).get("cmdstat_evalsha", {})
        for name in total:
            total[name] += said.get(name, 0)

    def measured(ready: Callable[[], Awaitable[Any]], step: Callable[[Any], Awaitable[Any]]) -> Any:
        began = False

        def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
            nonlocal began
            if began:
                collect()
            began = True
            made = steps.run(ready())
            steps.run(steps.store.redis.config_resetstat())
            return (made,), {}

        result = benchmark.pedantic(lambda made: steps.run(step(made)), setup=setup, rounds=ROUNDS)
        collect()
        if total["calls"]:
            benchmark.extra_info["redis_us"] = total["usec"] / total["calls"]
            script_times[request.node.name] = total["usec"] / total["calls"]
        return result

    return measured


def test_a_round_trip(steps: Steps, measure: Any) -> None:
    assert measure(steps.fresh, lambda _: steps.store.commands([("PING",)])) == [b"PONG"]


def test_admit(steps: Steps, measure: Any) -> None:
    measure(steps.fresh, lambda session: steps.pending.admit(CLIENT, session, WORST, stored=900))


def test_prepare(steps: Steps, measure: Any) -> None:
    measure(steps.fresh, lambda session: steps.sessions.prepare(session, PREPARED))


def test_reserve(steps: Steps, measure: Any) -> None:
    measure(steps.fresh, lambda session: steps.accounts.reserve(reservation(session)))


def test_claim(steps: Steps, measure: Any) -> None:
    claimed = measure(steps.prepared, lambda session: steps.sessions.claim(session, session, WORKER))
    assert isinstance(claimed, Prepared)


@pytest.mark.parametrize("events", [1, 10])
def test_append(steps: Steps, measure: Any, events: int) -> None:
    batch = Batch(1, events, events_of([CHUNK] * events, 1))
    (appended,) = measure(
        steps.running, lambda session: steps.journal.append([Append(session, session, batch)])
    )
    assert appended.last == events


def test_append_to_50_sessions(steps: Steps, measure: Any) -> None:
    batch = Batch(1, 10, events_of([CHUNK] * 10, 1))

    async def ready() -> list[Append]:
        return [Append(session, session, batch) for session in [await steps.running() for _ in range(50)]]

    assert len(measure(ready, steps.journal.append)) == 50


def test_end(steps: Steps, measure: Any) -> None:
    rest = Batch(1, 10, events_of([CHUNK] * 10, 1))
    status = measure(steps.running, lambda session: steps.sessions.end(session, session, DONE, rest))
    assert status.state is State.DONE


def test_settle(steps: Steps, measure: Any) -> None:
    spent = Usage(14, 160, cost=1000)
    measure(steps.reserved, lambda reserved: steps.accounts.settle(reserved, spent, State.DONE))


def test_renew_50_reservations(steps: Steps, measure: Any) -> None:
    async def ready() -> list[Reservation]:
        return [await steps.reserved() for _ in range(50)]

    assert measure(ready, steps.accounts.renew) == []


def test_search_all_buckets(steps: Steps, measure: Any) -> None:
    assert measure(steps.fresh, lambda _: steps.accounts.overdue(1)) == []
