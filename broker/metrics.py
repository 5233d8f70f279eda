"""The metrics of one broker, as Prometheus reads them at `/metrics`. Each is defined here, once.

Every broker has a registry of its own, because several can run in one process. Rare events are counted by the library
when they happen. What happens at every chunk is counted by plain integers, which are read at each scrape. Labels have
few values: no client, session or model is one.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from broker.core.pricing import to_usd
from broker.core.session import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence, Sized

    from prometheus_client.metrics_core import Metric

    from broker.core.accounts import Quotas
    from broker.core.session_report import SessionReport
    from broker.metrics_directory import MetricsDirectory
    from broker.relay.worker import Worker
    from broker.store.connection import Store
    from broker.store.sessions import SessionStore
    from broker.upstream.client import UpstreamClient

FIRST_CHUNK = (0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120)
CHUNK_GAP = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
SESSION = (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
QUICK = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 1.0)
LAG = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
CANCEL = (0.005, 0.01, 0.05, 0.1, 0.3, 1, 3)
"""Upper bounds of histograms, in seconds."""

# Series that alerts and sums look at are there from the start: Prometheus sees no increase from nothing to 1.
_ENDS = ((State.DONE, ""), (State.LOST, "worker_lost"), (State.FAILED, "internal_error"))
_REFUSALS = ("internal_error", "overloaded")
_DIRECTIONS = ("in", "out")
_TOKEN_KINDS = ("prompt", "completion")
_RESUMES = ("here", "elsewhere", "ended", "expired", "refused")
_STATUSES = dict.fromkeys(("200", "none", "401", "402"), 0)


class PlainHistogram:
    """A histogram of plain integers, for values that come at every read or request: a tenth of the library's cost.

    Args:
        bounds: upper bounds of its buckets.
    """

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Return the buckets as Prometheus has them, each with all smaller values, and the sum of the values."""
        total, buckets = 0, []
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((str(bound), float(total)))
        return buckets, self._sum


class Metrics:
    """The metrics of one broker.

    Attributes:
        registry: has all metrics of this broker and no others.
        gaps: seconds between two reads of an answer.
        directory: has those of the other workers of this host; None where this is the only one.
    """

    def __init__(self) -> None:
        self.directory: MetricsDirectory | None = None
        self.registry = CollectorRegistry()
        self.gaps = PlainHistogram(CHUNK_GAP)
        self._redis: dict[str, PlainHistogram] = {}
        counter = partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self._sessions = counter(
            "broker_sessions", "Sessions that ended, by state and error.", ["state", "code"]
        )
        self._first_chunk = histogram(
            "broker_time_to_first_chunk_seconds",
            "From the claim of a session to its first chunk.",
            buckets=FIRST_CHUNK,
        )
        self._session = histogram(
            "broker_session_seconds", "From the claim of a session to its end.", buckets=SESSION
        )
        self._chunks = counter("broker_chunks", "Chunks of sessions that ended.")
        self._bytes = counter(
            "broker_bytes",
            "Bytes of chunks of ended sessions (in), and of closed streams to pages (out).",
            ["direction"],
        )
        self._tokens = counter("broker_tokens", "Tokens as booked at the end of sessions.", ["kind"])
        self._cost = counter("broker_cost_usd", "USD as booked at the end of sessions, where known.")
        self._abandoned = counter("broker_abandoned", "Sessions that ended because nobody watched.")
        self._retries = counter("broker_upstream_retries", "Requests that were sent again.")
        self._resumes = counter(
            "broker_resumes", "Streams asked for with a cursor, by what was found.", ["result"]
        )
        self._cancels = counter("broker_cancels", "Cancels that were accepted.")
        self._cancel = histogram(
            "broker_cancel_seconds", "From a request to cancel to its answer.", buckets=CANCEL
        )
        self._refused = counter(
            "broker_refused", "Requests and streams that were refused, by code.", ["code"]
        )
        self._lag = histogram(
            "broker_event_loop_lag_seconds",
            "How much later than wanted a timer of the event loop ran.",
            buckets=LAG,
        )
        for state, code in _ENDS:
            self._sessions.labels(state.value, code)
        for code in _REFUSALS:
            self._refused.labels(code)
        # Those of every session are looked up once: the library takes a lock and reads the labels each time.
        self._bytes_in, self._bytes_out = [self._bytes.labels(direction) for direction in _DIRECTIONS]
        self._prompt_tokens, self._completion_tokens = [self._tokens.labels(kind) for kind in _TOKEN_KINDS]
        self._done = self._sessions.labels(State.DONE.value, "")
        for result in _RESUMES:
            self._resumes.labels(result)

    def session_ended(self, report: SessionReport) -> None:
        """Count a session that ended."""
        if report.state is State.DONE and not report.code:
            self._done.inc()
        else:
            self._sessions.labels(report.state.value, report.code or "").inc()
        self._chunks.inc(report.chunks)
        self._bytes_in.inc(report.bytes)
        self._prompt_tokens.inc(report.prompt_tokens or 0)
        self._completion_tokens.inc(report.completion_tokens or 0)
        self._cost.inc(max(0.0, report.cost or 0.0))
        if report.retries:
            self._retries.inc(report.retries)
        if report.ttft_ms is not None:
            self._first_chunk.observe(report.ttft_ms / 1000)
        if report.duration_ms is not None:
            self._session.observe(report.duration_ms / 1000)
        if report.state is State.ABANDONED:
            self._abandoned.inc()

    def stream_closed(self, size: int) -> None:
        """Count the bytes of a stream to a page."""
        self._bytes_out.inc(size)

    def resumed(self, result: str) -> None:
        """Count a stream that was asked for with a cursor."""
        self._resumes.labels(result).inc()

    def cancelled(self, seconds: float, *, accepted: bool) -> None:
        """Count a request to cancel."""
        self._cancel.observe(seconds)
        if accepted:
            self._cancels.inc()

    def refused(self, code: str) -> None:
        """Count a refusal."""
        self._refused.labels(code).inc()

    def asked_redis(self, script: str, seconds: float) -> None:
        """Count a round trip to Redis."""
        of_script = self._redis.get(script)
        if of_script is None:
            of_script = self._redis[script] = PlainHistogram(QUICK)
        of_script.observe(seconds)

    def loop_lagged(self, seconds: float) -> None:
        """Count a delay of the event loop."""
        self._lag.observe(seconds)

    def watch(
        self,
        worker: Worker,
        sessions: SessionStore,
        store: Store,
        upstream: UpstreamClient,
        waiting: Sized,
        quotas: Quotas,
    ) -> None:
        """Read the values of these parts at every scrape."""
        read = partial(_values_of, worker, sessions, store, upstream, waiting, quotas)
        self.registry.register(_Collected(lambda: (*read(), *self._plain_histograms())))

    def _plain_histograms(self) -> Iterator[Metric]:
        buckets, total = self.gaps.buckets()
        yield HistogramMetricFamily(
            "broker_chunk_gap_seconds",
            "Between two reads of chunks of one answer.",
            buckets=buckets,
            sum_value=total,
        )
        trips = HistogramMetricFamily(
            "broker_redis_seconds", "Round trips to Redis, by the scripts in them.", labels=["script"]
        )
        for script, seconds in self._redis.items():
            buckets, total = seconds.buckets()
            trips.add_metric([script], buckets, total)
        yield trips

    def families(self) -> list[Metric]:
        """Return all metrics of this broker, without the times at which their series began, which double them."""
        families = list(self.registry.collect())
        for family in families:
            family.samples = [each for each in family.samples if not each.name.endswith("_created")]
        return families

    def text(self) -> bytes:
        """Return all metrics of this broker in Prometheus' text format."""
        return generate_latest(_Collected(self.families))

    async def text_of_host(self) -> bytes:
        """Return the metrics of this broker and of all other workers of this host."""
        if self.directory is None:
            return self.text()
        families = await self.directory.with_others(self.families())
        return generate_latest(_Collected(lambda: families))


class _Collected(Collector):
    """Metrics that a function returns.

    Args:
        read: is called at every scrape.
    """

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the registry need not read the values to know the names."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of now."""
        return self._read()


def _values_of(
    worker: Worker,
    sessions: SessionStore,
    store: Store,
    upstream: UpstreamClient,
    waiting: Sized,
    quotas: Quotas,
) -> Iterator[Metric]:
    """Yield what the parts of a broker count themselves."""
    gauges = (
        ("broker_sessions_running", "Sessions that run here.", len(worker.running)),
        ("broker_sessions_limit", "Sessions that may run here.", worker.config.max_streams),
        (
            "broker_daily_cost_limit_usd",
            "The budget of a day for all clients together; 0 for none.",
            to_usd(quotas.total_daily_cost),
        ),
        ("broker_viewers", "Streams that are open to pages.", len(worker.viewers)),
        ("broker_queued", "Pages that wait in line for a slot.", len(waiting)),
        (
            "broker_journal_lag_seconds",
            "How long the oldest journal with unwritten events has waited for Redis.",
            worker.journal.lag(),
        ),
        (
            "broker_journal_bytes",
            "Bytes of events in memory, which Redis may lack.",
            worker.journal.pending_bytes(),
        ),
    )
    counters = (
        ("broker_leases_lost", "Sessions that were taken from this worker.", worker.leases_lost),
        (
            "broker_claims_unconfirmed",
            "Claims that not enough replicas of Redis confirmed in time.",
            sessions.claims_unconfirmed,
        ),
        ("broker_redis_errors", "Calls that Redis refused or did not answer in time.", store.errors),
    )
    for name, text, value in gauges:
        yield GaugeMetricFamily(name, text, value=value)
    for name, text, value in counters:
        yield CounterMetricFamily(name, text, value=value)
    requests = CounterMetricFamily(
        "broker_upstream_requests",
        "Requests for answers, by HTTP status; none: no answer.",
        labels=["status"],
    )
    for status, times in (_STATUSES | upstream.statuses).items():
        requests.add_metric([status], times)
    yield requests
