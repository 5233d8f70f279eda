"""The rate limit of /prepare: a number of hits in a sliding window, shared by all workers.

This is the moving window of `limits`. Redis stores the time of each accepted hit, and accepts one more while fewer than
the limit are within the window. That is exact. The sliding window counter of `limits` stores two numbers instead of the
times and costs the same CPU, but assumes that the hits of the previous window were evenly spread: with a limit of 30,
it accepted 57 within one window after a burst at the end of the previous one (measured). The exact window needs more
memory, some 24 bytes a hit.

`limits` itself sends one command to take a hit and another to read the rest, both with the clock of the worker. Here
its two scripts run as one command by the clock of Redis: workers whose clocks differ still share one window, and a hit
costs one round trip and half the CPU (65 µs instead of 130, measured under load).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING

from limits.aio.storage.redis.bridge import RedisBridge

from broker.core.rates import Rate, RateStatus
from broker.store.buckets import account_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from broker.store.buckets import Account
    from broker.store.call import Call
    from broker.store.connection import Store

MAX_REFUSED = 10_000
"""Maximum number of refused clients that a worker remembers."""


class Rates:
    """Counts the hits of every client. It has nothing to close: the store owns the connections.

    Args:
        store: the connection.
        limit: hits that a client may have in a window, where it has no rates of its own.
        window: seconds.
        clock: seconds that only go forward.
    """

    def __init__(
        self, store: Store, *, limit: int, window: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._clock = clock
        self._refused: OrderedDict[tuple[str, tuple[Rate, ...]], tuple[RateStatus, float]] = OrderedDict()
        self._rates = (Rate(limit, window),)
        take = _function("take", RedisBridge.SCRIPT_ACQUIRE_MOVING_WINDOW)
        look = _function("look", RedisBridge.SCRIPT_MOVING_WINDOW)
        self._hit = store.script("hit", before=take + look)

    async def hit(self, client: str, rates: tuple[Rate, ...] | None = None) -> RateStatus:
        """Count a hit, unless the client has reached a limit.

        Args:
            client: the name of the client.
            rates: its rates, where they differ from that of the service. Each has a window of its own, and a hit that
                one of them refuses is counted by none.

        Raises:
            StoreUnavailable: Redis cannot be reached. The hit may have been counted.
        """
        (reply,) = await self._store.run([self.hitting(client, rates)])
        return self.read(client, reply, rates)

    def hitting(self, client: str, rates: tuple[Rate, ...] | None = None) -> Call:
        """Return the call of `hit`, to be run together with others."""
        rates = rates or self._rates
        account = account_of(self._store, client)
        return self._hit.call(
            hits=[_key(account, rate) for rate in rates],
            rates=[number for rate in rates for number in (rate.count, rate.seconds)],
        )

    def read(
        self, client: str, reply: Sequence[Sequence[int]], rates: tuple[Rate, ...] | None = None
    ) -> RateStatus:
        """Return the status of a client from the reply to the call of `hitting`.

        With several rates it is that of the refusal that lasts longest, else that of the rate with the fewest hits
        left.
        """
        found = [
            RateStatus(bool(admits), rate.count, rate.seconds, remaining, reset_ms / 1000)
            for rate, (admits, remaining, reset_ms) in zip(rates or self._rates, reply, strict=True)
        ]
        refused = [status for status in found if not status.allowed]
        if not refused:
            return min(found, key=lambda status: status.remaining)
        status = max(refused, key=lambda status: status.reset)
        self._refused[client, rates or self._rates] = (status, self._clock() + status.reset)
        if len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)
        return status

    def standing_refusal(self, client: str, rates: tuple[Rate, ...] | None = None) -> RateStatus | None:
        """Return the refusal of a client that was refused here and would still be refused, or None.

        No hit is accepted until the oldest one leaves the window, so a flood costs no call to Redis and no body.
        """
        key = (client, rates or self._rates)
        status, until = self._refused.get(key, (None, 0.0))
        if status is None:
            return None
        left = until - self._clock()
        if left <= 0:
            del self._refused[key]
            return None
        return status._replace(reset=left)


def _key(account: Account, rate: Rate) -> str:
    # Without the limit: where it changes, the hits of the window still count.
    return f"{account.shared('rate')}:{rate.seconds}:{account.name}"


def _function(name: str, script: bytes) -> str:
    """Return a script as a Lua function whose parameters replace the globals."""
    return f"local function {name}(KEYS, ARGV)\n{script.decode()}\nend\n"
