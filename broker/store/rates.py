"""How often a client may prepare: a limit of hits in a window that slides, shared by all workers.

The window is the moving one of `limits`: Redis keeps the time of each hit that passed, and one more passes while fewer
than the limit lie within the window. That is exact. Its sliding window counter keeps two numbers in place of the times
and costs the same, but takes the hits of the window before for evenly spread: of 30 allowed, 57 passed within one
window after a burst at the end of the one before (measured). What exactness costs is memory, some 24 bytes a hit.

`limits` itself sends one command to take a hit and another to look at the rest, and both carry the clock of the worker
that asks. Here its two scripts run as one command by Redis's clock: workers whose clocks differ still share one window,
and a hit costs one wait and half the CPU (65 µs in place of 130, measured under load).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from limits import RateLimitItemPerSecond
from limits.aio.storage.redis.bridge import RedisBridge

from broker.core.rates import RateStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from broker.store.connection import Call, Store

MAX_REFUSED = 10_000
"""Refused clients that a worker remembers."""


class Rates:
    """The hits of every client. It has nothing to close: the connections are the store's.

    Args:
        store: the connection.
        limit: hits that each client may have in a window.
        window: seconds.
        clock: seconds that only go forward.
    """

    def __init__(
        self, store: Store, *, limit: int, window: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._clock = clock
        self._refused: OrderedDict[str, tuple[RateStatus, float]] = OrderedDict()
        self._prefix = f"{store.prefix}:rate:"
        self._rate = RateLimitItemPerSecond(limit, window, namespace="prepare")
        take = _function("take", RedisBridge.SCRIPT_ACQUIRE_MOVING_WINDOW)
        look = _function("look", RedisBridge.SCRIPT_MOVING_WINDOW)
        self._hit = store.script("hit", before=take + look)

    async def hit(self, client: str) -> RateStatus:
        """Count a hit, unless the client has had its limit.

        Raises:
            StoreUnavailable: Redis cannot be reached. The hit may have been counted.
        """
        return self.read(client, (await self._store.run([self.hitting(client)]))[0])

    def hitting(self, client: str) -> Call:
        """What `hit` does, to be run together with something else."""
        return self._hit.call(hits=self._key(client), limit=self._rate.amount, window=self._rate.get_expiry())

    def read(self, client: str, reply: Sequence[int]) -> RateStatus:
        """What became of a hit that was run by `hitting`."""
        taken, remaining, reset_ms = reply
        status = RateStatus(
            bool(taken), self._rate.amount, self._rate.get_expiry(), remaining, reset_ms / 1000
        )
        if not taken:
            self._refused[client] = (status, self._clock() + status.reset)
            if len(self._refused) > MAX_REFUSED:
                self._refused.popitem(last=False)
        return status

    def standing_refusal(self, client: str) -> RateStatus | None:
        """The refusal of a client that has been refused here and has nothing to gain from asking again yet.

        Until the oldest hit leaves the window nothing passes, so a flood costs neither a look into Redis nor at a body.
        """
        status, until = self._refused.get(client, (None, 0.0))
        if status is None:
            return None
        left = until - self._clock()
        if left <= 0:
            del self._refused[client]
            return None
        return status._replace(reset=left)

    def _key(self, client: str) -> str:
        # Named as `limits` names it, so that its own tools can read and clear the window.
        return self._prefix + self._rate.key_for(client)


def _function(name: str, script: bytes) -> str:
    """A script as a function of Lua: its globals become the parameters."""
    return f"local function {name}(KEYS, ARGV)\n{script.decode()}\nend\n"
