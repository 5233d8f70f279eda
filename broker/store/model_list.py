"""The list of models in Redis: the last good one, for all workers of one upstream, and who may fetch the next.

What the list says is not known here: bytes go in and come out, as the upstream sent them.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from broker.store.connection import Store, bounded_call

KEPT = 24 * 3600
"""Seconds that a list is kept and served while no newer one can be had."""

LOCK_TTL = 15.0
"""Seconds after which a fetcher that never came back loses its right. Longer than a fetch may take."""

LIST_TIMEOUT = 5.0
"""Seconds to read or write a list: it may be some MB. It is kept as it came, for to compress and expand it costs ten
times the CPU of sending it, and it travels once a worker and refresh."""

_FAILED = b"failed:"


@dataclass(frozen=True, slots=True)
class StoredList:
    """The upstream's answer and the seconds since it was stored, by Redis's clock."""

    body: bytes
    age: float


@dataclass(frozen=True, slots=True)
class Busy:
    """Somebody is fetching (`failures` is 0), or the last `failures` fetches failed; for `seconds` yet at most."""

    failures: int
    seconds: float


class CatalogStore:
    """The list of one upstream. Every method raises `StoreUnavailable` where Redis cannot be reached.

    Args:
        store: the connection.
        upstream_url: the upstream's base URL; brokers with different upstreams may share a Redis.
    """

    def __init__(self, store: Store, upstream_url: str) -> None:
        upstream = sha256(upstream_url.rstrip("/").encode()).hexdigest()[:16]
        self._store = store
        self._list_key = f"{store.prefix}:models:{{{upstream}}}:list"
        self._lock_key = f"{store.prefix}:models:{{{upstream}}}:lock"
        self._release = store.script("release_models")

    async def load(self) -> StoredList | None:
        """The last good list.

        Its age is read off the time to live that it was born with. That is asked for first, so that a list that is
        replaced in between counts as older than it is, never as younger.
        """
        async with bounded_call(LIST_TIMEOUT):
            left = await self._store.redis.pttl(self._list_key)
            body: Any = await self._store.redis.get(self._list_key)
        return StoredList(body, max(0.0, KEPT - left / 1000)) if body is not None and left > 0 else None

    async def save(self, body: bytes) -> None:
        """Keep a list for all workers."""
        async with bounded_call(LIST_TIMEOUT):
            await self._store.redis.set(self._list_key, body, ex=KEPT)

    async def acquire(self, token: str) -> Busy | None:
        """Take the right to fetch; None where it is ours now, to be given back with `release`."""
        redis = self._store.redis
        async with bounded_call():
            if await redis.set(self._lock_key, token, nx=True, px=round(LOCK_TTL * 1000)):
                return None
            holder: Any = await redis.get(self._lock_key) or b""
            left = await redis.pttl(self._lock_key)
        failures = int(holder.removeprefix(_FAILED)) if holder.startswith(_FAILED) else 0
        return Busy(failures, max(0.0, left / 1000))

    async def release(self, token: str, *, failures: int = 0, pause: float = 0.0) -> None:
        """Give the right back; after `failures` in a row nobody gets it for `pause` seconds."""
        await self._release(
            lock=self._lock_key, holder=token, failures=failures, pause_ms=round(pause * 1000)
        )
