"""Measure one scenario: the same load straight to the upstream and through a fresh broker, one after the other."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.benchmarks import processes
from tests.benchmarks.load import Mode, Outcome, Progress, Work
from tests.benchmarks.processes import Broker, Cores, Cost, Upstream
from tests.benchmarks.scenarios import Scenario
from tests.benchmarks.upstream import Answer

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)
"""Of the curves."""

WARM_UP = Work(Answer(50), 40, 10)
"""Streams through a broker that has just started, before anything of it is measured."""

_SETTLE = 0.5
"""Seconds of rest before and after the streams, and at either end of the steady part."""

_MS = 1_000_000
_US = 1_000_000  # of a second

Curve = dict[str, list[float]]
"""Milliseconds at each of the `PERCENTILES`, of ``latency``, ``gap`` and ``first``."""


@dataclass
class Round:
    """One measurement of one scenario.

    Attributes:
        figures: by the names of `scenarios.FIGURES`; only those that the scenario gives.
        lost: lines on lost streams; empty if there are none.
        direct, broker: the distributions of both.
    """

    figures: dict[str, float]
    lost: list[str] = field(default_factory=list)
    direct: Curve = field(default_factory=dict)
    broker: Curve = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where is measured.

    Attributes:
        redis_url: of the Redis of the broker.
        upstream: the model side.
        cores: of all processes.
        settings: of the broker, in addition.
        load_processes: so many.
    """

    redis_url: str
    upstream: Upstream
    cores: Cores
    settings: dict[str, str]
    load_processes: int


class _Samples:
    """What the broker costs while a load runs."""

    def __init__(self, broker: Broker, tell: Callable[[Progress], None]) -> None:
        self._broker = broker
        self._tell = tell
        self._began: float | None = None
        self._first: tuple[int, Cost] | None = None
        self._last: tuple[int, Cost] | None = None
        self.peak = 0

    def __call__(self, progress: Progress) -> None:
        self._tell(progress)
        if (cost := self._broker.cost()) is None:
            return
        self.peak = max(self.peak, cost.memory)
        if not progress.steady:
            return
        self._began = self._began or time.monotonic()
        if time.monotonic() - self._began < _SETTLE:
            return
        if self._first is None:
            self._first = progress.chunks, cost
        self._last = progress.chunks, cost

    def steady_cpu(self) -> float | None:
        """Seconds of CPU a chunk while all streams ran and none began or ended; None if that was too short."""
        if self._first is None or self._last is None:
            return None
        chunks = self._last[0] - self._first[0]
        return (self._last[1].cpu - self._first[1].cpu) / chunks if chunks else None


def measure(scenario: Scenario, place: Place, tell: Callable[[str, Progress], None]) -> Round:
    """Measure a scenario once.

    Raises:
        BenchmarkError: a process ended before its time.
    """
    result = Round({})
    direct = None
    if scenario.streams:
        direct = _run("direct", place.upstream.port, scenario, place, lambda p: tell("direct", p))
        result.lost += _lost("straight to the upstream", direct)
    processes.empty_redis(place.redis_url)
    with processes.running_broker(
        place.redis_url, place.upstream.port, place.cores, place.settings
    ) as broker:
        warm = processes.run_load("broker", broker.port, WARM_UP, lambda _: None)
        result.lost += _lost("in the warm-up", warm)
        time.sleep(_SETTLE)
        mode: Mode = "broker" if scenario.streams else "prepare"
        samples = _Samples(broker, lambda p: tell("broker", p))
        before, redis_before, upstream_before = _costs(broker, place)
        shares_before = [processes.cost(pid) for pid in broker.workers()]
        through = _run(mode, broker.port, scenario, place, samples)
        time.sleep(_SETTLE)
        broker.check()
        after, redis_after, upstream_after = _costs(broker, place)
        shares = [
            late.cpu - early.cpu
            for pid, early in zip(broker.workers(), shares_before, strict=True)
            if early is not None and (late := processes.cost(pid)) is not None
        ]
    result.lost += _lost("through the broker", through)
    redis_cpu = redis_after - redis_before
    result.figures |= _rates(scenario, through)
    if before and after:
        result.figures |= _cpu(scenario, through, after.cpu - before.cpu, redis_cpu, samples.steady_cpu())
        result.figures["broker_busy"] = 100 * (after.cpu - before.cpu) / through.seconds
        if scenario.memory:
            streams = min(scenario.work.concurrent, scenario.work.streams)
            result.figures["memory_stream_kib"] = (samples.peak - before.memory) / 1024 / streams
    if shares and sum(shares):
        result.figures["busiest_share"] = 100 * max(shares) / sum(shares)
    result.figures["load_busy"] = 100 * through.cpu / through.seconds
    if upstream_before and upstream_after:
        result.figures["upstream_busy"] = 100 * (upstream_after.cpu - upstream_before.cpu) / through.seconds
    if through.prepares:
        result.figures["prepare_p50_ms"] = _quantile(through.prepares, 50)
    if direct is not None:
        result.direct, result.broker = _curves(direct), _curves(through)
        result.figures |= _added(result.direct, result.broker)
    return result


def _run(
    mode: Mode, port: int, scenario: Scenario, place: Place, watch: Callable[[Progress], None]
) -> Outcome:
    return processes.run_load(mode, port, scenario.work, watch, place.load_processes)


def _costs(broker: Broker, place: Place) -> tuple[Cost | None, float, Cost | None]:
    return broker.cost(), processes.redis_cpu(place.redis_url), processes.cost(place.upstream.pid)


def _rates(scenario: Scenario, outcome: Outcome) -> dict[str, float]:
    if not scenario.streams:
        return {"prepares_per_s": outcome.complete / outcome.seconds}
    if scenario.a_session:
        return {"sessions_per_s": outcome.complete / outcome.seconds}
    return {"chunks_per_s": outcome.chunks / outcome.seconds}


def _cpu(
    scenario: Scenario, outcome: Outcome, cpu: float, redis_cpu: float, steady: float | None
) -> dict[str, float]:
    """Microseconds of CPU for what the scenario counts."""
    if not scenario.streams or scenario.a_session:
        of = "session" if scenario.a_session else "prepare"
        sessions = max(1, outcome.complete)
        return {f"cpu_{of}_us": cpu / sessions * _US, "redis_session_us": redis_cpu / sessions * _US}
    chunks = max(1, outcome.chunks)
    found = {"cpu_chunk_us": cpu / chunks * _US, "redis_chunk_us": redis_cpu / chunks * _US}
    if steady is not None and scenario.paced:
        found["cpu_chunk_steady_us"] = steady * _US
    return found


def _curves(outcome: Outcome) -> Curve:
    measured = {"latency": outcome.latencies, "gap": outcome.gaps, "first": outcome.firsts}
    return {name: _quantiles(times) for name, times in measured.items() if times}


def _added(direct: Curve, broker: Curve) -> dict[str, float]:
    found = {}
    for name, percentiles in (("latency", (50, 99)), ("gap", (50, 99)), ("first", (50,))):
        if name in direct and name in broker:
            for percentile in percentiles:
                at = PERCENTILES.index(percentile)
                found[f"{name}_p{percentile}_ms"] = broker[name][at] - direct[name][at]
    return found


def _quantiles(nanoseconds: array[int]) -> list[float]:
    """Milliseconds at each of the `PERCENTILES`."""
    ordered = sorted(nanoseconds)
    return [ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] / _MS for p in PERCENTILES]


def _quantile(nanoseconds: array[int], percentile: float) -> float:
    return _quantiles(nanoseconds)[PERCENTILES.index(percentile)]


def _lost(where: str, outcome: Outcome) -> list[str]:
    reasons = ", ".join(f"{why}: {count}" for why, count in outcome.lost.most_common())
    return [f"{outcome.lost.total()} streams lost {where} ({reasons})"] if outcome.lost else []
