"""Sessions in Redis: one hash a session, which holds its state, its prompt until it runs, and its end.

The steps are Lua scripts, each named after the row of `core.session.TRANSITIONS` that it takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from broker.core.accounts import WorstCase
from broker.core.errors import StoreUnavailable
from broker.core.events import cancelled_before_start
from broker.core.replay import Batch
from broker.core.session import State, Terminal, parse_cursor
from broker.core.tokens import Size
from broker.store.connection import CALL_TIMEOUT, Call, Store, bounded_call

if TYPE_CHECKING:
    from collections.abc import Sequence

REMEMBERED = 4096
"""Sessions prepared here that are remembered without their prompts, until they are claimed or crowded out."""

MIN_KEPT = 60
"""Seconds that an end is known at least, however soon it can no longer be replayed: a late GET without resuming learns
that the session was streamed, and whoever settles for a dead worker, how it ended."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What /prepare leaves for the claim.

    Attributes:
        request: the body for the upstream, JSON.
        model: the model asked for first.
        prompt_tokens: our estimate.
        referer: origin of the page, for the upstream's attribution; may be empty.
        client: who pays.
        worst: the most that it may take.
        calibration_sample: size of the prompt, where what comes back can teach of the model's tokenizer.
    """

    request: bytes
    model: str
    prompt_tokens: int
    referer: str
    client: str
    worst: WorstCase
    calibration_sample: Size | None = None


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """What Redis has of a session, but for its prompt.

    Attributes:
        state: where it stands.
        claim_id: of the claim that it runs for, empty before.
        worker: its owner, empty before the claim.
        client: who pays.
        model: the model asked for first.
        worst: the most that it may take.
        prompt_tokens: our estimate.
        end_data: JSON of its end, once it has one.
    """

    state: State
    claim_id: str
    worker: str
    client: str
    model: str
    worst: WorstCase
    prompt_tokens: int
    end_data: bytes = b""


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """Where a session stands in Redis: its state, its owner once it has one, its end once it has one."""

    state: State
    worker: str = ""
    end: Terminal | None = None


REFUSALS = frozenset({"cancel", "watched", "behind"})


class EndConflict(NamedTuple):
    """Why an end was not written.

    Attributes:
        kind: ``cancel``, a cancel was accepted before; ``watched``, somebody watches elsewhere; ``behind``, events
            are missing between the journal and the batch.
        last: number of the last event in the journal, for ``behind``.
    """

    kind: str
    last: int


class SessionStore:
    """The steps of a session in Redis. Every method raises `StoreUnavailable` where Redis cannot be reached.

    Args:
        store: the connection.
        session_ttl: seconds that a prepared session waits.
        running_ttl: seconds that the keys of a running one are kept.
        resume_ttl: seconds that an ended one is kept; 0 where resuming is off.
    """

    def __init__(self, store: Store, *, session_ttl: int, running_ttl: int, resume_ttl: int) -> None:
        self._store = store
        self._session_ttl = session_ttl
        self._running_ttl = running_ttl
        self._kept = max(resume_ttl, MIN_KEPT)
        self._replayed = resume_ttl
        self._prepared_here: dict[str, SessionRecord] = {}
        self._prepare = store.script("prepare")
        self._claim = store.script("claim")
        self._refuse = store.script("refuse")
        self._cancel = store.script("cancel")
        self._end = store.script("end")
        self._mark_lost = store.script("mark_lost")
        self._restore = store.script("restore")

    def _keys(self, session_id: str) -> list[str]:
        return [self._store.session_key(kind, session_id) for kind in ("session", "events", "viewers")]

    def _key(self, session_id: str) -> str:
        return self._store.session_key("session", session_id)

    async def prepare(self, session_id: str, prepared: Prepared) -> None:
        """Store a session; it can be claimed for `session_ttl` seconds from now."""
        await self._store.run([self.preparing(session_id, prepared)])

    def preparing(self, session_id: str, prepared: Prepared) -> Call:
        """What `prepare` does, to be run together with something else."""
        self._remember(session_id, prepared)
        size = prepared.calibration_sample or Size(0, 0)
        fields = [
            *("request", prepared.request, "model", prepared.model, "prompt_tokens", prepared.prompt_tokens),
            *("referer", prepared.referer, "client", prepared.client),
            *("worst_tokens", prepared.worst.tokens, "worst_cost", prepared.worst.cost),
            *("text_bytes", size.text_bytes, "flat_tokens", size.flat_tokens),
        ]
        return self._prepare.call([self._key(session_id)], [self._session_ttl, *fields])

    def _remember(self, session_id: str, prepared: Prepared) -> None:
        if len(self._prepared_here) >= REMEMBERED:
            del self._prepared_here[next(iter(self._prepared_here))]
        self._prepared_here[session_id] = SessionRecord(
            State.PREPARED,
            *("", "", prepared.client, prepared.model),
            worst=prepared.worst,
            prompt_tokens=prepared.prompt_tokens,
        )

    async def claim(self, session_id: str, claim_id: str, worker: str) -> Prepared | SessionStatus:
        """Claim a session: its prompt for the one token that wins, else where it stands.

        Asking again with the same token gives the same answer, so a lost reply can be asked for again. Where a cancel
        was accepted meanwhile, that is the end: nothing has begun, so it is written here.
        """
        reply = await self._claim([self._key(session_id)], [claim_id, worker, self._running_ttl])
        if reply[0] == b"cancel":
            ended = await self.end(session_id, claim_id, cancelled_before_start(), Batch(1, 0, b""))
            if isinstance(ended, EndConflict):  # a cancel is never refused by the script
                raise StoreUnavailable
            return ended
        if reply[0] != b"won":
            return read_status(reply)
        request, model, prompt_tokens, referer, client, tokens, cost, text_bytes, flat_tokens = reply[1:]
        return Prepared(
            request,
            model.decode(),
            int(prompt_tokens),
            referer.decode(),
            client.decode(),
            WorstCase(int(tokens), int(cost)),
            Size(int(text_bytes), int(flat_tokens)) if int(text_bytes) else None,
        )

    async def refuse(self, session_id: str, claim_id: str) -> bool:
        """Let a claim win no more, and tell whether that is certain; it is not where it has won, or may have."""
        return bool(await self._refuse([self._key(session_id)], [claim_id]))

    async def describe(self, session_id: str) -> SessionRecord | None:
        """What Redis has of a session, None where it has none."""
        names = ["state", "token", "worker", "client", "model", "worst_tokens", "worst_cost", "prompt_tokens"]
        async with bounded_call():
            fields: list[Any] = await self._store.redis.hmget(self._key(session_id), [*names, "end_data"])
        end_data = fields.pop() or b""
        state, *rest = [(field or b"").decode() for field in fields]
        if not state:
            return None
        claim_id, worker, client, model, tokens, cost, prompt_tokens = rest
        worst = WorstCase(int(tokens or 0), int(cost or 0))
        return SessionRecord(
            State(state), claim_id, worker, client, model, worst, int(prompt_tokens or 0), end_data
        )

    async def describe_for_claim(self, session_id: str) -> SessionRecord | None:
        """`describe`, but of a session that was prepared here what it was then: what the claim costs never changes.

        That saves the claim a round trip, once; where it stands by now the claim itself finds out.
        """
        return self._prepared_here.pop(session_id, None) or await self.describe(session_id)

    async def cancel(self, session_id: str, end: Terminal) -> SessionStatus:
        """Cancel a session and return where it stood before.

        A prepared one ends in ``end``. A running one is marked, so that it can end in nothing but a cancel, and its
        owner's bell is rung.
        """
        args = [self._kept, end.event, str(end.id), end.data, self._store.channels]
        return read_status(await self._cancel([self._key(session_id)], args))

    async def end(
        self,
        session_id: str,
        claim_id: str,
        end: Terminal,
        rest: Batch,
        *,
        timeout: float = CALL_TIMEOUT,
        only_if_unwatched: bool = False,
    ) -> SessionStatus | EndConflict:
        """Write the end of a running session with the rest of its events, unless an end stands already.

        Args:
            session_id: whose end.
            claim_id: the claim's own; another's changes nothing.
            end: what the owner proposes.
            rest: the events not yet journaled, or none.
            timeout: seconds to wait for Redis.
            only_if_unwatched: refuse while a worker elsewhere watches.

        Returns:
            Where the session now stands, with the end that counts; or why nothing was written.
        """
        args = [
            *(claim_id, end.state, end.event, str(end.id), end.data, self._kept),
            *(
                rest.first,
                rest.last,
                rest.events,
                int(only_if_unwatched),
                self._store.channels,
                self._replayed,
            ),
        ]
        reply = await self._end(self._keys(session_id), args, timeout=timeout)
        kind = reply[0].decode()
        if kind in REFUSALS:
            return EndConflict(kind, int(reply[1]) if len(reply) > 1 else 0)
        return read_status(reply)

    async def mark_lost(
        self, session_id: str, worker: str, *, error: bytes, cancelled: bytes
    ) -> SessionStatus:
        """End a session for a dead worker: in `worker_lost`, or cancelled where that had been accepted.

        Args:
            session_id: whose end.
            worker: the dead one; a session that is another's stays as it is.
            error: data of the error.
            cancelled: data of the `done`, should it be that.
        """
        args = [worker, self._kept, error, cancelled, self._store.channels]
        return read_status(await self._mark_lost(self._keys(session_id), args))

    async def restore(
        self,
        session_id: str,
        claim_id: str,
        worker: str,
        prepared: Prepared,
        *,
        state: State,
        held: Batch,
        end: Terminal | None,
    ) -> None:
        """Write a session of this worker again, with what is held of its events, after Redis came back empty."""
        ttl = self._running_ttl if end is None else self._kept
        ending = [end.event, str(end.id), end.data] if end is not None else ["", "", ""]
        args = [claim_id, worker, state, ttl, held.first, held.last, held.events, *ending]
        args += [prepared.client, prepared.model, *prepared.worst, prepared.prompt_tokens]
        await self._restore(self._keys(session_id)[:2], args)

    async def remaining(self, session_id: str) -> int | None:
        """Whole seconds for which a session can still be claimed, 0 once it was.

        None where there is no session, or one that was cancelled before anybody claimed it.
        """
        async with bounded_call():
            pipe = self._store.redis.pipeline(transaction=False)
            pipe.hmget(self._key(session_id), ["state", "until", "worker"])
            pipe.time()
            (state, until, worker), (now, microseconds) = await pipe.execute()
        if state is None or (state == b"cancelled" and not worker):
            return None
        return (
            max(0, (int(until or 0) - now * 1000 - microseconds // 1000) // 1000)
            if state == b"prepared"
            else 0
        )

    async def forget(self, session_id: str) -> None:
        """Delete a session that nobody was told of."""
        async with bounded_call():
            await self._store.redis.unlink(self._key(session_id))


def read_status(reply: Sequence[bytes | None]) -> SessionStatus:
    """Read {state, worker, end event, end id, end data}, or its beginning."""
    state, worker, event, end_id, data = (*reply[:5], None, None, None, None)[:5]
    standing = State((state or b"gone").decode())
    end = None
    if event and end_id and (cursor := parse_cursor(end_id.decode())) is not None:
        end = Terminal(standing, event.decode(), cursor, data or b"{}")
    return SessionStatus(standing, (worker or b"").decode(), end)
