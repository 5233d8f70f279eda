"""Every script in every state does what the table of a session says, on every server."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import pytest

from broker.core.accounts import WorstCase
from broker.core.lifecycle import SESSION, Step, after
from broker.core.replay import Batch
from broker.core.session import Cursor, State, Terminal
from broker.store.connection import Store
from broker.store.journal import Append, JournalStore
from broker.store.sessions import Prepared, SessionStore

PREPARED = Prepared(
    request=b"{}", model="m", prompt_tokens=1, referer="", client="c", worst=WorstCase(10, 100)
)
NOTHING = Batch(1, 0, b"")
OWNER, ANOTHER = "owner", "another"


def ending(state: State) -> Terminal:
    return Terminal(state, "done" if state is State.DONE else "error", Cursor(1, 1, end=True), b"{}")


class Session:
    """One session in Redis, and every step that can happen to it."""

    def __init__(self, store: Store) -> None:
        self.id = str(uuid4())
        self._store = store
        self._sessions = SessionStore(store, session_ttl=600, running_ttl=960, resume_ttl=300)
        self._journal = JournalStore(store, worker="follower", running_ttl=960)
        self._steps: dict[Step, Callable[[str], Awaitable[Any]]] = {
            Step.PREPARE: lambda _: self._sessions.prepare(self.id, PREPARED),
            Step.CLAIM: lambda claim_id: self._sessions.claim(self.id, claim_id, claim_id),
            Step.CANCEL: lambda _: self._sessions.cancel(self.id, ending(State.CANCELLED)),
            Step.FINISH: lambda claim_id: self._end(claim_id, State.DONE),
            Step.FAIL: lambda claim_id: self._end(claim_id, State.FAILED),
            Step.END_CANCELLED: lambda claim_id: self._end(claim_id, State.CANCELLED),
            Step.ABANDON: lambda claim_id: self._end(claim_id, State.ABANDONED),
            Step.MARK_LOST: lambda claim_id: self._sessions.mark_lost(
                self.id, claim_id, error=b"{}", cancelled=b"{}"
            ),
            Step.RESTORE: lambda claim_id: self._restore(claim_id, None),
            Step.RESTORE_DONE: lambda claim_id: self._restore(claim_id, ending(State.DONE)),
            Step.REFUSE: lambda _: self._sessions.refuse(self.id, str(uuid4())),
            Step.JOURNAL: lambda claim_id: self._journal.append([Append(self.id, claim_id, NOTHING)]),
            Step.FOLLOW: lambda _: self._journal.follow(self.id, 0),
            Step.EXPIRE: lambda _: self._expire(),
        }

    async def take(self, step: Step, claim_id: str = OWNER) -> None:
        """Run one step for this claim."""
        await self._steps[step](claim_id)

    async def state(self) -> State:
        """Return the state of the session in Redis."""
        key = self._store.session_keys(self.id)["session"]
        fields: Any = await self._store.redis.hmget(key, ["state", "cancel"])
        state, cancel = fields
        if state is None:
            return State.GONE
        return State.CANCELLING if state == b"running" and cancel else State(state.decode())

    async def _end(self, claim_id: str, state: State) -> None:
        await self._sessions.end(self.id, claim_id, ending(state), NOTHING)

    async def _restore(self, claim_id: str, end: Terminal | None) -> None:
        call = self._sessions.restoring(self.id, claim_id, claim_id, PREPARED.spec, held=NOTHING, end=end)
        await self._sessions.run_each([call])

    async def _expire(self) -> None:
        await self._store.redis.delete(*self._store.session_keys(self.id).values())


WAYS: dict[State, list[Step]] = {
    State.GONE: [],
    State.PREPARED: [Step.PREPARE],
    State.RUNNING: [Step.PREPARE, Step.CLAIM],
    State.CANCELLING: [Step.PREPARE, Step.CLAIM, Step.CANCEL],
    State.DONE: [Step.PREPARE, Step.CLAIM, Step.FINISH],
    State.FAILED: [Step.PREPARE, Step.CLAIM, Step.FAIL],
    State.CANCELLED: [Step.PREPARE, Step.CANCEL],
    State.ABANDONED: [Step.PREPARE, Step.CLAIM, Step.ABANDON],
    State.LOST: [Step.PREPARE, Step.CLAIM, Step.MARK_LOST],
}
"""A way into each state."""

OF_A_CLAIM = (Step.FINISH, Step.FAIL, Step.END_CANCELLED, Step.ABANDON, Step.MARK_LOST, Step.JOURNAL)


def test_every_state_and_every_step_is_tried() -> None:
    assert set(WAYS) == set(State)
    assert set(SESSION) == set(Step)


@pytest.mark.parametrize("state", WAYS, ids=str)
@pytest.mark.parametrize("step", Step, ids=str)
async def test_a_script_does_what_the_table_says(store: Store, step: Step, state: State) -> None:
    session = Session(store)
    for each in WAYS[state]:
        await session.take(each)
    assert await session.state() is state
    for _ in range(2):  # again it changes nothing more, as where a reply was lost
        await session.take(step)
        expected = after(step, state)
        assert await session.state() is expected
        state = expected


@pytest.mark.parametrize("state", [State.RUNNING, State.CANCELLING], ids=str)
@pytest.mark.parametrize("step", [*OF_A_CLAIM, Step.CLAIM, Step.RESTORE, Step.RESTORE_DONE], ids=str)
async def test_another_claim_changes_nothing_in_a_running_session(
    store: Store, step: Step, state: State
) -> None:
    session = Session(store)
    for each in WAYS[state]:
        await session.take(each)
    await session.take(step, ANOTHER)
    assert await session.state() is state


@pytest.mark.parametrize("seed", range(10))
async def test_any_order_of_steps_follows_the_table(store: Store, seed: int) -> None:
    chance = random.Random(seed)
    session = Session(store)
    state = State.GONE
    taken: list[Step] = []
    for _ in range(60):
        step = chance.choice([each for each in Step if each is not Step.EXPIRE or chance.random() < 0.2])
        taken.append(step)
        await session.take(step)
        state = after(step, state)
        assert await session.state() is state, taken
