"""Add up the metrics of several workers of one host: each writes its own into a directory, and any of them answers.

A worker writes its values every second, and at its end. Counters and histograms of workers that have ended stay in the
sum; if they were removed, Prometheus would see a restart and count everything again. Gauges count only while their
worker lives: it holds a lock on a file, which the system releases when the worker ends in any way.

The directory belongs to one start of the service, on a local disk. Nothing happens at a chunk.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, NoReturn

import orjson
import structlog
from prometheus_client.metrics_core import Metric

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = structlog.get_logger(__name__)

WRITE_EVERY = 1.0
"""Seconds between two writes, which is how old the values of other workers can be."""

KEPT_NAMES = 1000
"""Names of ended workers that are stored with their sum, for a reader that has just read their files."""

HIGHEST = frozenset({"broker_journal_lag_seconds", "broker_daily_cost_limit_usd"})
"""Gauges of which the highest value counts, and not the sum."""


class MetricsDirectory:
    """The place of one worker in the directory.

    Args:
        path: the directory; it exists.
        worker: the id of this worker.
    """

    def __init__(self, path: Path, worker: str) -> None:
        self._path = path
        self._worker = worker
        self._numbers = count(1)
        self._replacing = threading.Lock()
        self._newest = 0
        self._lock = _open(path / f"{worker}.lock")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._add_up_ended()

    async def run(self, families: Callable[[], Iterable[Metric]]) -> NoReturn:
        """Write the metrics of this worker every second, until cancelled."""
        while True:
            await self.write(families())
            await asyncio.sleep(WRITE_EVERY)

    async def write(self, families: Iterable[Metric]) -> None:
        """Write the metrics of this worker. Where that is not possible, only a warning is logged."""
        content = _dump(families)
        try:
            await asyncio.to_thread(self._write, next(self._numbers), content)
        except OSError as error:
            log.warning("metrics of this worker cannot be written for the others", why=str(error))

    async def with_others(self, families: Iterable[Metric]) -> list[Metric]:
        """Return these metrics of this worker added to those of all others."""
        return add_up([list(families), *await asyncio.to_thread(self._others)])

    def close(self) -> None:
        """Let this worker count as ended."""
        os.close(self._lock)

    def _write(self, number: int, content: bytes) -> None:
        """Write one state of the metrics. States have rising numbers, and an older one never replaces a newer one.

        A cancelled write goes on in its thread, so it can come after the last write of the worker.
        """
        fresh = self._path / f"{self._worker}.{number}.new"
        try:
            fresh.write_bytes(content)
            with self._replacing:
                if number > self._newest:
                    fresh.replace(self._path / f"{self._worker}.json")
                    self._newest = number
        finally:
            fresh.unlink(missing_ok=True)

    def _others(self) -> list[list[Metric]]:
        found = {
            name: self._read(name) for name in self._names() if name != self._worker
        }  # before the sum: what is added to it meanwhile is left out below
        ended, sums = self._read_sum()
        return [sums, *(metrics for name, metrics in found.items() if name not in ended)]

    def _read(self, name: str) -> list[Metric]:
        lives = self._lives(name)
        metrics = _load(self._path / f"{name}.json")
        return metrics if lives else [each for each in metrics if each.type != "gauge"]

    def _read_sum(self) -> tuple[list[str], list[Metric]]:
        try:
            stored = orjson.loads((self._path / "sum").read_bytes())
        except (FileNotFoundError, orjson.JSONDecodeError):
            return [], []
        return stored["names"], [_metric(each) for each in stored["families"]]

    def _names(self) -> list[str]:
        return sorted(path.stem for path in self._path.glob("*.json"))

    def _lives(self, name: str) -> bool:
        """Return True if a worker holds its lock."""
        try:
            lock = os.open(self._path / f"{name}.lock", os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def _add_up_ended(self) -> None:
        """Replace the files of ended workers by their sum, so that restarts do not add more and more files."""
        with self._only_one():
            names, sums = self._read_sum()
            ended = [name for name in self._names() if not self._lives(name)]
            new = [name for name in ended if name not in names]
            if new:
                families = add_up([sums, *(self._read(name) for name in new)])
                names = [*names, *new][-KEPT_NAMES:]
                stored = {"names": names, "families": [_plain(each) for each in families]}
                _replace(self._path / "sum", orjson.dumps(stored))
            for name in ended:
                for path in self._path.glob(f"{name}.*"):
                    path.unlink(missing_ok=True)

    @contextmanager
    def _only_one(self) -> Iterator[None]:
        lock = _open(self._path / "sum.lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def add_up(of_workers: Sequence[Iterable[Metric]]) -> list[Metric]:
    """Return the sum of the metrics of several workers. The first one's order counts."""
    sums: dict[str, Metric] = {}
    places: dict[tuple[str, tuple[tuple[str, str], ...]], int] = {}
    for metric in (each for worker in of_workers for each in worker):
        total = sums.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
        for sample in metric.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            if key not in places:
                places[key] = len(total.samples)
                total.samples.append(sample)
                continue
            before = total.samples[places[key]]
            value = max(before.value, sample.value) if metric.name in HIGHEST else before.value + sample.value
            total.samples[places[key]] = before._replace(value=value)
    return list(sums.values())


def _dump(families: Iterable[Metric]) -> bytes:
    return orjson.dumps([_plain(each) for each in families])


def _plain(metric: Metric) -> list[Any]:
    samples = [[sample.name, sample.labels, sample.value] for sample in metric.samples]
    return [metric.name, metric.documentation, metric.type, samples]


def _load(path: Path) -> list[Metric]:
    try:
        return [_metric(each) for each in orjson.loads(path.read_bytes())]
    except (FileNotFoundError, orjson.JSONDecodeError):  # it has just been added to the sum
        return []


def _metric(plain: list[Any]) -> Metric:
    name, documentation, kind, samples = plain
    metric = Metric(name, documentation, kind)
    for sample in samples:
        metric.add_sample(*sample)
    return metric


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def _replace(path: Path, content: bytes) -> None:
    """Write a file in one step, so that nobody reads a part of it."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    fresh.replace(path)
