"""The journal of a session in Redis: its events in a stream, and the workers that watch it.

An entry has a batch of events, framed as viewers get them, under the id ``1-<number of the last>``. The numbers are
explained in `core.replay`; here they are only stored. The field `last` of a session's hash has the number of the last
event in the journal, so that a batch that would leave a hole is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from broker.core.errors import StoreUnavailable
from broker.core.replay import Batch
from broker.core.session import State
from broker.store.sessions import SessionStatus, read_status, request_id_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from broker.store.call import Call
    from broker.store.connection import Store

WATCH_MS = 5000
"""Milliseconds for which a worker counts as watching a session after its last registration."""

READ_ENTRIES = 64
"""Maximum number of journal entries that one read returns."""

BEGINNINGS = 4096
"""Sessions for which the beginning of an append is kept."""

READ_BYTES = 256 * 1024
"""Bytes after which a read of a journal stops: a reader that is far behind must not load a whole answer."""

# To look one up takes a tenth of the time of the enum.
_STATES = {state.value.encode(): state for state in State}


@dataclass(frozen=True, slots=True)
class Append:
    """Events to be journaled. Without events, the call only asks for cancels and viewers."""

    session_id: str
    claim_id: str
    batch: Batch


class Appended(NamedTuple):
    """The result of an append.

    Attributes:
        state: `RUNNING`; any other state means that the session is not the caller's any more.
        last: number of the last event in the journal.
        cancel: True if the session was cancelled.
        watched: number of other workers that watch it.
    """

    state: State
    last: int
    cancel: bool = False
    watched: int = 0


class Followed(NamedTuple):
    """The result of a read.

    Attributes:
        status: the status of the session.
        last: the number of its last event.
        batches: a part of the journal.
        request_id: of the /prepare; empty where it was not asked for.
    """

    status: SessionStatus
    last: int
    batches: list[Batch]
    request_id: str = ""


class JournalStore:
    """Reads and writes journals. Every method raises `StoreUnavailable` if Redis cannot be reached.

    Args:
        store: the connection.
        worker: this worker's id.
        running_ttl: seconds that the keys of a running session are stored.
    """

    def __init__(self, store: Store, *, worker: str, running_ttl: int) -> None:
        self._store = store
        self._worker = worker
        self._beginning = lru_cache(BEGINNINGS)(self._begin)
        self._append = store.script("append", {"RUNNING_S": running_ttl, "CHANNELS": store.channels})
        self._follow = store.script(
            "follow", {"WATCH_MS": WATCH_MS, "MAX_BYTES": READ_BYTES, "CHANNELS": store.channels}
        )

    async def append(self, appends: Sequence[Append]) -> list[Appended | None]:
        """Journal events of several sessions in one round trip. Returns a result for each, in the same order.

        The result is None if Redis refused that append, or if its node of a cluster is away.
        """
        calls = [self._call(append) for append in appends]
        replies = await self._store.run_each(calls)
        return [None if isinstance(reply, StoreUnavailable) else _appended(reply) for reply in replies]

    def _call(self, append: Append) -> Call:
        first, newest, events = append.batch
        key, beginning = self._beginning(append.session_id, append.claim_id)
        return self._append.call_from(beginning, b"%d" % first, b"%d" % newest, events, key=key)

    def _begin(self, session_id: str, claim_id: str) -> tuple[str, bytes]:
        """Return the first key of an append, and the beginning of the call."""
        keys = self._store.session_keys(session_id)
        return keys["session"], self._append.begin(keys["session"], keys["events"], keys["viewers"], claim_id)

    async def follow(
        self,
        session_id: str,
        after: int,
        *,
        entries: int = READ_ENTRIES,
        register: bool = True,
        with_request_id: bool = False,
    ) -> Followed:
        """Read a journal after event number ``after``, and register this worker as watching the session."""
        step = self._read_from(session_id, after, entries, register)
        return _followed(await self._follow(**{**step, "with_spec": int(with_request_id)}))

    async def follow_many(self, wanted: Sequence[tuple[str, int]]) -> list[Followed | None]:
        """Call `follow` for several sessions in one round trip, each with the number after which to read.

        The result is None if Redis refused that read, or if its node of a cluster is away.
        """
        calls = [
            self._follow.call(**self._read_from(session_id, after, READ_ENTRIES, True))
            for session_id, after in wanted
        ]
        replies = await self._store.run_each(calls)
        return [None if isinstance(reply, StoreUnavailable) else _followed(reply) for reply in replies]

    async def status(self, session_id: str) -> SessionStatus:
        """Return the status of a session, without changing anything."""
        return (await self.follow(session_id, 0, entries=0, register=False)).status

    async def read(self, session_id: str, after: int) -> list[Batch] | None:
        """Return a part of a journal after event number ``after``, empty if nothing follows.

        None if Redis does not have the journal: it has expired, or Redis has lost it and its owner may still write
        it again.
        """
        followed = await self.follow(session_id, after, register=False)
        return None if followed.status.state is State.GONE else followed.batches

    async def leave(self, session_ids: Iterable[str]) -> None:
        """Unregister this worker as watching these sessions."""
        await self._store.read(
            [("ZREM", self._store.session_keys(each)["viewers"], self._worker) for each in session_ids]
        )

    def _read_from(self, session_id: str, after: int, entries: int, register: bool) -> dict[str, Any]:
        return {
            **self._store.session_keys(session_id),
            "worker": self._worker if register else "",
            "after": after,
            "max_entries": entries,
            "with_spec": 0,
        }


def _appended(reply: bytes) -> Appended:
    state, last, cancel, watched = reply.split(b" ")
    return Appended(_STATES[state], int(last), cancel == b"1", int(watched))


def _followed(reply: list[Any]) -> Followed:
    status = read_status(reply[:5])
    if status.state is State.GONE:
        return Followed(status, 0, [])
    batches = [_batch(entry_id, fields) for entry_id, fields in reply[6]]
    return Followed(status, int(reply[5]), batches, request_id_in(reply[7]) if len(reply) > 7 else "")


def _batch(entry_id: bytes, fields: list[bytes]) -> Batch:
    """Return the batch of an entry. Its id is ``1-<last>``, its fields are ``first`` and ``events``, in this order."""
    return Batch(int(fields[1]), int(entry_id.partition(b"-")[2]), fields[3])
