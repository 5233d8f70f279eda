"""Each model's bytes per token as this worker knows it: from memory, which is read again from Redis now and then.

It joins the rule (`core`) and the samples (`store`). Nothing here fails: with Redis away it tells what is in memory,
and of the rest nothing, for which the default stands.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NamedTuple

import structlog

from broker.core.bytes_per_token import Sample, estimate, without_variant
from broker.core.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from broker.store.bytes_per_token import BytesPerTokenStore

FRESH = 10.0
"""Seconds after which what is in memory is read again, while it is used."""

PATIENCE = 0.05
"""Seconds that is waited for a model that is not in memory."""

PAUSE = 5.0
"""Seconds without any try after Redis has failed."""

MAX_IN_MEMORY = 1000
"""Models in memory; beyond it, the one goes that was read or taught longest ago."""

MAX_READS = 8
"""Reads at once; one that would be more is left for the next time that a model is asked for."""

log = structlog.get_logger(__name__)


class _Held(NamedTuple):
    """Bytes per token, None where too little is known, and until when that need not be read again."""

    bytes_per_token: float | None
    fresh_until: float


class BytesPerToken:
    """The bytes per token of one upstream's models.

    Args:
        store: the samples in Redis.
        estimate: what samples say together; bytes per token unless told otherwise.
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
        self._held: dict[str, _Held] = {}
        self._reads: dict[str, asyncio.Task[None]] = {}
        self._retry_at = 0.0
        self._closed = False

    async def of(self, model_ids: Iterable[str]) -> dict[str, float]:
        """Bytes per token, by the ids as they are given; those are missing of which too little is known.

        From memory, however old: what is due is read in the background. Only for a model that is not in memory is
        waited, ``PATIENCE`` seconds at most, and not at all for a while after Redis has failed.
        """
        names = {model_id: without_variant(model_id) for model_id in model_ids}
        now = self._clock()
        due = [name for name in names.values() if self._is_due(name, now)]
        if due and (reads := self._read(due, now)):
            await asyncio.wait(reads, timeout=PATIENCE)
        return {
            model_id: held.bytes_per_token
            for model_id, name in names.items()
            if (held := self._held.get(name)) is not None and held.bytes_per_token is not None
        }

    async def learn(self, sample: Sample) -> None:
        """Take in what an answer taught, for all workers, and for this one at once. Lost where Redis is away."""
        if self._clock() < self._retry_at:
            return
        try:
            self._hold(sample.model, await self._store.learn(sample))
        except StoreUnavailable:
            self._pause()
        except Exception:  # a bug here costs nobody but the estimates
            log.exception("learning bytes per token broke")
            self._pause()

    async def close(self) -> None:
        """Stop reading. What is in memory stays."""
        self._closed = True
        reads = set(self._reads.values())
        for read in reads:
            read.cancel()
        if reads:
            await asyncio.wait(reads)

    def _is_due(self, name: str, now: float) -> bool:
        held = self._held.get(name)
        return held is None or now >= held.fresh_until

    def _read(self, due: Iterable[str], now: float) -> set[asyncio.Task[None]]:
        """Begin to read what is due, and return those reads that bring what is not in memory yet."""
        if self._closed or now < self._retry_at:
            return set()
        new = [name for name in dict.fromkeys(due) if name not in self._reads]
        if new and len(set(self._reads.values())) < MAX_READS:
            read = asyncio.create_task(self._load(new), name="bytes per token")
            self._reads.update(dict.fromkeys(new, read))
        return {self._reads[name] for name in due if name in self._reads and name not in self._held}

    async def _load(self, names: Sequence[str]) -> None:
        try:
            for name, samples in (await self._store.load(names)).items():
                self._hold(name, samples)
        except StoreUnavailable:
            self._pause()
        except Exception:
            log.exception("reading bytes per token broke")
            self._pause()
        finally:
            for name in names:
                del self._reads[name]

    def _hold(self, name: str, samples: Iterable[Sample]) -> None:
        before = self._held.pop(name, None)
        known = self._estimate(samples)
        if known is None and before is not None:  # Redis has lost what it knew; this worker need not
            known = before.bytes_per_token
        self._held[name] = _Held(known, self._clock() + FRESH)
        if len(self._held) > MAX_IN_MEMORY:
            del self._held[next(iter(self._held))]

    def _pause(self) -> None:
        self._retry_at = self._clock() + PAUSE
