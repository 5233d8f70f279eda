"""Sessions in Redis: one hash for each session, with its state, its request until it runs, and its end.

The steps are Lua scripts. `core.lifecycle.SESSION` defines what each of them does in each state.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog
from pydantic import TypeAdapter

from broker.core.accounts import WorstCase  # noqa: TC001 - pydantic reads it
from broker.core.client_limits import ClientLimits  # noqa: TC001 - pydantic reads it
from broker.core.dialect import DialectName  # noqa: TC001 - pydantic reads it
from broker.core.errors import StoreRefused, StoreUnavailable
from broker.core.events import cancelled_before_start
from broker.core.replay import Batch
from broker.core.session import State, Terminal, parse_cursor
from broker.core.tokens import Size  # noqa: TC001 - pydantic reads it
from broker.store.call import Call, command_call
from broker.store.connection import failure
from broker.telemetry.interface import TraceContext  # noqa: TC001 - pydantic reads it

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broker.store.connection import Store

log = structlog.get_logger(__name__)

CONFIRM_MS = 300
"""Milliseconds that a claim waits for replicas. A claim that no replica confirms counts as well."""

REMEMBERED = 4096
"""Maximum number of sessions prepared here that are remembered without their prompts until they are claimed."""

MIN_KEPT = 60
"""Minimum seconds that an end is stored, even if it can be replayed for a shorter time or not at all. A late GET
without resuming needs it to report that the session was streamed, and the reaper to know how the session ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """The stored values of a session besides its request. Lua never reads them.

    To store one more value, add an attribute with a default, so that sessions of an older release can be read.

    Attributes:
        model: the model asked for first.
        prompt_tokens: our estimate of the prompt.
        referer: origin of the page, for the upstream's attribution; may be empty.
        client: the client that pays.
        worst: the most that it can use.
        calibration_sample: size of the prompt, if the answer can calibrate the estimate of the model's tokens.
        dialect: the dialect of the request and the answer.
        request_id: the id of the /prepare, for log lines.
        trace: the trace of the /prepare; None where there are no traces.
        limits: the limits in the JWT of its client, for the claim.
    """

    model: str
    prompt_tokens: int
    referer: str
    client: str
    worst: WorstCase
    calibration_sample: Size | None = None
    dialect: DialectName = "chat"
    request_id: str = ""
    trace: TraceContext | None = None
    limits: ClientLimits | None = None

    @property
    def spec(self) -> Spec:
        """Return these values without those that a subclass adds."""
        return Spec(**{name: getattr(self, name) for name in _SPEC_NAMES})

    def with_request(self, request: bytes) -> Prepared:
        """Return the session of these values and a request."""
        return Prepared(request=request, **{name: getattr(self, name) for name in _SPEC_NAMES})


_SPEC_NAMES = tuple(each.name for each in fields(Spec))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared(Spec):
    """A prepared session, as the claim gets it.

    Attributes:
        request: the body for the upstream, JSON.
    """

    request: bytes

    def without_request(self) -> Prepared:
        """Return these values without the prompt, and without the limits, which only the claim needs."""
        kept = {name: getattr(self, name) for name in _SPEC_NAMES if name != "limits"}
        return Prepared(request=b"", **kept)


_SPEC = TypeAdapter(Spec)


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """The values of a session in Redis, except its request.

    Attributes:
        state: its state.
        claim_id: the id of its claim, empty before the claim.
        worker: its owner, empty before the claim.
        spec: the values that /prepare stored.
        end_data: the JSON of its end, empty before the end.
        prepared_ms: when it was prepared, in ms by the clock of Redis; 0 if not known.
        ends_ms: until when it can be claimed, in ms by the clock of Redis; 0 if not known.
    """

    state: State
    claim_id: str
    worker: str
    spec: Spec
    end_data: bytes = b""
    prepared_ms: int = field(default=0, compare=False)
    ends_ms: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """The status of a session in Redis: its state, its owner after the claim, and its end once it has one."""

    state: State
    worker: str = ""
    end: Terminal | None = None


REFUSALS = frozenset({"cancel", "watched", "behind"})


class EndConflict(NamedTuple):
    """Why an end was not written.

    Attributes:
        kind: ``cancel``, a cancel was accepted before; ``watched``, another worker watches; ``behind``, events are
            missing between the journal and the batch.
        last: number of the last event in the journal, for ``behind``.
    """

    kind: str
    last: int


class SessionStore:
    """The steps of a session in Redis. Every method raises `StoreUnavailable` if Redis cannot be reached.

    Args:
        store: the connection.
        session_ttl: seconds that a prepared session can be claimed.
        running_ttl: seconds that the keys of a running session are stored.
        resume_ttl: seconds that an ended session can be resumed; 0 if resuming is off.
        confirm_by: number of replicas that should have a claim before its generation starts.

    Attributes:
        claims_unconfirmed: number of claims that too few replicas confirmed in time.
    """

    def __init__(
        self, store: Store, *, session_ttl: int, running_ttl: int, resume_ttl: int, confirm_by: int = 0
    ) -> None:
        self._store = store
        self.claims_unconfirmed = 0
        self._confirm_by = confirm_by
        self._session_ttl = session_ttl
        self._prepared_here: dict[str, SessionRecord] = {}
        end: dict[str, int | str] = {
            "KEEP_S": max(resume_ttl, MIN_KEPT),
            "REPLAY_S": resume_ttl,
            "CHANNELS": store.channels,
        }
        self._prepare = store.script("prepare", {"SESSION_S": session_ttl})
        self._claim = store.script("claim", {"RUNNING_S": running_ttl})
        self._refuse = store.script("refuse")
        self._cancel = store.script("cancel", end)
        self._end = store.script("end", end)
        self._mark_lost = store.script("mark_lost", end)
        self._restore = store.script("restore", {**end, "RUNNING_S": running_ttl})

    def _keys(self, session_id: str) -> dict[str, str]:
        return self._store.session_keys(session_id)

    def _key(self, session_id: str) -> str:
        return self._keys(session_id)["session"]

    async def prepare(self, session_id: str, prepared: Prepared) -> None:
        """Store a session. It can be claimed for `session_ttl` seconds from now."""
        spec = prepared.spec
        (reply,) = await self._store.run([self.preparing(session_id, prepared.request, spec)])
        self.note_prepared(session_id, spec, reply)

    def preparing(self, session_id: str, request: bytes, spec: Spec, *, before_ms: int = 0) -> Call:
        """Return the call of `prepare`, to be run together with others. Pass its reply to `note_prepared`.

        From ``before_ms`` on, by the clock of Redis, it stores nothing and returns 0; 0 is no such time.
        """
        return self._prepare.call(
            session=self._key(session_id),
            request=request,
            spec=_SPEC.dump_json(spec),
            before_ms=before_ms,
        )

    def note_prepared(self, session_id: str, spec: Spec, reply: Any) -> None:
        """Remember a session that is stored, by the reply to the call of `preparing`."""
        ends_ms = int(reply)
        if ends_ms:
            self._store.clock.saw(ends_ms - self._session_ttl * 1000)
        if len(self._prepared_here) >= REMEMBERED:
            del self._prepared_here[next(iter(self._prepared_here))]
        self._prepared_here[session_id] = SessionRecord(State.PREPARED, "", "", spec, ends_ms=ends_ms)

    def redis_ms(self) -> int | None:
        """Return the time in ms by the clock of Redis, late by a round trip at most; None if it is not known."""
        return self._store.clock.now_ms()

    async def claim(
        self, session_id: str, claim_id: str, worker: str, *, also: Sequence[Call] = ()
    ) -> Prepared | SessionStatus:
        """Claim a session. Returns its request if this claim wins, else the status of the session.

        A repeat with the same id gets the same answer, so a claim whose reply was lost can be repeated. If a cancel was
        accepted meanwhile, no generation has begun, and its end is written here.

        Args:
            session_id: the id of the session.
            claim_id: the id of the claim.
            worker: the worker that claims.
            also: calls to run after the claim in the same round trip; they may fail.
        """
        key = self._key(session_id)
        claim = self._claim.call(session=key, reservation=key, claim_id=claim_id, worker=worker, before_ms=0)
        reply, *_ = await self._confirmed([claim, *also], claim)
        return await self._outcome(session_id, claim_id, reply)

    async def claim_if_reserved(
        self,
        reserving: Call,
        session_id: str,
        claim_id: str,
        worker: str,
        *,
        spec: Spec,
        before_ms: int,
    ) -> tuple[Any, Prepared | SessionStatus | None]:
        """Make the reservation of a claim, and claim, in one round trip.

        Args:
            reserving: what `AccountStore.reserving` returned.
            session_id: the id of the session.
            claim_id: the id of the claim.
            worker: the worker that claims.
            spec: the values of the session, which never change.
            before_ms: the time by the clock of Redis from which on nothing is claimed any more.

        Returns:
            The reply for `AccountStore.reserved`, and what `claim` returns; None where nothing was claimed, because the
            reservation is not open, it was too late, or Redis refused the claim.

        Raises:
            StoreUnavailable: both may have run, or may still run.
        """
        claim = self._claim.call(
            session=self._key(session_id),
            reservation=reserving.key,
            claim_id=claim_id,
            worker=worker,
            before_ms=before_ms,
        )
        reserved, reply = await self._confirmed([reserving, claim], claim)
        if isinstance(reserved, StoreUnavailable) or isinstance(reply, StoreUnavailable):
            return reserved, None  # what Redis refuses has done nothing
        if reply[0] == b"unreserved":
            return reserved, None
        return reserved, await self._outcome(session_id, claim_id, reply, spec)

    async def _confirmed(self, calls: Sequence[Call], claim: Call) -> list[Any]:
        """Run calls, of which one is a claim, and have it confirmed by replicas where that is wanted."""
        # A failure of a later call must not hide that the claim has won: the session would run nowhere. It is logged.
        if not self._confirm_by:
            return await self._store.run_each(calls)
        # On the connection of the claim: WAIT waits for the writes of its own connection.
        wait = command_call("WAIT", self._confirm_by, CONFIRM_MS)._replace(key=claim.key)
        *replies, confirmed = await self._store.run_each([*calls, wait])
        reply = replies[calls.index(claim)]
        won = not isinstance(reply, StoreUnavailable) and reply[0] == b"won"
        if won and not (isinstance(confirmed, int) and confirmed >= self._confirm_by):
            self.claims_unconfirmed += 1
            log.warning("claim not confirmed by a replica; a failover could forget it")
        return replies

    async def _outcome(
        self, session_id: str, claim_id: str, reply: Any, known: Spec | None = None
    ) -> Prepared | SessionStatus:
        """Return what the reply to a claim means. `known` are the values of the session, where they were read."""
        if isinstance(reply, StoreUnavailable):
            raise reply
        if reply[0] == b"cancel":
            ended = await self.end(session_id, claim_id, cancelled_before_start(), Batch(1, 0, b""))
            if isinstance(ended, EndConflict):  # a cancel is never refused by the script
                raise StoreUnavailable
            return ended
        if reply[0] != b"won":
            return read_status(reply)
        request, spec = reply[1:]
        return (known or _SPEC.validate_json(spec)).with_request(request or b"")

    async def refuse(self, session_id: str, claim_id: str) -> bool:
        """Prevent a claim from winning. Returns True if that is certain, False if it has won or may have won."""
        return bool(await self._refuse(session=self._key(session_id), claim_id=claim_id))

    async def describe(self, session_id: str) -> SessionRecord | None:
        """Return the record of a session, None if Redis has none."""
        [record] = await self.describe_many([session_id])
        if isinstance(record, StoreUnavailable):
            raise record
        return record

    async def describe_many(
        self, session_ids: Sequence[str]
    ) -> list[SessionRecord | StoreUnavailable | None]:
        """Return the records of several sessions in one round trip.

        None for each that Redis does not have, and a `StoreUnavailable` for each that cannot be read.
        """
        names = ("state", "claim_id", "worker", "spec", "end_data", "prepared_at", "until")
        replies = await self._store.commands([("HMGET", self._key(each), *names) for each in session_ids])
        return [_record(reply) for reply in replies]

    async def describe_for_claim(self, session_id: str) -> SessionRecord | None:
        """Return the record of a session for its claim, from memory if it was prepared here.

        The cost of a claim never changes, so this saves the first claim a round trip. The state may be old; the claim
        itself checks it.
        """
        return self._prepared_here.pop(session_id, None) or await self.describe(session_id)

    async def cancel(self, session_id: str, end: Terminal) -> SessionStatus:
        """Cancel a session and return its status before.

        A prepared session ends with ``end``. A running session is marked, so that it can only end as cancelled, and its
        owner is notified.
        """
        reply = await self._cancel(
            **self._keys(session_id), end_event=end.event, end_id=str(end.id), end_data=end.data
        )
        return read_status(reply)

    async def end(
        self,
        session_id: str,
        claim_id: str,
        end: Terminal,
        rest: Batch,
        *,
        timeout: float | None = None,
        only_if_unwatched: bool = False,
    ) -> SessionStatus | EndConflict:
        """Write the end of a running session with the rest of its events, unless it has an end already.

        Args:
            session_id: the id of the session.
            claim_id: the id of the claim; with another claim's id nothing changes.
            end: the end that the owner proposes.
            rest: the events that are not journaled yet, or an empty batch.
            timeout: seconds to wait for Redis; by default the store's.
            only_if_unwatched: refuse while another worker watches.

        Returns:
            The status of the session with the end that counts, or why nothing was written.
        """
        step = {
            **self._keys(session_id),
            "claim_id": claim_id,
            **_ending(end),
            "first": rest.first,
            "newest": rest.last,
            "batch": rest.events,
            "only_if_unwatched": int(only_if_unwatched),
        }
        reply = await self._end.within(timeout, step)
        kind = reply[0].decode()
        if kind in REFUSALS:
            return EndConflict(kind, int(reply[1]) if len(reply) > 1 else 0)
        return read_status(reply)

    async def mark_lost(
        self, session_id: str, claim_id: str, *, error: bytes, cancelled: bytes
    ) -> SessionStatus:
        """Do what `mark_lost_many` does for one session."""
        [status] = await self.mark_lost_many([(session_id, claim_id)], error=error, cancelled=cancelled)
        if isinstance(status, StoreUnavailable):
            raise status
        return status

    async def mark_lost_many(
        self, claims: Sequence[tuple[str, str]], *, error: bytes, cancelled: bytes
    ) -> list[SessionStatus | StoreUnavailable]:
        """End sessions of dead workers in one round trip; as cancelled, where a cancel was accepted.

        Args:
            claims: of each session its id and the claim for which the dead worker ran it. A session of another claim
                stays as it is.
            error: data of the error.
            cancelled: data of the `done`, should it be that.

        Returns:
            The status of each session, or a `StoreUnavailable`.
        """
        calls = [
            self._mark_lost.call(
                **self._keys(session_id), claim_id=claim_id, lost_data=error, cancelled_data=cancelled
            )
            for session_id, claim_id in claims
        ]
        replies = await self._store.run_each(calls)
        return [reply if isinstance(reply, StoreUnavailable) else read_status(reply) for reply in replies]

    def restoring(
        self, session_id: str, claim_id: str, worker: str, spec: Spec, *, held: Batch, end: Terminal | None
    ) -> Call:
        """Return the call that writes a session of this worker again if Redis has lost some of it.

        Its reply is 1, or 0 if the session has an end or belongs to another claim.

        Args:
            session_id: the id of the session.
            claim_id: the claim of this worker.
            worker: this worker.
            spec: the values that /prepare stored.
            held: the events that this worker has in memory.
            end: its end, or None while it runs.
        """
        no_end = {"end_state": "", "end_event": "", "end_id": "", "end_data": ""}
        return self._restore.call(
            **self._keys(session_id),
            claim_id=claim_id,
            worker=worker,
            spec=_SPEC.dump_json(spec),
            first=held.first,
            newest=held.last,
            batch=held.events,
            **(no_end if end is None else _ending(end)),
        )

    async def run_each(self, calls: Sequence[Call]) -> list[Any]:
        """Run calls of `restoring` in one round trip. The reply of one that failed is a `StoreUnavailable`."""
        return await self._store.run_each(calls)

    async def remaining(self, session_id: str) -> int | None:
        """Return the whole seconds for which a session can still be claimed, 0 after its claim.

        None if there is no such session, or if it was cancelled before its claim.
        """
        read = command_call("HMGET", self._key(session_id), "state", "until", "worker")
        clock = command_call("TIME")._replace(key=read.key)
        (state, until, worker), (now, micros) = await self._store.run([read, clock])
        if state is None or (state == b"cancelled" and not worker):
            return None
        return (
            max(0, (int(until or 0) - int(now) * 1000 - int(micros) // 1000) // 1000)
            if state == b"prepared"
            else 0
        )

    def forgetting(self, session_id: str) -> Call:
        """Return the call that deletes a session whose id was not returned to any client."""
        return command_call("UNLINK", self._key(session_id))


def _record(reply: list[bytes | None] | Exception) -> SessionRecord | StoreUnavailable | None:
    if isinstance(reply, Exception):
        return failure(reply)
    state, claim_id, worker, spec, end_data, prepared_at, until = (value or b"" for value in reply)
    if not state:
        return None
    try:
        stored = _SPEC.validate_json(spec)
    except ValueError:
        return StoreRefused()
    return SessionRecord(
        State(state.decode()),
        claim_id.decode(),
        worker.decode(),
        stored,
        end_data,
        prepared_ms=int(prepared_at or 0),
        ends_ms=int(until or 0),
    )


def request_id_in(spec: bytes) -> str:
    """Return the id of the /prepare in stored values; empty where they cannot be read."""
    try:
        return _SPEC.validate_json(spec).request_id
    except ValueError:
        return ""


def _ending(end: Terminal) -> dict[str, Any]:
    return {
        "end_state": end.state,
        "end_event": end.event,
        "end_id": str(end.id),
        "end_data": end.data,
    }


def read_status(reply: Sequence[bytes | None]) -> SessionStatus:
    """Parse {state, worker, end event, end id, end data}; the last ones may be missing."""
    state, worker, event, end_id, data = (*reply[:5], None, None, None, None)[:5]
    current = State((state or b"gone").decode())
    end = None
    if event and end_id and (cursor := parse_cursor(end_id.decode())) is not None:
        end = Terminal(current, event.decode(), cursor, data or b"{}")
    return SessionStatus(current, (worker or b"").decode(), end)
