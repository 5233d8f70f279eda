"""What was learned of each model's bytes per token and tokens a second, in Redis, for all workers of one upstream.

Two keys an upstream: the samples by model, and the models by the time of their last sample, by which those that nobody
uses any more go. What the samples say together is not known here.
"""

from __future__ import annotations

import asyncio
from hashlib import blake2b, sha256
from typing import TYPE_CHECKING, Any

from broker.core.bytes_per_token import Sample
from broker.store.connection import CALL_TIMEOUT, Store, store_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

KEPT_OF_MODEL = 96
KEPT_OF_CLIENT = 24
"""Samples kept of a model, and of one client among them: however many it sends, three quarters are others'."""

MAX_MODELS = 1000
"""Models kept; beyond it, the one goes that was not heard of for longest. Some 2 KB each at most."""

TTL = 30 * 24 * 3600
"""Seconds that a model is kept after its last sample."""


class BytesPerTokenStore:
    """The samples of one upstream's models. Every method raises `StoreUnavailable` where Redis cannot be reached.

    Args:
        store: the connection.
        upstream_url: the upstream's base URL; the same name may be another model elsewhere.
        kind: what the samples are of; a word for the keys.
    """

    def __init__(self, store: Store, upstream_url: str, kind: str = "density") -> None:
        upstream = sha256(upstream_url.rstrip("/").encode()).hexdigest()[:16]
        self._store = store
        self._samples_key = f"{store.prefix}:{kind}:{{{upstream}}}:samples"
        self._heard_key = f"{store.prefix}:{kind}:{{{upstream}}}:heard"
        limits = {
            "MAX_SAMPLES": KEPT_OF_MODEL,
            "MAX_SAMPLES_OF_CLIENT": KEPT_OF_CLIENT,
            "MAX_MODELS": MAX_MODELS,
            "MODEL_S": TTL,
        }
        self._learn = store.script("learn", limits)

    async def learn(self, sample: Sample) -> list[Sample]:
        """Keep one more sample, and return all that are now kept of its model."""
        client = blake2b(sample.client.encode(errors="replace"), digest_size=5).hexdigest()
        reply: bytes = await self._learn(
            samples=self._samples_key,
            heard=self._heard_key,
            model=sample.model,
            client=client,
            value=f"{sample.value:.3f}",
        )
        return _read(sample.model, reply)

    async def load(self, models: Sequence[str]) -> dict[str, list[Sample]]:
        """The samples of these models, the newest first; none of those that nothing is known of."""
        with store_errors():
            async with asyncio.timeout(CALL_TIMEOUT):
                kept: Any = await self._store.redis.hmget(self._samples_key, list(models))
        return {model: _read(model, samples or b"") for model, samples in zip(models, kept, strict=True)}


def _read(model: str, samples: bytes) -> list[Sample]:
    """Read 'client:value' words."""
    pairs = (word.partition(":") for word in samples.decode().split())
    return [Sample(model, client, float(value)) for client, _, value in pairs]
