"""What runs now on all workers, for operators: read from the open reservations, the sessions and the list of workers.

Everything is read in bounded batches, each a round trip of its own, so that the commands of workers run in between. No
keyspace is scanned, and nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import orjson

from broker.core.accounts import WorstCase
from broker.core.session import State
from broker.store.buckets import BUCKETS, account_of, bucket_prefix
from broker.store.workers import WorkerInfo, alive_key

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from broker.store.connection import Store

MAX_SESSIONS = 20_000
"""Maximum number of reservations that are read at once. More are not listed, and `Running.complete` is False."""

BUCKETS_AT_ONCE = 64
SCANNED_AT_ONCE = 200
READ_AT_ONCE = 200
"""Buckets, claims of a bucket, and records that one round trip reads."""

_Item = TypeVar("_Item")

_RESERVATION = ("state", "session", "spec", "tokens", "cost", "since")
_SESSION = ("state", "worker", "last", "bytes", "cancel", "claim_id")


class Activity(StrEnum):
    """What a session that has a reservation is doing.

    `STARTING`: its claim is not written yet. `STOPPING`: a cancel was accepted. `ENDED`: it has its end, and is about
    to be settled. `OVERDUE`: its worker has not renewed it in time, so it is about to be ended as lost. `UNKNOWN`:
    Redis does not have the session, or cannot read it.
    """

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    ENDED = "ended"
    OVERDUE = "overdue"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class RunningSession:
    """A session that runs, or is about to begin or to end.

    Attributes:
        session_id: its whole id, a bearer secret: never to be shown.
        client: the client that pays.
        model: the model that was asked for.
        activity: what it is doing.
        since_ms: the time of its claim, in ms by the clock of Redis; None if not known.
        worker: the id of its worker, empty before the claim.
        events: number of events in the journal, which is half a second behind; 0 before the first chunk.
        size: bytes of these events.
        reserved: the most that it can use.
    """

    session_id: str
    client: str
    model: str
    activity: Activity
    since_ms: int | None
    worker: str
    events: int
    size: int
    reserved: WorstCase


class Running(NamedTuple):
    """Everything that runs.

    Attributes:
        now_ms: the time in ms, by the clock of Redis.
        sessions: the longest running first.
        workers: the workers that live, including those without sessions.
        complete: False if more than `MAX_SESSIONS` reservations are open.
        unreadable: number of reservations that cannot be read.
    """

    now_ms: int
    sessions: list[RunningSession]
    workers: list[WorkerInfo]
    complete: bool = True
    unreadable: int = 0


class _Lease(NamedTuple):
    tagged: str
    claim_id: str
    ends_ms: int


class RunningStore:
    """Reads what runs. Every method raises `StoreUnavailable` if Redis cannot be reached.

    Args:
        store: the connection.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    async def read(self, *, client: str | None = None) -> Running:
        """Return everything that runs, or what runs of one client, of which all is read however much else runs.

        Of one client, `unreadable` also counts the reservations of the clients that share its bucket.
        """
        now_ms = await self._store.now_ms()
        workers = await self._workers()
        prefixes = [bucket_prefix(self._store, n) for n in range(BUCKETS)]
        leases, complete = await self._leases(
            prefixes if client is None else [account_of(self._store, client).tagged]
        )
        sessions: list[RunningSession] = []
        unreadable = 0
        for part in _batches(leases, READ_AT_ONCE):
            found = await self._sessions(part, now_ms)
            sessions += [each for each in found if each is not None and client in (None, each.client)]
            unreadable += sum(each is None for each in found)
        sessions.sort(key=lambda each: (each.since_ms or 0, each.session_id))
        return Running(now_ms, sessions, workers, complete, unreadable)

    async def pending(self, client: str) -> tuple[list[str], bool]:
        """Return the ids of the pending sessions of a client, and whether these are all of them."""
        key = account_of(self._store, client).key("pending")
        found, complete = await self._scan([key], limit=MAX_SESSIONS)
        return [session_id for _, session_id, _ in found], complete

    async def _workers(self) -> list[WorkerInfo]:
        found, _ = await self._scan([alive_key(self._store)], limit=MAX_SESSIONS)
        infos = (_worker_info(text) for _, text, _ in found)
        return sorted(info for info in infos if info is not None)

    async def _leases(self, prefixes: Sequence[str]) -> tuple[list[_Lease], bool]:
        """Return the open reservations of these buckets, and whether these are all of them."""
        leases: list[_Lease] = []
        for part in _batches(prefixes, BUCKETS_AT_ONCE):
            keys = {f"{prefix}:open": prefix for prefix in part}
            found, complete = await self._scan(list(keys), limit=MAX_SESSIONS - len(leases))
            leases += [_Lease(keys[key], claim_id, score) for key, claim_id, score in found]
            if not complete:
                return leases, False
        return leases, True

    async def _scan(self, keys: Sequence[str], *, limit: int) -> tuple[list[tuple[str, str, int]], bool]:
        """Return the key, member and score of the entries of sorted sets, and whether these are all of them.

        ZSCAN finds every member that is there all the time, also while leases are renewed. A range by score would not.
        """
        members: dict[tuple[str, str], int] = {}
        cursors = dict.fromkeys(keys, b"0")
        while cursors:
            replies = await self._store.read(
                [("ZSCAN", key, cursor, "COUNT", SCANNED_AT_ONCE) for key, cursor in cursors.items()]
            )
            for key, (cursor, flat) in zip(list(cursors), replies, strict=True):
                for member, score in zip(flat[::2], flat[1::2], strict=True):
                    members[key, member.decode(errors="replace")] = int(float(score))
                if int(cursor):
                    cursors[key] = cursor
                else:
                    del cursors[key]
            if len(members) > limit:
                break
        found = [(key, member, score) for (key, member), score in members.items()]
        return found[:limit], len(found) <= limit and not cursors

    async def _sessions(self, leases: Sequence[_Lease], now_ms: int) -> list[RunningSession | None]:
        """Return the session of each lease that has one; None for a reservation that cannot be read."""
        records = await self._store.commands(
            [("HMGET", f"{each.tagged}:reservation:{each.claim_id}", *_RESERVATION) for each in leases]
        )
        reserved = [
            (lease, record)
            for lease, record in zip(leases, records, strict=True)
            if isinstance(record, Exception) or record[0] == b"open"  # others were closed a moment ago
        ]
        states = await self._store.commands(
            [("HMGET", self._session_key(record), *_SESSION) for _, record in reserved]
        )
        return [
            _session(lease, record, state, now_ms)
            for (lease, record), state in zip(reserved, states, strict=True)
        ]

    def _session_key(self, record: list[bytes | None] | Exception) -> str:
        session_id = b"" if isinstance(record, Exception) else record[1] or b""
        return self._store.session_keys(session_id.decode(errors="replace"))["session"]


def _session(lease: _Lease, record: Any, state: Any, now_ms: int) -> RunningSession | None:
    if isinstance(state, Exception):
        state = (None,) * len(_SESSION)
    try:
        _, session_id, spec, tokens, cost, since = record
        client, model = orjson.loads(spec)
        now, worker, last, size, cancel, owner = state
        ours = owner is not None and owner.decode() == lease.claim_id
        activity = _activity(now, ours=ours, cancel=cancel is not None, overdue=lease.ends_ms < now_ms)
        return RunningSession(
            session_id.decode(),
            str(client),
            str(model),
            activity,
            int(since) if since else None,
            (worker or b"").decode() if ours else "",
            int(last or 0) if ours else 0,
            int(size or 0) if ours else 0,
            WorstCase(int(tokens), int(cost)),
        )
    except (TypeError, ValueError):  # of another release, or broken
        return None


def _activity(state: bytes | None, *, ours: bool, cancel: bool, overdue: bool) -> Activity:
    if state is None:
        return Activity.UNKNOWN
    if overdue:
        return Activity.OVERDUE
    if state == State.PREPARED.value.encode():
        return Activity.STARTING
    if state != State.RUNNING.value.encode() or not ours:
        return Activity.ENDED
    return Activity.STOPPING if cancel else Activity.RUNNING


def _worker_info(text: str) -> WorkerInfo | None:
    try:
        found = orjson.loads(text)
        return WorkerInfo(
            str(found["id"]),
            str(found.get("host", "")),
            int(found.get("pid", 0)),
            str(found.get("version", "")),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def _batches(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
