"""Checks that the sessions of this worker are still its own after a freeze, and after Redis has lost data.

If Redis may know more than this worker, the state in Redis counts: another worker can have ended a session. If Redis
came back empty or lost its last writes, this worker knows more and writes its sessions again.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn

import structlog

from broker.core.errors import StoreUnavailable
from broker.core.session import ENDED, State, short
from broker.relay.finishing import ALL, NOTHING
from broker.relay.rounds import for_each

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
    from typing import TypeAlias

    from broker.relay.finished import FinishedSession
    from broker.relay.finished_cache import FinishedCache
    from broker.relay.generation import Generation
    from broker.relay.journal_writer import JournalWriter
    from broker.relay.redis_watch import RedisWatch
    from broker.store.accounts import AccountStore
    from broker.store.journal import JournalStore
    from broker.store.sessions import SessionRecord, SessionStore

    Ours: TypeAlias = Generation | FinishedSession

log = structlog.get_logger(__name__)

FREEZE = 1.5
"""Seconds without a tick that count as a freeze of this process: others may have marked its sessions lost."""

CONFIRM_TIMEOUT = 0.3
"""Seconds that viewers wait after a freeze for Redis to confirm that their sessions are still ours."""

REWRITE_TRIES = 20
"""Number of tries to write sessions again if Redis refuses some, for example because it is full."""

REWRITE_PAUSE = 0.5
"""Seconds between these tries."""

CHECK_AT_ONCE = 256
"""Maximum number of sessions that one round trip reads."""

SETTLE_AT_ONCE = 32
"""Maximum number of sessions settled again at the same time. Other work needs connections too."""

WRITE_AT_ONCE = 64
WRITE_BYTES = 4 * 1024 * 1024
"""Maximum numbers of sessions, and of bytes of events, that one round trip writes."""


class Ownership:
    """Compares the sessions of this worker with Redis.

    Args:
        running: the generations that run here.
        finished: the finished cache of this worker.
        worker: this worker's id.
        sessions: stores the sessions.
        accounts: stores their reservations.
        reads: reads the status of a session.
        writes: writes this worker's journal, and confirms sessions.
        redis: notices that Redis has lost data.
        resuming: True if events are journaled.
        spawn: runs work in the background and owns its task.

    Attributes:
        lost: number of sessions that turned out to belong to another worker.
        tick_due: monotonic time after which this process may have been frozen, unless a tick comes before.
    """

    def __init__(
        self,
        running: Mapping[str, Generation],
        finished: FinishedCache,
        *,
        worker: str,
        sessions: SessionStore,
        accounts: AccountStore,
        reads: JournalStore,
        writes: JournalWriter,
        redis: RedisWatch,
        resuming: bool,
        spawn: Callable[[Coroutine[Any, Any, Any]], None],
    ) -> None:
        self._running = running
        self._finished = finished
        self._worker = worker
        self._sessions = sessions
        self._accounts = accounts
        self._reads = reads
        self._writes = writes
        self._redis = redis
        self._resuming = resuming
        self._spawn = spawn
        self.tick_due = asyncio.get_running_loop().time() + FREEZE
        self.lost = 0
        self._unconfirmed: set[Generation] = set()
        self._asked_in: dict[Generation, object] = {}

    # Redis has lost data

    async def on_session_lost(self, generation: Generation) -> None:
        """Handle a running session that is not ours in Redis: write it again if Redis lost it, else stop it."""
        try:
            gone = await self._redis.is_gone()
            status = await self._reads.status(generation.session_id)
            ours = status.worker == self._worker
            if ours and (status.end is None or status.end.id.epoch == 1):
                return  # it is there, or this worker has ended it meanwhile
            if status.state is State.PREPARED or (status.state is State.GONE and not gone):
                await self._rewrite([generation])
                return
        except StoreUnavailable:
            return  # checked again with the next write
        log.warning("fenced", session=short(generation.session_id), state=status.state)
        self.lost += 1
        generation.fence(status.end)

    async def run_rewriting(self) -> NoReturn:
        """Write sessions again each time that Redis may have lost data, until cancelled."""
        while True:
            await self._redis.to_rewrite.wait()
            self._redis.to_rewrite.clear()
            try:
                await self.rewrite_sessions()
            except BaseException as error:
                self._redis.to_rewrite.set()  # whatever the reason, nothing that is to be written is forgotten
                if not isinstance(error, StoreUnavailable):
                    raise
                await asyncio.sleep(REWRITE_PAUSE)

    async def rewrite_sessions(self) -> None:
        """Write every session of which this worker knows more than Redis. Refused ones are tried again.

        Raises:
            StoreUnavailable: Redis is away.
        """
        left: list[Ours] = [*self._running.values(), *self._finished.values()]
        for _ in range(REWRITE_TRIES):
            forgotten, ended_elsewhere = await self._compare(left)
            if ended_elsewhere:
                self._spawn(self._settle_again(ended_elsewhere))
            left = await self._rewrite(forgotten)
            if not left:
                return
            await asyncio.sleep(REWRITE_PAUSE)
            left = [now for each in left if (now := self._in_memory(each)) is not None]

    def _in_memory(self, session: Ours) -> Ours | None:
        """Return what this worker has of a session now: it may have ended meanwhile. None if it has nothing."""
        for found in (self._running.get(session.session_id), self._finished.get(session.session_id)):
            if found is not None and found.claim_id == session.claim_id:
                return found
        return None

    async def _compare(self, sessions: Iterable[Ours]) -> tuple[list[Ours], list[Ours]]:
        """Compare these with Redis.

        Returns:
            Two lists: the sessions that Redis has lost, wholly or in part, and those that have another end in Redis.
        """
        forgotten: list[Ours] = []
        ended_elsewhere: list[Ours] = []
        rest = iter(sessions)
        while part := list(islice(rest, CHECK_AT_ONCE)):
            records = await self._sessions.describe_many([each.session_id for each in part])
            for each, record in zip(part, records, strict=True):
                if _knows_more(each, record):
                    forgotten.append(each)
                elif _has_another_end(each, record):
                    ended_elsewhere.append(each)
        return forgotten, ended_elsewhere

    async def _rewrite(self, sessions: Sequence[Ours]) -> list[Ours]:
        """Write these again. Returns the sessions that Redis refused."""
        if not sessions:
            return []
        self._writes.suspend_watch_expiry()
        running = [each for each in sessions if each.state is State.RUNNING]
        await self._accounts.reserve_again([each.reservation for each in running])
        if ended := [each for each in sessions if each.state is not State.RUNNING]:
            self._spawn(self._settle_again(ended))
        refused: list[Ours] = []
        for part in self._parts(sessions):
            refused += await self._write(part)
        log.warning("sessions written again", count=len(sessions) - len(refused), refused=len(refused))
        return refused

    async def _settle_again(self, ended: list[Ours]) -> None:
        """Book the usage of these again, because Redis may have lost it with their ends. Nothing is booked twice."""

        async def settle(session: Ours) -> None:
            await session.settle()

        left = ended
        for _ in range(REWRITE_TRIES):
            with suppress(StoreUnavailable):  # all of them are tried again
                left = await for_each(left, settle, doing="settle again", together=SETTLE_AT_ONCE)
            if not left:
                return
            await asyncio.sleep(REWRITE_PAUSE)

    def _parts(self, sessions: Sequence[Ours]) -> Iterator[list[Ours]]:
        part: list[Ours] = []
        size = 0
        for session in sessions:
            more = session.feed.size
            if part and (len(part) >= WRITE_AT_ONCE or size + more > WRITE_BYTES):
                yield part
                part, size = [], 0
            part.append(session)
            size += more
        yield part

    async def _write(self, sessions: list[Ours]) -> list[Ours]:
        calls, last_of = [], []
        for each in sessions:
            feed = each.feed
            events = feed.unsaved(0, ALL) if self._resuming else NOTHING
            last_of.append(events.last)
            calls.append(
                self._sessions.restoring(
                    each.session_id,
                    each.claim_id,
                    self._worker,
                    each.prepared.spec,
                    held=events,
                    end=feed.end,
                )
            )
        replies = await self._sessions.run_each(calls)
        refused = []
        for session, last, reply in zip(sessions, last_of, replies, strict=True):
            if isinstance(reply, StoreUnavailable):
                refused.append(session)
            elif reply == 1:
                session.saved = last
        return refused

    # This process was frozen

    def check_for_freeze(self, now: float) -> None:
        """Check whether this process was frozen. Called before events are sent to viewers."""
        if now > self.tick_due:
            self._after_freeze(now - self.tick_due + FREEZE)
            self.tick_due = now + FREEZE

    def tick(self, now: float) -> None:
        """Record that this process runs. Called several times a second."""
        self.check_for_freeze(now)
        self.tick_due = now + FREEZE

    def _after_freeze(self, stood_still: float) -> None:
        """Send no events until Redis has confirmed that the sessions are still ours."""
        frozen = list(self._running.values())
        if frozen:
            log.warning("was frozen", sessions=len(frozen), seconds=round(stood_still, 1))
        for generation in frozen:
            generation.froze(stood_still)

    def confirm(self, generation: Generation) -> None:
        """Ask Redis whether a session is still ours. Sessions asked for at the same time share a round trip."""
        if not self._unconfirmed:
            self._spawn(self._confirm())
        self._unconfirmed.add(generation)
        self._asked_in.pop(generation, None)  # an answer that is on its way may be older than the freeze

    async def _confirm(self) -> None:
        asked, self._unconfirmed = self._unconfirmed, set()
        this_round = object()
        self._asked_in.update(dict.fromkeys(asked, this_round))
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT):
                await self._writes.confirm(asked, self)
        except TimeoutError:
            log.warning("not confirmed in time")
        finally:
            for generation in asked:
                if self._asked_in.get(generation) is this_round:
                    del self._asked_in[generation]
                    generation.confirmed()


def _knows_more(session: Ours, record: SessionRecord | StoreUnavailable | None) -> bool:
    """Returns True if this worker knows more of a session than Redis.

    If the session has another claim, it is not this worker's any more. If Redis has an end, that end counts. The
    journal writer writes events that are missing in the journal.
    """
    if isinstance(record, StoreUnavailable):
        return False
    if record is None or record.state is State.PREPARED:
        return True
    return (
        record.state is State.RUNNING
        and record.claim_id == session.claim_id
        and session.state is not State.RUNNING
    )


def _has_another_end(session: Ours, record: SessionRecord | StoreUnavailable | None) -> bool:
    """Returns True if a session has ended here, and Redis has another end of it.

    That end stays. The worker that wrote it took this one for dead, and may have booked an estimate; here the usage is
    known. This happens if this worker was cut off together with an old primary.
    """
    return (
        record is not None
        and not isinstance(record, StoreUnavailable)
        and record.claim_id == session.claim_id
        and record.state in ENDED
        and (end := session.feed.end) is not None
        and record.end_data != end.data
    )
