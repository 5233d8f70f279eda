"""Ends that Redis could not be told of in time: told as soon as it can be, and what they cost booked with them.

The pages have the owner's word already. Until Redis has it too, the reservation stays this worker's.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog

from broker.core.errors import StoreUnavailable
from broker.core.lifecycle import CANCELLED
from broker.core.session import short
from broker.store.accounts import RECORD
from broker.store.sessions import EndConflict

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from broker.core.session import Terminal
    from broker.relay.finished_cache import FinishedCache
    from broker.relay.generation import Generation
    from broker.relay.journal_writer import JournalWriter
    from broker.relay.membership import Membership
    from broker.store.accounts import Reservation

log = structlog.get_logger(__name__)

RETRY = 1.0
"""Seconds between two tries."""

TRIED_FOR = RECORD - 3600.0
"""Seconds for which an end is tried. Not longer than a settled reservation is remembered: what another worker has
booked meanwhile must not be booked again. No new session begins without Redis, so no more of them wait than ran."""


class LateEnds:
    """Writes what could not be written.

    Args:
        kept: this worker's finished sessions.
        membership: knows whether Redis came back empty.
        journal: bounds what waits for Redis in memory.
        spawn: runs work in the background and owns its task.
    """

    def __init__(
        self,
        kept: FinishedCache,
        membership: Membership,
        journal: JournalWriter,
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        self._kept = kept
        self._membership = membership
        self._journal = journal
        self._spawn = spawn
        self._waiting: dict[str, Reservation] = {}
        self._loop = asyncio.get_running_loop()

    def reservations(self) -> list[Reservation]:
        """Those to be held until they are settled, or others would settle them by the journal, or give them back."""
        return list(self._waiting.values())

    def add(self, generation: Generation, end: Terminal) -> None:
        """Redis could not be told of an end, or of what it cost: go on trying."""
        self._waiting[generation.claim_id] = generation.reservation
        self._spawn(self._pursue(generation, end))

    async def _pursue(self, generation: Generation, end: Terminal) -> None:
        try:
            await generation.ended()
            self._journal.keep_pending(generation)
            give_up_at = self._loop.time() + TRIED_FOR
            while not await self._try(generation, end):
                if self._loop.time() >= give_up_at:
                    log.error("end given up", session=short(generation.session_id))
                    return
                await asyncio.sleep(RETRY)
        finally:
            self._journal.release_pending(generation)
            self._waiting.pop(generation.claim_id, None)

    async def _try(self, generation: Generation, end: Terminal) -> bool:
        """Whether it is written and booked now."""
        try:
            return await self._write(generation, end)
        except StoreUnavailable:
            return False
        except Exception:
            log.exception("late end cannot be written", session=short(generation.session_id))
            # What it took is booked all the same. It is booked once, however often this is done.
            await generation.finishing.settle_in_time(end.state)
            return False

    async def _write(self, generation: Generation, end: Terminal) -> bool:
        standing = await generation.finishing.store(end)
        if isinstance(standing, EndConflict):
            # A cancel was accepted meanwhile, and that is what later readers get.
            standing = await generation.finishing.store(generation.finishing.terminal(CANCELLED))
        if isinstance(standing, EndConflict):
            return False
        if standing is None and not await self._membership.is_gone():
            return False  # it may just be written again as running
        await generation.finishing.settle((standing or end).state)
        if standing not in (None, end):
            self._kept.drop(generation.session_id)  # later readers get the end that stands
        return True
