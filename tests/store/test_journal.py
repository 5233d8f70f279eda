"""The journal in a real Valkey: writes, refusals, watchers, and the time to live of every key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
import pytest_asyncio

from broker.core.accounts import WorstCase
from broker.core.errors import StoreRefused, StoreUnavailable
from broker.core.replay import Batch, read_on
from broker.core.session import Cursor, State, Terminal
from broker.store.connection import Store
from broker.store.journal import Append, Appended, JournalStore
from broker.store.sessions import EndConflict, Prepared, SessionStatus, SessionStore
from tests.chunks import events_of

RUNNING_TTL = 500
RESUME_TTL = 300
NOTHING = Batch(1, 0, b"")
PREPARED = Prepared(
    request=b'{"messages":[]}',
    model="scripted/model-1",
    prompt_tokens=10,
    referer="",
    client="key:tests",
    worst=WorstCase(110, 0),
)


def batch(first: int, last: int) -> Batch:
    return Batch(first, last, events_of([b"%d" % n for n in range(first, last + 1)], first))


def end(n: int, state: State = State.DONE, epoch: int = 1) -> Terminal:
    return Terminal(
        state, "error" if state is State.FAILED else "done", Cursor(epoch, n, end=True), b'{"a":1}'
    )


class Running:
    """A running session and two workers: the one that owns it and one that follows."""

    def __init__(self, store: Store) -> None:
        self.id = str(uuid4())
        self.claim_id = "token"
        self.store = store
        self.sessions = SessionStore(store, session_ttl=600, running_ttl=RUNNING_TTL, resume_ttl=RESUME_TTL)
        self.journal = JournalStore(store, worker="owner", running_ttl=RUNNING_TTL)
        self.elsewhere = JournalStore(store, worker="follower", running_ttl=RUNNING_TTL)

    async def claim(self) -> None:
        await self.sessions.prepare(self.id, PREPARED)
        assert isinstance(await self.sessions.claim(self.id, self.claim_id, "owner"), Prepared)

    async def append(self, events: Batch = NOTHING, claim_id: str | None = None) -> Appended:
        [answer] = await self.journal.append([Append(self.id, claim_id or self.claim_id, events)])
        assert answer is not None
        return answer

    async def finish(
        self, ending: Terminal, rest: Batch = NOTHING, **options: bool
    ) -> SessionStatus | EndConflict:
        return await self.sessions.end(self.id, self.claim_id, ending, rest, **options)

    async def mark_lost(self, claim_id: str | None = None) -> SessionStatus:
        return await self.sessions.mark_lost(
            self.id, claim_id or self.claim_id, error=b'{"lost":1}', cancelled=b'{"cancelled":1}'
        )

    async def read(self, after: int = 0) -> tuple[bytes, int]:
        return read_on(await self.elsewhere.read(self.id, after) or [], after)

    async def ttls(self) -> dict[str, int]:
        keys = [key.decode() async for key in self.store.redis.scan_iter(f"*{self.id}*")]
        return {key.split(":")[2]: await self.store.redis.ttl(key) for key in keys}


@pytest_asyncio.fixture
async def running(store: Store) -> Running:
    session = Running(store)
    await session.claim()
    return session


@pytest_asyncio.fixture
async def notifications(store: Store) -> AsyncIterator[asyncio.Queue[bytes]]:
    """Yield the notifications of the following worker."""
    async with store.subscribed(f"{store.channels}follower") as pubsub:
        notified: asyncio.Queue[bytes] = asyncio.Queue()

        async def listen() -> None:
            async for message in pubsub.listen():
                if message["type"] in ("message", "smessage"):
                    notified.put_nowait(message["data"])

        task = asyncio.create_task(listen())
        yield notified
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# Writing


async def test_events_are_read_as_they_were_written(running: Running) -> None:
    assert await running.append(batch(1, 3)) == Appended(State.RUNNING, 3)
    assert await running.append(batch(4, 4)) == Appended(State.RUNNING, 4)
    assert await running.read() == (batch(1, 4).events, 4)
    assert await running.read(after=2) == (batch(3, 4).events, 4)
    assert await running.read(after=4) == (b"", 4)


async def test_events_written_twice_are_read_once(running: Running) -> None:
    await running.append(batch(1, 3))
    assert (await running.append(batch(1, 3))).last == 3
    assert (await running.append(batch(1, 5))).last == 5
    assert (await running.append(batch(2, 4))).last == 5
    assert await running.read() == (batch(1, 5).events, 5)


async def test_events_that_would_leave_a_hole_are_not_written(running: Running) -> None:
    await running.append(batch(1, 3))
    assert (await running.append(batch(5, 6))).last == 3
    assert await running.read() == (batch(1, 3).events, 3)


async def test_asking_writes_nothing(running: Running) -> None:
    assert await running.append() == Appended(State.RUNNING, 0)
    assert await running.read() == (b"", 0)


async def test_the_prompt_leaves_redis_with_the_first_word_of_the_owner(running: Running) -> None:
    key = running.store.session_keys(running.id)["session"]
    assert await running.store.redis.hexists(key, "request")
    await running.append()
    assert not await running.store.redis.hexists(key, "request")


async def test_another_claim_id_writes_nothing(running: Running) -> None:
    answer = await running.append(batch(1, 3), claim_id="another")
    assert answer.state is not State.RUNNING, "the session is not its own"
    assert await running.read() == (b"", 0)


async def test_many_sessions_are_written_in_one_round_trip(store: Store) -> None:
    sessions = [Running(store) for _ in range(70)]
    for session in sessions:
        await session.claim()
    appends = [
        Append(session.id, session.claim_id, batch(1, 1 + n % 3)) for n, session in enumerate(sessions)
    ]
    answers = await sessions[0].journal.append(appends)
    assert [answer and answer.last for answer in answers] == [1 + n % 3 for n in range(70)]


async def test_scripts_that_redis_has_lost_are_loaded_again(running: Running) -> None:
    await running.append(batch(1, 1))
    await running.store.redis.script_flush()
    assert (await running.append(batch(2, 2))).last == 2
    await running.store.redis.script_flush()
    assert (await running.elsewhere.follow(running.id, 0)).last == 2


# Reading


async def test_a_reader_learns_how_far_it_goes_and_where_it_stands(running: Running) -> None:
    await running.append(batch(1, 3))
    followed = await running.elsewhere.follow(running.id, 1)
    assert followed.status == SessionStatus(State.RUNNING, "owner")
    assert followed.last == 3
    assert read_on(followed.batches, 1) == (batch(2, 3).events, 3)


async def test_a_long_journal_comes_in_parts_that_fit_together(running: Running) -> None:
    for n in range(1, 201):
        await running.append(batch(n, n))
    got, at, parts = b"", 0, 0
    while at < 200:
        piece, at = await running.read(at)
        got += piece
        parts += 1
        assert parts < 100, "it goes on"
    assert got == batch(1, 200).events


async def test_a_part_of_a_heavy_journal_is_small(running: Running) -> None:
    """A reader that is behind must not pull a whole answer into memory at once."""
    heavy = [Batch(n, n, events_of([b"x" * 250_000], n)) for n in range(1, 21)]
    for one in heavy:
        await running.append(one)
    batches = await running.elsewhere.read(running.id, 0) or []
    assert batches[0] == heavy[0]
    assert sum(len(one.events) for one in batches) <= 600_000


async def test_one_event_larger_than_any_part_is_read_whole(running: Running) -> None:
    huge = Batch(1, 1, events_of([b"x" * 3_000_000], 1))
    await running.append(huge)
    assert await running.elsewhere.read(running.id, 0) == [huge]


async def test_absent_refused_and_unreachable_are_three_results(store: Store, running: Running) -> None:
    assert await running.elsewhere.read(running.id, 0) == []
    assert await running.elsewhere.read(str(uuid4()), 0) is None
    await store.redis.set(store.session_keys("odd")["session"], "no hash")
    with pytest.raises(StoreRefused):
        await running.elsewhere.read("odd", 0)
    away = Store("unix:///nobody/listens/here", "test")
    with pytest.raises(StoreUnavailable) as raised:
        await JournalStore(away, worker="w", running_ttl=960).read(running.id, 0)
    assert not isinstance(raised.value, StoreRefused)
    await away.close()


async def test_a_refused_session_does_not_stop_the_journals_of_others(store: Store, running: Running) -> None:
    await store.redis.set(store.session_keys("odd")["session"], "no hash")
    asked = [Append(session, "token", batch(1, 2)) for session in ("odd", running.id, "odd")]
    refused, answer, again = await running.journal.append(asked)
    assert (refused, again) == (None, None)
    assert answer is not None
    assert answer.last == 2
    refused_look, followed = await running.elsewhere.follow_many([("odd", 0), (running.id, 0)])
    assert refused_look is None
    assert followed is not None
    assert followed.last == 2
    with pytest.raises(StoreRefused):
        await running.journal.append(asked[:1])


async def test_many_are_followed_in_one_round_trip(store: Store) -> None:
    sessions = [Running(store) for _ in range(5)]
    for n, session in enumerate(sessions, 1):
        await session.claim()
        await session.append(batch(1, n))
    looks = await sessions[0].elsewhere.follow_many([(session.id, 1) for session in sessions])
    followed = [answer for answer in looks if answer is not None]
    assert [answer.last for answer in followed] == [1, 2, 3, 4, 5]
    assert [read_on(answer.batches, 1)[1] for answer in followed] == [1, 2, 3, 4, 5]


# Watching


async def test_the_owner_learns_who_watches_and_that_they_have_left(running: Running) -> None:
    assert (await running.append()).watched == 0
    await running.elsewhere.follow(running.id, 0)
    assert (await running.append()).watched == 1
    await running.elsewhere.leave([running.id])
    assert (await running.append()).watched == 0


async def test_reading_the_status_registers_no_worker(running: Running) -> None:
    assert (await running.elsewhere.status(running.id)).state is State.RUNNING
    await running.elsewhere.read(running.id, 0)
    assert (await running.append()).watched == 0


async def test_a_watcher_that_says_no_more_is_forgotten(running: Running) -> None:
    await running.elsewhere.follow(running.id, 0)
    assert (await running.append()).watched == 1
    await running.store.redis.zadd(running.store.session_keys(running.id)["viewers"], {"follower": 1})
    assert (await running.append()).watched == 0


async def test_watchers_are_sent_the_events(running: Running, notifications: asyncio.Queue[bytes]) -> None:
    await running.elsewhere.follow(running.id, 0)
    await running.append(batch(1, 2))
    async with asyncio.timeout(5):
        head, _, events = (await notifications.get()).partition(b"\n")
    assert head == f"events {running.id} 1 2".encode()
    assert events == batch(1, 2).events


async def test_watchers_are_told_of_the_end(running: Running, notifications: asyncio.Queue[bytes]) -> None:
    await running.elsewhere.follow(running.id, 0)
    await running.finish(end(1))
    async with asyncio.timeout(5):
        assert await notifications.get() == f"ended {running.id}".encode()


# Ending


async def test_the_end_brings_what_was_not_yet_journaled(running: Running) -> None:
    await running.append(batch(1, 2))
    standing = await running.finish(end(6), batch(2, 5))
    assert standing == SessionStatus(State.DONE, "owner", end(6))
    assert await running.read() == (batch(1, 5).events, 5)
    assert (await running.elsewhere.status(running.id)).end == end(6)


async def test_the_first_end_stands(running: Running) -> None:
    await running.finish(end(1))
    assert await running.finish(end(4, State.FAILED), batch(1, 3)) == SessionStatus(
        State.DONE, "owner", end(1)
    )
    assert await running.read() == (b"", 0)


async def test_after_the_end_nothing_is_written(running: Running) -> None:
    await running.finish(end(3), batch(1, 2))
    assert await running.append(batch(3, 4)) == Appended(State.DONE, 2)
    assert await running.read() == (batch(1, 2).events, 2)


async def test_an_end_behind_a_hole_is_refused_with_its_position(running: Running) -> None:
    await running.append(batch(1, 2))
    assert await running.finish(end(9), batch(5, 8)) == EndConflict("behind", 2)
    assert (await running.append()).state is State.RUNNING


async def test_grace_does_not_end_while_somebody_watches(running: Running) -> None:
    await running.elsewhere.follow(running.id, 0)
    abandoned = end(1, State.ABANDONED)
    assert await running.finish(abandoned, only_if_unwatched=True) == EndConflict("watched", 0)
    await running.elsewhere.leave([running.id])
    assert await running.finish(abandoned, only_if_unwatched=True) == SessionStatus(
        State.ABANDONED, "owner", abandoned
    )


async def test_after_an_accepted_cancel_no_other_end_is_written(running: Running) -> None:
    assert (await running.sessions.cancel(running.id, end(1, State.CANCELLED))).state is State.RUNNING
    assert (await running.append()).cancel
    assert await running.finish(end(1)) == EndConflict("cancel", 0)
    assert await running.finish(end(1, State.FAILED)) == EndConflict("cancel", 0)
    cancelled = end(1, State.CANCELLED)
    assert await running.finish(cancelled) == SessionStatus(State.CANCELLED, "owner", cancelled)


async def test_a_cancel_after_the_end_changes_nothing(running: Running) -> None:
    await running.finish(end(1))
    assert await running.sessions.cancel(running.id, end(1, State.CANCELLED)) == SessionStatus(
        State.DONE, "owner", end(1)
    )


async def test_the_end_of_a_missing_session_is_gone(running: Running) -> None:
    await running.store.redis.flushall()
    assert await running.finish(end(1)) == SessionStatus(State.GONE)


# Losing


async def test_a_dead_workers_session_ends_behind_its_journal(running: Running) -> None:
    await running.append(batch(1, 4))
    standing = await running.mark_lost()
    assert standing.end == Terminal(State.LOST, "error", Cursor(2, 5, end=True), b'{"lost":1}')
    assert await running.read() == (batch(1, 4).events, 4)
    assert await running.mark_lost() == standing, "a second call gets the same"


async def test_a_worker_that_wakes_writes_nothing_more(running: Running) -> None:
    await running.append(batch(1, 4))
    lost = (await running.mark_lost()).end
    assert await running.append(batch(5, 6)) == Appended(State.LOST, 4)
    assert await running.finish(end(7), batch(5, 6)) == SessionStatus(State.LOST, "owner", lost)
    assert await running.read() == (batch(1, 4).events, 4)


async def test_a_dead_workers_cancelled_session_ends_cancelled(running: Running) -> None:
    await running.append(batch(1, 2))
    await running.sessions.cancel(running.id, end(1, State.CANCELLED))
    assert (await running.mark_lost()).end == Terminal(
        State.CANCELLED, "done", Cursor(2, 3, end=True), b'{"cancelled":1}'
    )


async def test_only_the_dead_workers_own_sessions_are_lost(running: Running) -> None:
    assert (await running.mark_lost("another")).state is State.RUNNING
    await running.finish(end(1))
    assert (await running.mark_lost()).state is State.DONE


async def test_watchers_are_told_of_a_loss(running: Running, notifications: asyncio.Queue[bytes]) -> None:
    await running.elsewhere.follow(running.id, 0)
    await running.mark_lost()
    async with asyncio.timeout(5):
        assert await notifications.get() == f"ended {running.id}".encode()


# Writing again


async def restore(session: Running, held: Batch, ending: Terminal | None = None) -> None:
    again = session.sessions.restoring(
        session.id, session.claim_id, "owner", PREPARED.spec, held=held, end=ending
    )
    await session.sessions.run_each([again])


async def test_a_running_session_is_written_again_and_goes_on(running: Running) -> None:
    await running.append(batch(1, 4))
    await running.store.redis.flushall()
    await restore(running, batch(1, 6))
    assert await running.append(batch(7, 8)) == Appended(State.RUNNING, 8)
    assert await running.read() == (batch(1, 8).events, 8)
    assert (await running.elsewhere.status(running.id)).worker == "owner"


async def test_an_ended_session_is_written_again_with_its_end(running: Running) -> None:
    await running.store.redis.flushall()
    await restore(running, batch(3, 6), end(7))
    followed = await running.elsewhere.follow(running.id, 2)
    assert followed.status.end == end(7)
    assert read_on(followed.batches, 2) == (batch(3, 6).events, 6)


async def test_a_session_without_events_is_written_again(running: Running) -> None:
    await running.store.redis.flushall()
    await restore(running, NOTHING)
    assert await running.append(batch(1, 2)) == Appended(State.RUNNING, 2)


async def test_existing_events_are_not_overwritten(running: Running) -> None:
    await running.append(batch(1, 4))
    lost = (await running.mark_lost()).end
    await restore(running, batch(1, 6))
    assert (await running.elsewhere.status(running.id)).end == lost
    assert await running.read() == (batch(1, 4).events, 4)


# Time


async def test_every_key_of_a_running_session_has_its_time(running: Running) -> None:
    await running.append(batch(1, 2))
    await running.elsewhere.follow(running.id, 0)
    ttls = await running.ttls()
    assert ttls.keys() == {"session", "events", "viewers"}
    assert all(RUNNING_TTL - 5 < ttl <= RUNNING_TTL for ttl in ttls.values()), ttls


async def test_writing_on_does_not_prolong_a_session(running: Running) -> None:
    await running.append(batch(1, 2))
    for kind in ("session", "events"):
        await running.store.redis.expire(running.store.session_keys(running.id)[kind], 100)
    await running.append(batch(3, 4))
    assert all(ttl <= 100 for ttl in (await running.ttls()).values())


@pytest.mark.parametrize("how", ["ended with events", "ended without", "lost", "cancelled before"])
async def test_every_key_of_an_ended_session_has_the_time_of_replay(store: Store, how: str) -> None:
    session = Running(store)
    if how == "cancelled before":
        await session.sessions.prepare(session.id, PREPARED)
        await session.sessions.cancel(session.id, end(1, State.CANCELLED))
    else:
        await session.claim()
        await session.elsewhere.follow(session.id, 0)
        if how == "lost":
            await session.mark_lost()
        else:
            await session.finish(end(3), batch(1, 2) if how == "ended with events" else NOTHING)
    ttls = await session.ttls()
    assert "viewers" not in ttls
    assert all(RESUME_TTL - 5 < ttl <= RESUME_TTL for ttl in ttls.values()), ttls


@pytest.mark.parametrize("ending", [None, end(3)])
async def test_every_key_written_again_has_its_time(running: Running, ending: Terminal | None) -> None:
    await running.store.redis.flushall()
    await restore(running, batch(1, 2), ending)
    expected = RUNNING_TTL if ending is None else RESUME_TTL
    ttls = await running.ttls()
    assert ttls.keys() == {"session", "events"}
    assert all(expected - 5 < ttl <= expected for ttl in ttls.values()), ttls


async def test_the_end_of_a_session_restored_without_events_is_sent(running: Running) -> None:
    """The owner had removed them from memory when Redis came back empty."""
    await running.append(batch(1, 2))
    await running.store.redis.flushall()
    await restore(running, Batch(3, 2, b""))
    await running.finish(end(3))
    followed = await running.elsewhere.follow(running.id, 2)
    assert followed.status.end == end(3)
    assert followed.last == 2


async def test_an_end_whose_journal_is_over_is_gone(running: Running) -> None:
    await running.append(batch(1, 2))
    await running.finish(end(3))
    await running.store.redis.unlink(running.store.session_keys(running.id)["events"])
    assert (await running.elsewhere.follow(running.id, 0)).status.state is State.GONE
