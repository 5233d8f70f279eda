"""Sessions in Redis: one hash a session, which holds its state, its prompt until it runs, and its end.

The steps are Lua scripts, each named after the row of `core.session.TRANSITIONS` that it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from broker.core.session import Cursor, State, Terminal, parse_cursor
from broker.store.connection import Store, store_errors

AFTER_DEADLINE = 60
"""Seconds that a running session's keys outlive its deadline and its journal."""

MIN_KEPT = 60
"""Seconds that an end is kept at least, so that a late GET learns that the session was streamed."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What /prepare leaves for the claim.

    Attributes:
        request: the body for the upstream, JSON.
        model: the model asked for first.
        prompt_tokens: our estimate.
        output_cap: tokens that the upstream was told to stop at.
        referer: origin of the page, for the upstream's attribution; may be empty.
    """

    request: bytes
    model: str
    prompt_tokens: int
    output_cap: int
    referer: str


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a session stands in Redis: its state, its owner once it has one, its end once it has one."""

    state: State
    worker: str = ""
    end: Terminal | None = None


class SessionStore:
    """The steps of a session in Redis. Every method raises `StoreUnavailable` where Redis cannot be reached.

    Args:
        store: the connection.
        session_ttl: seconds that a prepared session waits.
        resume_ttl: seconds that an ended one is kept.
        deadline: seconds that one may run.
    """

    def __init__(self, store: Store, *, session_ttl: int, resume_ttl: int, deadline: float) -> None:
        self._store = store
        self._session_ttl = session_ttl
        self._running_ttl = int(deadline) + resume_ttl + AFTER_DEADLINE
        self._kept = max(resume_ttl, MIN_KEPT)
        self._prepare = store.script("prepare")
        self._claim = store.script("claim")
        self._started = store.script("started")
        self._cancel = store.script("cancel")
        self._end = store.script("end")

    def _key(self, session_id: str) -> str:
        return self._store.session_key("session", session_id)

    async def prepare(self, session_id: str, prepared: Prepared) -> None:
        """Store a session; it can be claimed for `session_ttl` seconds from now."""
        fields: list[str | bytes | int] = [
            *("request", prepared.request, "model", prepared.model, "prompt_tokens", prepared.prompt_tokens),
            *("output_cap", prepared.output_cap, "referer", prepared.referer),
        ]
        await self._prepare([self._key(session_id)], [self._session_ttl, *fields])

    async def claim(self, session_id: str, token: str, worker: str) -> Prepared | Standing:
        """Claim a session: its prompt for the one token that wins, else where it stands.

        Asking again with the same token gives the same answer, so a lost reply can be asked for again.
        """
        reply = await self._claim([self._key(session_id)], [token, worker, self._running_ttl])
        if reply[0] != b"won":
            return _standing(reply)
        request, model, prompt_tokens, output_cap, referer = reply[1:]
        return Prepared(request, model.decode(), int(prompt_tokens), int(output_cap), referer.decode())

    async def started(self, session_id: str, token: str) -> None:
        """Take the prompt out of Redis: the generation has it."""
        await self._started([self._key(session_id)], [token])

    async def look(self, session_id: str) -> Standing:
        """Where a session stands; changes nothing."""
        with store_errors():
            fields = await self._store.redis.hmget(
                self._key(session_id), ["state", "worker", "end_event", "end_id", "end_data"]
            )
        return _standing(fields) if fields[0] is not None else Standing(State.GONE)

    async def cancel(self, session_id: str, end: Terminal) -> Standing:
        """Cancel a prepared session. Returns where it stood before; a running one is left to its owner."""
        args: list[str | bytes | int] = [self._kept, end.event, str(end.id), end.data]
        return _standing(await self._cancel([self._key(session_id)], args))

    async def end(self, session_id: str, token: str, end: Terminal, *, timeout: float) -> Standing:
        """Write the end of a running session, unless one stands already; returns the one that stands.

        Args:
            session_id: whose end.
            token: the claim's own; another's changes nothing.
            end: what the owner proposes.
            timeout: seconds to wait for Redis.
        """
        args: list[str | bytes | int] = [token, end.state, end.event, str(end.id), end.data, self._kept]
        reply = await self._end([self._key(session_id)], args, timeout=timeout)
        return _standing([reply[0], b"", *reply[1:]])

    async def remaining(self, session_id: str) -> int | None:
        """Whole seconds until which a session can be claimed (0 when that is over), None where there is no session."""
        with store_errors():
            until = await self._store.redis.hget(self._key(session_id), "until")
            state = await self._store.redis.hget(self._key(session_id), "state")
            now = await self._store.redis.time()
        if state is None:
            return None
        return max(0, round(int(until or 0) / 1000 - now[0])) if state == b"prepared" else 0

    async def forget(self, session_id: str) -> None:
        """Delete a session that nobody was told of."""
        with store_errors():
            await self._store.redis.unlink(self._key(session_id))


def _standing(reply: list[Any]) -> Standing:
    """Read {state, worker, end event, end id, end data}, shortened where there is no end."""
    state = State(reply[0].decode())
    worker, event, end_id, data = (*reply[1:5], None, None, None, None)[:4]
    end = None
    if event and end_id:
        cursor = parse_cursor(end_id.decode()) or Cursor(1, 0)
        end = Terminal(state, event.decode(), cursor, data or b"{}")
    return Standing(state, (worker or b"").decode(), end)
