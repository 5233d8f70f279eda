"""Each model's bytes per token as this worker knows it: in memory, refreshed from Redis from time to time.

It joins the rule (`core`) and the samples (`store`). Nothing here raises. While Redis is away, models in memory keep
their values, and all others have none, so that the default is used.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import structlog

from broker.core.bytes_per_token import Sample, estimate, without_variant
from broker.core.errors import StoreUnavailable
from broker.store.bytes_per_token import KEPT_OF_CLIENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from broker.store.bytes_per_token import BytesPerTokenStore

FRESH = 10.0
"""Seconds after which a value in memory is read again, if it is used."""

PATIENCE = 0.05
"""Seconds to wait for a model that is not in memory."""

PAUSE = 5.0
"""Seconds without any try after Redis has failed."""

MAX_IN_MEMORY = 1000
"""Models in memory. Above it, the one that was read or learned longest ago is dropped."""

LEARN_AGAIN = 10.0
"""Seconds in which `KEPT_OF_CLIENT` samples of a client and a model are stored, as many as Redis keeps. More would
replace each other within the same moment, and each costs a worker as much as ten chunks."""

MAX_COUNTED = 1000
"""Clients and models whose samples are counted. Above it, the count that began longest ago is dropped."""

MAX_READS = 8
"""Reads at the same time. A further one waits until its model is asked for again."""

log = structlog.get_logger(__name__)


class _Cached(NamedTuple):
    """A value, None where too little is known, and the time until which it need not be read again."""

    bytes_per_token: float | None
    fresh_until: float


@dataclass(slots=True)
class _Count:
    """The samples of a client and a model until a time."""

    until: float
    samples: int = 0


class BytesPerToken:
    """The bytes per token of the models of one upstream.

    Args:
        store: the samples in Redis.
        estimate: computes a value from samples; by default bytes per token.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        store: BytesPerTokenStore,
        *,
        estimate: Callable[[Iterable[Sample]], float | None] = estimate,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._estimate = estimate
        self._clock = clock
        self._cached: dict[str, _Cached] = {}
        self._reads: dict[str, asyncio.Task[None]] = {}
        self._learned: dict[tuple[str, str], _Count] = {}
        self._retry_at = 0.0
        self._closed = False

    async def of(self, model_ids: Iterable[str]) -> dict[str, float]:
        """Return bytes per token by these ids. Models of which too little is known are missing.

        Values come from memory, however old; those that are due are read in the background. Only a model that is not in
        memory is waited for, ``PATIENCE`` seconds at most, and not at all for a while after Redis has failed.
        """
        names = {model_id: without_variant(model_id) for model_id in model_ids}
        now = self._clock()
        due = [name for name in names.values() if self._is_due(name, now)]
        if due and (reads := self._read(due, now)):
            await asyncio.wait(reads, timeout=PATIENCE)
        return {
            model_id: cached.bytes_per_token
            for model_id, name in names.items()
            if (cached := self._cached.get(name)) is not None and cached.bytes_per_token is not None
        }

    async def learn(self, sample: Sample) -> None:
        """Add the sample of an answer for all workers, and for this one at once.

        It is dropped where Redis is away, or where the same client has given enough of them lately.
        """
        if self._clock() < self._retry_at or self._has_enough(sample):
            return
        try:
            self._cache(sample.model, await self._store.learn(sample))
        except StoreUnavailable:
            self._pause()
        except Exception:  # a bug here affects only the estimates
            log.exception("learning bytes per token broke")
            self._pause()

    async def close(self) -> None:
        """Stop reading. Values in memory stay."""
        self._closed = True
        reads = set(self._reads.values())
        for read in reads:
            read.cancel()
        if reads:
            await asyncio.wait(reads)

    def _has_enough(self, sample: Sample) -> bool:
        """Count a sample. Returns True if its client has given `KEPT_OF_CLIENT` others of its model lately."""
        key, now = (sample.client, sample.model), self._clock()
        count = self._learned.get(key)
        if count is None or now >= count.until:
            self._learned.pop(key, None)
            count = self._learned[key] = _Count(now + LEARN_AGAIN)
            if len(self._learned) > MAX_COUNTED:
                del self._learned[next(iter(self._learned))]
        count.samples += 1
        return count.samples > KEPT_OF_CLIENT

    def _is_due(self, name: str, now: float) -> bool:
        cached = self._cached.get(name)
        return cached is None or now >= cached.fresh_until

    def _read(self, due: Iterable[str], now: float) -> set[asyncio.Task[None]]:
        """Start to read what is due, and return the reads for models that are not in memory."""
        if self._closed or now < self._retry_at:
            return set()
        new = [name for name in dict.fromkeys(due) if name not in self._reads]
        if new and len(set(self._reads.values())) < MAX_READS:
            read = asyncio.create_task(self._load(new), name="bytes per token")
            self._reads.update(dict.fromkeys(new, read))
        return {self._reads[name] for name in due if name in self._reads and name not in self._cached}

    async def _load(self, names: Sequence[str]) -> None:
        try:
            for name, samples in (await self._store.load(names)).items():
                self._cache(name, samples)
        except StoreUnavailable:
            self._pause()
        except Exception:
            log.exception("reading bytes per token broke")
            self._pause()
        finally:
            for name in names:
                del self._reads[name]

    def _cache(self, name: str, samples: Iterable[Sample]) -> None:
        before = self._cached.pop(name, None)
        known = self._estimate(samples)
        if known is None and before is not None:  # Redis has lost the samples; this worker keeps its value
            known = before.bytes_per_token
        self._cached[name] = _Cached(known, self._clock() + FRESH)
        if len(self._cached) > MAX_IN_MEMORY:
            del self._cached[next(iter(self._cached))]

    def _pause(self) -> None:
        self._retry_at = self._clock() + PAUSE
