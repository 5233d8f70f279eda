"""Claiming sessions for this worker: exactly once each, also where Redis does not answer."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from broker.core.errors import StoreUnavailable
from broker.store.sessions import Prepared, SessionStore, Standing

if TYPE_CHECKING:
    from broker.relay.generation import Generation

RETRY = 0.3
"""Seconds between two tries to learn the outcome of a claim."""


class Claims:
    """The claims under way.

    Args:
        sessions: where sessions are claimed.
        worker: for whom.
        give_up_after: seconds for which the outcome of a claim is asked for: as long as it could still take effect.
        begin: starts the generation of a session that was won.
        spawn: runs work in the background and owns its task.
    """

    def __init__(
        self,
        sessions: SessionStore,
        *,
        worker: str,
        give_up_after: float,
        begin: Callable[[str, str, Prepared], Generation],
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._sessions = sessions
        self._worker = worker
        self._give_up_after = give_up_after
        self._begin = begin
        self._spawn = spawn
        self._under_way: dict[str, asyncio.Future[Generation | Standing]] = {}
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        return len(self._under_way)

    def get(self, session_id: str) -> asyncio.Future[Generation | Standing] | None:
        """The answer to a claim that is under way."""
        return self._under_way.get(session_id)

    async def claim(self, session_id: str) -> Generation | Standing:
        """Claim for one viewer or several: those who ask while a claim is under way share its answer.

        Raises:
            StoreUnavailable: the outcome is not known. It is still asked for, and a generation that turns out to be
                won starts without a viewer.
        """
        answer = self._under_way.get(session_id)
        if answer is None:
            answer = self._under_way[session_id] = self._loop.create_future()
            answer.add_done_callback(
                lambda done: done.cancelled() or done.exception()
            )  # perhaps nobody asks any more
            self._spawn(self._pursue(session_id, answer))
        # A viewer that leaves takes its own wait along and not the claim.
        return await asyncio.shield(answer)

    async def _pursue(self, session_id: str, answer: asyncio.Future[Generation | Standing]) -> None:
        """Ask with one token until Redis has answered: a claim whose reply was lost may have taken effect."""
        token = str(uuid.uuid4())
        give_up_at = self._loop.time() + self._give_up_after
        try:
            while self._loop.time() < give_up_at:
                try:
                    outcome = await self._sessions.claim(session_id, token, self._worker)
                except StoreUnavailable as error:
                    if not answer.done():
                        answer.set_exception(error)
                    await asyncio.sleep(RETRY)
                    continue
                result = self._begin(session_id, token, outcome) if isinstance(outcome, Prepared) else outcome
                if not answer.done():
                    answer.set_result(result)
                return
        finally:
            del self._under_way[session_id]
            answer.cancel()
