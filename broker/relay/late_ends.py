"""Ends that could not be written to Redis in time. They are written, and their usage is booked, once Redis is back.

The viewers have been sent the end already. Until it is in Redis as well, this worker keeps renewing the reservation.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from broker.core.errors import StoreUnavailable
from broker.core.lifecycle import CANCELLED
from broker.core.session import short
from broker.relay.retries import until_stored
from broker.store.accounts import RECORD
from broker.store.sessions import EndConflict

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from broker.core.session import Terminal
    from broker.relay.finished_cache import FinishedCache
    from broker.relay.generation import Generation
    from broker.relay.journal_writer import JournalWriter
    from broker.relay.redis_watch import RedisWatch
    from broker.store.accounts import Reservation

log = structlog.get_logger(__name__)

RETRY = 1.0
"""Seconds between two tries."""

TRIED_FOR = RECORD - 3600.0
"""Seconds after which an end is given up. Shorter than the record of a settled reservation is stored, so that
usage that another worker has booked meanwhile is not booked again. Without Redis no session starts, so the number of
ends is bounded by the number of sessions that ran."""


class LateEnds:
    """Writes ends to Redis in the background, and tries again until each is written or given up.

    Args:
        finished: this worker's finished sessions.
        redis: notices that Redis came back empty.
        journal: bounds the events that wait for Redis in memory.
        spawn: runs work in the background and owns its task.
        clock: seconds that only go forward; by default the event loop's.
        pause: waits for so many seconds.
    """

    def __init__(
        self,
        finished: FinishedCache,
        redis: RedisWatch,
        journal: JournalWriter,
        *,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        clock: Callable[[], float] | None = None,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._finished = finished
        self._redis = redis
        self._journal = journal
        self._spawn = spawn
        self._clock = clock or asyncio.get_running_loop().time
        self._pause = pause
        self._unsettled: dict[str, Reservation] = {}

    def reservations(self) -> list[Reservation]:
        """Return the reservations to be renewed until their ends are written.

        Without renewal another worker would settle them by the journal, or give them back.
        """
        return list(self._unsettled.values())

    def add(self, generation: Generation, end: Terminal) -> None:
        """Write this end and its settlement in the background, until both are in Redis."""
        self._unsettled[generation.claim_id] = generation.reservation
        self._spawn(self._pursue(generation, end))

    async def _pursue(self, generation: Generation, end: Terminal) -> None:
        try:
            await generation.ended()
            self._journal.keep_pending(generation)
            await until_stored(
                partial(self._try, generation, end),
                give_up_after=TRIED_FOR,
                retry=RETRY,
                clock=self._clock,
                pause=self._pause,
            )
        except StoreUnavailable:
            log.exception("end given up", session=short(generation.session_id))
        finally:
            self._journal.release_pending(generation)
            self._unsettled.pop(generation.claim_id, None)

    async def _try(self, generation: Generation, end: Terminal) -> None:
        """Write the end, and book the usage.

        Raises:
            StoreUnavailable: Redis cannot do it now.
        """
        try:
            await self._write(generation, end)
        except StoreUnavailable:
            raise
        except Exception as error:
            log.exception("late end cannot be written", session=short(generation.session_id))
            # The usage is booked all the same. Repeated settlements of one reservation are booked once.
            await generation.finishing.settle_in_time(end.state)
            raise StoreUnavailable from error

    async def _write(self, generation: Generation, end: Terminal) -> None:
        stored = await generation.finishing.store(end)
        if isinstance(stored, EndConflict):
            # A cancel was accepted meanwhile, so the end that later readers get is that of a cancel.
            stored = await generation.finishing.store(generation.finishing.terminal(CANCELLED))
        if isinstance(stored, EndConflict):
            raise StoreUnavailable
        if stored is None and not await self._redis.is_gone():
            raise StoreUnavailable  # the session may be written again as running right now
        await generation.finishing.settle((stored or end).state)
        if stored is not None and stored != end:
            self._finished.replace_end(generation.session_id, stored)
