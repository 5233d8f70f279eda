"""Samples of each model's bytes per token or tokens per second, in Redis, for all workers of one upstream.

Each upstream has two keys: the samples by model, and the models by the time of their last sample, by which unused
models are removed. The estimate that is made of the samples is not computed here.
"""

from __future__ import annotations

from hashlib import blake2b, sha256
from typing import TYPE_CHECKING

from broker.core.bytes_per_token import Sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from broker.store.connection import Store

KEPT_OF_MODEL = 96
KEPT_OF_CLIENT = 24
"""Maximum number of samples stored of a model, and of one client among them. One client has a quarter at most."""

MAX_MODELS = 1000
"""Maximum number of models stored, each of 2 KB at most. Beyond it, the one with the oldest last sample is removed."""

TTL = 30 * 24 * 3600
"""Seconds that a model is stored after its last sample."""


class BytesPerTokenStore:
    """Stores the samples of one upstream's models. Every method raises `StoreUnavailable` if Redis cannot be reached.

    Args:
        store: the connection.
        upstream_url: the base URL of the upstream. Two upstreams may use one name for different models.
        kind: the kind of the samples, a word in the names of the keys.
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
        """Store one more sample. Returns all samples of its model that are stored now."""
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
        """Return the samples of these models, the newest first. An unknown model has an empty list."""
        stored = await self._store.command("HMGET", self._samples_key, *models)
        return {model: _read(model, samples or b"") for model, samples in zip(models, stored, strict=True)}


def _read(model: str, samples: bytes) -> list[Sample]:
    """Read 'client:value' words."""
    pairs = (word.partition(":") for word in samples.decode().split())
    return [Sample(model, client, float(value)) for client, _, value in pairs]
