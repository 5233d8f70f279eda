"""The list of models: from memory, else from Redis, else from the upstream.

A list is fresh for a while, and the last good one is used for a day while no newer one is available. Each worker runs
one refresh at a time, and all workers that share a Redis run one fetch at a time. After a failure all of them wait
before the next one. While Redis is away, every worker fetches for itself.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING
from uuid import uuid4

import structlog

from broker.core.errors import ModelsUnavailable, StoreUnavailable
from broker.core.model_entry import (
    Listing,
    Model,
    Models,
    narrow,
    parse_models,
    search,
    write_listing,
)
from broker.store.model_list import KEPT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence

    from broker.core.pricing import Prices
    from broker.core.upstream_kind import UpstreamKind
    from broker.store.model_list import CatalogStore

PATIENCE = 12.0
"""Seconds that `models` waits where there is no list at all: longer than a fetch may take."""

PATIENCE_WITH_STALE = 2.0
"""Seconds that `models` waits for a fresh list while it has an old one."""

PAUSES = (5.0, 10.0, 20.0, 40.0, 60.0)
"""Seconds between tries after one, two, … failures in a row."""

LOCK_POLL = 0.1
"""Seconds between checks whether another worker has finished its fetch."""

LOCK_HELD = 0.5
"""Seconds between renewals of the lock during a fetch. One may fail, which takes Redis a second at most."""

TURN = 16.0
"""Seconds that a worker waits for its turn to fetch: longer than the fetch of another may take."""

MAX_LISTINGS = 16
"""Prepared answers of GET /models; each may be as large as the whole list."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _CachedList:
    """The list in memory, a digest of its source, and the time of its fetch, by this worker's clock."""

    models: Models
    digest: bytes
    fetched_at: float


@dataclass(frozen=True, slots=True)
class _Refresh:
    """One running refresh: its start, whether it has any list yet, and whether it has a fresh one or has ended."""

    started: float
    any_list: asyncio.Event = field(default_factory=asyncio.Event)
    settled: asyncio.Event = field(default_factory=asyncio.Event)


class Catalog:
    """The models of one upstream.

    Args:
        fetch: fetches the list from the upstream; raises `ModelsUnavailable`.
        store: the list in Redis.
        kind: learns from each list what the upstream is.
        ttl: seconds that a list is fresh.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        fetch: Callable[[], Awaitable[bytes]],
        store: CatalogStore,
        *,
        kind: UpstreamKind,
        ttl: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._store = store
        self._kind = kind
        self._ttl = ttl
        self._clock = clock
        self._cached: _CachedList | None = None
        self._refresh: _Refresh | None = None
        self._task: asyncio.Task[None] | None = None
        self._failures = 0
        self._retry_at = 0.0
        self._closed = False
        self._listings: dict[tuple[object, ...], Listing] = {}
        self._listed: Models | None = None

    @property
    def openrouter(self) -> bool:
        """True if the upstream understands OpenRouter's own fields, as far as is known now."""
        return self._kind.openrouter

    @property
    def has_list(self) -> bool:
        """True if there is any list, however old."""
        return self._usable() is not None

    @property
    def dearest(self) -> Prices | None:
        """The highest price of the list under each key, for a model without one; None where no price is known."""
        cached = self._usable()
        return cached.models.dearest if cached is not None else None

    def name_in_list(self, model_id: str) -> str | None:
        """Return the name of a model in the list, empty where it is not there; None where there is no list."""
        cached = self._usable()
        if cached is None or not cached.models.entries:
            return None
        base = model_id.partition(":")[0].partition("@")[0]
        return next((name for name in (model_id, base) if cached.models.find(name) is not None), "")

    async def models(self) -> Models:
        """Return the list. Waits a short time for a fresh one.

        Raises:
            ModelsUnavailable: there is no list, not even an old one.
        """
        cached = self._usable()
        if cached is not None and self._is_fresh(cached):
            return cached.models
        refresh = self._refreshing()
        if refresh is not None:
            await _wait(refresh.settled, PATIENCE if cached is None else PATIENCE_WITH_STALE)
            cached = self._usable()
        if cached is None:
            raise ModelsUnavailable(retry_after=max(1.0, self._retry_at - self._clock()))
        return cached.models

    async def known(self, model_ids: Iterable[str], timeout: float = 1.0) -> Mapping[str, Model]:
        """Return the models that are known now or within `timeout` seconds; others are missing. Does not raise.

        An old list is used at once and refreshed in the background. Where there is none, the callers wait for it,
        counted from the start of the try; after a failed try they do not wait. With no ids and no time, this only
        starts a refresh that is due.
        """
        cached = self._usable()
        if cached is None or not self._is_fresh(cached):
            refresh = self._refreshing()
            if cached is None and refresh is not None and not self._failures:
                await _wait(refresh.any_list, timeout - (self._clock() - refresh.started))
                cached = self._usable()
        if cached is None:
            return {}
        found = {model_id: cached.models.find(model_id) for model_id in model_ids}
        return {model_id: model for model_id, model in found.items() if model is not None}

    async def listing(
        self,
        allowed: Sequence[str],
        *,
        also: tuple[tuple[str, ...], ...] = (),
        q: str = "",
        free: bool = False,
    ) -> Listing:
        """Return the answer of GET /models.

        Args:
            allowed: globs, of which a model must match one.
            also: further lists of globs, of each of which it must match one too.
            q: a part of id or name.
            free: only models with every price zero.

        Raises:
            ModelsUnavailable: there is no list.
        """
        models = await self.models()
        if models is not self._listed:
            self._listings, self._listed = {}, models
        key = (tuple(allowed), also, q.casefold(), free)
        listing = self._listings.pop(key, None)
        if listing is None:
            entries = narrow(models.entries, allowed)
            for globs in also:
                entries = narrow(entries, globs)
            listing = write_listing(search(entries, q, free=free))
        self._listings[key] = listing
        if len(self._listings) > MAX_LISTINGS:
            del self._listings[next(iter(self._listings))]
        return listing

    async def close(self) -> None:
        """Stop refreshing. The list in memory can still be read."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def _usable(self) -> _CachedList | None:
        """Return the list in memory, unless it is too old for any use."""
        cached = self._cached
        return cached if cached is not None and self._clock() - cached.fetched_at < KEPT else None

    def _is_fresh(self, cached: _CachedList) -> bool:
        return self._clock() - cached.fetched_at < self._ttl

    def _refreshing(self) -> _Refresh | None:
        """Return the running refresh, or start one; None while a new one must wait."""
        if self._refresh is None and not self._closed and self._clock() >= self._retry_at:
            self._refresh = _Refresh(self._clock())
            self._task = asyncio.create_task(self._run(self._refresh), name="model list")
        return self._refresh

    async def _run(self, refresh: _Refresh) -> None:
        try:
            await self._renew(refresh)
        except ModelsUnavailable:
            self._pause(self._failures + 1)
        except Exception:  # a bug is treated like a failing upstream, and affects only the list
            log.exception("model list refresh broke")
            self._pause(self._failures + 1)
        finally:
            self._refresh = None
            refresh.any_list.set()
            refresh.settled.set()

    async def _renew(self, refresh: _Refresh) -> None:
        token = uuid4().hex
        try:
            if await self._take_stored(refresh) or not await self._may_fetch(token):
                return
        except StoreUnavailable:
            await self._fetch_and_share(refresh)
            return
        failures = 0
        try:
            async with self._holding(token):
                await self._take_stored_or_fetch(refresh)
        except ModelsUnavailable:
            failures = self._failures + 1
            raise
        finally:
            with suppress(StoreUnavailable):
                await self._store.release(token, failures=failures, pause=_pause_after(failures))

    async def _may_fetch(self, token: str) -> bool:
        """Wait for the turn of this worker to fetch. Returns False where the last fetch failed and all must wait."""
        with suppress(TimeoutError):
            async with asyncio.timeout(TURN):
                while (busy := await self._store.acquire(token)) is not None:
                    if busy.failures:
                        self._pause(busy.failures, busy.seconds)
                        return False
                    await asyncio.sleep(LOCK_POLL)
                return True
        raise ModelsUnavailable

    @asynccontextmanager
    async def _holding(self, token: str) -> AsyncIterator[None]:
        """Renew the lock meanwhile, so that no other worker fetches."""
        task = asyncio.create_task(self._hold(token), name="model list lock")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def _hold(self, token: str) -> None:
        while True:
            await asyncio.sleep(LOCK_HELD)
            with suppress(StoreUnavailable):
                if not await self._store.hold(token):
                    return

    async def _take_stored_or_fetch(self, refresh: _Refresh) -> None:
        with suppress(StoreUnavailable):
            if await self._take_stored(refresh):  # another worker fetched it first
                return
        try:
            await self._fetch_and_share(refresh)
        except ModelsUnavailable:
            # If this process stood still, another one had its turn meanwhile.
            with suppress(StoreUnavailable):
                if await self._take_stored(refresh):
                    return
            raise

    async def _take_stored(self, refresh: _Refresh) -> bool:
        """Take the list from Redis where it is younger than the one in memory. Returns True if that is fresh now."""
        stored = await self._store.load()
        if stored is not None:
            fetched_at = self._clock() - stored.age
            if self._cached is None or fetched_at > self._cached.fetched_at:
                with suppress(ModelsUnavailable):  # one that cannot be parsed is replaced
                    await self._take(refresh, stored.body, fetched_at)
        return self._cached is not None and self._is_fresh(self._cached)

    async def _fetch_and_share(self, refresh: _Refresh) -> None:
        body = await self._fetch()
        await self._take(refresh, body, self._clock())
        with suppress(StoreUnavailable):
            await self._store.save(body)

    async def _take(self, refresh: _Refresh, body: bytes, fetched_at: float) -> None:
        """Replace the list in memory. The same bytes keep the same `Models`, and so everything that is derived from it.

        Raises:
            ModelsUnavailable: it cannot be parsed.
        """
        digest = sha256(body).digest()
        if self._cached is not None and self._cached.digest == digest:
            models = self._cached.models
        else:
            try:  # not on the loop: OpenRouter's list takes about 15 ms, and streams are waiting
                models = await asyncio.to_thread(parse_models, body)
            except ValueError:
                log.warning("model list unreadable", size=len(body))
                raise ModelsUnavailable from None
        self._cached = _CachedList(models, digest, fetched_at)
        self._kind.learn(models)
        refresh.any_list.set()
        if self._is_fresh(self._cached):
            self._failures = 0
            refresh.settled.set()

    def _pause(self, failures: int, seconds: float | None = None) -> None:
        self._failures = failures
        self._retry_at = self._clock() + (_pause_after(failures) if seconds is None else seconds)


def _pause_after(failures: int) -> float:
    return PAUSES[min(failures, len(PAUSES)) - 1] if failures else 0.0


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, so many seconds at most."""
    if seconds > 0:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()
