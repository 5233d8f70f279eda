"""What is measured: the scenarios, and the figures that each of them gives."""

from __future__ import annotations

from typing import Final, NamedTuple

from tests.benchmarks.load import Work
from tests.benchmarks.upstream import Answer


class Scenario(NamedTuple):
    """One kind of load.

    Attributes:
        says: what it is, in a line.
        work: what is asked for.
        shrinks: fewer streams in all mean fewer at a time too.
        streams: whole streams are read; else only /prepare is asked.
        a_session: its CPU is told for a session, and not for a chunk.
        memory: it shows the memory of a stream.
    """

    says: str
    work: Work
    shrinks: bool = True
    streams: bool = True
    a_session: bool = False
    memory: bool = False

    @property
    def paced(self) -> bool:
        """The upstream sets the pace."""
        return self.work.answer.pause > 0

    def smaller(self, streams: int | None, chunks: int | None) -> Scenario:
        """Return the same scenario with another number of streams, or of chunks of each."""
        work = self.work
        if streams is not None:
            at_a_time = streams if self.shrinks else min(work.concurrent, streams)
            ramp = work.ramp * at_a_time / work.concurrent
            work = work._replace(streams=streams, concurrent=at_a_time, ramp=ramp)
        if chunks is not None and self.streams and not self.a_session:
            work = work._replace(answer=work.answer._replace(chunks=chunks))
        return self._replace(work=work)


SCENARIOS: Final = {
    "mod": Scenario("50 streams of 20 chunks/s", Work(Answer(160, 50_000), 50, 50, ramp=1)),
    "load": Scenario("500 streams of 20 chunks/s", Work(Answer(160, 50_000), 500, 500, ramp=2), memory=True),
    "flat": Scenario(
        "50 streams at a time, as fast as they go", Work(Answer(500), 400, 50, timed=False), shrinks=False
    ),
    "idle": Scenario(
        "3,000 streams of a chunk every 2 s", Work(Answer(12, 2_000_000), 3000, 3000, ramp=15), memory=True
    ),
    "prepare": Scenario(
        "/prepare alone, 50 at a time", Work(Answer(1), 8000, 50), shrinks=False, streams=False
    ),
    "session": Scenario(
        "sessions of one chunk, 20 at a time", Work(Answer(1), 3000, 20), shrinks=False, a_session=True
    ),
}


class Figure(NamedTuple):
    """One figure of a table.

    Attributes:
        title: in the table, with its unit.
        digits: behind the point.
        difference: it is a difference of two measurements, which may be near zero, so that a ratio says nothing.
    """

    title: str
    digits: int = 1
    difference: bool = False


FIGURES: Final = {
    "chunks_per_s": Figure("chunks/s", 0),
    "prepares_per_s": Figure("prepares/s", 0),
    "sessions_per_s": Figure("sessions/s", 0),
    "cpu_chunk_us": Figure("CPU a chunk, whole, µs"),
    "cpu_chunk_steady_us": Figure("CPU a chunk, steady, µs"),
    "cpu_prepare_us": Figure("CPU a /prepare, µs", 0),
    "cpu_session_us": Figure("CPU a session, µs", 0),
    "redis_chunk_us": Figure("CPU of Redis a chunk, µs"),
    "redis_session_us": Figure("CPU of Redis a session, µs", 0),
    "latency_p50_ms": Figure("added latency p50, ms", 2, difference=True),
    "latency_p99_ms": Figure("added latency p99, ms", 2, difference=True),
    "gap_p50_ms": Figure("added gap between chunks p50, ms", 2, difference=True),
    "gap_p99_ms": Figure("added gap between chunks p99, ms", 2, difference=True),
    "first_p50_ms": Figure("added time to first chunk p50, ms", 2, difference=True),
    "prepare_p50_ms": Figure("/prepare answered p50, ms", 2),
    "memory_stream_kib": Figure("memory a stream, KiB"),
    "broker_busy": Figure("broker's core busy, %", 0),
    "busiest_share": Figure("the busier worker's share of their CPU, %", 0),
    "load_busy": Figure("load's core busy, %", 0),
    "upstream_busy": Figure("upstream's core busy, %", 0),
}
