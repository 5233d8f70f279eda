"""The metrics of several workers of a host, added up."""

from __future__ import annotations

import asyncio
import fcntl
import multiprocessing
import os
import signal
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from structlog.testing import capture_logs

from broker.app import _sharing
from broker.metrics import Metrics
from broker.metrics_directory import MetricsDirectory, _dump, add_up


class Worker:
    """Some metrics of each kind."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.done = Counter("sessions", "Ended.", ["state"], registry=self.registry)
        self.running = Gauge("running", "Now.", registry=self.registry)
        self.lag = Gauge("broker_journal_lag_seconds", "Now.", registry=self.registry)
        self.seconds = Histogram("seconds", "Took.", buckets=(1, 2), registry=self.registry)

    def families(self) -> list[Metric]:
        families = list(self.registry.collect())
        for family in families:
            family.samples = [each for each in family.samples if not each.name.endswith("_created")]
        return families


def values(families: list[Metric]) -> dict[str, float]:
    found = {}
    for family in families:
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def worked(done: Mapping[str, int], running: int, lag: float, *seconds: float) -> Worker:
    worker = Worker()
    for state, times in done.items():
        worker.done.labels(state).inc(times)
    worker.running.set(running)
    worker.lag.set(lag)
    for each in seconds:
        worker.seconds.observe(each)
    return worker


def names_in(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


ONE = {"done": 2, "failed": 1}, 3, 0.5, 0.5, 1.5
OTHER = {"done": 5, "lost": 1}, 4, 0.2, 1.5, 9
COUNTERS = {
    "sessions_total{state=done}": 7,
    "sessions_total{state=failed}": 1,
    "sessions_total{state=lost}": 1,
}
HISTOGRAM = {
    "seconds_bucket{le=1.0}": 1,
    "seconds_bucket{le=2.0}": 3,
    "seconds_bucket{le=+Inf}": 4,
    "seconds_count": 4,
    "seconds_sum": 12.5,
}


def test_counters_and_histograms_and_gauges_are_added_up() -> None:
    total = values(add_up([worked(*ONE).families(), worked(*OTHER).families()]))
    assert total == {**COUNTERS, **HISTOGRAM, "running": 7, "broker_journal_lag_seconds": 0.5}


def test_one_worker_alone_has_its_own_values() -> None:
    families = worked(*ONE).families()
    assert values(add_up([families])) == values(families)


async def test_any_worker_answers_for_all_of_them(tmp_path: Path) -> None:
    one, other = MetricsDirectory(tmp_path, "one"), MetricsDirectory(tmp_path, "other")
    await one.write(worked(*ONE).families())
    await other.write(worked(*OTHER).families())
    for directory, own in ((one, worked(*ONE)), (other, worked(*OTHER))):
        assert values(await directory.with_others(own.families()))["running"] == 7


async def test_a_worker_that_has_ended_leaves_its_counters(tmp_path: Path) -> None:
    one, other = MetricsDirectory(tmp_path, "one"), MetricsDirectory(tmp_path, "other")
    await other.write(worked(*OTHER).families())
    other.close()
    total = values(await one.with_others(worked(*ONE).families()))
    assert total == {**COUNTERS, **HISTOGRAM, "running": 3, "broker_journal_lag_seconds": 0.5}


async def test_many_restarts_leave_one_file(tmp_path: Path) -> None:
    for n in range(20):
        directory = MetricsDirectory(tmp_path, f"worker-{n}")
        await directory.write(worked({"done": 1}, 1, 1.0, 0.5).families())
        directory.close()
    last = MetricsDirectory(tmp_path, "last")
    assert names_in(tmp_path) == ["last.lock", "sum", "sum.lock"]
    total = values(await last.with_others(worked({"done": 1}, 1, 0.0).families()))
    assert total["sessions_total{state=done}"] == 21
    assert total["seconds_count"] == 20
    assert total["running"] == 1


async def test_a_reader_between_two_steps_counts_nobody_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = MetricsDirectory(tmp_path, "reader")
    ended = MetricsDirectory(tmp_path, "ended")
    await ended.write(worked({"done": 5}, 1, 1.0).families())
    ended.close()
    read = MetricsDirectory._read

    def read_and_be_overtaken(self: MetricsDirectory, name: str) -> list[Metric]:
        found = read(self, name)
        monkeypatch.undo()
        MetricsDirectory(tmp_path, "new").close()  # adds up what has ended
        return found

    monkeypatch.setattr(MetricsDirectory, "_read", read_and_be_overtaken)
    total = values(await reader.with_others([]))
    assert total["sessions_total{state=done}"] == 5
    assert values(await reader.with_others([]))["sessions_total{state=done}"] == 5


async def test_half_a_file_is_never_read(tmp_path: Path) -> None:
    one, other = MetricsDirectory(tmp_path, "one"), MetricsDirectory(tmp_path, "other")
    families = worked(*OTHER).families()
    await other.write(families)

    async def write_on() -> None:
        for _ in range(200):
            await other.write(families)

    writing = asyncio.create_task(write_on())
    while not writing.done():
        assert values(await one.with_others([]))["seconds_count"] == 2
    await writing


async def test_a_late_write_does_not_replace_newer_values(tmp_path: Path) -> None:
    one, other = MetricsDirectory(tmp_path, "one"), MetricsDirectory(tmp_path, "other")
    one._write(2, _dump(worked({"done": 2}, 1, 0.0).families()))
    one._write(1, _dump(worked({"done": 1}, 1, 0.0).families()))
    assert values(await other.with_others([]))["sessions_total{state=done}"] == 2
    assert names_in(tmp_path) == ["one.json", "one.lock", "other.lock", "sum.lock"]


async def test_each_write_replaces_the_one_before(tmp_path: Path) -> None:
    one, other = MetricsDirectory(tmp_path, "one"), MetricsDirectory(tmp_path, "other")
    for times in (1, 2):
        await one.write(worked({"done": times}, 1, 0.0).families())
        assert values(await other.with_others([]))["sessions_total{state=done}"] == times


async def test_a_failed_write_is_a_warning_and_the_next_one_counts(tmp_path: Path) -> None:
    one, other = MetricsDirectory(tmp_path, "one"), MetricsDirectory(tmp_path, "other")
    in_the_way = tmp_path / "one.json"
    in_the_way.mkdir()
    with capture_logs() as lines:
        await one.write(worked(*ONE).families())
    assert [line["log_level"] for line in lines] == ["warning"]
    in_the_way.rmdir()
    await one.write(worked(*ONE).families())
    assert values(await other.with_others([]))["running"] == 3


async def test_a_worker_that_cannot_write_at_its_end_has_ended(tmp_path: Path) -> None:
    (tmp_path / "one.json").mkdir()
    async with _sharing(Metrics(), tmp_path, "one"):
        assert not lock_is_free(tmp_path / "one.lock")
    assert lock_is_free(tmp_path / "one.lock")


async def test_a_worker_starts_without_its_metrics_directory(tmp_path: Path) -> None:
    metrics = Metrics()
    with capture_logs() as lines:
        async with _sharing(metrics, tmp_path / "missing", "one"):
            assert b"broker_chunks_total" in await metrics.text_of_host()
    assert [line["log_level"] for line in lines] == ["warning"]


def lock_is_free(path: Path) -> bool:
    with path.open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def work(path: Path, to_parent: Connection) -> None:
    """A worker in a process of its own, until it is killed."""

    async def run() -> None:
        directory = MetricsDirectory(path, f"process-{os.getpid()}")
        families = worked(*OTHER).families()
        await directory.write(families)
        to_parent.send("written")
        await directory.run(lambda: families)

    asyncio.run(run())


@pytest.mark.slow
async def test_a_killed_process_leaves_its_counters_and_no_gauges(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(tmp_path, there), daemon=True)
    process.start()
    try:
        assert await asyncio.to_thread(here.poll, 60)
        directory = MetricsDirectory(tmp_path, "survivor")
        own = worked(*ONE).families()
        assert values(await directory.with_others(own))["running"] == 7
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        await asyncio.to_thread(process.join, 60)
        assert values(await directory.with_others(own)) == {
            **COUNTERS,
            **HISTOGRAM,
            "running": 3,
            "broker_journal_lag_seconds": 0.5,
        }
    finally:
        process.kill()
        process.join()
