"""How many tokens a model writes in a second, learned from answers that came whole. No I/O.

Some models write for minutes what they do not show. Where such an answer is left early, the time that it took is all
that tells how much was written. As with bytes per token, the samples of one client are one voice, their median, and
the voice in the middle is believed, so that neither one odd answer nor one odd client decides.
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
"""Samples without which nothing is believed, and that make a client's own voice."""

LEAST, MOST = 0.5, 3000.0
"""Bounds of a sample, tokens a second: a model on a slow machine, and the fastest service that is known."""

MIN_TOKENS = 16
MIN_SECONDS = 0.1
"""An answer that is shorter tells of the line more than of the model; one from a cache comes at once."""


def speed_of(
    *, model: str, client: str, usage: Mapping[str, Any] | None, seconds: float | None
) -> Sample | None:
    """What a whole answer teaches of its model's speed; None for nothing.

    Args:
        model: the one that was asked first.
        client: who asked.
        usage: the upstream's final one.
        seconds: from the request to the end.
    """
    written = completion_of(usage) if usage else None
    if written is None or written < MIN_TOKENS or seconds is None or seconds < MIN_SECONDS:
        return None
    return Sample(without_variant(model), client, min(MOST, max(LEAST, written / seconds)))


def estimate_speed(samples: Iterable[Sample]) -> float | None:
    """Tokens a second of the model that these samples are of; None while there are too few."""
    by_client: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        by_client[sample.client].append(sample.value)
    voices = [median(values) for values in by_client.values() if len(values) >= ENOUGH]
    others = [value for values in by_client.values() if len(values) < ENOUGH for value in values]
    if len(others) >= ENOUGH:
        voices.append(median(others))
    return median(voices) if voices else None
