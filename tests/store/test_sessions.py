"""The steps of a session in a real Valkey: one claim wins, prompts are deleted after their use, keys expire."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast
from uuid import uuid4

import pytest
import pytest_asyncio

from broker.core.accounts import WorstCase
from broker.core.errors import StoreUnavailable
from broker.core.events import cancelled_before_start
from broker.core.replay import Batch
from broker.core.session import Cursor, State, Terminal
from broker.store.call import command_call
from broker.store.connection import CALL_TIMEOUT, SCHEMA, Store
from broker.store.node import MAX_CONNECTIONS
from broker.store.sessions import MIN_KEPT, REMEMBERED, EndConflict, Prepared, SessionStatus, SessionStore
from tests.kinds import running_servers
from tests.redis_client import SeenStore
from tests.stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

NOTHING = Batch(1, 0, b"")
PREPARED = Prepared(
    request='{"messages": "€ \\u0000"}'.encode(),
    model="a/b",
    prompt_tokens=812,
    referer="https://a.example",
    client="key:tests",
    worst=WorstCase(4908, 7),
)
CANCELLED = cancelled_before_start()
DONE = Terminal(State.DONE, "done", Cursor(1, 1, end=True), '{"a": "€"}'.encode())
FAILED = Terminal(State.FAILED, "error", Cursor(1, 1, end=True), b"{}")


def sessions_in(store: Store, *, resume_ttl: int = 300) -> SessionStore:
    return SessionStore(store, session_ttl=600, running_ttl=960, resume_ttl=resume_ttl)


@pytest_asyncio.fixture
async def sessions(store: Store) -> SessionStore:
    return sessions_in(store)


@pytest_asyncio.fixture
async def prepared(sessions: SessionStore) -> str:
    """Prepare a session, and return its id."""
    session = str(uuid4())
    await sessions.prepare(session, PREPARED)
    return session


async def held(store: Store) -> dict[bytes, bytes]:
    """Return all fields of the one session in Redis."""
    [key] = await store.redis.keys("*session*")
    return cast("dict[bytes, bytes]", await store.redis.hgetall(key))


async def times(store: Store) -> list[int]:
    """Return the time to live of every key in seconds."""
    return [await store.redis.ttl(key) for key in await store.redis.keys("*")]


# Prepared


async def test_a_session_waits_for_its_time(store: Store, sessions: SessionStore, prepared: str) -> None:
    assert await times(store) == [600]
    assert 598 <= (await sessions.remaining(prepared) or 0) <= 600


async def test_a_key_carries_prefix_version_and_a_tag(store: Store, prepared: str) -> None:
    assert await store.redis.keys("*") == [f"test:{SCHEMA}:session:{{{prepared}}}".encode()]


async def test_the_cost_of_a_claim_is_known_on_every_worker(
    store: Store, sessions: SessionStore, prepared: str
) -> None:
    described = await sessions.describe(prepared)
    assert described is not None
    assert (described.state, described.spec) == (State.PREPARED, PREPARED.spec)
    assert await sessions_in(store).describe_for_claim(prepared) == described
    await store.redis.flushall()
    assert await sessions.describe_for_claim(prepared) == described, "remembered"
    assert await sessions.describe_for_claim(prepared) is None, "once"


async def test_only_so_many_are_remembered(store: Store, sessions: SessionStore) -> None:
    first, *others = [str(uuid4()) for _ in range(REMEMBERED + 1)]
    for session in (first, *others):
        await sessions.prepare(session, PREPARED)
    await store.redis.flushall()
    assert await sessions.describe_for_claim(first) is None
    assert await sessions.describe_for_claim(others[0]) is not None


async def test_an_unknown_session_has_no_time(sessions: SessionStore) -> None:
    assert await sessions.remaining(str(uuid4())) is None


async def test_a_session_that_is_stored_again_stays_as_it_was(store: Store, sessions: SessionStore) -> None:
    session, spec = str(uuid4()), PREPARED.spec
    first, again = [
        await store.run([sessions.preparing(session, request, spec)]) for request in (b'{"a": 1}', b"{}")
    ]
    assert [int(ends) for ends in first] == [int(ends) for ends in again] != [0]
    assert (await held(store))[b"request"] == b'{"a": 1}'


async def test_a_session_that_comes_too_late_is_not_stored(store: Store, sessions: SessionStore) -> None:
    now_ms, spec = await store.now_ms(), PREPARED.spec
    for before_ms, is_stored in ((now_ms - 1, False), (now_ms + 60_000, True)):
        session = str(uuid4())
        (reply,) = await store.run([sessions.preparing(session, b"{}", spec, before_ms=before_ms)])
        assert (int(reply) > 0) is is_stored
        assert (await sessions.describe(session) is not None) is is_stored


async def test_a_session_can_be_forgotten(store: Store, sessions: SessionStore, prepared: str) -> None:
    await store.run([sessions.forgetting(prepared)])
    assert await store.redis.keys("*") == []


# Claimed


async def test_a_claim_gets_what_was_prepared(store: Store, sessions: SessionStore, prepared: str) -> None:
    assert await sessions.claim(prepared, "token", "w1") == PREPARED
    assert await times(store) == [960]
    assert await sessions.remaining(prepared) == 0


async def test_a_repeat_with_the_same_claim_id_gets_the_same(sessions: SessionStore, prepared: str) -> None:
    assert [await sessions.claim(prepared, "token", "w1") for _ in range(3)] == [PREPARED] * 3


async def test_another_claim_id_gets_the_owner(sessions: SessionStore, prepared: str) -> None:
    await sessions.claim(prepared, "token", "w1")
    assert await sessions.claim(prepared, "another", "w2") == SessionStatus(State.RUNNING, "w1")
    assert await sessions.claim(prepared, "another", "w1") == SessionStatus(State.RUNNING, "w1")


async def test_one_of_fifty_claims_at_once_wins(sessions: SessionStore, prepared: str) -> None:
    outcomes = await asyncio.gather(*(sessions.claim(prepared, f"t{n}", f"w{n}") for n in range(50)))
    winners = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, Prepared)]
    assert len(winners) == 1
    assert all(
        outcome == SessionStatus(State.RUNNING, f"w{winners[0]}")
        for n, outcome in enumerate(outcomes)
        if n != winners[0]
    )


async def test_an_unknown_session_cannot_be_claimed(store: Store, sessions: SessionStore) -> None:
    assert await sessions.claim(str(uuid4()), "token", "w1") == SessionStatus(State.GONE)
    assert await store.redis.keys("*") == []


# Cancelled


async def test_a_cancelled_session_can_no_longer_be_claimed(
    store: Store, sessions: SessionStore, prepared: str
) -> None:
    assert (await sessions.cancel(prepared, CANCELLED)).state is State.PREPARED
    assert await sessions.claim(prepared, "token", "w1") == SessionStatus(State.CANCELLED, "", CANCELLED)
    assert b"request" not in await held(store)
    assert await times(store) == [300]
    assert await sessions.remaining(prepared) is None


async def test_cancelling_again_tells_the_end(sessions: SessionStore, prepared: str) -> None:
    await sessions.cancel(prepared, CANCELLED)
    assert await sessions.cancel(prepared, CANCELLED) == SessionStatus(State.CANCELLED, "", CANCELLED)


async def test_an_unknown_session_cannot_be_cancelled(store: Store, sessions: SessionStore) -> None:
    assert await sessions.cancel(str(uuid4()), CANCELLED) == SessionStatus(State.GONE)
    assert await store.redis.keys("*") == []


async def test_once_cancelled_a_running_session_ends_in_nothing_else(
    sessions: SessionStore, prepared: str
) -> None:
    await sessions.claim(prepared, "token", "w1")
    assert await sessions.cancel(prepared, CANCELLED) == SessionStatus(State.RUNNING, "w1")
    assert await sessions.end(prepared, "token", DONE, NOTHING) == EndConflict("cancel", 0)
    assert await sessions.end(prepared, "token", FAILED, NOTHING) == EndConflict("cancel", 0)
    assert await sessions.end(prepared, "token", CANCELLED, NOTHING) == SessionStatus(
        State.CANCELLED, "w1", CANCELLED
    )


async def test_a_claim_and_a_cancel_at_once_agree(sessions: SessionStore) -> None:
    seen = set()
    for number in range(40):
        session = str(uuid4())
        await sessions.prepare(session, PREPARED)
        steps = [sessions.claim(session, "token", "w1"), sessions.cancel(session, CANCELLED)]
        first, second = steps if number % 2 else reversed(steps)
        outcomes = await asyncio.gather(first, second)
        claim, cancel = outcomes if number % 2 else reversed(outcomes)
        assert isinstance(cancel, SessionStatus)
        assert isinstance(claim, Prepared) is (cancel.state is State.RUNNING)
        seen.add(cancel.state)
    assert seen == {State.RUNNING, State.PREPARED}


# Ended


async def test_an_end_is_kept_and_the_prompt_is_not(
    store: Store, sessions: SessionStore, prepared: str
) -> None:
    await sessions.claim(prepared, "token", "w1")
    assert await sessions.end(prepared, "token", DONE, NOTHING) == SessionStatus(State.DONE, "w1", DONE)
    assert b"request" not in await held(store)
    assert await times(store) == [300]
    assert await sessions.claim(prepared, "token", "w1") == SessionStatus(State.DONE, "w1", DONE)


async def test_the_first_end_stands(sessions: SessionStore, prepared: str) -> None:
    await sessions.claim(prepared, "token", "w1")
    await sessions.end(prepared, "token", DONE, NOTHING)
    assert await sessions.end(prepared, "token", FAILED, NOTHING) == SessionStatus(State.DONE, "w1", DONE)
    assert await sessions.cancel(prepared, CANCELLED) == SessionStatus(State.DONE, "w1", DONE)


async def test_another_claim_id_ends_nothing(sessions: SessionStore, prepared: str) -> None:
    await sessions.claim(prepared, "token", "w1")
    assert await sessions.end(prepared, "another", DONE, NOTHING) == SessionStatus(State.RUNNING, "w1")
    assert await sessions.end(prepared, "token", FAILED, NOTHING) == SessionStatus(State.FAILED, "w1", FAILED)


@pytest.mark.parametrize("known", [True, False])
async def test_only_a_running_session_can_end(
    store: Store, sessions: SessionStore, prepared: str, known: bool
) -> None:
    standing = await sessions.end(prepared if known else str(uuid4()), "token", DONE, NOTHING)
    assert standing == SessionStatus(State.PREPARED if known else State.GONE)
    assert len(await store.redis.keys("*")) == 1


async def test_without_resuming_an_end_is_kept_for_a_minute(store: Store) -> None:
    sessions, session = sessions_in(store, resume_ttl=0), str(uuid4())
    await sessions.prepare(session, PREPARED)
    await sessions.claim(session, "token", "w1")
    await sessions.end(session, "token", DONE, NOTHING)
    assert await times(store) == [MIN_KEPT]


async def test_an_end_is_kept_for_as_long_as_it_can_be_resumed(store: Store) -> None:
    sessions, session = sessions_in(store, resume_ttl=2), str(uuid4())
    await sessions.prepare(session, PREPARED)
    await sessions.claim(session, "token", "w1")
    await sessions.end(session, "token", DONE, Batch(1, 1, b"event"))
    keys = store.session_keys(session)
    assert await store.redis.ttl(keys["events"]) == 2
    assert await store.redis.ttl(keys["session"]) == MIN_KEPT


# Redis itself


async def test_redis_settings_that_could_lose_sessions_are_found(redis_server: str) -> None:
    for keeps in (False, True):  # with an append-only file or without
        async with running_servers(keeps=keeps) as valkey:
            store = SeenStore(valkey.url, "test")
            assert (await store.may_evict(), await store.may_go_back()) == (False, False)
            await store.redis.config_set("maxmemory-policy", "allkeys-lru")
            await store.redis.config_set("save", "900 1")
            assert (await store.may_evict(), await store.may_go_back()) == (True, not keeps)
            await store.close()


STEPS: list[Callable[[SessionStore], Awaitable[object]]] = [
    lambda sessions: sessions.prepare(str(uuid4()), PREPARED),
    lambda sessions: sessions.claim(str(uuid4()), "token", "w1"),
    lambda sessions: sessions.cancel(str(uuid4()), CANCELLED),
    lambda sessions: sessions.end(str(uuid4()), "token", DONE, NOTHING),
    lambda sessions: sessions.remaining(str(uuid4())),
]


async def all_fail(sessions: SessionStore) -> None:
    """Check that every step fails in time."""
    stopwatch = Stopwatch()
    outcomes = await asyncio.gather(*(step(sessions) for step in STEPS), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [StoreUnavailable] * len(STEPS)
    assert stopwatch.seconds < CALL_TIMEOUT + 0.5


async def test_a_missing_redis_is_unavailable() -> None:
    store = Store("redis://127.0.0.1:1/0", "test")
    await all_fail(sessions_in(store))
    await store.close()


async def test_a_frozen_redis_fails_in_a_second_and_works_afterwards(redis_server: str) -> None:
    async with running_servers() as valkey:
        store = SeenStore(valkey.url, "test")
        sessions, session = sessions_in(store), str(uuid4())
        await sessions.prepare(session, PREPARED)
        valkey.freeze()
        await all_fail(sessions)
        with pytest.raises(StoreUnavailable):
            await sessions.end(session, "token", DONE, NOTHING, timeout=0.1)
        valkey.thaw()
        # A late reply must not be read as the reply to the next command.
        for number in range(MAX_CONNECTIONS * 2):
            assert 590 <= (await sessions.remaining(session) or 0) <= 600
            assert await sessions.claim(str(uuid4()), f"t{number}", "w1") == SessionStatus(State.GONE)
        assert await sessions.claim(session, "token", "w1") == PREPARED
        await store.close()


async def test_a_redis_that_was_restarted_is_used_again_at_once(redis_server: str) -> None:
    async with running_servers() as valkey:
        store = SeenStore(valkey.url, "test")
        sessions = sessions_in(store)
        await asyncio.gather(*(sessions.prepare(str(uuid4()), PREPARED) for _ in range(10)))
        valkey.kill()
        await all_fail(sessions)
        await valkey.start()
        for _ in range(20):
            await sessions.prepare(str(uuid4()), PREPARED)
        await store.close()


async def test_a_full_redis_is_unavailable(redis_server: str, store: Store) -> None:
    async with running_servers() as valkey:
        store = SeenStore(valkey.url, "test")
        await store.redis.config_set("maxmemory", "1")
        with pytest.raises(StoreUnavailable):
            await sessions_in(store).prepare(str(uuid4()), PREPARED)
        await store.close()


async def test_forgotten_scripts_are_loaded_again(
    store: Store, sessions: SessionStore, prepared: str
) -> None:
    await store.redis.script_flush()
    assert await sessions.claim(prepared, "token", "w1") == PREPARED


@pytest.mark.one_server("the connections that it counts")
async def test_more_calls_than_connections_wait_their_turn(store: Store, sessions: SessionStore) -> None:
    ids = [str(uuid4()) for _ in range(MAX_CONNECTIONS + 16)]
    await asyncio.gather(*(sessions.prepare(session, PREPARED) for session in ids))
    outcomes = await asyncio.gather(*(sessions.claim(session, "token", "w1") for session in ids))
    assert outcomes == [PREPARED] * len(ids)
    assert len(await store.redis.client_list()) <= MAX_CONNECTIONS + 2


async def test_a_call_that_is_given_up_leaves_its_connection_in_order(
    sessions: SessionStore, prepared: str
) -> None:
    for delay in range(30):
        task = asyncio.create_task(sessions.claim(str(uuid4()), "token", "w1"))
        for _ in range(delay):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert 590 <= (await sessions.remaining(prepared) or 0) <= 600


async def test_a_claim_wins_although_what_runs_behind_it_is_refused(store: Store, valkey_url: str) -> None:
    """A hosted Redis may forbid WAIT; and one key of an account may be damaged."""
    await store.redis.acl_setuser("small", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-wait"])
    small = Store(valkey_url.replace("://", "://small:any@"), "test")
    try:
        sessions = SessionStore(small, session_ttl=600, running_ttl=960, resume_ttl=300, confirm_by=1)
        session = str(uuid4())
        await sessions.prepare(session, PREPARED)
        damaged = command_call("LPUSH", small.session_keys(session)["session"], "x")
        assert await sessions.claim(session, "claim", "worker", also=[damaged]) == PREPARED
    finally:
        await small.close()
        await store.redis.acl_deluser("small")
