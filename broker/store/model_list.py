"""The last good list of models in Redis, for all workers of one upstream, and the lock to fetch the next one.

The list is not parsed here. It is stored as the upstream sent it.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from broker.store.call import command_call

if TYPE_CHECKING:
    from broker.store.connection import Store

KEPT = 24 * 3600
"""Seconds that a list is stored and served while no newer one can be fetched."""

LOCK_TTL = 3.0
"""Seconds after which a fetcher that died or stands still loses the lock. Until then no worker without a list can get
one. A fetch may take longer: its worker holds the lock meanwhile."""

LIST_TIMEOUT = 5.0
"""Seconds to read or write a list, which may be some MB. It is stored uncompressed: compression costs ten times the CPU
of sending it, and it is sent once per worker and refresh."""

_FAILED = b"failed:"


@dataclass(frozen=True, slots=True)
class StoredList:
    """The upstream's answer and the seconds since it was stored, by the clock of Redis."""

    body: bytes
    age: float


@dataclass(frozen=True, slots=True)
class Busy:
    """Another worker is fetching (`failures` is 0), or the last `failures` fetches failed.

    Attributes:
        failures: number of failed fetches in a row.
        seconds: maximum time until this may change.
    """

    failures: int
    seconds: float


class CatalogStore:
    """Stores the list of one upstream. Every method raises `StoreUnavailable` if Redis cannot be reached.

    Args:
        store: the connection.
        upstream_url: the upstream's base URL; brokers with different upstreams may share a Redis.
    """

    def __init__(self, store: Store, upstream_url: str) -> None:
        upstream = sha256(upstream_url.rstrip("/").encode()).hexdigest()[:16]
        self._store = store
        self._list_key = f"{store.prefix}:models:{{{upstream}}}:list"
        self._lock_key = f"{store.prefix}:models:{{{upstream}}}:lock"
        self._hold = store.script("hold_models")
        self._release = store.script("release_models")

    async def load(self) -> StoredList | None:
        """Return the last good list, or None.

        Its age is computed from its remaining time to live. That is read first, so that a list that is replaced in
        between counts as older than it is, never as younger.
        """
        left = await self._store.command("PTTL", self._list_key)
        read = command_call("GET", self._list_key)._replace(alone=True)
        [body] = await self._store.run([read], timeout=LIST_TIMEOUT)
        return StoredList(body, max(0.0, KEPT - left / 1000)) if body is not None and left > 0 else None

    async def save(self, body: bytes) -> None:
        """Store a list for all workers."""
        await self._store.command("SET", self._list_key, body, "EX", KEPT, timeout=LIST_TIMEOUT)

    async def acquire(self, holder: str) -> Busy | None:
        """Take the lock for `LOCK_TTL` seconds. Returns why it cannot be taken; None if it is ours now.

        `hold` keeps it for longer, and `release` gives it back.
        """
        if await self._store.command("SET", self._lock_key, holder, "NX", "PX", round(LOCK_TTL * 1000)):
            return None
        current, left = await self._store.read([("GET", self._lock_key), ("PTTL", self._lock_key)])
        current = current or b""
        failures = int(current.removeprefix(_FAILED)) if current.startswith(_FAILED) else 0
        return Busy(failures, max(0.0, left / 1000))

    async def hold(self, holder: str) -> bool:
        """Keep the lock for another `LOCK_TTL` seconds. Returns False if it is not ours any more."""
        return bool(await self._hold(lock=self._lock_key, holder=holder, ttl_ms=round(LOCK_TTL * 1000)))

    async def release(self, holder: str, *, failures: int = 0, pause: float = 0.0) -> None:
        """Release the lock. After `failures` failures in a row, no worker gets it for `pause` seconds."""
        await self._release(
            lock=self._lock_key, holder=holder, failures=failures, pause_ms=round(pause * 1000)
        )
