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

RUNNING = "broker_sessions_running"
VIEWERS = "broker_viewers"
ENDED = "broker_sessions_total"
REFUSED = "broker_refused_total"
CHUNKS = "broker_chunks_total"
FIRST_CHUNK = "broker_time_to_first_chunk_seconds_bucket"

MAX_TEXT = 256 * 1024
MAX_LINE = 1024
"""Maximum characters of the lines that are parsed, and of one of them: the parser of the library takes up to 1 µs for a
character, and for a line of many labels the square of its length. Those of a broker have some thousands together."""

_NAMES = (RUNNING, VIEWERS, ENDED, REFUSED, CHUNKS, FIRST_CHUNK)


class NotMetricsError(ValueError):
    """The text is not that of a broker's metrics. The text of the error says why, as a part of a sentence."""


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
        if self.began_after(before):
            return self
        return Scrape(
            self.running,
            self.viewers,
            _added(self.ended, before.ended),
            _added(self.refused, before.refused),
            self.chunks - before.chunks,
            _added(self.first_chunk, before.first_chunk),
        )

    def began_after(self, before: Scrape) -> bool:
        """Return True if the broker has started again since an earlier scrape: any of its counters is lower."""
        return (
            self.chunks < before.chunks
            or _any_lower(self.ended, before.ended)
            or _any_lower(self.refused, before.refused)
            or _any_lower(self.first_chunk, before.first_chunk)
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
    for sample in _samples(text):
        if not 0 <= sample.value < math.inf:  # also false for NaN
            raise NotMetricsError(f"the value of {sample.name} is not a count")
        samples[sample.name].append(sample)
    if RUNNING not in samples:
        raise NotMetricsError("they are not those of a session broker")
    first_chunk = {_bound(le): count for (le,), count in _by(samples[FIRST_CHUNK], "le").items()}
    return Scrape(
        running=round(_sum(samples[RUNNING])),
        viewers=round(_sum(samples[VIEWERS])) if samples[VIEWERS] else None,
        ended={(state, code): count for (state, code), count in _by(samples[ENDED], "state", "code").items()},
        refused={code: count for (code,), count in _by(samples[REFUSED], "code").items()},
        chunks=_sum(samples[CHUNKS]),
        first_chunk=first_chunk,
    )


def _samples(text: str) -> Iterator[Sample]:
    # Without the lines on types, the library returns each sample under the name that it has in the text.
    lines = [line for line in text.split("\n") if line.startswith(_NAMES)]
    wanted = "\n".join(lines)
    if len(wanted) > MAX_TEXT or max(map(len, lines), default=0) > MAX_LINE:
        raise NotMetricsError("they are larger than those of any session broker")
    try:
        for family in text_string_to_metric_families(wanted):
            yield from family.samples
    except Exception as error:  # the parser raises whatever it comes upon
        raise NotMetricsError("a line of them is broken") from error


def _bound(le: str) -> float:
    try:
        bound = float(le)
    except ValueError:
        bound = math.nan
    if math.isnan(bound):
        raise NotMetricsError("the bound of a histogram is not a number")
    return bound


def _by(samples: list[Sample], *labels: str) -> dict[tuple[str, ...], float]:
    found: dict[tuple[str, ...], float] = defaultdict(float)
    for sample in samples:
        found[tuple(sample.labels.get(label, "") for label in labels)] += sample.value
    return dict(found)


def _sum(samples: list[Sample]) -> float:
    return sum(sample.value for sample in samples)


def _all_of(buckets: Mapping[float, float]) -> float:
    return max(buckets.values(), default=0.0)


def _any_lower(now: Mapping[_Key, float], before: Mapping[_Key, float]) -> bool:
    return any(now.get(key, 0.0) < count for key, count in before.items())


def _added(now: Mapping[_Key, float], before: Mapping[_Key, float]) -> dict[_Key, float]:
    return {key: count - before.get(key, 0.0) for key, count in now.items()}
