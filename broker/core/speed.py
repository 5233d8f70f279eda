"""Learn how many tokens a model writes in a second, from complete answers. No I/O.

Some models write for minutes without showing it. When such an answer is left early, its duration is the only sign of
how much was written. As with bytes per token, all samples of one client make one estimate, their median, and the
median of the estimates decides. So neither one unusual answer nor one unusual client decides.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING, Any

from broker.core.bytes_per_token import Sample, without_variant
from broker.core.pricing import completion_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ENOUGH = 3
"""Samples that are needed for an estimate of one client, and for a result."""

LEAST, MOST = 0.5, 3000.0
"""Bounds of a sample in tokens per second: a model on a slow machine, and the fastest known service."""

MIN_TOKENS = 16
MIN_SECONDS = 0.1
"""Shorter answers measure the connection more than the model, and answers from a cache come at once."""


def speed_of(
    *, model: str, client: str, usage: Mapping[str, Any] | None, seconds: float | None
) -> Sample | None:
    """Return the sample that a complete answer gives; None where it gives none.

    Args:
        model: the model that was asked first.
        client: the client.
        usage: the final usage of the upstream.
        seconds: from the request to the end.
    """
    written = completion_of(usage) if usage else None
    if written is None or written < MIN_TOKENS or seconds is None or seconds < MIN_SECONDS:
        return None
    return Sample(without_variant(model), client, min(MOST, max(LEAST, written / seconds)))


def estimate_speed(samples: Iterable[Sample]) -> float | None:
    """Return tokens per second for the model of these samples; None while there are too few."""
    by_client: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        by_client[sample.client].append(sample.value)
    estimates = [median(values) for values in by_client.values() if len(values) >= ENOUGH]
    others = [value for values in by_client.values() if len(values) < ENOUGH for value in values]
    if len(others) >= ENOUGH:
        estimates.append(median(others))
    return median(estimates) if estimates else None
