"""What `broker top` reads in the metrics of a broker: counters, and times as histograms. No I/O.

The names are those of `broker/metrics.py`. A metric that a release does not have counts as not known.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from prometheus_client.samples import Sample

_Key = TypeVar("_Key")

FIRST_CHUNK = "broker_time_to_first_chunk_seconds"


class NotMetricsError(ValueError):
    """The text is not that of a broker's metrics."""


@dataclass(frozen=True, slots=True)
class Scrape:
    """The metrics of a broker at one time, or what was added between two times.

    Attributes:
        running: sessions that run; None if not known.
        viewers: streams that are open; None if not known.
        ended: sessions that have ended, by state and code of the error.
        refused: requests that were refused, by code.
        chunks: chunks of sessions that have ended.
        first_chunk: times to the first chunk: for each upper bound in seconds the number of times up to it.
    """

    running: int | None = None
    viewers: int | None = None
    ended: Mapping[tuple[str, str], float] = field(default_factory=dict)
    refused: Mapping[str, float] = field(default_factory=dict)
    chunks: float = 0.0
    first_chunk: Mapping[float, float] = field(default_factory=dict)

    def since(self, before: Scrape) -> Scrape:
        """Return what was added since an earlier scrape; all of it if the broker has started again in between."""
        if self.total < before.total or _all_of(self.first_chunk) < _all_of(before.first_chunk):
            return self
        return Scrape(
            self.running,
            self.viewers,
            _added(self.ended, before.ended),
            _added(self.refused, before.refused),
            self.chunks - before.chunks,
            _added(self.first_chunk, before.first_chunk),
        )

    @property
    def total(self) -> float:
        """The sessions that have ended."""
        return sum(self.ended.values())

    def errors(self) -> dict[str, float]:
        """Return the errors that ended sessions by their codes, the most frequent first."""
        found: dict[str, float] = defaultdict(float)
        for (_, code), count in self.ended.items():
            if code and count > 0:
                found[code] += count
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def quantile(self, share: float) -> float | None:
        """Return the seconds within which this share of the first chunks came; None if there were none.

        It is interpolated within its bucket, as Prometheus' `histogram_quantile` does. Beyond the last bound it is
        infinite.
        """
        wanted = share * _all_of(self.first_chunk)
        if wanted <= 0:
            return None
        lower = below = 0.0
        for bound, count in sorted(self.first_chunk.items()):
            if count >= wanted:
                return (
                    bound
                    if math.isinf(bound)
                    else lower + (bound - lower) * (wanted - below) / (count - below)
                )
            lower, below = bound, count
        return math.inf


def parse(text: str) -> Scrape:
    """Return what is in the text of /metrics.

    Raises:
        NotMetricsError: it is not the text of a broker's metrics.
    """
    samples: dict[str, list[Sample]] = defaultdict(list)
    try:
        for sample in _samples(text):
            samples[sample.name].append(sample)
    except ValueError as error:
        raise NotMetricsError from error
    if "broker_sessions_running" not in samples:
        raise NotMetricsError
    return Scrape(
        running=round(_sum(samples["broker_sessions_running"])),
        viewers=round(_sum(samples["broker_viewers"])) if samples["broker_viewers"] else None,
        ended={
            (state, code): count
            for (state, code), count in _by(samples["broker_sessions_total"], "state", "code").items()
        },
        refused={code: count for (code,), count in _by(samples["broker_refused_total"], "code").items()},
        chunks=_sum(samples["broker_chunks_total"]),
        first_chunk={
            float(bound): count for (bound,), count in _by(samples[f"{FIRST_CHUNK}_bucket"], "le").items()
        },
    )


def _samples(text: str) -> Iterator[Sample]:
    for family in text_string_to_metric_families(text):
        yield from family.samples


def _by(samples: list[Sample], *labels: str) -> dict[tuple[str, ...], float]:
    found: dict[tuple[str, ...], float] = defaultdict(float)
    for sample in samples:
        found[tuple(sample.labels.get(label, "") for label in labels)] += sample.value
    return dict(found)


def _sum(samples: list[Sample]) -> float:
    return sum(sample.value for sample in samples)


def _all_of(buckets: Mapping[float, float]) -> float:
    return max(buckets.values(), default=0.0)


def _added(now: Mapping[_Key, float], before: Mapping[_Key, float]) -> dict[_Key, float]:
    return {key: count - before.get(key, 0.0) for key, count in now.items()}
