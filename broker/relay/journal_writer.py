"""Write the journals of all generations of this worker to Redis, in batches, behind the live viewers.

Each generation has a slot in the interval, so that the work is spread over it. A generation that somebody follows from
another worker is written at the next tick. With every write, and once a second without one, Redis answers whether there
is a cancel, another owner, or a viewer elsewhere. So nothing depends on pub/sub, which only makes it faster.

While Redis is away, events stay in the feeds, up to a limit. Above it the oldest are dropped, and readers get an error
for the gap.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, NoReturn, Protocol

import structlog

from broker.core.errors import StoreUnavailable
from broker.core.session import State, short
from broker.relay.finishing import NOTHING
from broker.relay.rounds import for_each
from broker.store.journal import Append, Appended, JournalStore

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from broker.core.replay import Batch
    from broker.relay.generation import Generation

log = structlog.get_logger(__name__)

TICK = 0.01
"""Seconds between two writes for sessions that are followed from other workers."""

SLOT = 0.03
"""Minimum seconds between two writes for all other sessions. Fewer and larger round trips cost less."""

ENOUGH = 32
"""Sessions in a round trip after which a larger one saves little. Of few sessions, those of several slots are written
together: 50 sessions in one round trip cost a third of what they cost in 16 (measured)."""

ASK_AFTER = 0.9
"""Seconds without a write after which Redis is asked without one."""

MAX_WRITE = 256 * 1024
"""Bytes of one session in one write."""

MAX_SESSIONS = 64
"""Sessions in one round trip. More would delay chunks."""

REGISTER_AGAIN = 2.0
"""Seconds after Redis was away, or came back empty, in which viewers elsewhere may not be registered again yet: two
rounds of their workers and one slow call. Until then no viewer counts as gone."""

MAX_PENDING_BYTES = 256 * 1024 * 1024
"""Bytes of events of all generations in memory, including ended ones that wait for Redis. Above it, events that are not
journaled are dropped."""


class Owner(Protocol):
    """Is called when a session turns out to belong to another worker."""

    async def on_session_lost(self, generation: Generation) -> None:
        """Handle that Redis no longer has this generation's session as this worker's."""


class JournalWriter:
    """Writes the journals of the generations of one worker.

    Args:
        store: writes to Redis.
        interval: seconds that a journal may lag.
        clock: seconds that only go forward; by default the event loop's.
        pause: waits for so many seconds.
    """

    def __init__(
        self,
        store: JournalStore,
        *,
        interval: float,
        clock: Callable[[], float] | None = None,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._clock = clock or asyncio.get_running_loop().time
        self._pause = pause
        # A cancel must be found in time, even if events are rarely written.
        self._interval = min(interval, ASK_AFTER)
        slots = max(1, round(self._interval / SLOT))
        self._slots: list[dict[Generation, None]] = [{} for _ in range(slots)]
        self._written_at = [float("-inf")] * slots
        self._next_slot = 0
        self._slot_of: dict[Generation, int] = {}
        self._asked_at: dict[Generation, float] = {}
        self._urgent: set[Generation] = set()
        self._ended: set[Generation] = set()
        self._added = 0
        self._watch_expiry_suspended_until = float("-inf")
        self._wanted = asyncio.Event()
        self._pausing: asyncio.Future[None] | None = None

    def add(self, generation: Generation) -> None:
        """Start writing the journal of this generation."""
        self._added += 1
        slot = self._added % len(self._slots)
        self._slots[slot][generation] = None
        self._slot_of[generation] = slot
        self._asked_at[generation] = self._clock() - ASK_AFTER  # so that the prompt leaves Redis soon
        self._wanted.set()

    def remove(self, generation: Generation) -> None:
        """Stop writing the journal of this generation, whose end was written with its last events."""
        slot = self._slot_of.pop(generation, None)
        if slot is not None:
            del self._slots[slot][generation]
            del self._asked_at[generation]
        self._urgent.discard(generation)

    def flush_soon(self, generation: Generation) -> None:
        """Write the events of this generation at the next tick."""
        if generation in self._slot_of:
            self._urgent.add(generation)
            if self._pausing is not None:
                self._pausing.cancel()

    async def run(self, owner: Owner) -> NoReturn:
        """Write until cancelled."""
        while True:
            if not self._slot_of:
                self._wanted.clear()
                await self._wanted.wait()
            if self._urgent:
                await self._pause(TICK)
            else:
                await self._pause_unless_urgent(max(TICK, self._next_turn() - self._clock()))
                if self._urgent:
                    continue  # what else becomes urgent within the tick is written with it
            await self._write_due(owner)

    async def _write_due(self, owner: Owner) -> None:
        """Write what is due now. In a method of its own: while `run` waits, it must not keep what has ended."""
        due = self._due(self._slots_of_this_turn())
        for start in range(0, len(due), MAX_SESSIONS):
            await self._write(due[start : start + MAX_SESSIONS], owner)

    def _turns(self) -> int:
        """Return in how many turns of an interval all slots are written, so that each has about `ENOUGH` sessions."""
        return max(1, min(len(self._slots), math.ceil(len(self._slot_of) / ENOUGH)))

    def _next_turn(self) -> float:
        """Return the time of the next turn. No slot waits longer than an interval, however many sessions come."""
        last = self._written_at[self._next_slot - 1]
        return min(last + self._interval / self._turns(), self._written_at[self._next_slot] + self._interval)

    def _slots_of_this_turn(self) -> list[Collection[Generation]]:
        """Return the slots to be written now; none before the next turn."""
        now = self._clock()
        if now < self._next_turn():
            return []
        slots: list[Collection[Generation]] = []
        share = math.ceil(len(self._slots) / self._turns())
        while len(slots) < len(self._slots) and (
            len(slots) < share or self._written_at[self._next_slot] + self._interval <= now
        ):
            slots.append(self._slots[self._next_slot])
            self._written_at[self._next_slot] = now
            self._next_slot = (self._next_slot + 1) % len(self._slots)
        return slots

    async def _pause_unless_urgent(self, seconds: float) -> None:
        """Wait for so many seconds, or until `flush_soon` is called."""
        pausing = self._pausing = asyncio.ensure_future(self._pause(seconds))
        try:
            await asyncio.wait([pausing])
        finally:
            self._pausing = None
            pausing.cancel()

    async def confirm(self, generations: Collection[Generation], owner: Owner) -> bool:
        """Ask Redis at once whether these are still this worker's. Returns True if Redis answered."""
        return await self._write(list(generations), owner)

    def suspend_watch_expiry(self) -> None:
        """Count all viewers elsewhere as present for a while, because Redis was away or came back empty."""
        self._watch_expiry_suspended_until = self._clock() + REGISTER_AGAIN

    def _due(self, slots: Collection[Collection[Generation]]) -> list[Generation]:
        """Return what is to be written now: the urgent ones, and those of these slots that have something."""
        now = self._clock()
        urgent, self._urgent = self._urgent, set()
        due = list(urgent)
        asked_before = now - ASK_AFTER
        for slot in slots:
            due += [
                generation
                for generation in slot
                if (generation.has_unsaved() or self._asked_at[generation] <= asked_before)
                and generation not in urgent
            ]
        return due

    async def _write(self, generations: list[Generation], owner: Owner) -> bool:
        appends = [Append(g.session_id, g.claim_id, self._batch_of(g)) for g in generations]
        try:
            answers = await self._store.append(appends)
        except StoreUnavailable:
            self.suspend_watch_expiry()
            self.limit_pending()
            await self._pause(TICK)
            return False
        now = self._clock()
        refused = None in answers
        if refused:
            self.suspend_watch_expiry()
            self.limit_pending()
        lost: list[Generation] = []
        for generation, answer in zip(generations, answers, strict=True):
            if generation not in self._slot_of:
                continue  # it has ended meanwhile
            self._asked_at[generation] = now  # a refused one is not asked about at every tick either
            if answer is not None and answer.state is not State.RUNNING:
                lost.append(generation)
            elif answer is not None:
                try:
                    self._note(generation, answer, now)
                except Exception:  # the journals of the others must go on
                    log.exception("journal answer not noted", session=short(generation.session_id))
        await for_each(lost, owner.on_session_lost, doing="note what the journal answered")
        return not refused

    def _note(self, generation: Generation, answer: Appended, now: float) -> None:
        _, last, cancel, watched = answer
        generation.saved = last
        generation.feed.trim(last)
        if watched > 0 or now >= self._watch_expiry_suspended_until:
            generation.note_elsewhere(watched=watched > 0)
        if cancel:
            generation.cancel()
        if not generation.has_unsaved():
            return
        left = len(self._batch_of(generation).events)
        if left >= MAX_WRITE or (left and generation.watched_elsewhere):
            self._urgent.add(generation)

    def _batch_of(self, generation: Generation) -> Batch:
        batch = generation.unsaved(MAX_WRITE)
        # Events that were dropped while Redis was away leave a gap, and no batch can be written behind it.
        return batch if batch.first == generation.saved + 1 else NOTHING

    def keep_pending(self, generation: Generation) -> None:
        """Count the events of this ended generation as pending too, until `release_pending`."""
        self._ended.add(generation)
        self.limit_pending()

    def release_pending(self, generation: Generation) -> None:
        """Stop counting the events of this ended generation: Redis has its end."""
        self._ended.discard(generation)

    def lag(self) -> float:
        """Return the most seconds that an event may have waited for Redis; 0 where none waits."""
        now = self._clock()
        waits = (now - max(at, g.started_at) for g, at in self._asked_at.items() if g.has_unsaved())
        return max(waits, default=0.0)

    def pending_bytes(self) -> int:
        """Return the bytes of events in memory of which Redis may lack some."""
        return sum(generation.feed.size for generation in {*self._slot_of, *self._ended})

    def limit_pending(self) -> None:
        """Drop events that wait for Redis until their limit is met, from the largest feeds first."""
        by_size = sorted({*self._slot_of, *self._ended}, key=lambda generation: generation.feed.size)
        pending = sum(generation.feed.size for generation in by_size)
        while pending > MAX_PENDING_BYTES and by_size:
            generation = by_size.pop()
            pending -= generation.feed.size
            generation.feed.trim(generation.feed.last, keep=0)
            pending += generation.feed.size
            log.warning("events dropped while redis is away", session=short(generation.session_id))
