"""The journal of a session in Redis: its events in a stream, who watches it from where, and the steps around it.

An entry holds a batch of events, framed as viewers get them, under the id ``1-<number of the last>``. What the numbers
mean is `core.replay`'s; here they are only stored. A session's `last` in its hash says how far its journal goes, so
that a batch which would leave a hole is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from broker.core.errors import StoreRefused
from broker.core.replay import Batch
from broker.core.session import State
from broker.store.connection import Store, bounded_call
from broker.store.sessions import SessionStatus, read_status

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

WATCH_MS = 5000
"""Milliseconds for which a worker counts as watching a session after it last said so."""

READ_ENTRIES = 64
"""Journal entries that one read returns at most."""

READ_BYTES = 256 * 1024
"""Bytes of one journal after which a read stops: a reader that is far behind must not hold a whole answer."""


@dataclass(frozen=True, slots=True)
class Append:
    """Events to be journaled, or none, which only asks what others want of the session."""

    session_id: str
    claim_id: str
    batch: Batch


class Appended(NamedTuple):
    """What came of it.

    Attributes:
        state: `RUNNING`, or what the session is instead: then it is no longer the caller's.
        last: number of the last event in the journal.
        cancel: somebody has cancelled the session.
        watched: workers elsewhere that watch it.
    """

    state: State
    last: int
    cancel: bool = False
    watched: int = 0


class Followed(NamedTuple):
    """What a follower reads: where the session stands, how far its journal goes, and a part of it."""

    standing: SessionStatus
    last: int
    batches: list[Batch]


class JournalStore:
    """Reads and writes journals. Every method raises `StoreUnavailable` where Redis cannot be reached.

    Args:
        store: the connection.
        worker: this worker's id.
        running_ttl: seconds that the keys of a running session are kept.
    """

    def __init__(self, store: Store, *, worker: str, running_ttl: int) -> None:
        self._store = store
        self._worker = worker
        self._append = store.script("append", {"RUNNING_S": running_ttl, "CHANNELS": store.channels})
        self._follow = store.script(
            "follow", {"WATCH_MS": WATCH_MS, "MAX_BYTES": READ_BYTES, "CHANNELS": store.channels}
        )

    async def append(self, appends: Sequence[Append]) -> list[Appended | None]:
        """Journal events of several sessions in one round trip; the answers are in the order of the questions.

        None where Redis refused that one.
        """
        calls = [
            self._append.call(
                **self._store.session_keys(append.session_id),
                claim_id=append.claim_id,
                first=append.batch.first,
                newest=append.batch.last,
                batch=append.batch.events,
            )
            for append in appends
        ]
        replies = await self._store.run_each(calls)
        return [None if isinstance(reply, StoreRefused) else _appended(reply) for reply in replies]

    async def follow(
        self, session_id: str, after: int, *, entries: int = READ_ENTRIES, register: bool = True
    ) -> Followed:
        """Read a journal after event number ``after``, and say that this worker watches the session."""
        return _followed(await self._follow(**self._read_from(session_id, after, entries, register)))

    async def follow_many(self, wanted: Sequence[tuple[str, int]]) -> list[Followed | None]:
        """`follow` for several sessions, each with the number after which to read, in one round trip.

        None where Redis refused that one.
        """
        calls = [
            self._follow.call(**self._read_from(session_id, after, READ_ENTRIES, True))
            for session_id, after in wanted
        ]
        replies = await self._store.run_each(calls)
        return [None if isinstance(reply, StoreRefused) else _followed(reply) for reply in replies]

    async def look(self, session_id: str) -> SessionStatus:
        """Where a session stands; changes nothing."""
        return (await self.follow(session_id, 0, entries=0, register=False)).standing

    async def read(self, session_id: str, after: int) -> list[Batch] | None:
        """A part of a journal after event number ``after``; empty where nothing follows.

        None where Redis does not have the journal: it has expired, or Redis has lost it and its owner may yet write
        it again.
        """
        followed = await self.follow(session_id, after, register=False)
        return None if followed.standing.state is State.GONE else followed.batches

    async def leave(self, session_ids: Iterable[str]) -> None:
        """Say that this worker no longer watches these sessions."""
        async with bounded_call():
            pipe = self._store.redis.pipeline(transaction=False)
            for session_id in session_ids:
                pipe.zrem(self._store.session_keys(session_id)["viewers"], self._worker)
            await pipe.execute()

    def _read_from(self, session_id: str, after: int, entries: int, register: bool) -> dict[str, Any]:
        return {
            **self._store.session_keys(session_id),
            "worker": self._worker if register else "",
            "after": after,
            "max_entries": entries,
        }


def _appended(reply: bytes) -> Appended:
    state, last, cancel, watched = reply.split(b" ")
    return Appended(State(state.decode()), int(last), cancel == b"1", int(watched))


def _followed(reply: list[Any]) -> Followed:
    standing = read_status(reply[:5])
    if standing.state is State.GONE:
        return Followed(standing, 0, [])
    return Followed(standing, int(reply[5]), [_batch(entry_id, fields) for entry_id, fields in reply[6]])


def _batch(entry_id: bytes, fields: list[bytes]) -> Batch:
    """An entry: its id is ``1-<last>``, its fields are ``first`` and ``events``, in this order."""
    return Batch(int(fields[1]), int(entry_id.partition(b"-")[2]), fields[3])
